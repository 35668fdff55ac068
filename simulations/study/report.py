"""Write a study's report from its folder alone: ``report.html``, figures for a paper, the tables behind them."""

import csv
import html
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from shared.errors import DataError
from simulations.report import page
from simulations.study.config import Study
from simulations.study.found import read_found
from simulations.study.headline import Answer, answer, section, table, words
from simulations.study.outcome import PLAN, read_plan
from simulations.study.page import study_page
from simulations.study.points import Found
from simulations.study.store import NOT_AUDITED, RUNS, finished_runs

FIGURES, HEADLINE, PAGE = "figures", "headline.csv", "report.html"


def write_report(folder: Path) -> Path:
    """Write a study's page and figures from what lies in its folder, and from nothing else.

    Args:
        folder: As ``sottovoce sweep`` writes it, finished or not.

    Returns:
        Path of ``report.html``; beside it ``figures/`` with every figure as PNG, SVG and CSV, and ``headline.csv``
        where the study answers claims of papers.

    Raises:
        DataError: The folder is of no study, holds no finished run, or a claim asks for what no run has.

    Guarantee:
        The page loads nothing: its content policy refuses every address and every script but its own two.
    """
    from simulations.study.plots import write_figures  # matplotlib, which only this needs

    study, plan = _study(folder), read_plan(folder)
    found = read_found(folder)
    answers, unanswered = _answers(study, folder)
    files = write_figures(found, folder / FIGURES)
    if answers:
        with (folder / HEADLINE).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(table(answers))
    body = [*_opening(folder, study, plan, found), *section(answers), *_unanswered(unanswered), *_files(folder, files)]
    target = folder / PAGE
    page.write(target, study_page(f"{study.name}: a Sottovoce study", body, found))
    return target


def claims(folder: Path) -> list[str]:
    """What a study says to the claims of papers, a line each, plain text; those it cannot answer too.

    Raises:
        DataError: As ``write_report``.
    """
    answers, unanswered = _answers(_study(folder), folder)
    lines = [f"{one.headline.claim}: {one.verdict}, {words(one)} (paper: {one.headline.paper})" for one in answers]
    return [*lines, *(f"{claim}: no answer, {why}" for claim, why in unanswered)]


def _study(folder: Path) -> Study:
    try:
        return Study.model_validate_json(json.dumps(read_plan(folder)["study"]))
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]
        raise DataError(
            f"{folder / PLAN} must hold a study, at {'.'.join(map(str, reason['loc']))}: {reason['msg']}. Another "
            "version of sottovoce wrote it: sweep into a new folder."
        ) from None


def _answers(study: Study, folder: Path) -> tuple[list[Answer], list[tuple[str, str]]]:
    """The claims that can be answered, and those that cannot: a failed run takes only its own claims with it."""
    if not study.headline:
        return [], []
    runs, answers, unanswered = finished_runs(folder), [], []
    for claim in study.headline:
        try:
            answers.append(answer(claim, runs))
        except DataError as error:
            unanswered.append((claim.claim, str(error)))
    return answers, unanswered


