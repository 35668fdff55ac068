"""The command ``sottovoce sweep``: a study, one question as many runs."""

import argparse
import json
import shlex
import sys
from pathlib import Path

from shared.errors import ScenarioError

_EPILOG = """\
examples:
  sottovoce sweep simulations/studies/frontier.toml --dry-run     the runs, what each would spend, how long it may take
  sottovoce sweep simulations/studies/frontier.toml               play them; goes on where an earlier sweep ended
  sottovoce sweep simulations/studies/frontier.toml --workers 1 --out studies/slow

A study file names a scenario and a grid of settings, points, or a search. Its folder holds one run folder a run,
results.parquet with every number of all of them, and report.html.

Exit code: 0 every run is finished, 1 one failed (study.json says why; the others are kept), 2 there is nothing to play.
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register ``sweep``."""
    parser = commands.add_parser(
        "sweep",
        help="play a study: many runs of one scenario into one table and one report",
        description="Play a study: a grid of settings, points or a seeded search over one scenario, on workers beside "
        "each other. A sweep that was interrupted goes on where it was; a finished run is never played again.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", type=Path, help="a study file (TOML)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the study's folder (default: studies/NAME)")
    parser.add_argument("--workers", type=_count, metavar="N", help="runs at once (default: one for each processor)")
    parser.add_argument(
        "--engine", choices=("processes", "ray"), default="processes", help="where workers live (default: processes)"
    )
    parser.add_argument("--ray-address", metavar="ADDRESS", help="of a Ray cluster that runs; all must see --out")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and their cost; play nothing")
    parser.add_argument("--report-only", action="store_true", help="write the report of what is finished again")
    parser.add_argument("--quiet", action="store_true", help="no live table")
    parser.add_argument("--json", action="store_true", help="print what came of it (or the plan) as JSON")
    parser.set_defaults(handler=_sweep)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 1024, got {text!r}")
    return int(text)


def _sweep(options: argparse.Namespace) -> int:
    from simulations.study.config import load_study

    study = load_study(options.study)
    out: Path = options.out or Path("studies") / study.name
    if options.dry_run:
        from simulations.study.forecast import forecast, lines

        plan = forecast(options.study, out=out, workers=options.workers)
        print(json.dumps(plan, indent=2) if options.json else "\n".join(lines(plan)))
        return 0
    if options.ray_address and options.engine != "ray":
        raise ScenarioError("--ray-address needs --engine ray, got --engine processes.")
    code = 0
    if not options.report_only:
        from simulations.study.run import sweep

        played = sweep(
            options.study,
            out=out,
            workers=options.workers,
            engine=options.engine,
            address=options.ray_address,
            quiet=options.quiet,
            command=shlex.join(["sottovoce", *sys.argv[1:]]),
        )
        code = 1 if played.failures else 0
    show_outcome(out, as_json=options.json)
    return code


def show_outcome(folder: Path, *, as_json: bool) -> None:
    """Write the report of what is finished in a study's folder, and print what came of it."""
    from simulations.study.outcome import lines, outcome

    found = outcome(folder)
    if found["points"]:
        from simulations.study.report import claims, write_report

        found |= {"report": str(write_report(folder).resolve()), "headline": claims(folder)}
    print(json.dumps(found, indent=2) if as_json else "\n".join(lines(found)))
