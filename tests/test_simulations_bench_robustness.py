"""The comparison of rules: every kind of liar and none, on one start, one number a seed."""

import numpy as np
import pytest

from shared.config import load_scenario
from simulations.bench.robustness import lines, measure

BODY = """
model.head_blocks = 0
linear.enabled = false
statistics.enabled = false
evaluation.cold_start = []
evaluation.every_rounds = 3
poison.share = 0.2
poison.rules = ["median"]
"""


@pytest.fixture
def scenario(tiny_world, tmp_path):
    return load_scenario(tiny_world(tmp_path, body=BODY), ("federation.cohort_size=4", "export.users=0"))


def test_every_rule_is_played_with_every_kind_and_without(scenario):
    kinds = ("label-flip", "backdoor")
    measured = measure(rounds=2, quiet=True, scenarios={"tiny": (scenario, kinds)})
    cells = {(cell["rule"], cell["kind"]): cell for cell in measured["cells"]}
    assert set(cells) == {(rule, kind) for rule in ("mean", "median") for kind in (None, *kinds)}
    for (_, kind), cell in cells.items():
        assert len(cell["federated"]) == len(cell["personal"]) == 2
        assert cell["federated"][0] != cell["federated"][1]  # another seed, other draws
        assert ("success federated" in cell) is (kind in (None, "backdoor"))
    assert len({cell["epsilon"] for cell in cells.values()}) == 1
    assert len({cell["noise_multiplier"] for cell in cells.values()}) == 1
    shift = [np.mean(cells["mean", kind]["shift federated"]) for kind in ("backdoor", None)]
    assert shift[0] > shift[1]
    assert measured["scenarios"]["tiny"]["liars"] == 3
    said = lines(measured)
    assert len(said) == 2 + 6
    assert said[0].startswith("tiny: 3 liars among 12 devices, trust local, 3 rounds of 4")
