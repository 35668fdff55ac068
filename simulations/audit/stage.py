"""Where an audit's attacks are played: real devices' code, the real server's, and the bytes between them.

A played device is a simulated one (``client/training/device.py``) whose records and randomness the attack chooses. From
the message that comes in to the bytes that go out it runs what an owner's device runs, but for ledger, store and masks.
"""

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from flwr.app import Context, Message

from client.app import answer
from client.training.device import SimulatedDevice
from client.training.site import TextFeatures, Workbench, campaign_dataset, resident_base, use_threads
from server.app import run_rounds, start_checkpoint
from server.checkpoint import last_checkpoint
from shared.assets import resolve
from shared.config import Scenario, load_scenario
from shared.datasets import Dataset
from shared.errors import CampaignError, DataError, PrivacyError
from shared.flower.grid import InlineGrid, read_wire
from shared.heads.adapter import Arrays, Slot
from shared.heads.lora import trained_parts
from shared.heads.tasks import Targets
from shared.models.features import Features
from shared.models.model import Base
from shared.privacy.calibration import make_policy
from shared.privacy.compatible import priced_choice
from shared.privacy.noise import Randomness, SecureRandomness
from shared.protocol import wire
from shared.protocol.campaign import Campaign, read_campaign, write_campaign
from simulations.campaigns import FATAL, open_campaign, plan_campaigns

_FAULTS = (*FATAL, "NOT_FINITE", "POLICY", "SCHEMA", "ARRAYS")  # a play with faults proves nothing
_NO_BASE = "0" * 64


@dataclass(frozen=True)
class Subject:
    """What is audited.

    Attributes:
        scenario: The settings, of one seed.
        campaign: As it was published, or as it would be.
        texts: Backbone outputs of every text of the data set.
        arrays: The shared arrays an attack starts from: a run's last good ones, else the public start's.
        after_round: Round they are of; 0 is the public start.
        folder: For campaigns of the audit; gone afterwards.
        seed: Of everything the audit draws, but for the noise of devices.
    """

    scenario: Scenario
    campaign: Campaign
    base: Base
    dataset: Dataset
    texts: TextFeatures
    arrays: Arrays
    after_round: int
    folder: Path
    seed: int


@dataclass(frozen=True)
class Part:
    """What one device of a play holds.

    Attributes:
        bench: Its head; shared by the devices of a play.
        features: Prepared backbone outputs of its records.
        targets: What they are to predict.
        randomness: Round -> where its draws come from; by default the operating system's generator, as on any device.
        silent: Whether it is there and does not answer.
    """

    bench: Workbench
    features: Features
    targets: Targets
    randomness: Callable[[int], Randomness] | None = None
    silent: bool = False


class Line(NamedTuple):
    """One line of a log."""

    logger: str
    level: int
    message: str


@dataclass
class Played:
    """What an adversary on the wire has after a play.

    Attributes:
        campaign: That was played.
        requests: (round, seat) -> bytes that went to a device.
        replies: (round, seat) -> bytes that came back.
        arrays: Shared arrays before the first round, and after each.
        log: Every line that was logged meanwhile.
    """

    campaign: Campaign
    requests: dict[tuple[int, int], bytes] = field(default_factory=dict)
    replies: dict[tuple[int, int], bytes] = field(default_factory=dict)
    arrays: list[Arrays] = field(default_factory=list)
    log: list[Line] = field(default_factory=list)

    def update(self, round_number: int, seat: int) -> Arrays:
        """The arrays in the bytes a device sent.

        Raises:
            CampaignError: It sent none.
        """
        content = read_wire(self.replies[round_number, seat]).content
        try:
            return wire.unpack_reply(content, self.campaign.policy.reply_slots(round_number))[0]
        except wire.MalformedError as malformed:
            raise CampaignError(f"device {seat} must send arrays in round {round_number}, got {malformed}.") from None


