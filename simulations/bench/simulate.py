"""Time a simulation: ours against the plain way, what each engine costs, and a round of everybody.

The plain way is what a first script does: for every client load the base, put LoRA into all layers, wrap it with
Opacus, run all layers over the client's texts, take the step. Its update is compared with ours first.
"""

import contextlib
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer

from client.app import app as client_app
from client.training.site import accepted_campaign, open_site, resident_base, resident_dataset, use_threads
from client.training.train import quiet_hooks
from server.app import run_rounds
from shared.assets import resolve
from shared.config import Scenario
from shared.datasets import Dataset, Record
from shared.errors import CampaignError
from shared.flower.grid import InlineGrid, Metered, run_inline, seats
from shared.flower.ray_engine import run_ray
from shared.heads.adapter import Arrays, load_shared, load_start, make_start, read_shared, shared_parameters
from shared.heads.rating import RatingHead
from shared.models.features import compute_features
from shared.models.model import Base, load_base
from shared.privacy.policy import Policy
from shared.progress import progress
from shared.protocol import wire
from shared.protocol.campaign import Campaign
from simulations.bench.step import AllLayers, compare_answers
from simulations.campaigns import FATAL, open_campaign, plan_campaigns
from simulations.machine import spread, spread_lines

_REPEATED = 20  # of rounds with a linear head in one timing: a single one is lost in the clock
_CLIENTS = 4  # timed both ways, at the quartiles of the number of records
_ROUNDS_OF_ECHO = 3
_ECHO_VALUES = 2000  # 8 kB, what a LoRA of the demo weighs


def measure(*, rounds: int = 5, quiet: bool = False) -> dict[str, Any]:
    """Measure a simulation of MovieLens 100k.

    Args:
        rounds: How often the two ways are timed, interleaved.

    Returns:
        ``ratios.plain_over_ours.<head_blocks_1|head_blocks_0>.<median|low|high>`` in CPU-seconds per client-round;
        ``engine_ms_per_client_round.<inline|ray>``; ``start_up_s``; ``one_round_of_everybody`` in seconds of wall time;
        ``peak_rss_mib``; machine and versions.

    Raises:
        CampaignError: The plain way and ours disagree.
    """
    use_threads(1)
    scenario = Scenario(name="bench-simulate")
    base = resident_base(scenario.model.base)
    dataset = resident_dataset(scenario.data)
    agreement = compare_answers(scenario, base, dataset, _average(dataset))
    with tempfile.TemporaryDirectory() as folder:
        ours = {
            blocks: _publish(_small(scenario, blocks), base, dataset, Path(folder) / str(blocks)) for blocks in (1, 0)
        }
        cold = {f"head_blocks_{blocks}": _open_cold(campaign) for blocks, campaign in ours.items()}
        everybody, peaks = _one_round(ours[1], len(dataset.users), quiet=quiet)  # before the plain way fills the memory
        engines, start_up = _measure_engines(len(dataset.users), quiet=quiet)
        ratios, seconds = _race(ours, base, dataset, rounds=rounds, quiet=quiet)
    return {
        "mode": "fp32, one thread a process; ratios in CPU-seconds, interleaved; the rest in wall time",
        "clients": len(dataset.users),
        "rounds": rounds,
        "ratios": {"plain_over_ours": ratios},
        "cpu_ms_per_client_round": seconds,
        "engine_ms_per_client_round": engines,
        "start_up_s": start_up | {f"first device, {name}": value for name, value in cold.items()},
        "one_round_of_everybody": everybody,
        "peak_rss_mib": peaks,
        "answers_agree": agreement,
        "machine": {
            "platform": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "cpus": torch.multiprocessing.cpu_count(),
        },
        "versions": {name: version(name) for name in ("torch", "opacus", "peft", "transformers", "flwr", "ray")},
    }


def _average(dataset: Dataset) -> tuple[Record, ...]:
    counts = np.array([len(user.fit) for user in dataset.users])
    return dataset.users[int(np.argmin(abs(counts - counts.mean())))].fit


def _chosen(dataset: Dataset) -> list[int]:
    """Clients at evenly spread quantiles of the number of records."""
    order = np.argsort([len(user.fit) for user in dataset.users], kind="stable")
    places = (np.arange(_CLIENTS) + 0.5) / _CLIENTS * len(order)
    return [int(order[int(place)]) for place in places]


def _small(scenario: Scenario, blocks: int) -> Scenario:
    tables: dict[str, Any] = {
        "model": scenario.model.model_copy(update={"head_blocks": blocks}),
        "federation": scenario.federation.model_copy(update={"rounds": 1}),
        "linear": scenario.linear.model_copy(update={"enabled": False}),
    }
    return scenario.model_copy(update=tables)


