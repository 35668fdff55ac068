"""Engine ``ray``: Flower's simulation engine, on this machine or on a Ray cluster that is already there.

Flower's own entry point has no run config for the devices, returns in silence when a worker has died, waits for ever
for one that hangs, and lets Ray listen on every interface; see ``run_ray`` for what is promised instead.
"""

import logging
import os
import queue
import shutil
import signal
import socket
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.app.user_config import UserConfig
from flwr.serverapp import Grid, ServerApp

from shared.errors import CampaignError
from shared.flower.grid import Device, Main, MeteredGrid, one_line

_GRACE_S = 3.0  # for the engine's threads to see that the campaign has ended: they look every second


@dataclass(frozen=True)
class _Configured:
    """A ClientApp with a run config, which Flower's ``run_simulation`` has no way to give it."""

    client_app: Device
    run_config: UserConfig

    def __call__(self, message: Message, context: Context) -> Message:
        given, context.run_config = context.run_config, dict(self.run_config)
        try:
            return self.client_app(message, context)
        finally:
            context.run_config = given  # Flower refuses a context whose run config has changed


def run_ray(
    main: Main,
    client_app: Device,
    *,
    devices: int,
    run_config: UserConfig,
    workers: int | None = None,
    address: str | None = None,
) -> None:
    """Run ``main`` over Flower's simulation engine: the devices share Ray workers, each with one CPU.

    Args:
        main: The server's part, a function of the grid; it runs in the calling thread, on a ``MeteredGrid``.
        client_app: The devices' app; module and caches stay in a worker from message to message.
        devices: How many there are.
        run_config: What the devices' app finds as its run config.
        workers: How many workers to start on this machine, listening on loopback only; None is one a CPU.
        address: ``host:port`` of a Ray cluster to join instead, with the same files at the same paths on every node.
            It is left, not stopped.

    Raises:
        CampaignError: Ray could not be started or joined, a worker died, or the engine stopped before ``main`` did.

    Guarantee:
        It returns only when ``main`` has returned, and what ``main`` raises comes out as it is. Nothing that was
        started is left running, whatever happens.
    """
    with _quiet_logs(), ray_cluster(workers=workers, address=address):
        engine = _Engine(_Configured(client_app, run_config), devices=devices)
        try:
            main(MeteredGrid(engine.grid(), check=engine.check))
        except BaseException:
            _kill_actors()  # one of them may never answer, and a thread of Flower's would wait for it for ever
            raise
        finally:
            engine.stop()