class _PlayedDevice(SimulatedDevice):
    """A simulated device with the records and the randomness of an attack."""

    def __init__(self, context: Context, part: Part) -> None:
        super().__init__(context)
        self._part = part

    def records(self, campaign: Campaign) -> tuple[Workbench, Features, Targets]:
        """What the attack gave it."""
        del campaign
        return self._part.bench, self._part.features, self._part.targets

    def randomness(self, campaign: Campaign, round_number: int) -> Randomness:
        """As on an owner's device, unless the attack says otherwise."""
        del campaign
        return self._part.randomness(round_number) if self._part.randomness else SecureRandomness()


def play(
    campaign: Campaign,
    parts: Sequence[Part],
    *,
    start: Arrays | None = None,
    noise: Callable[[int], Randomness] | None = None,
) -> Played:
    """Play all rounds of a campaign: the server's rounds, the devices' app, every message as bytes.

    Args:
        campaign: As ``make_campaign`` or a subject has it; devices certify it as they would any.
        parts: What the device in each seat holds.
        start: Shared arrays to begin with; by default the public start.
        noise: Round -> the server's draws, under trust ``central``; by default the operating system's generator.

    Returns:
        What went over the wire.

    Raises:
        CampaignError: A device failed, or refused for a fault of the campaign.
    """
    grid = InlineGrid(
        lambda message, context: _answer(message, context, parts),
        devices=len(parts),
        run_config={"campaigns": str(campaign.folder.parent)},
    )
    played = Played(campaign)

    def hear(request: bytes, reply: bytes) -> None:
        sent = read_wire(request)
        if sent.metadata.message_type != "train":
            return  # a stage of a secure sum holds no arrays
        key = int(sent.metadata.group_id), grid.seats[sent.metadata.dst_node_id]
        played.requests[key], played.replies[key] = request, reply

    grid.on_wire = hear
    first = start_checkpoint(campaign)
    if start is not None:
        first = replace(first, arrays=start)
    played.arrays.append(dict(first.arrays))
    with tempfile.TemporaryDirectory() as folder, _listening(played.log), _broken_off(campaign):
        run_rounds(
            grid,
            replace(campaign, folder=Path(folder)),  # its own checkpoints, if it has any, are not touched
            roster=grid.seats,
            start=first,
            fatal=_FAULTS,
            noise=noise,
            on_round=lambda checkpoint: played.arrays.append(dict(checkpoint.arrays)),
        )
    return played


@contextmanager
def _broken_off(campaign: Campaign) -> Iterator[None]:
    """Say of a play what a simulation says of a run."""
    try:
        yield
    except CampaignError as error:
        what = next((part for part in str(error).split("; ") if "did not (" in part), str(error))  # no word on --resume
        raise CampaignError(
            f"an attack's play of {campaign.scenario.name!r} must run to its end, it broke off: {what}. The subject's "
            "settings leave no room for this attack, or its code is at fault."
        ) from None


def _answer(message: Message, context: Context, parts: Sequence[Part]) -> Message:
    part = parts[int(context.node_config["partition-id"])]
    if part.silent:
        return Message(wire.pack_refusal("PAUSED"), reply_to=message)
    return answer(message, context, find=lambda found: _PlayedDevice(found, part))


@contextmanager
def _listening(lines: list[Line]) -> Iterator[None]:
    """Take down everything that is logged, whoever logs it, in place of showing it: a mutant's lines alarm nobody."""

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(Line(record.name, record.levelno, record.getMessage()))

    root = logging.getLogger()
    level, handlers = root.level, root.handlers
    root.handlers = [Listener(level=logging.DEBUG)]
    root.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        root.handlers = handlers
        root.setLevel(level)


def make_campaign(
    scenario: Scenario,
    *,
    folder: Path,
    slots: tuple[Slot, ...],
    start: Arrays,
    clients: int,
    head_blocks: int = 0,
    base: Base | None = None,
    public_texts: tuple[str, ...] = (),
) -> Campaign:
    """Publish a campaign of the audit, calibrated and checked as any other.

    Args:
        scenario: Its settings; the name must be new in ``folder``.
        folder: For the folders of campaigns.
        slots: The tensors that train.
        start: Public start; holds the slots.
        clients: Size of the roster.
        base: Under its head; None where it has none.

    Raises:
        PrivacyError: The target cannot be met.
    """
    policy = make_policy(
        scenario,
        clients=clients,
        head_blocks=head_blocks,
        slots=slots,
        base_sha256=base.sha256 if base else _NO_BASE,
        base_extension=base.extension if base else None,
        start=start,
        public_texts=public_texts,
    )
    return write_campaign(folder / scenario.name, scenario, policy, dict(sorted(start.items())))


