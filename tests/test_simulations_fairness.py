"""Fairness: the worst tenth, groups that are large enough, and gaps that are larger than chance."""

import json
import re

import numpy as np
import pytest

from shared.config import load_scenario
from shared.datasets import Dataset, Record, UserData
from shared.errors import DataError, ScenarioError
from shared.metrics.ratings import draw_users, score_row
from simulations.fairness import OTHER, check_groups, gap_by_chance, group_users, measure_fairness
from simulations.report.report import write_report
from simulations.report.results import check_summary
from simulations.run import simulate

RECORD = Record(text="a", target=3.0, item="1", timestamp=0)


def people(*jobs):
    """One user for each, who states it; nothing where it is empty."""
    return [UserData(str(n), (), (), (RECORD,), {"job": job} if job else {}) for n, job in enumerate(jobs)]


@pytest.fixture
def scenario(tiny_world, tmp_path):
    return load_scenario(tiny_world(tmp_path), ("evaluation.groups=['job']", "evaluation.bootstrap_resamples=500"))


def measured(scenario, jobs, values, *, better="less", rows=("personal",)):
    users = people(*jobs)
    per_user = {row: np.asarray(values, dtype=float) for row in rows}
    return measure_fairness(scenario, Dataset("d", tuple(users), ()), np.arange(len(users)), per_user, better=better)


def test_two_groups_by_hand(scenario):
    jobs = ["cook"] * 20 + ["nurse"] * 30
    values = [1.0] * 10 + [2.0] * 10 + [3.0] * 30
    found = measured(scenario, jobs, values)["groups"]["job"]
    assert found["users"] == {"cook": 20, "nurse": 30}
    scores = found["rows"]["personal"]
    assert scores["means"]["cook"]["value"] == 1.5
    assert scores["means"]["nurse"] == {"value": 3.0, "low": 3.0, "high": 3.0}
    assert scores["gap"]["value"] == 1.5
    draws = draw_users(50, seed=scenario.seed, resamples=500)  # the slow obvious bootstrap
    gaps = []
    for drawn in draws.astype(int):
        cooks = np.repeat(values[:20], drawn[:20])
        gaps.append(3.0 - cooks.mean())
    assert [scores["gap"]["low"], scores["gap"]["high"]] == pytest.approx(np.quantile(gaps, [0.025, 0.975]).tolist())
    assert scores["by_chance"] < 0.8


def test_only_rows_a_user_may_choose_are_compared(scenario):
    found = measured(scenario, ["a"] * 40, np.ones(40), rows=("constant", "personal", "local"))
    assert list(found["worst_tenth"]) == list(found["groups"]["job"]["rows"]) == ["local", "personal"]
    assert found["groups"]["job"]["rows"]["personal"]["gap"] is None  # one group has no gap


def test_small_groups_are_merged_or_left_out_and_named():
    jobs = ["cook"] * 20 + ["pilot"] * 12 + ["clown"] * 8 + [""] * 3
    found = group_users(people(*jobs), "job")
    assert (found.names, found.merged, found.silent) == (["cook", OTHER], ["clown", "pilot"], 3)
    assert found.place.tolist() == [0] * 20 + [1] * 20 + [-1] * 3
    few = group_users(people(*jobs[:31]), "job")
    assert (few.names, few.merged) == (["cook"], ["pilot"])
    assert few.place.tolist() == [0] * 20 + [-1] * 11
    # what a person calls other is a group of its own
    other = group_users(people(*["other"] * 20, *["cook"] * 9, *["clown"] * 11), "job")
    assert (other.names, other.place.tolist()) == (["other", OTHER], [0] * 20 + [1] * 20)
    assert group_users(people(*["5"] * 20, *["18"] * 20), "job").names == ["5", "18"]


def test_the_worst_tenth_is_where_the_metric_is_worst(scenario):
    values = np.arange(1.0, 51.0)
    errors = measured(scenario, ["a"] * 50, values)["worst_tenth"]["personal"]
    shares = measured(scenario, ["a"] * 50, values, better="more")["worst_tenth"]["personal"]
    assert (errors["value"], shares["value"]) == (48.0, 3.0)
    assert errors["low"] <= 48.0 <= errors["high"]
    assert shares["low"] <= 3.0 <= shares["high"]


