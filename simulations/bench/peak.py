"""What one step takes of memory beyond what stood before it, each in a process of its own."""

import ctypes
import importlib
import subprocess
import sys
from pathlib import Path


def peak_mib(maker: str, name: str) -> float:
    """MiB by which a process's largest resident size goes up in one step, what its set-up took left out.

    Args:
        maker: ``module:function``; called with ``name`` in a new process, it gives the step to be taken.
        name: Of the way.

    Raises:
        subprocess.CalledProcessError: The process failed.
    """
    program = "import sys; from simulations.bench.peak import _print_peak; _print_peak(*sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", program, maker, name], capture_output=True, text=True, check=True)
    return float(done.stdout)


def _print_peak(maker: str, name: str) -> None:
    module, _, function = maker.partition(":")
    run = getattr(importlib.import_module(module), function)(name)
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # room that the set-up freed would hide what a step takes
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is of what follows
    before = resident_mib()
    run()
    sys.stdout.write(f"{resident_mib('VmHWM') - before:.1f}\n")


def resident_mib(name: str = "VmRSS") -> float:
    """MiB of this process as the kernel counts them: resident now, or ``VmHWM``, at most so far."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    [line] = [line for line in status.splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) / 1024
