"""User-level privacy at the composed step: what a device gives, what a server sees, what noise the arrays carry."""

import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
from flwr.app import ConfigRecord

import client.app
import client.training.contribution
from client.home.home import open_home
from client.owner.device_key import make_device_key
from client.training.contribution import contribute
from client.training.device import OwnedDevice
from server.aggregate import mean_of_sum, noised_sum
from server.app import run_rounds, start_checkpoint
from server.checkpoint import load_checkpoint, newest_first
from server.strategy import EqualWeights
from shared.config import load_scenario
from shared.errors import PrivacyError, TooFewRepliesError, VoidRoundError
from shared.privacy.noise import SecureRandomness
from shared.privacy.policy import SUM, SecureSum, grid_of
from shared.privacy.promise import check_price
from shared.protocol import wire
from shared.protocol.enrolment import certify_device
from shared.protocol.signing import load_private
from shared.secure_sum.graph import make_terms
from shared.secure_sum.messages import Credential, Parcels, Roster
from simulations.run import simulate

USER = ('privacy.unit="user"', "training.record_exponent=0.5", "federation.rounds=2", "privacy.max_participations=2")
CENTRAL = (*USER, 'privacy.trust="central"')
DISTRIBUTED = (*USER, 'privacy.trust="distributed"', "privacy.survivors=0.8", "privacy.colluders=0.0")


class Quiet:
    """No noise at all."""

    def bernoulli(self, probability, count):
        raise AssertionError("nothing is drawn at user level")

    def gaussian_integers(self, count, *, log2_sigma=24):
        return np.zeros(count, dtype=np.int64)


