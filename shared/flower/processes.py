"""Programs of Flower's that we start: quiet, with a folder of their own, and never left behind."""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = Path(sys.executable).parent

_STOP_S = 5.0
_PR_SET_PDEATHSIG = 1
_LOG_BYTES = 4 * 2**20
_LISTENS = "0A"


def flower_environment(folder: Path) -> dict[str, str]:
    """Our environment for a program of Flower's: its own folder, nobody called, nothing installed, no proxy."""
    return os.environ | {
        "PATH": f"{PROGRAMS}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "FLWR_HOME": str(folder),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }


def start(
    command: Sequence[str], *, environment: Mapping[str, str], folder: Path, log: Path
) -> "subprocess.Popen[bytes]":
    """Start a program that lies beside this Python, its output in a log, in a session of its own.

    The kernel ends it when the thread that started it ends, even if this process is killed.
    """
    with log.open("ab") as output:
        return subprocess.Popen(
            [str(PROGRAMS / command[0]), *command[1:]],
            env=dict(environment),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C reaches us alone, and we stop it
            preexec_fn=die_with_parent(),
        )


def stop(process: "subprocess.Popen[bytes]", *, patience_s: float = _STOP_S) -> None:
    """End a program: asked first, killed if it does not."""
    process.terminate()
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def running(
    command: Sequence[str], *, environment: Mapping[str, str], folder: Path, log: Path
) -> Iterator["subprocess.Popen[bytes]"]:
    """A program for the length of a block; see ``start``."""
    process = start(command, environment=environment, folder=folder, log=log)
    try:
        yield process
    finally:
        stop(process)


def die_with_parent() -> Callable[[], None]:
    """Have the kernel end a child when we are killed without a chance to do it."""
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def trim(log: Path, *, limit_bytes: int = _LOG_BYTES) -> None:
    """Keep what a running program writes bounded: a log that has grown too long becomes ``….1`` and begins anew."""
    if log.exists() and log.stat().st_size > limit_bytes:
        shutil.copyfile(log, log.with_name(f"{log.name}.1"))
        os.truncate(log, 0)  # it is appended to


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def is_ours(port: int) -> bool:
    """Whether a process of this user listens on a loopback port.

    A port that was free may be another user's by the time a program of ours tries to listen there.
    """
    address = f"0100007F:{port:04X}"  # as the kernel spells 127.0.0.1
    for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]:
        _, local, _, state, _, _, _, owner, *_ = line.split()
        if local == address and state == _LISTENS:
            return int(owner) == os.geteuid()
    return False
