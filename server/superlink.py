"""Flower's SuperLink as a child on loopback: TLS, device keys, a secret for whoever takes tasks, state on disk."""

import ssl
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from server.folder import ServerFolder
from shared.errors import ServerError
from shared.files import private_folder
from shared.flower.processes import flower_environment, free_port, start, stop, trim

_START_S = 60.0


class SuperLink:
    """A SuperLink that dies with the thread that started it, and is started again on the same port if it falls.

    Flower puts three interfaces on one port and asks no login for two of them, so nothing outside this machine may
    reach it: what devices reach is server/front.py.

    Args:
        server: Whose keys, certificates and state it uses.
        on_disk: Whether messages go through a file. Without, a restart forgets the run, and another one is begun; what
            devices sent is nowhere but in memory.

    Attributes:
        port: Where it listens, on loopback only.
        starts: How often it was started.
    """

    def __init__(self, server: ServerFolder, *, on_disk: bool = True) -> None:
        self._server = server
        self._database = str(server.state / "superlink.db") if on_disk else ":flwr-in-memory:"
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_port()
        self.starts = 0

    @property
    def address(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int | None:
        """Of the child; None before the first start."""
        return self._process.pid if self._process else None

    def keep_up(self) -> None:
        """Start it unless it is up, and keep its log short.

        Raises:
            ServerError: It does not answer.
        """
        trim(self._log)
        if self._process is not None and self._process.poll() is None:
            return
        server = self._server
        private_folder(server.state)  # all of it may be thrown away: who is enrolled stands in the register
        command = ["flower-superlink", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--ssl-ca-certfile", str(server.ca_certificate)]
        command += ["--ssl-certfile", str(server.certificate), "--ssl-keyfile", str(server.certificate_key)]
        command += ["--enable-supernode-auth", "--isolation", "process"]
        command += ["--superexec-auth-secret-file", str(server.executor_secret)]
        command += ["--database", self._database, "--disable-runtime-dependency-installation"]
        environment = flower_environment(server.state / "flower")
        self._process = start(command, environment=environment, folder=server.state, log=self._log)
        self.starts += 1
        self._wait_until_healthy(self._process)

    def stop(self) -> None:
        """End it."""
        if self._process is not None:
            stop(self._process)

    @property
    def _log(self) -> Path:
        return self._server.state / "superlink.log"

    def _wait_until_healthy(self, process: "subprocess.Popen[bytes]") -> None:
        trust = ssl.create_default_context(cafile=str(self._server.ca_certificate))
        handlers = urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trust)
        opener = urllib.request.build_opener(*handlers)
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline and process.poll() is None:
            try:
                opener.open(f"https://{self.address}/health", timeout=1.0).close()
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
            else:
                return
        raise ServerError(
            f"Flower's SuperLink must answer within {_START_S:.0f} s, got exit code {process.poll()}; see {self._log}."
        )
