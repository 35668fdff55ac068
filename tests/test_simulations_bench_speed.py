"""``bench speed`` times nothing whose answer is further off than its precision allows."""

import pytest

import simulations.bench.speed as bench
from shared.errors import CampaignError


@pytest.mark.parametrize("name", ["minilm_all_fp32", "minilm_all_mixed"])
def test_an_answer_that_is_too_far_off_stops_it(name):
    allowed = bench._TOLERANCES[name.rsplit("_", 1)[1]]
    bench._check({name: allowed}, bench._TOLERANCES)
    for wrong in (1.01 * allowed, float("nan")):
        with pytest.raises(CampaignError, match="nothing was timed"):
            bench._check({name: wrong}, bench._TOLERANCES)


def test_every_ratio_and_goal_is_of_variants_that_are_timed():
    assert set(bench._GOALS) <= set(bench._PAIRS)
    assert bench._TOLERANCES["fp32"] < bench._TOLERANCES["mixed"]


def test_the_machine_is_measured_in_the_precisions_a_step_uses():
    found = bench.gemm_gflops()
    assert set(found) == {"torch_fp32", "fp32", "mixed"}
    assert min(found.values()) > 0.1