def unprotected(scenario: Scenario) -> Scenario:
    """The same without privacy, for positive controls."""
    return scenario.model_copy(update={"privacy": scenario.privacy.model_copy(update={"trust": "none"})})


def _check_playable(scenario: Scenario) -> None:
    """Refuse what L0 cannot compare draw by draw: rounds of other shapes, and devices that remember records."""
    trained, record = trained_parts(scenario), scenario.privacy.unit == "record"
    found = {
        f"federation.method = {scenario.federation.method!r}, whose rounds take turns": len(trained.turns) > 1,
        f"personal.method = {scenario.personal.method!r}, which keeps tensors between rounds": bool(
            record and trained.private
        ),
        "persona.choice = 'loss', a draw of its own": priced_choice(scenario),
        "task.name = 'preference', whose records hold two texts": scenario.task.name == "preference",
    }
    for what, there in found.items():
        if there:
            raise PrivacyError(
                f"an audit must be able to play the campaign with and without a record, it cannot with {what}; audit "
                "it with another, such as fedavg, fine-tune or declared personas. What it adds has tests of its own "
                "(docs/privacy.md)."
            )


def open_subject(source: Path, *, overrides: tuple[str, ...] = (), folder: Path, seed: int, quiet: bool) -> Subject:
    """Make ready what is audited.

    Args:
        source: A scenario file; the folder of a run; or the folder of a published campaign.
        overrides: ``key=value`` settings over those of a scenario file.
        folder: Empty, for the audit's own campaigns.

    Raises:
        SottovoceError: It is none of these, or promises nothing.
    """
    found = _find_campaign(source) if source.is_dir() else None
    if found and overrides:
        raise DataError("--set is for a scenario file; the settings of what was published are fixed.")
    scenario = found.scenario if found else load_scenario(source, overrides)
    if scenario.privacy.trust == "none":
        raise PrivacyError("an audit needs a promise to attack, got privacy.trust = 'none'; set another trust.")
    _check_playable(scenario)
    use_threads(scenario.performance.threads)
    for reference in (scenario.data.source, scenario.model.base):
        resolve(reference, quiet=quiet)
    base = resident_base(scenario.model.base, scenario.performance.device)
    dataset = campaign_dataset(scenario)
    if found:
        texts = TextFeatures(base, scenario, dataset, quiet=quiet)
        last = last_checkpoint(found.folder / "checkpoints", policy_sha256=found.policy.sha256)
        checkpoint = last or start_checkpoint(found)
        return Subject(scenario, found, base, dataset, texts, checkpoint.arrays, checkpoint.round_number, folder, seed)
    alone = scenario.model_copy(
        update={
            "linear": scenario.linear.model_copy(update={"enabled": False}),
            "evaluation": scenario.evaluation.model_copy(update={"seeds": 1}),
        }
    )
    [plan] = plan_campaigns(alone, base, dataset, quiet=quiet)
    opened = open_campaign(plan, folder / "subject")
    return Subject(scenario, opened.campaign, base, dataset, plan.texts, opened.start.arrays, 0, folder, seed)


def _find_campaign(source: Path) -> Campaign:
    """The campaign in a folder: its own, or the main one of a run's first seed."""
    if (source / "policy.json").is_file():
        return read_campaign(source)
    if not (source / "scenario.json").is_file():
        raise DataError(f"{source} must be the folder of a run or of a campaign; or name a scenario file.")
    scenario = load_scenario(source / "scenario.json")
    for path in sorted(source.glob("campaigns/*/policy.json")):
        campaign = read_campaign(path.parent)
        if (campaign.scenario.name, campaign.scenario.seed) == (scenario.name, scenario.seed):
            return campaign
    raise DataError(f"{source} must hold the campaign of its scenario, it does not; run the scenario again.")
