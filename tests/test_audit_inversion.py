"""Span checks: the algebra on changes made by hand, then whole attacks on tiny bases over real bytes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from shared.errors import PrivacyError
from shared.models.features import compute_hidden
from shared.models.model import load_base
from simulations.audit import inversion
from simulations.audit.inversion import audit, make_setting, open_bench, recovered, seen
from simulations.audit.span import find_layer, row_space, span_check
from simulations.audit.stage import Part, open_subject, play

FEDAVG = {"rank": 16, "method": "fedavg"}


@pytest.fixture(scope="module")
def subject(tiny_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("inverted")
    return open_subject(
        tiny_world(folder, body='adapter.targets = ["output.dense"]'), folder=folder, seed=1, quiet=True
    )


@pytest.fixture(scope="module")
def speaker(tiny, tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("speaker")
    data = tiny.tiny_dialogues(folder / "data")
    scenario = tiny.tiny_generation(folder, base=tiny_llama, data=data)
    same_price = ("privacy.delta=1e-4",)  # as the other subject's, so that it is computed once
    return open_subject(scenario, overrides=same_price, folder=folder, seed=1, quiet=True)


def in_span(layer, ids, *, noise=0.0, rows=16):
    """A change (rows, d) whose rows are mixtures of what these tokens put in, and noise."""
    draw = np.random.default_rng(0)
    inputs = layer.inputs(torch.tensor([ids]))[0].detach().numpy()
    change = draw.standard_normal((rows, len(ids))) @ inputs
    return (change + noise * draw.standard_normal(change.shape)).astype(np.float32)


def test_tokens_in_the_span_are_found_at_their_places(tiny_base):
    layer = find_layer(tiny_base)
    ids = [2, 17, 40, 5, 9, 3]
    assert (layer.name, layer.placed) == ("attention.self.query", True)
    [found] = span_check(layer, [row_space(in_span(layer, ids), largest=0.1)], places=8)
    assert sorted(found) == list(enumerate(ids))
    [found] = span_check(layer, [row_space(in_span(layer, ids, noise=10.0), largest=0.1)], places=8)
    assert len(set(found) & set(enumerate(ids))) <= 1  # the test has power: noise hides them


def test_a_causal_base_gives_away_the_set_of_tokens(tiny_llama):
    layer = find_layer(load_base(tiny_llama))
    assert (layer.name, layer.placed) == ("self_attn.q_proj", False)
    [found] = span_check(layer, [row_space(in_span(layer, [7, 70, 200]), largest=0.1)], places=3)
    assert sorted(found) == [(0, 7), (0, 70), (0, 200)]


def test_a_space_without_a_hole_tells_nothing(tiny_base):
    layer = find_layer(tiny_base)
    project = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)  # what A makes of the inputs
    for ids, told in (([2, 17], 2), ([2, 17, 40], 3), ([2, 17, 40, 3], 0)):
        change = in_span(layer, ids) @ project.T
        [found] = span_check(layer, [row_space(change, largest=0.1)], places=len(ids), project=project)
        assert len(set(found) & set(enumerate(ids))) == told == len(found)
    assert span_check(layer, [row_space(np.zeros((4, 32)), largest=0.1)], places=2) == [[]]


def test_numerical_rank_is_not_fooled_by_rounding():
    draw = np.random.default_rng(1)
    start = draw.uniform(-0.2, 0.2, (16, 32)).astype(np.float32)
    change = (1e-3 * draw.standard_normal((16, 3)) @ draw.standard_normal((3, 32))).astype(np.float32)
    assert len(row_space((start + change) - start, largest=0.2)) == 3


@pytest.mark.parametrize("who", ["subject", pytest.param("speaker", marks=pytest.mark.slow)])
def test_an_unprotected_text_is_read_off_the_bytes_and_a_private_one_is_not(who, request):
    result = audit(request.getfixturevalue(who), seed=3, quiet=True)
    control, private = result.facts["control"], result.facts["private"]
    assert control["share"] >= 0.8
    assert control["precision"] >= 0.8
    assert private["share"] < 0.4
    assert private["limit"] < control["hits"] / 2
    assert private["guesses"] > control["tokens"] / 2  # it did guess
    assert (result.passed, result.mutants_caught, result.mutants_missed) == (True, ("no-noise",), ())
    assert 2 <= result.facts["own_method"]["void_from"] <= 4  # rank 2; what is left of it depends on the base
    assert all(str(word) for word in result.words)


@pytest.mark.parametrize("trust", ["distributed", "central"])
def test_at_user_level_what_the_server_sees_is_inverted(tiny_world, tmp_path, trust):
    body = f'privacy.unit = "user"\nprivacy.trust = "{trust}"'
    subject = open_subject(tiny_world(tmp_path, body=body), folder=tmp_path, seed=1, quiet=True)
    found = recovered(subject, make_setting(subject, seed=3, **FEDAVG), seed=3, faults=("no-noise",))
    assert found[""]["hits"] <= found[""]["limit"]
    assert found["no-noise"]["share"] >= 0.8


def test_a_promise_that_no_grid_holds_is_attacked_with_fewer_numbers(tiny_world, tmp_path, monkeypatch):
    subject = open_subject(tiny_world(tmp_path), folder=tmp_path, seed=1, quiet=True)
    tried = []

    def refuse_large(subject, setting, **given):
        tried.append(setting.scenario.adapter.rank)
        if tried[-1] > 4:
            raise PrivacyError("noise must leave a contribution visible on its grid")
        return recovered(subject, setting, **given)

    monkeypatch.setattr(inversion, "recovered", refuse_large)
    assert audit(subject, seed=3, quiet=True).facts["rank"] == 4
    assert tried[0] > 4
    monkeypatch.setattr(inversion, "_LEAST_RANK", 64)
    with pytest.raises(PrivacyError, match="grid"):
        audit(subject, seed=3, quiet=True)


def test_bytes_in_another_order_give_nothing_away(subject):
    setting = make_setting(subject, seed=3, **FEDAVG)
    scenario = inversion._control(setting.scenario.model_copy(update={"name": "shuffled"}))
    bench = open_bench(subject, scenario, clients=3, seed=3)
    features = compute_hidden(subject.base, setting.token_ids, head_blocks=subject.base.num_blocks)
    parts = [Part(bench, features.select([row]), setting.targets[row]) for row in range(3)]
    draw = np.random.default_rng(0)
    for change in seen(play(bench.campaign, parts), f"block.0.{setting.layer.name}.lora_A"):
        mixed = draw.permutation(change.ravel()).reshape(change.shape)
        [found] = span_check(setting.layer, [row_space(mixed, largest=1.0)], places=setting.places)
        assert len(found) == setting.places  # one at each place
        assert sum(len(secret & set(found)) for secret in setting.secrets()) <= 2


def test_chance_is_what_a_random_space_gives(subject):
    setting = make_setting(subject, seed=3, **FEDAVG)
    draw = np.random.default_rng(2)
    spaces = [row_space(draw.standard_normal((16, 32)), largest=0.1) for _ in range(60)]
    guesses = span_check(setting.layer, spaces, places=setting.places)
    counts = [inversion._count(setting, guesses[i : i + 3]) for i in range(0, 60, 3)]
    hits, expected = sum(c["hits"] for c in counts), sum(c["chance"] * c["tokens"] for c in counts)
    assert abs(hits - expected) <= 4 * np.sqrt(expected) + 1
    assert sum(c["hits"] > c["limit"] for c in counts) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["movielens", "movielens-user", "sotu"])
def test_the_shipped_scenarios(name, tmp_path):
    scenarios = Path(inversion.__file__).parents[1] / "scenarios"
    result = audit(open_subject(scenarios / f"{name}.toml", folder=tmp_path, seed=0, quiet=True), seed=0, quiet=True)
    assert (result.passed, result.control_detected, result.mutants_missed) == (True, True, ())
