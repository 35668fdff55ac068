"""The command that names a folder of the owner's data, or shows in counts what is in it."""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client.owner.words import source_lines
from shared.errors import DataError

if TYPE_CHECKING:
    from client.home.home import Home
    from client.home.sources import Source

SUMMARY = "name a folder of your data, or show what is in it"
EXAMPLES = """\
examples:
  sottovoce client source ~/reviews --format csv --columns text=review,target=stars
  sottovoce client source
  sottovoce client source --remove

The folder's files, and those below it, are read in every round and never written: .jsonl or .ndjson, .csv with a
header, .parquet, or .txt and .md, where each paragraph is a record. --columns names the columns of text, target,
response, item and timestamp; in nested JSON as author.name. A rating needs target, a language model response. A row
that is no record is left out and counted; an equal record counts once. What is shown are counts, never a text.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of ``client source``."""
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="your data; it is read, never written")
    _add_columns(parser)
    parser.add_argument("--remove", action="store_true", help="use the folder no more; it stays as it is")


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Of ``client init``."""
    parser.add_argument("--source", type=Path, metavar="FOLDER", help="your data, read only (see: client source)")
    _add_columns(parser)


def _add_columns(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", metavar="NAME", help="of the folder: jsonl, csv, parquet or text")
    parser.add_argument("--columns", metavar="FIELD=COLUMN,…", help="such as text=review,target=stars")


def run(options: argparse.Namespace) -> int:
    """Name a folder, drop it, or show it."""
    from client.home.place import open_owner_home
    from client.home.sources import describe_source
    from client.owner.owner import choose_source, drop_source

    source = named(options.folder, options)
    if source is not None and options.remove:
        raise DataError("source takes a folder or --remove, got both; nothing was changed.")
    home = open_owner_home(options.home)
    if source is not None:
        choose_source(home, source)
    if options.remove:
        drop_source(home)
    found = describe_source(home)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        print("\n".join(source_lines(found) if found else ["data folder: none"]))
    return complain(found)


def named(folder: Path | None, options: argparse.Namespace) -> "Source | None":
    """The folder that a command names, not yet read; None where it names none.

    Raises:
        DataError: Format or columns are missing or impossible, or stand there without a folder.
    """
    from client.home.sources import make_source

    if folder is None:
        if options.format or options.columns:
            raise DataError("--format and --columns tell how to read a folder, none is named; nothing was changed.")
        return None
    if not options.format:
        raise DataError("--format must say how to read the folder: jsonl, csv, parquet or text; nothing was changed.")
    pairs = [pair.partition("=") for pair in (options.columns or "").split(",") if pair]
    columns = {field.strip(): column.strip() for field, _, column in pairs}
    if len(columns) != len(pairs):
        raise DataError("--columns must name each field once, got one again; nothing was changed.")
    return make_source(folder.expanduser(), format=options.format, columns=columns)


def choose(home: "Home", source: "Source") -> list[str]:
    """Make it the home's folder; what it holds, in words."""
    from client.home.sources import describe_source
    from client.owner.owner import choose_source

    choose_source(home, source)
    return source_lines(describe_source(home) or {})


def complain(source: Mapping[str, Any] | None) -> int:
    """Say what keeps a home's folder from being read; the exit code."""
    if not source or not source["problem"]:
        return 0
    print(f"sottovoce: {source['problem']}", file=sys.stderr)
    return 2
