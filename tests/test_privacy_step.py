"""The composed noisy step on real heads: what the proof assumes of it, and that its violations would be seen.

Every check is a function of the step. Each test asserts that it holds for ours and fails for mutants of it.
"""

import hashlib
import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch

import client.training.optimizer
import client.training.train
import shared.models.features
from client.training.optimizer import PolicyOptimizer
from client.training.per_sample import PerSample
from client.training.train import make_trainable
from shared.errors import RefusedError
from shared.heads.adapter import shared_parameters
from shared.heads.causal import CausalHead
from shared.heads.lora import FEDERATION_METHODS
from shared.heads.rating import RatingHead
from shared.models.features import Features, micro_batches
from shared.privacy.clipping import clipped_sum
from shared.privacy.noise import GRID_SIGMA, SecureRandomness, SeededRandomness

LEVEL = 1e-7  # of one test of chance: a cryptographic generator has no seed to keep
NOTHING = {"features": Features([]), "targets": []}
TASKS = ("rating", "language")
METHODS = [pair for pair in itertools.product(TASKS, FEDERATION_METHODS) if pair != ("language", "ifca")]


@pytest.fixture(scope="module")
def make(steps, tiny_base, tiny_causal, tiny_texts):
    """(task, **settings) -> a setting of that task."""

    def build(task, **settings):
        if task == "language":
            return steps.language(tiny_causal, **settings)
        if task == "soft":  # tokens beside LoRA
            return steps.language(tiny_causal, prompt_tokens=3, **settings)
        return steps.rating(tiny_base, tiny_texts[:7], **settings)

    return build


@pytest.fixture(scope="module", params=[*TASKS, pytest.param("soft", marks=pytest.mark.slow)])
def setting(request, make):
    return make(request.param)


@pytest.fixture(scope="module")
def wide(make):
    """Ten thousand trainable numbers."""
    return make("rating", blocks=2, method="fedavg", rank=32, targets=("attention.output.dense", "output.dense"))


@pytest.fixture
def together(monkeypatch):
    """All records in one micro-batch, however much of it is padding."""
    monkeypatch.setattr(shared.models.features, "_MAX_PADDING", 1e9)


# Mutants: optimizers that are wrong in one way each.


class ClipsEachTensor(PolicyOptimizer):
    def _clip_waiting(self):
        sums = [clipped_sum([x], clip_norm=self.max_grad_norm, grid=self._grid)[0] for x in self.grad_samples]
        for parameter, clipped in zip(self.params, sums, strict=True):
            parameter.summed_grad, parameter.grad_sample = clipped, None
        self._waiting = 0


class ClipsTheSum(PolicyOptimizer):
    def _clip_waiting(self):
        for parameter in self.params:
            parameter.grad_sample = parameter.grad_sample.sum(0, keepdim=True)
        super()._clip_waiting()


class ClipsNaNNaively(PolicyOptimizer):
    def _clip_waiting(self):
        rows = self.grad_samples
        norms = torch.stack([x.flatten(1).norm(dim=1) for x in rows]).norm(dim=0)
        for parameter, x in zip(self.params, rows, strict=True):
            clipped = torch.einsum("n,n...->...", (self.max_grad_norm / norms).clamp(max=1.0), x)
            parameter.summed_grad, parameter.grad_sample = (clipped / self._grid).double(), None
        self._waiting = 0

    def step(self, closure=None):
        if self._waiting:
            self._clip_waiting()
        with torch.no_grad():
            for parameter in self.params:
                parameter += float("nan") if bool(parameter.summed_grad.isnan().any()) else 0.0
                parameter.summed_grad = torch.zeros(parameter.shape, dtype=torch.int64)
        super().step()


class DividesByTheBatch(PolicyOptimizer):
    def accumulate(self):
        self.expected_batch_size = len(self.grad_samples[0])
        super().accumulate()