@pytest.fixture(scope="module")
def central(homes, tiny_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("central")
    return homes.publish(tiny_world(folder), folder, overrides=(*CENTRAL, 'federation.cohort_size="all"'))


@pytest.fixture(scope="module")
def distributed(homes, tiny_world, tmp_path_factory):
    """A signed campaign of five devices a round, four of which must stay."""
    folder = tmp_path_factory.mktemp("distributed")
    return homes.publish(tiny_world(folder), folder, overrides=(*DISTRIBUTED, "federation.cohort_size=5"))


def change_of(policy, rng, *, length):
    flat = rng.normal(size=policy.size)
    flat *= length / np.linalg.norm(flat)
    parts = np.split(flat, np.cumsum([math.prod(shape) for _, shape in policy.slots])[:-1])
    pairs = zip(policy.slots, parts, strict=True)
    return {name: part.reshape(shape).astype(np.float32) for (name, shape), part in pairs}


# One device's contribution


@pytest.mark.parametrize("trust", ["central", "distributed"])
@pytest.mark.parametrize("length", [0.0, 1e-6, 0.3, 0.7, 0.7000001, 5.0, 1e6, 1e30, np.nan, np.inf])
def test_without_noise_a_contribution_is_at_most_the_clip_norm_long(central, distributed, trust, length):
    policy = {"central": central, "distributed": distributed}[trust].campaign.policy
    change = change_of(policy, np.random.default_rng(0), length=1.0)
    change = {name: array * np.float32(length) for name, array in change.items()}
    whole = contribute(change, policy=policy, randomness=Quiet())
    assert whole.dtype == np.int64
    norm = math.sqrt(sum(int(v) ** 2 for v in whole)) * policy.grid
    assert norm <= policy.clip_norm
    if not np.isfinite(length):
        assert not whole.any()
    elif length >= policy.clip_norm:
        assert norm == pytest.approx(policy.clip_norm, rel=1e-3)
    else:
        flat = np.concatenate([array.ravel() for array in change.values()])
        assert np.abs(whole * policy.grid - flat).max() <= policy.grid


def test_a_contribution_that_would_be_too_long_is_not_given(central, monkeypatch):
    policy = central.campaign.policy
    real = client.training.contribution.clipped_sum
    monkeypatch.setattr(
        client.training.contribution,
        "clipped_sum",
        lambda rows, *, clip_norm, grid: real(rows, clip_norm=2 * clip_norm, grid=grid),
    )
    with pytest.raises(PrivacyError, match="must be at most"):
        contribute(change_of(policy, np.random.default_rng(0), length=5.0), policy=policy, randomness=Quiet())


# The noise of a sum, at the composed step


def spread(policy, sums):
    """Standard deviations of a release's noise in units of what the policy promises: one number a coordinate drawn."""
    return np.concatenate(sums) * policy.grid / (policy.noise_multiplier * policy.clip_norm)


def has_spread_one(values):
    """Chi-squared at 1e-9; with 40,000 numbers a spread 4 % off has no chance."""
    statistic = float(np.sum(values**2))
    return 1e-9 < scipy.stats.chi2.cdf(statistic, len(values)) < 1 - 1e-9


def test_the_noise_of_central_is_that_of_the_policy(central):
    policy = central.campaign.policy
    rng = np.random.default_rng(1)
    changes = [change_of(policy, rng, length=0.5) for _ in range(3)]
    quiet = [contribute(change, policy=policy, randomness=Quiet()) for change in changes]
    assert all(np.array_equal(q, contribute(c, policy=policy, randomness=SecureRandomness()))
               for q, c in zip(quiet, changes, strict=True))  # fmt: skip
    rounds = -(-40_000 // policy.size)
    noises = [noised_sum(quiet, randomness=SecureRandomness()) - sum(quiet) for _ in range(rounds)]
    values = spread(policy, noises)
    assert has_spread_one(values)
    assert not has_spread_one(values * 1.05)  # the test has power
    assert not has_spread_one(values / math.sqrt(policy.cohort_size))  # noise meant for the mean
    mean = mean_of_sum(sum(quiet), policy=policy, round_number=1)
    flat = np.concatenate([array.ravel() for array in mean.values()]) * policy.cohort_size
    wanted = sum(np.concatenate([array.ravel() for array in change.values()]) for change in changes)
    assert np.abs(flat - wanted).max() < 4 * policy.grid  # the constant cohort, though three contributed


def test_the_noise_of_the_honest_survivors_together_is_that_of_the_policy(distributed):
    policy = distributed.campaign.policy
    honest = policy.secure_sum.honest
    assert honest == policy.secure_sum.min_survivors - policy.secure_sum.colluders < policy.cohort_size
    change = change_of(policy, np.random.default_rng(1), length=0.5)
    quiet = contribute(change, policy=policy, randomness=Quiet())
    rounds = -(-40_000 // policy.size)

    def noises(shares):
        return [
            sum(contribute(change, policy=policy, randomness=SecureRandomness()) - quiet for _ in range(shares))
            for _ in range(rounds)
        ]

    assert has_spread_one(spread(policy, noises(honest)))
    assert not has_spread_one(spread(policy, noises(honest - 1)))  # one share too few is seen


def test_the_wrong_grid_gives_nothing(distributed):
    policy = distributed.campaign.policy
    terms = policy.secure_sum.model_copy(update={"min_survivors": policy.cohort_size})
    for wrong in ({"grid": policy.grid / 2}, {"noise_multiplier": policy.noise_multiplier * 2}, {"secure_sum": terms}):
        altered = policy.model_copy(update=wrong)
        with pytest.raises(PrivacyError, match="grid must be"):
            contribute(change_of(policy, np.random.default_rng(0), length=1.0), policy=altered, randomness=Quiet())


# What a device certifies


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"noise_multiplier": 0.5}, "they give"),
        ({"max_participations": 50}, "they give"),
        ({"relation": "add-or-remove-one"}, "relation"),
        ({"sampling_rate": 0.5}, "every record"),
        ({"record_exponent": math.nan}, "record_exponent"),
        ({"reply_fields": ("arrays", "config.loss", "config.policy", "config.round")}, "nothing else"),
    ],
)
def test_a_user_level_policy_that_does_not_keep_its_promise_is_refused(central, wrong, says):
    policy = central.campaign.policy
    check_price(policy)
    altered = policy.model_copy(update=wrong)
    altered = altered.model_copy(update={"grid": grid_of(altered)})
    with pytest.raises(PrivacyError, match=says):
        check_price(altered)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"threshold": 2}, "terms must be"),
        ({"neighbours": 2}, "allow no threshold|terms must be"),
        ({"min_survivors": 1}, "survivors"),
        ({"min_survivors": 6}, "survivors"),
        ({"colluders": 3}, "survivors|threshold"),
        ({"colluders": -2}, "survivors|colluders"),
        ({"share_log2_sigma": 0}, "2\\^"),
        ({"share_log2_sigma": 60}, "2\\^"),
    ],
)
def test_terms_that_hide_too_little_are_refused(distributed, wrong, says):
    policy = distributed.campaign.policy
    check_price(policy)
    altered = policy.model_copy(update={"secure_sum": policy.secure_sum.model_copy(update=wrong)})
    altered = altered.model_copy(update={"grid": grid_of(altered)})
    with pytest.raises(PrivacyError, match=says):
        check_price(altered)


