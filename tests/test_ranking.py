"""Task ranking: metrics by hand, the loss and its gradient, profiles, the private counts, and a whole run."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from sklearn.metrics import ndcg_score

from client.personal.personalize import check_task
from client.personal.profile import fit_profile, profile_of
from client.training.site import TextFeatures
from client.training.train import quiet_hooks
from shared.config import AdapterConfig, ModelConfig, PersonalConfig, PrivacyConfig, Scenario, TaskConfig, load_scenario
from shared.datasets import Dataset, Record, UserData
from shared.errors import DataError, ScenarioError
from shared.heads.adapter import make_start, read_shared
from shared.heads.output import pooled_features
from shared.heads.registry import make_head
from shared.metrics.ranking import (
    GAINS,
    expected_gain,
    exposure,
    ndcg_at,
    percentiles,
    popularity_bias,
    ranking_difference,
    recall_at,
    reciprocal,
    score_ranking,
    top,
)
from shared.models.features import compute_features
from simulations.observe.dp_popularity import clipped_counts, log_popularity, smooth
from simulations.observe.observe import make_observer
from simulations.observe.rows import Rows
from simulations.run import simulate


def test_metrics_by_hand():
    scores = np.array([[3.0, 1.0, 2.0, 0.0], [1.0, 4.0, 3.0, 0.0], [0.0, 1.0, 2.0, 3.0]])  # ranks 1, 3, 4
    np.testing.assert_allclose(expected_gain(scores, ndcg_at(3)), [1.0, 0.5, 0.0])
    np.testing.assert_allclose(expected_gain(scores, recall_at(3)), [1.0, 1.0, 0.0])
    np.testing.assert_allclose(expected_gain(scores, reciprocal), [1.0, 1 / 3, 1 / 4])


def test_ndcg_is_that_of_scikit_learn_ties_included():
    """Its ties too are averaged over their orders."""
    draw = np.random.default_rng(4)
    scores = draw.integers(0, 12, size=(40, 21)).astype(float)
    liked = np.zeros_like(scores)
    liked[:, 0] = 1
    for k in (1, 5, 10):
        wanted = [ndcg_score(truth[None], row[None], k=k) for truth, row in zip(liked, scores, strict=True)]
        np.testing.assert_allclose(expected_gain(scores, ndcg_at(k)), wanted, atol=1e-12)


@pytest.mark.parametrize("name", GAINS)
def test_a_scorer_without_an_opinion_is_worth_a_random_order(name):
    gain = GAINS[name]
    constant = expected_gain(np.zeros((1, 101)), gain)[0]
    assert constant == pytest.approx(gain(np.arange(1.0, 102.0)).mean())
    drawn = expected_gain(np.random.default_rng(0).random((20_000, 101)), gain).mean()
    assert drawn == pytest.approx(constant, abs=0.01)
    assert constant < 0.25  # and neither the best nor the worst place


def test_scores_that_cannot_be_ranked_are_refused():
    for bad, said in ((np.zeros((0, 5)), "shape"), (np.zeros((3, 1)), "shape"), (np.array([[1.0, np.nan]]), "finite")):
        with pytest.raises(ValueError, match=said):
            expected_gain(bad, reciprocal)


def test_rows_are_scored_over_users_and_paired():
    better, worse = np.array([[2.0, 1.0, 0.0]] * 6), np.array([[1.0, 2.0, 0.0]] * 3 + [[2.0, 1.0, 0.0]] * 3)
    row = score_ranking(better, bias=np.arange(6) / 10, reference=worse, seed=1, resamples=200)
    assert (row["mrr"].value, row["share_gaining"].value, row["popularity_bias"].value) == (1.0, 0.5, 0.25)
    assert row["share_gaining"].low < 0.5 < row["share_gaining"].high
    found = ranking_difference(better, worse, seed=1, resamples=200)
    assert found.value == pytest.approx((1 - 1 / np.log2(3)) / 2)
    assert found.low >= 0


def test_recommendations_leave_out_what_is_known_and_their_spread_is_measured():
    scores = np.array([[4.0, 3.0, 2.0, 1.0, 0.0]] * 2)
    recommended = top(scores, [np.array([0]), np.array([], dtype=int)], k=2)
    assert recommended.tolist() == [[1, 2], [0, 1]]
    percentile = percentiles(np.array([8.0, 4.0, 2.0, 1.0, 0.0]))
    assert percentile.tolist() == pytest.approx([0.9, 0.7, 0.5, 0.3, 0.1])
    found = popularity_bias(recommended, [np.array([0]), np.array([3, 4])], percentile)
    assert found.tolist() == pytest.approx([0.6 - 0.9, 0.8 - 0.2])
    # exposures 1, 2, 1, 0, 0 of 4: mean absolute difference over twice the mean
    shown = np.array([1, 2, 1, 0, 0])
    gini = np.abs(shown[:, None] - shown).mean() / (2 * shown.mean())
    assert exposure(recommended, texts=5) == pytest.approx({"coverage": 0.6, "gini": gini})


def settings(**changes):
    adapter = AdapterConfig(kernel_features="all", whitened_features=4, kernel_widths=(0.3,), kernel_weights=(1.0,))
    return Scenario(
        name="tiny", task=TaskConfig(name="ranking", negatives=4), model=ModelConfig(head_blocks=0), adapter=adapter
    ).model_copy(update=changes)


@pytest.fixture
def started(tiny_base, tiny_texts):
    """A head that has learnt something, its catalogue's prepared inputs and pooled features."""
    features = compute_features(tiny_base, tiny_texts, head_blocks=0, max_tokens=32)
    head = make_head(tiny_base, settings(), public_texts=len(tiny_texts))
    make_start(head, features, ridge=0.05, seed=1)
    with torch.no_grad():
        head.output.weight.copy_(torch.randn(head.output.weight.shape, generator=torch.Generator().manual_seed(2)))
    return head, head.prepare(features), pooled_features(head, features)


