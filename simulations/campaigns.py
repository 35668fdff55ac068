"""One campaign from its plan to its last checkpoint, over any engine, with an observer beside it."""

import resource
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from client.export.soft_prompt import check_soft_export
from client.personal.personalize import check_export, check_task
from client.runtime.artifact import MIN_PROBES
from client.training.device import kept_rounds
from client.training.site import TextFeatures, open_site
from server.app import run_rounds, start_checkpoint
from server.checkpoint import Checkpoint, checkpoint_path, last_checkpoint, load_checkpoint
from shared.config import Scenario
from shared.datasets import Dataset
from shared.errors import CampaignError, ScenarioError, SottovoceError
from shared.flower.grid import Metered, round_trip_bytes
from shared.heads.adapter import Arrays, load_start, make_start, trained_slots
from shared.heads.registry import make_head
from shared.models.model import Base
from shared.privacy.accounting import epsilon_by_participation
from shared.privacy.calibration import make_policy
from shared.privacy.claims import Claim, claim_of
from shared.privacy.noise import Randomness, SeededRandomness
from shared.privacy.policy import Policy
from shared.progress import progress, track
from shared.protocol import wire
from shared.protocol.campaign import Campaign, Resumed, read_campaign, write_campaign, write_resumed
from shared.secure_sum.messages import Advert, Credential, Parcels, Roster, Shares, Survivors, Terms
from shared.secure_sum.shamir import SHARE_BYTES
from simulations.journal import Journal
from simulations.observe.observe import Observer, make_observer

UNPROTECTED = "unprotected"  # name of the campaign that a membership attack is compared with
# In a simulation nobody goes offline: such a reply is a fault, and a run with faults must not look finished.
FATAL = ("ERROR", "INTERNAL", "NO_REPLY")

_SIGNATURE, _CERTIFICATE, _KEY_LINE = bytes(103), bytes(64), "x" * 184  # ECDSA P-384, Ed25519, OpenSSH: usual sizes
_NOT_VALIDATED = {"federated": None, "personal": None}
_SHARE, _PARCEL = bytes(SHARE_BYTES), bytes(2 * SHARE_BYTES + 28)


@dataclass(frozen=True)
class Plan:
    """One campaign before it starts: nothing has been trained or spent.

    Attributes:
        name: ``lora``, ``kernel`` or ``linear``: what its head is.
        suffix: Added to the names of its rows; empty for the scenario's own campaign.
        folder: Name of its folder.
    """

    name: str
    suffix: str
    folder: str
    scenario: Scenario
    policy: Policy
    start: Arrays
    texts: TextFeatures

    @cached_property
    def claim(self) -> Claim:
        """What the campaign spends, in words and numbers."""
        return claim_of(self.policy)

    def bytes_per_client_round(self) -> tuple[int, int]:
        """Bytes a device receives and sends in one round."""
        return bytes_per_client_round(self.policy, self.start)


def bytes_per_client_round(policy: Policy, start: Arrays) -> tuple[int, int]:
    """Bytes a device receives and sends in one round, on average over turns, all stages of a secure sum included."""
    turns = max(1, len(policy.turns))
    sizes = [_bytes_of_round(policy, start, round_number) for round_number in range(1, turns + 1)]
    down, up = (round(sum(size) / turns) for size in zip(*sizes, strict=True))
    return down, up


def _bytes_of_round(policy: Policy, start: Arrays, round_number: int) -> tuple[int, int]:
    arrays = {slot.name: start[slot.name] for slot in policy.array_slots()}
    reply = {slot.name: np.zeros(slot.shape, slot.dtype) for slot in policy.reply_slots(round_number)}
    of_round: dict[str, Any] = {"round_number": round_number, "policy_sha256": policy.sha256}
    bodies = stage_bodies(policy.secure_sum.terms, policy.sum_size) if policy.secure_sum else []
    body = bodies.pop(2)[0] if bodies else b""  # what others sealed for a device comes with the request to train
    pairs = [(wire.pack_request(wire.pack_arrays(arrays), body=body, **of_round), wire.pack_reply(reply, **of_round))]
    pairs += [(wire.pack_stage(down, **of_round), wire.pack_stage(up, **of_round)) for down, up in bodies]
    sizes = [round_trip_bytes(request, answer) for request, answer in pairs]
    return sum(down for down, _ in sizes), sum(up for _, up in sizes)


