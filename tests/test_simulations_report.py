"""The report: what it says, must say where private loses, what it refuses, and how a browser shows it."""

import copy
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.errors import DataError
from simulations.page import page as page_of
from simulations.report import headline, write_report

Json = dict[str, Any]


def interval(value: float, spread: float = 0.02) -> Json:
    return {"value": value, "low": value - spread, "high": value + spread}


def scores(rmse: float) -> Json:
    return {
        "rmse": interval(rmse),
        "mae": interval(0.8 * rmse),
        "accuracy": interval(0.9 - rmse / 2, 0.01),
        "user_rmse": interval(rmse - 0.01),
        "worst_decile": interval(1.6 * rmse, 0.05),
        "share_gaining": interval(0.55, 0.03),
    }


def privacy(epsilon: float | None, trust: str = "local") -> Json:
    return {
        "trust": trust,
        "unit": "record",
        "relation": "add or remove one record",
        "epsilon": epsilon,
        "delta": 1e-5,
        "sampling": "full batch",
        "accountant": "PLD",
        "max_participations": 20,
        "noise": "seeded",
        "noise_multiplier": 3.2,
        "clip_norm": 0.5,
        "steps": 1,
        "rounds": 20,
        "sentence": "Each device is (8, 1e-5)-differentially private per record over 20 rounds.",
    }


def cost(bytes_up: int) -> Json:
    return {
        "wall_s": 131.25,
        "client_rounds": 18860,
        "engine_ms_per_client_round": 5.5,
        "bytes_up_per_client_round": bytes_up,
        "bytes_down_per_client_round": bytes_up,
        "peak_rss_mib": 812.4,
    }


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """An invented run in which ``personal`` wins against every row."""
    rmse = {
        "constant": 1.25,
        "user-mean": 1.15,
        "pooled": 1.11,
        "local": 1.105,
        "federated": 1.14,
        "personal": 1.05,
        "federated-linear": 1.13,
        "personal-linear": 1.07,
    }
    summary = {
        "schema": 1,
        "scenario": "movielens",
        "claim": "A deployment with these settings would spend ε = 8 at δ = 1e-5 per record and device.",
        "stamps": ["tuning: not covered"],
        "rows": {row: scores(value) for row, value in rmse.items()},
        "differences": {
            f"personal - {row}": {"rmse": interval(1.05 - value, 0.004)}
            for row, value in rmse.items()
            if row != "personal"
        },
        "privacy": privacy(8.0),
        "privacy_linear": privacy(7.9),
        "cost": cost(50_000),
        "cost_linear": cost(1_540),
        "heads": [{"user": "7", "path": "heads/7", "bytes": 102_400, "parity_max_abs": 2.4e-6}],
        "heads_base": {"path": "heads/base.onnx", "bytes": 90_500_000},
        "federation": {
            "method": "ffa-lora",
            "personal_method": "fine-tune",
            "rounds": 20,
            "clients": 943,
            "replies": 18_858,
            "rejected": {"not_finite": 2},
        },
        "data": {"name": "ml-100k", "users": 943, "fit": 71_500, "validation": 8_400, "test": 20_100},
    }
    rng = np.random.default_rng(5)
    local = rng.gamma(20, 0.055, size=943)
    rows = {"constant": local + 0.1, "local": local}
    for row, gain in (("personal", 0.05), ("personal-linear", 0.03)):
        rows[row] = np.abs(local - rng.normal(gain, 0.1, size=943))
    rounds = [
        {
            "campaign": campaign,
            "round": number,
            "validation_rmse_federated": floor + 0.1 * 0.8**number + 0.05,
            "validation_rmse_personal": floor + 0.06 * 0.8**number,
            "epsilon": 8.0 * (number / 20) ** 0.5,
            "bytes_up": 943 * size * number,
            "bytes_down": 943 * size * number,
            "replies": 943 * (number > 0),
            "rejected": {"not_finite": 1} if number == 4 else {},
        }
        for campaign, floor, size in (("lora", 1.05, 50_000), ("linear", 1.07, 1_540))
        for number in range(0, 21, 2)  # a scenario may observe every second round
    ]
    write(tmp_path / "summary.json", summary)
    write(tmp_path / "scenario.json", {"data": {"name": "ml-100k"}, "privacy": {"trust": "local"}})
    write(
        tmp_path / "user_rmse.json",
        {"users": [str(n + 1) for n in range(943)], "rows": {row: v.tolist() for row, v in rows.items()}},
    )
    write(
        tmp_path / "run.json",
        {
            "scenario_name": "movielens",
            "created": "2031-05-06T07:08:09+00:00",
            "command": "sottovoce simulate simulations/scenarios/movielens.toml",
            "versions": {"sottovoce": "0.1.0", "torch": "2.13.0", "flwr": "1.41.0"},
            "seeds": {"run": 1, "bootstrap": 2},
            "machine": {"cpus": 2, "threads": 1, "python": "3.11.9", "platform": "Linux"},
            "commit": None,
        },
    )
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rounds))
    return tmp_path


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
    assert "reaches an RMSE of 1.050 [1.030, 1.070]" in page.text
    assert "better than local (1.105 [1.085, 1.125]) by 0.0550 (95 % interval 0.0510 to 0.0590)" in (
        re.sub(r"local \(", "local (", page.text)
    )
    assert "55.0 % [52.0, 58.0] of users have a lower error" in page.text
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


