"""A campaign served to real devices: SuperLink, front, register, and the rounds of ``run_rounds`` between them."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from server.app import run_rounds
from server.checkpoint import Checkpoint, last_checkpoint
from server.credentials import credentials
from server.folder import ServerFolder
from server.front import Front, start_front
from server.judge import Judge
from server.lock import alone
from server.register import read_register
from server.rollback import pass_over
from server.superlink import SuperLink
from shared.errors import CampaignError, ServerError, SottovoceError
from shared.files import write_atomically
from shared.flower.control import Control, Node, key_bytes
from shared.flower.grid import metered
from shared.flower.tasks import Task, TaskError, Tasks
from shared.protocol.campaign import Campaign
from shared.secure_sum.messages import Credential

_WATCH_S = 1.0
_ATTEMPTS = 3  # of a round with too few good replies
_PAUSE_S = 10.0  # between them
_RUNS = 5  # of Flower's without a finished round
_TASK_S = 60.0

OnState = Callable[[str], object]


def serve(
    server: ServerFolder,
    campaign: Campaign,
    *,
    host: str = "0.0.0.0",
    judge: Judge | None = None,
    on_round: Callable[[Checkpoint], object] = lambda checkpoint: None,
    on_state: OnState = lambda text: None,
    accept_seeded: bool = False,
) -> Checkpoint:
    """Serve a campaign to its end, from where it was left.

    Args:
        server: The server's folder.
        campaign: Published in that folder; its checkpoints are kept there.
        host: Where the front listens.
        judge: Scores every round on the operator's hold-out and stops what does harm; without one, nothing is scored.
        on_round: Called after every round, once it is judged.
        on_state: Told in words what is waited for.
        accept_seeded: For tests, see ``server.gate.check_reply``.

    Returns:
        The last checkpoint.

    Raises:
        ServerError: Another server runs in this folder, or Flower does not start.
        CampaignError: A round had too few good replies three times, or was a no-go.

    Guarantee:
        Outside this machine nothing can be reached but what enrolled devices need.
    """
    judge = judge or Judge(campaign, None)

    def after_round(checkpoint: Checkpoint) -> None:
        try:
            judge.on_round(checkpoint)
        finally:
            on_round(checkpoint)

    certified: dict[int, Credential] = {}

    def before_round(round_number: int) -> None:
        watch.wait_for_cohort(round_number, on_state)
        if campaign.policy.secure_sum:
            certified.update(credentials(server))

    checkpoints = campaign.folder / "checkpoints"
    with alone(server):
        judge.begin()
        watch = _Watch(server, campaign)
        with watch.running(host=host):
            left, before = _RUNS, -1
            while True:
                good = last_checkpoint(checkpoints, policy_sha256=campaign.policy.sha256)
                start = pass_over(campaign, good)
                if start is not good and start is not None:
                    on_state(
                        f"checkpoints after round {start.arrays_of} are damaged or gone: its arrays are gone on from, "
                        f"and rounds up to {start.round_number} are passed over, for devices may have answered them"
                    )
                done = start.round_number if start else 0
                left, before = _RUNS if done > before else left - 1, done
                try:
                    with watch.run() as task:
                        return run_rounds(
                            metered(task.grid()),
                            campaign,
                            roster=watch.roster,
                            start=start,
                            on_round=after_round,
                            before_round=before_round,
                            attempts=_ATTEMPTS,
                            credentials=certified,
                            accept_seeded=accept_seeded,
                        )
                except TaskError:  # Flower was away for long, or knows the run no more
                    if not left > 1:
                        raise
                on_state("Flower fell or lost the run; another one goes on after the last finished round")


class _Watch:
    """What goes on beside the rounds: Flower kept up, devices let in and put out, the state written down.

    Attributes:
        roster: Node id -> seat of every device that is enrolled and not revoked.
    """

    def __init__(self, server: ServerFolder, campaign: Campaign) -> None:
        self._server, self._campaign = server, campaign
        self._link = SuperLink(server, on_disk=campaign.policy.trust != "central")  # whose replies are not noised
        self._certificates = server.ca_certificate.read_bytes()
        self._since = _now()
        self._round = 0  # that was asked for last
        self._online: frozenset[int] = frozenset()  # seats
        self._link_starts, self._called_before = 0, dict[int, float]()  # node id -> when, as of the SuperLink's start
        self._devices: list[dict[str, Any]] = []
        self._problem: str | None = None
        self._front: Front
        self._ready, self._stop = threading.Event(), threading.Event()
        self.roster: dict[int, int] = {}

    @contextmanager
    def running(self, *, host: str) -> Iterator[None]:
        """Everything up for the length of a block."""
        self._front = start_front(
            self._server, superlink_port=self._link.port, host=host, port=self._server.settings.port
        )
        thread = threading.Thread(target=self._run, name="watch", daemon=True)
        thread.start()
        try:
            self._ready.wait()
            if self._problem:
                raise ServerError(self._problem)
            yield
        finally:
            self._stop.set()
            thread.join()
            self._front.stop()
            self._server.live.unlink(missing_ok=True)

    @contextmanager
    def run(self) -> Iterator[Task]:
        """A run at the SuperLink for the length of a block; it is finished well only where the block is."""
        starts = self._link.starts
        task, ok = self._take_run(), False
        task.fallen = lambda: self._link.starts != starts
        task.asking = self._front.allow
        try:
            yield task
            ok = True
        finally:
            with suppress(SottovoceError):
                task.finish(ok=ok)

    def _take_run(self) -> Task:
        """Start a run and take its task, as soon as Flower is there; runs that were left before are ended first."""
        deadline = time.monotonic() + _TASK_S
        while True:
            try:
                return self._take_task(self._start_run(), deadline)
            except CampaignError:  # it is being started again
                if time.monotonic() > deadline:
                    raise
                time.sleep(_WATCH_S)

    def _start_run(self) -> int:
        control = self._control()
        try:
            control.stop_runs()
            return control.start_run()
        finally:
            control.close()

    def _take_task(self, run_id: int, deadline: float) -> Task:
        secret = self._server.executor_secret.read_bytes()
        tasks = Tasks(self._link.address, secret=secret, kind="server", root_certificates=self._certificates)
        try:
            while time.monotonic() < deadline:
                task = tasks.take()
                if task is not None and task.run.run_id == run_id:
                    return task
                if task is not None:
                    task.close()
                time.sleep(0.1)
        finally:
            tasks.close()
        raise ServerError(f"Flower's SuperLink must hand out the run within {_TASK_S:.0f} s, it did not.")

    def wait_for_cohort(self, round_number: int, on_state: OnState) -> None:
        """Wait until a round's devices are there, however long it takes: more may be enrolled."""
        if round_number == self._round:  # asked for again: what hindered it gets time to pass
            self._stop.wait(_PAUSE_S)
        self._round = round_number
        wanted, told = self._campaign.policy.cohort_size, -1
        while len(self._online) < wanted:
            if len(self._online) != told:
                told = len(self._online)
                on_state(
                    f"round {round_number} waits for devices: {told} of {wanted} are there, "
                    f"{len(self.roster)} are enrolled"
                )
            time.sleep(0.2)

    def _control(self) -> Control:
        return Control(self._link.address, root_certificates=self._certificates)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._problem = None
                try:
                    self._link.keep_up()
                    self._follow_register()
                except (SottovoceError, OSError) as error:  # Flower is away, or the register is: the rounds go on
                    self._problem = str(error)
                self._write()
                self._ready.set()
                self._stop.wait(_WATCH_S)
        finally:
            if not self._stop.is_set():
                self._problem = "what keeps Flower up must run as long as the server, it ended."
            self._ready.set()  # whoever waits for the start must not wait for ever
            self._link.stop()

    def _follow_register(self) -> None:
        """Let in who is enrolled, put out who is revoked."""
        wanted = {key_bytes(d.public_key): d for d in read_register(self._server.folder) if d.revoked is None}
        control = self._control()
        try:
            known = {node.public_key: self._there_now(node) for node in self._nodes(control)}
            for key in known.keys() - wanted.keys():
                control.unregister(known[key].node_id)
            for key in wanted.keys() - known.keys():
                known[key] = Node(control.register(key, name=wanted[key].name), key, online=False)
        finally:
            control.close()
        seats = {known[key].node_id: device.seat for key, device in wanted.items()}
        for gone in self.roster.keys() - seats.keys():
            del self.roster[gone]
        self.roster.update(seats)
        self._online = frozenset(device.seat for key, device in wanted.items() if known[key].online)
        self._devices = [
            {"name": device.name, "seat": device.seat, "online": device.seat in self._online}
            for device in sorted(wanted.values(), key=lambda device: device.seat)
        ]

    def _nodes(self, control: Control) -> list[Node]:
        """The devices Flower knows; when it was started anew, when it last heard from them is kept in mind."""
        nodes = control.nodes()
        if self._link.starts != self._link_starts:
            self._link_starts = self._link.starts
            self._called_before = {node.node_id: node.online_until for node in nodes}
        return nodes

    def _there_now(self, node: Node) -> Node:
        """Not online before it has called a SuperLink that was started again.

        Flower goes on to believe what its database says of a device until a minute after its last call; asked in that
        time, one that has not found the way back yet would be given up by Flower, and its answer lost.
        """
        called = node.online_until != self._called_before.get(node.node_id)
        return replace(node, online=node.online and called)

    def _write(self) -> None:
        live = {
            "pid": os.getpid(),
            "since": self._since,
            "time": _now(),
            "campaign": self._campaign.policy.campaign,
            "policy_sha256": self._campaign.policy.sha256,
            "round": self._round,
            "cohort": self._campaign.policy.cohort_size,
            "devices": self._devices,
            "front": self._front.counts(),
            "superlink": {"pid": self._link.pid, "starts": self._link.starts},
            "problem": self._problem,
        }
        with suppress(OSError):  # a full disk must not end the rounds
            write_atomically(self._server.live, (json.dumps(live, indent=1) + "\n").encode())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
