"""From a study's store to its report: what is averaged, what is drawn, and what is said of a paper's claim."""

import csv
import json
import re
import struct
from dataclasses import astuple
from pathlib import Path

import pytest

from shared.errors import DataError
from shared.metrics.ratings import Interval
from shared.protocol.audits import read_audit
from simulations.study.config import load_study
from simulations.study.found import EVERY, read_found
from simulations.study.headline import FAILS, HOLDS, OPEN, Answer, Headline, Side, answer
from simulations.study.outcome import outcome
from simulations.study.page import study_page
from simulations.study.plan import plan_runs
from simulations.study.points import ALONE, pareto, series_of
from simulations.study.report import claims, write_report
from simulations.study.rows import lower_bound
from simulations.study.store import NOT_AUDITED, RUNS, finished_runs
from sottovoce.cli import main

STUDIES = Path("simulations/studies")
GAIN = {
    "claim": "Groups gain",
    "source": "Somebody 2020",
    "paper": "5 points",
    "condition": "other <data>",
    "here": "invented",
    "quantity": "difference",
    "first": {"point": "ifca, local, ε = 8", "of": "users.personal"},
    "second": {"point": "fedavg, local, ε = 8", "of": "users.personal"},
    "below": 0.0,
}


@pytest.fixture(scope="module")
def folder(studies, tmp_path_factory) -> Path:
    """A study of twelve points and two seeds, reported."""
    made = studies.invented_study(tmp_path_factory.mktemp("study") / "invented", headlines=[GAIN])
    write_report(made)
    return made


@pytest.fixture(scope="module")
def found(folder):
    return read_found(folder)


def one_of(found, label: str, row: str = "personal", metric: str = "rmse"):
    [one] = [each for each in found.of(metric, row) if each.group.label == label]
    return one


def test_seeds_are_averaged_and_a_row_without_a_campaign_stands_once(found, studies):
    one = one_of(found, "ifca, local, ε = 2")
    values = [studies.value_of("personal", "rmse", "ifca", "local", 2.0, seed) for seed in (0, 1)]
    assert astuple(one.score) == pytest.approx(
        (sum(values) / 2, sum(values) / 2 - 0.02, sum(values) / 2 + 0.03), abs=1e-12
    )
    assert (one.spread, one.seeds) == ((min(values), max(values)), 2)
    assert (one.group.trust, one.group.unit, one.group.epsilon, one.delta) == ("local", "record", 2.0, 1e-5)
    assert one.audit == 1.0  # the larger of two runs' lower bounds
    assert one.cost["bytes_per_device"] == 10_000.0
    assert one.cost["cpu_s"] == 50.5
    local = found.of("rmse", "local")
    assert [(each.group.label, each.group.trust, each.cost) for each in local] == [(EVERY, ALONE, {})]
    assert (found.less["rmse"], found.less["mae"]) == (True, True)


def test_what_claims_nothing_has_no_epsilon_and_a_release_beside_a_campaign_is_no_part_of_it(found):
    bare = one_of(found, "fedavg, none, none")
    assert series_of(bare.group) == "fedavg + fine-tune, NOT PRIVATE"
    assert (bare.group.epsilon, bare.delta, bare.audit) == (None, None, None)
    statistics = one_of(found, "fedavg, local, ε = 1", "dp-statistics")
    assert series_of(statistics.group) == "dp-statistics, trust local, per record"
    assert statistics.audit is None  # the audit attacked the campaign, and its bytes are the campaign's
    assert statistics.cost == {}


@pytest.mark.parametrize(("name", "bound"), [("movielens", 3.32), ("movielens-kernel", 4.42), ("movielens-user", 3.60)])
def test_an_audit_s_bound_is_the_one_about_the_claim(name, bound):
    audit = read_audit(Path(f"docs/measurements/audit-{name}.json"))
    assert lower_bound(audit) == pytest.approx(bound, abs=0.005)  # docs/audits.md: in brackets, attacked at the claim
    level = audit.levels["L1"]
    unseeing = level.model_copy(update={"passed": None})
    assert lower_bound(audit.model_copy(update={"levels": {"L1": unseeing}})) is None
    elsewhere = level.model_copy(update={"facts": {}})  # about a copy with more noise alone
    assert lower_bound(audit.model_copy(update={"levels": {"L1": elsewhere}})) is None


def test_a_row_that_differs_by_point_keeps_the_first_of_each(studies, tmp_path):
    folder = studies.invented_study(tmp_path / "study", seeds=(0,), local_of=lambda method: float(method == "ifca"))
    local = read_found(folder).of("rmse", "local")
    assert [(one.group.label, round(one.score.value, 3)) for one in local] == [
        ("fedavg, local, ε = 1", 1.105),
        ("ifca, local, ε = 1", 2.105),
    ]


