"""``metrics.jsonl``: one line for every observed round, whole or absent, and the same after an interrupted run."""

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shared.files import read_json_lines, write_atomically

Key = tuple[str, int]  # campaign and seed


class Journal:
    """The lines of a run, on disk as soon as they are added.

    Args:
        path: The file; where it exists, an interrupted run is taken up.
        last_round: Per campaign and seed the round it goes on from; later lines are dropped, they will come again.
        on_line: Called with every line, those kept first.
    """

    def __init__(
        self, path: Path, last_round: Mapping[Key, int], *, on_line: Callable[[dict[str, Any]], object] | None = None
    ) -> None:
        self._path, self._on_line = path, on_line
        self._order = {key: place for place, key in enumerate(last_round)}
        self._lock = threading.Lock()
        self._seen: set[tuple[str, int, int]] = set()
        kept = [line for line in _read(path) if line["round"] <= last_round.get((line["campaign"], line["seed"]), -1)]
        self._rewrite(kept)
        for line in kept:
            self._take(line)

    def has(self, campaign: str, seed: int, round_number: int) -> bool:
        """Whether there is a line of this round."""
        return (campaign, seed, round_number) in self._seen

    def add(self, line: dict[str, Any]) -> None:
        """Append a line."""
        with self._lock:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self._take(line)

    def sort(self) -> None:
        """Put the lines in the order of an uninterrupted run."""
        lines = sorted(_read(self._path), key=lambda line: (self._order[line["campaign"], line["seed"]], line["round"]))
        self._rewrite(lines)

    def _rewrite(self, lines: list[dict[str, Any]]) -> None:
        write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def _take(self, line: dict[str, Any]) -> None:
        self._seen.add((line["campaign"], line["seed"], line["round"]))
        if self._on_line:
            self._on_line(line)


def _read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that a kill may have cut short; what is not a whole line is written again."""
    return [
        {"campaign": line["campaign"], "seed": line["seed"], "round": line["round"]} | line
        for line in read_json_lines(path)
        if {"campaign", "seed", "round"} <= line.keys()
    ]