class NoiseBeforeClip(PolicyOptimizer):
    def _clip_waiting(self):
        for parameter in self.params:
            noise = self._randomness.gaussian_integers(parameter.numel()) * self._grid
            parameter.grad_sample[0] += torch.from_numpy(noise).view(parameter.shape)
        super()._clip_waiting()
        self._randomness = type("None", (), {"gaussian_integers": lambda _, n: np.zeros(n, dtype=np.int64)})()


class NoisePerMicroBatch(PolicyOptimizer):
    def accumulate(self):
        super().accumulate()
        for parameter in self.params:
            drawn = torch.from_numpy(self._randomness.gaussian_integers(parameter.numel())).view(parameter.shape)
            parameter.summed_grad = drawn + (0 if parameter.summed_grad is None else parameter.summed_grad)


class SkipsEmptySteps(PolicyOptimizer):
    def step(self, closure=None):
        if self._waiting:
            super().step()


class LeavesOneTensorBare(PolicyOptimizer):
    @torch.no_grad()
    def step(self, closure=None):
        bare = self.params[-1]
        before = bare.clone()
        super().step()
        bare.copy_(before)


class KeepsTheSum(PolicyOptimizer):
    def step(self, closure=None):
        if self._waiting:
            self._clip_waiting()
        kept = [parameter.summed_grad for parameter in self.params]
        super().step()
        for parameter, total in zip(self.params, kept, strict=True):
            parameter.summed_grad = total


class StepsWithoutNoise(PolicyOptimizer):
    @torch.no_grad()
    def step(self, closure=None):
        if self._waiting:
            self._clip_waiting()
        bare = [parameter.summed_grad * self._grid for parameter in self.params]
        super().step()
        for parameter, total in zip(self.params, bare, strict=True):
            parameter -= 1e-6 * total


class LeavesTheGrid(PolicyOptimizer):
    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        for parameter in self.params:
            parameter += 0.3 * self._grid * self._learning_rate / self.expected_batch_size


class MovesAFrozenTensor(PolicyOptimizer):
    head = None

    def step(self, closure=None):
        super().step()
        frozen = next(p for p in self.head.parameters() if not p.requires_grad)
        frozen += 1e-6


# D1: per-sample gradients


@pytest.mark.parametrize(("task", "method"), [*METHODS, ("rating", "outside"), ("language", "outside")])
def test_every_trainable_tensor_gets_the_gradient_of_each_record_alone(
    make, steps, monkeypatch, together, install_package, task, method
):
    if method == "outside":
        part = "output" if task == "rating" else "lora_B"
        code = f"from shared.heads.lora import FederationMethod\nmine = FederationMethod(('{part}',), 'of a test')"
        install_package("ext", code, {"federation_methods": {"outside": "mine"}})
    setting = make(task, blocks=2, method=method)
    policy, seen = setting.policy(), steps.Sums(monkeypatch)
    wanted = [np.stack(column) for column in zip(*map(setting.gradients, range(len(setting))), strict=True)]
    [order] = micro_batches(np.arange(len(setting)), setting.features.lengths, 1024)

    def right():
        setting.train(policy)
        found = [x.numpy() for x in seen.per_sample[-1]]
        assert len(found) == len(policy.slots)
        assert all(abs(w).max() > 0 for w in wanted)
        return all(abs(f - w[order]).max() <= 1e-4 * abs(w).max() for f, w in zip(found, wanted, strict=True))

    class Mean(PerSample):
        def __init__(self, head, *, loss_reduction):
            super().__init__(head, loss_reduction="mean")

    assert right()
    monkeypatch.setattr(client.training.train, "PerSample", Mean)
    assert not right()


# D2: sensitivity


def moves_by_the_clip_norm(setting, policy):
    """Whether leaving out any record moves the sum by C and no more, in a step where everybody is clipped."""
    whole, everybody = setting.train(policy), range(len(setting))
    parts = [setting.train(policy, rows=[j for j in everybody if j != i]) for i in everybody]
    moves = np.array([setting.moved(policy, whole, part) for part in parts]) / policy.clip_norm
    return bool((moves <= 1 + 1e-4).all() and (moves >= 0.9).all())


