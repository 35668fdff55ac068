"""The run folder: made once, held by one process at a time, taken up again after a kill."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shared.config import Scenario, load_scenario
from shared.errors import CampaignError, ScenarioError
from shared.files import write_atomically
from simulations.campaigns import Opened
from simulations.events import EventLog
from simulations.journal import Journal

_ENGINE = {"engine", "workers", "ray_address"}  # where devices run, which no result depends on


@contextmanager
def run_folder(out: Path, *, resume: bool) -> Iterator[None]:
    """Hold a run folder: a new one, removed again if nothing comes to lie in it, or the one of an interrupted run.

    Raises:
        ScenarioError: The folder exists (or, to resume, holds no run) or cannot be made.
        CampaignError: Another process holds it.
    """
    if resume and not (out / "scenario.json").is_file():
        raise ScenarioError(f"--resume must name the folder of a run that had begun, {out} holds no scenario.json.")
    if not resume:
        _make(out)
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given up by the kernel when the process ends
        except OSError:
            raise CampaignError(f"{out} must belong to one process, another one is running in it.") from None
        yield
    except BaseException:
        if not resume and not (out / "campaigns").exists():  # refused before anything had begun
            shutil.rmtree(out)
        raise
    finally:
        os.close(descriptor)


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True)
    except FileExistsError:
        raise ScenarioError(
            f"{out} must be a new folder; it exists. Choose another with --out, go on with --resume, or remove it."
        ) from None
    except OSError as error:
        raise ScenarioError(f"{out} must be a folder that can be made: {error.strerror}. Choose another.") from None


def check_same_scenario(out: Path, scenario: Scenario) -> Scenario:
    """The scenario of an interrupted run, which must be the one asked for in everything that decides the result.

    Returns:
        The run's own scenario on the engine asked for. No other setting may differ: a round that is run again must
        give the same bytes, and the size of a batch or the number of threads can move the last bit.

    Raises:
        ScenarioError: They differ.
    """
    begun = load_scenario(out / "scenario.json")
    ours, theirs = (_flat(each.model_dump(mode="json", exclude={"performance": _ENGINE})) for each in (scenario, begun))
    for key in sorted(ours):
        if ours[key] != theirs[key]:
            raise ScenarioError(
                f"{out} must be a run of this scenario to be resumed: there {key} = {json.dumps(theirs[key])}, "
                f"here {json.dumps(ours[key])}. Leave the scenario away to go on with the run's own."
            )
    return begun.model_copy(update={"performance": scenario.performance})  # equal but for the engine


def _flat(tables: dict[str, Any]) -> dict[str, Any]:
    """Settings by dotted key."""
    return {
        f"{table}.{key}" if isinstance(values, dict) else table: value
        for table, values in tables.items()
        for key, value in (values.items() if isinstance(values, dict) else [(table, values)])
    }


def note_resumption(out: Path, opened: Sequence[Opened], command: str) -> list[dict[str, Any]]:
    """Add to ``run.json`` where every campaign goes on; returns all such notes of the run."""
    run: dict[str, Any] = json.loads((out / "run.json").read_text(encoding="utf-8"))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    noted: list[dict[str, Any]] = run.setdefault("resumed", [])
    noted += [
        {
            "campaign": each.plan.name,
            "seed": each.plan.scenario.seed,
            "round": each.start.round_number,
            "at": now,
            "command": command,
        }
        for each in opened
    ]
    write_json(out / "run.json", run)
    return noted


@contextmanager
def open_events(out: Path) -> Iterator[EventLog]:
    """The run's events for TensorBoard, begun anew: a resumed run adds the lines it keeps again."""
    shutil.rmtree(out / "events", ignore_errors=True)
    events = EventLog(out / "events")
    try:
        yield events
    finally:
        events.close()


def open_journal(out: Path, opened: Sequence[Opened], on_line: Callable[[dict[str, Any]], object]) -> Journal:
    """The run's journal, without lines of rounds that will be run again."""
    rounds = {(each.plan.name, each.plan.scenario.seed): each.start.round_number for each in opened}
    return Journal(out / "metrics.jsonl", rounds, on_line=on_line)


def write_json(path: Path, content: object) -> None:
    """Write a file of the run folder, whole or not at all."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())
