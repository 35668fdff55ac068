"""A crowd of owners' devices in one process, a fifth of which something goes wrong with in every round; for tests."""

import hashlib
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from flwr.app import ConfigRecord, Context, Message
from flwr.app.error import Error
from safetensors.numpy import save

import server.strategy
from client.app import answer
from client.home.home import Home, open_home
from client.training.device import OwnedDevice
from shared.flower.grid import InlineGrid
from shared.privacy.noise import SeededRandomness
from shared.protocol import wire
from shared.protocol.campaign import Campaign

CUTS = ("spend", "records", "release", "sent")  # before it spends, reads, notes what it sends; after that
Replies = list[Message]


@dataclass
class Crowd:
    """Homes, and who plays them in the present round.

    Attributes:
        folders: Of the homes, by seat.
        campaign: That all of them agreed to.
        clones: Folders of copies of homes that answered once.
        accepted: (seat, round, hash of the update) of every reply that passed the gate.
        played: How often each fault was played.
        counted: What a server should count of them, by code.
        spared: Replies that should be used, those of devices hit by a fault that loses nothing among them.
    """

    folders: Sequence[Path]
    campaign: Campaign
    clones: list[Path] = field(default_factory=list)
    accepted: list[tuple[int, int, str]] = field(default_factory=list)
    played: Counter[str] = field(default_factory=Counter)
    counted: Counter[str] = field(default_factory=Counter)
    spared: int = 0
    cut_at: str | None = None  # of the device that answers next, which a kill ends there
    clone: Path | None = None  # that answers next in place of the real one

    def device(self, context: Context) -> OwnedDevice:
        """The device of a node, its noise drawn from the simulation's seeds."""
        seat = int(context.node_config["partition-id"])
        home = open_home(self.clone or self.folders[seat])
        salt = 1000 if self.clone else 0  # a copied home draws other noise

        def randomness(campaign: Campaign, round_number: int) -> SeededRandomness:
            scenario = campaign.scenario
            return SeededRandomness(
                seed=scenario.seed + salt, campaign=scenario.name, device=seat, round_number=round_number
            )

        return _Cut(home, randomness, self.cut_at) if self.cut_at else OwnedDevice(home, randomness=randomness)

    def answer(self, message: Message, context: Context) -> Message:
        """What a node's device answers."""
        return answer(message, context, find=self.device)


class _Cut(OwnedDevice):
    """A device whose process is killed at a step of a round."""

    def __init__(self, home: Home, randomness: Callable[[Campaign, int], SeededRandomness], at: str) -> None:
        super().__init__(home, randomness=randomness)
        self._at = at

    def _step(self, name: str) -> None:
        if name == self._at:
            os.kill(os.getpid(), signal.SIGKILL)

    def spend(self, campaign, request):
        self._step("spend")
        return super().spend(campaign, request)

    def records(self, campaign):
        self._step("records")
        return super().records(campaign)

    def release(self, campaign, request, update):
        self._step("release")
        super().release(campaign, request, update)
        self._step("sent")


class FaultyGrid(InlineGrid):
    """An inline grid on which a share of the devices has one fault each in every round.

    Args:
        crowd: Who answers.
        share: Of the devices asked; 0 plays none.
        seed: Of who is hit, and by what.
        after_round: Called when a round's replies are there.
    """

    def __init__(
        self, crowd: Crowd, *, share: float, seed: int = 0, after_round: Callable[[], object] | None = None
    ) -> None:
        super().__init__(crowd.answer, devices=len(crowd.folders), run_config={})
        for seat, context in enumerate(self._contexts.values()):
            context.node_config.clear()
            context.node_config["partition-id"] = seat
        self._crowd, self._share, self._draw = crowd, share, np.random.default_rng(seed)
        self._after_round = after_round
        self.late: Replies = []
        self._left: list[str] = []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Replies:
        """Deliver messages, each with its fault; yesterday's late replies come first, the others in any order."""
        del timeout
        messages, replies = list(messages), []
        late, self.late = self.late, []
        not_silent = {reply.metadata.src_node_id for reply in late}
        hit = set(self._draw.permutation(len(messages))[: round(self._share * len(messages))].tolist())
        for place, message in enumerate(messages):
            fault = self._next_fault() if place in hit else None
            replies += FAULTS[fault](self, message) if fault else self.deliver(message)
            code = _COUNTED[fault] if fault else None
            if code and not (code == "NO_REPLY" and message.metadata.dst_node_id in not_silent):
                self._crowd.counted[code] += 1
            self._crowd.spared += code in (None, "DUPLICATE")
        self._crowd.counted["ROUND"] += len(late)
        if self._after_round:
            self._after_round()
        return late + [replies[place] for place in self._draw.permutation(len(replies))]

    def _next_fault(self) -> str:
        """Each as often as any other."""
        self._left = self._left or list(FAULTS)
        fault = self._left.pop(int(self._draw.integers(len(self._left))))
        self._crowd.played[fault] += 1
        return fault

    def deliver(self, message: Message) -> Replies:
        """Without a fault."""
        return list(self.pull_messages(self.push_messages([message])))

    def killed(self, message: Message) -> Replies:
        """A process of its own answers, and is killed at a step on the way."""
        self._crowd.cut_at = CUTS[int(self._draw.integers(len(CUTS)))]
        child = os.fork()
        if not child:
            try:
                self.deliver(message)
            finally:
                os._exit(1)  # nobody was killed
        self._crowd.cut_at = None
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == -signal.SIGKILL, code
        return []

    def cloned(self, message: Message) -> Replies:
        """A copy of the home answers as well, with the same key and other noise."""
        seat = self.seats[message.metadata.dst_node_id]
        copy = self._crowd.folders[seat].with_name(f"clone-{len(self._crowd.clones)}-of-{seat}")
        shutil.copytree(self._crowd.folders[seat], copy)
        self._crowd.clones.append(copy)
        self._crowd.clone = copy
        try:
            replies = self.deliver(message)
        finally:
            self._crowd.clone = None
        return replies + self.deliver(message)

    def any_bytes(self, count: int) -> bytes:
        """Random ones."""
        return self._draw.bytes(count)


