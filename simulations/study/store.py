"""The results of a study: one long Parquet table, ``results.parquet``, made of one whole file a finished run.

A study folder holds ``study.json`` (what was asked, see ``simulations/study/run.py``), ``runs/KEY/`` (each finished
run's own folder, with its ``rows.parquet``) and ``results.parquet``. Every file is written whole or not at all, and the
table can be joined again from the runs: a kill at any moment loses at most the run that was going on.

One row is a number of one row of a run's table. The columns:

=================================  ====================================================================================
``study``, ``run``, ``point``      name of the study; key of the run; label of its settings, the same for all seeds
``seed``, ``trial``                seed of the run; number of the trial of a search, null elsewhere
``kind``                           ``score``; ``cold-start`` (``at``: own records, ``who``: whose curve); ``user``
                                   (``who``: one user's own primary metric); ``membership`` (an attack: ``row`` is
                                   ``records|users TARGET ATTACK``, ``metric`` is ``auc`` or ``tpr``)
``part``                           which records the numbers are of: ``test``, or ``validation`` where choices are made
``campaign``                       ``main``, ``linear``, ``statistics``; ``none`` for rows that owe nothing to one
``method``, ``personal_method``    of the federation; what a device adds for itself
``trust``, ``unit``                of the claim; null where the row needs none. ``trust`` is ``none`` where none is made
``epsilon``, ``delta``             of the claim; null where there is none
``row``, ``metric``, ``primary``   as in ``summary.json``; whether it is the primary metric
``better``                         ``less`` or ``more``
``value``, ``low``, ``high``       the number and its 95 % interval; both ends null where it has none
``at``, ``who``                    see ``kind``; null elsewhere
``wall_s``, ``cpu_s``              seconds of the whole run, and CPU-seconds of its process
``bytes_up``, ``bytes_down``       of the campaign, all devices together; null where the row has no campaign
``clients``, ``participations``    devices of the run; rounds one of them took part in, on average
``audit_epsilon``                  largest lower bound on the claim's epsilon that an audit of the run found, at 95 %
``audit_passed``                   whether every level of it passed; null where none was made
``commit``, ``created``            of the run
``set.TABLE.KEY``                  value of a setting that differs within the study, as JSON; one column each
=================================  ====================================================================================
"""

import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shared.errors import DataError
from shared.files import write_atomically
from simulations.report.results import RunFolder, read_run

FILE, ROWS, RUNS = "results.parquet", "rows.parquet", "runs"
NOT_AUDITED = "not-audited.txt"  # in a run's folder: why an audit refused it
SETTING = "set."  # before the name of a setting that differs
_TEXT, _NUMBER, _COUNT = pa.string(), pa.float64(), pa.int64()
SCHEMA = pa.schema(
    [
        *((name, _TEXT) for name in ("study", "run", "point")),
        ("seed", _COUNT),
        ("trial", _COUNT),
        *((name, _TEXT) for name in ("kind", "part", "campaign", "method", "personal_method", "trust", "unit")),
        ("epsilon", _NUMBER),
        ("delta", _NUMBER),
        ("row", _TEXT),
        ("metric", _TEXT),
        ("primary", pa.bool_()),
        ("better", _TEXT),
        ("value", _NUMBER),
        ("low", _NUMBER),
        ("high", _NUMBER),
        ("at", _COUNT),
        ("who", _TEXT),
        ("wall_s", _NUMBER),
        ("cpu_s", _NUMBER),
        ("bytes_up", _NUMBER),
        ("bytes_down", _NUMBER),
        ("clients", _COUNT),
        ("participations", _NUMBER),
        ("audit_epsilon", _NUMBER),
        ("audit_passed", pa.bool_()),
        ("commit", _TEXT),
        ("created", _TEXT),
    ]
)


@dataclass(frozen=True)
class Placed:
    """A run's place in a study: what its rows do not know of themselves."""

    key: str
    point: str
    trial: int | None
    settings: Mapping[str, Any]


def is_finished(folder: Path, key: str) -> bool:
    """Whether a study folder holds the rows of a run."""
    return (folder / RUNS / key / ROWS).is_file()


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the rows of one finished run, whole or not at all.

    Args:
        path: ``runs/KEY/rows.parquet``; its being there says that the run is finished.
        rows: Column -> value; a column that is left out is null.

    Raises:
        DataError: A row has a column that the store does not know.
    """
    laid = list(rows)
    unknown = sorted({name for row in laid for name in row} - set(SCHEMA.names))
    if unknown:
        raise DataError(f"a row of a study must have columns of the store, got {', '.join(unknown)}.")
    _write(path, pa.Table.from_pylist(laid, schema=SCHEMA))


def join_rows(folder: Path, study: str, runs: Sequence[Placed]) -> pa.Table:
    """Join the rows of the finished runs among ``runs``, in that order, and write ``results.parquet`` anew.

    Raises:
        DataError: A run's file is no table of this store.
    """
    tables = [_place(_read(folder / RUNS / run.key / ROWS), study, run) for run in runs if is_finished(folder, run.key)]
    joined = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
    _write(folder / FILE, joined)
    return joined


def _place(table: pa.Table, study: str, run: Placed) -> pa.Table:
    """A run's rows with the columns that its place in the study gives them."""
    for name, value in (("study", study), ("run", run.key), ("point", run.point), ("trial", run.trial)):
        place = SCHEMA.get_field_index(name)
        table = table.set_column(place, SCHEMA.field(place), _column(value, SCHEMA.field(place).type, len(table)))
    for key, value in run.settings.items():
        table = table.append_column(f"{SETTING}{key}", _column(json.dumps(value), _TEXT, len(table)))
    return table


def _column(value: Any, kind: pa.DataType, length: int) -> pa.Array:
    return pa.repeat(pa.scalar(value, type=kind), length)


def read_store(folder: Path) -> pa.Table:
    """The results of a study, columns as in the text above.

    Args:
        folder: As ``sottovoce sweep`` writes it, finished or not.

    Raises:
        DataError: There are no results, or they are no table of this store.
    """
    if not (folder / FILE).is_file():
        raise DataError(f"{folder / FILE} must exist, it does not. Name the folder of a study: sottovoce sweep.")
    return _read(folder / FILE)


def finished_runs(folder: Path) -> dict[str, list[RunFolder]]:
    """Label of each point -> its finished runs in the order of their seeds; trials of a search are left out.

    Raises:
        DataError: As ``read_store`` and ``read_run``.
    """
    table = read_store(folder).select(["point", "seed", "run", "trial"]).group_by(["point", "seed", "run", "trial"])
    found: dict[str, list[RunFolder]] = {}
    for one in sorted(table.aggregate([]).to_pylist(), key=lambda each: int(each["seed"])):
        if one["trial"] is None:
            found.setdefault(one["point"], []).append(read_run(folder / RUNS / one["run"]))
    return found


def _write(path: Path, table: pa.Table) -> None:
    content = io.BytesIO()
    pq.write_table(table, content, compression="zstd")
    write_atomically(path, content.getvalue())


def _read(path: Path) -> pa.Table:
    try:
        table = pq.read_table(os.fspath(path))
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{path} must be a Parquet table: {str(error).splitlines()[0]:.200}. Remove it and run the sweep again."
        ) from None
    missing = [name for name in SCHEMA.names if name not in table.schema.names]
    if missing:
        raise DataError(
            f"{path} must have the columns {', '.join(missing):.200}; another version of sottovoce wrote it. "
            "Run the study into a new folder."
        )
    return table
