"""The command ``sottovoce lamp``: score files of LaMP answers, and make data in LaMP's format."""

import argparse
import json
from pathlib import Path

_SCORE = """\
examples:
  sottovoce lamp score runs/lamp-3/predictions.json data/lamp-3/dev_outputs.json
  sottovoce lamp score runs/lamp-2/predictions.json data/lamp-2/dev_outputs.json --labels loved,fine,disliked

Accuracy and macro-F1 over the whole label list (LaMP-1 and 2), MAE and RMSE (3), ROUGE-1 and ROUGE-L (4 to 7). The
predictions must have exactly the ids of the golds.
"""
_MAKE = """\
examples:
  sottovoce lamp make --from movielens-100k asset:ml-100k --task lamp-3 --out data/lamp-3
  sottovoce lamp make --from movielens-100k asset:ml-100k --task lamp-2 --out data/lamp-2
  sottovoce lamp make --from sotu builtin:sotu --task lamp-4 --out data/lamp-4

What is made has LaMP's form and none of its content: its numbers say nothing about LaMP. lamp-3 asks for a rating,
lamp-2 whether a user loved or disliked a film, or found it fine: above, below or around the mean of their own ratings,
lamp-4 for what the user wrote after a text.
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register ``lamp``."""
    parser = commands.add_parser(
        "lamp",
        help="LaMP's files: score predictions, make a stand-in of other data",
        description="The files of the benchmark LaMP: score predictions, make a stand-in of other data.",
    )
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    scoring = actions.add_parser(
        "score",
        help="score predictions against gold answers, as LaMP does",
        description="Score a file of predictions against a file of gold answers with LaMP's own conventions.",
        epilog=_SCORE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    scoring.add_argument("predictions", type=Path, metavar="PREDICTIONS", help="such as predictions.json of a run")
    scoring.add_argument("golds", type=Path, metavar="GOLDS", help="such as dev_outputs.json")
    scoring.add_argument("--labels", metavar="A,B,…", default="", help="every label, where they are not LaMP's own")
    scoring.add_argument("--json", action="store_true", help="print as JSON")
    scoring.set_defaults(handler=_score)
    making = actions.add_parser(
        "make",
        help="write a stand-in in LaMP's format, of data in another",
        description="Write a stand-in for LaMP-2, 3 or 4, in LaMP's format, of data in another.",
        epilog=_MAKE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    making.add_argument("source", metavar="SOURCE", help="where the data lie: a folder, asset:NAME or builtin:NAME")
    making.add_argument("--from", dest="format", required=True, metavar="FORMAT", help="theirs; see: sottovoce list")
    making.add_argument("--task", required=True, choices=("lamp-2", "lamp-3", "lamp-4"), help="what is asked")
    making.add_argument("--split", choices=("time", "user"), default="time", help="LaMP's two ways (default: time)")
    making.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    making.add_argument("--quiet", action="store_true", help="no progress")
    making.set_defaults(handler=_make)


def _score(options: argparse.Namespace) -> int:
    from shared.metrics.lamp import read_answers, score

    labels = [label.strip() for label in options.labels.split(",") if label.strip()]
    gold = read_answers(options.golds)
    scores = score(read_answers(options.predictions), gold, labels=labels)
    if options.json:
        print(json.dumps({"task": f"LaMP_{gold.task}", "questions": len(gold.outputs), **scores}, indent=2))
    else:
        print(f"LaMP_{gold.task}, {len(gold.outputs):,} questions")
        print("\n".join(f"{name:<9} {value:.4f}" for name, value in scores.items()))
    return 0


def _make(options: argparse.Namespace) -> int:
    from simulations.lamp import make

    made = make(
        options.format, options.source, task=options.task, out=options.out, split=options.split, quiet=options.quiet
    )
    questions = ", ".join(f"{count:,} {split}" for split, count in made.questions.items())
    print(f"questions: {questions}; {made.items:,} profile items, {made.public_texts:,} public texts")
    if made.public_texts < 2:
        print("the data name no public texts: put some into public.txt beside the files, one a line")
    print(f"folder: {made.folder.resolve()}")
    return 0
