"""What a run may say about users: every word of it, and that it fits what was released."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from shared.errors import PrivacyError
from shared.privacy.accounting import DistributedMechanism, Mechanism, epsilon
from shared.privacy.claims import claim_of, no_claim, record_claim, user_claim

CENTRAL = Mechanism(3.0, 1.0, 1, 20, coordinates=2000, grid_sigma=2**24)
SHARED = DistributedMechanism(3.0, 20, 2000, shares=70, share_sigma=2.0**16)
TERMS = SimpleNamespace(neighbours=30, threshold=21, min_survivors=80, colluders=10, groups=1)


def test_a_central_claim_says_whom_to_trust_and_what_is_hidden():
    claim = user_claim(CENTRAL, delta=1e-5, trust="central", noise="secure")
    assert claim.epsilon == epsilon(CENTRAL, delta=1e-5)
    said = claim.sentence()
    assert said.startswith("User-level (epsilon = ")
    assert "neighbours: one user's contribution to every round replaced by zero, the roster being public; " in said
    assert "trust: the server (noise is added there); " in said
    assert "sampling: none, every round that a device joins is priced; " in said
    assert "accountant: dp-accounting " in said
    assert said.endswith("at most 20; noise: integers from the operating system's cryptographic generator.")


def test_a_distributed_claim_says_on_what_numbers_its_trust_rests():
    claim = user_claim(SHARED, delta=1e-5, trust="distributed", secure_sum=TERMS)
    assert claim.epsilon == epsilon(SHARED, delta=1e-5) > epsilon(CENTRAL, delta=1e-5)
    said = claim.sentence()
    assert said.startswith("User-level (epsilon = ")
    assert (
        "trust: a server that follows the protocol, with fewer than t of a device's neighbours and at most c devices "
        "colluding with it; it enrols devices, so it must not enrol fakes (t = 21 of 30 neighbours; c = 10 of at least "
        "80 survivors, so that 70 shares of noise are unknown); "
    ) in said
    assert "accountant: zCDP of sums of discrete Gaussians, Kairouz et al. 2021" in said
    assert said.endswith("its seeds are in the run folder.")


@pytest.mark.parametrize(
    ("mechanism", "trust", "secure_sum"),
    [
        (CENTRAL, "distributed", TERMS),
        (CENTRAL, "central", TERMS),
        (CENTRAL, "local", None),
        (replace(CENTRAL, steps=2), "central", None),
        (replace(CENTRAL, sampling_rate=0.5), "central", None),
        (SHARED, "central", None),
        (SHARED, "distributed", None),
        (SHARED, "local", TERMS),
        (replace(SHARED, shares=80), "distributed", TERMS),  # the colluders' noise is not counted
    ],
)
def test_a_claim_that_does_not_fit_what_is_released_is_refused(mechanism, trust, secure_sum):
    with pytest.raises(PrivacyError, match="a claim for users must be of one whole sum a round"):
        user_claim(mechanism, delta=1e-5, trust=trust, secure_sum=secure_sum)


def test_a_claim_without_a_price_is_refused():
    with pytest.raises(PrivacyError, match="must have a finite epsilon"):
        user_claim(replace(SHARED, noise_multiplier=0.01), delta=1e-5, trust="distributed", secure_sum=TERMS)
    with pytest.raises(PrivacyError, match=r"privacy\.delta must be in \(0, 1\), got 0"):
        user_claim(CENTRAL, delta=0.0, trust="central")


def test_a_policys_claim_is_that_of_its_unit_and_trust():
    def policy(mechanism, **rest):
        usual = {"delta": 1e-5, "unit": "user", "trust": "central", "secure_sum": None, "max_participations": 20}
        return SimpleNamespace(mechanism=mechanism, **usual | rest)

    assert claim_of(policy(CENTRAL)) == user_claim(CENTRAL, delta=1e-5, trust="central")
    shared = {"trust": "distributed", "secure_sum": TERMS}
    assert claim_of(policy(SHARED, **shared), noise="secure") == user_claim(
        SHARED, delta=1e-5, noise="secure", **shared
    )
    record = {"trust": "local", "unit": "record"}
    assert claim_of(policy(CENTRAL, **record)) == record_claim(CENTRAL, delta=1e-5)
    assert claim_of(policy(None, delta=None, trust="none")) == no_claim(max_participations=20)
    with pytest.raises(PrivacyError, match="a secure sum must be claimed for users"):
        claim_of(policy(SHARED, **record))