def stage_bodies(terms: Terms, count: int) -> list[tuple[bytes, bytes]]:
    """What a secure sum's stages carry to a device and back, of the usual sizes: keys, shares, training, unmasking."""
    everybody, neighbours = tuple(range(count)), tuple(range(1, terms.degree(count) + 1))
    adverts = [Advert(seat, bytes(32), bytes(32), _SIGNATURE) for seat in (0, *neighbours)]
    roster = Roster(everybody, tuple((advert, Credential(_KEY_LINE, _CERTIFICATE)) for advert in adverts))
    parcels = Parcels(tuple((seat, _PARCEL) for seat in neighbours)).to_bytes()
    shares = Shares(tuple((seat, _SHARE) for seat in neighbours))
    return [
        (str(count - 1).encode(), adverts[0].to_bytes()),
        (roster.to_bytes(), parcels),
        (parcels, b""),
        (Survivors(everybody, ()).to_bytes(), shares.to_bytes()),
    ]


@dataclass(frozen=True)
class Opened:
    """A published campaign and the round it goes on from."""

    plan: Plan
    campaign: Campaign
    start: Checkpoint


@dataclass(frozen=True)
class Result:
    """A finished campaign."""

    plan: Plan
    last: Checkpoint
    observer: Observer
    cost: dict[str, float | None]


def plan_campaigns(scenario: Scenario, base: Base, dataset: Dataset, *, quiet: bool = False) -> list[Plan]:
    """Fix policies and public starts: of the scenario's campaign and its linear companion, for every seed.

    Raises:
        ScenarioError, PrivacyError: The scenario does not fit the base or the data, or its target cannot be met.
    """
    check_task(scenario.personal.method, scenario.task.name)
    linear = scenario.linear_campaign()
    bare = "kernel" if scenario.adapter.kernel_features else "linear"
    trained = "prompt-tuning" if scenario.adapter.technique == "prompt-tuning" else "lora"
    main = bare if base.head_blocks(scenario.model.head_blocks) == 0 else trained
    wanted = [(main, "", scenario)] + ([("linear", "-linear", linear)] if linear else [])
    texts = {suffix: TextFeatures(base, each, dataset, quiet=quiet) for _, suffix, each in wanted}
    seeds = scenario.seeds()
    plans = []
    for seed, (name, suffix, each) in track(
        [(seed, kind) for seed in seeds for kind in wanted], description="policies", unit="campaign", quiet=quiet
    ):
        folder = name if len(seeds) == 1 else f"{name}-seed-{seed}"
        try:
            seeded = each.model_copy(update={"seed": seed})
            plans.append(_plan((name, suffix, folder), seeded, base, dataset, texts[suffix]))
        except SottovoceError as error:
            if suffix:  # settings of the table [linear] carry the names of the tables they stand for
                raise type(error)(f"campaign {name}: {error}") from None
            raise
    return plans


def plan_unprotected(plans: Sequence[Plan], base: Base, dataset: Dataset) -> list[Plan]:
    """The scenario's own campaigns again without privacy, where a membership attack needs them to compare with."""
    mine = [plan for plan in plans if not plan.suffix and plan.scenario.attack.membership and plan.policy.delta]
    return [
        _plan(
            (UNPROTECTED, f"-{UNPROTECTED}", plan.folder.replace(plan.name, UNPROTECTED, 1)),
            _unprotected(plan.scenario),
            base,
            dataset,
            plan.texts,
        )
        for plan in mine
    ]


def plan_again(plan: Plan, name: str, scenario: Scenario, base: Base, dataset: Dataset) -> Plan:
    """A campaign beside another of the same run, of its own name, by other settings on the same texts."""
    return _plan((name, f"-{name}", plan.folder.replace(plan.name, name, 1)), scenario, base, dataset, plan.texts)


def _unprotected(scenario: Scenario) -> Scenario:
    name = f"{scenario.name[: 63 - len(UNPROTECTED)]}-{UNPROTECTED}"
    return scenario.model_copy(update={"name": name, "privacy": scenario.privacy.model_copy(update={"trust": "none"})})


