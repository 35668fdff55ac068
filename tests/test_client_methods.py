"""Ditto, FedDPA and the memory: each against formulae written out here, and at the ends of its constants."""

import math

import numpy as np
import pytest
import torch

from client.personal.finetune import ditto, fine_tune, fine_tune_second, load_tensors, predict_with
from client.personal.personalize import (
    PERSONAL_METHODS,
    PersonalMethod,
    Texts,
    check_export,
    check_task,
    mixed,
    predict_user,
    share_by_meaning,
)
from client.runtime.retrieval import BM25, by_time, by_words, nearest, recall
from shared.config import PersonalConfig, Scenario
from shared.errors import CampaignError, ScenarioError
from shared.heads.adapter import load_shared, make_start, read_shared
from shared.heads.registry import make_head
from shared.heads.scoring import text_predictions
from shared.heads.tasks import Scores
from shared.models.features import compute_features
from tests.tiny import TEXTS

TARGETS = np.array([5.0, 1.0, 4.0, 4.0, 2.0])


class World:
    """A head with shared arrays of some effect, five texts of a user and three that are asked."""

    def __init__(self, base, *, blocks, federation="ffa-lora", method="none"):
        body = {"name": "x", "model": {"head_blocks": blocks}, "federation": {"method": federation}}
        body["personal"] = {"method": method}
        scenario = Scenario.model_validate(body | {"adapter": {"rank": 2, "whitened_features": 8}})
        self.head = make_head(base, scenario, public_texts=len(TEXTS))
        features = compute_features(base, TEXTS, head_blocks=blocks, max_tokens=32)
        make_start(self.head, features, ridge=1e-3, seed=0)
        draw = np.random.default_rng(1)
        self.shared = {
            name: (array + 0.1 * draw.normal(size=array.shape)).astype("float32")
            for name, array in read_shared(self.head).items()
        }
        pooled, shared = text_predictions(self.head, self.shared, features)
        self.inputs = self.head.prepare(features)
        everything = Texts(pooled.astype(np.float64), shared, TEXTS, self.inputs)
        self.known, self.asked = everything.take(np.arange(5)), everything.take(np.arange(5, 8))
        self.mean = self.head.mean.detach().numpy().astype(np.float64)

    def adapt(self, method, **settings):
        terms = {"personal": PersonalConfig(**settings), "generator": np.random.default_rng(4)}
        return method(self.head, self.shared, self.inputs.select(range(5)), Scores(TARGETS.tolist()), **terms)

    def predict(self, **settings):
        return predict_user(
            self.known,
            TARGETS,
            self.asked,
            mean=self.mean,
            personal=PersonalConfig(**settings),
            head=self.head,
            arrays=self.shared,
            generator=np.random.default_rng(4),
        )


@pytest.fixture(scope="module")
def linear(tiny_base):
    return World(tiny_base, blocks=0)


@pytest.fixture(scope="module", params=["ffa-lora", "fedavg"])
def deep(tiny_base, request):
    return World(tiny_base, blocks=1, federation=request.param)


def test_ditto_of_an_output_is_the_minimum_of_its_objective(linear):
    found = linear.adapt(ditto, proximal=0.2)["output.weight"][0].astype(np.float64)
    start = linear.shared["output.weight"][0].astype(np.float64)
    hidden, _ = linear.inputs.batch(range(5))
    projected = hidden[:, 0].double().numpy()  # (5, P); in the primal form, P x P
    moment = projected.T @ projected / 5 + 0.2 * np.eye(projected.shape[1])
    wanted = np.linalg.solve(moment, projected.T @ (TARGETS - 3.0) / 5 + 0.2 * start)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    exactly = projected @ linear.adapt(ditto, proximal=0.0)["output.weight"][0].astype(np.float64)
    np.testing.assert_allclose(exactly, TARGETS - 3.0, atol=1e-4)  # without a pull all records are met
    assert np.abs(found - start).max() > 0.05


