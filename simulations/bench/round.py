"""Time rounds of a federation beside another framework's: the same linear head, users, steps, clipping and noise.

pfl needs a version of an accountant that ours excludes, so it runs in a virtual environment of its own, which this
command makes where it may. Arrays after rounds with clipping and without noise are compared before anything is timed.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs

from client.app import app as client_app
from client.training.site import TextFeatures, resident_base, resident_dataset, use_threads
from server.app import run_rounds
from shared.config import FederationConfig, PrivacyConfig, Scenario, TrainingConfig
from shared.datasets import Dataset
from shared.errors import CampaignError
from shared.flower.grid import Metered, run_inline, seats
from shared.heads.adapter import load_start
from shared.models.model import Base
from shared.privacy.noise import Randomness, SeededRandomness
from shared.progress import progress
from shared.protocol.campaign import Campaign
from simulations.bench.simulate import _publish
from simulations.bench.step import Silent
from simulations.campaigns import FATAL
from simulations.machine import about, spread

PINS = ("pfl[pytorch]==0.6.0", "torch>=2.13,<2.14")
_ROUNDS = 5  # in one timing
_PATIENCE_S = 1800  # with rounds that take seconds
_RATE = 2.0  # of the server: a plain step along the mean
_SAME = 1e-4  # relative distance of the arrays after the rounds; ours are rounded to a policy's grid


def measure(
    *, rounds: int = 5, quiet: bool = False, install: bool = False, data: Dataset | None = None
) -> dict[str, Any]:
    """Measure rounds of every user of MovieLens 100k with a linear head on MiniLM's features, users protected.

    Args:
        rounds: How often each framework is timed, interleaved.
        quiet: No progress on stderr.
        install: Make the other framework's environment where it is not there: a virtual environment in the user's cache
            folder, filled by pip, which looks where its own configuration says (about 1 GB with a CPU build of torch).
        data: Other users than those of MovieLens.

    Returns:
        ``cpu_ms_per_user`` and ``wall_ms_per_user`` of a round by framework, ``over_pfl`` in each round,
        ``bytes_per_user`` of our messages in a round, ``answers_differ``, users, machine, versions and commit.

    Raises:
        CampaignError: The environment is not there or could not be made, or the answers differ.
    """
    python = environment(install=install)
    use_threads(1)
    scenario = _of_rounds(Scenario(name="bench-round"))
    base, dataset = resident_base(scenario.model.base), data or resident_dataset(scenario.data)
    found: dict[str, dict[str, list[float]]] = {name: {"cpu": [], "wall": []} for name in ("sottovoce", "pfl")}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        campaign = _publish(scenario, base, dataset, folder / "campaign")
        task = _task(campaign, base, dataset)
        apart = _distance(
            _ours(campaign, len(dataset.users), Silent()).weight, _theirs(python, task, folder, noise=0.0).weight
        )
        if not apart <= _SAME:
            raise CampaignError(
                f"ours and pfl's arrays must agree to {_SAME}, they differ by {apart:.1e}; nothing was timed."
            )
        with progress(total=rounds, description="bench round", unit="round", quiet=quiet) as bar:
            for number in range(rounds):
                seeded = SeededRandomness(seed=number, campaign="bench", device=0, round_number=0)
                ours = _ours(campaign, len(dataset.users), seeded)
                theirs = _theirs(python, task, folder, noise=campaign.policy.noise_multiplier)
                for name, one in (("sottovoce", ours), ("pfl", theirs)):
                    found[name]["cpu"].append(one.cpu_s)
                    found[name]["wall"].append(one.wall_s)
                bar.update(1)
    each = 1000 / (_ROUNDS * len(dataset.users))
    ratios = [x / y for x, y in zip(found["sottovoce"]["cpu"], found["pfl"]["cpu"], strict=True)]
    said = about("flwr", "torch", "opacus", "numpy")
    said["versions"]["pfl"] = theirs.version
    return {
        "mode": "one thread, interleaved; a linear head, one step a device, changes clipped, noise at the server",
        "users": len(dataset.users),
        "values": len(task["start"]),
        "rounds": rounds,
        "cpu_ms_per_user": {name: spread([each * s for s in times["cpu"]]) for name, times in found.items()},
        "wall_ms_per_user": {name: spread([each * s for s in times["wall"]]) for name, times in found.items()},
        "over_pfl": spread(ratios),
        "bytes_per_user": ours.bytes_each,
        "answers_differ": apart,
        **said,
    }


def environment(*, install: bool) -> Path:
    """The Python of pfl's environment.

    Raises:
        CampaignError: It is not there and may not be made, or pip failed.
    """
    folder = platformdirs.user_cache_path("sottovoce") / "environments" / PINS[0].replace("[pytorch]==", "-")
    python, done = folder / "bin" / "python", folder / "done"
    if python.is_file() and done.is_file() and done.read_text(encoding="utf-8").split("\n") == list(PINS):
        return python
    if not install:
        raise CampaignError(f"{folder} must hold an environment with {PINS[0]}, it does not; make it with --install.")
    make = [sys.executable, "-m", "venv", "--clear", str(folder)]
    fill = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PINS]
    for command in (make, fill):
        ran = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        if ran.returncode:
            said = (ran.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise CampaignError(f"{' '.join(command[1:4])} must succeed in {folder}, got: {said}")
    done.write_text("\n".join(PINS), encoding="utf-8")
    return python


@dataclass(frozen=True)
class _Ran:
    """Some rounds: shared weight (p,) afterwards, and what they took."""

    weight: np.ndarray
    cpu_s: float
    wall_s: float
    bytes_each: float = 0.0
    version: str = ""


def _of_rounds(scenario: Scenario) -> Scenario:
    """The same data and base with a linear head, one step a device, and the server's plain step along the mean."""
    federation = FederationConfig(
        method="fedavg", rounds=_ROUNDS, server_optimizer="momentum", server_momentum=0.0, server_learning_rate=_RATE
    )
    tables: dict[str, Any] = {
        "model": scenario.model.model_copy(update={"head_blocks": 0}),
        "federation": federation,
        "training": TrainingConfig(steps=1),
        "privacy": PrivacyConfig(trust="central", unit="user", max_participations=_ROUNDS),
        "linear": scenario.linear.model_copy(update={"enabled": False}),
    }
    return scenario.model_copy(update=tables)