def test_every_row_and_metric_is_listed_known_or_not(run_folder: Path) -> None:
    summary = change_summary(run_folder)
    summary["rows"]["a-new-row"] = scores(1.2) | {"ndcg": interval(0.4)}
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
def test_not_private_is_said_at_the_top(run_folder: Path, kind: str) -> None:
    terms = {
        "trust": {"privacy": privacy(8.0, trust="none")},
        "epsilon": {"privacy": privacy(None)},
        "linear": {"privacy_linear": privacy(None, trust="none")},
    }[kind]
    summary = change_summary(run_folder, **terms)
    text = write_report(run_folder).read_text(encoding="utf-8")
    assert text.index("NOT PRIVATE") < text.index("This is a simulation")
    assert headline(summary)[0].startswith("NOT PRIVATE. ")
    assert "One record is hidden" not in text
    assert "would</em> spend" not in text


def test_a_run_without_epsilon_has_no_plot_of_it(run_folder: Path) -> None:
    change_summary(run_folder, privacy=privacy(None, trust="none"), privacy_linear=None)
    lines = [json.loads(one) | {"epsilon": None} for one in (run_folder / "metrics.jsonl").read_text().splitlines()]
    (run_folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    page = report(run_folder)
    assert "there is no ε to show" in page.text
    assert "would spend on what leaves" not in page.text
    assert "without any noise" in page.text
    assert {words.get("id") for _, words in page.tags} >= {"error", "wire", "gain"}
    assert "epsilon" not in figures(run_folder)


EVIL = "</script><script>alert('x')</script><img src=x onerror=alert(1)>"


def test_everything_from_data_is_escaped(run_folder: Path) -> None:
    summary = change_summary(run_folder)
    summary["rows"][EVIL] = scores(1.0)
    summary["scenario"] = summary["claim"] = summary["data"]["name"] = EVIL
    summary["stamps"] = [EVIL]
    summary["heads"][0] |= {"user": EVIL, "path": EVIL}
    summary["heads_base"]["path"] = EVIL
    summary["federation"] |= {"method": EVIL, "personal_method": EVIL, "rejected": {EVIL: 1}}
    summary["privacy"] |= {"unit": EVIL, "noise": EVIL, "sentence": EVIL + "!", EVIL: EVIL}
    summary["cost"][EVIL] = 1.0
    summary["rows"]["local"][EVIL] = interval(1.0)
    change_summary(run_folder, **summary)
    write(run_folder / "scenario.json", {EVIL: EVIL})
    run = read(run_folder / "run.json")
    run |= {"created": EVIL, "command": EVIL, "commit": EVIL}
    for part in ("versions", "seeds", "machine"):
        run[part] |= {EVIL: EVIL}
    write(run_folder / "run.json", run)
    users = read(run_folder / "user_rmse.json")
    users["rows"]["personal" + EVIL] = users["rows"]["local"]
    users["users"][0] = EVIL
    write(run_folder / "user_rmse.json", users)
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
    users = read(run_folder / "user_rmse.json")["rows"]
    for trace in drawn["gain"]["data"]:
        gain = np.subtract(users["local"], users[trace["name"]])
        assert sum(trace["y"]) == 943
        x, y = np.array(trace["x"]), np.array(trace["y"])
        assert y[x > 0].sum() == (gain >= 0).sum()  # zero is an edge of the bins
        assert np.average(x, weights=y) == pytest.approx(gain.mean(), abs=0.01)


def test_users_without_spread_or_local_row(run_folder: Path) -> None:
    write(run_folder / "user_rmse.json", {"users": ["1"], "rows": {"local": [1.0], "personal": [1.0]}})
    (trace,) = figures(run_folder)["gain"]["data"]
    assert trace["y"] == [1]
    write(run_folder / "user_rmse.json", {"users": ["1"], "rows": {"personal": [1.0]}})
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
    with pytest.raises(DataError, match=r"summary\.json: rows: "):
        headline(summary | {"rows": {}})


FILES = ("run.json", "scenario.json", "metrics.jsonl", "user_rmse.json", "summary.json")


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
        ({"schema": 2}, "schema: "),
        ({"privacy": privacy(1.0, trust="vague")}, r"privacy\.trust: "),
        ({"privacy": {"trust": "local"}}, r"privacy\.unit: Field required"),
        ({"rows": {"local": {"mae": interval(1.0)}}}, "every row must have an rmse, missing in local"),
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
    write(run_folder / "user_rmse.json", {"users": ["1", "2"], "rows": {"local": [1.0]}})
    with pytest.raises(DataError, match="every row must have 2 values, one per user, not so: local"):
        write_report(run_folder)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it(run_folder: Path, width: int, scheme: Any) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if chromium is None:
        pytest.skip("no browser: install chromium or name one in CHROMIUM")
    target = write_report(run_folder)
    complaints: list[str] = []
    requests: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(target.as_uri())
        page.wait_for_function("document.querySelectorAll('.js-plotly-plot .xaxislayer-above').length >= 4")
        drawn = page.evaluate(
            "[...document.querySelectorAll('figure')].map(figure => figure.querySelectorAll('svg.main-svg').length)"
        )
        overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        spilt = page.evaluate(
            "[...document.querySelectorAll('svg.main-svg, .xtitle, .ytitle')]"
            ".some(mark => mark.getBoundingClientRect().right > innerWidth)"
        )
        ink = page.evaluate("getComputedStyle(document.querySelector('.xtitle')).fill")
        body = page.evaluate("getComputedStyle(document.body).color")
        page.emulate_media(color_scheme="dark" if scheme == "light" else "light")
        page.wait_for_function("ink => getComputedStyle(document.querySelector('.xtitle')).fill !== ink", arg=ink)
        if folder := os.environ.get("SCREENSHOTS"):
            page.emulate_media(color_scheme=scheme)
            page.wait_for_timeout(300)
            page.screenshot(path=f"{folder}/{scheme}-{width}.png", full_page=True)
        browser.close()
    assert complaints == []
    assert requests == [target.as_uri()] or all(u.startswith(("file:", "data:", "blob:")) for u in requests)
    assert len(drawn) == 4
    assert all(count >= 1 for count in drawn)
    assert overflow <= 0
    assert not spilt
    assert ink == body  # the plots follow the scheme of the page