def test_two_devices_keep_their_own_minimum_of_one_shared_part(linear):
    """Two devices with one record each, the pull and the shared part the same: v = w + r x / (x x + pull)."""
    hidden, _ = linear.inputs.batch(range(2))
    for row, target in ((0, 5.0), (1, 1.0)):
        terms = {"personal": PersonalConfig(proximal=0.5), "generator": np.random.default_rng(0)}
        found = ditto(linear.head, linear.shared, linear.inputs.select([row]), Scores([target]), **terms)
        x, start = hidden[row, 0].numpy(), linear.shared["output.weight"][0]
        wanted = start + (target - 3.0 - start @ x) * x / (x @ x + 0.5)
        np.testing.assert_allclose(found["output.weight"][0], wanted, atol=1e-5)


def test_ditto_passes_go_to_the_minimum_of_the_objective(linear, monkeypatch):
    exact = linear.adapt(ditto, proximal=0.2)["output.weight"]
    monkeypatch.setattr("client.personal.finetune.RatingHead", ())  # no head has the closed form
    settings = {"epochs": 200, "learning_rate": 2e-2, "batch_size": 5}
    np.testing.assert_allclose(linear.adapt(ditto, proximal=0.2, **settings)["output.weight"], exact, atol=0.05)
    assert np.abs(linear.adapt(ditto, proximal=0.1, **settings)["output.weight"] - exact).max() > 0.1


def test_ditto_without_a_pull_is_fine_tuning_and_with_an_endless_one_the_shared_part(deep):
    settings = {"learning_rate": 0.05, "batch_size": 2}
    free, tuned = deep.adapt(ditto, proximal=0.0, **settings), deep.adapt(fine_tune, **settings)
    for name, array in free.items():
        np.testing.assert_array_equal(array, tuned[name])
        assert not np.array_equal(array, deep.shared[name])
    bound = deep.adapt(ditto, proximal=1e9, **settings)
    for name, array in bound.items():
        np.testing.assert_allclose(array, deep.shared[name], atol=1e-5)
    half = deep.adapt(ditto, proximal=3.0, **settings)
    assert 0 < _distance(half, deep.shared) < _distance(free, deep.shared)


def _distance(a, b):
    return math.sqrt(sum(float(((a[name] - b[name]) ** 2).sum()) for name in a))


def test_the_second_adapter_shares_lora_a_so_that_a_mixture_is_one_adapter(deep):
    private = deep.adapt(fine_tune_second, learning_rate=0.05)
    for name in private:
        assert np.array_equal(private[name], deep.shared[name]) == name.endswith("lora_A")
    inputs = deep.inputs.select([6])
    ends = [predict_with(deep.head, arrays, inputs) for arrays in (deep.shared, private)]
    for weight, end in zip((0.0, 1.0), ends, strict=True):
        np.testing.assert_allclose(predict_with(deep.head, mixed(deep.shared, private, weight), inputs), end, rtol=1e-6)
    assert abs(ends[0] - ends[1]) > 0.01


@pytest.mark.parametrize(("weight", "stands"), [(0.0, "shared"), (1.0, "local")])
def test_feddpa_at_both_ends(deep, monkeypatch, weight, stands):
    same = PersonalMethod(
        None, False, "", adapt=fine_tune_second, mix=lambda known, asked, **_: np.full(len(asked), weight)
    )
    monkeypatch.setitem(PERSONAL_METHODS, "feddpa", same)
    found = deep.predict(method="feddpa", learning_rate=0.05)
    local = predict_with(deep.head, deep.adapt(fine_tune_second, learning_rate=0.05), deep.asked.inputs)
    np.testing.assert_allclose(found, deep.asked.shared if stands == "shared" else local, atol=1e-5)
    assert np.abs(local - deep.asked.shared).min() > 1e-3