def _killed(grid: FaultyGrid, message: Message) -> Replies:
    return grid.killed(message)


def _asleep(grid: FaultyGrid, message: Message) -> Replies:
    del grid, message
    return []


def _lost(grid: FaultyGrid, message: Message) -> Replies:
    grid.deliver(message)
    return []


def _late(grid: FaultyGrid, message: Message) -> Replies:
    grid.late += grid.deliver(message)
    return []


def _twice_asked(grid: FaultyGrid, message: Message) -> Replies:
    first, again = grid.deliver(message), grid.deliver(message)
    assert first[0].content == again[0].content  # the same bytes, from the ledger
    return first + again


def _garbage(grid: FaultyGrid, message: Message) -> Replies:
    [reply] = grid.deliver(message)
    reply.content.clear()
    reply.content[wire.CONFIG] = ConfigRecord({"round": grid.any_bytes(40)})
    wire.stamp_seeded(reply.content)  # or that would be all that is wrong with it
    return [reply]


def _nan(grid: FaultyGrid, message: Message) -> Replies:
    replies = grid.deliver(message)
    for array in replies[0].content[wire.ARRAYS].values():
        values = array.numpy().copy()
        values.flat[-1] = np.nan
        array.data = type(array)(values).data
    return replies


def _wrong_round(grid: FaultyGrid, message: Message) -> Replies:
    replies = grid.deliver(message)
    replies[0].content[wire.CONFIG]["round"] += 1
    return replies


def _error(grid: FaultyGrid, message: Message) -> Replies:
    [reply] = grid.deliver(message)
    failed = Message(Error(code=0, reason="it broke"), reply_to=message)
    failed.metadata.__dict__["_src_node_id"] = reply.metadata.src_node_id
    return [failed]


def _cloned(grid: FaultyGrid, message: Message) -> Replies:
    return grid.cloned(message)


FAULTS: dict[str, Callable[[FaultyGrid, Message], Replies]] = {
    "killed": _killed,
    "asleep": _asleep,
    "lost": _lost,
    "late": _late,
    "asked twice": _twice_asked,
    "garbage": _garbage,
    "nan": _nan,
    "wrong round": _wrong_round,
    "error": _error,
    "cloned": _cloned,
}
_COUNTED = {
    "killed": "NO_REPLY",
    "asleep": "NO_REPLY",
    "lost": "NO_REPLY",
    "late": "NO_REPLY",
    "asked twice": "DUPLICATE",
    "garbage": "SCHEMA",
    "nan": "NOT_FINITE",
    "wrong round": "ROUND",
    "error": "ERROR",
    "cloned": "DUPLICATE",
}


@contextmanager
def watched(crowd: Crowd, monkeypatch):
    """Note every reply that passes the gate, for the length of a block."""
    check = server.strategy.check_reply

    def noting(reply, **settings):
        update = check(reply, **settings)
        seat = reply.metadata.src_node_id - min(_nodes(crowd))
        crowd.accepted.append((seat, settings["round_number"], hashlib.sha256(save(update)).hexdigest()))
        return update

    with monkeypatch.context() as patch:
        patch.setattr(server.strategy, "check_reply", noting)
        yield


def _nodes(crowd: Crowd) -> range:
    return range(1000, 1000 + len(crowd.folders))


def released(folder: Path) -> dict[int, str]:
    """Round -> hash of what a home's ledger says was released; opening it verifies every event and the anchor."""
    with open_home(folder).ledger() as ledger:
        [standing] = ledger.consents()
        events = ledger.history()
    found = {event.round_number: event.detail["sha256"] for event in events if event.kind == "release"}
    spent = [event.round_number for event in events if event.kind == "spend"]
    assert standing.spent == len(spent) == len(set(spent)) >= standing.released == len(found)
    assert found.keys() <= set(spent)
    return found
