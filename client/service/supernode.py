"""Flower's SuperNode as a child: it speaks with the server, hands us tasks on loopback, and never outlives us.

It is told to start no program of its own; whoever takes its tasks shows a secret made anew at every start.
"""

import logging
import math
import os
import re
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

# Before flwr is imported: it reads these once.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

from flwr.app import Message

from client.log import describe_error, note
from client.service.back_off import BackOff
from client.service.log_file import LogFile
from client.vault.private_files import private_folder, write_private
from shared.flower.processes import free_port, is_ours, stop
from shared.flower.tasks import StalledError, Task, Tasks
from shared.protocol.refusal import pack_refusal

STARTING, OFFLINE, ONLINE, NOT_ENROLLED, DISTRUSTED = "starting", "offline", "online", "not-enrolled", "distrusted"
WRONG_CLOCK, AWAY, STUCK = "wrong-clock", "away", "stuck"
WORDS = {
    AWAY: "not connected: a condition of your schedule does not hold; see: sottovoce client status",
    OFFLINE: "the server cannot be reached; trying again",
    ONLINE: "connected to the server",
    NOT_ENROLLED: "the server does not know this device's key; ask its operator to run: sottovoce server enrol "
    "device.pub --name NAME (device.pub lies in your home), or it has not noticed yet that this device was away, which "
    "takes a minute; trying again",
    DISTRUSTED: "what answers at the server's address cannot prove to be that server (its certificate is not signed by "
    "your ca.crt, or is for another address); ask the operator for a new invitation; trying again",
    STUCK: "Flower's part of the service cannot be started, for want of room on the disk or of memory; trying again",
    WRONG_CLOCK: "the server does not accept the time at which this device signs; set its clock (the server's may be "
    "wrong too); trying again",
}

