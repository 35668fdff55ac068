"""What a reader finds in a folder, before anything is run on it: ``sottovoce data inspect``."""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from shared.assets import resolve
from shared.config import DataConfig, load_scenario
from shared.datasets import READERS, Dataset, Record, choose_users, read
from shared.errors import ScenarioError
from shared.registry import check_name

_SHORT = 100  # characters of a text that are shown
_MOST_VALUES = 8  # of an attribute that are shown
_LONGEST_VALUE = 32  # characters of an attribute; longer ones are texts


def inspect_data(
    what: str,
    *,
    source: str | None = None,
    columns: Mapping[str, str] | None = None,
    show_text: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Read a data set and describe it.

    Args:
        what: A scenario file, or the name of a format.
        source: ``asset:NAME`` or a folder; may be left out where ``what`` is a scenario, which names its own.
        columns: Of ``jsonl``, ``csv`` and ``parquet``: field of a record, or ``user`` -> column; replaces a scenario's.
        show_text: Whether what a user reads and writes is part of the answer.
        quiet: Show nothing while downloading.

    Returns:
        Counts and ranges, what users state of themselves, and the first record of the first user.

    Raises:
        ScenarioError: Neither a scenario file nor a format, or a format without a source.
        AssetError: The source cannot be had.
        DataError: A file is missing or not as its format says; file and line are named.
    """
    data = _data_of(what, source)
    if columns:
        data = data.model_copy(update={"columns": dict(columns)})
    folder = resolve(data.source, quiet=quiet)
    everybody = read(data.format, folder, columns=data.columns, min_records=data.min_records)
    dataset = choose_users(everybody, data.users, tuning_share=data.tuning_share)
    return {"format": data.format, "source": data.source, "folder": str(folder)} | describe_data(
        dataset, show_text=show_text
    )


def describe_data(dataset: Dataset, *, show_text: bool) -> dict[str, Any]:
    """Counts and ranges of a data set, and its first record."""
    sizes = {part: [len(getattr(user, part)) for user in dataset.users] for part in ("fit", "validation", "test")}
    each = [sum(parts) for parts in zip(*sizes.values(), strict=True)]
    records = [record for user in dataset.users for record in user.train + user.test]
    with_records = next(user for user in dataset.users if user.train or user.test)
    first = (with_records.train + with_records.test)[0]
    return {
        "users": len(dataset.users),
        "records": len(records),
        "records_per_user": _spread(each),
        "parts": {part: sum(counts) for part, counts in sizes.items()},
        "users_without_test_records": sizes["test"].count(0),
        "text_characters": _spread(len(record.text) for record in records),
        "response_characters": _spread(len(record.response) for record in records),
        "target": _spread(record.target for record in records),
        "distinct_texts": len({record.text for record in records}),
        "distinct_public_texts": len(dataset.public_texts),
        "left_out": dict(dataset.left_out),
        "profiles": _profiles(dataset, show_text=show_text),
        "first_record": {"user": with_records.user} | _describe_record(first, show_text=show_text),
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The same for a reader."""
    first = found["first_record"]
    parts = ", ".join(f"{count:,} {part}" for part, count in found["parts"].items())
    out = [
        f"format:               {found['format']}",
        f"folder:               {found['folder']}",
        f"users:                {found['users']:,}, {found['users_without_test_records']:,} without a test record",
        f"records:              {found['records']:,} ({parts})",
        f"records per user:     {_range(found['records_per_user'])}",
        f"characters of a text: {_range(found['text_characters'])}",
    ]
    if found["response_characters"]["max"]:
        out.append(f"… of a response:      {_range(found['response_characters'])}")
    return [
        *out,
        f"target:               {_range(found['target'])}",
        f"distinct texts:       {found['distinct_texts']:,} of records, {found['distinct_public_texts']:,} public",
        *(f"left out:             {count:,} {reason}" for reason, count in found["left_out"].items()),
        *(f"profile:              {name}: {_values(counts)}" for name, counts in found["profiles"].items()),
        "first record:         " + ", ".join(f"{key} {value}" for key, value in first.items() if value != ""),
    ]


def _profiles(dataset: Dataset, *, show_text: bool) -> dict[str, dict[str, int]]:
    """Attribute -> value -> how many users state it, the most frequent first."""
    names = sorted({name for user in dataset.users for name in user.profile})
    stated = {name: [user.profile[name] for user in dataset.users if name in user.profile] for name in names}
    return {
        name: dict(Counter(values).most_common())
        if show_text or max(map(len, values)) <= _LONGEST_VALUE
        else {"(texts; --show-text shows them)": len(values)}
        for name, values in stated.items()
    }


def _values(counts: Mapping[str, int]) -> str:
    shown = [f"{value} {count:,}" for value, count in list(counts.items())[:_MOST_VALUES]]
    return ", ".join([*shown, f"{len(counts) - _MOST_VALUES} more"] if len(counts) > _MOST_VALUES else shown)


def _data_of(what: str, source: str | None) -> DataConfig:
    if Path(what).suffix in {".toml", ".json"} or Path(what).is_file():
        data = load_scenario(Path(what)).data
        return data.model_copy(update={"source": source or data.source})
    check_name("readers", what, READERS, setting="SCENARIO must be a file, or FORMAT")
    if source is None:
        raise ScenarioError(f"--source must name where data of format {what!r} lie: a folder, or asset:NAME.")
    return DataConfig(format=what, source=source)


def _describe_record(record: Record, *, show_text: bool) -> dict[str, Any]:
    shown = {"item": record.item, "timestamp": record.timestamp, "target": record.target}
    for name, text in (("text", record.text), ("response", record.response)):
        if show_text:
            shown[name] = text if len(text) <= _SHORT else f"{text[: _SHORT - 1]}…"
        else:
            shown[name] = f"({len(text)} characters; --show-text shows them)" if text else ""
    return shown


def _spread(values: Iterable[float]) -> dict[str, float]:
    known = list(values)
    return {"min": min(known), "median": statistics.median(known), "max": max(known)}


def _range(spread: dict[str, float]) -> str:
    return f"{spread['min']:,g} to {spread['max']:,g}, median {spread['median']:,g}"
