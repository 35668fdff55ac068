"""Flower's SuperNode as a child: it speaks with the server, hands us tasks on loopback, and never outlives us.

It is told to start no program of its own; whoever takes its tasks shows a secret made anew at every start.
"""

import logging
import logging.handlers
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from client.private_files import private_folder, write_private
from shared.flower_tasks import StalledError, Task, Tasks
from shared.processes import free_port, is_ours, stop

STARTING, OFFLINE, ONLINE, NOT_ENROLLED, DISTRUSTED = "starting", "offline", "online", "not-enrolled", "distrusted"
WRONG_CLOCK = "wrong-clock"
WORDS = {
    OFFLINE: "the server cannot be reached; trying again",
    ONLINE: "connected to the server",
    NOT_ENROLLED: "the server does not know this device's key; ask its operator to run: sottovoce server enrol "
    "device.pub --name NAME (device.pub lies in your home), or it has not noticed yet that this device was away, which "
    "takes a minute; trying again",
    DISTRUSTED: "what answers at the server's address cannot prove to be that server (its certificate is not signed by "
    "your ca.crt, or is for another address); ask the operator for a new invitation; trying again",
    WRONG_CLOCK: "the server does not accept the time at which this device signs; set its clock (the server's may be "
    "wrong too); trying again",
}

_SECRET = "executor.secret"
_LOG_BYTES = 1_000_000
_BACK_OFF_S = 60.0
_STEADY_S = 60.0  # one that lived as long starts again at once
_REMEMBERED_S = 90.0  # a server refuses a device it thinks is still there, with the words it has for a stranger
_KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "PYTHONPATH", "LD_LIBRARY_PATH", "HTTPS_PROXY", "https_proxy")
_SIGNS = {  # in what it logs
    "SuperNode ID:": ONLINE,
    "Connection successful": ONLINE,
    "Connection attempt failed": OFFLINE,
    "SSL/TLS handshake error": DISTRUSTED,
    "CERTIFICATE_VERIFY_FAILED": DISTRUSTED,
    "[code: 2004]": NOT_ENROLLED,
    # It ends so, without a word more, when its signature is not accepted; key and signature are its own.
    "SuperNode terminated gracefully": WRONG_CLOCK,
}
# 1: PR_SET_PDEATHSIG, 9: SIGKILL. Flower's main thread can end while its web server's goes on: then all of it ends.
# 2 GiB: it keeps whatever a server sends, and unpacks a file of the bundle to read the settings in it.
_LAUNCH = """\
import ctypes, os, resource, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv.pop(1)):
    os._exit(1)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_DATA, (1 << 31, 1 << 31))
from flwr.supernode.cli import flower_supernode
sys.argv[0] = "flower-supernode"
code = 1
try:
    flower_supernode()
except SystemExit as ended:
    code = ended.code
finally:
    sys.stderr.flush()
    os._exit(code)
"""