def test_a_secure_sum_belongs_to_distributed_and_to_nothing_else(central, distributed):
    terms = distributed.campaign.policy.secure_sum
    for policy in (
        central.campaign.policy.model_copy(update={"secure_sum": terms}),
        distributed.campaign.policy.model_copy(update={"secure_sum": None}),
    ):
        with pytest.raises(PrivacyError, match="and no other"):
            check_price(policy)


# Simulations: masks change nothing, rounds are void where too few are left


def last_arrays(run):
    [campaign] = (run / "campaigns").iterdir()
    return load_checkpoint(newest_first(campaign / "checkpoints")[0])


def simulated(tiny_world, folder, *overrides):
    folder.mkdir(exist_ok=True)
    path = tiny_world(folder)
    scenario = load_scenario(path, ("linear.enabled=false", "export.users=0", *overrides))
    return simulate(scenario, out=folder / "run", quiet=True), last_arrays(folder / "run")


def test_masks_change_no_bit_of_what_a_simulation_learns(tiny_world, tmp_path):
    options = (*DISTRIBUTED, 'federation.cohort_size="all"', "statistics.enabled=false")
    results = {}
    for kind in ("plain", "masked"):
        summary, last = simulated(tiny_world, tmp_path / kind, *options, f'performance.secure_sum="{kind}"')
        assert last.total.replies == 2 * 12
        assert not last.total.rejected
        results[kind] = {name: array.tobytes() for name, array in last.arrays.items()}
        assert summary["privacy"]["unit"] == "user"
        assert summary["privacy"]["trust"] == "distributed"
        assert summary["claim"].startswith("User-level")
    assert results["plain"] == results["masked"]


def test_without_noise_and_clipping_all_trusts_learn_the_same(tiny_world, tmp_path, monkeypatch):
    monkeypatch.setattr("shared.privacy.noise.SeededRandomness.gaussian_integers", Quiet.gaussian_integers)
    options = (
        'federation.cohort_size="all"',
        "federation.rounds=1",
        "privacy.clip_norm=50",
        "statistics.enabled=false",
    )
    moved = {}
    for name, trust in {"central": CENTRAL, "distributed": DISTRIBUTED, "none": (*USER, "privacy.trust=none")}.items():
        _, last = simulated(tiny_world, tmp_path / name, *trust, *options)
        moved[name] = np.concatenate([array.ravel() for _, array in sorted(last.optimizer.first.items())])
    assert np.abs(moved["none"]).max() > 0.01
    assert np.allclose(moved["central"], moved["none"], rtol=0, atol=1e-5)
    assert np.allclose(moved["distributed"], moved["none"], rtol=0, atol=1e-3)  # its grid is coarser


# Devices with owners, over a grid


@pytest.fixture(scope="module")
def fleet(homes, distributed, tmp_path_factory):
    """Five homes that agreed to the campaign, and what the operator certified."""
    folder, operator = tmp_path_factory.mktemp("fleet"), load_private(distributed.private)
    credentials = {}
    for seat in range(5):
        home = homes.make_home(folder / f"home-{seat}", distributed, user=seat)
        line = make_device_key(home.folder)
        credentials[seat] = Credential(line, certify_device(operator, seat=seat, public_key=line))
    return folder, credentials


