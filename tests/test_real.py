"""On the real model and data: the numbers the closed forms promise, and a short federation that beats no federation."""

import json
from pathlib import Path

import numpy as np
import pytest

from shared.config import load_scenario
from simulations.bench.step import measure
from simulations.run import simulate

pytestmark = pytest.mark.slow
SCENARIOS = Path(__file__).parent.parent / "simulations" / "scenarios"


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """The demo with a fifth of its rounds."""
    scenario = load_scenario(
        SCENARIOS / "movielens.toml", ("federation.rounds=4", "federation.cohort_size=94", "evaluation.every_rounds=4")
    )
    out = tmp_path_factory.mktemp("real") / "out"
    return out, simulate(scenario, out=out, quiet=True)


@pytest.mark.timeout(600)
def test_the_split_and_the_closed_forms_are_those_of_the_data(short_run):
    _, summary = short_run
    assert summary["data"] == {
        "name": "movielens-100k", "users": 943, "fit": 72_089, "validation": 7_530, "test": 20_381
    }  # fmt: skip
    rmse = {row: scores["rmse"]["value"] for row, scores in summary["rows"].items()}
    assert rmse["constant"] == pytest.approx(1.208, abs=0.002)
    assert rmse["pooled"] == pytest.approx(1.114, abs=0.003)
    assert rmse["local"] == pytest.approx(1.109, abs=0.004)


def test_four_private_rounds_already_help(short_run):
    out, summary = short_run
    for difference in ("personal - local", "personal-linear - local"):
        assert summary["differences"][difference]["rmse"]["high"] < 0
    assert summary["privacy"]["epsilon"] <= 8
    assert summary["federation"]["rejected"] == {}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite([line["validation"]["personal"] for line in lines]).all()


def test_the_heads_answer_as_torch_does(short_run):
    out, summary = short_run
    from client.runtime.runtime import open_head

    assert len(summary["heads"]) == 3
    for head in summary["heads"]:
        assert head["parity_max_abs"] <= 1e-4
        assert head["bytes"] <= summary["heads_base"]["bytes"] / 100
    [rating] = open_head(out / "heads" / "user-1").predict(["Fargo (1996). Crime, Drama, Thriller"])
    assert 1 <= rating <= 5


@pytest.mark.timeout(300)
def test_the_bench_compares_equal_answers():
    measured = measure(rounds=1, quiet=True)
    assert set(measured["ratios"]) == {
        "dp_over_nonprivate",
        "secure_over_seeded_cached_last_block",
        "secure_over_seeded_linear_head",
        "alone_over_batched_last_block",
        "alone_over_batched_linear_head",
        "opacus_all_layers_over_cached_last_block",
        "opacus_all_layers_over_linear_head",
        "padded_over_real_tokens",
    }
    assert measured["ratios"]["padded_over_real_tokens"]["median"] <= 1.1
    assert max(measured["answers_agree"].values()) <= 1e-4
