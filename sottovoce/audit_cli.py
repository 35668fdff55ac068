"""The command ``sottovoce audit``: attack what a scenario, a run or a campaign would send."""

import argparse
from pathlib import Path

from shared.errors import ScenarioError
from shared.files import write_atomically

_EPILOG = """\
examples:
  sottovoce audit simulations/scenarios/movielens.toml
  sottovoce audit runs/first --level full                         also into runs/first: audit.json and the report
  sottovoce audit simulations/scenarios/movielens.toml --set privacy.epsilon=2 --json

Every level attacks the code that devices and server run, reads the bytes between them, and runs the same attack where
nothing is protected and where a fault was put in on purpose: a level that misses either has no result.

  L0  record-play    one record more, the same randomness: only the clipped sum may differ, and by no more than C
  L1  canaries       a thousand gradients that are easy to see, and the one-run bound on epsilon
  L2  sentences      the same with sentences and a small language model (--level full)
  L5  inversion      what was said, from the bytes of a LoRA update

Exit code: 0 every level passed, 1 one did not or has no result, 2 there is nothing to audit.
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register ``audit``."""
    parser = commands.add_parser(
        "audit",
        help="attack what a scenario, a run or a campaign sends, with controls that prove the attack",
        description="Attack what a scenario, a run or a published campaign sends, and compare with what it claims.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source", type=Path, metavar="SCENARIO|RUN", help="a scenario file; the folder of a run, or of a campaign"
    )
    parser.add_argument("--level", choices=("quick", "full"), default="quick", help="how much to attack")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="change one setting"
    )
    parser.add_argument("--seed", type=_seed, default=0, help="of coins and canaries (default 0)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write audit.json here too (default: into a run)")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    parser.set_defaults(handler=_audit)


def _seed(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, got {text!r}")
    return int(text)


def _audit(options: argparse.Namespace) -> int:
    source: Path = options.source
    if not source.exists():
        raise ScenarioError(
            f"{source} must be a scenario file, or the folder of a run or of a campaign; it is not there."
        )
    out: Path | None = options.out
    if out is not None and (out.is_dir() or not out.resolve().parent.is_dir()):
        raise ScenarioError(f"--out must name a file in a folder that exists, got {out}.")
    from simulations.audit.run import place_of, run_audit
    from simulations.audit.words import lines

    audit = run_audit(
        source, level=options.level, overrides=tuple(options.overrides), seed=options.seed, quiet=options.quiet
    )
    print(audit.to_json() if options.json else "\n".join([*lines(audit), ""]), end="", flush=True)
    for path in filter(None, (place_of(source), out)):  # after the words: no work is lost to a full disk
        write_atomically(path, audit.to_json().encode())
        if not options.json:
            print(f"audit: {path.resolve()}")
    if (source / "summary.json").is_file():
        from simulations.report.report import write_report

        write_report(source)
    return 0 if audit.passed else 1
