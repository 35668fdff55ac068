"""Every benchmark with its own sizes, one after the other: each in a process of its own, into a file of its own."""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from shared.errors import CampaignError
from shared.files import write_atomically


def measure_all(kinds: Sequence[str], *, out: Path, install: bool = False) -> list[str]:
    """Measure, and go on where one fails.

    Args:
        kinds: As ``sottovoce bench`` names them.
        out: Folder for ``bench-KIND.json``; a file is whole or as it was before.
        install: Make the environment that ``round`` needs; without it, where there is none, ``round`` is left out.

    Returns:
        Those that failed; what they said went to stderr.
    """
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    for number, kind in enumerate(kinds, start=1):
        began = time.monotonic()
        command = [sys.executable, "-m", "sottovoce.cli", "bench", kind, "--json", "--quiet"]
        if kind == "round":
            from simulations.bench.round import environment  # which loads torch

            try:
                environment(install=install)
            except CampaignError as error:
                sys.stderr.write(f"{number} of {len(kinds)} {kind}: left out: {error}\n")
                continue
        done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
        path = out / f"bench-{kind}.json"
        if done.returncode:
            failed.append(kind)
        else:
            write_atomically(path, done.stdout)
        said = f"failed with exit code {done.returncode}" if done.returncode else str(path)
        sys.stderr.write(f"{number} of {len(kinds)} {kind}: {said}, {time.monotonic() - began:.0f} s\n")
    return failed