def test_one_record_moves_the_sum_by_at_most_the_clip_norm_and_other_clips_would_show(
    setting, steps, monkeypatch, together
):
    policy = setting.policy(clip_norm=0.002)
    assert moves_by_the_clip_norm(setting, policy)
    for mutant in (ClipsEachTensor, ClipsTheSum, DividesByTheBatch):
        steps.use(monkeypatch, mutant)
        assert not moves_by_the_clip_norm(setting, policy), mutant


@pytest.mark.parametrize("value", [0.0, 1e19, 3e38, math.nan, math.inf])
def test_whatever_a_record_holds_it_moves_the_sum_by_at_most_the_clip_norm(
    setting, steps, monkeypatch, together, value
):
    """In one batch with the others: they must not notice it, and what cannot be clipped counts as nothing."""
    policy = setting.policy(clip_norm=0.05)
    arrays = [setting.features.batch([i])[0][0].numpy().copy() for i in range(len(setting))]
    arrays[2][-1] = value

    def moved():
        try:
            with_it = setting.train(policy, features=Features(arrays))
        except RefusedError:
            return math.inf
        return setting.moved(policy, with_it, without) / policy.clip_norm

    without = setting.train(policy, rows=[i for i in range(len(setting)) if i != 2])
    assert moved() <= 1 + 1e-4
    if not math.isfinite(value):
        assert moved() < 1e-4
        steps.use(monkeypatch, ClipsNaNNaively)
        assert not moved() <= 1 + 1e-4


# D3: the noise


def right_scale(updates, policy):
    """Whether the noise of every tensor, and of all together, has the policy's scale."""
    scale = policy.learning_rate / policy.denominator * policy.clip_norm * policy.noise_multiplier
    scale *= math.sqrt(policy.steps)
    names = list(updates[0])
    tensors = [np.concatenate([update[name].ravel() for update in updates]).astype(np.float64) for name in names]
    for values in (*tensors, np.concatenate(tensors)):
        statistic = float(((values / scale) ** 2).sum())
        tails = scipy.stats.chi2.cdf(statistic, values.size), scipy.stats.chi2.sf(statistic, values.size)
        if 2 * min(tails) < LEVEL:
            return False
    return True


def independent(updates):
    """Whether no two updates, and no two tensors of one update, are correlated."""
    pairs = list(itertools.combinations([np.concatenate([a.ravel() for a in u.values()]) for u in updates], 2))
    for update in updates:
        pairs += itertools.combinations([array.ravel() for array in update.values()], 2)
    for one, other in pairs:
        size = min(one.size, other.size)
        if abs(np.corrcoef(one[:size], other[:size])[0, 1]) > 6 / math.sqrt(size):
            return False
    return True


def seeded(device=0, round_number=1):
    return SeededRandomness(seed=5, campaign="c", device=device, round_number=round_number)


class Changed:
    """Another source of noise, its draws changed."""

    def __init__(self, source, change):
        self.bernoulli, self._source, self._change = source.bernoulli, source, change

    def gaussian_integers(self, count):
        return self._change(self._source, count)


def scaled(factor):
    return lambda source, count: np.rint(source.gaussian_integers(count) * factor).astype(np.int64)


PLACES = [(device, round_number) for device in range(3) for round_number in (1, 2, 3, 4)]
SOURCES = {
    "seeded": [lambda place=place: seeded(*place) for place in PLACES],
    "secure": [SecureRandomness for _ in PLACES],  # a new object, as after a restart, on another device, in a new round
}


@pytest.mark.parametrize("source", SOURCES)
def test_all_noise_has_the_policys_scale_and_none_is_used_twice(wide, source):
    """Over 100,000 coordinates: all tensors, both steps, rounds and devices; 2 % of the scale would be seen."""
    policy = wide.policy(steps=2)
    module = make_trainable(wide.fresh_head(), policy)

    def updates(change=None, sources=SOURCES[source]):
        made = [make() for make in sources]
        made = [Changed(each, change) for each in made] if change else made
        return [wide.train(policy, module=module, randomness=each, **NOTHING) for each in made]

    found = updates()
    assert wide.size * len(found) > 100_000
    assert right_scale(found, policy)
    assert independent(found)
    for factor in (0.9, 0.98, 1.02, 1.1):
        assert not right_scale(updates(scaled(factor)), policy)

    def restarted_for_each_tensor(_, count):
        return seeded().gaussian_integers(count)

    assert not independent(updates(restarted_for_each_tensor))
    assert not right_scale(updates(restarted_for_each_tensor), policy)  # the second step's noise is the first's
    assert not independent(updates(sources=[lambda place=place: seeded(0, place[1]) for place in PLACES]))
    assert not independent(updates(sources=[lambda place=place: seeded(place[0]) for place in PLACES]))