def _opening(folder: Path, study: Study, plan: dict[str, Any], found: Found) -> Iterator[str]:
    yield f'<p class="eyebrow">Sottovoce study</p>\n<h1>{html.escape(study.name)}</h1>'
    if study.about:
        yield f"<p>{html.escape(study.about)}</p>"
    runs, failures = plan.get("runs") or [], plan.get("failures") or []
    points = {run["point"] for run in runs}
    tried = sum(run.get("trial") is not None for run in runs)
    said = f"{len(runs)} runs of {len(points)} points, seeds {', '.join(map(str, study.seeds))}"
    said += f", {tried} of them trials of a search" if tried else ""
    yield f'<p class="dim">{said}; scenario {html.escape(study.scenario)}, commit {page.text(plan.get("commit"))}</p>'
    bare = list(dict.fromkeys(one.group.label for one in found.results if one.group.trust == "none"))
    if bare:
        yield (
            f'<p class="warn"><strong>NOT PRIVATE:</strong> {html.escape("; ".join(bare))}. '
            "What makes no privacy claim is no rival of what does: it says what privacy costs.</p>"
        )
    yield (
        "<h2>These are simulations</h2>\n<p>Every device was simulated on machines that held the data of all of them. "
        "An ε is what a deployment with a point's settings <em>would</em> spend; claims per record and per user are "
        "different promises, and less ε is no stronger promise across them. Intervals are over users; they say nothing "
        "of the choice among points.</p>"
    )
    if told := plan.get("said") or []:
        yield f"<h2>What was chosen, and what the choice costs</h2>\n<ul>{page.items(map(html.escape, told))}</ul>"
    if tuning := plan.get("tuning"):
        yield page.details("Every trial", _trials(tuning))
    if failures:
        yield "<h2>What failed</h2>"
        yield f"<p>{len(failures)} of {len(runs)} runs ended with an error and are in no figure.</p>"
        yield page.table(
            "Runs that failed",
            ["point", "seed", "error"],
            [[html.escape(str(one.get(key, ""))) for key in ("point", "seed", "error")] for one in failures],
            look="words",
        )
    if refused := _not_audited(folder, runs):
        yield "<h2>What was not audited</h2>"
        yield f"<p>An audit refused these points; they have no lower bound.</p>\n<ul>{page.items(refused)}</ul>"
    finished = {one.group.label for one in found.results}
    if missing := sorted(point for point in points if point not in finished and not _is_trial(runs, point)):
        yield f'<p class="warn">Not in the figures, because not finished: {html.escape("; ".join(missing))}.</p>'


def _trials(tuning: dict[str, Any]) -> str:
    """What was tried and scored on validation records, the best first, those that failed last."""
    sign = 1 if tuning["better"] == "less" else -1
    ranked = sorted(
        tuning["trials"], key=lambda one: (one["score"] is None, sign * (one["score"] or 0.0), one["trial"])
    )
    keys = list(tuning["settings"])
    rows = [
        [
            f"{one['trial']}{' (chosen)' if one['trial'] == tuning['best'] else ''}",
            *(_short(one["settings"].get(key)) for key in keys),
            "failed" if one["score"] is None else f"{one['score']:.4f}",
        ]
        for one in ranked
    ]
    head = ["trial", *map(html.escape, keys), f"{html.escape(tuning['metric'])}, validation"]
    return page.table(f"Trials by the row {tuning['row']}, on validation records", head, rows)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else page.text(value)


def _not_audited(folder: Path, runs: Sequence[dict[str, Any]]) -> list[str]:
    """Reason -> the points, as HTML, in the order of the study."""
    reasons: dict[str, list[str]] = {}
    for run in runs:
        path = folder / RUNS / run["key"] / NOT_AUDITED
        if path.is_file():
            reasons.setdefault(path.read_text(encoding="utf-8").strip(), []).append(run["point"])
    return [f"{html.escape('; '.join(dict.fromkeys(points)))}: {html.escape(why)}" for why, points in reasons.items()]


def _is_trial(runs: Sequence[dict[str, Any]], point: str) -> bool:
    return all(run.get("trial") is not None for run in runs if run["point"] == point)


def _unanswered(unanswered: Sequence[tuple[str, str]]) -> Iterator[str]:
    if unanswered:
        yield "<h3>Claims without an answer</h3>"
        yield f"<ul>{page.items(f'{html.escape(claim)}: {html.escape(why)}' for claim, why in unanswered)}</ul>"


def _files(folder: Path, files: Sequence[Path]) -> Iterator[str]:
    """Where the figures for a paper lie; the links work while the page stands in its folder."""
    by_name: dict[str, list[Path]] = {}
    for path in files:
        by_name.setdefault(path.stem, []).append(path)
    lists = (
        f"{html.escape(name)}: "
        + ", ".join(
            f'<a href="{html.escape(path.relative_to(folder).as_posix())}">{path.suffix[1:].upper()}</a>'
            for path in paths
        )
        for name, paths in by_name.items()
    )
    yield page.details("The same as files for a paper", f"<ul>{page.items(lists)}</ul>")
