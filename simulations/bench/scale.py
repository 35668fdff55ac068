"""How a simulation grows with its users: seconds and memory of rounds with a thousand, ten and a hundred thousand.

The devices' own code answers over the inline engine, every message serialised, to the server's own strategy, gate and
checkpoints; records are invented when a device is asked for them. A process of its own for every size and repetition,
so that one does not inherit another's memory.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
from flwr.app import Context, Message

from client.app import answer
from client.training.device import SimulatedDevice
from client.training.site import TextFeatures, Workbench, accepted_campaign, open_workbench, resident_base, use_threads
from server.app import run_rounds
from shared.config import Scenario
from shared.datasets import Dataset
from shared.errors import CampaignError
from shared.flower.grid import InlineGrid
from shared.heads.adapter import make_start, trained_slots
from shared.heads.registry import make_head
from shared.heads.tasks import Scores, Targets
from shared.models.features import Features
from shared.privacy.calibration import make_policy
from shared.progress import progress
from shared.protocol.campaign import Campaign, write_campaign
from shared.secure_sum.messages import Credential
from simulations.bench.peak import resident_mib
from simulations.campaigns import FATAL
from simulations.machine import about, goal, goal_lines, spread

USERS = (1_000, 10_000, 100_000)
SUMS = (100, 1_000, 10_000)  # of secure sums under masks
_BASE = "asset:all-MiniLM-L6-v2"
_TEXTS, _RECORDS, _ROUNDS = 200, 8, 2  # public texts; records of a device; rounds with every device
_BLOCKS = 20  # parts of the last round
_FLAT_KIB = 2.0  # of memory a user more
_LINEAR = 1.1  # exponent of the users in the CPU-seconds


def measure(
    *, rounds: int = 2, users: Sequence[int] = USERS, sums: Sequence[int] = SUMS, base: str = _BASE, quiet: bool = False
) -> dict[str, Any]:
    """Measure rounds of invented users.

    Args:
        rounds: How often each size is measured, at least 2 where there are fewer than three sizes.
        users: Sizes, at least two different ones, each at least 100.
        sums: Sizes of secure sums, each at least 100.
        base: The base model whose last layer's features the linear head trains on.
        quiet: No progress on stderr.

    Returns:
        ``sizes.N``: ``seconds`` and ``cpu_s`` of the last round, ``cpu_ms_per_user``, ``server_ms_per_user`` (all but
        the devices' own: messages at both ends, gate, sum, checkpoint) and ``rss_mib``, medians with the range;
        ``kib_per_user_within`` that round, with a 95 % interval; ``marks``, its course. ``growth``: the ``exponent`` e
        of CPU-seconds = a N^e and ``kib_per_user`` over the sizes, each with a 95 % interval. ``sums.N``: a secure sum
        under masks: ``device_ms``, ``server_ms``, ``bytes_up``, ``bytes_down`` of a device, ``values`` it sends.
        ``goals``; machine, versions and commit.

    Raises:
        CampaignError: Impossible sizes, or a process failed.
    """
    sizes = sorted(set(users))
    if len(sizes) < 2 or sizes[0] < _BLOCKS * 5 or len(sizes) * rounds < 3:
        raise CampaignError(
            f"users must name at least two sizes of at least {_BLOCKS * 5}, measured three times in all, got "
            f"{list(users)} and rounds {rounds}."
        )
    runs: dict[int, list[dict[str, Any]]] = {size: [] for size in sizes}
    with progress(total=rounds * sum(sizes), description="bench scale", unit="user", quiet=quiet) as bar:
        for _ in range(rounds):
            for size in sizes:
                runs[size].append(_in_a_process(size, base))
                bar.update(size)
    growth = _growth(runs)
    return {
        "mode": f"{_ROUNDS} rounds of every user, the last one timed; linear head, {_RECORDS} invented records each, "
        "inline engine, one thread",
        "rounds": rounds,
        "values": runs[sizes[0]][0]["values"],
        "sizes": {str(size): _size(found) for size, found in runs.items()},
        "growth": growth,
        "sums": {str(size): _sum_of(size, base) for size in sums},
        "goals": {
            "exponent of the users in the CPU-seconds": goal(growth["exponent"]["value"], at_most=_LINEAR),
            "KiB of memory a user more": goal(growth["kib_per_user"]["value"], at_most=_FLAT_KIB),
        },
        **about("flwr", "torch", "opacus", "numpy"),
    }


def _sum_of(size: int, base: str) -> dict[str, Any]:
    """A secure sum of so many users. Simulated devices have no certificates, so that none are sent and none checked."""
    found = _in_a_process(size, base, trust="distributed")
    return {
        "values": found["values"],
        "device_ms": 1000 * found["device_s"] / size,
        "server_ms": 1000 * (found["cpu_s"] - found["device_s"]) / size,
        "bytes_up": found["bytes_up"],
        "bytes_down": found["bytes_down"],
    }


def _in_a_process(size: int, base: str, *, trust: str = "local") -> dict[str, Any]:
    call = f"one({size}, base={base!r}, trust={trust!r})"
    code = f"import json; from simulations.bench.scale import one; print(json.dumps({call}))"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise CampaignError(f"{size} users must be simulated, the process says: {done.stderr[-1000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def one(size: int, *, base: str = _BASE, trust: str = "local") -> dict[str, Any]:
    """Simulate so many users in this process.

    Args:
        size: How many.
        base: As of ``measure``.
        trust: ``local``: two rounds; ``distributed``: one, a secure sum under masks.

    Returns:
        ``seconds`` and ``cpu_s`` of the last round, ``device_s`` of the latter the devices' own; its ``marks``: [users
        answered, seconds since its start, resident MiB]; ``rss_mib`` at most; ``values`` a user sends; ``bytes_up`` and
        ``bytes_down`` of a user and round.
    """
    use_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        stand = _stand(Path(folder), size, base, trust)
        grid = InlineGrid(stand.answer, devices=size, run_config={"campaigns": folder})
        rounds = stand.campaign.policy.rounds
        watch = _Watch(stand, size, rounds)
        grid.on_reply = watch.on_reply
        last = run_rounds(
            grid,
            stand.campaign,
            roster=grid.seats,
            fatal=FATAL,
            on_round=lambda _: watch.end(),
            before_round=watch.begin,
            credentials=dict.fromkeys(grid.seats.values(), Credential()) if trust == "distributed" else None,
        )
    if last.total.replies != rounds * size:
        raise CampaignError(f"{size} users must answer {rounds} rounds, got {last.total.replies} answers.")
    return {
        "seconds": watch.seconds,
        "cpu_s": watch.cpu_s,
        "device_s": watch.device_s,
        "marks": watch.marks,
        "rss_mib": watch.rss_mib,
        "values": sum(array.size for array in last.arrays.values()),
        "bytes_up": last.latest.bytes_up / size,
        "bytes_down": last.latest.bytes_down / size,
    }


@dataclass(frozen=True)
class _Stand:
    """A published campaign, and what a device of it trains with."""

    campaign: Campaign
    bench: Workbench
    inputs: Features
    device_s: list[float] = field(default_factory=lambda: [0.0])

    def answer(self, message: Message, context: Context) -> Message:
        """A device's answer, by its own code; only its records are invented. Its CPU time is added up."""
        began = time.process_time()
        try:
            return answer(message, context, find=lambda found: _Invented(found, self))
        finally:
            self.device_s[0] += time.process_time() - began