def test_an_attack_s_controls_make_no_claim(found):
    of = {one.row: one for one in found.of("auc") if one.group.label in ("ifca, local, ε = 1", EVERY)}
    private, bare, untrained = (of[f"records {whose} loss"] for whose in ("private", "unprotected", "untrained"))
    assert (private.group.trust, private.group.epsilon, private.delta) == ("local", 1.0, 1e-5)
    assert (bare.group.trust, bare.group.epsilon, bare.delta) == ("none", None, None)  # the campaign without privacy
    assert untrained.group.trust == ALONE
    assert {one.audit for one in of.values()} == {None}  # an audit is of the campaign's own rows
    assert all(one.cost == {} for one in of.values())


def test_curves_and_gains_are_those_of_the_users(found, studies):
    [curve] = [
        one
        for one in found.curves
        if (one.group.label, one.row, one.who) == ("ifca, local, ε = 1", "personal", "set_aside")
    ]
    assert curve.counts == (0, 5, 50)
    assert [score.value for score in curve.scores] == pytest.approx([1.2, 1.19, 1.1])
    gain = next(one for one in found.gains if one.group.label == "ifca, local, ε = 1")
    assert gain.row == "personal"
    assert (gain.quantiles[0], gain.quantiles[-1]) == pytest.approx((-0.1, 0.3))  # of errors from -.3 to +.1
    assert gain.gaining == pytest.approx(0.75, abs=1 / studies.USERS)


def test_points_that_would_be_one_series_are_told_apart_by_their_settings(studies, tmp_path):
    folder = studies.invented_study(tmp_path / "study", seeds=(0,), extra={"adapter.rank": {"fedavg": 4, "ifca": 8}})
    names = {one.group.method for one in read_found(folder).results if one.group.method != "dp-statistics"}
    assert names == {"", "fedavg + fine-tune", "ifca + fine-tune"}  # their methods tell them apart
    same = studies.invented_study(
        tmp_path / "same", seeds=(0,), extra={"adapter.rank": {"fedavg": 4, "ifca": 8}}, method_of=lambda _: "fedavg"
    )
    names = {one.group.method for one in read_found(same).results if one.group.method != "dp-statistics"}
    assert names == {"", "fedavg + fine-tune, rank = 4", "fedavg + fine-tune, rank = 8"}


def test_the_front_is_what_no_other_point_beats():
    points = [(1.0, 5.0), (2.0, 3.0), (2.5, 4.0), (4.0, 1.0), (4.0, 1.0), (5.0, 1.0)]
    assert pareto(points) == [0, 1, 3, 4]
    by_hand = [
        i
        for i, (cost, score) in enumerate(points)
        if all(c > cost or s > score or (c, s) == (cost, score) for c, s in points)
    ]
    assert sorted(pareto(points)) == by_hand
    assert pareto([(cost, -score) for cost, score in points], less=False) == [0, 1, 3, 4]


