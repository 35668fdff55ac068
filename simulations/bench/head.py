"""Time personal heads as devices run them: bytes, opening, swapping, answering, and importing, beside torch.

Heads are fitted to real records (simulations/bench/trained_heads.py). That the device's runtime answers as torch does
is checked first. Times are CPU-seconds of one thread (``time.process_time``); what is compared is interleaved, ratios
are taken within a round, and the median of the rounds is reported with its range.

A model with the LoRA merged into its weights is as large as the base, whose file stands for it.
"""

import gc
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from client.runtime.artifact import (
    ADAPTER,
    MODEL,
    check_binding,
    check_listed,
    check_slots,
    parse_adapter,
    read_file,
    read_manifest,
)
from client.runtime.language import LanguageBase
from client.runtime.runtime import identity
from client.training.site import use_threads
from shared.errors import CampaignError
from shared.progress import progress
from simulations.bench.timed_answers import Answers, over
from simulations.bench.trained_heads import EVERY_BLOCK, SHIPPED, Fleet, Trained, train
from simulations.machine import about, goal, goal_lines, spread

MODELS, LAYERS, PRECISIONS = ("minilm", "smollm2"), (SHIPPED, EVERY_BLOCK), ("fp32", "int8")
_SWAPS = 50  # per timing, so that some milliseconds are not lost in the clock
_SLOW_ROUNDS = 3  # at most, of what takes seconds and varies little: opening a base, exporting for a user
_MAX_ABS = {False: 1e-5, True: 1e-3}  # in fp32, of pooled features and of logits
_REL_RMS = {False: {False: 0.05, True: 0.05}, True: {False: 0.10, True: 0.20}}  # int8: language -> adapted -> limit
_ROOT = Path(__file__).parents[2]
_IMPORTS = {
    "base install": "import client.runtime.runtime, client.runtime.generation",
    "torch and transformers": "import torch; from transformers import BertModel, LlamaForCausalLM",
}
_IMPORTING = """\
import os, sys
{imports}
times = os.times()
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(times.user + times.system, int(status["VmRSS"].split()[0]) / 1024, "torch" in sys.modules)
"""


def measure(*, rounds: int = 5, models: Sequence[str] = MODELS, quiet: bool = False) -> dict[str, Any]:
    """Measure heads of MiniLM and SmolLM2, on the layers of the shipped scenarios and on every block.

    Args:
        rounds: How often everything is timed; opening and exporting at most three times.
        models: Some of ``MODELS``.

    Returns:
        ``heads.<model, layers>`` with bytes, parity and times by precision; ``imports``; ``goals`` with value, limit
        and whether it is met; machine, versions and commit.

    Raises:
        CampaignError: The runtime of the devices and torch disagree in fp32.
    """
    use_threads(1)
    heads: dict[str, Any] = {}
    with progress(total=4 * len(models) + 1, description="bench head", unit="part", quiet=quiet) as bar:
        imports = _measure_imports(rounds)
        bar.update(1)
        for model in models:
            for layers in LAYERS:
                trained = train(model, layers)
                with tempfile.TemporaryDirectory() as folder:
                    for precision in PRECISIONS:
                        trained.export(Path(folder) / precision, precision=precision)
                    bar.update(1)
                    heads[f"{model}, {layers}"] = _measure_head(trained, Path(folder), rounds)
                bar.update(1)
                del trained
                gc.collect()
    return {
        "mode": "one thread, CPU-seconds, interleaved; fp32 and 8-bit bases, adapters in fp32",
        "rounds": rounds,
        "heads": heads,
        "imports": imports,
        "goals": goals(heads, imports),
        **about("numpy", "onnxruntime", "onnxruntime-genai", "tokenizers", "torch", "transformers", "peft"),
    }


def _measure_head(trained: Trained, folder: Path, rounds: int) -> dict[str, Any]:
    """Everything of one head, in both precisions."""
    fleets = {precision: trained.open(folder / precision) for precision in PRECISIONS}
    files = {precision: trained.build(fleet) for precision, fleet in fleets.items()}
    adapters = {precision: take(files[precision], fleet) for precision, fleet in fleets.items()}
    found: dict[str, Any] = {
        "adapter_bytes": len(files["fp32"][ADAPTER]),
        "head_bytes": {precision: sum(map(len, each.values())) for precision, each in files.items()},
        "base_bytes": {precision: (folder / precision / MODEL).stat().st_size for precision in PRECISIONS},
        "parity": {precision: compare(trained, fleets[precision], adapters[precision]) for precision in PRECISIONS},
    }
    found |= Answers(trained, fleets, adapters).measure(rounds)
    few = min(rounds, _SLOW_ROUNDS)
    found["opening"] = {p: _measure_opening(trained, folder / p, files[p], fleets[p], few) for p in PRECISIONS}
    found["export_for_a_user_s"] = {p: _both_clocks(partial(trained.build, fleets[p]), few) for p in PRECISIONS}
    return found


