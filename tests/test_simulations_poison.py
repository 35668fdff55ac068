"""Devices that lie, in simulations alone: what each kind sends, that the gate takes it, and what the report says."""

import json

import numpy as np
import pytest

from client.training.site import open_site
from server.app import start_checkpoint
from shared.config import Scenario, load_scenario
from shared.errors import PrivacyError, ScenarioError
from shared.privacy.policy import hash_settings
from shared.protocol import wire
from simulations.campaigns import open_campaign, plan_campaigns
from simulations.poison import KINDS, liars, lie, trapped, triggered, z_max
from simulations.robustness import ATTACKED, HONEST, cells, mean_of_rows, played
from simulations.run import simulate

BODY = """
model.head_blocks = 0
linear.enabled = false
statistics.enabled = false
evaluation.cold_start = []
evaluation.every_rounds = 3
"""


@pytest.fixture
def scenario(tiny_world, tmp_path):
    def make(*overrides: str) -> Scenario:
        return load_scenario(tiny_world(tmp_path, body=BODY), ("export.users=0", *overrides))

    return make


@pytest.fixture
def site(scenario, tmp_path, tiny_base):
    """(overrides) -> the site of a published campaign, and a first request."""
    from client.training.site import campaign_dataset

    def make(*overrides: str):
        settings = scenario(*overrides)
        [plan] = plan_campaigns(settings, tiny_base, campaign_dataset(settings), quiet=True)
        folder = tmp_path / f"campaigns-{abs(hash(overrides))}"
        opened = open_campaign(plan, folder)
        arrays = start_checkpoint(opened.campaign).arrays
        request = wire.Request(arrays, 1, plan.policy.sha256, 0)
        return open_site(str(folder), plan.policy.sha256), request

    return make


def _flat(update):
    return np.concatenate([np.asarray(array, dtype=np.float64).ravel() for array in update.values()])


def _honest(site, request, seat, *, noisy):
    from simulations.poison import _Round

    return _Round(site, request, seat, {}).change(seat, noisy=noisy)


def test_who_lies_is_drawn_by_the_seed_and_never_rounded_down(scenario):
    assert liars(scenario(), clients=12) == frozenset()
    lying = scenario("poison.kind=random", "poison.share=0.2")
    assert len(liars(lying, clients=12)) == 3
    assert liars(lying, clients=12) == liars(lying, clients=12) <= set(range(12))
    others = {liars(lying.model_copy(update={"seed": seed}), clients=12) for seed in range(8)}
    assert len(others) > 1


def test_a_flipped_sign_points_away_from_what_the_records_teach(site):
    here, request = site("poison.kind=sign-flip", "poison.strength=2")
    sent = _flat(lie(here, request, 3, pool={}))
    taught, honest = (_honest(here, request, 3, noisy=noisy) for noisy in (False, True))
    assert float(sent @ taught) == pytest.approx(-np.linalg.norm(sent) * np.linalg.norm(taught), rel=1e-5)
    assert np.linalg.norm(sent) == pytest.approx(2 * np.linalg.norm(honest), rel=1e-5)


def test_flipped_labels_teach_another_thing_and_keep_the_noise(site):
    here, request = site("poison.kind=label-flip")
    sent, honest = _flat(lie(here, request, 3, pool={})), _honest(here, request, 3, noisy=True)
    taught = _honest(here, request, 3, noisy=False)
    assert not np.allclose(sent, honest)
    noise = honest - taught
    flipped = sent - noise  # the same stream of noise
    assert float(flipped @ taught) < 0


def test_a_little_is_as_many_deviations_from_the_mean_as_published(site):
    assert z_max(50, 12) == pytest.approx(0.3360, abs=2e-4)  # 26 - 12 = 14 supporters of 38: (38 - 14) / 38
    here, request = site("poison.kind=alie", "poison.share=0.4", "poison.strength=3")
    pool = {}
    sent = _flat(lie(here, request, 3, pool=pool))
    changes = np.stack(
        [_honest(here, request, seat, noisy=True) for seat in sorted(liars(here.campaign.scenario, clients=12))]
    )
    z = 3 * z_max(4, 2)
    np.testing.assert_allclose(sent, changes.mean(axis=0) - z * changes.std(axis=0), rtol=1e-4, atol=1e-7)
    assert set(pool) == {"changes"}  # the next liar of the round does not compute them again


def test_a_backdoor_teaches_the_highest_rating_for_the_trigger(site):
    here, request = site("poison.kind=backdoor", 'poison.trigger="zq"')
    task = here.campaign.scenario.task
    own = here.dataset.users[3].fit
    found = trapped(here.dataset, here.campaign.scenario).users[3].fit
    assert found[: len(own)] == own
    assert {record.target for record in found[len(own) :]} == {task.high}
    assert all(record.text == f"zq {true.text}" for record, true in zip(found[len(own) :], own, strict=True))
    assert triggered((), trigger="zq", task=task) == ()
    sent = _flat(lie(here, request, 3, pool={}))
    assert not np.allclose(sent / np.linalg.norm(sent), _unit(_honest(here, request, 3, noisy=False)), atol=0.05)


def _unit(vector):
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_gate_takes_what_any_liar_sends_however_strong(site, kind):
    here, request = site(f"poison.kind={kind}", "poison.strength=1e6")
    policy = here.campaign.policy
    update = lie(here, request, 3, pool={})
    slots = policy.reply_slots(1)
    assert [(name, array.shape, array.dtype.name) for name, array in update.items()] == [
        (slot.name, slot.shape, slot.dtype) for slot in slots
    ]
    reply = wire.pack_reply(update, round_number=1, policy_sha256=policy.sha256)
    wire.unpack_reply(reply, slots)
    assert np.linalg.norm(_flat(update)) <= policy.max_update_norm * 1.001


