"""Several runs of one task and data side by side: as tables in a terminal, as JSON, and as ``comparison.html``."""

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from shared.errors import DataError
from shared.metrics.ratings import Interval
from simulations.report import page
from simulations.report.figures import Point, privacy_utility, row_by_row
from simulations.report.report import COSTS, NOT_PRIVATE, ROWS
from simulations.report.results import Privacy, RunFolder, Summary, Users, read_run

RESAMPLES = 2000
_SEED = 0  # of the bootstrap: the same runs give the same page
_NONE = "–"


@dataclass(frozen=True)
class Comparison:
    """Runs that may be compared; all else is computed from them."""

    names: list[str]
    runs: list[RunFolder]

    @property
    def summaries(self) -> dict[str, Summary]:
        """Summary by the name of its run."""
        return {name: run.summary for name, run in zip(self.names, self.runs, strict=True)}

    @property
    def metric(self) -> str:
        """The primary metric, the same in all."""
        return self.runs[0].summary.metric

    @property
    def rows(self) -> list[str]:
        """Every row that some run has, in the order of the first."""
        return list(dict.fromkeys(row for run in self.runs for row in run.summary.rows))

    @cached_property
    def differences(self) -> dict[str, dict[str, Interval]]:
        """By the name of every run but the first: ``user_differences`` from the first."""
        pairs = zip(self.names[1:], self.runs[1:], strict=True)
        return {name: user_differences(run.users, self.runs[0].users) for name, run in pairs}


@dataclass(frozen=True)
class _Table:
    """Plain words: the terminal and the page show the same cells. One column a run."""

    title: str
    note: str
    lines: dict[str, list[str]]
    look: str = "runs"


def read_runs(folders: Sequence[Path]) -> Comparison:
    """Read runs that can be compared.

    Args:
        folders: Two run folders or more; the first is the one that others are compared with.

    Raises:
        DataError: A folder is no run, is named twice, or is of another task, metric or data than the first.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise DataError("runs to compare must be different folders, one is named twice. Name each once.")
    runs = [read_run(folder) for folder in folders]
    first = runs[0].summary
    for run in runs[1:]:
        for what, wanted, got in (
            ("task", first.task, run.summary.task),
            ("metric", first.metric, run.summary.metric),
            ("data", _data(first), _data(run.summary)),
            ("metric of each user", runs[0].users.metric, run.users.metric),
        ):
            if wanted != got:
                raise DataError(
                    f"runs to compare must have the same {what}: {folders[0]} has {wanted}, {run.path} has {got}. "
                    "Compare them apart."
                )
    return Comparison(names=_names(folders), runs=runs)


def write_comparison(comparison: Comparison, *, out: Path) -> Path:
    """Write one page that shows the runs side by side.

    Args:
        comparison: From ``read_runs``.
        out: The page; what is there is replaced if it is a comparison, and left alone otherwise.

    Returns:
        ``out``.

    Raises:
        DataError: ``out`` is no place for the page.
    """
    if out.suffix != ".html":
        raise DataError(f"--out must name a file that ends in .html, got {out}. Choose another name.")
    if not out.parent.is_dir():
        raise DataError(f"--out must lie in a folder that exists, got {out}. Make {out.parent} first.")
    if out.exists() and not (out.is_file() and page.is_ours(out, kind="comparison")):
        raise DataError(f"--out must be new or an older comparison, {out} is something else. Choose another name.")
    points = list(_points(comparison))
    row_figures, row_plots = row_by_row(points, metric=comparison.metric)
    own = [point for point in points if point.unit]
    utility_figures, utility_plots = privacy_utility(own, metric=comparison.metric)
    privacy, *tables = (_html(comparison, table) for table in _tables(comparison))
    sections = [
        *_opening(comparison),
        privacy,
        "<h2>Scores</h2>",
        *row_plots,
        *utility_plots,
        *tables,
    ]
    title = f"{len(comparison.runs)} runs compared: Sottovoce"
    page.write(out, page.page(title, "\n".join(sections), figures=row_figures | utility_figures, kind="comparison"))
    return out


def lines(comparison: Comparison) -> list[str]:
    """The tables of a comparison in plain text, one column a run."""
    out = [f"{number}  {run.path}: {run.summary.scenario}" for number, run in enumerate(comparison.runs, start=1)]
    for table in _tables(comparison):
        out += ["", f"{table.title}. {table.note}".strip()]
        cells = [["", *comparison.names], *([key, *line] for key, line in table.lines.items())]
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
        out += [
            "  ".join(cell + " " * (width - len(cell)) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in cells
        ]
    return out


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain values, ready for JSON."""
    first = comparison.runs[0].summary
    return {
        "task": first.task,
        "metric": comparison.metric,
        "better": first.metrics[comparison.metric].better,
        "data": _data(first),
        "runs": [
            {
                "name": name,
                "folder": str(run.path),
                "scenario": run.summary.scenario,
                "private": run.summary.private,
                "seeds": run.summary.seeds,
                "rows": {row: asdict(scores[comparison.metric]) for row, scores in run.summary.rows.items()},
                "privacy": _terms(run.summary.privacy),
                "privacy_linear": _terms(run.summary.privacy_linear),
                "privacy_statistics": _terms(run.summary.privacy_statistics),
                "cost": run.summary.cost,
                "settings": {key: value[number] for key, value in _settings_that_differ(comparison).items()},
            }
            for number, (name, run) in enumerate(zip(comparison.names, comparison.runs, strict=True))
        ],
        "differences": {
            "of": "mean over users of the user's own score in the run minus that in the first run",
            "metric": comparison.runs[0].users.metric,
            "resamples": RESAMPLES,
            "runs": {
                name: {row: asdict(value) for row, value in found.items()}
                for name, found in comparison.differences.items()
            },
        },
    }


