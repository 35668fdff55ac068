"""Play one run of a study in a worker process, and what such a process is."""

import os
import shutil
import signal
import threading
import time
from multiprocessing import connection, parent_process
from pathlib import Path

from shared.errors import SottovoceError
from simulations.study.plan import Run
from simulations.study.store import NOT_AUDITED, ROWS, RUNS


def prepare(run: Run) -> None:
    """Compute what runs share, the backbone outputs of all texts, so that the others find them in the cache.

    Raises:
        SottovoceError: The run would be refused.
    """
    from client.training.site import TextFeatures, campaign_dataset, resident_base, use_threads
    from shared.assets import resolve

    scenario = run.scenario
    use_threads(scenario.performance.threads)
    for reference in (scenario.data.source, scenario.model.base):
        resolve(reference, quiet=True)
    dataset, base = campaign_dataset(scenario), resident_base(scenario.model.base, scenario.performance.device)
    TextFeatures(base, scenario, dataset).compute()


def shares_with(run: Run) -> str:
    """Equal for two runs that look up the same backbone outputs."""
    scenario = run.scenario
    parts = (scenario.data, scenario.model, scenario.task, scenario.prompt)
    return "\0".join([*(part.model_dump_json() for part in parts), str(scenario.attack.held_out)])


def play(run: Run, *, folder: Path, audit: str, command: str) -> float:
    """Play a run to its end and write its rows; goes on with one that was interrupted.

    Args:
        run: What to play.
        folder: Of the study.
        audit: ``none``, or the level of the audit that a run with a claim gets.
        command: What was typed, for the record.

    Returns:
        CPU-seconds this process spent on it.

    Raises:
        SottovoceError: The run is refused, or its audit; nothing of it is in the store then.
    """
    from simulations.run import simulate
    from simulations.study.rows import Spent, rows_of_run
    from simulations.study.store import write_rows

    out, began, cpu = folder / RUNS / run.key, time.perf_counter(), time.process_time()
    resumed = (out / "scenario.json").is_file()
    if not (out / "summary.json").is_file():
        if out.exists() and not resumed:
            shutil.rmtree(out)  # a kill before anything had begun
        simulate(run.scenario, out=out, command=command, quiet=True, resume=resumed)
    spent = Spent(None, None) if resumed else Spent(time.perf_counter() - began, time.process_time() - cpu)
    if audit != "none" and run.scenario.privacy.trust != "none":
        _audit(out, level=audit)
    write_rows(out / ROWS, rows_of_run(out, run, spent=spent))
    return time.process_time() - cpu


def _audit(out: Path, *, level: str) -> None:
    """Audit a finished run into its folder, once; an audit that is refused leaves its reason there."""
    from shared.files import write_atomically
    from shared.protocol.audits import FILE
    from simulations.audit.run import run_audit
    from simulations.report.report import write_report

    if (out / FILE).is_file():
        return
    try:
        found = run_audit(out, level="full" if level == "full" else "quick", quiet=True)
    except SottovoceError as error:  # what cannot be attacked has its scores all the same, and the report says why
        write_atomically(out / NOT_AUDITED, f"{reason_of(error)}\n".encode())
        return
    write_atomically(out / FILE, found.to_json().encode())
    write_report(out)


def start_worker(log: str) -> None:
    """Make a process a worker: what libraries print goes into a log, and it ends when the one that started it ends."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the study ends its workers itself
    above = parent_process()
    if above is not None:
        threading.Thread(target=_end_with, args=(above.sentinel,), name="parent", daemon=True).start()


def _end_with(sentinel: int) -> None:
    """Nothing waits for a worker whose parent was killed, and its run belongs to whoever goes on with it."""
    connection.wait([sentinel])
    os._exit(1)


def reason_of(error: BaseException) -> str:
    """One line that says what stopped a run."""
    if type(error).__name__ in ("BrokenProcessPool", "ActorDiedError", "ActorUnavailableError"):  # two of them Ray's
        return "its worker process was killed, by the system if memory ran out; sweep again, with fewer --workers."
    text = (str(error).splitlines() or [""])[0]
    return text if isinstance(error, SottovoceError) else f"{type(error).__name__}: {text}"
