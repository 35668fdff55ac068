"""Rule P1: exactly the allowed combinations pass, and what the others would do to the clipped sum."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from client.personal.personalize import PERSONAL_METHODS, fit_ridge
from client.training.train import make_trainable
from shared.config import PERSONAL_NAMES, PersonalConfig
from shared.errors import PrivacyError, ScenarioError
from shared.heads.adapter import load_shared
from shared.heads.lora import FEDERATION_METHODS, TECHNIQUES
from shared.heads.output import pooled_features
from shared.heads.rating import RatingHead
from shared.privacy.compatible import Choices, check_compatible
from shared.registry import names

UNITS = ("record", "user")
TRUSTS = ("local", "none", "central", "distributed")

OUTSIDE = """
from client.personal.personalize import PersonalMethod, fit_none
from shared.heads.lora import FederationMethod, inject_lora
output_only = FederationMethod(("output",), "of a test")
apart = PersonalMethod(fit_none, read_by_shared_step=False, summary="fitted afterwards")
joint = PersonalMethod(fit_none, read_by_shared_step=True, summary="in the forward pass of the shared step")
silent = PersonalMethod(fit_none, read_by_shared_step=None, summary="does not say")
undeclared = fit_none
"""
ENTRIES = {
    "federation_methods": {"output-only": "output_only"},
    "personal_methods": {name: name for name in ("apart", "joint", "silent", "undeclared")},
    "techniques": {"other": "inject_lora"},
}


def test_exactly_the_allowed_combinations_pass_and_others_are_told_what_is(install_package):
    """Every registered method, personal method, technique, unit and trust, with those of a package among them."""
    install_package("ext", OUTSIDE, ENTRIES)
    personals = names("personal_methods", PERSONAL_METHODS)
    assert {"none", "fine-tune", "apart", "joint", "silent", "undeclared"} <= set(personals)
    kinds = (
        names("federation_methods", FEDERATION_METHODS),
        personals,
        names("techniques", TECHNIQUES),
        UNITS,
        TRUSTS,
    )
    passed, refused = set(), {}
    for combination in itertools.product(*kinds):
        try:
            check_compatible(Choices(*combination))
            passed.add(combination)
        except PrivacyError as error:
            refused[combination] = str(error)
    everything = itertools.product(*kinds)
    unread = (*PERSONAL_NAMES, "apart")
    assert passed == {
        (federation, personal, technique, unit, trust)
        for federation, personal, technique, unit, trust in everything
        if trust == "none"
        or (unit == "record" and trust == "local" and personal in unread)
        or (unit == "user" and trust in ("central", "distributed"))  # the whole change is clipped, whatever it read
    }
    for (_, personal, _, unit, trust), says in refused.items():
        if (unit, trust) == ("record", "local"):
            assert repr(personal) in says
            assert f"allowed personal methods here: {list(PERSONAL_NAMES)}" in says
            assert "read_by_shared_step = False" in says
        else:
            assert "allowed: unit 'record' under trust 'local', unit 'user' under trust 'distributed'" in says
    assert {personal for _, personal, *rest in refused if rest[1:] == ["record", "local"]} == {
        "joint",
        "silent",
        "undeclared",
    }


@pytest.mark.parametrize("field", ["federation_method", "personal_method", "technique"])
@pytest.mark.parametrize("trust", ["local", "none"])
def test_what_nobody_registers_never_passes(field, trust):
    known = Choices("ffa-lora", "none", "lora", "record", trust)
    check_compatible(known)
    with pytest.raises(ScenarioError, match=r"must be .*'nowhere'"):
        check_compatible(Choices(**(vars(known) | {field: "nowhere"})))


class JointHead(RatingHead):
    """What rule P1 forbids: a private output, fitted without noise on the same records, in the shared forward pass."""

    def __init__(self, base, scenario):
        super().__init__(base, scenario)
        self.private = nn.Parameter(torch.zeros(base.hidden_size), requires_grad=False)
        self.level = nn.Parameter(torch.zeros(1), requires_grad=False)

    def predict(self, hidden, mask):
        return super().predict(hidden, mask) + self.features(hidden, mask) @ self.private + self.level


def joint_head(setting, rows):
    """A head with the private part of some records: fitted on the shared start as ``fine-tune`` does, by default."""
    plain = setting.fresh_head()
    load_shared(plain, setting.start)
    features = setting.features.select(rows)
    hidden, mask = features.batch(range(len(rows)))
    with torch.no_grad():
        residuals = np.array([setting.targets[row] for row in rows]) - plain.predict(hidden, mask).numpy()
    pooled = pooled_features(plain, features)
    fitted = fit_ridge(pooled, residuals, mean=plain.mean.detach().numpy(), personal=PersonalConfig())
    joint = JointHead(plain.base[0], setting.scenario)
    joint.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        joint.private.copy_(torch.from_numpy(fitted.weight))
        joint.level.fill_(fitted.bias)
    return joint


def test_a_noiseless_private_part_in_the_shared_step_moves_the_sum_by_three_times_the_clip_norm(
    steps, tiny_base, tiny_texts
):
    """One record more refits the private part, which turns the gradients of all the others; ours turns nothing."""
    setting = steps.rating(tiny_base, tiny_texts, method="fedavg")
    policy = setting.policy(clip_norm=0.01)
    everybody = range(len(setting))
    fewer = [row for row in everybody if row != 8]

    def moved(head_of):
        one, other = (
            setting.train(policy, rows=rows, module=make_trainable(head_of(rows), policy))
            for rows in (fewer, everybody)
        )
        return setting.moved(policy, one, other) / policy.clip_norm

    assert moved(lambda rows: joint_head(setting, rows)) > 2.5
    assert moved(lambda _: joint_head(setting, fewer)) <= 1 + 1e-4  # one that does not read the record is harmless
    assert 0.9 <= moved(lambda _: setting.fresh_head()) <= 1 + 1e-4