@pytest.fixture
def devices(fleet, tmp_path):
    """Copies of the homes, and their credentials."""
    folder, credentials = fleet
    found = []
    for seat in range(5):
        shutil.copytree(folder / f"home-{seat}", tmp_path / f"home-{seat}")
        found.append(tmp_path / f"home-{seat}")
    return found, dict(credentials)


def answer_quietly(message, context):
    """Owned devices whose noise is none, so that a sum can be checked; nothing but a test can arrange it."""
    device = OwnedDevice(open_home(Path(context.node_config["home"])), randomness=lambda *_: Quiet())
    return client.app.answer(message, context, find=lambda _: device)


class Wire:
    """Between server and devices: keeps all that is sent, and may lose or change it."""

    def __init__(self, answer=client.app.answer):
        self.answer, self.seen, self.change = answer, [], lambda kind, seat, reply: reply

    def __call__(self, message, context):
        reply = self.answer(message, context)
        self.seen.append((message.metadata.message_type, message.content, reply.content))
        return self.change(message.metadata.message_type, context.node_id - 1000, reply)


def serve(homes, published, devices, tmp_path, *, wire_=None, rounds=1, accept_seeded=False, **options):
    folders, credentials = devices
    campaign = replace(published.campaign, folder=tmp_path / "campaign")
    shutil.copytree(published.campaign.folder, campaign.folder, dirs_exist_ok=True)
    between = wire_ or Wire()
    grid = homes.grid_of(folders, client=between)
    done = []

    def stop_after(checkpoint):
        done.append(checkpoint)
        if len(done) >= rounds:
            raise StopIteration

    with pytest.raises((StopIteration, RuntimeError)):
        run_rounds(
            grid,
            campaign,
            roster=dict(grid.seats),
            credentials=credentials,
            on_round=stop_after,
            accept_seeded=accept_seeded,
            **options,
        )
    return done, between


def test_owned_devices_sum_exactly_and_the_server_sees_no_vector_of_anybody(
    homes, distributed, devices, tmp_path, monkeypatch
):
    whole = []
    real = client.app.contribute

    def watched(*args, **named):
        whole.append(real(*args, **named))
        return whole[-1].copy()

    monkeypatch.setattr("client.app.contribute", watched)
    [last], between = serve(homes, distributed, devices, tmp_path, wire_=Wire(answer_quietly), accept_seeded=True)
    policy = distributed.campaign.policy
    assert len(whole) == 5
    assert all(vector.any() for vector in whole)
    wanted = mean_of_sum(sum(whole), policy=policy, round_number=1)
    assert last.latest.replies == 5
    assert not last.latest.rejected
    kept = 1 - distributed.campaign.scenario.federation.server_momentum  # of Adam's first moment, after one round
    for name, array in last.optimizer.first.items():
        assert np.allclose(array, kept * wanted[name], rtol=1e-12)
    kinds = [kind for kind, _, _ in between.seen]
    assert kinds == [
        kind for kind in (wire.SECURE_KEYS, wire.SECURE_SHARES, "train", wire.SECURE_UNMASK) for _ in range(5)
    ]
    sent = [(kind, reply) for kind, _, reply in between.seen]
    plain = {vector.astype(np.uint32).tobytes() for vector in whole} | {vector.tobytes() for vector in whole}
    for kind, content in sent:
        assert set(wire.reply_fields(wire.stamp_seeded(content))) - {"config.noise"} <= set(policy.reply_fields)
        if kind == "train":
            body = bytes(content["arrays"][SUM].data)
            assert not any(secret in body for secret in plain)
            masked = content["arrays"][SUM].numpy()
            assert scipy.stats.kstest(masked / 2.0**32, "uniform").pvalue > 1e-9
        else:
            body = content["config"]["body"]
            assert not any(secret[:32] in body for secret in plain)