def test_every_tensor_is_noised_after_clipping(wide, steps, monkeypatch, together):
    policy = wide.policy()

    def noise():
        noised, bare = (wide.train(policy, randomness=steps.Replay(scale=scale)) for scale in (1, 0))
        return [{name: noised[name] - bare[name] for name in bare}]

    assert right_scale(noise(), policy)
    for mutant in (NoiseBeforeClip, LeavesOneTensorBare):
        steps.use(monkeypatch, mutant)
        assert not right_scale(noise(), policy), mutant


# D4: one noise a step


CASES = {
    "one batch": {},
    "several micro-batches": {"micro_batch": 8},
    "several steps on no record": {"steps": 4, **NOTHING},
    "several steps and empty draws": {"steps": 4, "sampling_rate": 1e-9},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("waiting", [1, 10**9])
def test_noise_is_added_once_a_step_whatever_was_drawn(setting, steps, monkeypatch, case, waiting):
    monkeypatch.setattr(client.training.optimizer, "_MAX_WAITING", waiting)
    arguments = dict(CASES[case])
    policy = setting.policy(**{key: arguments.pop(key) for key in ("steps", "sampling_rate") if key in arguments})

    def once():
        draws = steps.Replay()
        update = setting.train(policy, randomness=draws, **arguments)
        bare = setting.train(policy, randomness=steps.Replay(scale=0), **arguments)
        asked = sum(count for what, count in draws.asked if what == "noise")
        if asked != setting.size * policy.steps:
            return False
        added = np.concatenate(draws.noise).reshape(-1, setting.size).sum(0)
        added = added * (policy.grid * policy.learning_rate / policy.denominator)
        return np.allclose(steps.flat(bare) - steps.flat(update), added, rtol=1e-3, atol=1e-5)

    assert once()
    steps.use(monkeypatch, SkipsEmptySteps if policy.steps > 1 else NoisePerMicroBatch)
    assert not once()
    steps.use(monkeypatch, PolicyOptimizer)
    train = client.training.train.train_shared
    for wrong in {policy.steps + 1, max(1, policy.steps - 1)} - {policy.steps}:
        changed = policy.model_copy(update={"steps": wrong})
        monkeypatch.setattr(
            steps, "train_shared", lambda *a, changed=changed, **k: train(*a, **k | {"policy": changed})
        )
        assert not once()


# D5, D19: the draw of the records


class Idle:
    """Moves nothing: who is drawn does not depend on it."""

    def __init__(self, parameters, policy, randomness):
        pass

    def accumulate(self):
        pass

    step = accumulate


def is_poisson(drawn, rate):
    """Whether the rows of (steps, records) are independent draws: marginals, sizes, pairs in a step, steps in turn."""
    steps, count = drawn.shape
    if (drawn.min(0) == drawn.max(0)).any():
        return False
    spread = math.sqrt(rate * (1 - rate))
    sizes = drawn.sum(1)
    pairs = np.corrcoef(drawn.T)[np.triu_indices(count, 1)]
    in_turn = np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]
    return bool(
        abs(drawn.mean(0) - rate).max() < 5 * spread / math.sqrt(steps)
        and abs(sizes.var() / (count * spread**2) - 1) < 5 * math.sqrt(2 / steps)
        and abs(pairs).max() < 5.5 / math.sqrt(steps)
        and abs(in_turn) < 5 / math.sqrt(drawn.size)
    )


