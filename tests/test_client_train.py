"""The local step: exact sums, the noise at the composed step, and every constant from the policy."""

import numpy as np
import pytest
import scipy.stats
import torch

from client.training.train import make_trainable, train_shared
from shared.config import AdapterConfig, FederationConfig, ModelConfig, Scenario
from shared.errors import PrivacyError, RefusedError
from shared.heads.adapter import load_start, make_start, read_shared, shared_parameters, trained_slots
from shared.heads.rating import RatingHead
from shared.heads.tasks import Scores
from shared.models.features import Features, compute_features
from shared.privacy.clipping import clipped_sum
from shared.privacy.noise import GRID_SIGMA, SeededRandomness
from shared.privacy.policy import Policy

ADAPTER = AdapterConfig(rank=2, whitened_features=8)


def make_head(base, *, blocks=1, method="ffa-lora"):
    """A fresh head for ratings."""
    model, federation = ModelConfig(head_blocks=blocks), FederationConfig(method=method)
    return RatingHead(base, Scenario(name="tiny", model=model, adapter=ADAPTER, federation=federation))


class Silent:
    """Every record and no noise: what is left of a step is its clipped sum."""

    def bernoulli(self, probability, count):
        return np.ones(count, dtype=bool)

    def gaussian_integers(self, count):
        return np.zeros(count, dtype=np.int64)


def make_policy(head, **changes):
    settings = {
        "protocol": 1, "campaign": "c", "trust": "local", "unit": "record", "relation": "add-or-remove-one",
        "epsilon": 8.0, "delta": 1e-5, "clip_norm": 0.5, "noise_multiplier": 2.0, "sampling_rate": 1.0, "steps": 1,
        "denominator": 4.0, "max_participations": 5, "max_update_norm": 1e9, "learning_rate": 0.7, "rounds": 5,
        "cohort_size": 2, "federation_method": "ffa-lora", "personal_method": "fine-tune", "head_blocks": 1,
        "settings_sha256": "h", "base_sha256": "b", "start_sha256": "s", "public_texts_sha256": "p",
        "technique": "lora", "reply_fields": ("arrays", "config.policy", "config.round"),
        "slots": tuple((slot.name, slot.shape) for slot in trained_slots(head)),
    }  # fmt: skip
    settings |= changes
    if settings["clip_norm"]:
        settings.setdefault("grid", settings["noise_multiplier"] * settings["clip_norm"] / GRID_SIGMA)
    return Policy(**({"grid": None} | settings))


class Setting:
    """A head away from its start (so that LoRA has gradients), features and targets of a few texts."""

    def __init__(self, base, texts, *, blocks=1, method="ffa-lora"):
        self.base, self.blocks, self.method = base, blocks, method
        self.features = compute_features(base, texts, head_blocks=blocks, max_tokens=32)
        self.head = make_head(base, blocks=blocks, method=method)
        self.public_start = make_start(self.head, self.features, ridge=0.05, seed=1)
        self.features = self.head.prepare(self.features)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in shared_parameters(self.head).values():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        self.start = read_shared(self.head)
        self.targets = torch.tensor([1.0 + i % 5 for i in range(len(texts))])

    def update(self, policy, *, features=None, targets=None, micro_batch=1024, randomness=None):
        features = self.features if features is None else features
        targets = self.targets if targets is None else targets
        head = make_head(self.base, blocks=self.blocks, method=self.method)
        load_start(head, self.public_start)
        return train_shared(
            make_trainable(head, policy),
            self.start,
            features,
            Scores(targets.tolist()),
            policy=policy,
            micro_batch=micro_batch,
            randomness=randomness or Silent(),
        )

    def policy(self, **changes):
        return make_policy(self.head, **changes)

    def gradients_one_by_one(self):
        """Per-sample gradients by plain autograd, one record at a time: the slow, obvious way."""
        rows = []
        for i in range(len(self.targets)):
            hidden, mask = self.features.batch([i])
            loss = 0.5 * (self.head.predict(hidden, mask) - self.targets[i : i + 1]).square().sum()
            rows.append(torch.autograd.grad(loss, list(shared_parameters(self.head).values())))
        return [torch.stack(column) for column in zip(*rows, strict=True)]


def flat(update):
    return np.concatenate([array.ravel() for array in update.values()]).astype(np.float64)


@pytest.fixture(scope="module")
def setting(tiny_base, tiny_texts):
    return Setting(tiny_base, tiny_texts[:12])