class _Engine:
    """Flower's simulation engine in a thread of its own, lending its grid to the calling thread."""

    def __init__(self, client_app: _Configured, *, devices: int) -> None:
        self._client_app, self._devices = client_app, devices
        self._lent: queue.Queue[Grid] = queue.Queue()
        self._finished = threading.Event()
        self._failure = "no reason given"
        self._thread = threading.Thread(target=self._serve, name="flower-simulation", daemon=True)
        self._thread.start()

    def grid(self) -> Grid:
        """The engine's grid, once it is there."""
        while True:
            try:
                return self._lent.get(timeout=0.1)
            except queue.Empty:
                self.check()

    def check(self) -> None:
        """Raise if the engine has stopped."""
        if not self._thread.is_alive():
            raise CampaignError(
                f"Flower's simulation engine must run until the campaign ends, it stopped: {self._failure}."
            )

    def stop(self) -> None:
        """Let the engine end; a worker still busy with a reply nobody waits for is killed."""
        self._finished.set()
        self._thread.join(_GRACE_S)
        if self._thread.is_alive():
            _kill_actors()
            self._thread.join(_GRACE_S)

    def _serve(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # importing Flower's Ray code changes the process's filters
            from flwr.simulation import run_simulation

        server_app = ServerApp()

        @server_app.main()
        def lend(grid: Grid, context: Context) -> None:
            del context
            self._lent.put(grid)
            self._finished.wait()

        try:
            run_simulation(
                server_app,
                self._client_app,  # type: ignore[arg-type]  # called like a ClientApp
                num_supernodes=self._devices,
                backend_config={"client_resources": {"num_cpus": 1.0, "num_gpus": 0.0}},
            )
        except Exception as error:  # whatever it was, the calling thread stops with it
            cause: BaseException = error
            while cause.__cause__:
                cause = cause.__cause__  # Flower wraps twice
            self._failure = one_line(f"{type(cause).__name__}: {cause}").removesuffix(".")


@contextmanager
def _quiet_logs() -> Iterator[None]:
    """Silence Flower's logs: what goes wrong is raised, and what its engine logs is a traceback for every device."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def ray_cluster(*, workers: int | None, address: str | None) -> Iterator[None]:
    """Start Ray on this machine and stop it, or join a cluster and leave it.

    Args:
        workers: How many CPUs to offer on this machine, listening on loopback only; None is all.
        address: ``host:port`` of a cluster to join instead; its nodes find modules where this process finds them.

    Raises:
        CampaignError: This process uses Ray already, or Ray could not be started or joined.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray
    if ray.is_initialized():
        raise CampaignError("engine ray must start or join Ray itself; this process has. Call ray.shutdown() first.")
    if address:
        _check_reachable(address)
    terminate = signal.getsignal(signal.SIGTERM)
    scratch = Path(tempfile.mkdtemp(prefix=f"sottovoce-ray-{os.getpid()}-", dir="/tmp"))
    try:
        try:
            _start_ray(ray, workers=workers, address=address, scratch=scratch)
        except Exception as error:  # Ray raises whatever its parts raise
            where = f"the cluster at {address} must be one to join" if address else "Ray must start on this machine"
            raise CampaignError(f"{where}; got {one_line(f'{type(error).__name__}: {error}')}") from error
        yield
    finally:
        ray.shutdown()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, terminate)  # ray.init puts its own in place
        shutil.rmtree(scratch, ignore_errors=True)


def _start_ray(ray: Any, *, workers: int | None, address: str | None, scratch: Path) -> None:
    """Connect this process to Ray; workers find the modules this process finds."""
    path = os.pathsep.join(sys.path)
    quiet = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    local_only = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"} if address is None else {}  # else Ray listens to the world
    constants = ray._private.ray_constants
    clusters = constants.ENABLE_RAY_CLUSTER
    constants.ENABLE_RAY_CLUSTER = clusters and address is not None  # the same switch, read when ray was imported
    try:
        with warnings.catch_warnings(), _environment(PYTHONPATH=path, **local_only):
            warnings.simplefilter("ignore")
            if address:
                ray.init(address=address, runtime_env={"env_vars": {"PYTHONPATH": path}}, **quiet)
            else:
                cpus = workers or os.cpu_count()
                ray.init(address="local", num_cpus=cpus, include_dashboard=False, _temp_dir=str(scratch), **quiet)
    finally:
        constants.ENABLE_RAY_CLUSTER = clusters


def _check_reachable(address: str) -> None:
    """A cluster nobody answers for would end this process, not only the call."""
    host, _, port = address.rpartition(":")
    try:
        if "/" in host:
            raise ValueError(address)
        socket.create_connection((host, int(port)), timeout=5).close()
    except (ValueError, OSError) as error:
        raise CampaignError(
            f"the address of a Ray cluster must be host:port of its head node, got {address!r} ({one_line(error)}). "
            "Start one with: ray start --head"
        ) from None


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Environment variables for what is started meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _kill_actors() -> None:
    """Kill this process's workers; Ray has no public way to find actors somebody else made."""
    import ray
    from ray._private.state import actors
    from ray._private.worker import global_worker

    worker: Any = global_worker
    if not ray.is_initialized():
        return
    job = ray.get_runtime_context().get_job_id()
    for actor_id, actor in actors().items():
        if actor["JobID"] == job and actor["State"] != "DEAD":
            worker.core_worker.kill_actor(ray.ActorID(bytes.fromhex(actor_id)), True)
