"""Whose device a request has reached: one of a simulation, or an owner's. Both are driven by the same few steps.

A simulated device counts its rounds in the memory of the simulation and draws from seeds. An owner's spends them in a
ledger that outlives crashes, reads encrypted records, and draws from the operating system's generator.
"""

import hashlib
import resource
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord, Context
from safetensors import SafetensorError
from safetensors.numpy import load, save

from client.home.attributes import read_profile
from client.home.home import Home, open_home
from client.home.sources import training_records
from client.ledger.book import Standing
from client.ledger.ledger import Ledger
from client.log import note
from client.owner.device_key import sign, trusted_operator
from client.training.inputs import only, read_inputs
from client.training.site import Workbench, accepted_campaign, open_site, open_workbench, trained_records
from shared.config import Scenario
from shared.errors import CampaignError, LedgerError, RefusedError, SecureSumError
from shared.files import write_atomically
from shared.flower.grid import in_simulation
from shared.heads.adapter import Arrays, within_bound
from shared.heads.tasks import Targets
from shared.models.features import Features
from shared.privacy.noise import Randomness, SecureRandomness, SeededRandomness
from shared.privacy.policy import Policy
from shared.protocol.campaign import Campaign, Resumed, read_resumed
from shared.protocol.enrolment import check_certificate, check_device_signature
from shared.protocol.wire import Request
from shared.secure_sum.messages import Credential

_STATE, _ROUND = "participation", "round"
_SHARED = "shared.safetensors"  # the newest shared arrays a device was sent, with their round; released, so public


class Device(Protocol):
    """The steps of a round on a device, in the order in which they are taken.

    Attributes:
        foreseeable: Whether an owner's noise was drawn from a seed, which only a test can arrange; the reply says so.
        hides_failures: Whether, at unit user, training that fails contributes zero; a refusal would tell of records.
    """

    foreseeable: bool
    hides_failures: bool

    def alone(self) -> AbstractContextManager[None]:
        """Hold off every other process of this device; ``RefusedError`` ``BUSY``."""

    def accepted(self, policy_sha256: str) -> Campaign:
        """The campaign this device takes part in; see ``accepted_campaign``."""

    def spend(self, campaign: Campaign, request: Request) -> Arrays | None:
        """Count the round, durably, before a record is read (rule P4); the answer of an earlier, equal request.

        Raises:
            RefusedError: ``ROUND``, ``BUDGET``, ``CONFLICT``, ``BURNT``, ``CONSENT``, ``PAUSED``.
            LedgerError: The count cannot be kept.
        """

    def records(self, campaign: Campaign) -> tuple[Workbench, Features, Targets]:
        """What to train with, and on; the one step that reads the owner's data."""

    def micro_batch(self, campaign: Campaign) -> int:
        """Tokens of a forward pass; 1 takes every record alone."""

    def profile(self, campaign: Campaign) -> Mapping[str, str]:
        """What the device's user states of themself, and let campaigns use."""

    def state(self, campaign: Campaign, round_number: int) -> Arrays:
        """What the device kept for itself after its last round before this one; nothing before its first."""

    def keep_state(self, campaign: Campaign, round_number: int, state: Arrays) -> None:
        """Keep what a later round begins with; it never leaves the device."""

    def randomness(self, campaign: Campaign, round_number: int) -> Randomness:
        """Where the draws of one round come from (rule P6)."""

    def release(self, campaign: Campaign, request: Request, update: Arrays) -> None:
        """Note what is about to be sent; a repeated request gets these very bytes."""

    def masks(self, campaign: Campaign) -> bool:
        """Whether contributions to this campaign leave under the masks of a secure sum."""

    def ready(self, campaign: Campaign, round_number: int) -> None:
        """Raise ``RefusedError`` where a round could not be spent now, before others count on this device."""

    def signer(self, campaign: Campaign, seat: int) -> Callable[[bytes], bytes]:
        """How this device signs its keys of a round."""

    def verifier(self, campaign: Campaign) -> Callable[[int, Credential, bytes, bytes], None]:
        """What raises ``SecureSumError`` unless a message is signed by the device in a seat."""

    def keep(self, campaign: Campaign, round_number: int, state: bytes) -> None:
        """Remember a round's secrets until the next message, and no other round's."""

    def kept(self, campaign: Campaign, round_number: int) -> bytes:
        """What was kept of this round; ``RefusedError`` ``STAGE`` where there is nothing."""