def test_a_device_that_leaves_before_it_is_opened_takes_nothing_with_it(homes, distributed, devices, tmp_path):
    between = Wire(answer_quietly)

    between.change = lambda kind, seat, reply: _refused(reply) if (kind, seat) == ("train", 2) else reply
    [last], _ = serve(homes, distributed, devices, tmp_path, wire_=between, accept_seeded=True)
    assert last.latest.replies == 4
    assert last.latest.rejected == {"INTERNAL": 1}
    assert set(last.answered) == {0, 1, 3, 4}


def _refused(reply):
    for name in list(reply.content):
        del reply.content[name]
    reply.content[wire.REFUSAL] = ConfigRecord({"code": "INTERNAL"})
    return reply


@pytest.mark.fault("R7", "R21")
def test_with_too_few_survivors_a_round_is_void_and_nothing_is_opened(homes, distributed, devices, tmp_path):
    between = Wire()
    between.change = lambda kind, seat, reply: _refused(reply) if kind == "train" and seat >= 2 else reply
    done, _ = serve(homes, distributed, devices, tmp_path, wire_=between, rounds=1)
    [last] = done
    assert last.round_number == 1
    assert last.latest.replies == 0
    assert last.latest.rejected["VOID"] == 1
    assert wire.SECURE_UNMASK not in {kind for kind, _, _ in between.seen}
    for name, array in last.arrays.items():
        assert np.array_equal(array, distributed.campaign.start[name])
    for folder in devices[0]:
        with open_home(folder).ledger() as ledger:
            [standing] = ledger.consents()
            assert standing.spent == 1  # a void round is spent like any other


def test_a_round_once_spent_is_never_answered_with_another_vector(homes, distributed, devices, tmp_path):
    serve(homes, distributed, devices, tmp_path)
    between = Wire()
    for folder in (tmp_path / "campaign" / "checkpoints").iterdir():
        shutil.rmtree(folder)  # the server forgets and asks round 1 anew, as after a kill
    done, _ = serve(homes, distributed, devices, tmp_path, wire_=between, rounds=2)
    assert done[0].latest.rejected == {"ROUND": 5, "VOID": 1}
    assert done[1].latest.replies == 5


@pytest.mark.parametrize("another_s", [True, False])
def test_devices_believe_nobody_whom_the_operator_did_not_certify(homes, distributed, devices, tmp_path, another_s):
    folders, credentials = devices
    certificate = credentials[0].certificate if another_s else b""
    credentials[1] = Credential(credentials[1].public_key, certificate)
    [last], between = serve(homes, distributed, devices, tmp_path)
    assert last.latest.rejected == {"ROSTER": 5, "VOID": 1}
    assert "train" not in {kind for kind, _, _ in between.seen}
    for folder in folders:
        with open_home(folder).ledger() as ledger:
            [standing] = ledger.consents()
            assert standing.spent == 0  # nobody had spent anything


def test_a_device_that_signs_with_another_key_loses_itself_alone(homes, distributed, devices, tmp_path):
    _, credentials = devices
    credentials[1] = credentials[0]  # as if seat 1 had been given away
    [last], _ = serve(homes, distributed, devices, tmp_path)
    assert last.latest.rejected == {"ROSTER": 1}
    assert last.latest.replies == 4


def test_an_owned_device_never_answers_without_masks(homes, distributed, devices):
    folders, _ = devices
    home = open_home(folders[0])
    code, _ = homes.ask(home, distributed.campaign)
    assert code == "STAGE"
    with home.ledger() as ledger:
        [standing] = ledger.consents()
        assert standing.spent == 0


def test_what_is_not_noised_is_given_once_and_never_written_down(homes, central, tmp_path, monkeypatch):
    whole = []
    real = client.app.contribute
    monkeypatch.setattr("client.app.contribute", lambda *a, **k: whole.append(real(*a, **k)) or whole[-1].copy())
    home = homes.make_home(tmp_path / "home", central)
    assert homes.ask(home, central.campaign)[0] is None
    [given] = whole
    assert given.any()
    kept = b"".join(path.read_bytes() for path in home.folder.rglob("*") if path.is_file())
    first = int(np.flatnonzero(given)[0])
    assert given[first : first + 4].astype(np.int32).tobytes() not in kept
    assert homes.ask(home, central.campaign)[0] == "ROUND"
    assert len(whole) == 1