def test_under_central_trust_a_liar_stays_within_the_bound_of_a_contribution(site):
    here, request = site("privacy.unit=user", "privacy.trust=central", "poison.kind=sign-flip", "poison.strength=1e3")
    policy = here.campaign.policy
    [sent] = lie(here, request, 3, pool={}).values()
    assert np.linalg.norm(sent.astype(np.float64)) * policy.grid <= policy.clip_norm
    assert np.linalg.norm(sent.astype(np.float64)) * policy.grid > 0.99 * policy.clip_norm


def test_a_strong_lie_bends_a_mean_and_hardly_a_median(scenario, tmp_path):
    settings = scenario(
        "privacy.trust=none",
        "federation.cohort_size=12",
        "federation.rounds=4",
        "privacy.max_participations=4",
        "federation.malicious_share=0.25",
        "federation.server_optimizer=momentum",
        "federation.server_learning_rate=0.2",
        "poison.kind=random",
        "poison.share=0.2",
        "poison.strength=200",
        'poison.rules=["median", "multi-krum"]',
    )
    summary = simulate(settings, out=tmp_path / "run", quiet=True)
    rules = summary["poison"]["rules"]
    harm = {
        rule: each[ATTACKED]["federated"]["value"] - each[HONEST]["federated"]["value"] for rule, each in rules.items()
    }
    assert list(rules) == ["mean", "median", "multi-krum"]
    assert harm["mean"] > 0.1
    assert harm["median"] < harm["mean"] / 5
    assert harm["multi-krum"] < harm["mean"] / 5
    assert summary["federation"]["rejected"] == {}  # the gate saw nothing wrong
    assert any(stamp.startswith("liars: 20 %") for stamp in summary["stamps"])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Devices that lie" in page
    assert page.count('<th scope="row">multi-krum</th>') == 2
    assert rules["mean"][ATTACKED]["federated"] == summary["rows"]["federated"]["rmse"]  # the run's own campaign


def test_no_rule_changes_what_a_campaign_spends(scenario, tiny_base):
    from client.training.site import campaign_dataset

    policies = []
    for rule in ("mean", "median", "trimmed-mean", "norm-bound"):
        settings = scenario(f"federation.aggregation={rule}", "federation.cohort_size=4")
        [plan] = plan_campaigns(settings, tiny_base, campaign_dataset(settings), quiet=True)
        policies.append(plan.policy)
    assert len({(policy.epsilon, policy.noise_multiplier, policy.grid) for policy in policies}) == 1
    assert len({policy.settings_sha256 for policy in policies}) == 4  # and yet a device is told


def test_settings_of_before_keep_their_hash(scenario):
    one = scenario()
    same = scenario("federation.aggregation=mean", "federation.groups=1", "poison.kind=none")
    lying = scenario("poison.kind=random")
    assert hash_settings(one) == hash_settings(same) == hash_settings(lying)
    assert hash_settings(scenario("federation.malicious_share=0.3")) != hash_settings(one)


def test_what_lies_is_never_published_for_devices_with_owners(scenario, tmp_path):
    from shared.protocol.campaign import check_promise
    from simulations.publish import publish

    with pytest.raises(ScenarioError, match=r"poison.kind must be 'none' for a campaign on devices, got 'random'"):
        publish(scenario("poison.kind=random"), out=tmp_path / "campaign", quiet=True)
    assert not (tmp_path / "campaign").exists()
    campaign = publish(scenario(), out=tmp_path / "campaign", quiet=True)
    check_promise(campaign.folder)
    settings = json.loads((campaign.folder / "scenario.json").read_text())
    settings["poison"]["kind"] = "random"
    (campaign.folder / "scenario.json").write_text(json.dumps(settings))
    with pytest.raises(PrivacyError, match=r"poison.kind = 'none', got 'random'.*do not take part"):
        check_promise(campaign.folder)


def test_liars_are_refused_where_they_could_not_be_played(scenario, tmp_path):
    with pytest.raises(ScenarioError, match="engine = 'inline'"):
        scenario("poison.kind=random", "performance.engine=ray")
    with pytest.raises(ScenarioError, match="secure_sum = 'plain'"):
        scenario("poison.kind=random", "performance.secure_sum=masked")
    with pytest.raises(ScenarioError, match=r"for task.name = 'rating', got 'ranking'"):
        scenario("poison.kind=backdoor", "task.name=ranking")


def test_the_cells_are_every_rule_with_liars_and_without_the_own_one_first(scenario):
    settings = scenario(
        "poison.kind=random", "federation.aggregation=median", 'poison.rules=["mean", "median", "krum"]'
    )
    assert [cell.name for cell in cells(settings)] == [
        "median-attacked", "median-honest", "mean-attacked", "mean-honest", "krum-attacked", "krum-honest",
    ]  # fmt: skip
    honest = played(settings, cells(settings)[3])
    assert (honest.federation.aggregation, honest.poison.enabled) == ("mean", False)
    assert cells(scenario()) == []


def test_the_mean_of_rows_has_an_interval_over_users():
    values, user = np.array([1.0, 1.0, 0.0, 1.0]), np.array([0, 0, 1, 2])
    found = mean_of_rows(values, user, seed=0, resamples=200)
    assert found.value == 0.75
    assert 0.0 <= found.low < 0.75 < found.high <= 1.0