def find_device(context: Context) -> Device:
    """The device this process plays.

    Raises:
        RefusedError: ``NO_HOME``: neither a simulation nor a node whose owner named a home in its node config. Nothing
            a server sends can name one.
    """
    if in_simulation(context):
        return SimulatedDevice(context)
    folder = context.node_config.get("home")
    if not isinstance(folder, str):
        raise RefusedError("NO_HOME")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would hold the owner's text
    return OwnedDevice(open_home(Path(folder)))


class SimulatedDevice:
    """One of many devices in a process; it lives as long as the simulation, whose report is stamped as seeded."""

    foreseeable = False
    hides_failures = False  # a simulation with faults must not look finished

    def __init__(self, context: Context) -> None:
        self._context = context
        self._seat = int(context.node_config["partition-id"])
        config = context.run_config
        folder = Path(str(config["campaigns"])) if "campaigns" in config else Path(str(config["out"])) / "campaigns"
        self._campaigns = str(folder)

    def alone(self) -> AbstractContextManager[None]:
        """Nobody else plays this device."""
        return nullcontext()

    def accepted(self, policy_sha256: str) -> Campaign:
        """A campaign of the simulation."""
        return accepted_campaign(self._campaigns, policy_sha256)

    def spend(self, campaign: Campaign, request: Request) -> Arrays | None:
        """Count against ``max_participations``; rounds only go forward, so none is answered twice."""
        key = f"{_STATE} {campaign.policy.sha256}"
        state = self._context.state.config_records.get(key) or self._spent_before(campaign)
        count, last_round = (int(str(state[field])) for field in ("count", "last_round"))
        if request.round_number <= last_round:
            raise RefusedError("ROUND")
        if count >= campaign.policy.max_participations:
            raise RefusedError("BUDGET")
        self._context.state[key] = ConfigRecord({"count": count + 1, "last_round": request.round_number})
        return None

    def records(self, campaign: Campaign) -> tuple[Workbench, Features, Targets]:
        """The device's rows of the data set."""
        site = open_site(self._campaigns, campaign.policy.sha256)
        return site, *site.shared_records(self._seat)

    def micro_batch(self, campaign: Campaign) -> int:
        """As the scenario says."""
        return campaign.scenario.performance.micro_batch

    def profile(self, campaign: Campaign) -> Mapping[str, str]:
        """As the data set says."""
        return open_site(self._campaigns, campaign.policy.sha256).dataset.users[self._seat].profile

    def state(self, campaign: Campaign, round_number: int) -> Arrays:
        """From a file: an interrupted simulation goes on with what its devices had at the round it goes on from."""
        earlier = [path for path in _states(campaign, self._seat) if int(path.stem) < round_number]
        return load(earlier[-1].read_bytes()) if earlier else {}

    def keep_state(self, campaign: Campaign, round_number: int, state: Arrays) -> None:
        """In a file of the run's folder; the last two are kept, for a round may be run again."""
        folder = _states_folder(campaign, self._seat)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / f"{round_number:07d}.safetensors", save(state))
        for path in _states(campaign, self._seat)[:-2]:
            path.unlink()

    def randomness(self, campaign: Campaign, round_number: int) -> Randomness:
        """Streams keyed by seed, campaign, device and round: two campaigns of one seed share no noise."""
        scenario = campaign.scenario
        return SeededRandomness(
            seed=scenario.seed, campaign=scenario.name, device=self._seat, round_number=round_number
        )

    def release(self, campaign: Campaign, request: Request, update: Arrays) -> None:
        """Nothing is kept: a simulation that is interrupted runs the round again from the same seeds."""

    def masks(self, campaign: Campaign) -> bool:
        """As the scenario says: masks change no bit of a sum, so a simulation may leave them out."""
        return campaign.policy.secure_sum is not None and campaign.scenario.performance.secure_sum == "masked"

    def ready(self, campaign: Campaign, round_number: int) -> None:
        """Nobody has paused or withdrawn."""

    def signer(self, campaign: Campaign, seat: int) -> Callable[[bytes], bytes]:
        """A key derived from the seed."""
        if seat != self._seat:
            raise RefusedError("ROSTER")
        return _simulated_key(campaign.scenario, seat).sign

    def verifier(self, campaign: Campaign) -> Callable[[int, Credential, bytes, bytes], None]:
        """The others' keys come from the same seed."""

        def verify(seat: int, _: Credential, message: bytes, signature: bytes) -> None:
            try:
                _simulated_key(campaign.scenario, seat).public_key().verify(signature, message)
            except InvalidSignature:
                raise SecureSumError(f"the keys of seat {seat} must be signed by its device.", code="ROSTER") from None

        return verify

    def keep(self, campaign: Campaign, round_number: int, state: bytes) -> None:
        """In the simulation's memory."""
        self._context.state[_SECURE_SUM] = ConfigRecord({_key(campaign, round_number): state})

    def kept(self, campaign: Campaign, round_number: int) -> bytes:
        """From the simulation's memory."""
        record = self._context.state.config_records.get(_SECURE_SUM, ConfigRecord())
        state = record.get(_key(campaign, round_number))
        if not isinstance(state, bytes):
            raise RefusedError("STAGE")
        return state

    def _spent_before(self, campaign: Campaign) -> ConfigRecord:
        """What a device had spent when its simulation was interrupted; nothing in a new one."""
        resumed = _resumed(campaign.folder)
        if resumed is None:
            return ConfigRecord({"count": 0, "last_round": 0})
        return ConfigRecord({"count": resumed.participations.get(self._seat, 0), "last_round": resumed.round_number})


