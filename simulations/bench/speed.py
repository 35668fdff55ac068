"""Time how fast a private step is: against plain Opacus over all layers, against none at all, against the machine.

Measured as in ``bench_step``: CPU-seconds of one thread, variants interleaved, ratios within a round; before any of
them is timed, its answer without noise is compared with plain Opacus' or with float32. One round of everybody is wall
time of the engine ``inline``, one process.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from client.app import app as client_app
from client.training.site import resident_base, resident_dataset, use_threads
from client.training.train import make_trainable
from server.app import run_rounds
from shared.config import PerformanceConfig, Scenario, load_scenario
from shared.errors import CampaignError
from shared.flower.grid import Metered, run_inline, seats
from shared.heads.adapter import read_shared
from shared.models.model import Base
from shared.models.products import Frozen, Precision, multiplies_bfloat16, uses_onednn
from shared.progress import progress
from simulations.bench.language import _SCENARIO, _Device
from simulations.bench.peak import peak_mib
from simulations.bench.simulate import _average, _publish, _small
from simulations.bench.step import Silent, _Prepared, _with, distance, pad, plain_step
from simulations.campaigns import FATAL
from simulations.machine import about, goal, goal_lines, spread, spread_lines

_TOLERANCES: dict[str, float] = {"fp32": 1e-4, "mixed": 3e-2}  # of a clipped sum, relative
_LANGUAGE_TOLERANCES: dict[str, float] = {"fp32": 5e-3, "mixed": 0.15}  # thirty blocks, drawn LoRA factors
_LANGUAGE_RECORDS = 16
_SIZE = 1024  # rows of the products that measure the machine
_STEPS = 4  # of a cached step in one timing


def measure(*, rounds: int = 5, quiet: bool = False, language: bool = True) -> dict[str, Any]:
    """Measure the targets of speed on MovieLens 100k with MiniLM, and on SmolLM2.

    Args:
        rounds: How often every variant is timed.
        quiet: No progress on stderr.
        language: Whether SmolLM2 is measured too, which takes most of the time.

    Returns:
        ``goals``, ``ratios``, ``cpu_ms_per_step``, ``gemm_gflops``, ``one_round_of_everybody_s``,
        ``smollm2_step_peak_mib`` (beyond what stood before the step), what was compared, machine, versions and commit.

    Raises:
        CampaignError: A variant's answer is further off than its precision allows.
    """
    use_threads(1)
    scenario = Scenario(name="bench-speed")
    base, dataset = resident_base(scenario.model.base), resident_dataset(scenario.data)
    variants, differ = _encoder(scenario, base, dataset)
    if language:
        more, apart = _language()
        variants, differ = variants | more, differ | apart
    peak = gemm_gflops()
    times: dict[str, list[float]] = {name: [] for name in variants}
    with progress(total=rounds, description="bench speed", unit="round", quiet=quiet) as bar:
        for run in variants.values():
            run()  # warm-up
        for _ in range(rounds):
            for name, run in variants.items():
                times[name].append(run())
            bar.update(1)
    pairs = {name: pair for name, pair in _PAIRS.items() if pair[0] in times}
    ratios = {name: spread([x / y for x, y in zip(times[a], times[b], strict=True)]) for name, (a, b) in pairs.items()}
    everybody = _one_round(scenario, base, dataset)
    ways = ("opacus", "fp32", "mixed") if language else ()
    peaks = {name: peak_mib("simulations.bench.speed:language_step", name) for name in ways}
    goals = {name: goal(ratios[name]["median"], **limit) for name, limit in _GOALS.items() if name in ratios}
    goals["one_round_of_943_users_s"] = goal(everybody, at_most=30.0)
    if peaks:
        goals["smollm2_step_memory_of_opacus"] = goal(max(peaks["fp32"], peaks["mixed"]) / peaks["opacus"], at_most=0.5)
    tokens = int(sum(map(len, base.tokenize([r.text for r in _average(dataset)], max_tokens=64))))
    needed = 1e-9 * tokens * 2 * 2 * sum(p.numel() for b in base.family.blocks(base.model) for p in _matrices(b))
    fractions = {
        f"minilm_all_{kind}": needed / (float(np.median(times[f"minilm_all_{kind}"])) * peak[kind])
        for kind in ("fp32", "mixed")
    }
    return {
        "mode": "one thread, CPU-seconds, interleaved; the round of everybody in wall time, one process",
        "rounds": rounds,
        "ratios": ratios,
        "goals": goals,
        "cpu_ms_per_step": {name: spread([1000 * s for s in each]) for name, each in times.items()},
        "gemm_gflops": peak,
        "fraction_of_gemm_peak": fractions,
        "one_round_of_everybody_s": everybody,
        "smollm2_step_peak_mib": peaks,
        "answers_differ": differ,
        "processor": {
            "name": str(torch.cpu.get_capabilities().get("cpu_name", "unknown")),
            "multiplies_bfloat16": multiplies_bfloat16(),
            "float32_by_onednn": uses_onednn(),
        },
        **about("torch", "opacus", "peft", "transformers"),
    }


_PAIRS = {
    "opacus_all_over_cached_fp32": ("opacus_all", "cached_fp32"),
    "opacus_all_over_cached_mixed": ("opacus_all", "cached_mixed"),
    "opacus_all_over_cached_ahead": ("opacus_all", "cached_ahead"),
    "opacus_all_over_minilm_all_fp32": ("opacus_all", "minilm_all_fp32"),
    "opacus_all_over_minilm_all_mixed": ("opacus_all", "minilm_all_mixed"),
    "dp_over_nonprivate_all_fp32": ("minilm_all_fp32", "minilm_all_nonprivate"),
    "dp_over_nonprivate_cached_ahead": ("cached_ahead", "cached_ahead_nonprivate"),
    "opacus_over_smollm2_all_fp32": ("opacus_smollm2", "smollm2_all_fp32"),
    "opacus_over_smollm2_all_mixed": ("opacus_smollm2", "smollm2_all_mixed"),
}
_GOALS: dict[str, dict[str, float]] = {
    "opacus_all_over_cached_mixed": {"at_least": 12.0},
    "opacus_all_over_cached_ahead": {"at_least": 12.0},
    "opacus_all_over_minilm_all_mixed": {"at_least": 2.0},
    "opacus_over_smollm2_all_mixed": {"at_least": 2.4},
    "dp_over_nonprivate_all_fp32": {"at_most": 1.05},
}


def _matrices(block: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in block.parameters() if parameter.ndim == 2]


def gemm_gflops() -> dict[str, float]:
    """What a large product reaches on one core: torch's float32, the one a step uses, bfloat16."""
    x, weight = torch.randn(_SIZE, 384), torch.randn(1536, 384)
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "torch_fp32": lambda: F.linear(x, weight),
        "fp32": lambda: Frozen(weight, precision="fp32").forward(x, None),
    }
    half, halves = x.bfloat16(), weight.bfloat16()
    ways["mixed"] = lambda: F.linear(half, halves)
    found = {}
    for name, way in ways.items():
        way()
        best = min(_seconds(way) for _ in range(15))
        found[name] = 2e-9 * _SIZE * 384 * 1536 / best
    return found