def direct_losses(head, inputs, targets):
    """-log softmax over the catalogue, written down; differentiable in the output alone."""
    scores = head.catalogue @ head.output.weight[0]
    return (torch.logsumexp(scores, 0) - inputs @ head.output.weight[0]) * (targets >= 4.0)


def test_the_loss_is_the_softmax_over_the_catalogue_and_its_gradient_exact(started):
    head, prepared, _ = started
    hidden, mask = prepared.batch(range(5))
    targets = torch.tensor([5.0, 4.0, 3.9, float("nan"), 4.0])
    torch.testing.assert_close(head(hidden, mask, targets), direct_losses(head, hidden[:, 0], targets))
    wanted = [
        torch.autograd.grad(loss, head.output.weight, retain_graph=True)[0]
        for loss in direct_losses(head, hidden[:, 0], targets)
    ]
    module = GradSampleModule(head, loss_reduction="sum")
    module.train()
    with quiet_hooks():
        module(hidden, mask, targets).sum().backward()
    found = head.output.weight.grad_sample
    torch.testing.assert_close(found, torch.stack(wanted), atol=1e-5, rtol=1e-4)
    assert found[[0, 1, 4]].flatten(1).norm(dim=1).min() > 0.1
    assert not found[[2, 3]].any()  # a record that is not liked, or says nothing, moves nothing


def test_training_ranks_what_is_liked_first(started):
    head, prepared, pooled = started
    hidden, mask = prepared.batch([3, 3, 3, 7])
    with torch.no_grad():
        head.output.weight.zero_()
    for _ in range(60):
        head.zero_grad()
        head(hidden, mask, torch.full((4,), 5.0)).sum().backward()
        with torch.no_grad():
            head.output.weight -= 0.5 * head.output.weight.grad
    scores = head.apply_output(pooled, head.output_layer())
    assert np.argsort(-scores)[:2].tolist() == [3, 7]
    assert scores[3] - scores[7] == pytest.approx(np.log(3), abs=0.3)  # log popularity
    assert head.log_sum() == pytest.approx(np.logaddexp.reduce(scores), abs=1e-4)


def test_the_folded_output_is_the_score(started):
    head, prepared, pooled = started
    hidden, mask = prepared.batch(range(len(pooled)))
    scores = head.predict(hidden, mask).detach().numpy()
    np.testing.assert_allclose(head.apply_output(pooled, head.output_layer()), scores, atol=1e-3)
    share = np.exp(scores - np.logaddexp.reduce(scores))
    np.testing.assert_allclose(head.typical(), share @ head.directions.numpy(), atol=1e-5)


def test_a_profile_by_hand():
    personal = PersonalConfig(profile=6.0, bias_shrinkage=1.0)
    mean, typical = np.array([1.0, 1.0]), np.array([0.0, 0.5])
    found = fit_profile(np.array([[3.0, 1.0], [1.0, 4.0]]), mean=mean, typical=typical, personal=personal)
    np.testing.assert_allclose(found.weight, [2.0, 0.0])  # 6 * ((1, -.5) + (0, .5)) / 3
    np.testing.assert_allclose(found.predict(np.array([[1.0, 1.0], [2.0, 9.0]]), np.array([7.0, 7.0])), [7.0, 9.0])
    nobody = fit_profile(np.zeros((0, 2)), mean=mean, typical=typical, personal=personal)
    assert not nobody.weight.any()
    assert nobody.bias == 0