def _resumed(folder: Path) -> Resumed | None:
    """What a campaign's folder says of its interruption; the file names every device, and every device asks."""
    try:
        written_ns = (folder / "resumed.json").stat().st_mtime_ns
    except FileNotFoundError:
        return None
    return _resumed_at(folder, written_ns)


@lru_cache(maxsize=4)
def _resumed_at(folder: Path, written_ns: int) -> Resumed | None:
    del written_ns  # one that is written anew is read anew
    return read_resumed(folder)


class OwnedDevice:
    """A device with an owner, a home and a ledger.

    Args:
        home: The owner's home.
        randomness: For tests that compare with a simulation: where the draws of a campaign's round come from instead.
            Nothing but a caller in this process can give it, and every reply is stamped, which a server refuses.
    """

    hides_failures = True

    def __init__(self, home: Home, *, randomness: Callable[[Campaign, int], Randomness] | None = None) -> None:
        self._home = home
        self._randomness = randomness
        self.foreseeable = randomness is not None
        self._ledger: Ledger  # open while alone
        self._open: tuple[str, int] | None = None  # policy and round that is spent and not released

    @contextmanager
    def alone(self) -> Iterator[None]:
        """The home's lock, which dies with its holder, and the ledger: a round that a crash left open is burnt.

        One that an error ends is burnt at once; if that cannot be written, the next to open the ledger does it.
        """
        with self._home.lock(), self._home.ledger(round_running=False) as self._ledger:
            try:
                yield
            except Exception:
                if self._open is not None:
                    policy, round_number = self._open
                    with suppress(LedgerError):
                        self._ledger.burn(policy=policy, round_number=round_number)
                raise

    def accepted(self, policy_sha256: str) -> Campaign:
        """A campaign the owner agreed to, certified anew in every process; one without noise is none.

        Base and head are loaded here, so that another base costs nothing: no round is spent yet.
        """
        if policy_sha256 not in {standing.consent.policy for standing in self._ledger.consents()}:
            raise RefusedError("POLICY")
        campaign = accepted_campaign(str(self._home.folder / "campaigns"), policy_sha256)
        if campaign.policy.trust == "none":
            raise RefusedError("POLICY")
        _workbench(str(self._home.folder), policy_sha256)
        return campaign

    def spend(self, campaign: Campaign, request: Request) -> Arrays | None:
        """Spend in the ledger."""
        payload = self._ledger.spend(
            policy=campaign.policy.sha256,
            round_number=request.round_number,
            request_sha256=request.sha256,
            answered=request.answered,
        )
        _note("spent" if payload is None else "repeated", campaign, request)
        if payload is None:
            self._open = campaign.policy.sha256, request.round_number
            with suppress(OSError):  # a full disk: the next round brings newer ones
                _keep_shared(self._home, request)
            return None
        return {slot.name: load(payload)[slot.name] for slot in campaign.policy.reply_slots(request.round_number)}

    def records(self, campaign: Campaign) -> tuple[Workbench, Features, Targets]:
        """Every record of store and folder that the policy lets take part, all of them training rows."""
        policy = campaign.policy
        bench = _workbench(str(self._home.folder), policy.sha256)
        records = training_records(
            self._home, policy_sha256=policy.sha256, task=campaign.scenario.task.name, added=policy.added_records
        )
        asked = trained_records(campaign.scenario, records, self.profile(campaign))
        features, targets = read_inputs(self._home, bench, asked)
        prepared = [bench.head.prepare(features.select([row])) for row in range(len(features))]
        return bench, Features([only(record) for record in prepared]), targets

    def micro_batch(self, campaign: Campaign) -> int:
        """Every record alone, from its tokens to its gradient.

        What records round off each other in a batch grows without bound with what the operator chooses (scaling, start,
        base, the first of several steps): alone, no record reaches another's gradient, whatever is chosen.
        """
        return 1

    def profile(self, campaign: Campaign) -> Mapping[str, str]:
        """What the owner stated with ``sottovoce client profile``."""
        del campaign
        return read_profile(self._home)

    def state(self, campaign: Campaign, round_number: int) -> Arrays:
        """From the vault.

        Raises:
            RefusedError: ``STORE``: it is gone, and with it a choice that is paid for once and was seen already.
        """
        del round_number  # the ledger answers a round once
        vault, name = self._home.vault(), _state_name(campaign)
        if vault.names(name):
            return load(vault.open(name))
        if campaign.policy.choice_epsilon is not None and self._has_answered(campaign):
            raise RefusedError("STORE")
        return {}

    def keep_state(self, campaign: Campaign, round_number: int, state: Arrays) -> None:
        """Sealed in the vault."""
        del round_number
        self._home.vault().seal(_state_name(campaign), save(state))

    def randomness(self, campaign: Campaign, round_number: int) -> Randomness:
        """A new key of the operating system for every round."""
        return self._randomness(campaign, round_number) if self._randomness else SecureRandomness()

    def release(self, campaign: Campaign, request: Request, update: Arrays) -> None:
        """Note bytes and hash in the ledger before anything is sent."""
        payload = save(update)
        self._ledger.release(
            policy=campaign.policy.sha256,
            round_number=request.round_number,
            payload=payload,
            keep=campaign.policy.trust != "central",  # not noised: never on a disk, never in two sums
        )
        _note("released", campaign, request)

    def masks(self, campaign: Campaign) -> bool:
        """Always, where the policy has a secure sum: nothing a server or a setting says makes it otherwise."""
        return campaign.policy.secure_sum is not None

    def ready(self, campaign: Campaign, round_number: int) -> None:
        """Ask the ledger, which is not changed."""
        standing = self._standing(campaign)
        if standing is None or standing.state not in ("in force", "exhausted"):
            raise RefusedError("CONSENT")
        if self._ledger.totals().paused:
            raise RefusedError("PAUSED")
        if not round_number > standing.last_round:
            raise RefusedError("ROUND")
        if standing.state == "exhausted":
            raise RefusedError("BUDGET")

    def signer(self, campaign: Campaign, seat: int) -> Callable[[bytes], bytes]:
        """The device's key."""
        del campaign, seat
        return lambda message: sign(self._home.folder, message)

    def verifier(self, campaign: Campaign) -> Callable[[int, Credential, bytes, bytes], None]:
        """Keys certified by the operator whose campaign the owner agreed to."""
        operator = trusted_operator(self._home, campaign.policy.sha256)

        def verify(seat: int, credential: Credential, message: bytes, signature: bytes) -> None:
            check_certificate(operator, seat=seat, public_key=credential.public_key, certificate=credential.certificate)
            check_device_signature(credential.public_key, message, signature)

        return verify

    def keep(self, campaign: Campaign, round_number: int, state: bytes) -> None:
        """In this process's memory alone."""
        _SECRETS[str(self._home.folder)] = {_key(campaign, round_number): state}

    def kept(self, campaign: Campaign, round_number: int) -> bytes:
        """From this process's memory."""
        state = _SECRETS.get(str(self._home.folder), {}).get(_key(campaign, round_number))
        if state is None:
            raise RefusedError("STAGE")
        return state

    def _standing(self, campaign: Campaign) -> Standing | None:
        policy = campaign.policy.sha256
        return next((each for each in self._ledger.consents() if each.consent.policy == policy), None)

    def _has_answered(self, campaign: Campaign) -> bool:
        """Whether a server may have seen a reply of this device, those a ledger forgot included."""
        standing = self._standing(campaign)
        return standing is not None and standing.released + standing.lost > 0