def _publish(scenario: Scenario, base: Base, dataset: Dataset, folder: Path) -> Campaign:
    [plan] = plan_campaigns(scenario, base, dataset, quiet=True)
    return open_campaign(plan, folder).campaign


def _open_cold(campaign: Campaign) -> float:
    """Seconds until a worker that has the base and the data in memory can serve its first device."""
    started = time.perf_counter()
    open_site(*_where(campaign))
    return time.perf_counter() - started


def _where(campaign: Campaign) -> tuple[str, str]:
    return str(campaign.folder.parent), campaign.policy.sha256


def _race(
    ours: dict[int, Campaign], base: Base, dataset: Dataset, *, rounds: int, quiet: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """CPU-seconds of the same clients' round both ways, interleaved."""
    clients = _chosen(dataset)
    public = compute_features(base, dataset.public_texts[:400], head_blocks=base.num_blocks, max_tokens=64)
    plain = _PlainClient(ours[1], public)
    ways: dict[str, Callable[[], float]] = {
        "plain": lambda: plain.rounds([dataset.users[i].fit for i in clients]),
        "head_blocks_1": lambda: _ask(ours[1], clients, len(dataset.users)),
        "head_blocks_0": lambda: statistics.mean(_ask(ours[0], clients, len(dataset.users)) for _ in range(_REPEATED)),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    with progress(total=rounds, description="plain way and ours", unit="round", quiet=quiet) as bar:
        for way in ways.values():
            way()  # warm-up
        for _ in range(rounds):
            for name, way in ways.items():
                times[name].append(way() / len(clients))
            bar.update(1)
    ratios = {
        name: spread([a / b for a, b in zip(times["plain"], times[name], strict=True)])
        for name in ("head_blocks_1", "head_blocks_0")
    }
    return ratios, {name: spread([1000 * s for s in each]) for name, each in times.items()}


def _ask(campaign: Campaign, clients: list[int], devices: int) -> float:
    """CPU-seconds of one round of some devices: the real app over the real engine, all messages serialised."""
    grid = InlineGrid(client_app, devices=devices, run_config={"campaigns": str(campaign.folder.parent)})
    arrays = {slot.name: campaign.start[slot.name] for slot in campaign.policy.array_slots()}
    request = wire.pack_request(wire.pack_arrays(arrays), round_number=1, policy_sha256=campaign.policy.sha256)
    node_at = {seat: node for node, seat in grid.seats.items()}
    began = time.process_time()
    messages = [Message(request, dst_node_id=node_at[client], message_type="train") for client in clients]
    replies = list(grid.send_and_receive(messages))
    took = time.process_time() - began
    refused = [code for reply in replies if (code := wire.refusal_code(reply))]
    if refused or len(replies) != len(clients):
        raise CampaignError(f"every device must answer in a benchmark, got {refused or len(replies)}.")
    return took


class _PlainClient:
    """A client as a first script writes it: nothing is kept from one client to the next."""

    def __init__(self, campaign: Campaign, public: Any) -> None:
        self._policy: Policy = accepted_campaign(*_where(campaign)).policy
        model = campaign.scenario.model.model_copy(update={"head_blocks": "all"})
        self._scenario = campaign.scenario.model_copy(update={"model": model})
        self._folder = resolve(self._scenario.model.base)
        head = RatingHead(load_base(self._folder), self._scenario)
        self._start = make_start(head, public, ridge=self._scenario.adapter.whitening_ridge, seed=0)
        self._shared = read_shared(head)

    def rounds(self, clients: list[tuple[Record, ...]]) -> float:
        """CPU-seconds of a round of some clients."""
        began = time.process_time()
        for records in clients:
            self.round(records)
        return time.process_time() - began

    def round(self, records: tuple[Record, ...]) -> Arrays:
        """Load, wrap, train all layers on padded texts, return the change."""
        base = load_base(self._folder)
        head = RatingHead(base, self._scenario)
        load_start(head, self._start)
        load_shared(head, self._shared)
        ids = base.tokenize([record.text for record in records], max_tokens=64)
        longest = max(map(len, ids))
        token_ids = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        mask = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in ids])
        module = GradSampleModule(AllLayers(head.train()), loss_reduction="sum")
        optimizer = DPOptimizer(
            torch.optim.SGD(list(shared_parameters(head).values()), lr=self._policy.learning_rate),
            noise_multiplier=self._policy.noise_multiplier,
            max_grad_norm=self._policy.clip_norm,
            expected_batch_size=self._policy.denominator,
        )
        targets = torch.tensor([record.target for record in records])
        with quiet_hooks():
            (0.5 * (module(token_ids, mask) - targets).square().sum()).backward()
        optimizer.step()
        return {name: after - self._shared[name] for name, after in read_shared(head).items()}


