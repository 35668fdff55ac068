"""A device that takes part: the SuperNode child, the resident executor and the owner's control socket, for one home.

    server.json ca.crt     of whom: kept in the home by the first join
    flower/                the SuperNode's: log, secret, Flower's own files, the lock of the one service
    run/control.sock       the owner's; see client/service/control.py
    schedule.json          when to take part, if not always; see client/service/schedule.py
    log/service.log        what the service did

Two homes on one machine share nothing: each has its own folder, ports, socket and processes.
"""

import fcntl
import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from cryptography import x509
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from client.home.home import Home
from client.log import note
from client.owner.device_key import KEY, make_device_key
from client.owner.owner import set_paused, status
from client.service.control import serve_control
from client.service.executor import Answer, serve_tasks
from client.service.schedule import Gate
from client.service.supernode import ONLINE, STARTING, SuperNode
from client.vault.private_files import disk_errors, private_folder, write_private
from shared.errors import HeadError, SottovoceError, StoreError

if TYPE_CHECKING:
    from client.runtime.runtime import FleetBase

_SERVER, _CA = "server.json", "ca.crt"
_PLAIN = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_LAST_ROUND_S = 1.0  # what a round gets to end in, when the service is stopped


class _Address(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str = Field(pattern=r"^[A-Za-z0-9:][A-Za-z0-9.:_-]{0,252}$")
    port: int = Field(ge=1, le=65535)


@dataclass(frozen=True)
class Invitation:
    """Which server, and how to know that it is that one.

    Attributes:
        address: Name or number of the host.
        port: Its public one.
        certificate: Of the authority that signs the server's certificates; PEM.
    """

    address: str
    port: int
    certificate: bytes

    @property
    def server(self) -> str:
        """host:port."""
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


def read_invitation(server: str | None, *, ca: Path | None, home: Path) -> Invitation:
    """The invitation that is named, or the one the home keeps.

    Args:
        server: An invitation folder, or host:port; None for the home's.
        ca: The authority's certificate, with host:port.
        home: Folder of the home.

    Raises:
        StoreError: There is none, or it cannot be used.
    """
    if server is None:
        if ca is not None:
            raise StoreError("--ca belongs to a server given as HOST:PORT, none was given.")
        if not (home / _SERVER).is_file():
            raise StoreError(
                f"{home} must know its server, it joined none yet; name the operator's invitation folder, or HOST:PORT "
                "with --ca ca.crt."
            )
        return _read_folder(home)
    if Path(server).is_dir():
        if ca is not None:
            raise StoreError("an invitation folder holds its own ca.crt; leave --ca out.")
        return _read_folder(Path(server))
    host, _, port = server.rpartition(":")
    if not host or not port.isdecimal():
        raise StoreError(f"SERVER must be an invitation folder or HOST:PORT, got {server!r}.")
    if ca is None:
        raise StoreError("HOST:PORT needs --ca, the certificate of the server's authority; it was not given.")
    return _checked({"address": host.strip("[]"), "port": int(port)}, _read(ca), named=server)


def _read_folder(folder: Path) -> Invitation:
    try:
        found = json.loads(_read(folder / _SERVER))
    except (ValueError, RecursionError):
        found = None
    return _checked(found, _read(folder / _CA), named=str(folder / _SERVER))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path} must be a readable file, got: {error.strerror}.") from None


def _checked(found: Any, certificate: bytes, *, named: str) -> Invitation:
    try:
        at = _Address.model_validate(found)
    except ValidationError:
        raise StoreError(f"{named} must name the address and the port of a server, it does not.") from None
    try:
        x509.load_pem_x509_certificate(certificate)
    except (ValueError, x509.InvalidVersion):
        raise StoreError(
            f"the authority's certificate for {named} must be PEM, it is not; get ca.crt from the operator."
        ) from None
    return Invitation(at.address, at.port, certificate)


def keep_invitation(home: Path, invitation: Invitation) -> None:
    """Remember the server for the next join."""
    with disk_errors(home):
        write_private(home / _CA, invitation.certificate)
        address = _Address(address=invitation.address, port=invitation.port)
        write_private(home / _SERVER, f"{address.model_dump_json()}\n".encode())