def exported_users(scenario: Scenario, dataset: Dataset) -> list[int]:
    """Indices of the users who get a head.

    Raises:
        ScenarioError: A user does not exist, or the data hold too few different texts to compare outputs on.
    """
    wanted = scenario.export.users
    if wanted:
        check_export(scenario.personal.method)
        check_soft_export(scenario)
    records = (record for user in dataset.users for record in user.train)
    texts = {r.response if r.rejected else r.text for r in records} | set(dataset.public_texts)
    if wanted and len(texts) < MIN_PROBES:
        raise ScenarioError(
            f"export.users must be 0 where the data hold fewer than {MIN_PROBES} different texts to compare a "
            f"head's outputs on, got {len(texts)}."
        )
    if isinstance(wanted, int):
        return list(range(min(wanted, len(dataset.users))))
    index = {user.user: i for i, user in enumerate(dataset.users)}
    unknown = [user for user in wanted if user not in index]
    if unknown:
        raise ScenarioError(f"export.users must name users of {dataset.name}, got {unknown}.")
    return [index[user] for user in wanted]


def _plan(names: tuple[str, str, str], scenario: Scenario, base: Base, dataset: Dataset, texts: TextFeatures) -> Plan:
    head = make_head(base, scenario, public_texts=len(dataset.public_texts))
    start = make_start(head, texts.public(), ridge=scenario.adapter.whitening_ridge, seed=scenario.seed)
    policy = make_policy(
        scenario,
        clients=len(dataset.users),
        head_blocks=len(head.blocks),
        slots=trained_slots(head),
        base_sha256=base.sha256,
        base_extension=base.extension,
        start=start,
        public_texts=dataset.public_texts,
    )
    return Plan(*names, scenario, policy, start, texts)


def open_campaign(plan: Plan, campaigns: Path) -> Opened:
    """Publish a campaign, or take up the one an interrupted run has published.

    Raises:
        CampaignError: What lies there is damaged beyond its last good checkpoint, or another scenario's.
    """
    folder = campaigns / plan.folder
    if not folder.exists():
        campaign = write_campaign(folder, plan.scenario, plan.policy, plan.start)
        return Opened(plan, campaign, start_checkpoint(campaign))
    campaign = read_campaign(folder)
    if campaign.policy != plan.policy:
        raise CampaignError(
            f"{folder} must be a campaign of policy {plan.policy.sha256[:12]}…, got {campaign.policy.sha256[:12]}…: "
            "it belongs to another scenario, base or data. Start a new run."
        )
    last = last_checkpoint(folder / "checkpoints", policy_sha256=plan.policy.sha256)
    if last is not None:
        _check_kept(campaign, last)
    write_resumed(folder, Resumed(last.round_number, last.participations) if last else None)
    return Opened(plan, campaign, last or start_checkpoint(campaign))


def _check_kept(campaign: Campaign, last: Checkpoint) -> None:
    """Raise ``CampaignError`` where a device that answered has nothing left of what it kept until a checkpoint."""
    if not campaign.policy.private and campaign.policy.choice_epsilon is None:
        return
    for seat in (seat for seat, count in last.answered.items() if count):
        if not any(kept <= last.round_number for kept in kept_rounds(campaign, seat)):
            raise CampaignError(
                f"{campaign.folder / 'devices' / str(seat)} must hold what the device kept by round "
                f"{last.round_number}, where the run would go on; it is gone. Start a new run."
            )


