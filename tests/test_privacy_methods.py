"""Rule P1: exactly the allowed combinations pass, and what the others would do to the clipped sum."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from client.personalize import PERSONAL_METHODS, fit_ridge
from client.train import make_trainable
from shared.adapter import load_shared
from shared.config import PersonalConfig
from shared.errors import PrivacyError, ScenarioError
from shared.head import RatingHead, pooled_features
from shared.lora import FEDERATION_METHODS, TECHNIQUES
from shared.policy import SEQUENTIAL, Choices, check_compatible
from shared.registry import names

UNITS = ("record", "user")
TRUSTS = ("local", "none", "central", "distributed")

OUTSIDE = """
from client.personalize import PersonalMethod, fit_none
from shared.lora import FederationMethod, inject_lora
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
    personal = names("personal_methods", PERSONAL_METHODS)
    assert {"none", "fine-tune", "apart", "joint", "silent", "undeclared"} <= set(personal)
    kinds = (
        names("federation_methods", FEDERATION_METHODS),
        personal,
        names("techniques", TECHNIQUES),
        UNITS,
        TRUSTS,
    )
    passed = set()
    for combination in itertools.product(*kinds):
        chosen = Choices(*combination)
        if chosen.trust == "none":
            check_compatible(chosen)
            continue
        try:
            check_compatible(chosen)
            passed.add(combination)
        except PrivacyError as error:
            if (chosen.unit, chosen.trust) == ("record", "local"):
                assert repr(chosen.personal_method) in str(error)
                assert f"allowed personal methods here: {list(SEQUENTIAL)}" in str(error)
                assert "read_by_shared_step = False" in str(error)
            else:
                assert "allowed: unit 'record' under trust 'local'" in str(error)
    federations, _, techniques, _, _ = kinds
    unread = (*SEQUENTIAL, "apart")
    assert passed == set(itertools.product(federations, unread, techniques, ["record"], ["local"]))
    assert len(passed) >= 18


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


@pytest.fixture(scope="module")
def setting(steps, tiny_base, tiny_texts):
    return steps.rating(tiny_base, tiny_texts[:12])


def joint_head(setting, base, rows):
    """A head with the private part these records give it; fitted as ``fine-tune`` fits, on the shared start."""
    plain = setting.fresh_head()
    load_shared(plain, setting.start)
    features = setting.features.select(rows)
    pooled = pooled_features(plain, features)
    hidden, mask = features.batch(range(len(rows)))
    with torch.no_grad():
        residuals = np.array([setting.targets[row] for row in rows]) - plain.predict(hidden, mask).numpy()
    fitted = fit_ridge(pooled, residuals, mean=plain.mean.detach().numpy(), personal=PersonalConfig())
    joint = setting.joint(base)
    with torch.no_grad():
        joint.private.copy_(torch.from_numpy(fitted.weight))
        joint.level.fill_(fitted.bias)
    return joint