_SECRET = "executor.secret"
_FIRST_S, _CAP_S = 1.0, 300.0  # between one life and the next
_STEADY_S = 60.0  # one that was connected as long starts again at once
_GIVES_UP_S = 120  # what Flower tries for, at most 20 s apart, until it ends and the waits above begin
_HURRY_S, _LEAVING_S = 1.5, 10.0  # what a child gets to say good-bye in, when all of us end and when it rests
_UNFINISHED_S = 300.0  # a secure sum's next stage comes by then, or it does not come
_COLLECTED_S = 30.0  # a server has an answer by then; Flower drops that of a device that left before it was collected
_REMEMBERED_S = 90.0  # a server refuses a device it thinks is still there, with the words it has for a stranger
_KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "PYTHONPATH", "LD_LIBRARY_PATH", "HTTPS_PROXY", "https_proxy")
_SIGNS = {  # in what it logs
    "SuperNode ID:": ONLINE,
    "Connection successful": ONLINE,
    "Connection attempt failed": OFFLINE,
    "SSL/TLS handshake error": OFFLINE,  # what it says of a line that breaks in a handshake too
    "CERTIFICATE_VERIFY_FAILED": DISTRUSTED,
    "[code: 2004]": NOT_ENROLLED,
    # It ends so, without a word more, when its signature is not accepted; key and signature are its own.
    "SuperNode terminated gracefully": WRONG_CLOCK,
}
_RECEIVES = re.compile(r"Receiving: \S+ message")
_DONE = (
    "Sent successfully",
    "Failed to send message",
    "Failed to receive message",
    "Failed to create task",
    "Ignoring reply message",
    "Ignoring message",
    "Ignoring the message",
)
_STAGES = ("query.secure_keys", "query.secure_shares", "train", "query.secure_unmask")  # of one secure sum
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
        on_state: Told ``ONLINE``, ``OFFLINE``, ``NOT_ENROLLED``, ``DISTRUSTED``, ``WRONG_CLOCK``, ``STUCK`` or ``AWAY``
            when that changes.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        folder: Path,
        *,
        server: str,
        certificate: Path,
        key: Path,
        on_state: Callable[[str], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        private_folder(folder)
        self._folder = folder
        self._options = ["--superlink", server, "--root-certificates", str(certificate)]
        self._options += ["--auth-supernode-private-key", str(key), "--max-wait-time", str(_GIVES_UP_S)]
        self._on_state = on_state
        self._clock = clock
        self._state = STARTING
        self._back_off = BackOff(first_s=_FIRST_S, cap_s=_CAP_S, steady_s=_STEADY_S)
        self._retry_at: float | None = None
        self._online_since, self._online_s = 0.0, 0.0  # of this life
        self._at_work, self._stage, self._answered_at = False, 0, -math.inf
        self._asked_at: float | None = None  # to leave
        self._fell_at: float | None = None  # without saying good-bye to the server
        self._stopping, self._wanted = threading.Event(), threading.Event()
        self._wanted.set()
        self._child: subprocess.Popen[bytes] | None = None
        self._tasks: Tasks | None = None
        self._port = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._keep_up, name="supernode", daemon=True)

    def start(self) -> None:
        """Start it, and the thread that keeps it up; the kernel ends the child when that thread is gone."""
        self._thread.start()

    def take(self) -> Task | None:
        """The next task; None where there is none, or where it was refused because this device is leaving.

        Raises:
            TaskError: It does not answer, as while it starts.
        """
        tasks, port, child = self._tasks, self._port, self._child
        if tasks is None or child is None or not is_ours(port):
            return None
        try:
            task = tasks.take()
        except StalledError:
            child.kill()  # it is started again
            raise
        if task is None or self._welcome(task.message.metadata.message_type):
            return task
        self._at_work = False
        task.answer(Message(pack_refusal("PAUSED"), reply_to=task.message))
        return None

    def _welcome(self, kind: str) -> bool:
        """Whether a message is answered: any while it shall be there, and the next stage of a sum begun then."""
        stage = _STAGES.index(kind) + 1 if kind in _STAGES else 0
        if self._stage and stage == self._stage + 1:
            self._stage = stage % len(_STAGES)
            return True
        wanted = self._wanted.is_set()
        self._stage = int(wanted and stage == 1)
        return wanted

    def rest(self) -> bool:
        """Be absent, once nothing is at work; ask again until it says that it is.

        A message that was taken is answered first and the server given time to collect the answer; a secure sum that
        was begun is ended, unless its next stage does not come. Whatever else comes meanwhile is refused as ``PAUSED``.
        """
        self._wanted.clear()
        with self._lock:
            child = self._child
        if child is not None and child.poll() is None:
            if self._asked_at is not None:
                if self._clock() - self._asked_at > _LEAVING_S:
                    child.kill()
            elif not self._unfinished():
                self._asked_at = self._clock()
                child.terminate()
            return False
        self._tell(AWAY)
        return True

    def wake(self) -> None:
        """Be there, if it rests."""
        if not self._wanted.is_set():
            self._wanted.set()
            if self._state == AWAY:
                self._tell(STARTING)

    @property
    def retry(self) -> tuple[int, float] | None:
        """How often it failed since it last went well, and the seconds until it is tried again; None where it runs."""
        at = self._retry_at
        return None if at is None else (self._back_off.failures, max(0.0, at - self._clock()))

    def stop(self) -> None:
        """End it, within a few seconds."""
        self._stopping.set()
        self._wanted.set()
        with self._lock:
            child = self._child
        if child is not None:
            stop(child, patience_s=_HURRY_S)
        if self._thread.is_alive():
            self._thread.join(0.5)

    @property
    def pid(self) -> int | None:
        """Of the child; None where it does not run."""
        child = self._child
        return child.pid if child is not None and child.poll() is None else None

    def _keep_up(self) -> None:
        with LogFile(self._folder / "supernode.log") as log:
            while self._awaited():
                self._online_s = 0.0
                try:
                    self._run(log)
                except OSError as error:
                    note("failed", level=logging.ERROR, **describe_error(error))
                    self._tell(STUCK)
                if self._state == ONLINE:
                    self._tell(OFFLINE)
                if self._wanted.is_set():
                    self._wait(self._back_off.failed(went_well_s=self._online_s))

    def _awaited(self) -> bool:
        """Wait until it shall be there; false where it is stopped."""
        if not self._wanted.is_set():
            self._wanted.wait()
            self._back_off.failures = 0
        return not self._stopping.is_set()

    def _wait(self, seconds: float) -> None:
        self._retry_at = self._clock() + seconds
        self._stopping.wait(seconds)
        self._retry_at = None

    def _run(self, log: LogFile) -> None:
        """One life of the child, from its start to the end of what it says."""
        port, secret = free_port(), secrets.token_bytes(32)
        write_private(self._folder / _SECRET, secret)
        command = [sys.executable, "-P", "-c", _LAUNCH, str(os.getpid()), *self._options]
        command += ["--isolation", "process", "--superexec-auth-secret-file", str(self._folder / _SECRET)]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        with self._lock:
            if self._stopping.is_set() or not self._wanted.is_set():
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
        self._tasks, self._at_work, self._stage, self._answered_at = None, False, 0, -math.inf
        self._asked_at = None
        if child.returncode < 0 and self._state == ONLINE:
            self._fell_at = self._clock()

    def _read(self, line: str, log: LogFile) -> None:
        log.emit(logging.makeLogRecord({"msg": line}))
        self._follow(line)
        for sign, state in _SIGNS.items():
            if sign in line and not (
                (state == NOT_ENROLLED and self._just_fell()) or (state == WRONG_CLOCK and self._ends())
            ):
                self._tell(state)

    def _ends(self) -> bool:
        """Whether it was told to end, by us, or by a server that had accepted it and does so no more."""
        return self._stopping.is_set() or not self._wanted.is_set() or self._state in (ONLINE, AWAY)

    def _follow(self, line: str) -> None:
        """Note what it is at, from what it says: one message at a time, from its receipt until its answer was sent."""
        if _RECEIVES.search(line):
            self._at_work = True
        elif self._at_work and any(sign in line for sign in _DONE):
            self._at_work, self._answered_at = False, self._clock()

    def _unfinished(self) -> bool:
        """Whether others wait for it."""
        since_s = self._clock() - self._answered_at
        return self._at_work or since_s < (_UNFINISHED_S if self._stage else _COLLECTED_S)

    def _just_fell(self) -> bool:
        return self._fell_at is not None and self._clock() - self._fell_at < _REMEMBERED_S

    def _tell(self, state: str) -> None:
        leaves = self._stopping.is_set() or not self._wanted.is_set()
        if state != self._state and not (state == OFFLINE and leaves):
            if ONLINE in (state, self._state):
                self._online_s += 0.0 if state == ONLINE else self._clock() - self._online_since
                self._online_since = self._clock()
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