def test_every_figure_is_written_for_print_with_its_numbers(folder, found):
    figures = folder / "figures"
    for name in ("frontier", "cold-start", "gain", "communication", "cpu"):
        png = (figures / f"{name}.png").read_bytes()
        assert png.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", png[16:24])
        assert min(width, height) > 500
        svg = (figures / f"{name}.svg").read_text(encoding="utf-8")
        assert svg.rstrip().endswith("</svg>")
        assert "nan" not in re.findall(r'd="[^"]*"', svg.lower())
    with (figures / "frontier.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    drawn = {(row["point"], row["row"]): row for row in rows}
    for one in found.of("rmse", "federated", "personal", "dp-statistics"):
        row = drawn.pop((one.group.label, one.row))
        assert float(row["value"]) == one.score.value
        assert row["epsilon"] == ("none" if one.group.epsilon is None else str(one.group.epsilon))
        assert row["audit_lower_bound"] == ("" if one.audit is None else str(one.audit))
    assert drawn == {}
    with (figures / "cpu.csv").open(encoding="utf-8") as file:
        front = {row["point"] for row in csv.DictReader(file) if row["on_front"] == "True"}
    assert front == {"ifca, distributed, ε = 8"}  # equal cost everywhere; what claims nothing is no rival


@pytest.mark.slow
def test_the_same_numbers_give_the_same_figures_and_older_ones_go(folder, found, tmp_path):
    from simulations.study.plots import write_figures

    (tmp_path / "gain.png").write_bytes(b"of an older report")
    again = write_figures(found, tmp_path)
    assert {path.name for path in again} == {path.name for path in (folder / "figures").iterdir()}
    for path in again:
        assert path.read_bytes() == (folder / "figures" / path.name).read_bytes(), path.name
    without = write_figures(type(found)(found.metric, found.less, found.results), tmp_path)
    assert not (tmp_path / "gain.png").exists()
    assert {path.stem for path in without} == {"frontier", "communication", "cpu"}


def test_the_page_holds_every_number_and_loads_nothing(folder, found):
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert not re.search(r'(src|href)="(https?:)?//', text.partition("<script")[0])
    assert "Is &lt;this&gt; answered?" in text
    assert "Nothing was &lt;tuned&gt;." in text
    assert text.count("<tr data-method=") == len(found.results)
    data = json.loads(re.search(r'id="study">(.*?)</script>', text, re.DOTALL)[1])
    assert len(data["results"]) == len(found.results)
    assert {one["claim"] for one in data["results"]} == {None, 1.0, 2.0, 8.0}
    assert "NOT PRIVATE" in text


@pytest.mark.parametrize(("better", "best"), [("less", 2), ("more", 0)])
def test_every_trial_of_a_search_is_shown_the_best_first(studies, tmp_path, better, best):
    made = studies.invented_study(tmp_path / "study")
    plan = json.loads((made / "study.json").read_text())
    trials = [(0, 0.91, "a"), (1, None, "<b>"), (2, 0.89, "c"), (3, 0.9, "d")]
    plan["tuning"] = {
        "settings": {"federation.method": {}}, "row": "personal", "metric": "rmse", "better": better, "best": best,
        "trials": [{"trial": n, "settings": {"federation.method": name}, "score": s} for n, s, name in trials],
    }  # fmt: skip
    (made / "study.json").write_text(json.dumps(plan))
    text = write_report(made).read_text(encoding="utf-8")
    rows = re.findall(r'<th scope="row">(\d)([^<]*)</th><td>([^<]*)</td><td>([^<]*)</td>', text)
    ranked = [2, 3, 0, 1] if better == "less" else [0, 3, 2, 1]
    assert [int(row[0]) for row in rows] == ranked
    assert rows[0][1] == " (chosen)"
    assert rows[-1][2:] == ("&lt;b&gt;", "failed")


def test_no_text_of_a_study_can_close_its_script(found):
    wicked = [
        type(one)(
            type(one.group)("</script><b>", "<i>", one.group.trust, one.group.unit, one.group.epsilon),
            one.row, one.metric, one.score, one.spread, one.seeds,
        )
        for one in found.results
    ]  # fmt: skip
    text = study_page("<u>", [], type(found)(found.metric, found.less, wicked))
    assert text.count("</script>") == 3  # the data and two scripts
    assert "<b>" not in text
    assert "<i>" not in text
    assert "<u>" not in text


def test_a_claim_is_answered_by_its_whole_interval_paired_over_users(folder):
    [given] = json.loads((folder / "study.json").read_text(encoding="utf-8"))["study"]["headline"]
    got = answer(Headline.model_validate_json(json.dumps(given)), finished_runs(folder))
    assert astuple(got.ours) == pytest.approx((-0.02, -0.02, -0.02), abs=1e-9)  # every user gains the same
    assert got.verdict == HOLDS
    assert got.made == "paired over users"
    with (folder / "headline.csv").open(encoding="utf-8") as file:
        [row] = csv.DictReader(file)
    assert (row["paper"], row["verdict"]) == ("5 points", HOLDS)
    assert "5 points" in (folder / "report.html").read_text(encoding="utf-8")
    assert claims(folder) == ["Groups gain: holds here, -0.02 (paper: 5 points)"]


@pytest.mark.parametrize(
    ("ends", "limits", "verdict"),
    [
        ((-2.0, -1.0), {"below": 0.0}, HOLDS),
        ((-2.0, 1.0), {"below": 0.0}, OPEN),
        ((0.0, 1.0), {"below": 0.0}, FAILS),
        ((1.0, 2.0), {"above": 0.5}, HOLDS),
        ((0.0, 0.5), {"above": 0.5}, FAILS),
        ((-0.5, 0.5), {"above": -1.0, "below": 1.0}, HOLDS),
        ((0.5, 1.5), {"above": -1.0, "below": 1.0}, OPEN),
        ((1.5, 2.5), {"above": -1.0, "below": 1.0}, FAILS),
    ],
)
def test_a_verdict_needs_the_whole_interval(ends, limits, verdict):
    words = {"claim": "c", "source": "s", "paper": "p", "condition": "o", "here": "h"}
    headline = Headline(**words, first=Side(point="a", of="b"), **limits)
    low, high = ends
    assert Answer(headline, Interval((low + high) / 2, low, high), "").verdict == verdict


def test_ratios_and_values_are_read_from_the_summary(folder):
    runs = finished_runs(folder)
    point, other = "ifca, local, ε = 8", "fedavg, local, ε = 8"
    words = {"claim": "c", "source": "s", "paper": "p", "condition": "o", "here": "h"}

    def ask(quantity, first, second=None):
        sides = {"first": {"point": point, "of": first}}
        if second:
            sides["second"] = {"point": other, "of": second}
        return answer(
            Headline.model_validate_json(json.dumps(words | sides | {"quantity": quantity, "above": 0.0})), runs
        )

    up = "cost.bytes_up_per_client_round"
    assert ask("value", up).ours == Interval(50_000.0, 50_000.0, 50_000.0)
    assert ask("ratio", up, up).ours == Interval(1.0, 1.0, 1.0)
    apart = ask("difference", "rows.personal.rmse", "rows.personal.rmse").ours
    assert astuple(apart) == pytest.approx((-0.02, -0.06, 0.02))  # the ends that lie farthest apart
    for wrong, said in (
        ("rows.nobody.rmse", "rows.nobody.rmse"),
        ("claim", "number or an interval"),
        ("users.nobody", "users.nobody"),
    ):
        with pytest.raises(DataError, match=re.escape(said)):
            ask("value", wrong)
    with pytest.raises(DataError, match="point of its study"):
        answer(Headline(**words, first=Side(point="nowhere", of=up), above=0.0), runs)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"second": None}, "headline.second"), ({"quantity": "value"}, "headline.second"), ({"below": None}, "below or")],
)
def test_a_claim_that_cannot_be_decided_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        Headline.model_validate_json(json.dumps(GAIN | change))


