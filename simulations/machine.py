"""What every measurement says of itself: machine, versions, commit; medians with their range; goals met or missed."""

import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


def about(*packages: str) -> dict[str, Any]:
    """Machine, Python, versions of packages, and the commit of the checkout (None where it is none)."""
    return {
        "machine": {
            "platform": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
            **_processor(),
        },
        "versions": {name: version(name) for name in packages},
        "commit": commit(),
    }


def _processor() -> dict[str, Any]:
    """What the processor calls itself, and those of its instructions that decide how fast products are."""
    try:
        said = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return {"processor": platform.processor()}
    told = dict(line.split(":", 1) for line in said.partition("\n\n")[0].splitlines() if ":" in line)
    found = {name.strip(): value.strip() for name, value in told.items()}
    able = set(found.get("flags", "").split())
    wide = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "avx512_vnni")
    return {"processor": found.get("model name", ""), "instructions": [name for name in wide if name in able]}


def commit() -> str | None:
    """The commit of the checkout the code runs from, None where it is none."""
    git = shutil.which("git")
    if git is None:
        return None
    root = Path(__file__).parent.parent
    found = subprocess.run([git, "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def spread_lines(values: Mapping[str, Mapping[str, float]], *, unit: str) -> list[str]:
    """Medians with their range for a reader, a line each."""
    return [
        f"  {name:<48} {each['median']:9.2f} {unit:<2} [{each['low']:.2f}, {each['high']:.2f}]"
        for name, each in values.items()
    ]


def goal(value: float, *, at_most: float | None = None, at_least: float | None = None) -> dict[str, float | bool]:
    """A value beside the limit it should keep; NaN keeps none.

    Example:
        >>> goal(2.0, at_least=3.0)
        {'value': 2.0, 'at_least': 3.0, 'met': False}
    """
    if at_most is not None:
        return {"value": value, "at_most": at_most, "met": value <= at_most}
    if at_least is not None:
        return {"value": value, "at_least": at_least, "met": value >= at_least}
    raise ValueError("a goal must have a limit, got none; give at_most or at_least.")


def goal_lines(goals: dict[str, dict[str, float | bool]]) -> list[str]:
    """Goals for a reader, those missed first."""
    out = []
    for name, each in sorted(goals.items(), key=lambda item: item[1]["met"]):
        bound = f"at most {each['at_most']:g}" if "at_most" in each else f"at least {each['at_least']:g}"
        out.append(f"  {'met   ' if each['met'] else 'MISSED'} {name:<58} {each['value']:10.4g}  ({bound})")
    return out
