"""Groups under the secure sum: each sum carries the whole noise, a spoilt one does not spoil the round."""

import math

import numpy as np
import pytest

from client.app import app as client_app
from client.training.site import campaign_dataset
from server.app import run_rounds, start_checkpoint
from server.strategy import EqualWeights
from shared.config import PrivacyConfig, load_scenario
from shared.errors import PrivacyError, VoidRoundError
from shared.flower.grid import run_inline, seats
from shared.privacy.accounting import epsilon
from shared.privacy.calibration import share_noise
from shared.privacy.claims import claim_of
from shared.privacy.policy import SUM, SecureSum, grid_of, hash_settings, read_policy
from shared.privacy.promise import check_price
from shared.protocol import wire
from shared.protocol.campaign import Campaign
from simulations.campaigns import _no_credentials as no_credentials
from simulations.campaigns import open_campaign, plan_campaigns
from simulations.run import simulate

BODY = """
model.head_blocks = 0
linear.enabled = false
statistics.enabled = false
evaluation.cold_start = []
evaluation.every_rounds = 2
privacy.unit = "user"
privacy.trust = "distributed"
privacy.epsilon = 30.0
privacy.colluders = 0.0
"""
GROUPED = (
    "export.users=0",
    "federation.rounds=2",
    "federation.cohort_size=12",
    "privacy.max_participations=2",
    "federation.groups=4",
    "federation.aggregation=median",
    "federation.malicious_share=0.08",
)


@pytest.fixture
def scenario(tiny_world, tmp_path):
    return lambda *overrides: load_scenario(tiny_world(tmp_path, body=BODY), (*GROUPED, *overrides))


@pytest.fixture
def policy(scenario, tiny_base):
    def make(*overrides):
        settings = scenario(*overrides)
        [plan] = plan_campaigns(settings, tiny_base, campaign_dataset(settings), quiet=True)
        return plan.policy

    return make


def test_every_sum_of_a_group_carries_the_whole_noise(policy):
    grouped = policy()
    whole = policy("federation.groups=1", "federation.aggregation=mean")
    terms = grouped.secure_sum
    assert (grouped.sum_size, whole.sum_size) == (3, 12)
    assert (terms.groups, terms.min_survivors, terms.honest) == (4, 3, 3)  # of three devices, not of twelve
    check_price(grouped)
    assert epsilon(grouped.mechanism, delta=grouped.delta) <= 30.0
    assert grouped.mechanism.shares == 3
    # What the smallest sum that is opened holds, in units of the contribution, is what is priced.
    of_one_sum = math.sqrt(terms.honest) * 2.0**terms.share_log2_sigma * grouped.grid
    assert of_one_sum == pytest.approx(grouped.noise_multiplier * grouped.clip_norm, rel=1e-9)
    # The price: at the same epsilon the mean of all sums holds the square root of the groups as much noise.
    in_mean = [each.noise_multiplier * math.sqrt(each.secure_sum.groups) for each in (grouped, whole)]
    assert in_mean[0] / in_mean[1] == pytest.approx(2.0, rel=0.02)
    assert "4 sums a round, each carrying the whole noise" in claim_of(grouped).sentence()
    assert "sums a round" not in claim_of(whole).sentence()


def test_a_device_refuses_groups_that_share_the_noise_of_one_sum(policy):
    whole = policy("federation.groups=1", "federation.aggregation=mean")
    shared_out = whole.model_copy(update={"secure_sum": whole.secure_sum.model_copy(update={"groups": 4})})
    with pytest.raises(PrivacyError, match="must hide what they promise to"):
        check_price(shared_out)
    # The terms of a group, with a share of the noise that is enough for the whole cohort alone.
    terms = policy().secure_sum
    thin = whole.model_copy(update={"secure_sum": terms, "noise_multiplier": whole.noise_multiplier / 2})
    with pytest.raises(PrivacyError, match="they give"):
        check_price(thin.model_copy(update={"grid": grid_of(thin)}))