class _Invented(SimulatedDevice):
    """A simulated device whose records are drawn when it reads them."""

    def __init__(self, context: Context, stand: _Stand) -> None:
        super().__init__(context)
        self._stand = stand

    def records(self, campaign: Campaign) -> tuple[Workbench, Features, Targets]:
        """Texts of the public ones, and stars."""
        del campaign
        draw = np.random.default_rng([7, self._seat])
        rows = draw.integers(len(self._stand.inputs), size=_RECORDS).tolist()
        return self._stand.bench, self._stand.inputs.select(rows), Scores(draw.integers(1, 6, _RECORDS).tolist())


def _stand(folder: Path, size: int, base_reference: str, trust: str = "local") -> _Stand:
    rounds = _ROUNDS if trust == "local" else 1
    tables: dict[str, Any] = {
        "model": {"base": base_reference, "head_blocks": 0},
        "federation": {"rounds": rounds},
        "privacy": {
            "trust": trust,
            "unit": "record" if trust == "local" else "user",
            "delta": 1 / (20 * size),
            "max_participations": rounds,
        },
        "performance": {"secure_sum": "plain" if trust == "local" else "masked"},
        "linear": {"enabled": False},
        "export": {"users": 0},
    }
    scenario = Scenario.model_validate({"name": "bench-scale", **tables})
    base = resident_base(base_reference)
    invented = Dataset("invented", (), tuple(f"Film {n} ({1900 + n % 100}). Genre {n % 17}" for n in range(_TEXTS)))
    texts = TextFeatures(base, scenario, invented)
    head = make_head(base, scenario, public_texts=_TEXTS)
    start = make_start(head, texts.public(), ridge=scenario.adapter.whitening_ridge, seed=0)
    policy = make_policy(
        scenario,
        clients=size,
        head_blocks=len(head.blocks),
        slots=trained_slots(head),
        base_sha256=base.sha256,
        base_extension=base.extension,
        start=start,
        public_texts=invented.public_texts,
    )
    write_campaign(folder / "scale", scenario, policy, start)
    bench = open_workbench(accepted_campaign(str(folder), policy.sha256))
    return _Stand(bench.campaign, bench, bench.head.prepare(texts.all))