class Service:
    """What runs for one home, as the control socket sees it.

    Args:
        home: The owner's.
        base: Folder of the fleet's ONNX base, for predictions.
        on_state: Told whenever it changes: ``starting``, ``waiting``, ``training``, ``offline``, ``away``,
            ``not-enrolled``, ``distrusted``, ``wrong-clock`` or ``stuck``.
    """

    def __init__(self, home: Home, *, base: Path | None = None, on_state: Callable[[str], object] = str) -> None:
        self.stopping = threading.Event()
        self._home, self._base, self._on_state = home, base, on_state
        self._lock, self._opening = threading.Lock(), threading.Lock()
        self._opened: FleetBase | None = None
        self._link, self._training, self._answered = STARTING, False, 0
        self._started = self._since = _now()
        self._contact: str | None = None
        self._gate: Gate | None = None
        self._node: SuperNode | None = None

    @property
    def state(self) -> str:
        """In one word."""
        return "training" if self._training else "waiting" if self._link == ONLINE else self._link

    def on_link(self, link: str) -> None:
        """The SuperNode's connection changed."""
        with self._changing():
            if ONLINE in (self._link, link):
                self._contact = _now()
            self._link = link

    def on_training(self, training: bool) -> None:
        """A task was begun, or ended."""
        with self._changing():
            self._training = training
            self._contact = _now()
            self._answered += not training

    def follow(self, node: SuperNode, gate: Gate) -> None:
        """Have the SuperNode be there while the gate is open, and away while it is not; called again and again."""
        self._node, self._gate = node, gate
        before = set(gate.reasons)
        if gate.is_open():
            node.wake()
        else:
            for name in sorted(set(gate.reasons) - before):
                note("away", condition=name if _PLAIN.fullmatch(name) else "other")
            node.rest()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with self._lock:
            before = self.state
            yield
            after = self.state
            if after != before:
                self._since = _now()
        if after != before:
            note("service", state=after)
            self._on_state(after)

    def status(self) -> Mapping[str, Any]:
        """What it is doing, and the status of the home."""
        with self._lock:
            service = {
                "state": self.state,
                "since": self._since,
                "pid": os.getpid(),
                "started": self._started,
                "tasks_answered": self._answered,
                "last_contact": _now() if self._link == ONLINE else self._contact,
                "rss_bytes": _resident_bytes(),
                "schedule": dict(self._gate.conditions) if self._gate else {},
                "unmet": dict(self._gate.reasons) if self._gate else {},
                "retry": _retry(self._node.retry if self._node else None),
            }
        try:
            return {"service": service, "home": status(self._home), "problem": None}
        except SottovoceError as error:
            return {"service": service, "home": None, "problem": str(error)}

    def pause(self) -> None:
        """In the ledger: it holds after a restart too."""
        set_paused(self._home, True)

    def resume(self) -> None:
        """End a pause."""
        set_paused(self._home, False)

    def predict(self, texts: Sequence[str]) -> Mapping[str, Any]:
        """Predictions of the current private head, and why it is the bare base that answers where it is.

        The base is opened at the first call, the head anew at each: a roll-back or ``forget`` holds at once.

        Raises:
            SottovoceError: There is no base, it is not the operator's, or the home never had a private head.
        """
        if self._base is None:
            raise HeadError("predictions need the fleet's base; start sottovoce client join with --base DIR.")
        from client.owner.verify import check_had_head, open_home_base, open_personal

        check_had_head(self._home)
        with self._opening:
            if self._opened is None:
                self._opened = open_home_base(self._home, self._base, kind="base")
        found = open_personal(self._home, self._opened)
        said = {"predictions": found.model.predict(texts).tolist(), "problem": found.problem}
        return said | ({"labels": list(self._opened.labels)} if self._opened.labels else {})

    def stop(self) -> None:
        """Let ``join`` end."""
        self.stopping.set()


def join(
    home: Home,
    invitation: Invitation,
    *,
    base: Path | None = None,
    answer: Answer | None = None,
    on_state: Callable[[str], object] = str,
) -> bool:
    """Take part until SIGTERM, Ctrl-C or the control socket's ``Stop``.

    Args:
        home: The owner's.
        invitation: Which server.
        base: Folder of the fleet's ONNX base, for predictions on the control socket.
        answer: Instead of ``client.app.answer``, in tests.
        on_state: See ``Service``.

    Returns:
        Whether no round was at work any more. Where one is, the caller ends the process at once: the round is burnt
        and the home's lock falls with the process.

    Raises:
        StoreError: Another service runs for this home, or its files cannot be used.
    """
    with _only_service(home.folder):
        make_device_key(home.folder)
        keep_invitation(home.folder, invitation)
        service = Service(home, base=base, on_state=on_state)
        node = SuperNode(
            home.folder / "flower",
            server=invitation.server,
            certificate=home.folder / _CA,
            key=home.folder / KEY,
            on_state=service.on_link,
        )
        worker = threading.Thread(
            target=serve_tasks,
            args=(node, home),
            kwargs={"answer": answer, "stop": service.stopping, "on_state": service.on_training},
            name="executor",
            daemon=True,
        )
        with _stopped_by_signals(service.stopping), serve_control(home.folder, service):
            note("service", state="started")
            gate = Gate(home.folder)
            service.follow(node, gate)
            node.start()
            try:
                worker.start()
                while worker.is_alive() and not service.stopping.wait(1.0):
                    service.follow(node, gate)
            finally:
                died = not service.stopping.is_set()
                service.stopping.set()
                node.stop()
        worker.join(_LAST_ROUND_S)
        note("service", state="failed" if died else "stopped")
        if died:
            raise StoreError("the executor must run as long as the service, it ended; see the log.")
        return not worker.is_alive()


@contextmanager
def _only_service(home: Path) -> Iterator[None]:
    folder = home / "flower"
    with disk_errors(folder):
        private_folder(folder)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise StoreError(f"one service may run for {home}, one does; see: sottovoce client status.") from None
    finally:
        os.close(descriptor)


@contextmanager
def _stopped_by_signals(stopping: threading.Event) -> Iterator[None]:
    """Take SIGTERM and Ctrl-C as a wish to stop; outside the main thread nobody can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def wish(number: int, frame: FrameType | None) -> None:
        stopping.set()

    before = {number: signal.signal(number, wish) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _retry(found: tuple[int, float] | None) -> dict[str, float] | None:
    return None if found is None else {"failures": found[0], "in_s": round(found[1], 1)}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