def without_replacement(count, rate, randomness):
    return np.flatnonzero(randomness.bernoulli(0.5, count) * 0 + (np.random.permutation(count) < rate * count))


class ShuffledPasses:
    """Fixed batches of a shuffled order, what a data loader does."""

    def __init__(self):
        self._left = np.zeros(0, dtype=int)

    def __call__(self, count, rate, randomness):
        if not self._left.size:
            self._left = np.random.permutation(count)
        batch, self._left = np.split(self._left, [round(rate * count)])
        return batch


def same_for_all_steps(count, rate, randomness):
    return np.flatnonzero(np.random.default_rng(0).random(count) < rate)


def one_coin_for_all(count, rate, randomness):
    return np.arange(count) if randomness.bernoulli(rate, 1)[0] else np.zeros(0, dtype=int)


@pytest.mark.parametrize("source", SOURCES)
def test_records_enter_the_steps_by_independent_coins(make, monkeypatch, source):
    """Looked at in the step itself: what is priced as amplified must be Poisson, and nothing else would pass."""
    setting = make("rating", blocks=0)
    rate, steps = 2 / 7, 400
    policy, head = setting.policy(sampling_rate=rate, steps=steps), setting.fresh_head()
    monkeypatch.setattr("client.training.optimizer.PolicyOptimizer", Idle)
    np.random.seed(0)

    def drawn():
        found, step, sampler = np.zeros((steps, len(setting))), itertools.count(-1), client.training.train._draw

        class Watched(Features):
            def batch(self, rows):
                found[now[-1], rows] += 1
                return super().batch(rows)

        now = [next(step)]
        with monkeypatch.context() as patch:
            patch.setattr(client.training.train, "_draw", lambda *a: now.append(next(step)) or sampler(*a))
            watched = Watched([setting.features.batch([i])[0][0].numpy() for i in range(len(setting))])
            setting.train(policy, features=watched, module=head, randomness=SOURCES[source][0]())
        return found

    assert is_poisson(drawn(), rate)
    for sampler in (without_replacement, ShuffledPasses(), same_for_all_steps, one_coin_for_all):
        monkeypatch.setattr(client.training.train, "_draw", sampler)
        assert not is_poisson(drawn(), rate), sampler


# D6: record and play


def only_the_sum_moves(setting, policy, steps):
    """Whether a record more, under the same randomness, changes no draw, and the update by no more than the clip."""
    coins = (steps.Replay(seed).bernoulli(policy.sampling_rate, len(setting)) for seed in itertools.count())
    seed = next(seed for seed, drawn in enumerate(coins) if drawn[-1] and drawn.sum() > 2)  # one in which it enters
    fewer, more = steps.Replay(seed), steps.Replay(seed)
    one = setting.train(policy, rows=range(len(setting) - 1), randomness=fewer)
    other = setting.train(policy, randomness=more)
    if fewer.asked != more.asked or {n: a.shape for n, a in one.items()} != {n: a.shape for n, a in other.items()}:
        return False
    return setting.moved(policy, one, other) <= policy.clip_norm * (1 + 1e-3)


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_one_record_more_changes_the_sum_and_nothing_else(setting, steps, monkeypatch, rate):
    policy = setting.policy(clip_norm=0.1, sampling_rate=rate)
    assert only_the_sum_moves(setting, policy, steps)
    steps.use(monkeypatch, DividesByTheBatch)
    assert not only_the_sum_moves(setting, policy, steps)
    steps.use(monkeypatch, PolicyOptimizer)
    train = client.training.train.train_shared

    def from_data(make_change):
        def changed(module, start, features, targets, *, policy, **rest):
            return train(
                module, start, features, targets, policy=policy.model_copy(update=make_change(features)), **rest
            )

        monkeypatch.setattr(steps, "train_shared", changed)
        return only_the_sum_moves(setting, policy, steps)

    assert from_data(lambda _: {})
    assert not from_data(lambda features: {"sampling_rate": 2 / len(features)})
    assert not from_data(lambda features: {"steps": len(features)})
    assert not from_data(lambda features: {"denominator": float(len(features))})


# D7, D20: the constants at work