@pytest.mark.fault("R7")
def test_a_central_round_with_too_few_replies_is_void(homes, central, tmp_path):
    folders = [homes.make_home(tmp_path / f"home-{seat}", central, user=seat).folder for seat in range(2)]
    grid = homes.grid_of(folders)
    campaign = replace(central.campaign, folder=tmp_path / "campaign")
    shutil.copytree(central.campaign.folder, campaign.folder)
    last = run_rounds(grid, campaign, roster=dict(grid.seats), before_round=lambda _: None)
    assert last.total.rejected == {"VOID": 2}
    assert all(np.array_equal(array, campaign.start[name]) for name, array in last.arrays.items())


@pytest.mark.parametrize("trust", ["central", "distributed"])
def test_training_that_fails_contributes_zero_and_shows_nothing(
    homes, central, distributed, devices, tmp_path, trust, monkeypatch, caplog
):
    def fail(*_, **__):
        raise MemoryError("so many records")

    monkeypatch.setattr("client.app.train_shared", fail)
    if trust == "central":
        home = homes.make_home(tmp_path / "home", central)
        code, reply = homes.ask(home, central.campaign)
        assert code is None
        assert not reply.content["arrays"][SUM].numpy().any()
    else:
        [last], _ = serve(homes, distributed, devices, tmp_path)
        assert last.latest.replies == 5
    assert '"event": "zeroed"' in caplog.text
    assert "so many records" not in caplog.text


def test_a_roster_larger_than_the_cohort_is_refused(homes, distributed, devices, tmp_path, monkeypatch):
    real = wire.pack_stage

    def more(body, **of_round):
        if body.startswith(b"SSR1"):
            roster = Roster.from_bytes(body)
            body = replace(roster, seats=(*roster.seats, 7, 8)).to_bytes()
        return real(body, **of_round)

    monkeypatch.setattr("server.secure_strategy.wire.pack_stage", more)
    [last], _ = serve(homes, distributed, devices, tmp_path)
    assert last.latest.rejected == {"ROSTER": 5, "VOID": 1}


def test_parcels_that_cannot_be_opened_cost_nothing(homes, distributed, devices, tmp_path):
    between = Wire()

    def swap(kind, seat, reply):
        if kind == wire.SECURE_SHARES and seat == 1:
            body = Parcels.from_bytes(reply.content["config"]["body"])
            reply.content["config"]["body"] = replace(
                body, items=tuple((s, bytes(160)) for s, _ in body.items)
            ).to_bytes()
        return reply

    between.change = swap
    [last], _ = serve(homes, distributed, devices, tmp_path, wire_=between)
    assert last.latest.rejected == {"PARCELS": 4, "VOID": 1}
    for seat in (0, 2, 3, 4):
        with open_home(devices[0][seat]).ledger() as ledger:
            [standing] = ledger.consents()
            assert standing.spent == 0


def test_a_signed_policy_whose_sums_overflow_is_refused(distributed):
    terms = make_terms(100, min_survivors=80, colluders=0)
    sums = SecureSum(
        neighbours=terms.neighbours, threshold=terms.threshold, min_survivors=80, colluders=0, share_log2_sigma=24
    )
    changes = {"secure_sum": sums, "cohort_size": 100, "noise_multiplier": 0.6}
    policy = distributed.campaign.policy.model_copy(update=changes)
    with pytest.raises(PrivacyError, match="fit 32 bits"):
        check_price(policy.model_copy(update={"grid": grid_of(policy)}))


# Rounds that are void, and messages that come twice


