"""The report: what it says, must say where private loses, and what it refuses."""

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.errors import DataError
from simulations.report.page import page as page_of
from simulations.report.report import headline, write_report

Json = dict[str, Any]


def interval(value: float, spread: float = 0.02) -> Json:
    return {"value": value, "low": value - spread, "high": value + spread}


@pytest.fixture
def run_folder(tmp_path: Path, invented: Any) -> Path:
    """An invented run in which ``personal`` wins against every row."""
    return invented.invented_run(tmp_path)


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def change_summary(folder: Path, **changes: Any) -> Json:
    summary: Json = read(folder / "summary.json") | changes
    write(folder / "summary.json", summary)
    return summary


class _Page(HTMLParser):
    """Tags with their attributes, the text a reader sees, and the headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.headings: list[str] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("script", "style"):
            self.words.append(data)
        if self._open and self._open[-1] in ("h1", "h2", "h3"):
            self.headings.append(data)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def report(folder: Path) -> _Page:
    return _Page(write_report(folder).read_text(encoding="utf-8"))


def test_says_what_the_run_found(run_folder: Path) -> None:
    target = write_report(run_folder)
    assert target == run_folder / "report.html"
    assert not list(run_folder.glob("*.partial"))
    page = report(run_folder)
    assert page.headings[:2] == ["movielens", "This is a simulation"]
    assert "would spend ε = 8 at δ = 1e-5 per record and device." in page.text
    assert "privacy.noise reads seeded" in re.sub(r" ?(\(|\)) ?", " ", page.text)
    assert "tuning: not covered" in page.text
    assert "One record is hidden; traits" in page.text
    assert "reaches: RMSE 1.050 [1.030, 1.070]" in page.text
    assert "better than local (1.105 [1.085, 1.125]) by 0.0550 (95 % interval 0.0510 to 0.0590)" in (
        re.sub(r"local \(", "local (", page.text)
    )
    assert "55.0 % [52.0, 58.0] of users are better off than with local" in page.text
    assert "NOT PRIVATE" not in page.text
    for fact in (
        "2.13.0",
        "ffa-lora, then fine-tune",
        "not_finite 2",
        "heads/7",
        "2.4e-06",
        "131.25",
        "18,860",
    ):
        assert fact in page.text
    assert [words for tag, words in page.tags if tag == "h1"] == [{}]


def test_every_row_and_metric_is_listed_known_or_not(run_folder: Path, invented: Any) -> None:
    summary = change_summary(run_folder)
    summary["rows"]["a-new-row"] = invented.scores(1.2) | {"ndcg": interval(0.4)}
    del summary["rows"]["constant"]["share_gaining"]
    change_summary(run_folder, rows=summary["rows"])
    page = report(run_folder)
    for row in summary["rows"]:
        assert row in page.text
    assert "no description" in page.text
    assert "ndcg" in page.text
    # one best value per column, marked by a star and a word; an unknown metric has no best
    assert page.text.count("best: ") == 5 + 8  # share_gaining is the same in the eight rows that have it


def test_best_is_least_error_and_highest_share(run_folder: Path) -> None:
    text = write_report(run_folder).read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith('<tr><th scope="row">personal <small>'))
    cells = row.split("<td>")[1:]
    assert ["best: " in cell for cell in cells] == [True] * 6
    other = next(line for line in text.splitlines() if line.startswith('<tr><th scope="row">constant <small>'))
    assert ["best: " in cell for cell in other.split("<td>")[1:]] == [False] * 5 + [True]


def test_no_loss_is_claimed_where_there_is_none(run_folder: Path) -> None:
    page = report(run_folder)
    assert "Nowhere: no other row beats personal in any metric." in page.text
    assert 'id="losses"' not in write_report(run_folder).read_text(encoding="utf-8")


@pytest.mark.parametrize("other", ["constant", "user-mean", "pooled", "local", "federated-linear", "personal-linear"])
def test_a_loss_is_said_with_its_interval(run_folder: Path, other: str) -> None:
    summary = change_summary(run_folder)
    summary["rows"][other]["rmse"] = interval(1.03)
    summary["differences"][f"personal - {other}"] = {"rmse": {"value": 0.02, "low": 0.011, "high": 0.029}}
    change_summary(run_folder, **summary)
    losses = _losses(run_folder)
    assert len(losses) == 1
    assert f"worse than {other} (1.030 [1.010, 1.050]) by 0.0200 (95 % interval 0.0110 to 0.0290)" in losses[0]
    assert "exclude" not in losses[0]
    assert "Nowhere" not in report(run_folder).text


def test_a_loss_by_the_reversed_difference_or_none_at_all(run_folder: Path) -> None:
    summary = change_summary(run_folder)
    summary["rows"]["pooled"]["rmse"] = interval(1.03)
    del summary["differences"]["personal - pooled"]
    change_summary(run_folder, **summary)
    assert "by 0.0200 (no paired interval recorded)" in _losses(run_folder)[0]
    summary["differences"]["pooled - personal"] = {"rmse": {"value": -0.02, "low": -0.045, "high": 0.005}}
    change_summary(run_folder, **summary)
    said = "by 0.0200 (95 % interval -0.0050 to 0.0450, which does not exclude zero)"
    assert said in _losses(run_folder)[0]


def test_a_loss_in_another_metric_alone_is_said(run_folder: Path) -> None:
    summary = change_summary(run_folder)
    summary["rows"]["local"]["accuracy"] = interval(0.6, 0.01)
    change_summary(run_folder, rows=summary["rows"])
    losses = _losses(run_folder)
    assert len(losses) == 1
    assert "Accuracy 37.5 % [36.5, 38.5] against 60.0 % [59.0, 61.0]" in losses[0]


def _losses(folder: Path) -> list[str]:
    text = write_report(folder).read_text(encoding="utf-8")
    found = re.search(r'<ul id="losses">(.*?)</ul>', text, flags=re.DOTALL)
    assert found is not None
    return [re.sub("<[^>]+>", "", item) for item in found[1].split("</li>") if item]


@pytest.mark.parametrize("kind", ["trust", "epsilon", "linear"])
def test_not_private_is_said_at_the_top(run_folder: Path, kind: str, invented: Any) -> None:
    terms = {
        "trust": {"privacy": invented.privacy(8.0, trust="none")},
        "epsilon": {"privacy": invented.privacy(None)},
        "linear": {"privacy_linear": invented.privacy(None, trust="none")},
    }[kind]
    summary = change_summary(run_folder, **terms)
    text = write_report(run_folder).read_text(encoding="utf-8")
    assert text.index("NOT PRIVATE") < text.index("This is a simulation")
    assert headline(summary)[0].startswith("NOT PRIVATE. ")
    assert "One record is hidden" not in text
    assert "would</em> spend" not in text


def test_a_run_without_epsilon_has_no_plot_of_it(run_folder: Path, invented: Any) -> None:
    change_summary(run_folder, privacy=invented.privacy(None, trust="none"), privacy_linear=None)
    lines = [json.loads(one) | {"epsilon": None} for one in (run_folder / "metrics.jsonl").read_text().splitlines()]
    (run_folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    page = report(run_folder)
    assert "there is no ε to show" in page.text
    assert "would spend on what leaves" not in page.text
    assert "without any noise" in page.text
    assert {words.get("id") for _, words in page.tags} >= {"error", "wire", "gain"}
    assert "epsilon" not in figures(run_folder)


EVIL = "</script><script>alert('x')</script><img src=x onerror=alert(1)>"


def test_everything_from_data_is_escaped(run_folder: Path, invented: Any) -> None:
    summary = change_summary(run_folder)
    summary["rows"][EVIL] = invented.scores(1.0)
    summary["scenario"] = summary["claim"] = summary["data"]["name"] = EVIL
    summary["stamps"] = [EVIL]
    summary["heads"][0] |= {"user": EVIL, "path": EVIL}
    summary["heads_base"]["path"] = EVIL
    summary["federation"] |= {"method": EVIL, "personal_method": EVIL, "rejected": {EVIL: 1}}
    summary["privacy"] |= {"unit": EVIL, "noise": EVIL, "sentence": EVIL + "!", EVIL: EVIL}
    summary["cost"][EVIL] = 1.0
    summary["rows"]["local"][EVIL] = summary["rows"]["personal"][EVIL] = interval(1.0)
    summary["metrics"][EVIL] = {"better": "more", "description": EVIL}
    summary["task"] = EVIL
    summary["resumed"] = [{"campaign": EVIL, "seed": 1, "round": 3, "at": EVIL}]
    change_summary(run_folder, **summary)
    write(run_folder / "scenario.json", {EVIL: EVIL})
    run = read(run_folder / "run.json")
    run |= {"created": EVIL, "command": EVIL, "commit": EVIL}
    for part in ("versions", "seeds", "machine"):
        run[part] |= {EVIL: EVIL}
    write(run_folder / "run.json", run)
    users = read(run_folder / "user_scores.json")
    users["rows"]["personal" + EVIL] = users["rows"]["local"]
    users["users"][0] = EVIL
    write(run_folder / "user_scores.json", users)
    lines = [json.loads(one) for one in (run_folder / "metrics.jsonl").read_text().splitlines()]
    text = "".join(json.dumps(one | {"campaign": EVIL, "rejected": {EVIL: 1}}) + "\n" for one in lines)
    (run_folder / "metrics.jsonl").write_text(text)
    page = report(run_folder)
    assert [tag for tag, _ in page.tags].count("script") == 3
    assert "img" not in {tag for tag, _ in page.tags}
    assert page.text.count("alert(1)") > 25  # shown as text
    drawn = json.dumps(figures(run_folder))
    assert "&lt;img" in drawn  # plotly reads HTML in its labels
    assert "<img" not in drawn


def test_no_label_can_close_the_script_of_the_figures() -> None:
    text = page_of("title", "", figures={"error": {"name": EVIL}})
    assert [tag for tag, _ in _Page(text).tags].count("script") == 3
    assert "img" not in {tag for tag, _ in _Page(text).tags}


def test_loads_nothing(run_folder: Path) -> None:
    page = report(run_folder)
    for tag, words in page.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert (words.get(name) or "data:").startswith("data:"), f"{tag} loads {words[name]}"
    policy = next(words["content"] for tag, words in page.tags if "http-equiv" in words)
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy
    text = write_report(run_folder).read_text(encoding="utf-8")
    assert text.count("* plotly.js v") == 1
    style = text.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def figures(folder: Path) -> Json:
    text = write_report(folder).read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', text)
    assert found is not None
    loaded: Json = json.loads(found[1])
    return loaded


def test_plots_show_the_numbers(run_folder: Path) -> None:
    drawn = figures(run_folder)
    assert set(drawn) == {"error", "epsilon", "wire", "gain"}
    places = {words["id"]: words for tag, words in report(run_folder).tags if words.get("role") == "img"}
    assert set(places) == set(drawn)
    assert all(words["aria-label"] for words in places.values())
    wire = {trace["name"]: trace["y"] for trace in drawn["wire"]["data"]}
    assert wire["lora, up"][0] == 0
    assert wire["lora, up"][-1] == pytest.approx(20 * 943 * 50_000 / 1e6)
    assert [trace["y"][-1] for trace in drawn["epsilon"]["data"]] == [8.0, 8.0]
    error = {trace["name"]: trace["y"] for trace in drawn["error"]["data"]}
    assert error["linear, shared and private"][0] == pytest.approx(1.13)
    assert error["lora, shared alone"][0] == pytest.approx(1.2)
    users = read(run_folder / "user_scores.json")["rows"]
    for trace in drawn["gain"]["data"]:
        gain = np.subtract(users["local"], users[trace["name"]])
        assert sum(trace["y"]) == 943
        x, y = np.array(trace["x"]), np.array(trace["y"])
        assert y[x > 0].sum() == (gain >= 0).sum()  # zero is an edge of the bins
        assert np.average(x, weights=y) == pytest.approx(gain.mean(), abs=0.01)


def test_users_without_spread_or_local_row(run_folder: Path) -> None:
    write(
        run_folder / "user_scores.json", {"metric": "rmse", "users": ["1"], "rows": {"local": [1.0], "personal": [1.0]}}
    )
    (trace,) = figures(run_folder)["gain"]["data"]
    assert trace["y"] == [1]
    write(run_folder / "user_scores.json", {"metric": "rmse", "users": ["1"], "rows": {"personal": [1.0]}})
    assert "gain" not in figures(run_folder)


def test_headline(run_folder: Path) -> None:
    summary = read(run_folder / "summary.json")
    lines = headline(summary)
    assert lines[0] == summary["claim"]
    assert [line.split()[1] for line in lines[1:5]] == ["local", "federated", "personal", "personal-linear"]
    assert "1.105 [1.085, 1.125]" in lines[1]
    assert "-0.0550 [-0.0590, -0.0510]" in lines[5]
    assert len(lines) == 6
    short = copy.deepcopy(summary)
    for row in ("personal-linear", "federated-linear"):
        del short["rows"][row]
    assert len(headline(short)) == 5
    assert "below 0" in lines[5]
    with pytest.raises(DataError, match=r"summary\.json: rows: "):
        headline(summary | {"rows": {}})


FILES = ("run.json", "scenario.json", "metrics.jsonl", "user_scores.json", "summary.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [None, "", "{", '{"value": NaN}', "[1]", b"\xff"])
def test_a_missing_or_broken_file_is_named(run_folder: Path, name: str, content: str | bytes | None) -> None:
    path = run_folder / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=re.escape(str(path))):
        write_report(run_folder)
    assert not (run_folder / "report.html").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 1}, r"schema: must be 2, got 1; .*Run the scenario again\.$"),
        ({"schema": None}, "schema: must be 2, got None"),
        ({"metric": "ndcg"}, "metrics must describe the primary metric ndcg"),
        ({"seeds": []}, "seeds: "),
        ({"over_seeds": {"local": {"rmse": interval(1.0) | {"values": [1.0, 1.0, 1.0]}}}}, "must have 1 values each"),
        ({"privacy": {"trust": "local"}}, r"privacy\.unit: Field required"),
        ({"rows": {"local": {"mae": interval(1.0)}}}, "every row must have the metric rmse, missing in local"),
        ({"rows": {"local": {"rmse": {"value": 1.0, "low": 0.9}}}}, r"rows\.local\.rmse\.high"),
    ],
)
def test_a_wrong_key_is_named(run_folder: Path, changes: Json, message: str) -> None:
    summary = change_summary(run_folder, **changes)
    with pytest.raises(DataError, match=message):
        write_report(run_folder)
    with pytest.raises(DataError, match=message):
        headline(summary)


def test_not_a_number_and_uneven_users_are_refused(run_folder: Path) -> None:
    summary = read(run_folder / "summary.json")
    summary["rows"]["local"]["rmse"]["low"] = float("nan")
    with pytest.raises(DataError, match="value, low and high must be finite"):
        headline(summary)
    write(run_folder / "user_scores.json", {"metric": "rmse", "users": ["1", "2"], "rows": {"local": [1.0]}})
    with pytest.raises(DataError, match="every row must have 2 values, one per user, not so: local"):
        write_report(run_folder)
    write(run_folder / "user_scores.json", {"metric": "rmse", "users": ["1", "1"], "rows": {"local": [1.0, 2.0]}})
    with pytest.raises(DataError, match="told apart by name"):
        write_report(run_folder)


def test_several_seeds_are_shown_by_mean_and_range(tmp_path: Path, invented: Any) -> None:
    folder = invented.invented_run(tmp_path, seeds=(1, 2, 3))
    page = report(folder)
    assert "RMSE, 3 seeds" in page.text
    assert "t-interval of the mean over the seeds 1, 2, 3" in page.text
    assert "seeds 1, 2, 3, run 2031" in page.text
    text = (folder / "report.html").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith('<tr><th scope="row">personal <small>'))
    spread = read(folder / "summary.json")["over_seeds"]["personal"]["rmse"]
    low, high = (f"{spread[end]:.3f}" for end in ("low", "high"))
    assert f"<td>{low} – {high}<small>seeds 1.050 to 1.070</small></td>" in row
    drawn = figures(folder)["error"]["data"]
    assert len(drawn) == 4 * 3  # two campaigns, two parts: two edges of a band and a mean each
    below, above, mean = drawn[:3]
    lines = [json.loads(one) for one in (folder / "metrics.jsonl").read_text().splitlines()]
    first = [one["validation"]["personal"] for one in lines if one["campaign"] == "lora" and one["round"] == 0]
    assert (below["y"][0], above["y"][0]) == (min(first), max(first))
    assert mean["y"][0] == pytest.approx(np.mean(first))
    assert above["fill"] == "tonexty"
    assert [trace.get("showlegend") for trace in (below, above, mean)] == [False, False, None]
    assert all("fill" not in trace for trace in figures(folder)["epsilon"]["data"])  # the same for every seed


def test_a_round_that_not_every_seed_has_is_left_out(tmp_path: Path, invented: Any) -> None:
    folder = invented.invented_run(tmp_path, seeds=(1, 2))
    lines = [json.loads(one) for one in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [one for one in lines if not (one["seed"] == 2 and one["round"] == 8)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in kept))
    for trace in figures(folder)["error"]["data"]:
        assert trace["x"] == [x for x in range(0, 21, 2) if x != 8]


def test_one_seed_has_no_range(run_folder: Path) -> None:
    assert "seeds" not in report(run_folder).text.replace("Seeds", "").split("To repeat it")[0].replace(
        "whoever has the seeds", ""
    )
    assert all("fill" not in trace for trace in figures(run_folder)["error"]["data"])


def test_another_task_is_shown_by_its_own_metric(tmp_path: Path, invented: Any) -> None:
    folder = invented.invented_run(tmp_path, task="generation")
    change_summary(folder, heads=[{"user": "7", "path": "heads/7", "bytes": 5}])
    page = report(folder)
    assert "reaches: Perplexity 21.500 [20.700, 22.300]" in page.text
    assert "Perplexity exp of the mean loss per response token (less is better)" in page.text
    assert "RMSE" not in page.text
    assert "rating" not in page.text
    assert figures(folder)["error"]["layout"]["yaxis"]["title"]["text"] == "validation Perplexity"
    lines = headline(read(folder / "summary.json"))
    assert [line.split()[:2] for line in lines[1:5]] == [
        ["Perplexity", row] for row in ("base", "local", "federated", "personal")
    ]


def test_a_metric_of_which_more_is_better_is_read_so(tmp_path: Path, invented: Any) -> None:
    folder = invented.invented_run(tmp_path, task="generation")
    more = {"perplexity": {"better": "more", "description": "turned round"}}
    summary = change_summary(folder, metrics=more)
    losses = _losses(folder)
    assert len(losses) == 3
    assert "worse than base" in losses[0]
    assert "above 0" in headline(summary)[-1]
    scores = read(folder / "user_scores.json")["rows"]
    (trace,) = (one for one in figures(folder)["gain"]["data"] if one["name"] == "personal")
    gained = np.subtract(scores["personal"], scores["local"])
    assert np.average(trace["x"], weights=trace["y"]) == pytest.approx(gained.mean(), abs=0.01)


def test_a_run_that_was_continued_says_so(run_folder: Path) -> None:
    assert "interrupted" not in report(run_folder).text
    change_summary(run_folder, resumed=[{"campaign": "lora", "seed": 1, "round": 7, "at": "2031-05-06T08:00:00"}])
    text = report(run_folder).text
    assert "the cost is that of the last process only" in text
    assert "lora, seed 1: after round 7, at 2031-05-06T08:00:00" in text


def test_another_release_on_the_same_data_is_explained_with_its_own_claim(run_folder: Path, invented: Any) -> None:
    assert not any(words.get("id") == "statistics" for _, words in report(run_folder).tags)
    page = report(invented.add_statistics(run_folder))
    assert any(words.get("id") == "statistics" for _, words in page.tags)
    assert "no description" not in page.text
    assert "another release on the same data, with a claim of its own: Statistics, once: (8.0, 1e-5)" in page.text
    assert "better than dp-statistics (1.060 [1.040, 1.080]) by 0.0100 (95 % interval 0.0060 to 0.0140)" in page.text
    assert [line.split()[1] for line in headline(read(run_folder / "summary.json"))[1:4]] == [
        "local", "dp-statistics", "federated"
    ]  # fmt: skip


def test_a_release_without_noise_makes_no_claim(tmp_path: Path, invented: Any) -> None:
    folder = invented.add_statistics(invented.invented_run(tmp_path / "bare", epsilon=None), epsilon=None)
    assert "NOT PRIVATE" in report(folder).text


@pytest.mark.parametrize(
    ("stamp", "said"),
    [
        ("tuning: not covered", "ε does not cover that choice"),
        ("tuning run: these users take part in no campaign", "whom the scenario sets aside"),
        ("tuning: constants chosen on users outside the campaign, as the scenario states", "nothing in this run can"),
    ],
)
def test_every_stamp_about_tuning_is_explained(run_folder: Path, stamp: str, said: str) -> None:
    change_summary(run_folder, stamps=[stamp])
    assert said in report(run_folder).text