def echo(message: Message, context: Context) -> Message:
    """A device that does nothing: what is left is the engine."""
    del context
    return Message(message.content, reply_to=message)


def _measure_engines(devices: int, *, quiet: bool) -> tuple[dict[str, Any], dict[str, float]]:
    """Milliseconds an engine takes for one request and its reply of 8 kB, and seconds until it is up."""
    content = wire.pack_reply({"a": np.zeros(_ECHO_VALUES, np.float32)}, round_number=1, policy_sha256="0" * 64)
    found: dict[str, list[float]] = {"inline": [], "ray": []}
    up: dict[str, float] = {}

    def timed(name: str) -> Callable[[Metered], None]:
        began = time.perf_counter()

        def main(grid: Metered) -> None:
            nodes = sorted(grid.get_node_ids())
            while len(nodes) < devices:
                time.sleep(0.1)
                nodes = sorted(grid.get_node_ids())
            one = Message(content, dst_node_id=nodes[0], message_type="train", ttl=600.0)
            list(grid.send_and_receive([one], timeout=600.0))
            up[f"engine {name}"] = time.perf_counter() - began
            for _ in range(_ROUNDS_OF_ECHO):
                messages = [Message(content, dst_node_id=n, message_type="train", ttl=600.0) for n in nodes]
                started = time.perf_counter()
                replies = list(grid.send_and_receive(messages, timeout=600.0))
                found[name].append(1000 * (time.perf_counter() - started) / len(replies))

        return main

    with progress(total=2, description="engines", unit="engine", quiet=quiet) as bar:
        run_inline(timed("inline"), echo, devices=devices, run_config={})
        bar.update(1)
        run_ray(timed("ray"), echo, devices=devices, run_config={})
        bar.update(1)
    return {name: spread(each) for name, each in found.items()}, up


def _one_round(campaign: Campaign, devices: int, *, quiet: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of one round of every device on each engine, and of Ray with its start; peak memory of each in MiB."""
    seconds: dict[str, float] = {}
    peaks: dict[str, float] = {}

    def main(grid: Metered) -> None:
        roster = seats(grid, devices=devices)
        grid.on_reply = lambda: bar.update(1)
        began = time.perf_counter()
        run_rounds(grid, campaign, roster=roster, fatal=FATAL)
        seconds["round"] = time.perf_counter() - began
        peaks["largest worker of ray"] = max(map(_peak_mib, _ray_workers()), default=0.0)

    found: dict[str, float] = {}
    config: dict[str, Any] = {"campaigns": str(campaign.folder.parent)}
    with progress(total=2 * devices, description="one round of everybody", unit="device", quiet=quiet) as bar:
        for name, run in (("inline", run_inline), ("ray", run_ray)):
            began = time.perf_counter()
            run(main, client_app, devices=devices, run_config=config)
            found[f"{name}_round_s"] = seconds["round"]
            found[f"{name}_with_start_s"] = time.perf_counter() - began
            peaks.setdefault("inline", _peak_mib(os.getpid()))
            for checkpoint in (campaign.folder / "checkpoints").glob("round-*"):
                checkpoint.rename(checkpoint.with_name(f"{name}-{checkpoint.name}"))
    return found, peaks


def _ray_workers() -> list[int]:
    """Process ids of Flower's workers on this machine; Ray writes what they are into their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if path.read_bytes().startswith(b"ray::ClientAppActor"):
                found.append(int(path.parent.name))
    return found


def _peak_mib(pid: int) -> float:
    """The largest resident memory a process has had."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    [line] = [each for each in status.splitlines() if each.startswith("VmHWM:")]
    return int(line.split()[1]) / 1024


def lines(measured: dict[str, Any]) -> list[str]:
    """The measurements for a reader."""
    out = [f"{measured['mode']}; {measured['clients']} clients, {measured['rounds']} rounds"]
    for title, unit, values in (
        ("plain way over ours", "x", measured["ratios"]["plain_over_ours"]),
        ("CPU per client-round", "ms", measured["cpu_ms_per_client_round"]),
        ("engine per client-round", "ms", measured["engine_ms_per_client_round"]),
    ):
        out += spread_lines({f"{title}, {name}": each for name, each in values.items()}, unit=unit)
    for title, unit, values in (
        ("start-up", "s", measured["start_up_s"]),
        ("one round of everybody", "s", measured["one_round_of_everybody"]),
        ("peak memory", "MiB", measured["peak_rss_mib"]),
    ):
        out += [f"  {title + ', ' + name:<44} {value:9.2f} {unit}" for name, value in values.items()]
    return out