@pytest.mark.parametrize("records", [0, 1, 5])
def test_every_constant_at_work_is_the_policys_whatever_the_data(setting, steps, monkeypatch, records):
    policy = setting.policy(
        steps=3, sampling_rate=0.75, clip_norm=0.3, noise_multiplier=1.3, denominator=7.0, learning_rate=0.02
    )
    at_work, seen = [], steps.Sums(monkeypatch)

    class Spied(PolicyOptimizer):
        def step(self, closure=None):
            super().step()
            rates = [group["lr"] for group in self.param_groups]
            at_work.append((self.noise_multiplier, self.max_grad_norm, self.expected_batch_size, self._grid, *rates))

    class SpiedMutant(Spied, DividesByTheBatch):
        pass

    def right():
        at_work.clear()
        draws = steps.Replay()
        setting.train(policy, rows=range(records), randomness=draws)
        coins = [what for what in draws.asked if what[0] == "bernoulli"]
        constants = (1.3, 0.3, 7.0, 1.3 * 0.3 / GRID_SIGMA, 0.02)
        return at_work == [constants] * 3 and coins == [("bernoulli", 0.75)] * 3 and set(seen.clip_norms) <= {0.3}

    steps.use(monkeypatch, Spied)
    assert right()
    assert bool(seen.clip_norms) == bool(records)
    steps.use(monkeypatch, SpiedMutant)
    assert right() == (records == 0)


# D8: nothing is left over


def test_nothing_of_one_round_is_left_in_the_head_for_the_next(setting, steps, monkeypatch):
    policy = setting.policy(steps=2)

    def leaves_nothing():
        module = make_trainable(setting.fresh_head(), policy)
        setting.train(policy, rows=[0, 1], module=module)
        again = setting.train(policy, rows=[2, 3], module=module)
        fresh = setting.train(policy, rows=[2, 3])
        left = [getattr(p, name, None) for p in module.parameters() for name in ("grad", "grad_sample", "summed_grad")]
        return all(x is None for x in left) and all(np.array_equal(again[name], fresh[name]) for name in fresh)

    assert leaves_nothing()
    steps.use(monkeypatch, KeepsTheSum)
    assert not leaves_nothing()


def test_a_round_that_stopped_leaves_nothing_for_the_next(setting, steps):
    """Its clipped sum would be in the next release, beside that round's own: twice the sensitivity."""
    policy = setting.policy()
    module = make_trainable(setting.fresh_head(), policy)
    with pytest.raises(RefusedError, match="NOT_FINITE"):
        setting.train(setting.policy(learning_rate=1e39), module=module, randomness=steps.Replay())
    again, fresh = setting.train(policy, rows=[0], module=module), setting.train(policy, rows=[0])
    assert all(np.array_equal(again[name], fresh[name]) for name in fresh)


# D9: examples do not mix


def test_no_record_changes_the_gradient_of_another(setting, steps, monkeypatch, together):
    policy, seen, first = setting.policy(), steps.Sums(monkeypatch), 0
    arrays = [setting.features.batch([i])[0][0].numpy().copy() for i in range(len(setting))]
    arrays[3][0] = math.nan

    def of_the_first(rows, features):
        setting.train(policy, rows=rows, features=features)
        [order] = micro_batches(np.arange(len(rows)), features.lengths[rows], 1024)
        place = order.tolist().index(rows.index(first))
        return np.concatenate([x[place].flatten() for x in seen.per_sample[-1]])

    def unmoved():
        alone = of_the_first([first], setting.features)
        others = [of_the_first(rows, Features(arrays)) for rows in ([0, 1], [4, 2, 0], [0, 1, 2, 3, 4])]
        return all(np.linalg.norm(other - alone) <= 1e-5 * np.linalg.norm(alone) for other in others)

    assert unmoved()
    for head in (RatingHead, CausalHead):
        forward = head.forward

        def mixed(self, *batch, forward=forward):
            losses = forward(self, *batch)
            return losses * (1 + 0.1 * losses.detach().nan_to_num().mean())

        monkeypatch.setattr(head, "forward", mixed)
    assert not unmoved()