def test_a_device_refuses_groups_of_unequal_size(policy):
    grouped = policy()
    with pytest.raises(PrivacyError, match="12 devices do not into 5"):
        check_price(grouped.model_copy(update={"secure_sum": grouped.secure_sum.model_copy(update={"groups": 5})}))
    hostile = grouped.model_dump_json().replace('"groups":4', '"groups":0')
    with pytest.raises(Exception, match="must be readable"):
        read_policy(hostile)


def test_colluders_of_a_group_are_bounded_for_all_groups_of_all_rounds():
    from scipy.stats import hypergeom

    privacy = PrivacyConfig(unit="user", trust="distributed", survivors=0.9, colluders=0.02)
    _, terms = share_noise(privacy, cohort_size=240, size=385, groups=12, rounds=8)
    assert (terms.min_survivors, terms.colluders) == (18, 4)  # all four of the cohort may meet in one group
    _, many = share_noise(
        privacy.model_copy(update={"colluders": 0.05}), cohort_size=940, size=385, groups=10, rounds=16
    )
    assert 47 > many.colluders > 47 / 10  # not all of the cohort's, and more than an equal share
    assert (
        160 * hypergeom.sf(many.colluders, 940, 47, 94)
        < 2.0**-40
        <= 160 * hypergeom.sf(many.colluders - 1, 940, 47, 94)
    )


def test_one_sum_is_spelled_and_hashed_as_before_there_were_groups(policy):
    whole = policy("federation.groups=1", "federation.aggregation=mean")
    assert "groups" not in whole.model_dump(mode="json")["secure_sum"]
    assert policy().model_dump(mode="json")["secure_sum"]["groups"] == 4
    assert read_policy(whole.model_dump_json()) == whole
    assert read_policy(policy().model_dump_json()) == policy()
    assert SecureSum(neighbours=2, threshold=2, min_survivors=3, colluders=0, share_log2_sigma=4).groups == 1


def test_masks_change_no_bit_of_what_groups_give(scenario, tmp_path):
    found = [
        simulate(scenario(f"performance.secure_sum={masks}"), out=tmp_path / masks, quiet=True)["rows"]["federated"]
        for masks in ("plain", "masked")
    ]
    assert found[0] == found[1]
    assert hash_settings(scenario()) == hash_settings(scenario("performance.secure_sum=masked"))


def _strategy(scenario, tiny_base, folder, *overrides):
    settings = scenario(*overrides)
    [plan] = plan_campaigns(settings, tiny_base, campaign_dataset(settings), quiet=True)
    campaign = Campaign(folder, settings, plan.policy, plan.start)
    strategy = EqualWeights(
        campaign, start_checkpoint(campaign), roster={node: node for node in range(12)}, noise=lambda _: None
    )
    strategy._cohort = {node: node for node in range(12)}
    strategy._group = strategy._draw_groups(1)
    return strategy


def _contributions(strategy, value=1):
    size = strategy.campaign.policy.size
    return {seat: {SUM: np.full(size, value, dtype=np.uint32)} for seat in range(12)}


def test_every_device_is_in_one_group_and_groups_are_equal_and_new_every_round(scenario, tiny_base, tmp_path):
    strategy = _strategy(scenario, tiny_base, tmp_path)
    drawn = [tuple(sorted(strategy._draw_groups(number).items())) for number in range(1, 5)]
    for groups in drawn:
        assert sorted(np.bincount([group for _, group in groups]).tolist()) == [3, 3, 3, 3]
    assert len(set(drawn)) > 1
    strategy._simulated = False  # a deployment draws from the system's entropy
    assert len({tuple(sorted(strategy._draw_groups(1).items())) for _ in range(8)}) > 1