def test_a_profile_is_made_of_what_is_liked_alone(started):
    head, _, pooled = started
    personal, said = PersonalConfig(profile=9.0), np.array([5.0, 1.0, 4.0])
    found = profile_of(head, pooled[:3], said, personal=personal)
    same = profile_of(head, pooled[[0, 5, 2]], said, personal=personal)
    np.testing.assert_array_equal(found.weight, same.weight)
    assert not np.allclose(found.weight, profile_of(head, pooled[:3], said[::-1].copy() - 1, personal=personal).weight)
    assert not profile_of(head, pooled[:3], said, personal=PersonalConfig(method="none")).weight.any()


def test_what_cannot_be_ranked_is_refused(tiny_base, tiny_texts):
    for name in ("ditto", "retrieval"):
        with pytest.raises(ScenarioError, match="ranking"):
            check_task(name, "ranking")
    with pytest.raises(ScenarioError, match="head_blocks must be 0"):
        make_head(tiny_base, settings(model=ModelConfig(head_blocks=1)), public_texts=len(tiny_texts))
    plain = settings(adapter=AdapterConfig(whitened_features=4))
    with pytest.raises(ScenarioError, match="catalogue of at least two"):
        make_head(tiny_base, plain, public_texts=0)


def test_one_unit_moves_the_counts_by_at_most_one():
    draw = np.random.default_rng(5)
    rows = Rows(draw.integers(0, 9, 60), np.full(60, 5.0), np.sort(draw.integers(0, 6, 60)))
    reached = []
    for unit, parts in (("user", [rows.user != user for user in range(6)]), ("record", ~np.eye(60, dtype=bool))):
        whole = clipped_counts(rows, texts=9, unit=unit)
        for kept in parts:
            part = Rows(rows.text[kept], rows.target[kept], rows.user[kept])
            reached.append(np.linalg.norm(whole - clipped_counts(part, texts=9, unit=unit)))
    assert max(reached) == pytest.approx(1.0)
    np.testing.assert_array_equal(clipped_counts(rows, texts=9, unit="record"), np.bincount(rows.text, minlength=9))


def test_smoothing_takes_noise_away_and_nothing_where_there_is_none():
    counts = np.repeat([0.0, 40.0], 30)
    same = np.equal.outer(counts, counts).astype(float)
    noisy = counts + np.random.default_rng(1).normal(scale=20, size=60)
    assert np.abs(smooth(noisy, same, stddev=20.0) - counts).mean() < 0.8 * np.abs(noisy - counts).mean()
    np.testing.assert_array_equal(smooth(noisy, same, stddev=0.0), noisy)
    rows = Rows(np.array([1, 1, 2]), np.full(3, 5.0), np.arange(3))
    bare = Scenario(name="tiny", privacy=PrivacyConfig(trust="none"))
    found = log_popularity(rows, np.eye(4), users=3, scenario=bare)
    assert np.diff(found[[0, 2, 1]]).min() > 0
    assert found[0] == found[3]
    private = log_popularity(rows, np.eye(4), users=3, scenario=Scenario(name="tiny"))
    assert not np.allclose(found, private)


@pytest.fixture
def invented(tiny_base, tiny_texts, tmp_path, monkeypatch):
    """Two users of a catalogue of 21 texts, and an observer."""
    monkeypatch.setattr("client.training.site.feature_cache", lambda: tmp_path)
    texts = [text for text in tiny_texts if text]

    def records(*pairs):
        return tuple(Record(texts[row], stars, str(row), time) for time, (row, stars) in enumerate(pairs))

    users = (
        UserData("1", records((0, 5.0), (1, 2.0)), records((2, 4.0)), records((0, 5.0), (3, 2.0), (4, 4.0), (5, 5.0))),
        UserData("2", records((6, 5.0)), records((7, 5.0)), records((8, 1.0))),
    )
    dataset = Dataset("invented", users, tuple(texts))

    def observe(held_out="next", *, users=dataset.users, **changes):
        task = TaskConfig(name="ranking", negatives=10, held_out=held_out)
        scenario = settings(task=task).model_copy(update=changes)
        data = replace(dataset, users=users)
        features = TextFeatures(tiny_base, scenario, data)
        head = make_head(tiny_base, scenario, public_texts=len(texts))
        make_start(head, features.public(), ridge=0.05, seed=0)
        return make_observer(head, features, data, scenario)

    return observe