class SuperNode:
    """A SuperNode that is started again, later and later, whenever it ends.

    Args:
        folder: Its own, made if missing; holds Flower's files, the secret and the log.
        server: host:port.
        certificate: Of the authority that signed the server's (PEM).
        key: The device's private key.
        on_state: Told ``ONLINE``, ``OFFLINE``, ``NOT_ENROLLED``, ``DISTRUSTED`` or ``WRONG_CLOCK`` when that changes.
    """

    def __init__(
        self, folder: Path, *, server: str, certificate: Path, key: Path, on_state: Callable[[str], object]
    ) -> None:
        private_folder(folder)
        self._folder = folder
        self._options = ["--superlink", server, "--root-certificates", str(certificate)]
        self._options += ["--auth-supernode-private-key", str(key)]
        self._on_state = on_state
        self._state = STARTING
        self._fell_at: float | None = None  # without saying good-bye to the server
        self._stopping = threading.Event()
        self._child: subprocess.Popen[bytes] | None = None
        self._tasks: Tasks | None = None
        self._port = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._keep_up, name="supernode", daemon=True)

    def start(self) -> None:
        """Start it, and the thread that keeps it up; the kernel ends the child when that thread is gone."""
        self._thread.start()

    def take(self) -> Task | None:
        """The next task; None where there is none.

        Raises:
            TaskError: It does not answer, as while it starts.
        """
        tasks, port, child = self._tasks, self._port, self._child
        if tasks is None or child is None or not is_ours(port):
            return None
        try:
            return tasks.take()
        except StalledError:
            child.kill()  # it is started again
            raise

    def stop(self) -> None:
        """End it, within a few seconds."""
        self._stopping.set()
        with self._lock:
            child = self._child
        if child is not None:
            stop(child, patience_s=2.5)
        if self._thread.is_alive():
            self._thread.join(1.0)

    @property
    def pid(self) -> int | None:
        """Of the child; None where it does not run."""
        child = self._child
        return child.pid if child is not None and child.poll() is None else None

    def _keep_up(self) -> None:
        log = _open_log(self._folder / "supernode.log")
        back_off_s = 1.0
        while not self._stopping.is_set():
            started = time.monotonic()
            self._run(log)
            if self._state == ONLINE:
                self._tell(OFFLINE)
            back_off_s = 1.0 if time.monotonic() - started > _STEADY_S else back_off_s
            self._stopping.wait(back_off_s)
            back_off_s = min(2 * back_off_s, _BACK_OFF_S)
        log.close()

    def _run(self, log: logging.Handler) -> None:
        """One life of the child, from its start to the end of what it says."""
        port, secret = free_port(), secrets.token_bytes(32)
        write_private(self._folder / _SECRET, secret)
        command = [sys.executable, "-P", "-c", _LAUNCH, str(os.getpid()), *self._options]
        command += ["--isolation", "process", "--superexec-auth-secret-file", str(self._folder / _SECRET)]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        with self._lock:
            if self._stopping.is_set():
                return
            child = self._child = subprocess.Popen(
                command,
                env=_environment(self._folder),
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches us alone, and we stop it
            )
        self._port = port
        self._tasks = Tasks(f"127.0.0.1:{port}", secret=secret, kind="client")
        with child:
            for line in child.stdout or ():
                self._read(line.decode(errors="replace").rstrip(), log)
        self._tasks = None
        if child.returncode < 0 and self._state == ONLINE:
            self._fell_at = time.monotonic()

    def _read(self, line: str, log: logging.Handler) -> None:
        log.emit(logging.makeLogRecord({"msg": line}))
        for sign, state in _SIGNS.items():
            if sign in line and not (
                (state == NOT_ENROLLED and self._just_fell()) or (state == WRONG_CLOCK and self._ends())
            ):
                self._tell(state)

    def _ends(self) -> bool:
        """Whether it was told to end, by us, or by a server that had accepted it and does so no more."""
        return self._stopping.is_set() or self._state == ONLINE

    def _just_fell(self) -> bool:
        return self._fell_at is not None and time.monotonic() - self._fell_at < _REMEMBERED_S

    def _tell(self, state: str) -> None:
        if state != self._state and not (state == OFFLINE and self._stopping.is_set()):
            self._state = state
            self._on_state(state)


def _environment(folder: Path) -> dict[str, str]:
    """What a SuperNode needs of ours, a folder of its own, and nobody called but the server."""
    return {name: os.environ[name] for name in _KEPT if name in os.environ} | {
        "FLWR_HOME": str(folder),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "NO_PROXY": ",".join(filter(None, (os.environ.get("NO_PROXY"), "127.0.0.1,localhost"))),
    }


def _open_log(path: Path) -> logging.handlers.RotatingFileHandler:
    """A file of bounded size, and the one before it."""
    path.touch(mode=0o600)
    return logging.handlers.RotatingFileHandler(path, maxBytes=_LOG_BYTES, backupCount=1, encoding="utf-8")