class _Watch:
    """Observes rounds in a thread of its own and writes a line for each.

    The observer stands outside the federation, so nothing waits for it but the end of the campaign.
    """

    def __init__(self, opened: Opened, observer: Observer, journal: Journal, *, dataset: Dataset) -> None:
        self._plan, self._observer, self._journal = opened.plan, observer, journal
        self._devices = len(dataset.users)
        self._validated = any(user.validation for user in dataset.users)
        policy = self._plan.policy
        self._spent = epsilon_by_participation(policy.mechanism, delta=policy.delta) if policy.delta else None
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._written: list[Future[None]] = []

    def on_round(self, checkpoint: Checkpoint) -> None:
        """Observe a round if it is its turn and there is no line of it yet."""
        done, seed = checkpoint.round_number, self._plan.scenario.seed
        wanted = done % self._plan.scenario.evaluation.every_rounds == 0 or done == self._plan.policy.rounds
        if wanted and not self._journal.has(self._plan.name, seed, done):
            self._written.append(self._thread.submit(self._write, checkpoint))

    def _write(self, checkpoint: Checkpoint) -> None:
        line = {
            "campaign": self._plan.name,
            "seed": self._plan.scenario.seed,
            "round": checkpoint.round_number,
            "epsilon": self._epsilon(checkpoint.round_number),
            "bytes_up": checkpoint.total.bytes_up,
            "bytes_down": checkpoint.total.bytes_down,
            "replies": checkpoint.latest.replies,
            "rejected": dict(checkpoint.latest.rejected),
            "validation": self._observer.validate(checkpoint.arrays) if self._validated else _NOT_VALIDATED,
        }
        self._journal.add(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the last line; what went wrong in the observer's thread comes up here."""
        self._thread.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for written in self._written:
                written.result()

    def _epsilon(self, round_number: int) -> float | None:
        """Spent so far by the devices that took part most often."""
        if self._spent is None:
            return None
        asked = -(-round_number * self._plan.policy.cohort_size // self._devices)
        return self._spent[asked - 1] if asked else 0.0


def run_campaign(
    opened: Opened,
    base: Base,
    dataset: Dataset,
    *,
    grid: Metered,
    roster: Mapping[int, int],
    journal: Journal,
    resident: bool,
    quiet: bool,
) -> Result:
    """All rounds of one campaign that are still to be run, watched by an observer.

    Args:
        grid: Any engine's.
        roster: Node id -> seat of every device.
        resident: Whether the devices live in this process, so that their time can be told from the engine's.
    """
    plan, campaign = opened.plan, opened.campaign
    head = campaign.new_head(base).to(base.device)
    load_start(head, plan.start)
    observer = make_observer(head, plan.texts, dataset, plan.scenario, quiet=quiet)
    # Now, so that the first device's time is its own.
    site = open_site(str(campaign.folder.parent), plan.policy.sha256) if resident else None
    busy_s = site.busy_s if site else 0.0
    done, rounds = opened.start.round_number, plan.policy.rounds
    messages, grid_s, started = grid.messages, grid.wall_s, time.perf_counter()
    with (
        _Watch(opened, observer, journal, dataset=dataset) as watch,
        progress(
            total=(rounds - done) * plan.policy.cohort_size,
            description=f"federation ({plan.folder})",
            unit="device",
            quiet=quiet,
        ) as bar,
    ):
        watch.on_round(start_checkpoint(campaign))
        for seen in range(1, done + 1):  # lines that a kill left unwritten
            if not journal.has(plan.name, plan.scenario.seed, seen):
                watch.on_round(load_checkpoint(checkpoint_path(campaign.folder / "checkpoints", seen)))
        grid.on_reply = lambda: bar.update(1)
        last = run_rounds(
            grid,
            campaign,
            roster=roster,
            start=opened.start,
            fatal=FATAL,
            on_round=watch.on_round,
            credentials=_no_credentials(plan.scenario, roster),
            noise=partial(_server_noise, plan.scenario),
        )
        grid.on_reply = None
    wall_s = time.perf_counter() - started
    return Result(
        plan, last, observer, _cost(
            last,
            messages=grid.messages - messages,
            grid_s=grid.wall_s - grid_s,
            busy_s=site.busy_s - busy_s if site else None,
            wall_s=wall_s,
        )
    )  # fmt: skip


def _server_noise(scenario: Scenario, round_number: int) -> Randomness:
    """The server's draws under trust ``central``, from a seat that no device has."""
    return SeededRandomness(seed=scenario.seed, campaign=scenario.name, device=-1, round_number=round_number)


def _no_credentials(scenario: Scenario, roster: Mapping[int, int]) -> dict[int, Credential] | None:
    """Simulated devices know each other's keys from the seed; None where the masks are left out."""
    return dict.fromkeys(roster.values(), Credential()) if scenario.performance.secure_sum == "masked" else None


def _cost(
    last: Checkpoint, *, messages: int, grid_s: float, busy_s: float | None, wall_s: float
) -> dict[str, float | None]:
    asked = sum(last.participations.values())
    here = messages if busy_s is not None else 0  # where devices work beside each other, times do not add up
    return {
        "wall_s": wall_s,
        "client_rounds": asked,
        "engine_ms_per_client_round": 1000 * (grid_s - (busy_s or 0.0)) / here if here else None,
        "device_ms_per_client_round": 1000 * (busy_s or 0.0) / here if here else None,
        "bytes_up_per_client_round": last.total.bytes_up / asked,
        "bytes_down_per_client_round": last.total.bytes_down / asked,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