def test_what_is_not_finished_or_failed_is_said_and_takes_only_its_own_claims_with_it(studies, tmp_path):
    error = {"run": "x", "point": "ifca, local, ε = 8", "seed": 0, "error": "a <broken> disk"}
    folder = studies.invented_study(
        tmp_path / "study",
        seeds=(0,),
        headlines=[GAIN, GAIN | {"claim": "Still there", "first": GAIN["second"]}],
        finished=lambda label: label != "ifca, local, ε = 8",
        failures=[error],
    )
    text = write_report(folder).read_text(encoding="utf-8")
    assert "a &lt;broken&gt; disk" in text
    assert "1 of 12 runs ended with an error" in text
    assert "Not in the figures, because not finished: ifca, local, ε = 8." in text
    first, second = claims(folder)
    assert first.startswith("Still there: does not hold here, +0")
    assert second.startswith("Groups gain: no answer, ")


def test_what_an_audit_refused_is_named_with_the_reason(studies, tmp_path):
    folder = studies.invented_study(tmp_path / "study", seeds=(0,))
    for label in ("ifca, local, ε = 8", "ifca, local, ε = 1"):
        (folder / RUNS / studies.key_of(label, 0) / NOT_AUDITED).write_text("it <cannot>\n", encoding="utf-8")
    text = write_report(folder).read_text(encoding="utf-8")
    assert "ifca, local, ε = 1; ifca, local, ε = 8: it &lt;cannot&gt;" in text


def test_a_folder_without_results_is_refused_in_one_line(studies, tmp_path):
    with pytest.raises(DataError, match=r"study\.json"):
        write_report(tmp_path)
    empty = studies.invented_study(tmp_path / "empty", seeds=(0,), finished=lambda label: False)
    with pytest.raises(DataError, match="finished run"):
        write_report(empty)


def test_the_command_writes_a_study_s_report_again(folder, capsys):
    (folder / "report.html").unlink()
    assert main(["report", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "Groups gain: holds here" in said
    assert said.rstrip().endswith(f"report: {folder / 'report.html'}")
    assert (folder / "report.html").is_file()
    assert main(["report", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["points"] == outcome(folder)["points"]


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_study_is_one_and_its_claims_ask_for_points_it_has(path):
    study = load_study(path)
    points = {run.point for run in plan_runs(study, path)}
    assert study.name == path.stem
    for claim in study.headline:
        for side in filter(None, (claim.first, claim.second)):
            assert side.point in points
            assert side.of.partition(".")[0] in ("users", "rows", "cost", "membership")


def test_the_frontier_has_twenty_four_runs_under_every_trust():
    path = STUDIES / "frontier.toml"
    runs = plan_runs(load_study(path), path)
    assert len(runs) == 24
    assert {run.scenario.privacy.trust for run in runs} == {"local", "distributed", "central", "none"}