class Twice(Wire):
    """Asks every device to unmask a second time, with whoever was last left out."""

    codes = ()

    def __call__(self, message, context):
        reply = super().__call__(message, context)
        if message.metadata.message_type == wire.SECURE_UNMASK:
            again = self.answer(message, context)
            self.codes = (*self.codes, again.content[wire.REFUSAL]["code"] if wire.REFUSAL in again.content else None)
        return reply


def test_a_device_opens_a_sum_once(homes, distributed, devices, tmp_path):
    between = Twice()
    [last], _ = serve(homes, distributed, devices, tmp_path, wire_=between)
    assert last.latest.replies == 5
    assert len(between.codes) == 5
    assert None not in between.codes


def lose_all(kind, seat, reply):
    return _refused(reply) if kind == "train" and seat >= 2 else reply


@pytest.mark.fault("R7", "R21")
def test_a_void_round_is_never_asked_again_and_its_answers_do_not_count(homes, distributed, devices, tmp_path):
    between = Wire()
    between.change = lose_all
    [last], _ = serve(homes, distributed, devices, tmp_path, wire_=between, attempts=3)
    assert [kind for kind, _, _ in between.seen].count(wire.SECURE_KEYS) == 5
    assert not last.answered


@pytest.mark.fault("R7")
@pytest.mark.parametrize(("good", "rounds"), [((), 3), ((2,), 5)])
def test_three_void_rounds_running_end_a_campaign(distributed, tmp_path, monkeypatch, good, rounds):
    policy = distributed.campaign.policy.model_copy(update={"rounds": 9})
    campaign = replace(distributed.campaign, policy=policy, folder=tmp_path)

    def run(grid, strategy, server_round):
        if server_round not in good:
            raise VoidRoundError("void")
        strategy._finish(server_round, strategy.checkpoint.arrays, strategy.checkpoint.optimizer, ())

    monkeypatch.setattr("server.app._run_round", run)
    done = []
    with pytest.raises(TooFewRepliesError, match="3 rounds running are void"):
        run_rounds(
            SimpleNamespace(bytes_up=0, bytes_down=0),
            campaign,
            roster=dict.fromkeys(range(5), 0),
            on_round=lambda checkpoint: done.append(checkpoint.round_number),
        )
    assert done == list(range(1, rounds + 1))


def test_a_paused_device_says_so_before_others_count_on_it(homes, distributed, devices, tmp_path):
    with open_home(devices[0][3]).ledger() as ledger:
        ledger.pause()
    [last], between = serve(homes, distributed, devices, tmp_path)
    assert last.latest.rejected == {"PAUSED": 1}
    assert last.latest.replies == 4
    assert [kind for kind, _, _ in between.seen].count(wire.SECURE_SHARES) == 4


def test_the_servers_noise_is_drawn_anew_for_every_round(homes, central, tmp_path, monkeypatch):
    folders = [homes.make_home(tmp_path / f"home-{seat}", central, user=seat).folder for seat in range(12)]
    grid = homes.grid_of(folders)
    campaign = replace(central.campaign, folder=tmp_path / "campaign")
    shutil.copytree(central.campaign.folder, campaign.folder)
    asked = []
    run_rounds(grid, campaign, roster=dict(grid.seats), noise=lambda number: asked.append(number) or Quiet())
    assert asked == [1, 2]


def test_a_device_that_nobody_certified_takes_no_part(homes, distributed, devices, tmp_path):
    del devices[1][1]
    [last], _ = serve(homes, distributed, devices, tmp_path)
    assert last.latest.rejected == {"ROSTER": 1}
    assert last.latest.replies == 4


@pytest.mark.fault("R7")
def test_where_masks_are_left_out_too_few_contributions_are_void_too(distributed, tmp_path):
    policy = distributed.campaign.policy
    strategy = EqualWeights(
        replace(distributed.campaign, folder=tmp_path), start_checkpoint(distributed.campaign), roster={}
    )
    few = {seat: {SUM: np.zeros(policy.size, dtype=np.uint32)} for seat in range(3)}
    with pytest.raises(VoidRoundError, match="needs 4 contributions, got 3"):
        strategy._mean(1, few)