# D10: what trains is what is sent


def digest(module):
    """Hash over every tensor of a module that no federation method trains here, buffers included."""
    trainable = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict(keep_vars=True).items()):
        if name not in trainable:
            found.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize(("task", "method"), METHODS)
def test_what_trains_is_what_is_stepped_and_sent_and_nothing_else_moves(make, steps, monkeypatch, task, method):
    setting = make(task, method=method)
    policy, optimizers = setting.policy(steps=2), []

    class Spied(PolicyOptimizer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            optimizers.append(self)

    steps.use(monkeypatch, Spied)
    head = setting.fresh_head()
    [base] = head.base
    module = make_trainable(head, policy)
    before = digest(head), digest(base.model)
    update = setting.train(policy, module=module, randomness=steps.Replay())
    [optimizer] = optimizers
    trainable = {id(parameter) for parameter in head.parameters() if parameter.requires_grad}
    assert trainable == {id(parameter) for parameter in optimizer.params}
    assert len(optimizer.params) == len(trainable)  # none twice
    assert [name for name, _ in policy.slots] == list(update) == list(shared_parameters(head))
    assert all(abs(array).min() > 0 for array in update.values())
    assert (digest(head), digest(base.model)) == before
    steps.use(monkeypatch, type("Mutant", (MovesAFrozenTensor,), {"head": head}))
    setting.train(policy, module=module)
    assert digest(head) != before[0]


# D11, D13: what leaves is a function of noised integers


def test_other_records_with_the_same_noised_integers_give_the_same_bytes(setting, steps, monkeypatch):
    """Noise of the second run is such that sum + noise is as in the first: nothing else may tell the records apart."""
    policy = setting.policy(steps=3, clip_norm=0.05)

    class Filling(steps.Silent):
        def __init__(self, wanted, seen):
            self._wanted, self._seen, self._given = wanted, seen, 0

        def gaussian_integers(self, count):
            start, self._given = self._given, self._given + count
            return (self._wanted[: self._given] - in_turn(self._seen)[: self._given])[start:]

    def in_turn(seen):
        return np.concatenate([total.ravel() for step in seen.of_step for total in step])

    def same():
        first, draws = steps.Sums(monkeypatch), steps.Replay()
        one = setting.train(policy, randomness=draws)
        monkeypatch.undo()
        if mutant:
            steps.use(monkeypatch, mutant)
        second = steps.Sums(monkeypatch)
        wanted = in_turn(first) + np.concatenate(draws.noise)
        other = setting.train(policy, rows=[1, 3], randomness=Filling(wanted, second))
        monkeypatch.undo()
        assert any(not np.array_equal(a, b) for a, b in zip(first.of_step[0], second.of_step[0], strict=True))
        return all(one[name].tobytes() == other[name].tobytes() for name in one)

    for mutant in (None, StepsWithoutNoise, DividesByTheBatch):
        if mutant:
            steps.use(monkeypatch, mutant)
        assert same() == (mutant is None), mutant


def test_what_is_sent_is_the_noised_integer_in_every_bit(setting, steps, monkeypatch):
    """With powers of two for constants, float32 holds the integers: the update is them, rounded to 24 bits."""
    policy = setting.policy(clip_norm=0.5, noise_multiplier=2.0, learning_rate=0.5, denominator=8.0)
    scale = 2.0**-28
    start = {name: np.zeros_like(array) for name, array in setting.start.items()}

    def on_the_grid():
        seen, draws = steps.Sums(monkeypatch), steps.Replay()
        update = setting.train(policy, start=start, randomness=draws)
        total = np.concatenate([x.ravel() for x in seen.of_step[0]])
        assert abs(total).max() > 1e5
        wanted = -(total + np.concatenate(draws.noise)).astype(np.float32) * np.float32(scale)
        return np.array_equal(steps.flat(update), wanted.astype(np.float64))

    assert policy.grid * policy.learning_rate / policy.denominator == scale
    assert on_the_grid()
    steps.use(monkeypatch, LeavesTheGrid)
    assert not on_the_grid()