def test_feddpa_of_an_output_is_the_weighed_mean_of_two_predictions(linear):
    settings = {"learning_rate": 0.05, "neighbours": 2, "temperature": 0.3}
    local = predict_with(linear.head, linear.adapt(fine_tune_second, **settings), linear.asked.inputs)
    known, asked = linear.known.features - linear.mean, linear.asked.features - linear.mean
    shares = []
    for x in asked:
        near = sorted((x @ y / np.linalg.norm(x) / np.linalg.norm(y) for y in known), reverse=True)[:2]
        parts = [math.exp(s / 0.3) for s in near]
        shares.append(min(1.0, max(0.0, sum(s * p for s, p in zip(near, parts, strict=True)) / sum(parts))))
    assert max(shares) > 0.05
    wanted = [(1 - a) * w + a * v for a, w, v in zip(shares, linear.asked.shared, local, strict=True)]
    np.testing.assert_allclose(linear.predict(method="feddpa", **settings), wanted, atol=1e-5)


def test_a_text_of_ones_own_is_all_local_and_a_text_of_no_kin_all_shared():
    known, mean = np.array([[1.0, 0.0], [0.0, 1.0]]), np.zeros(2)
    asked = np.array([[2.0, 0.0], [-1.0, -1.0]])
    share = share_by_meaning(known, asked, mean=mean, personal=PersonalConfig(neighbours=1))
    np.testing.assert_allclose(share, [1.0, 0.0])


def test_bm25_by_hand():
    index = BM25(["red red fox", "Red hen", "grey goose sleeps now"])
    rarity = {"red": math.log(1 + 1.5 / 2.5), "fox": math.log(1 + 2.5 / 1.5)}
    first = rarity["red"] * 2 * 2.5 / (2 + 1.5) + rarity["fox"] * 2.5 / (1 + 1.5)  # length 3 is the mean
    second = rarity["red"] * 2.5 / (1 + 1.5 * (0.25 + 0.75 * 2 / 3))
    np.testing.assert_allclose(index.scores("fox, RED!"), [first, second, 0.0])
    slowed = 1 + 1.5 * (0.25 + 0.75 * 2 / 3)
    own = (rarity["red"] + rarity["fox"]) * 2.5 / slowed
    np.testing.assert_allclose(index.similarities("fox, RED!"), [first / own, second / own, 0.0])
    assert index.similarities("Red hen")[1] == pytest.approx(1.0)
    assert index.scores("of nothing known").tolist() == index.similarities("...").tolist() == [0.0, 0.0, 0.0]
    assert BM25(["", ""]).scores("a").tolist() == [0.0, 0.0]


def test_a_memory_of_one_text_recalls_it():
    """Level r / (1 + s); what is left of the residual, weighed one against the prior at zero."""
    for similarity in (1.0, 0.4):
        personal = PersonalConfig(bias_shrinkage=3.0, ridge=0.5, temperature=0.2)
        found = recall(np.array([[similarity]]), np.array([2.0]), personal=personal)
        weight = math.exp((similarity - 1) / 0.2)
        assert found.tolist() == pytest.approx([0.5 + 1.5 * weight / (weight + 0.5)])
    sure = PersonalConfig(bias_shrinkage=3.0, ridge=1e-9)
    assert recall(np.ones((1, 1)), np.array([2.0]), personal=sure).tolist() == pytest.approx([2.0])


def test_the_memory_looks_up_so_many_neighbours():
    personal = PersonalConfig(bias_shrinkage=1.0, ridge=0.5, temperature=0.5, neighbours=2)
    residuals, similarities = np.array([1.0, -1.0, 3.0]), np.array([[0.9, 0.1, 0.7]])
    level = 3.0 / 4.0
    a, c = math.exp(-0.1 / 0.5), math.exp(-0.3 / 0.5)
    wanted = level + (a * (1 - level) + c * (3 - level)) / (a + c + 0.5)
    assert recall(similarities, residuals, personal=personal).tolist() == pytest.approx([wanted])


def test_recency_takes_the_newest_and_of_equals_every_retriever_does(linear):
    alike = by_time(linear.known, linear.asked, mean=linear.mean)
    assert nearest(alike, count=2).tolist() == [[4, 3]] * 3
    assert nearest(np.array([[0.2, 0.9, 0.9, 0.1]]), count=3).tolist() == [[2, 1, 0]]
    settings = {"method": "retrieval", "retriever": "recency", "neighbours": 2, "bias_shrinkage": 5.0, "ridge": 1.0}
    residuals = TARGETS - linear.known.shared
    level = residuals.sum() / 10
    wanted = linear.asked.shared + level + (residuals[3:] - level).sum() / 3
    np.testing.assert_allclose(linear.predict(**settings), wanted)