def user_differences(run: Users, first: Users) -> dict[str, Interval]:
    """Per row, the mean over users of the difference of their own scores, run minus first.

    Args:
        run: Scores of every user.
        first: Those of the run it is compared with.

    Returns:
        Row -> the mean with the percentiles 2.5 and 97.5 of a bootstrap over users, every row by the same
        resamples; empty where the runs do not hold the same users.

    Source:
        Efron & Tibshirani 1993, An Introduction to the Bootstrap, ch. 13 (percentile interval).
    """
    if set(run.users) != set(first.users) or not run.users:
        return {}
    position = {user: i for i, user in enumerate(first.users)}
    order = [position[user] for user in run.users]
    shared = [row for row in first.rows if row in run.rows]
    gaps = np.array([np.subtract(run.rows[row], np.asarray(first.rows[row])[order]) for row in shared])  # (rows, users)
    random = np.random.default_rng(_SEED)
    drawn = [gaps[:, random.integers(len(order), size=len(order))].mean(axis=1) for _ in range(RESAMPLES)]
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return {row: Interval(float(gaps[i].mean()), float(low[i]), float(high[i])) for i, row in enumerate(shared)}


def _data(summary: Summary) -> str:
    data = summary.data
    return f"{data.name} ({data.users} users, {data.fit} + {data.validation} + {data.test} records)"


def _names(folders: Sequence[Path]) -> list[str]:
    """Numbered folder names: short, and different even where the folders' own names are not."""
    return [f"{number} {folder.resolve().name}" for number, folder in enumerate(folders, start=1)]


def _terms(privacy: Privacy | None) -> dict[str, Any] | None:
    if privacy is None:
        return None
    return {key: getattr(privacy, key) for key in ("trust", "unit", "relation", "epsilon", "delta", "sentence")}


