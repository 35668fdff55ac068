"""Count a fault matrix: tests marked ``fault(ID)``, what came of them, and how long recovery took."""

import json
import platform
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

IDS = tuple(f"R{number}" for number in range(1, 24))
SURVIVED, LOST, SKIPPED = "survived", "lost", "skipped"


class FaultMatrix:
    """A pytest plugin that writes one JSON file of what was seen of every fault.

    Args:
        path: Of the file; see ``summary`` for what is in it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._marks: dict[str, list[str]] = {}
        self._seen: dict[str, tuple[str, list[float]]] = {}

    def pytest_collection_modifyitems(self, items: Iterable[Any]) -> None:
        """Note which test plays which faults."""
        for item in items:
            self._marks[item.nodeid] = fault_ids(item)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note how a test went: it survived if no phase of it failed and its body ran."""
        before, seconds = self._seen.get(report.nodeid, (SKIPPED, []))
        seconds = seconds + [value for name, value in report.user_properties if name == "recover_s"]
        if report.failed:
            before = LOST
        elif report.when == "call" and report.passed and before != LOST:
            before = SURVIVED
        self._seen[report.nodeid] = before, seconds if report.when == "teardown" else []

    def pytest_sessionfinish(self) -> None:
        """Write the file."""
        tests = [(name, self._marks[name], *found) for name, found in self._seen.items() if self._marks.get(name)]
        self._path.write_text(json.dumps(summary(tests), indent=1) + "\n", encoding="utf-8")


def fault_ids(item: Any) -> list[str]:
    """The ids an item is marked with, each once.

    Raises:
        ValueError: An id is none of ``IDS``.
    """
    found = [name for mark in item.iter_markers("fault") for name in mark.args]
    for name in found:
        if name not in IDS:
            raise ValueError(f"{item.nodeid} must be marked with faults from {IDS[0]} to {IDS[-1]}, got {name!r}.")
    return sorted(set(found), key=IDS.index)


def summary(tests: Iterable[tuple[str, list[str], str, list[float]]]) -> dict[str, Any]:
    """What was tried and survived, by fault.

    Args:
        tests: Node id, faults, what came of it, seconds of every recovery measured in it.

    Returns:
        ``machine``; ``all``: how many faults have a test, how many cases were tried (a test with parameters is as many
        as it has), survived and skipped; ``faults``: by id the same with the tests' names, and of ``recover_s`` the
        number, median and range where a test measured it.
    """
    by_fault: dict[str, list[tuple[str, str, list[float]]]] = defaultdict(list)
    outcomes = []
    for name, faults, outcome, seconds in tests:
        outcomes.append(outcome)
        for fault in faults:
            by_fault[fault].append((re.sub(r"\[.*", "", name), outcome, seconds))
    faults = {}
    for fault in (fault for fault in IDS if by_fault[fault]):
        rows = by_fault[fault]
        recovered = [each for _, _, seconds in rows for each in seconds]
        faults[fault] = {
            "tests": sorted({name for name, _, _ in rows}),
            **_counts([outcome for _, outcome, _ in rows]),
            "recover_s": _range(recovered) if recovered else None,
        }
    machine = {"platform": f"{platform.system()} {platform.machine()}", "python": platform.python_version()}
    return {
        "machine": machine,
        "all": {"faults": len(faults), "of": len(IDS), **_counts(outcomes)},
        "without_a_test": [fault for fault in IDS if fault not in faults],
        "faults": faults,
    }


def _counts(outcomes: list[str]) -> dict[str, int]:
    return {
        "survived": outcomes.count(SURVIVED),
        "tried": len(outcomes) - outcomes.count(SKIPPED),
        "skipped": outcomes.count(SKIPPED),
    }


def _range(seconds: list[float]) -> dict[str, float]:
    return {
        "n": len(seconds),
        "median": round(statistics.median(seconds), 2),
        "min": round(min(seconds), 2),
        "max": round(max(seconds), 2),
    }
