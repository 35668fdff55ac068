"""``bench language`` compares what it times: ours over all layers is Opacus' own step, and a wrong one stops it."""

import pytest

import simulations.bench.language as bench
from shared.config import load_scenario
from shared.errors import CampaignError


@pytest.fixture
def scenario(tiny, tmp_path):
    tiny.tiny_llama(tmp_path / "base")
    tiny.tiny_dialogues(tmp_path / "data")
    return load_scenario(tiny.tiny_generation(tmp_path, base=tmp_path / "base", data=tmp_path / "data"))


def test_it_times_what_gives_the_same_answer(scenario):
    found = bench.measure(rounds=1, quiet=True, scenario=scenario, blocks=(1,))
    assert found["answers_differ"] < 1e-3
    assert set(found["cpu_s_per_step"]) == {"cached_last_1", "ours_all_layers", "opacus_all_layers"}
    assert list(found["goals"]) == ["opacus_all_layers_over_cached_last_1"]
    assert any("opacus differ" in line for line in bench.lines(found))


def test_a_step_that_differs_is_not_timed(scenario, monkeypatch):
    right = bench._Device.plain

    def wrong(device, *, noise_multiplier):
        step = right(device, noise_multiplier=noise_multiplier)
        return lambda: {name: 1.05 * change for name, change in step().items()}

    monkeypatch.setattr(bench._Device, "plain", wrong)
    with pytest.raises(CampaignError, match="must agree"):
        bench.measure(rounds=1, quiet=True, scenario=scenario, blocks=(1,))
