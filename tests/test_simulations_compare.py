"""Runs side by side: the numbers, what differs, what is refused, and where the page may be written."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.errors import DataError
from simulations.report.compare import as_json, lines, read_runs, user_differences, write_comparison
from simulations.report.results import Users
from sottovoce.cli import main

Json = dict[str, Any]


@pytest.fixture
def runs(tmp_path: Path, invented: Any) -> list[Path]:
    """Three runs: one, a better one at more ε, and one without any privacy that is better still."""
    return [
        invented.invented_run(tmp_path / "strict", epsilon=2.0),
        invented.invented_run(tmp_path / "loose", epsilon=8.0, better_by=0.02, seeds=(1, 2)),
        invented.invented_run(tmp_path / "bare", epsilon=None, better_by=0.03),
    ]


def change(path: Path, changes: Json) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | changes), encoding="utf-8")


def page_text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def table(said: list[str], title: str) -> dict[str, list[str]]:
    """Row -> cells of one table of the terminal."""
    start = next(i for i, line in enumerate(said) if line.startswith(title)) + 1
    block = said[start : said.index("", start) if "" in said[start:] else len(said)]
    return {cells[0]: cells[1:] for cells in (re.split(r"  +", line) for line in block)}


def test_rows_of_every_run_stand_side_by_side(runs: list[Path]) -> None:
    said = lines(read_runs(runs))
    found = table(said, "RMSE. 95 % interval")
    assert found[""] == ["1 strict", "2 loose", "3 bare"]
    assert found["personal"] == ["1.050 [1.030, 1.070]", "1.030 [1.010, 1.050]", "1.020 [1.000, 1.040]"]
    assert set(found) == {"", "constant", "user-mean", "pooled", "local", "federated", "personal", "seeds"} | {
        "federated-linear",
        "personal-linear",
    }
    assert found["seeds"] == ["1", "1, 2", "1"]
    spread = json.loads((runs[1] / "summary.json").read_text())["over_seeds"]["personal"]["rmse"]
    over = table(said, "RMSE over seeds")["personal"]
    assert over == ["–", f"{spread['value']:.3f} [{spread['low']:.3f}, {spread['high']:.3f}]", "–"]
    assert not any(line.startswith("RMSE over seeds") for line in lines(read_runs([runs[0], runs[2]])))
    private = table(said, "Privacy")
    assert private["privacy"] == ["ε = 2 per record, δ = 1e-05", "ε = 8 per record, δ = 1e-05", "NOT PRIVATE"]
    assert private["linear head"] == ["ε = 1.9 per record, δ = 1e-05", "ε = 7.9 per record, δ = 1e-05", "NOT PRIVATE"]
    assert private["trust"] == ["local", "local", "none"]
    assert table(said, "Cost")["Wall time, s"] == ["131.25"] * 3
    assert table(said, "Cost")["Continued after a break"] == ["no"] * 3


def test_settings_that_differ_and_no_others(runs: list[Path]) -> None:
    change(runs[1] / "scenario.json", {"extra": {"deep": {"er": [1, 2]}, "empty": {}}})
    found = table(lines(read_runs(runs)), "Settings that differ")
    assert {key: value for key, value in found.items() if key} == {
        "privacy.epsilon": ["2.0", "8.0", "–"],
        "privacy.trust": ["local", "local", "none"],
        "extra.deep.er": ["–", "[1, 2]", "–"],
        "extra.empty": ["–", "{}", "–"],
    }


def test_a_row_that_only_some_run_has_is_shown(runs: list[Path], invented: Any) -> None:
    rows = json.loads((runs[1] / "summary.json").read_text())["rows"]
    change(runs[1] / "summary.json", {"rows": rows | {"new": invented.scores(1.5)}})
    assert table(lines(read_runs(runs)), "RMSE. 95")["new"] == ["–", "1.500 [1.480, 1.520]", "–"]


def test_the_paired_difference_by_hand_and_by_the_slow_way() -> None:
    first = Users(metric="rmse", users=["a", "b", "c"], rows={"local": [1.0, 2.0, 3.0], "gone": [0, 0, 0]})
    run = Users(metric="rmse", users=["c", "a", "b"], rows={"local": [2.5, 1.5, 1.0], "new": [0, 0, 0]})
    found = user_differences(run, first)
    assert list(found) == ["local"]
    gaps = np.array([-0.5, 0.5, -1.0])  # c, a, b: by name, not by place
    assert found["local"].value == pytest.approx(gaps.mean())
    # 27 equally likely resamples: the percentiles of their exact distribution
    exact = sorted(gaps[[i, j, k]].mean() for i in range(3) for j in range(3) for k in range(3))
    low, high = np.quantile(np.repeat(exact, 1000), [0.025, 0.975])
    assert (found["local"].low, found["local"].high) == (pytest.approx(low), pytest.approx(high))
    assert user_differences(run.model_copy(update={"users": ["c", "a", "x"]}), first) == {}


def test_the_interval_is_that_of_a_paired_mean(runs: list[Path]) -> None:
    rng = np.random.default_rng(3)
    scores = json.loads((runs[1] / "user_scores.json").read_text())
    noise = rng.normal(0.01, 0.05, size=943)
    scores["rows"]["local"] = (np.array(scores["rows"]["local"]) + 0.02 + noise).tolist()
    change(runs[1] / "user_scores.json", scores)
    found = as_json(read_runs(runs[:2]))["differences"]["runs"]["2 loose"]["local"]
    half = 1.96 * noise.std(ddof=1) / 943**0.5  # far below the unpaired one: users differ by 0.25
    assert found["value"] == pytest.approx(noise.mean())
    assert found["high"] - found["low"] == pytest.approx(2 * half, rel=0.1)


def test_the_difference_is_said_to_be_what_it_is(runs: list[Path]) -> None:
    said = lines(read_runs(runs))
    note = next(line for line in said if line.startswith("Difference from 1 strict"))
    assert "Mean over users of (the user's own RMSE in the run minus that in the first run)" in note
    found = table(said, "Difference from")
    assert found["local"] == ["–", "-0.0200 [-0.0200, -0.0200]", "-0.0300 [-0.0300, -0.0300]"]
    assert set(found) == {"", "constant", "local", "personal", "personal-linear"}  # user_scores holds no other


def test_other_users_have_no_difference(runs: list[Path], invented: Any, tmp_path: Path) -> None:
    few = invented.invented_run(tmp_path / "few", users=900)
    said = lines(read_runs([runs[0], few]))
    assert any(line.endswith("None here: the runs do not hold the same users.") for line in said)


def test_what_cannot_be_compared_is_refused(runs: list[Path], invented: Any, tmp_path: Path) -> None:
    other = invented.invented_run(tmp_path / "other", task="generation")
    with pytest.raises(DataError, match=r"the same task: .*strict has rating, .*other has generation\. Compare"):
        read_runs([runs[0], other])
    data = json.loads((runs[1] / "summary.json").read_text())["data"]
    change(runs[1] / "summary.json", {"data": data | {"test": 5}})
    with pytest.raises(DataError, match=r"the same data: .* 20100 records\), .* 5 records\)"):
        read_runs(runs[:2])
    with pytest.raises(DataError, match="named twice"):
        read_runs([runs[0], runs[0].parent / "." / "strict"])
    change(runs[2] / "summary.json", {"schema": 1})
    with pytest.raises(DataError, match=r"bare/summary\.json: schema: must be 2"):
        read_runs([runs[0], runs[2]])


def figures(path: Path) -> Json:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page_text(path))
    assert found is not None
    loaded: Json = json.loads(found[1])
    return loaded


def test_the_page_shows_the_numbers(runs: list[Path], tmp_path: Path) -> None:
    out = write_comparison(read_runs(runs), out=tmp_path / "c.html")
    text = page_text(out)
    assert text.index("NOT PRIVATE:") < text.index("<h2>")
    assert "<td>1.030 [1.010, 1.050]</td>" in text
    assert not list(tmp_path.glob("*.partial"))
    drawn = figures(out)
    assert set(drawn) == {"rows", "utility"}
    by_run = {trace["name"]: trace for trace in drawn["rows"]["data"]}
    assert list(by_run) == ["1 strict", "2 loose", "3 bare (NOT PRIVATE)"]
    bare = by_run["3 bare (NOT PRIVATE)"]
    at = bare["text"].index("personal")
    assert bare["x"][at] == pytest.approx(1.02)
    assert bare["error_x"]["arrayminus"][at] == pytest.approx(0.02)
    assert round(bare["y"][at]) == drawn["rows"]["layout"]["yaxis"]["ticktext"].index("personal")
    utility = {trace["name"]: trace for trace in drawn["utility"]["data"]}
    assert utility["personal, per record"]["x"] == [2.0, 8.0]
    assert utility["personal-linear, per record"]["x"] == [1.9, 7.9]
    assert utility["personal, per record"]["y"] == [pytest.approx(1.05), pytest.approx(1.03)]
    assert "not drawn: 3 bare (NOT PRIVATE)" in text


def test_different_units_are_different_lines(runs: list[Path], tmp_path: Path, invented: Any) -> None:
    change(runs[1] / "summary.json", {"privacy": invented.privacy(8.0) | {"unit": "user"}})
    drawn = figures(write_comparison(read_runs(runs[:2]), out=tmp_path / "c.html"))
    named = [trace["name"] for trace in drawn["utility"]["data"]]
    assert {"personal, per record", "personal, per user"} <= set(named)


def test_equal_privacy_has_no_plot_of_it(tmp_path: Path, invented: Any) -> None:
    runs = [invented.invented_run(tmp_path / name, task="generation") for name in ("a", "b")]
    out = write_comparison(read_runs(runs), out=tmp_path / "c.html")
    assert set(figures(out)) == {"rows"}
    assert "NOT PRIVATE" not in page_text(out)
    assert "Perplexity" in page_text(out)


def test_names_from_data_are_escaped(runs: list[Path], tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>"
    settings = json.loads((runs[0] / "scenario.json").read_text())
    change(runs[0] / "scenario.json", settings | {evil: evil})
    for run in runs:
        change(run / "summary.json", {"claim": evil, "scenario": evil})
        rows = json.loads((run / "summary.json").read_text())["rows"]
        change(run / "summary.json", {"rows": rows | {evil: rows["local"]}})
    renamed = runs[0].rename(tmp_path / "<img>")
    text = page_text(write_comparison(read_runs([renamed, *runs[1:]]), out=tmp_path / "c.html"))
    assert "<img" not in text.split("<script>")[0]


def test_where_the_page_may_be_written(runs: list[Path], tmp_path: Path) -> None:
    comparison = read_runs(runs)
    (tmp_path / "folder.html").mkdir()
    mine = tmp_path / "mine.html"
    mine.write_text("<!doctype html>")
    for out, message in (
        (tmp_path / "folder.html", "is something else"),
        (mine, "is something else"),
        (tmp_path / "scenario.toml", "must name a file that ends in .html"),
        (tmp_path / "none" / "c.html", "in a folder that exists"),
    ):
        with pytest.raises(DataError, match=message):
            write_comparison(comparison, out=out)
    assert mine.read_text() == "<!doctype html>"
    out = write_comparison(comparison, out=tmp_path / "c.html")
    assert write_comparison(comparison, out=out) == out  # an older comparison is replaced


def test_the_command_compares_several_runs(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(run) for run in runs]
    assert main(["report", *names]) == 0
    page = runs[0].parent / "comparison.html"
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"comparison: {page}"
    assert page.is_file()
    assert not (runs[0] / "report.html").exists()
    assert main(["report", *names, "--json", "--out", str(runs[0].parent / "other.html")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["page"] == str(runs[0].parent / "other.html")
    assert [run["private"] for run in found["runs"]] == [True, True, False]
    assert found["runs"][1]["rows"]["personal"]["value"] == pytest.approx(1.03)
    assert found["runs"][1]["settings"] == {"privacy.epsilon": 8.0, "privacy.trust": "local"}
    assert set(found["differences"]["runs"]) == {"2 loose", "3 bare"}


def test_the_command_refuses_in_one_line(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["report", str(runs[0]), "--out", "x.html"],
        ["report", str(runs[0]), str(runs[0])],
        ["report", str(runs[0]), str(runs[0] / "none")],
        ["report", str(runs[0]), str(runs[1]), "--out", str(runs[0])],
    ):
        assert main(arguments) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert len(said.err.splitlines()) == 1


def test_the_command_still_reports_one_run(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(runs[0])]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {runs[0] / 'report.html'}"
    assert main(["report", str(runs[0]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == 2


def test_the_release_of_statistics_has_its_own_claim_and_line(runs: list[Path], tmp_path: Path, invented: Any) -> None:
    for run, epsilon in zip(runs, (1.5, 7.5, None), strict=True):
        invented.add_statistics(run, epsilon=epsilon)
    comparison = read_runs(runs)
    private = table(lines(comparison), "Privacy")
    assert private["dp-statistics"] == [
        "ε = 1.5 per record, δ = 1e-05", "ε = 7.5 per record, δ = 1e-05", "NOT PRIVATE"
    ]  # fmt: skip
    found = as_json(comparison)["runs"]
    assert [run["privacy_statistics"]["epsilon"] for run in found] == [1.5, 7.5, None]
    utility = {
        trace["name"]: trace
        for trace in figures(write_comparison(comparison, out=tmp_path / "c.html"))["utility"]["data"]
    }
    assert utility["dp-statistics, per record"]["x"] == [1.5, 7.5]
    assert "local, per record" not in utility
