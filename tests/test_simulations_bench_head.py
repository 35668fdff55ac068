"""The benchmark of personal heads: what it makes of measurements, and a short run on the real models."""

import math

import numpy as np
import pytest

from shared.errors import CampaignError
from simulations.bench import timed_answers
from simulations.bench.head import MODELS, compare, distance, goals, lines, measure
from simulations.bench.timed_answers import decode
from simulations.machine import goal, goal_lines


def spread(value):
    return {"median": value, "low": value, "high": value}


def both(value):
    return {"fp32": value, "int8": value}


def head(*, language):
    near = {"max_abs": 1e-4 if language else 1e-6, "rel_rms": 0.08 if language else 0.04, "same_first": 1.0}
    found = {
        "adapter_bytes": 900,
        "head_bytes": both(1000),
        "base_bytes": {"fp32": 200_000, "int8": 90_000},
        "parity": both({"texts": 3, "bare": near, "adapted": near}),
        "opening": both(
            {
                "cpu_ms": {name: spread(2.0) for name in ("load", "swap", "open_head")},
                "swap_over_load": spread(0.001),
            }
        ),
        "export_for_a_user_s": both({"wall": spread(1.5), "cpu": spread(0.5)}),
        "adapted_over_bare": both(spread(1.12)),
    }
    speeds = {"tokens_per_cpu_s": {"fp32 bare": spread(20.0)}, "over_torch": {"fp32": spread(1.6), "int8": spread(2.9)}}
    return found | (speeds if language else {"cpu_ms_per_text": {"fp32 bare": spread(40.0)}})


def measured():
    heads = {"minilm, shipped": head(language=False), "smollm2, shipped": head(language=True)}
    imports = {
        "cpu_s": {"base install": spread(0.2)},
        "rss_mib": {"base install": spread(64.0)},
        "cpu_over_torch": spread(0.05),
        "rss_over_torch": spread(0.4),
    }
    return {"mode": "m", "rounds": 1, "heads": heads, "imports": imports, "goals": goals(heads, imports)}


def test_goals_are_met_or_missed_by_what_was_measured():
    missed = {name for name, each in measured()["goals"].items() if not each["met"]}
    assert missed == {
        "import, memory over torch and transformers",
        "minilm, shipped, int8: bytes over a merged model",
        "minilm, shipped, fp32: what the adapter adds",
        "minilm, shipped, int8: what the adapter adds",
        "smollm2, shipped, int8: bytes over a merged model",
        "smollm2, shipped, int8: tokens over torch's",
        *(f"{model}, shipped, {p}: export for a user, s wall" for model in MODELS for p in ("fp32", "int8")),
    }


def test_a_value_that_is_no_number_meets_no_goal():
    assert not goal(math.nan, at_most=1.0)["met"]
    assert not goal(math.nan, at_least=1.0)["met"]
    assert goal(1.0, at_most=1.0)["met"]
    with pytest.raises(ValueError, match="must have a limit"):
        goal(1.0)


def test_what_is_missed_is_told_first():
    told = lines(measured())
    start = told.index("goals:") + 1
    assert [line.split()[0] for line in told[start:]] == ["MISSED"] * 10 + ["met"] * (len(told) - start - 10)
    assert goal_lines({"speed": goal(2.0, at_least=3.0)}) == [f"  MISSED {'speed':<58} {2.0:10.4g}  (at least 3)"]


def test_distances_keep_what_is_no_number():
    assert math.isnan(distance([np.array([np.nan, 1.0]), np.ones(2)], [np.ones(2), np.ones(2)])["max_abs"])


def test_the_first_token_is_timed_apart(monkeypatch):
    clock = iter([10.0, 13.0, 17.0])
    monkeypatch.setattr(timed_answers.time, "process_time", lambda: next(clock))
    assert decode(iter([5, 6, 7])) == ([5, 6, 7], 3.0, 2.0)


class Off:
    """A head whose runtime is off by a given amount."""

    language, texts = False, ("a", "b")

    def __init__(self, off):
        self.off, self.precision = off, "fp32"

    def outputs(self, *, adapted):
        return [np.array([1.0, 0.0]), np.array([0.0, 1.0 + adapted])]

    def found(self, fleet, adapter):
        return [each + self.off for each in self.outputs(adapted=bool(adapter))]


def test_a_runtime_that_answers_otherwise_stops_the_benchmark():
    adapter = {"a": np.ones(1)}
    assert compare(Off(5e-6), Off(0), adapter)["adapted"]["max_abs"] == pytest.approx(5e-6)
    for off in (2e-5, np.nan):
        with pytest.raises(CampaignError, match="must agree"):
            compare(Off(off), Off(0), adapter)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("model", MODELS)
def test_real_heads_answer_as_torch_does_and_stay_small(model):
    found = measure(rounds=1, models=[model], quiet=True)
    assert len(found["heads"]) == 2
    missed = {name for name, each in found["goals"].items() if not each["met"]}
    assert not {name for name in missed if "difference" in name or "relative rms" in name}
    assert not {name for name in missed if "swap" in name or ("bytes" in name and "shipped" in name)}
    assert lines(found)
