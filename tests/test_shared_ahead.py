"""What of a head is frozen may be run once: every step then gives what it gave, and reads nothing below the cut."""

import numpy as np
import pytest
import torch

import shared.models.ahead
from client.training.train import make_trainable
from shared.errors import ScenarioError
from shared.models.features import Features

LONG = "a long text about boats and hills and songs and cake and dogs and trains"


@pytest.fixture
def rating(steps, tiny_base, tiny_texts):
    return lambda **more: steps.rating(tiny_base, [*tiny_texts[:9], LONG], **more)


@pytest.mark.parametrize("method", ["ffa-lora", "fedavg", "rolora"])
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize(("unit", "trust"), [("record", "local"), ("record", "none")])
def test_a_step_gives_what_it_gave(steps, rating, method, blocks, unit, trust):
    setting = rating(method=method, blocks=blocks)
    policy = setting.policy(unit=unit, trust=trust, steps=2, clip_norm=0.2, federation_method=method)
    ahead = setting.fresh_head().run_ahead(setting.features)
    found, wanted = (
        steps.flat(setting.train(policy, features=each, module=make_trainable(setting.fresh_head(), policy)))
        for each in (ahead, setting.features)
    )
    assert ahead is not setting.features
    assert np.linalg.norm(wanted) > 0.01
    assert np.linalg.norm(found - wanted) <= 1e-5 * np.linalg.norm(wanted)


def test_gradients_are_those_of_plain_autograd(steps, rating):
    setting = rating(method="fedavg")
    ahead = setting.fresh_head().run_ahead(setting.features)
    for row in range(len(setting)):
        wanted = setting.gradients(row)
        whole, setting.features = setting.features, ahead
        found = setting.gradients(row)
        setting.features = whole
        assert max(np.abs(each).max() for each in wanted) > 1e-3
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5 * max(1.0, np.abs(other).max()))


def test_the_frozen_start_is_not_run_again(rating, monkeypatch):
    setting = rating()
    head = setting.fresh_head()
    ahead = head.run_ahead(setting.features)
    assert ahead.lengths.tolist() == setting.features.lengths.tolist()
    assert ahead.batch([0])[0].shape[2] == setting.features.batch([0])[0].shape[2] + 2  # rank 2 of a frozen A
    policy = setting.policy()
    module = make_trainable(head, policy)
    for part in (head.blocks[0].attention, head.blocks[0].intermediate, head.blocks[0].output.dense):
        monkeypatch.setattr(part, "forward", lambda *_, **__: pytest.fail("it was run again"))
    setting.train(policy, features=ahead, module=module)


@pytest.mark.parametrize(
    "more",
    [
        {"targets": ("attention.self.query", "output.dense")},  # trained below the last product
        {"targets": ("intermediate.dense",)},
        {"prompt_tokens": 2},  # what the block gives depends on soft tokens
    ],
)
def test_nothing_is_run_ahead_where_training_reaches_lower(rating, more):
    setting = rating(**more)
    assert setting.head.run_ahead(setting.features) is setting.features


def test_a_family_that_cannot_be_stopped_is_left_alone(steps, tiny_causal):
    setting = steps.language(tiny_causal)
    assert setting.head.run_ahead(setting.features) is setting.features


def test_a_linear_head_prepares(rating):
    setting = rating(blocks=0)
    head = setting.fresh_head()
    again = head.run_ahead(Features([np.ones((1, 32), dtype=np.float32)]))
    wanted = head.prepare(Features([np.ones((1, 32), dtype=np.float32)]))
    assert torch.equal(again.batch([0])[0], wanted.batch([0])[0])


def test_a_layer_that_is_more_than_lora_is_left_alone(rating):
    setting = rating()
    head = setting.fresh_head()
    head.blocks[0].output.dense.lora_dropout["default"] = torch.nn.Dropout(0.1)
    assert head.run_ahead(setting.features) is setting.features


def test_it_is_left_where_it_would_not_fit(rating, monkeypatch):
    setting = rating()
    monkeypatch.setattr(shared.models.ahead, "_MOST_BYTES", 4 * 34 * int(setting.features.lengths.sum()) - 1)
    assert setting.head.run_ahead(setting.features) is setting.features
    monkeypatch.setattr(shared.models.ahead, "_MOST_BYTES", 4 * 34 * int(setting.features.lengths.sum()))
    assert setting.head.run_ahead(setting.features) is not setting.features


def test_what_another_head_prepared_is_refused(rating):
    narrow, wide = rating(rank=2), rating(rank=3)
    hidden, mask = narrow.head.run_ahead(narrow.features).batch([0])
    with pytest.raises(ScenarioError, match="must be 32 or 35 wide, got 34"):
        wide.head.predict(hidden, mask)


def test_padding_beside_a_text_changes_nothing(rating):
    setting = rating()
    ahead = setting.head.run_ahead(setting.features)
    rows = range(len(setting))
    together = setting.head.predict(*ahead.batch(rows)).detach().numpy()
    alone = np.concatenate([setting.head.predict(*ahead.batch([row])).detach().numpy() for row in rows])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.ptp(alone) > 0.01
