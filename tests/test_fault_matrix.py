"""The fault matrix counts what came of tests, and its page has a row for every fault and names tests that exist."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "faults.md"


def report(node, when, outcome, *properties):
    return SimpleNamespace(
        nodeid=node, when=when, failed=outcome == "failed", passed=outcome == "passed", user_properties=[*properties]
    )


def item(node, *ids):
    marks = [SimpleNamespace(args=each) for each in ids]
    return SimpleNamespace(nodeid=node, iter_markers=lambda name: marks if name == "fault" else [])


def test_what_came_of_every_fault_is_counted(fault_matrix, tmp_path):

    plugin = fault_matrix.FaultMatrix(tmp_path / "faults.json")
    plugin.pytest_collection_modifyitems(
        [item("t.py::a[1]", ("R2",)), item("t.py::a[2]", ("R2",)), item("t.py::b", ("R2", "R11")), item("t.py::c")]
    )
    seconds = ("recover_s", 4.0), ("recover_s", 6.0), ("stop_s", 99.0)
    for node, outcomes, properties in (
        ("t.py::a[1]", ("passed", "passed", "passed"), seconds),
        ("t.py::a[2]", ("passed", "passed", "failed"), ()),  # what it left behind could not be cleared away
        ("t.py::b", ("skipped", "passed"), ()),
        ("t.py::c", ("passed", "passed", "passed"), ()),
    ):
        phases = ("setup", "call", "teardown") if len(outcomes) == 3 else ("setup", "teardown")
        for when, outcome in zip(phases, outcomes, strict=True):
            plugin.pytest_runtest_logreport(report(node, when, outcome, *properties))
    plugin.pytest_sessionfinish()
    found = json.loads((tmp_path / "faults.json").read_text())
    assert found["all"] == {"faults": 2, "of": 23, "survived": 1, "tried": 2, "skipped": 1}
    assert found["faults"]["R2"] == {
        "tests": ["t.py::a", "t.py::b"],
        "survived": 1,
        "tried": 2,
        "skipped": 1,
        "recover_s": {"n": 2, "median": 5.0, "min": 4.0, "max": 6.0},
    }
    assert found["faults"]["R11"] == {"tests": ["t.py::b"], "survived": 0, "tried": 0, "skipped": 1, "recover_s": None}
    assert "R2" not in found["without_a_test"]
    assert len(found["without_a_test"]) == 21


def test_a_fault_that_nobody_listed_is_an_error(fault_matrix):
    with pytest.raises(ValueError, match=r"from R1 to R23, got 'R24'"):
        fault_matrix.fault_ids(item("t.py::a", ("R24",)))


def test_the_page_has_a_row_for_every_fault_and_names_tests_that_exist(fault_matrix):
    rows = re.findall(r"^\| (R\d+) \|.*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == list(fault_matrix.IDS)
    for row in PAGE.read_text(encoding="utf-8").splitlines():
        if row.startswith("| R"):
            named = re.findall(r"`(test_\w+)(…?)`", row)
            assert named, row
            for name, cut in named:
                assert any(has_test(path, name, cut=bool(cut)) for path in (ROOT / "tests").glob("test_*.py")), name


def has_test(path, name, *, cut):
    if path.stem == name:
        return True
    return re.search(rf"^def {name}{'' if cut else r'[(]'}", path.read_text(encoding="utf-8"), re.MULTILINE) is not None


def test_every_fault_has_a_test(fault_matrix):
    marked = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        for ids in re.findall(r"mark\.fault\(([^)]*)\)", path.read_text(encoding="utf-8")):
            marked |= set(re.findall(r"R\d+", ids))
    assert marked >= set(fault_matrix.IDS)