@pytest.mark.parametrize("method", ["fedavg", "ffa-lora"])
@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_one_step_is_the_clipped_sum_of_single_gradients_over_the_constant(tiny_base, tiny_texts, blocks, method):
    setting = Setting(tiny_base, tiny_texts[:7], blocks=blocks, method=method)
    gradients = setting.gradients_one_by_one()
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
    policy = setting.policy(clip_norm=float(norms.median()))  # some are clipped, some are not
    factors = (policy.clip_norm / norms).clamp(max=1.0)
    wanted = [-(0.7 / 4.0) * torch.einsum("n,n...->...", factors, g).numpy() for g in gradients]
    found = setting.update(policy)
    assert (factors < 1).any()
    assert (factors == 1).any()
    for array, reference in zip(found.values(), wanted, strict=True):
        np.testing.assert_allclose(array, reference, rtol=1e-4, atol=2e-6)


def test_cached_and_uncached_training_give_the_same_gradients(tiny_base, tiny_texts):
    """The cut only moves where the computation happens: head from block 1 on a cache, or the whole model."""
    cut = Setting(tiny_base, tiny_texts[:9], blocks=1)
    token_ids = tiny_base.tokenize(tiny_texts[:9], max_tokens=32)
    for i, ids in enumerate(token_ids):
        ids, mask = torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool)
        hidden = tiny_base.backbone(ids, mask, head_blocks=1)  # computed here and now, no cache
        parameters = list(shared_parameters(cut.head).values())
        uncached = torch.autograd.grad(cut.head.predict(hidden, mask)[0], parameters)
        cached = torch.autograd.grad(cut.head.predict(*cut.features.batch([i]))[0], parameters)
        for a, b in zip(uncached, cached, strict=True):
            assert (a - b).norm() <= 1e-5 * a.norm()


def test_micro_batches_do_not_change_the_sum(setting):
    policy = setting.policy()
    whole, parts = (flat(setting.update(policy, micro_batch=size)) for size in (1024, 40))
    np.testing.assert_allclose(whole, parts, rtol=1e-4, atol=1e-6)


def test_it_does_not_matter_when_gradients_are_clipped(setting, monkeypatch):
    policy = setting.policy(clip_norm=0.05)
    together = flat(setting.update(policy, micro_batch=40))
    monkeypatch.setattr("client.training.optimizer._MAX_WAITING", 1)  # every micro-batch at once
    np.testing.assert_allclose(flat(setting.update(policy, micro_batch=40)), together, rtol=1e-4, atol=1e-6)


def seeded(seed):
    return SeededRandomness(seed=seed, campaign="c", device=0, round_number=1)


def noise_of(setting, policy, *, seed, **arguments):
    """Noise of one update in units of the policy's scale for a single step."""
    noised = setting.update(policy, randomness=seeded(seed), **arguments)
    difference = flat(noised) - flat(setting.update(policy, **arguments))
    return difference / (policy.learning_rate / policy.denominator * policy.clip_norm * policy.noise_multiplier)


def test_the_composed_step_has_the_calibrated_noise_and_a_wrong_one_would_show(setting):
    policy = setting.policy(noise_multiplier=1.7)
    draws = np.concatenate([noise_of(setting, policy, seed=seed) for seed in range(90)])
    assert len(draws) > 5000
    assert scipy.stats.kstest(draws, scipy.stats.norm.cdf).pvalue > 0.01
    for wrong in (0.9, 1.1):
        assert scipy.stats.kstest(draws * wrong, scipy.stats.norm.cdf).pvalue < 0.01


def test_every_one_of_the_steps_is_noised_even_without_a_record(setting):
    """An empty device sends pure noise; after T steps its variance is T, and T - 1 or T + 1 would be noticed."""
    policy = setting.policy(noise_multiplier=2.0, steps=4)
    empty = {"features": Features([]), "targets": torch.zeros(0)}
    draws = np.concatenate([noise_of(setting, policy, seed=seed, **empty) for seed in range(12)])
    statistic = float((draws**2).sum())
    low, high = scipy.stats.chi2.ppf([0.001, 0.999], df=len(draws))
    assert low < statistic / 4 < high
    assert not low < statistic / 3 < high
    assert not low < statistic / 5 < high


