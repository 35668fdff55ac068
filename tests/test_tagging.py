"""Task tagging in its parts: the head's loss and folding, the private part, the scores, and the settings."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax

from client.personal.personalize import check_task
from client.personal.tagging import fit_tags, keep_tags
from shared.config import AdapterConfig, FederationConfig, ModelConfig, PersonalConfig, Scenario, TaskConfig
from shared.errors import ScenarioError
from shared.heads.adapter import make_start, read_shared
from shared.heads.output import pooled_features
from shared.heads.registry import make_head
from shared.heads.scoring import text_predictions
from shared.heads.tagging import TaggingHead
from shared.heads.tasks import Scores
from shared.metrics.tagging import TAGGING_METRICS, accuracy_difference, score_tags, user_accuracy
from shared.models.features import compute_hidden
from simulations.observe.baselines import constant_label, pooled_logits, user_majority
from simulations.observe.rows import Rows

TASK = TaskConfig(name="tagging", labels=("loved", "fine", "disliked"))


def scenario(*, blocks=1, kernel=0, method="ffa-lora"):
    adapter = AdapterConfig(rank=2, whitened_features=8, kernel_features=kernel, targets=("output.dense",))
    model, federation = ModelConfig(head_blocks=blocks), FederationConfig(method=method)
    return Scenario(name="tiny", task=TASK, model=model, adapter=adapter, federation=federation)


def tagging(steps, base, texts, **changes):
    settings = scenario(**changes)
    features = compute_hidden(base, base.tokenize(texts, max_tokens=32), head_blocks=settings.model.head_blocks)
    return steps.Setting(base, settings, features, [float(i % 3) for i in range(len(texts))], Scores)


@pytest.fixture(scope="module")
def setting(steps, tiny_base, tiny_texts):
    return tagging(steps, tiny_base, tiny_texts[:8])


def test_the_gradient_of_two_records_is_that_worked_out_by_hand(steps, tiny_base, tiny_texts):
    two = tagging(steps, tiny_base, tiny_texts[:2], blocks=0)
    hidden, mask = two.features.batch([0, 1])
    loss = two.head(hidden, mask, torch.tensor([2.0, 0.0]))
    weight, projected = two.head.output.weight.detach().double().numpy(), hidden[:, 0].double().numpy()
    chances = softmax(projected @ weight.T, axis=1)
    np.testing.assert_allclose(loss.detach(), -np.log([chances[0, 2], chances[1, 0]]), rtol=1e-5)
    for row, label in ((0, 2), (1, 0)):
        (found,) = torch.autograd.grad(loss[row], two.head.output.weight, retain_graph=True)
        np.testing.assert_allclose(found, np.outer(chances[row] - np.eye(3)[label], projected[row]), atol=1e-6)


def test_at_the_public_start_every_label_is_as_likely(tiny_base, tiny_texts):
    head = make_head(tiny_base, scenario())
    hidden = compute_hidden(tiny_base, tiny_base.tokenize(tiny_texts[:2], max_tokens=32), head_blocks=1)
    assert isinstance(head, TaggingHead)
    assert head.output.weight.shape[0] == 3
    losses = head(*hidden.batch([0, 1]), torch.tensor([0.0, 2.0]))
    np.testing.assert_allclose(losses.detach(), np.log(3), rtol=1e-6)


@pytest.mark.parametrize(("blocks", "method"), [(0, "ffa-lora"), (1, "ffa-lora"), (1, "fedavg")])
def test_one_step_is_the_clipped_sum_of_single_gradients_over_the_constant(
    steps, tiny_base, tiny_texts, blocks, method
):
    setting = tagging(steps, tiny_base, tiny_texts[:5], blocks=blocks, method=method)
    policy = setting.policy(clip_norm=0.4, federation_method=method, head_blocks=blocks)
    total = 0.0
    for row in range(5):
        gradient = np.concatenate([g.ravel() for g in setting.gradients(row)]).astype(np.float64)
        total = total + gradient * min(1.0, policy.clip_norm / np.linalg.norm(gradient))
    wanted = -policy.learning_rate * total / policy.denominator
    np.testing.assert_allclose(steps.flat(setting.train(policy)), wanted, atol=2e-6)


def test_one_record_moves_the_clipped_sum_by_at_most_the_clip_norm(steps, setting):
    policy = setting.policy(clip_norm=0.05)  # everybody is clipped, so the bound is nearly reached
    whole = setting.train(policy)
    moves = [
        setting.moved(policy, whole, setting.train(policy, rows=[row for row in range(8) if row != left_out]))
        for left_out in range(8)
    ]
    assert max(moves) <= policy.clip_norm * (1 + 1e-4)
    assert min(moves) >= policy.clip_norm * 0.9


@pytest.mark.parametrize("wrong", [3.0, -1.0, float("nan"), float("inf"), 1e30])
def test_a_record_with_no_label_of_the_list_counts_as_zero(steps, setting, wrong):
    policy = setting.policy()
    targets = [*setting.targets[:3], wrong, *setting.targets[4:]]
    without = setting.train(policy, rows=[0, 1, 2, 4, 5, 6, 7])
    np.testing.assert_allclose(steps.flat(setting.train(policy, targets=targets)), steps.flat(without), atol=1e-7)
    assert setting.moved(policy, setting.train(policy), without) > 0.01  # the record mattered


@pytest.mark.parametrize(("blocks", "kernel"), [(0, 0), (1, 0), (0, 5), (1, 5)])
def test_the_folded_output_is_the_heads_own(tiny_base, tiny_texts, blocks, kernel):
    settings = scenario(blocks=blocks, kernel=kernel)
    head = make_head(tiny_base, settings, public_texts=len(tiny_texts))
    features = compute_hidden(tiny_base, tiny_base.tokenize(tiny_texts, max_tokens=32), head_blocks=blocks)
    make_start(head, features, ridge=0.05, seed=1)
    torch.nn.init.normal_(head.output.weight, std=0.5, generator=torch.Generator().manual_seed(1))
    pooled, logits = text_predictions(head, read_shared(head), features)
    wanted = head.outputs(*head.prepare(features).batch(range(len(tiny_texts)))).detach()
    assert logits.shape == (len(tiny_texts), 3)
    assert np.ptp(logits, axis=1).min() > 0.01
    np.testing.assert_allclose(logits, wanted, atol=2e-4)
    np.testing.assert_allclose(pooled, pooled_features(head, features))


def taste(seed, *, count=40, width=6, labels=3):
    draw = np.random.default_rng(seed)
    return draw.normal(size=(count, width)), draw.normal(size=(count, labels)), draw.integers(labels, size=count)


PERSONAL = PersonalConfig(ridge=2.0, bias_shrinkage=3.0)
MEAN = np.linspace(-0.5, 0.5, 6)


def penalised(flat, features, shared, targets):
    weight, level = flat[3:].reshape(6, 3), flat[:3]
    logits = shared + (features - MEAN) @ weight + level
    losses = logsumexp(logits, axis=1) - logits[np.arange(len(targets)), targets]
    return losses.sum() + PERSONAL.ridge / 2 * (weight**2).sum() + PERSONAL.bias_shrinkage / 2 * (level**2).sum()


@pytest.mark.parametrize("count", [1, 40])
def test_the_private_part_is_the_minimum_that_a_general_optimiser_finds(count):
    features, shared, targets = taste(count, count=count)
    found = fit_tags(features, shared, targets, mean=MEAN, personal=PERSONAL)
    mine = np.concatenate([found.bias + MEAN @ found.weight, found.weight.ravel()])
    best = minimize(penalised, np.zeros(21), (features, shared, targets), tol=1e-12)
    np.testing.assert_allclose(mine, best.x, atol=2e-4)
    assert penalised(mine, features, shared, targets) <= best.fun + 1e-7
    wanted = shared + (features - MEAN) @ best.x[3:].reshape(6, 3) + best.x[:3]
    np.testing.assert_allclose(found.predict(features, shared), wanted, atol=2e-3)


def test_without_records_the_shared_logits_stand_to_the_last_bit():
    features, shared, targets = taste(0)
    for fit, rows in ((fit_tags, slice(0)), (keep_tags, slice(None))):
        private = fit(features[rows], shared[rows], targets[rows], mean=MEAN, personal=PERSONAL)
        assert np.array_equal(private.predict(features, shared), shared)
    nothing = fit_tags(features[:2], shared[:2], np.array([3.0, np.nan]), mean=MEAN, personal=PERSONAL)
    assert not nothing.weight.any()
    assert not nothing.bias.any()


def test_a_strong_penalty_leaves_the_shared_logits_and_a_user_of_one_label_stays_finite():
    features, shared, targets = taste(1)
    firm = PersonalConfig(ridge=1e9, bias_shrinkage=1e9)
    private = fit_tags(features, shared, targets, mean=MEAN, personal=firm)
    np.testing.assert_allclose(private.predict(features, shared), shared, atol=1e-5)
    free = PersonalConfig(ridge=1e-3, bias_shrinkage=0.0)
    private = fit_tags(features, shared, np.ones(40), mean=MEAN, personal=free)
    assert np.isfinite(private.weight).all()
    assert (private.predict(features, shared).argmax(1) == 1).all()


def test_a_method_without_a_form_for_labels_is_refused(monkeypatch):
    import client.personal.personalize as personalize

    bare = personalize.PersonalMethod(personalize.fit_ridge, read_by_shared_step=False, summary="for numbers alone")
    monkeypatch.setitem(personalize.PERSONAL_METHODS, "fine-tune", bare)
    with pytest.raises(ScenarioError, match="has no form for task 'tagging'"):
        check_task("fine-tune", "tagging")
    check_task("none", "tagging")


def labels_of(seed, *, count=300, users=23, labels=4):
    draw = np.random.default_rng(seed)
    targets = draw.integers(labels - 1, size=count)  # nobody has the last label
    predictions = np.where(draw.random(count) < 0.4, targets, draw.integers(labels, size=count))
    return predictions, targets, draw.integers(users, size=count) * 3


def test_the_scores_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    predictions, targets, users = labels_of(5)
    found = score_tags(predictions, targets, users, labels=6, reference=targets[::-1], seed=1, resamples=40)
    assert list(found) == list(TAGGING_METRICS)
    assert found["accuracy"].value == pytest.approx(metrics.accuracy_score(targets, predictions))
    every = {"labels": range(6), "average": "macro", "zero_division": 0}
    assert found["macro_f1"].value == pytest.approx(metrics.f1_score(targets, predictions, **every))
    each = [metrics.accuracy_score(targets[users == u], predictions[users == u]) for u in np.unique(users)]
    np.testing.assert_allclose(user_accuracy(predictions, targets, users), each)
    assert found["user_accuracy"].value == pytest.approx(np.mean(each))
    assert found["worst_decile"].value == pytest.approx(np.mean(sorted(each)[:3]))
    others = user_accuracy(targets[::-1], targets, users)
    assert found["share_gaining"].value == pytest.approx(np.mean(np.array(each) > others))


def test_the_interval_is_that_of_scores_of_users_drawn_with_repetition():
    predictions, targets, users = labels_of(6, users=9)
    found = score_tags(predictions, targets, users, labels=4, seed=3, resamples=25)["macro_f1"]
    names, values = np.unique(users), []
    for drawn in np.random.default_rng(3).integers(9, size=(25, 9)):
        rows = np.concatenate([np.flatnonzero(users == names[user]) for user in drawn])
        everybody = np.zeros(len(rows), dtype=np.int64)
        again = score_tags(predictions[rows], targets[rows], everybody, labels=4, seed=0, resamples=1)
        values.append(again["macro_f1"].value)
    np.testing.assert_allclose([found.low, found.high], np.quantile(values, [0.025, 0.975]))


def test_a_better_row_has_a_difference_above_zero():
    predictions, targets, users = labels_of(7)
    gain = accuracy_difference(targets, predictions, targets, users, seed=0, resamples=50)
    assert gain.value == pytest.approx(np.mean(predictions != targets))
    assert gain.low > 0


def test_the_rows_beside_the_federation_see_what_they_say():
    train = Rows(np.array([0, 1, 2, 0, 1, 2]), np.array([0.0, 0, 0, 2, 2, 1]), np.array([0, 0, 0, 1, 1, 1]))
    test = Rows(np.array([0, 1, 2]), np.array([0.0, 2, 1]), np.array([0, 1, 2]))
    assert constant_label(train, test, labels=3).tolist() == [0, 0, 0]
    assert user_majority(train, test, labels=3).tolist() == [0, 2, 0]
    features = np.eye(3)
    free = pooled_logits(features, train, labels=3, ridge=1e-9)
    np.testing.assert_allclose(softmax(free, axis=1), [[0.5, 0, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]], atol=1e-2)
    firm = pooled_logits(features, train, labels=3, ridge=1e6)
    np.testing.assert_allclose(softmax(firm, axis=1)[0], [3 / 6, 1 / 6, 2 / 6], atol=1e-3)


@pytest.mark.parametrize("labels", [(), ("one",), ("one", "two", "one")])
def test_labels_must_be_at_least_two_and_all_different(labels):
    with pytest.raises(ValidationError, match=r"task\.labels must list at least two labels"):
        TaskConfig(name="tagging", labels=labels)
    TaskConfig(labels=labels)  # of no account in another task
