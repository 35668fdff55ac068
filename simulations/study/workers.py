"""Workers that live as long as a study, one process each: on this machine, or as actors of a Ray cluster."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from shared.errors import ScenarioError
from simulations.study.play import start_worker


class Worker(Protocol):
    """One process that does one thing at a time."""

    def submit(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> "Future[Any]":
        """Have it call a function; a process that dies in it is an exception of the future, and is replaced."""

    def stop(self) -> None:
        """End it now, whatever it does."""


class LocalWorker:
    """A process of this machine."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._start()

    def _start(self) -> None:
        # Spawned: a fork would share torch's threads and whatever a library holds open.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=start_worker, initargs=(str(self._log),))
        self._last = self._process = self._pool.submit(os.getpid)

    def submit(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> "Future[Any]":  # noqa: D102
        try:
            self._last = self._pool.submit(function, *args, **kwargs)
        except BrokenProcessPool:
            self._pool.shutdown(wait=False)
            self._start()
            self._last = self._pool.submit(function, *args, **kwargs)
        return self._last

    def stop(self) -> None:  # noqa: D102
        if not self._last.done():
            with contextlib.suppress(BrokenProcessPool, ProcessLookupError):  # it is gone
                os.kill(self._process.result(), signal.SIGKILL)
        self._pool.shutdown(wait=True, cancel_futures=True)


class RayWorker:
    """An actor of a Ray cluster; the study's folder must lie where all its machines see it."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._actor: Any = None

    def submit(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> "Future[Any]":  # noqa: D102
        import ray

        if self._actor is None:
            self._actor = ray.remote(num_cpus=1, max_restarts=-1)(_Actor).remote(str(self._log))
        found: Future[Any] = self._actor.call.remote(function, args, kwargs).future()
        return found

    def stop(self) -> None:  # noqa: D102
        import ray

        if self._actor is not None:
            ray.kill(self._actor)


class _Actor:
    """What a Ray worker does."""

    def __init__(self, log: str) -> None:
        start_worker(log)

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function."""
        return function(*args, **kwargs)


@contextmanager
def start_workers(count: int, *, engine: str, folder: Path, address: str | None = None) -> Iterator[list[Worker]]:
    """Workers, ended with the block however it ends.

    Args:
        count: How many.
        engine: ``processes`` or ``ray``.
        folder: For their logs.
        address: Of a Ray cluster that runs already; None starts one on this machine.

    Raises:
        ScenarioError: There is no such engine.
        CampaignError: Ray could not be started or joined.
    """
    logs = [folder / f"worker-{number}.log" for number in range(count)]
    if engine == "processes":
        with _stopped([LocalWorker(log) for log in logs]) as workers:
            yield workers
    elif engine == "ray":
        from shared.flower.ray_engine import ray_cluster

        with ray_cluster(workers=count, address=address), _stopped([RayWorker(log) for log in logs]) as workers:
            yield workers
    else:
        raise ScenarioError(f"--engine must be processes or ray, got {engine!r}.")


@contextmanager
def _stopped(workers: "list[LocalWorker] | list[RayWorker]") -> Iterator[list[Worker]]:
    try:
        yield list(workers)
    finally:
        for worker in workers:
            worker.stop()