def test_a_list_holds_one_liked_text_and_unknown_ones(invented):
    observer = invented()
    assert observer.scored_users().tolist() == [0]  # user 2 likes nothing that is held out
    (list_,) = observer._test.texts
    assert list_[0] == 4  # 0 is known from training, 3 is not liked
    assert len(set(list_[1:])) == 10
    assert not set(list_[1:]) & {0, 1, 2, 3, 4, 5}
    assert invented("last")._test.texts[0, 0] == 5
    assert {invented("drawn", seed=seed)._test.texts[0, 0] for seed in range(8)} == {4, 5}
    assert (invented()._test.texts == observer._test.texts).all()  # every row, every head: the same lists
    assert (invented(seed=1)._test.texts != observer._test.texts).any()


def test_rows_that_owe_nothing_to_the_federation(invented):
    observer = invented()
    rows = observer.baselines()
    scored = {name: observer.score(row, reference=rows["local"], seed=0, resamples=20) for name, row in rows.items()}
    assert scored["random"]["recall@5"].value == pytest.approx(5 / 11)
    assert not np.isin(rows["local"].recommended, [0, 1, 2]).any()
    liked = rows["popularity"].recommended[0]
    assert set(liked[:2]) == {6, 7}  # what others like and user 1 has no record of
    assert not np.allclose(rows["popularity + profile"].scores, rows["popularity"].scores)
    assert list(observer.metrics) == list(scored["local"])
    arrays = {name: array + 0.5 for name, array in read_shared(observer.head).items()}
    seen = observer.federated(arrays)
    alone = observer.cold_rows(arrays, [0, 5])
    np.testing.assert_array_equal(alone[0]["personal"].scores, seen["federated"].scores)
    np.testing.assert_allclose(alone[5]["personal"].scores, seen["personal"].scores)


def test_the_profile_of_a_row_is_the_one_that_is_exported(invented):
    observer = invented()
    arrays = {name: array + 0.5 for name, array in read_shared(observer.head).items()}
    private = observer.private_output(arrays, 0)
    pooled = pooled_features(observer.head, observer._texts.all)
    shared = observer.head.apply_output(pooled, observer.head.output_layer())
    every = private.predict(pooled, shared)
    np.testing.assert_allclose(
        observer.federated(arrays)["personal"].scores[0], every[observer._test.texts[0]], atol=1e-4
    )


def test_data_that_cannot_be_ranked_are_refused(invented):
    stranger = UserData("3", (Record("not in the catalogue", 5.0, "x", 1),), (), ())
    with pytest.raises(DataError, match="public catalogue"):
        invented(users=(stranger,))
    with pytest.raises(DataError, match=r"task\.negatives = 19"):
        invented(task=TaskConfig(name="ranking", negatives=19))
    with pytest.raises(DataError, match="must be liked"):
        invented(task=TaskConfig(name="ranking", negatives=4, liked=9.0))


@pytest.fixture
def run(tiny, tiny_base, tmp_path, monkeypatch):
    """Simulate invented users: (overrides) -> (summary, folder)."""
    monkeypatch.setattr("client.training.site.feature_cache", lambda: tmp_path / "features")
    data = tiny.tiny_movielens(tmp_path / "data")
    body = (
        'task = {name = "ranking", negatives = 10}\nmodel.head_blocks = 0\nadapter.kernel_features = 12\n'
        "linear.enabled = false\nattack.held_out_share = 0.3\n"
    )
    path = tiny.tiny_scenario(tmp_path, base=tiny_base.folder, data=data, body=body)
    return lambda *overrides: (
        simulate(load_scenario(path, ("federation.rounds=1", *overrides)), out=tmp_path / "run", quiet=True),
        tmp_path / "run",
    )


@pytest.mark.slow
def test_a_whole_run(run):
    summary, out = run("export.users=0")
    assert summary["metric"] == "ndcg@10"
    assert summary["metrics"]["ndcg@10"]["better"] == "more"
    assert {"random", "local", "popularity", "dp-statistics", "federated", "personal"} <= set(summary["rows"])
    assert all(0 <= row["ndcg@10"]["value"] <= 1 for row in summary["rows"].values())
    assert json.loads((out / "user_scores.json").read_text())["metric"] == "ndcg@10"


@pytest.mark.slow
def test_heads_are_exported_and_membership_is_attacked(run):
    summary, _ = run("export.users=2", "attack.membership=true")
    assert len(summary["heads"]) == 2
    assert max(head["parity_max_abs"] for head in summary["heads"]) < 1e-3
    attacked = summary["membership"]["records"]["attacked"]
    assert {target: set(found) for target, found in attacked.items()} == {
        "private": {"loss", "reference"},
        "unprotected": {"loss", "reference"},
        "untrained": {"reference"},  # at the start every liked record costs the same
    }
    counts = summary["membership"]["records"]  # too few records here for a score to mean anything: liked ones alone
    assert counts["members"] + counts["non_members"] < summary["data"]["fit"]
