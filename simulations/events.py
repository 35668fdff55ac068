"""A run's numbers as events for TensorBoard, written beside ``metrics.jsonl`` by tensorboardX.

tensorboardX and not ``torch.utils.tensorboard``: the latter needs all of TensorBoard with its web server to write a
file, some 40 MB in eight packages; tensorboardX is 0.7 MB and needs numpy, packaging and protobuf, which are there.
The viewer is installed where events are looked at: ``pip install tensorboard; tensorboard --logdir RUN/events``.
"""

import re
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

_COUNTS = ("epsilon", "bytes_up", "bytes_down", "replies")


class EventLog:
    """Event files in a folder: one TensorBoard run per campaign and seed, one per row of the final table.

    Without tensorboardX nothing is written, and one line on stderr says so, once a process.

    Args:
        folder: Of the events; made with the first of them. Whoever starts again removes it first and adds all
            lines again, else steps occur twice.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writers: dict[str, Any] = {}
        self._open = _writer_class()

    def add(self, line: Mapping[str, Any]) -> None:
        """Add one line of ``metrics.jsonl``; the step is its round, and what is null has no point.

        Args:
            line: As ``docs/summary.md`` describes it.
        """
        values = {f"validation/{name}": value for name, value in line["validation"].items()}
        values |= {name: line[name] for name in _COUNTS}
        self._add(f"{_safe(line['campaign'])}/seed-{line['seed']}", values, step=line["round"])

    def add_summary(self, summary: Mapping[str, Any]) -> None:
        """Add the rows of a finished run, and its claim as text.

        Args:
            summary: What ``summary.json`` holds. The score of a row is ``test/<metric>`` of the run ``rows/<row>``,
                the ends of its interval ``test/<metric>/low`` and ``…/high``, all at the last round.
        """
        step = summary["federation"]["rounds"]
        for row, scores in summary["rows"].items():
            values: dict[str, float | None] = {}
            for metric, score in scores.items():
                tag = f"test/{metric}"
                values |= {tag: score["value"], f"{tag}/low": score["low"], f"{tag}/high": score["high"]}
            self._add(f"rows/{_safe(row)}", values, step=step)
        if (writer := self._writer("rows")) is not None:
            writer.add_text("claim", summary["claim"], step)

    def close(self) -> None:
        """Write what is waiting and close the files; nothing may be added afterwards."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()
        self._open = None

    def _add(self, name: str, values: Mapping[str, float | None], *, step: int) -> None:
        writer = self._writer(name)
        for tag, value in values.items():
            if writer is not None and value is not None:
                writer.add_scalar(tag, value, step)

    def _writer(self, name: str) -> Any:
        if self._open is not None and name not in self._writers:
            self._writers[name] = self._open(str(self._folder / name), flush_secs=1)
        return self._writers.get(name)


@cache
def _writer_class() -> Any:
    """The writer of tensorboardX; None where it is not installed, which is said once."""
    try:
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "tensorboardX":
            raise
        print(
            "no events for TensorBoard are written: tensorboardX is not installed (pip install tensorboardX)",
            file=sys.stderr,
        )
        return None
    return SummaryWriter


def _safe(name: str) -> str:
    """A name as one folder, wherever it came from."""
    return re.sub(r"[^\w-]+", "-", name) or "-"