_SECRETS: dict[str, dict[str, bytes]] = {}  # home -> what the latest round of a secure sum must remember
_SECURE_SUM = "secure sum"


def _key(campaign: Campaign, round_number: int) -> str:
    return f"{round_number} of {campaign.policy.sha256}"


def _state_name(campaign: Campaign) -> str:
    return f"state/{campaign.policy.sha256[:32]}"


def _states_folder(campaign: Campaign, seat: int) -> Path:
    return campaign.folder / "devices" / str(seat)


def kept_rounds(campaign: Campaign, seat: int) -> list[int]:
    """Rounds after which a simulated device's state is still there, ascending."""
    return [int(path.stem) for path in _states(campaign, seat)]


def _states(campaign: Campaign, seat: int) -> list[Path]:
    """States a simulated device has kept, the newest last."""
    return sorted(_states_folder(campaign, seat).glob("*.safetensors"))


def _simulated_key(scenario: Scenario, seat: int) -> Ed25519PrivateKey:
    seed = hashlib.sha256(f"a simulated device's key|{scenario.seed}|{scenario.name}|{seat}".encode()).digest()
    return Ed25519PrivateKey.from_private_bytes(seed)


def _keep_shared(home: Home, request: Request) -> None:
    content = save({**request.arrays, _ROUND: np.array([request.round_number])})
    write_atomically(home.campaign_folder(request.policy_sha256) / _SHARED, content)