def take(files: dict[str, bytes], fleet: Fleet) -> dict[str, np.ndarray]:
    """What swapping to another user's head takes: its tensors, checked, for the next run of an opened base."""
    place = Path("head in memory")
    manifest = read_manifest(files, "lm-adapter" if isinstance(fleet, LanguageBase) else "adapter")
    check_binding(place, manifest, identity(fleet))
    adapter = parse_adapter(place, read_file(files, manifest, ADAPTER))
    check_listed(place, manifest, adapter)
    check_slots(place, adapter, fleet.slots)
    return adapter


def compare(trained: Trained, fleet: Fleet, adapter: dict[str, np.ndarray]) -> dict[str, Any]:
    """How far the device's runtime is from torch on real texts, with and without the adapter.

    ``same_first`` is the share of positions with the same likeliest token, or of texts with the same nearest other.

    Raises:
        CampaignError: In fp32 a value is further off than it may be.
    """
    found: dict[str, Any] = {"texts": len(trained.texts)}
    for adapted in (False, True):
        ours = trained.found(fleet, adapter if adapted else {})
        wanted = trained.outputs(adapted=adapted)
        measured = distance(ours, wanted)
        first = [_first(each, trained.language) for each in (ours, wanted)]
        measured["same_first"] = float(np.mean(first[0] == first[1]))
        if fleet.precision == "fp32" and not measured["max_abs"] <= _MAX_ABS[trained.language]:
            raise CampaignError(
                f"onnxruntime and torch must agree to {_MAX_ABS[trained.language]}, they differ by "
                f"{measured['max_abs']:.1e}."
            )
        found["adapted" if adapted else "bare"] = measured
    return found


