"""Cold start: who is scored with which records, what the ends of the curve must equal, and what the report says."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

from client.personal.personalize import fit_ridge
from client.training.site import TextFeatures, resident_base, resident_dataset
from server.checkpoint import last_checkpoint
from shared.config import load_scenario
from shared.errors import DataError
from shared.heads.adapter import load_start
from shared.heads.scoring import text_predictions
from shared.metrics.ratings import Interval
from shared.protocol.campaign import read_campaign
from simulations.cold_start import _curve, _mean
from simulations.observe.rows import Rows
from simulations.report.report import headline, write_report
from simulations.report.results import check_summary
from simulations.run import simulate

LEAN = ("linear.enabled=false", "statistics.enabled=false", "export.users=0", "evaluation.every_rounds=3")
COLD = (
    "data.users=campaign",
    "data.tuning_share=0.4",
    "federation.cohort_size=2",
    "evaluation.cold_start=[1000, 3, 0]",
)


@pytest.fixture(scope="module")
def run(tiny_world, tmp_path_factory):
    """Scenario, folder and summary of a run that sets users aside."""
    folder = tmp_path_factory.mktemp("cold")
    scenario = load_scenario(tiny_world(folder), (*LEAN, *COLD))
    return scenario, folder / "out", simulate(scenario, out=folder / "out", quiet=True)


def test_the_first_records_are_each_users_own():
    rows = Rows(np.arange(6), np.arange(6.0), np.array([1, 1, 1, 4, 5, 5]))
    assert rows.first(2).text.tolist() == [0, 1, 3, 4, 5]
    assert rows.first(2).user.tolist() == [1, 1, 4, 5, 5]
    assert rows.first(0).text.size == 0
    assert rows.first(9).target.tolist() == rows.target.tolist()


def test_without_records_the_shared_part_stands_and_with_all_the_rows_of_the_run(run):
    _, _, summary = run
    assert summary["cold_start"]["counts"] == [0, 3, 1000]
    for curve in summary["cold_start"]["curves"].values():
        rows, differences = curve["rows"], curve["differences"]
        assert rows["personal"][0] == rows["federated"][0] == rows["federated"][2]
        assert differences["personal - federated"][0] == {"value": 0.0, "low": 0.0, "high": 0.0}
        assert rows["personal"][1] != rows["federated"][1]
        assert rows["local"][0] != rows["local"][1] != rows["local"][2]
    curve = summary["cold_start"]["curves"]["participants"]
    for row in ("federated", "personal", "local"):
        assert curve["rows"][row][2] == summary["rows"][row]["rmse"]
    for other in ("federated", "local"):
        assert curve["differences"][f"personal - {other}"][2] == summary["differences"][f"personal - {other}"]["rmse"]


@pytest.mark.parametrize("method", ["fedper", pytest.param("user-embedding", marks=pytest.mark.slow)])
def test_a_part_that_is_trained_in_the_rounds_has_a_curve_too(tiny_world, tmp_path, method):
    """What is scored is made after the last round, from the records given, whatever a device kept in the rounds."""
    changes = (*LEAN, f"personal.method={method}", "federation.rounds=1", "evaluation.cold_start=[0, 3, 1000]")
    summary = simulate(load_scenario(tiny_world(tmp_path), changes), out=tmp_path / "out", quiet=True)
    curve = summary["cold_start"]["curves"]["participants"]["rows"]
    last_bits = pytest.approx(summary["rows"]["federated"]["rmse"], rel=1e-6)  # the same sums in another order
    assert curve["personal"][0] == last_bits
    assert curve["federated"][0] == last_bits
    assert curve["personal"][1] != curve["personal"][0]
    assert curve["personal"][2] == summary["rows"]["personal"]["rmse"]


def test_who_took_part_and_who_has_so_many_records_is_counted(run):
    scenario, _, summary = run
    curves = summary["cold_start"]["curves"]
    aside = resident_dataset(scenario.data.model_copy(update={"users": "tuning"}))
    assert curves["participants"]["users"] == summary["data"]["users"]
    assert 0 < curves["participants"]["took_part"] <= summary["data"]["users"]
    assert (curves["set_aside"]["users"], curves["set_aside"]["took_part"]) == (len(aside.users), 0)
    assert curves["set_aside"]["reaching"] == [len(aside.users), len(aside.users), 0]


def test_users_who_were_set_aside_are_predicted_from_their_first_records_alone(run):
    """Against a plain loop over them, from the last checkpoint."""
    scenario, out, summary = run
    campaign = read_campaign(next((out / "campaigns").iterdir()))
    base = resident_base(scenario.model.base)
    aside = resident_dataset(scenario.data.model_copy(update={"users": "tuning"}))
    texts, head = TextFeatures(base, scenario, aside), campaign.new_head(base)
    load_start(head, campaign.start)
    last = last_checkpoint(campaign.folder / "checkpoints", policy_sha256=campaign.policy.sha256)
    features, shared = text_predictions(head, last.arrays, texts.all)
    mean = head.mean.detach().numpy()

    def error(first: slice) -> float:
        squares = []
        for user in aside.users:
            have, want = texts.rows(user.train[first]), texts.rows(user.test)
            gaps = np.array([record.target for record in user.train[first]]) - shared[have]
            private = fit_ridge(features[have].astype(float), gaps, mean=mean, personal=scenario.personal)
            seen = np.clip(private.predict(features[want], shared[want]), 1, 5)
            squares += ((seen - [record.target for record in user.test]) ** 2).tolist()
        return float(np.sqrt(np.mean(squares)))

    found = summary["cold_start"]["curves"]["set_aside"]["rows"]["personal"]
    assert found[1]["value"] == pytest.approx(error(slice(0, 3)), abs=1e-6)
    assert abs(error(slice(-3, None)) - found[1]["value"]) > 1e-4  # the last three would be another curve


def test_every_point_is_scored_with_the_same_resamples_and_against_the_local_row():
    seen = []

    def score(row, *, reference, seed, resamples):
        seen.append((row, reference, seed, resamples))
        return {"ndcg": Interval(float(len(seen)), 0.0, 9.0), "other": Interval(0.0, 0.0, 0.0)}

    observer = SimpleNamespace(
        metrics={"ndcg": None, "other": None},
        cold_rows=lambda arrays, counts: {
            count: {row: f"{row} {count}" for row in ("federated", "local", "personal")} for count in counts
        },
        score=score,
        difference=lambda a, b, **terms: Interval(0.5, 0.4, 0.6),
    )
    rows, differences = _curve(observer, {}, [0, 7], seed=3, resamples=50)
    assert {terms for *_, terms, _ in seen} == {3}
    assert [(row, reference) for row, reference, *_ in seen[3:]] == [
        (f"{row} 7", "local 7")
        for row in ("local", "personal")  # federated is the same at every count
    ]
    assert [point.value for point in rows["federated"]] == [1.0, 1.0]
    assert [point.value for point in rows["personal"]] == [3.0, 5.0]
    assert set(differences) == {"personal - federated", "personal - local"}
    twice = _mean([(rows, differences), ({row: [Interval(0, 0, 0)] * 2 for row in rows}, differences)])
    assert [point["value"] for point in twice["rows"]["personal"]] == [1.5, 2.5]
    observer.cold_rows = lambda arrays, counts: {}
    assert _curve(observer, {}, [0, 7], seed=3, resamples=50) is None


def points(*values):
    return [{"value": value, "low": value - 0.01, "high": value + 0.01} for value in values]


def add_cold_start(folder, *, better="less", personal=(1.1, 1.104, 1.05), metric="rmse"):
    """Give an invented run a curve of three counts."""
    path = folder / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8"))
    gaps = points(*(value - 1.1 for value in personal))
    curve = {
        "users": 50,
        "reaching": [50, 50, 20],
        "took_part": 47,
        "rows": {"federated": points(1.1, 1.1, 1.1), "local": points(1.3, 1.25, 1.2), "personal": points(*personal)},
        "differences": {"personal - federated": gaps, "personal - local": points(-0.2, -0.15, -0.1)},
    }
    summary["metrics"][metric]["better"] = better
    summary["cold_start"] = {
        "counts": [0, 5, 50],
        "curves": {"participants": curve, "set_aside": curve | {"took_part": 0}},
    }
    path.write_text(json.dumps(summary), encoding="utf-8")
    return summary


def read(folder):
    text = write_report(folder).read_text(encoding="utf-8")
    return text, " ".join(re.sub(r"<[^>]+>", " ", re.sub(r"(?s)<(script|style).*?</\1>", " ", text)).split())


def test_the_report_draws_the_curve_and_says_who_was_seen(invented, tmp_path):
    folder = invented.invented_run(tmp_path)
    assert "New users and groups" not in read(folder)[0]
    summary = add_cold_start(folder)
    text, words = read(folder)
    assert "<h2>New users and groups</h2>" in text
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', text, re.S)[1])
    personal = next(line for line in figures["cold-participants"]["data"] if line["name"] == "personal")
    assert (personal["x"], personal["y"]) == (["0", "5", "50"], [1.1, 1.104, 1.05])
    assert figures["cold-participants"]["layout"]["xaxis"]["type"] == "category"
    assert "Personal is worse than federated by up to 0.0040 RMSE, at 5 records." in words
    assert "47 of these 50 users took part" in words
    assert "The shared part has never seen any of these 50 users." in words
    assert any("worse than federated by up to 0.0040" in line for line in headline(summary))


@pytest.mark.parametrize(("better", "verdict"), [("less", "at no number of records worse"), ("more", "up to 0.0500")])
def test_the_verdict_follows_what_is_better(invented, tmp_path, better, verdict):
    folder = invented.invented_run(tmp_path)
    add_cold_start(folder, better=better, personal=(1.1, 1.09, 1.05))
    assert verdict in read(folder)[1]


def test_a_curve_that_lacks_a_point_is_refused(invented, tmp_path):
    summary = add_cold_start(invented.invented_run(tmp_path))
    check_summary(summary)
    summary["cold_start"]["curves"]["participants"]["rows"]["local"] = points(1.3)
    with pytest.raises(DataError, match="participants must have 3 points a line, not so: local"):
        check_summary(summary)