def _task(campaign: Campaign, base: Base, dataset: Dataset) -> dict[str, Any]:
    """What pfl is given: what our head reads of every record, and the policy's constants."""
    scenario, policy = campaign.scenario, campaign.policy
    head = campaign.new_head(base)
    load_start(head, campaign.start)
    texts = TextFeatures(base, scenario, dataset)
    parts = [head.prepare(texts.of(user.fit)) for user in dataset.users]
    counts = np.array([len(user.fit) for user in dataset.users])
    [slot] = policy.array_slots()
    return {
        "x": np.concatenate([part.batch(range(len(part)))[0][:, 0].numpy() for part in parts]),
        "y": np.array([record.target for user in dataset.users for record in user.fit], dtype=np.float32),
        "counts": counts,
        "divisors": np.maximum(counts, 1) ** policy.record_exponent,
        "start": campaign.start[slot.name].ravel().astype(np.float32),
        "centre": scenario.task.centre,
        "rounds": _ROUNDS,
        "learning_rate": policy.learning_rate,
        "server_learning_rate": scenario.federation.server_learning_rate,
        "clip_norm": policy.clip_norm,
    }


def _ours(campaign: Campaign, devices: int, noise: Randomness) -> _Ran:
    """The rounds over the engine ``inline``: the devices' own code and the server's, every message serialised."""
    found: list[_Ran] = []
    shutil.rmtree(campaign.folder / "checkpoints", ignore_errors=True)  # of the rounds before

    def main(grid: Metered) -> None:
        roster = seats(grid, devices=devices)
        wall, cpu = time.perf_counter(), time.process_time()
        last = run_rounds(grid, campaign, roster=roster, fatal=FATAL, noise=lambda _: noise)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        [weight] = last.arrays.values()
        traffic = (grid.bytes_up + grid.bytes_down) / (devices * _ROUNDS)
        found.append(_Ran(weight.ravel(), cpu, wall, traffic))

    run_inline(main, client_app, devices=devices, run_config={"campaigns": str(campaign.folder.parent)})
    return found[0]


def _theirs(python: Path, task: dict[str, Any], folder: Path, *, noise: float) -> _Ran:
    np.savez(folder / "task.npz", noise_multiplier=noise, **task)
    script = Path(__file__).with_name("round_pfl.py")
    command = [str(python), "-I", str(script), str(folder / "task.npz"), str(folder / "result.npz")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PATIENCE_S)
    if ran.returncode:
        raise CampaignError(f"pfl must run its rounds, got: {(ran.stderr.strip().splitlines() or ['nothing'])[-1]}")
    with np.load(folder / "result.npz") as got:
        return _Ran(got["weight"], float(got["cpu_s"]), float(got["wall_s"]), version=str(got["version"]))


def _distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def lines(measured: dict[str, Any]) -> list[str]:
    """The measurements for a reader."""
    out = [f"{measured['mode']}; {measured['users']} users, {measured['values']} values"]
    for name, each in measured["cpu_ms_per_user"].items():
        wall = measured["wall_ms_per_user"][name]
        out.append(
            f"  {name:<12}{each['median']:8.3f} ms of CPU a user and round [{each['low']:.3f}, {each['high']:.3f}], "
            f"{wall['median']:.3f} ms of wall"
        )
    ratio = measured["over_pfl"]
    out.append(f"  sottovoce over pfl {ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]")
    return [*out, f"  answers differ by {measured['answers_differ']:.1e}"]