def distance(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> dict[str, float]:
    """Largest difference, and the root mean square of all over that of the values wanted.

    Example:
        >>> found = distance([np.array([3.0, 4.5])], [np.array([3.0, 4.0])])
        >>> found["max_abs"], round(found["rel_rms"], 3)
        (0.5, 0.1)
    """
    largest = squares = size = 0.0
    for ours, theirs in zip(found, wanted, strict=True):
        off, reference = ours.astype(np.float64) - theirs, theirs.astype(np.float64)
        largest = float(np.maximum(largest, np.abs(off).max()))  # keeps NaN
        squares += float(np.vdot(off, off))
        size += float(np.vdot(reference, reference))
    return {"max_abs": largest, "rel_rms": (squares / size) ** 0.5}


def _first(outputs: Sequence[np.ndarray], language: bool) -> np.ndarray:
    if language:
        return np.concatenate([logits.argmax(1) for logits in outputs])
    pooled = np.stack(outputs)
    alike = pooled @ pooled.T / np.outer(*[np.linalg.norm(pooled, axis=1)] * 2)
    np.fill_diagonal(alike, -np.inf)
    nearest: np.ndarray = alike.argmax(1)
    return nearest


def _measure_opening(
    trained: Trained, folder: Path, files: dict[str, bytes], fleet: Fleet, rounds: int
) -> dict[str, Any]:
    """CPU-milliseconds to open the base, to swap to another head on it, and to open a head with its known answer."""

    def swaps() -> None:
        for _ in range(_SWAPS):
            take(files, fleet)

    times = {"load": [], "swap": [], "open_head": []}  # type: dict[str, list[float]]
    for _ in range(rounds):
        times["load"].append(_cpu_ms(lambda: trained.open(folder)))
        times["swap"].append(_cpu_ms(swaps) / _SWAPS)
        times["open_head"].append(_cpu_ms(lambda: trained.bind(files, fleet)))
    return {
        "cpu_ms": {name: spread(each) for name, each in times.items()},
        "swap_over_load": spread(over(times["swap"], times["load"])),
    }


def _cpu_ms(call: Callable[[], object]) -> float:
    began = time.process_time()
    call()
    return 1000 * (time.process_time() - began)


def _both_clocks(call: Callable[[], object], rounds: int) -> dict[str, Any]:
    wall, cpu = [], []
    for _ in range(rounds):
        started, began = time.perf_counter(), time.process_time()
        call()
        wall.append(time.perf_counter() - started)
        cpu.append(time.process_time() - began)
    return {"wall": spread(wall), "cpu": spread(cpu)}


def _measure_imports(rounds: int) -> dict[str, Any]:
    """CPU-seconds and resident MiB of a new Python that imports the runtime of devices, or torch and transformers.

    Raises:
        CampaignError: The runtime of devices imports torch.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in _IMPORTS}
    for number in range(rounds + 1):
        for name, imports in _IMPORTS.items():
            seconds, mib, torch_too = _run(_IMPORTING.format(imports=imports))
            if name == "base install" and torch_too == "True":
                raise CampaignError("the runtime of devices must not import torch, it does.")
            if number:  # the first one compiles
                found[name].append((float(seconds), float(mib)))
    ours, theirs = (list(zip(*found[name], strict=True)) for name in _IMPORTS)
    return {
        "cpu_s": {name: spread([each[0] for each in values]) for name, values in found.items()},
        "rss_mib": {name: spread([each[1] for each in values]) for name, values in found.items()},
        "cpu_over_torch": spread(over(ours[0], theirs[0])),
        "rss_over_torch": spread(over(ours[1], theirs[1])),
    }


def _run(program: str) -> list[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=_ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def goals(heads: dict[str, Any], imports: dict[str, Any]) -> dict[str, Any]:
    """What was hoped for, beside what was found; medians."""
    found: dict[str, Any] = {
        "import, CPU over torch and transformers": goal(imports["cpu_over_torch"]["median"], at_most=1 / 10),
        "import, memory over torch and transformers": goal(imports["rss_over_torch"]["median"], at_most=1 / 3),
    }
    for name, head in heads.items():
        language = "over_torch" in head
        for precision in PRECISIONS:
            at = f"{name}, {precision}"
            size = head["head_bytes"][precision] / head["base_bytes"][precision]
            found[f"{at}: bytes over a merged model"] = goal(size, at_most=1 / 100)
            swap = head["opening"][precision]["swap_over_load"]["median"]
            found[f"{at}: swap over load"] = goal(swap, at_most=1 / 100)
            overhead = head["adapted_over_bare"][precision]["median"] - 1
            found[f"{at}: what the adapter adds"] = goal(overhead, at_most=0.15 if language else 0.10)
            for clock, seconds in head["export_for_a_user_s"][precision].items():
                found[f"{at}: export for a user, s {clock}"] = goal(seconds["median"], at_most=1.0)
            if language:
                speed = head["over_torch"][precision]["median"]
                found[f"{at}: tokens over torch's"] = goal(speed, at_least=3.0 if precision == "int8" else 1.5)
            for state in ("bare", "adapted"):
                parity = head["parity"][precision][state]
                if precision == "fp32":
                    found[f"{at}: largest difference, {state}"] = goal(parity["max_abs"], at_most=_MAX_ABS[language])
                else:
                    limit = _REL_RMS[language][state == "adapted"]
                    found[f"{at}: relative rms, {state}"] = goal(parity["rel_rms"], at_most=limit)
    return found


def lines(measured: dict[str, Any]) -> list[str]:
    """The measurements for a reader."""
    out = [f"{measured['mode']}; {measured['rounds']} rounds"]
    for name, head in measured["heads"].items():
        out.append(f"{name}: adapter {head['adapter_bytes']:,} bytes")
        for precision, opening in head["opening"].items():
            sizes = f"head {head['head_bytes'][precision]:,} bytes, base {head['base_bytes'][precision]:,}"
            took = ", ".join(f"{what} {v['median']:.2f}" for what, v in opening["cpu_ms"].items())
            out.append(f"  {precision}: {sizes}; ms: {took}")
        for key, unit in (
            ("tokens_per_cpu_s", "tokens/CPU-s"),
            ("prompt_cpu_ms", "ms prompt"),
            ("cpu_ms_per_text", "ms"),
        ):
            out += [
                f"  {state:<44} {v['median']:9.2f} {unit}  [{v['low']:.2f}, {v['high']:.2f}]"
                for state, v in head.get(key, {}).items()
            ]
    for name, v in (measured["imports"]["cpu_s"]).items():
        out.append(f"import {name}: {v['median']:.2f} CPU-s, {measured['imports']['rss_mib'][name]['median']:.0f} MiB")
    return [*out, "goals:", *goal_lines(measured["goals"])]
