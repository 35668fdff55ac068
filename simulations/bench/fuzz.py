"""Give every parser of what comes from elsewhere thousands of hostile inputs, and count what becomes of them.

The inputs are those of ``tests/test_fuzz_parsers.py``: valid ones with edits that know their form. Each parser has a
process of its own, with a bound on its memory, so that what kills or stalls a parser is counted and not suffered.
"""

import base64
import logging
import multiprocessing
import random
import resource
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from shared.errors import ScenarioError
from shared.progress import progress
from simulations.fuzz.mutations import draw_edits
from simulations.fuzz.parsers import Parser, Target, attempt, draw_seed, make_input
from simulations.machine import about

MEMORY_BYTES = 3 * 2**30  # of address space beyond what a process has when its parser is ready
_STALLED_S = 60.0
_SHOWN_BYTES = 4096  # of an input that made trouble
_MOST_PROBLEMS = 20  # of one parser
_PRELOADED = "simulations.fuzz.targets"
_ROOM = "/dev/shm"  # in memory: the disk is not what is tested


def measure(*, rounds: int = 5, only: Sequence[str] = (), seed: int = 0, quiet: bool = False) -> dict[str, Any]:
    """Fuzz every parser.

    Args:
        rounds: Seconds for each of them.
        only: Names of parsers, or parts of names; all by default.
        seed: Of the inputs: the same inputs in the same order, though not as many on a slower machine.
        quiet: Show no progress.

    Returns:
        ``parsers.<name>`` with ``source``, ``inputs``, ``taken``, ``refused`` by kind, ``problems``, ``slowest_ms`` and
        ``grown_mib``; ``inputs`` and ``problems`` in all; machine, versions, commit.

    Raises:
        ScenarioError: No parser is called so.
    """
    from simulations.fuzz.targets import TARGETS

    names = [name for name in TARGETS if not only or any(part in name for part in only)]
    if not names:
        raise ScenarioError(f"a parser's name must hold one of {list(only)}, none does.")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_PRELOADED])
    found: dict[str, dict[str, Any]] = {}
    with progress(total=len(names), description="bench fuzz", unit="parser", quiet=quiet) as bar:
        for name in names:
            found[name] = {"source": TARGETS[name].source, **_fuzzed(context, name, rounds, seed)}
            bar.update(1)
    return {
        "seconds": rounds,
        "seed": seed,
        "inputs": sum(each["inputs"] for each in found.values()),
        "problems": sum(len(each["problems"]) for each in found.values()),
        "parsers": found,
        **about("cryptography", "flwr", "numpy", "onnxruntime", "pydantic", "safetensors"),
    }


def inputs(target: Target, parser: Parser, seed: int) -> Iterator[bytes]:
    """Hostile inputs without end, the same for the same seed."""
    draw = random.Random(seed)
    while True:
        chosen, edits = draw_seed(draw), draw_edits(draw)
        yield make_input(parser, target.form, seed=chosen, edits=edits)


def _fuzzed(context: Any, name: str, seconds: float, seed: int) -> dict[str, Any]:
    """What a process found; where it died, what killed it."""
    ours, theirs = context.Pipe(duplex=False)
    number = context.Value("Q", 0)
    child = context.Process(target=_child, args=(name, seconds, seed, number, theirs), daemon=True)
    child.start()
    theirs.close()
    try:
        return _waited(child, ours, number)
    except EOFError:
        child.join(5)
        return _counts(number.value, [f"input {number.value} of seed {seed}: the process ended, {child.exitcode}"])
    finally:
        if child.is_alive():
            child.kill()
        child.join()
        ours.close()


def _waited(child: Any, ours: Connection, number: Any) -> dict[str, Any]:
    last, since = -1, time.monotonic()
    while not ours.poll(0.5):
        if number.value != last:
            last, since = number.value, time.monotonic()
        elif number.value and time.monotonic() - since > _STALLED_S:
            return _counts(last, [f"input {last}: it took more than {_STALLED_S:g} s"])
    found: dict[str, Any] = ours.recv()
    child.join(_STALLED_S)  # it has a folder to remove
    return found


def _counts(number: int, problems: list[str]) -> dict[str, Any]:
    return {
        "inputs": number,
        "taken": 0,
        "refused": {},
        "problems": [{"what": what, "input": None} for what in problems],
        "slowest_ms": None,
        "grown_mib": None,
    }


def _child(name: str, seconds: float, seed: int, number: Any, out: Connection) -> None:
    """Runs in a process of its own: attempts until the time is over, then says what it counted."""
    from simulations.fuzz.targets import TARGETS

    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    target, room = TARGETS[name], _ROOM if Path(_ROOM).is_dir() else None
    taken, slowest, problems, refused = 0, 0.0, dict[str, bytes](), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="sottovoce-fuzz-", dir=room) as folder:
        parser = target.open(Path(folder))
        for valid in parser.seeds:
            outcome = attempt(target, parser, valid)
            if outcome.refused or outcome.problem:
                problems[f"a valid input: {outcome.refused or outcome.problem}"] = valid
        before, until = _bounded(), time.monotonic() + seconds
        for content in inputs(target, parser, seed):
            if time.monotonic() > until or len(problems) >= _MOST_PROBLEMS:
                break
            number.value += 1
            outcome = attempt(target, parser, content)
            slowest = max(slowest, outcome.seconds)
            taken += outcome.refused is None and outcome.problem is None
            if outcome.refused:
                refused[outcome.refused] += 1
            if outcome.problem:
                problems.setdefault(outcome.problem, content)
        out.send(
            {
                "inputs": number.value,
                "taken": taken,
                "refused": dict(refused.most_common()),
                "problems": [
                    {"what": what, "input": base64.b64encode(content[:_SHOWN_BYTES]).decode()}
                    for what, content in problems.items()
                ],
                "slowest_ms": 1000 * slowest,
                "grown_mib": (_peak_bytes() - before) / 2**20,
            }
        )


def _bounded() -> int:
    """Bound the address space of this process; gives its largest memory so far."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = now + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    return _peak_bytes()


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def lines(measured: dict[str, Any]) -> list[str]:
    """The measurement for a reader."""
    out = [f"{'parser':<44} {'inputs':>8} {'taken':>8} {'refused':>8} {'slowest':>9} {'grown':>8}  problems"]
    for name, each in measured["parsers"].items():
        slowest = "" if each["slowest_ms"] is None else f"{each['slowest_ms']:.0f} ms"
        grown = "" if each["grown_mib"] is None else f"{each['grown_mib']:.0f} MiB"
        refused = sum(each["refused"].values())
        out.append(
            f"{name:<44} {each['inputs']:>8,} {each['taken']:>8,} {refused:>8,} {slowest:>9} {grown:>8}  "
            f"{len(each['problems']) or 'none'}"
        )
        out += [f"    {problem['what']}" for problem in each["problems"]]
    sources = sorted({each["source"] for each in measured["parsers"].values()})
    out.append(
        f"{measured['inputs']:,} inputs to {len(measured['parsers'])} parsers (written by: {', '.join(sources)}), "
        f"{measured['seconds']} s each: {measured['problems'] or 'no'} problems"
    )
    return out