def _settings_that_differ(comparison: Comparison) -> dict[str, list[Any]]:
    """Dotted key -> its value in every run, None where a run does not have it."""
    flat = [dict(_flat(run.settings)) for run in comparison.runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    values = {key: [settings.get(key) for settings in flat] for key in keys}
    return {key: each for key, each in values.items() if any(value != each[0] for value in each)}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _points(comparison: Comparison) -> Iterator[Point]:
    for name, summary in comparison.summaries.items():
        for row, scores in summary.rows.items():
            claim = summary.claim_of(row)
            claimed = claim is not None and claim.trust != "none"
            yield Point(
                run=name if summary.private else f"{name} ({NOT_PRIVATE})",
                row=row,
                score=scores[comparison.metric],
                epsilon=claim.epsilon if claim and claimed else None,
                unit=f"{claim.unit}" if claim else "",
            )


def _tables(comparison: Comparison) -> Iterator[_Table]:
    metric, summaries = comparison.metric, comparison.summaries.values()
    name, better = page.heading(metric), comparison.runs[0].summary.metrics[metric].better
    claims = {"privacy": [_claim(summary.privacy) for summary in summaries]}
    if any(summary.privacy_linear for summary in summaries):
        claims["linear head"] = [_claim(summary.privacy_linear) for summary in summaries]
    if any(summary.privacy_statistics for summary in summaries):
        claims["dp-statistics"] = [_claim(summary.privacy_statistics) for summary in summaries]
    claims["trust"] = [summary.privacy.trust for summary in summaries]
    yield _Table("Privacy", "What the devices of each run would spend.", claims)
    seeds = {"seeds": [", ".join(map(str, summary.seeds)) for summary in summaries]}
    scores = {
        row: [page.score(metric, summary.rows[row][metric]) if row in summary.rows else _NONE for summary in summaries]
        for row in comparison.rows
    }
    yield _Table(name, f"95 % interval from a bootstrap over users; {better} is better.", scores | seeds)
    if any(summary.over_seeds for summary in summaries):
        spread = {row: [_over_seeds(summary, row) for summary in summaries] for row in comparison.rows}
        yield _Table(f"{name} over seeds", "Mean over the seeds of a run with its 95 % t-interval.", spread)
    users = comparison.runs[0].users
    found = [comparison.differences.get(run, {}) for run in comparison.names]
    paired = {
        row: [page.score(users.metric, each[row], digits=4, sign=True) if row in each else _NONE for each in found]
        for row in comparison.rows
        if any(row in each for each in found)
    }
    yield _Table(
        f"Difference from {comparison.names[0]}",
        f"Mean over users of (the user's own {page.heading(users.metric)} in the run minus that in the first run), "
        f"95 % interval from a bootstrap over users. It is a difference of mean scores per user, so it need not equal "
        f"the difference of the scores above; {better} is better. "
        + ("" if paired else "None here: the runs do not hold the same users."),
        paired,
    )
    settings = {key: [page.plain(value) for value in each] for key, each in _settings_that_differ(comparison).items()}
    note = "By their names in the scenario file; – where a run has none." if settings else "None."
    yield _Table("Settings that differ", note, settings, look="words")
    keys = dict.fromkeys(key for summary in summaries for key in summary.cost)
    cost = {COSTS.get(key, key): [page.amount(summary.cost.get(key)) for summary in summaries] for key in keys}
    cost["Continued after a break"] = ["yes, cost of the last process only" if s.resumed else "no" for s in summaries]
    yield _Table("Cost", "Of the main campaign, on the machine of each run.", cost)


def _over_seeds(summary: Summary, row: str) -> str:
    found = summary.over_seeds.get(row, {}).get(summary.metric)
    return page.score(summary.metric, Interval(found.value, found.low, found.high)) if found else _NONE


def _claim(privacy: Privacy | None) -> str:
    """ε with its unit, or that there is none."""
    if privacy is None:
        return _NONE
    if privacy.trust == "none" or privacy.epsilon is None:
        return NOT_PRIVATE
    return f"ε = {privacy.epsilon:.3g} per {privacy.unit}, δ = {page.plain(privacy.delta)}"


def _opening(comparison: Comparison) -> Iterator[str]:
    first = comparison.runs[0].summary
    yield f'<p class="eyebrow">Sottovoce comparison</p>\n<h1>{len(comparison.runs)} runs compared</h1>'
    bare = [name for name, summary in comparison.summaries.items() if not summary.private]
    if bare:
        yield (
            f'<p class="warn"><strong>{NOT_PRIVATE}:</strong> {html.escape(", ".join(bare))}. '
            "A run that makes no privacy claim is no rival of one that does.</p>"
        )
    yield f'<p class="dim">{html.escape(_data(first))}, task {html.escape(first.task)}</p>'
    yield '<ol class="runs">' + page.items(
        f"<strong>{html.escape(run.path.resolve().name)}</strong>: {html.escape(run.summary.scenario)}, "
        f"{html.escape(run.run.created)}<br>{html.escape(run.summary.claim)}"
        for run in comparison.runs
    )
    yield (
        "</ol>\n<p>All of them are simulations: an ε is what a deployment with these settings <em>would</em> spend. "
        "The first run is the one the others are compared with.</p>"
    )


def _html(comparison: Comparison, table: _Table) -> str:
    title = f"<h2>{html.escape(table.title)}</h2>"
    if not table.lines:
        return f"{title}\n<p>{html.escape(table.note)}</p>"
    cells = [[_row_name(key), *(html.escape(cell) for cell in line)] for key, line in table.lines.items()]
    head = ["", *(html.escape(name) for name in comparison.names)]
    return f"{title}\n{page.table(table.note, head, cells, look=table.look)}"


def _row_name(key: str) -> str:
    return html.escape(key) + (f" <small>{ROWS[key]}</small>" if key in ROWS else "")