def test_one_liar_spoils_its_own_sum_and_not_the_round(scenario, tiny_base, tmp_path):
    strategy = _strategy(scenario, tiny_base, tmp_path)
    honest = strategy._mean(1, _contributions(strategy))
    updates = _contributions(strategy)
    updates[5] = {SUM: np.full(strategy.campaign.policy.size, 2**31 - 5, dtype=np.uint32)}
    found = strategy._mean(1, updates)
    for name, array in found.items():
        np.testing.assert_array_equal(array, honest[name])
        np.testing.assert_allclose(array, strategy.campaign.policy.grid, rtol=1e-12)
    plain = _strategy(scenario, tiny_base, tmp_path, "federation.groups=1", "federation.aggregation=mean")
    spoilt = plain._mean(1, updates)
    assert all(np.abs(array).min() > 1e6 * plain.campaign.policy.grid for array in spoilt.values())


def test_a_group_with_too_few_contributions_is_left_out_and_too_few_groups_void_the_round(
    scenario, tiny_base, tmp_path
):
    strategy = _strategy(scenario, tiny_base, tmp_path)
    updates = _contributions(strategy)
    first = [seat for seat, group in strategy._group.items() if group == 0]
    del updates[first[0]]
    whole = strategy._in_whole_groups(updates)
    assert set(whole) == set(range(12)) - set(first)
    assert (strategy.accepted, strategy.rejected["GROUP"]) == (9, 1)
    found = strategy._mean(1, whole)
    for array in found.values():
        np.testing.assert_allclose(array, strategy.campaign.policy.grid * 3 / 4, rtol=1e-12)
    two = [seat for seat, group in strategy._group.items() if group in (0, 1)]
    with pytest.raises(VoidRoundError, match="needs 3 vectors"):  # one liar is to be withstood
        strategy._mean(1, {seat: each for seat, each in _contributions(strategy).items() if seat in two})


class Silent:
    """A grid on which a seat does not answer one kind of message."""

    def __init__(self, grid, roster, seat, kind):
        self._grid, self._kind = grid, kind
        [self._node] = [node for node, known in roster.items() if known == seat]
        self.asked = []  # (kind, seat)
        self._roster = roster

    def __getattr__(self, name):
        return getattr(self._grid, name)

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        self.asked += [(each.metadata.message_type, self._roster[each.metadata.dst_node_id]) for each in messages]
        for reply in self._grid.send_and_receive(messages, timeout=timeout):
            kind = reply.metadata.message_type
            if (kind, reply.metadata.src_node_id) != (self._kind, self._node):
                yield reply


def _round_without(scenario, tiny_base, folder, *, masks, kind):
    """One round in which seat 5 falls silent; the shared arrays after it, and who was asked what."""
    settings = scenario(f"performance.secure_sum={masks}", "federation.rounds=1")
    dataset = campaign_dataset(settings)
    [plan] = plan_campaigns(settings, tiny_base, dataset, quiet=True)
    opened, found = open_campaign(plan, folder), []

    def main(devices):
        roster = seats(devices, devices=12)
        grid = Silent(devices, roster, 5, kind)
        credentials = no_credentials(settings, roster)
        last = run_rounds(grid, opened.campaign, roster=roster, credentials=credentials, noise=lambda _: None)
        found.extend([last.arrays, grid.asked])

    run_inline(main, client_app, devices=12, run_config={"campaigns": str(folder)})
    return found


@pytest.mark.fault("R21")
@pytest.mark.parametrize("kind", [wire.SECURE_KEYS, wire.SECURE_SHARES, "train"])
def test_a_group_that_loses_a_device_under_masks_is_given_up_and_the_others_go_on(scenario, tiny_base, tmp_path, kind):
    """The arrays are those of the same round without masks, in which that group's sum is left out as well."""
    expected, _ = _round_without(scenario, tiny_base, tmp_path / "plain", masks="plain", kind="train")
    found, asked = _round_without(scenario, tiny_base, tmp_path / "masked", masks="masked", kind=kind)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    unmasked = {seat for kind, seat in asked if kind == wire.SECURE_UNMASK}
    assert len(unmasked) == 9  # three groups of four; nobody of the fourth opens anything
    assert 5 not in unmasked
