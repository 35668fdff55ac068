"""Play a study: what is not finished yet, on workers beside each other, every result into its one store.

``study.json`` in the study's folder says what was asked and what became of it: ``study`` (the file, resolved),
``file`` (where it lay), ``runs`` (key, point, seed, trial, settings of each), ``failures`` (run, point, seed, error),
``tuning`` (see ``simulations/study/search.py``), ``said`` (what the study says of choices and their privacy),
``command``, ``commit``.
"""

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.errors import CampaignError, ScenarioError
from simulations.folder import write_json
from simulations.machine import commit
from simulations.study.config import Study, load_study
from simulations.study.outcome import PLAN
from simulations.study.plan import Run, plan_runs, settings_of, varied
from simulations.study.play import play, prepare, reason_of, shares_with
from simulations.study.store import RUNS, Placed, is_finished, join_rows
from simulations.study.table import Board, Line
from simulations.study.workers import Worker, start_workers

_JOIN_SHARE = 20  # the store is joined anew no more often than takes a twentieth of the time


@dataclass
class Sweep:
    """A study that is being played, and what became of its runs so far."""

    study: Study
    file: Path
    folder: Path
    command: str
    workers: Sequence[Worker]
    board: Board
    runs: list[Run] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    tuning: dict[str, Any] | None = None
    said: list[str] = field(default_factory=list)
    _prepared: set[str] = field(default_factory=set)
    _next_join: float = 0.0

    def play(self, runs: Sequence[Run]) -> None:
        """Play what is not finished; an error of one run is noted, and the others go on."""
        self.runs += runs
        self.write()
        lines = {line.run.key: line for line in self.board.add(runs)}  # a key stands for one run, whoever asks for it
        for key, line in lines.items():
            if is_finished(self.folder, key):
                self.board.ended(line, "kept")
        waiting = [line for key, line in lines.items() if not is_finished(self.folder, key)]
        self._play(waiting)
        for line in self.board.lines:  # others with the same key
            if line.status == "waiting" and is_finished(self.folder, line.run.key):
                self.board.ended(line, "kept")
        self.join(now=True)

    def _play(self, waiting: list[Line]) -> None:
        free, busy = list(self.workers), dict[Future[Any], tuple[Worker, Line, str]]()
        preparing = set[str]()
        while waiting or busy:
            if len(self.failures) >= self.study.most_failures:
                waiting.clear()
            while free and (chosen := self._next(waiting, preparing)) is not None:
                worker, shared = free.pop(), shares_with(chosen.run)
                if shared in self._prepared:
                    waiting.remove(chosen)
                    self.board.began(chosen)
                    future = worker.submit(
                        play, chosen.run, folder=self.folder, audit=self.study.audit, command=self.command
                    )
                    busy[future] = (worker, chosen, shared)
                else:
                    preparing.add(shared)
                    self.board.prepares(chosen)
                    busy[worker.submit(prepare, chosen.run)] = (worker, chosen, shared)
            done, _ = wait(busy, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in done:
                worker, line, shared = busy.pop(future)
                free.append(worker)
                if line.status == "preparing":
                    preparing.discard(shared)
                    self._prepared.add(shared)  # what was wrong with it comes up again in its runs, one by one
                    future.exception()
                    self.board.prepares(line, over=True)
                else:
                    self._ended(line, future.exception())
            self.board.draw()

    def _next(self, waiting: Sequence[Line], preparing: set[str]) -> Line | None:
        """The next run whose shared work nobody is doing just now."""
        return next((line for line in waiting if shares_with(line.run) not in preparing), None)

    def _ended(self, line: Line, error: BaseException | None) -> None:
        key = line.run.key
        if error is None:
            self.failures.pop(key, None)
            self.board.ended(line, "done")
            self.join()
        else:
            self.failures[key] = reason_of(error)
            self.board.ended(line, "failed", self.failures[key])
            self.write()

    def join(self, *, now: bool = False) -> None:
        """Write the store anew, unless that was done a moment ago."""
        if not now and time.monotonic() < self._next_join:
            return
        began = time.monotonic()
        join_rows(self.folder, self.study.name, [placed(run, self.study) for run in self.runs])
        self._next_join = time.monotonic() + _JOIN_SHARE * (time.monotonic() - began)

    def write(self) -> None:
        """Write ``study.json``."""
        places = [placed(run, self.study) for run in self.runs]
        write_json(
            self.folder / PLAN,
            {
                "study": self.study.model_dump(mode="json"),
                "file": str(self.file),
                "runs": [
                    {
                        "key": run.key,
                        "point": run.point,
                        "seed": run.seed,
                        "trial": run.trial,
                        "settings": dict(place.settings),
                    }
                    for run, place in zip(self.runs, places, strict=True)
                ],
                "failures": [
                    {"run": run.key, "point": run.point, "seed": run.seed, "error": self.failures[run.key]}
                    for run in self.runs
                    if run.key in self.failures
                ],
                "tuning": self.tuning,
                "said": self.said,
                "command": self.command,
                "commit": commit(),
            },
        )


def placed(run: Run, study: Study) -> Placed:
    """A run's place in its study."""
    return Placed(run.key, run.point, run.trial, settings_of(run, varied(study)))


def sweep(
    file: Path,
    *,
    out: Path,
    workers: int | None = None,
    engine: str = "processes",
    address: str | None = None,
    quiet: bool = False,
    command: str = "",
) -> Sweep:
    """Play a study from its file to its store; what an earlier sweep into the same folder finished is kept.

    Args:
        file: The study.
        out: The study's folder; made where it is not there.
        workers: Runs played at once; by default one for each processor.
        engine: ``processes`` of this machine, or ``ray``.
        address: Of a Ray cluster that runs already.
        quiet: Show nothing.
        command: What was typed, for the record.

    Returns:
        The study as it ended. Runs that failed are in ``failures``, and everything else is in the store.

    Raises:
        ScenarioError: The file is no study, or ``out`` is something else.
        CampaignError: Another process is playing a study in ``out``.
    """
    from simulations.study import search, tuning

    study = load_study(file)
    runs = plan_runs(study, file)
    out = out.resolve()
    with _held(out):
        count = workers or os.cpu_count() or 1
        pending = sum(not is_finished(out, run.key) for run in runs)
        count = max(1, min(count, max(pending, study.search.at_once if study.search else 1)))
        board = Board(study.name, workers=count, quiet=quiet)
        going = Sweep(study, file, out, command, [], board)
        going.write()
        (out / RUNS).mkdir(exist_ok=True)
        with start_workers(count, engine=engine, folder=out, address=address) as going.workers:
            try:
                if runs:
                    going.play(runs)
                if study.search and len(going.failures) < study.most_failures:
                    going.tuning = search.search(going)
            finally:
                going.said = tuning.said(study, going.runs, going.tuning)
                going.write()
                going.join(now=True)
    return going


@contextmanager
def _held(out: Path) -> Iterator[None]:
    """Hold a study's folder; a new one, or one that a study lies in."""
    if out.exists() and not (out / PLAN).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ScenarioError(f"{out} must be a new folder or that of a study; it is neither. Choose another with --out.")
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given up by the kernel when the process ends
        except OSError:
            raise CampaignError(f"{out} must belong to one process, another one is playing a study in it.") from None
        yield
    finally:
        os.close(descriptor)