def test_the_worst_tenth_is_that_of_the_rating_metric(scenario):
    rng = np.random.default_rng(0)
    targets, users = rng.integers(1, 6, 300).astype(float), np.repeat(np.arange(30), 10)
    row = score_row(np.full(300, 3.0), targets, users, seed=scenario.seed, resamples=500)
    errors = np.sqrt(np.bincount(users, (targets - 3) ** 2) / 10)
    found = measured(scenario, ["a"] * 30, errors)["worst_tenth"]["personal"]
    assert list(found.values()) == pytest.approx(
        [row["worst_decile"].value, row["worst_decile"].low, row["worst_decile"].high]
    )


def test_a_gap_by_chance_is_exceeded_as_often_as_promised_and_by_real_gaps():
    rng = np.random.default_rng(1)
    member = np.eye(3)[np.repeat(np.arange(3), 30)]
    null = [gaps(values := rng.normal(size=90), member) > gap_by_chance(values, member, seed=n) for n in range(40)]
    assert sum(null) <= 7  # 5 % of 40 are 2
    real = rng.normal(size=90) + 1.5 * member[:, 0]
    assert gaps(real, member) > gap_by_chance(real, member, seed=0)
    # users in no group are no part of it
    out = np.vstack([member, np.zeros((10, 3))])
    assert gap_by_chance(np.append(real, [99.0] * 10), out, seed=0) == gap_by_chance(real, member, seed=0)


def gaps(values, member):
    return np.ptp(values @ member / member.sum(axis=0))


def test_an_attribute_nobody_states_is_refused_before_anything_runs(scenario, tmp_path):
    with pytest.raises(ScenarioError, match=r"evaluation.groups must name .* \(none\), got 'job'"):
        simulate(scenario, out=tmp_path / "out", quiet=True)
    assert not (tmp_path / "out" / "campaigns").exists()
    check_groups(scenario, Dataset("d", tuple(people("cook")), ()))
    age = scenario.model_copy(update={"evaluation": scenario.evaluation.model_copy(update={"groups": ("age",)})})
    with pytest.raises(ScenarioError, match=r"\(job\), got 'age'"):
        check_groups(age, Dataset("d", tuple(people("cook")), ()))


def add_fairness(folder, found, **metrics):
    path = folder / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8")) | {"fairness": found}
    summary["metrics"] |= metrics
    for name in metrics:
        summary["rows"]["personal"][name] = {"value": 0.25, "low": 0.2, "high": 0.3}
    path.write_text(json.dumps(summary), encoding="utf-8")
    return summary


def read(folder):
    text = write_report(folder).read_text(encoding="utf-8")
    return " ".join(re.sub(r"<[^>]+>", " ", re.sub(r"(?s)<(script|style).*?</\1>", " ", text)).split())


def test_the_report_names_gaps_and_who_was_left_out(invented, scenario, tmp_path):
    folder = invented.invented_run(tmp_path / "run")
    jobs = ["cook"] * 25 + ["nurse"] * 25 + ["<b>clown"] * 5 + [""] * 3
    found = measured(scenario, jobs, [1.0] * 25 + [1.4] * 25 + [9.0] * 8)
    words_described = {"better": "less", "description": "what is recommended minus what is liked"}
    summary = add_fairness(folder, found, popularity_bias=words_described)
    page = read(folder)
    assert "Groups are of users who opted in" in page
    assert "The observer of this simulation" in page
    assert "The gap is larger than chance makes it in personal ." in page
    assert "left out, too few even together: &lt;b&gt;clown. 3 users state nothing" in page
    assert "popularity_bias: what is recommended minus what is liked" in page
    assert "0.250 [0.200, 0.300]" in page
    same = measured(scenario, jobs, [1.0, 1.2] * 29)
    add_fairness(folder, same)
    assert "No gap is beyond chance." in read(folder)
    broken = summary | {"fairness": found | {"groups": {"job": found["groups"]["job"] | {"users": {"cook": 1}}}}}
    with pytest.raises(DataError, match="a mean for each group, not so: personal"):
        check_summary(broken)