def test_noise_differs_between_seeds_and_repeats_with_one(setting):
    policy = setting.policy(noise_multiplier=1.0)
    first, again, other = (flat(setting.update(policy, randomness=seeded(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.corrcoef(first, other)[0, 1] < 0.5


def test_one_record_moves_the_step_by_at_most_the_clip_norm(setting):
    policy = setting.policy(clip_norm=0.05)  # everybody is clipped, so the bound is nearly reached
    whole = flat(setting.update(policy))
    moves = []
    for left_out in range(len(setting.targets)):
        rows = [i for i in range(len(setting.targets)) if i != left_out]
        part = flat(setting.update(policy, features=setting.features.select(rows), targets=setting.targets[rows]))
        moves.append(np.linalg.norm(whole - part) * policy.denominator / policy.learning_rate)
    assert max(moves) <= policy.clip_norm * (1 + 1e-4)
    assert min(moves) >= policy.clip_norm * 0.9  # a looser clip, or a batch-sized denominator, would be seen


def test_taken_alone_no_record_moves_another(setting):
    """Records that share a batch share its shape, and with it the last bits of gradients; alone they share none."""
    policy, sums = setting.policy(clip_norm=0.05), []

    def integers(**arguments):
        with pytest.MonkeyPatch.context() as patch:
            seen = lambda *a, **k: sums.append(clipped_sum(*a, **k)) or sums[-1]  # noqa: E731
            patch.setattr("client.training.optimizer.clipped_sum", seen)
            sums.clear()
            setting.update(policy, micro_batch=1, **arguments)
        return torch.cat([torch.stack(column).sum(0).ravel() for column in zip(*sums, strict=True)])

    whole = integers()
    for added in range(len(setting.targets)):
        rows = [i for i in range(len(setting.targets)) if i != added]
        others = integers(features=setting.features.select(rows), targets=setting.targets[rows])
        own = integers(features=setting.features.select([added]), targets=setting.targets[[added]])
        assert torch.equal(whole - others, own)  # to the last bit


def test_a_record_with_a_nan_contributes_nothing(setting):
    policy = setting.policy()
    arrays = [setting.features.batch([i])[0][0].numpy() for i in range(len(setting.targets))]
    poisoned = [a.copy() for a in arrays]
    poisoned[4][0, 0] = np.nan
    rows = [i for i in range(len(arrays)) if i != 4]
    found = setting.update(policy, features=Features(poisoned), micro_batch=1)
    wanted = setting.update(policy, features=setting.features.select(rows), targets=setting.targets[rows])
    np.testing.assert_allclose(flat(found), flat(wanted), rtol=1e-4, atol=1e-6)


def test_a_noised_state_that_is_not_finite_stops_the_device(setting):
    with pytest.raises(RefusedError, match="NOT_FINITE"):
        setting.update(setting.policy(learning_rate=1e39), randomness=seeded(0))


@pytest.mark.parametrize("change", [{"grid": 1e-9}, {"grid": None}, {"noise_multiplier": 1e6}])
def test_a_grid_that_does_not_carry_the_priced_noise_is_refused(setting, change):
    policy = setting.policy(noise_multiplier=1.7).model_copy(update=change)
    with pytest.raises(PrivacyError, match=r"grid must be|visible on its grid"):
        setting.update(policy)


def test_what_is_sent_is_cut_at_the_public_bound(setting):
    policy = setting.policy(max_update_norm=1e-3)
    assert np.linalg.norm(flat(setting.update(policy))) == pytest.approx(1e-3, rel=1e-4)


def test_without_privacy_the_step_is_the_plain_summed_gradient(setting):
    policy = setting.policy(trust="none", clip_norm=None, epsilon=None, delta=None)
    wanted = [-(0.7 / 4.0) * g.sum(0).numpy() for g in setting.gradients_one_by_one()]
    for array, reference in zip(setting.update(policy).values(), wanted, strict=True):
        np.testing.assert_allclose(array, reference, rtol=1e-4, atol=2e-6)


def test_poisson_draws_are_independent_bernoulli(setting):
    """Marginals, pairs and the spread of the batch size; a shuffled fixed-size batch would have none."""
    from client.training.train import _draw

    rate, count, trials = 0.3, 40, 4000
    drawn = np.zeros((trials, count))
    randomness = seeded(5)
    for trial in drawn:
        trial[_draw(count, rate, randomness)] = 1
    sizes = drawn.sum(1)
    assert abs(drawn.mean() - rate) < 5 * (rate * (1 - rate) / drawn.size) ** 0.5
    assert sizes.var() == pytest.approx(count * rate * (1 - rate), rel=0.1)
    pairs = np.corrcoef(drawn.T)[np.triu_indices(count, 1)]
    assert abs(pairs).max() < 5 / trials**0.5
    np.testing.assert_array_equal(_draw(count, 1.0, randomness), np.arange(count))