class _Watch:
    """Time and memory of the last round, part by part."""

    def __init__(self, stand: _Stand, size: int, rounds: int) -> None:
        self._stand, self._size, self._rounds = stand, size, rounds
        self.marks: list[tuple[int, float, float]] = []
        self.seconds = self.cpu_s = self.device_s = self.rss_mib = 0.0

    def begin(self, round_number: int) -> None:
        """A round begins."""
        self._answered, self._last = 0, round_number == self._rounds
        self._began = time.perf_counter(), time.process_time(), self._stand.device_s[0]

    def on_reply(self) -> None:
        """A device has answered."""
        self._answered += 1
        if self._last and self._answered % (self._size // _BLOCKS) == 0:
            self.marks.append((self._answered, time.perf_counter() - self._began[0], resident_mib()))

    def end(self) -> None:
        """A round has ended, its checkpoint is written."""
        wall, cpu, devices = self._began
        self.seconds, self.cpu_s = time.perf_counter() - wall, time.process_time() - cpu
        self.device_s = self._stand.device_s[0] - devices
        self.rss_mib = max([resident_mib(), *(resident for _, _, resident in self.marks)])


def _size(found: list[dict[str, Any]]) -> dict[str, Any]:
    """One size: medians and ranges over its repetitions, and the course of memory within the last round."""
    size = found[0]["marks"][-1][0]
    answered = np.concatenate([np.array(run["marks"])[:, 0] for run in found])
    memory = np.concatenate([(marks := np.array(run["marks"]))[:, 2] - marks[:, 2].mean() for run in found])
    return {
        "seconds": spread([run["seconds"] for run in found]),
        "cpu_s": spread([run["cpu_s"] for run in found]),
        "cpu_ms_per_user": spread([1000 * run["cpu_s"] / size for run in found]),
        "server_ms_per_user": spread([1000 * (run["cpu_s"] - run["device_s"]) / size for run in found]),
        "rss_mib": spread([run["rss_mib"] for run in found]),
        "bytes_up": found[0]["bytes_up"],
        "bytes_down": found[0]["bytes_down"],
        "kib_per_user_within": _slope(answered, 1024 * memory),
        "marks": found[0]["marks"],
    }


def _growth(runs: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    """Over the sizes: the exponent of the seconds, and memory a user."""
    size = np.array([float(n) for n, found in runs.items() for _ in found])
    seconds = np.array([run["cpu_s"] for found in runs.values() for run in found])
    memory = np.array([run["rss_mib"] for found in runs.values() for run in found])
    return {"exponent": _slope(np.log(size), np.log(seconds)), "kib_per_user": _slope(size, 1024 * memory)}


def _slope(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """A line through points, by least squares, with a 95 % interval of its slope."""
    fitted = scipy.stats.linregress(x, y)
    half = float(scipy.stats.t.ppf(0.975, len(x) - 2)) * float(fitted.stderr)
    return {"value": float(fitted.slope), "low": float(fitted.slope) - half, "high": float(fitted.slope) + half}


def lines(measured: dict[str, Any]) -> list[str]:
    """The measurements for a reader."""
    out = [f"{measured['mode']}; {measured['values']} numbers a user, each size {measured['rounds']} times"]
    for size, each in measured["sizes"].items():
        seconds, ms, memory = (each[key] for key in ("cpu_s", "cpu_ms_per_user", "rss_mib"))
        out.append(
            f"  {int(size):>9,} users {seconds['median']:9.2f} CPU-s [{seconds['low']:.2f}, {seconds['high']:.2f}]"
            f"  {ms['median']:6.2f} ms a user, {each['server_ms_per_user']['median']:.2f} of them the server's"
            f"  {memory['median']:7.0f} MiB"
        )
    for name, unit in (("exponent", "exponent of the users in the CPU-seconds"), ("kib_per_user", "KiB a user")):
        found = measured["growth"][name]
        if not math.isnan(found["value"]):
            out.append(f"  {found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}] {unit}")
    for size, each in measured["sums"].items():
        out.append(
            f"  {int(size):>9,} in a secure sum: {each['server_ms']:.2f} ms a device of the server, "
            f"{each['device_ms']:.1f} its own, {each['bytes_up']:,.0f} bytes up"
        )
    return out + goal_lines(measured["goals"])