def _seconds(run: Callable[[], object]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def _encoder(scenario: Scenario, base: Base, dataset: Any) -> tuple[dict[str, Callable[[], float]], dict[str, float]]:
    """Steps of MiniLM on the records of an average device, and how far their answers are apart."""
    records = _average(dataset)
    every = base.num_blocks

    def ours(
        blocks: int, precision: Precision, *, trust: str = "local", ahead: bool = False, silent: bool = False
    ) -> Callable[[], Any]:
        at = _with(scenario, blocks=blocks, trust=trust)
        prepared = _Prepared(at, base, dataset, records, randomness=Silent() if silent else None)
        module = make_trainable(prepared.head, prepared.policy, precision=precision)
        if ahead:
            prepared.features = prepared.head.run_ahead(prepared.features)
        steps = 1 if silent or blocks == every else _STEPS
        if silent:
            return lambda: prepared.train(module, steps=1)
        return lambda: _seconds(lambda: prepared.train(module, steps=steps)) / steps

    def plain(*, noise_multiplier: float | None = None) -> tuple[_Prepared, Callable[[], None]]:
        prepared = _Prepared(_with(scenario, blocks=every, trust="local"), base, dataset, records)
        noise = prepared.policy.noise_multiplier if noise_multiplier is None else noise_multiplier
        return prepared, plain_step(prepared, *pad(prepared, base, records), noise_multiplier=noise)

    prepared, step = plain(noise_multiplier=0.0)
    step()
    wanted = {name: after - prepared.start[name] for name, after in read_shared(prepared.head).items()}
    cached = ours(1, "fp32", silent=True)()
    differ = {
        "minilm_all_fp32": distance(ours(every, "fp32", silent=True)(), wanted),
        "minilm_all_mixed": distance(ours(every, "mixed", silent=True)(), wanted),
        "cached_ahead_fp32": distance(ours(1, "fp32", ahead=True, silent=True)(), cached),
        "cached_mixed": distance(ours(1, "mixed", silent=True)(), cached),
    }
    _check(differ, _TOLERANCES)
    _, timed = plain()
    return {
        "opacus_all": lambda: _seconds(timed),
        "minilm_all_fp32": ours(every, "fp32"),
        "minilm_all_mixed": ours(every, "mixed"),
        "minilm_all_nonprivate": ours(every, "fp32", trust="none"),
        "cached_fp32": ours(1, "fp32"),
        "cached_mixed": ours(1, "mixed"),
        "cached_ahead": ours(1, "fp32", ahead=True),
        "cached_ahead_nonprivate": ours(1, "fp32", trust="none", ahead=True),
    }, differ


def _language() -> tuple[dict[str, Callable[[], float]], dict[str, float]]:
    """Steps of SmolLM2 over all layers, and how far their answers are from plain Opacus'."""
    scenario = load_scenario(_SCENARIO)
    base = resident_base(scenario.model.base)
    records = resident_dataset(scenario.data).users[0].fit[:_LANGUAGE_RECORDS]

    def device(precision: Precision) -> _Device:
        at = scenario.model_copy(update={"performance": PerformanceConfig(precision=precision)})
        return _Device(base, records, at, blocks=base.num_blocks)

    kinds: tuple[Precision, ...] = ("fp32", "mixed")
    wanted = device("fp32").plain(noise_multiplier=0.0)()
    differ = {f"smollm2_all_{kind}": distance(device(kind).ours(silent=True)(), wanted) for kind in kinds}
    _check(differ, _LANGUAGE_TOLERANCES)
    whole = device("fp32")
    steps = {f"smollm2_all_{kind}": device(kind).ours() for kind in kinds}
    steps["opacus_smollm2"] = whole.plain(noise_multiplier=whole.policy.noise_multiplier)
    return {name: lambda step=step: _seconds(step) for name, step in steps.items()}, differ  # type: ignore[misc]


def language_step(name: str) -> Callable[[], object]:
    """One step of SmolLM2 over all layers, for a process of its own: ``opacus``, ``fp32`` or ``mixed``."""
    use_threads(1)
    scenario = load_scenario(_SCENARIO)
    if name == "mixed":
        scenario = scenario.model_copy(update={"performance": PerformanceConfig(precision="mixed")})
    base = resident_base(scenario.model.base)
    records = resident_dataset(scenario.data).users[0].fit[:_LANGUAGE_RECORDS]
    device = _Device(base, records, scenario, blocks=base.num_blocks)
    return device.plain(noise_multiplier=device.policy.noise_multiplier) if name == "opacus" else device.ours()


def _check(differ: dict[str, float], tolerances: dict[str, float]) -> None:
    for name, apart in differ.items():
        allowed = tolerances[name.rsplit("_", 1)[1]]
        if not apart <= allowed:
            raise CampaignError(f"{name} must agree to {allowed}, it differs by {apart:.1e}; nothing was timed.")


def _one_round(scenario: Scenario, base: Base, dataset: Any) -> float:
    """Seconds of one round of every user, from the first request to the last reply; one process, one thread."""
    found: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        campaign = _publish(_small(scenario, 1), base, dataset, Path(folder))

        def main(grid: Metered) -> None:
            roster = seats(grid, devices=len(dataset.users))
            began = time.perf_counter()
            run_rounds(grid, campaign, roster=roster, fatal=FATAL)
            found.append(time.perf_counter() - began)

        config: dict[str, Any] = {"campaigns": str(campaign.folder.parent)}
        run_inline(main, client_app, devices=len(dataset.users), run_config=config)
    return found[0]


def lines(measured: dict[str, Any]) -> list[str]:
    """The measurements for a reader."""
    out = [f"{measured['mode']}; {measured['processor']['name']}, {measured['rounds']} rounds"]
    out += spread_lines(measured["cpu_ms_per_step"], unit="ms")
    out += spread_lines(measured["ratios"], unit="x")
    out += [f"  product, {name:<35} {value:9.0f} GFLOP/s" for name, value in measured["gemm_gflops"].items()]
    out += [f"  {name} reaches {value:.0%} of it" for name, value in measured["fraction_of_gemm_peak"].items()]
    out += [
        f"  a step of SmolLM2, {name:<31} {mib:7.0f} MiB at most"
        for name, mib in measured["smollm2_step_peak_mib"].items()
    ]
    out += [f"  one round of everybody {measured['one_round_of_everybody_s']:.1f} s"]
    out += [f"  {name} differs by {apart:.1e}" for name, apart in measured["answers_differ"].items()]
    return [*out, *goal_lines(measured["goals"])]