@pytest.mark.parametrize("retriever", ["dense", "bm25"])
def test_a_text_of_ones_own_is_the_nearest(linear, retriever):
    """Asked again and believed, the record's own target comes back, whatever the shared part says."""
    settings = {"method": "retrieval", "retriever": retriever, "neighbours": 1, "ridge": 1e-9}
    again = predict_user(linear.known, TARGETS, linear.known, mean=linear.mean, personal=PersonalConfig(**settings))
    np.testing.assert_allclose(again, TARGETS, atol=1e-5)
    if retriever == "bm25":
        assert by_words(linear.known, linear.asked, mean=linear.mean).shape == (3, 5)


@pytest.mark.parametrize("method", PERSONAL_METHODS)
def test_without_a_record_every_method_predicts_what_the_shared_part_does(tiny_base, method):
    world = World(tiny_base, blocks=1, federation="fedavg", method=method)
    for retriever in ("dense", "bm25", "recency"):
        found = predict_user(
            world.known.take(np.arange(0)),
            np.zeros(0),
            world.asked,
            mean=world.mean,
            personal=PersonalConfig(method=method, retriever=retriever),
            head=world.head,
            arrays=world.shared,
            generator=np.random.default_rng(0),
        )
        np.testing.assert_allclose(found, world.asked.shared, rtol=1e-6)


def test_shared_predictions_from_elsewhere_are_corrected_as_the_heads_own(linear):
    """An offset moves targets and predictions alike: the private part learns the same."""
    shift = np.array([0.5, -1.0, 2.0, 0.25, -0.5])
    moved = Texts(linear.known.features, linear.known.shared + shift, (), linear.known.inputs, shift)
    asked = Texts(linear.asked.features, linear.asked.shared + 0.75, (), linear.asked.inputs, np.full(3, 0.75))
    terms = {"mean": linear.mean, "head": linear.head, "arrays": linear.shared, "generator": np.random.default_rng(4)}
    personal = PersonalConfig(method="ditto", proximal=0.1)
    found = predict_user(moved, TARGETS + shift, asked, personal=personal, **terms)
    np.testing.assert_allclose(found, linear.predict(method="ditto", proximal=0.1) + 0.75, atol=1e-5)


def test_what_has_no_form_is_refused(linear):
    with pytest.raises(ScenarioError, match="'feddpa' weighs tensors anew for every text"):
        check_export("feddpa")
    for name in ("feddpa", "retrieval"):
        with pytest.raises(ScenarioError, match=f"'{name}' has no form for task 'generation'"):
            check_task(name, "generation")
    check_export("retrieval")
    for name in ("none", "fine-tune", "ditto"):
        check_export(name)
        check_task(name, "generation")
    with pytest.raises(ScenarioError, match="'ditto' has no form here"):
        predict_user(linear.known, TARGETS, linear.asked, mean=linear.mean, personal=PersonalConfig(method="ditto"))
    broken = PersonalMethod(None, False, "", remember=lambda *_, **__: np.full(3, np.nan))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PERSONAL_METHODS, "retrieval", broken)
        with pytest.raises(ScenarioError, match="must give 3 finite numbers"):
            linear.predict(method="retrieval")
        with pytest.raises(ScenarioError, match="which no exported head does"):  # a device has no code of a package
            check_export("retrieval")


def test_tensors_of_another_head_are_refused(linear, deep):
    with pytest.raises(CampaignError, match="arrays must be"):
        load_tensors(linear.head, {"output.other": np.zeros(3, dtype="float32")})
    with pytest.raises(CampaignError, match=r"output\.weight must be"):
        load_tensors(linear.head, {"output.weight": np.zeros(3, dtype="float32")})
    load_shared(deep.head, deep.shared)
    load_tensors(deep.head, {"output.weight": np.zeros_like(deep.shared["output.weight"])})
    assert torch.equal(deep.head.output.weight, torch.zeros_like(deep.head.output.weight))