def newest_shared(home: Home, policy: Policy) -> tuple[Arrays, int] | None:
    """The newest shared arrays a device was sent, and in which round; None before its first.

    Raises:
        CampaignError: They are damaged.
    """
    path = home.campaign_folder(policy.sha256) / _SHARED
    if not path.exists():
        return None
    try:
        found = load(path.read_bytes())
        arrays = {slot.name: found[slot.name] for slot in policy.array_slots()}
        round_number = int(found[_ROUND].item())
    except (SafetensorError, KeyError, ValueError):
        raise CampaignError(
            f"{path} must hold the campaign's arrays, it is damaged; wait for the next round."
        ) from None
    if not within_bound(arrays):
        raise CampaignError(f"{path} must hold usual numbers, got others; wait for the next round.")
    return arrays, round_number


def _note(event: str, campaign: Campaign, request: Request) -> None:
    note(event, policy=campaign.policy.sha256[:16], round=request.round_number)


@lru_cache(maxsize=2)
def _workbench(home: str, policy_sha256: str) -> Workbench:
    return open_workbench(accepted_campaign(str(Path(home) / "campaigns"), policy_sha256))


def forget_workbenches() -> None:
    """Load base and heads anew for the next request."""
    open_site.cache_clear()
    _workbench.cache_clear()
