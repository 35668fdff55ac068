"""Re-measure the rival ``dp-statistics`` on MovieLens 100k: constants chosen on validation rows, scores on test rows.

Not a matter of speed: what a federated campaign has to match at the same unit, epsilon and delta. Every cell chooses
its constants anew, which is more than the row of a report does; whether that matters is in the table too.
"""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from client.training.site import TextFeatures, resident_base, resident_dataset, use_threads
from shared.config import PrivacyConfig, Scenario, StatisticsConfig, load_scenario
from shared.heads.adapter import make_start
from shared.heads.registry import make_head
from shared.heads.scoring import rmse
from shared.privacy.noise import seeded_generator
from shared.progress import progress
from simulations.machine import about
from simulations.observe.dp_statistics import cosines, promise, release, smooth
from simulations.observe.observe import RatingObserver
from simulations.observe.rows import Rows

_SCENARIO = Path(__file__).parents[1] / "scenarios" / "movielens.toml"
GRID = {"count_weight": (0.3, 0.5, 1.0), "variance": (0.05, 0.1, 0.25), "text_share": (0.5, 0.8)}
TRUST = {"user": "central", "record": "local"}
EPSILONS = (8.0, 3.0, 1.0)
GROUP = 100  # users in a group whose sum is visible, and so carries the whole noise
_CHOOSING = 1000  # seed of the noise that constants are chosen under; no score is measured with it


class _Bench:
    """Texts, features and rows of one data set, and scores on it."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario, self.dataset = scenario, resident_dataset(scenario.data)
        base = resident_base(scenario.model.base)
        texts = TextFeatures(base, scenario, self.dataset)
        head: Any = make_head(base, scenario, public_texts=len(self.dataset.public_texts))
        make_start(head, texts.public(), ridge=scenario.adapter.whitening_ridge, seed=0)
        self.observer = RatingObserver(head, texts, self.dataset, scenario)
        self.features = self.observer.bare_features()
        self.cosines = cosines(self.features, self.observer.public_mean())

    def noise(self, privacy: PrivacyConfig, *, group: int | None = None) -> float:
        """Noise of the sum over all users, in one visible sum or in groups of so many."""
        users = len(self.dataset.users)
        sums = math.ceil(users / group) if group else 1
        return promise(privacy, texts=len(self.features), users=users).sum_noise * math.sqrt(sums)

    def score(
        self, known: Rows, asked: Rows, *, unit: str, noise: float, settings: StatisticsConfig, seed: int
    ) -> tuple[float, float]:
        """RMSE of the shared part alone, and with the private part."""
        generator = seeded_generator(seed=seed, purpose="noise of bench statistics", device=0, round_number=0)
        task = self.scenario.task
        released = release(
            known,
            texts=len(self.features),
            unit=unit,
            sum_noise=noise,
            settings=settings,
            task=task,
            generator=generator,
        )
        shared = smooth(released, self.cosines, settings=settings, task=task)
        seen = self.observer.personalize(self.features, shared, known=known, asked=asked)
        return rmse(seen.shared, asked.target), rmse(seen.personal, asked.target)

    def choose(self, *, unit: str, noise: float) -> tuple[StatisticsConfig, float]:
        """The point of the grid with the best personal score on validation rows, and that score."""
        found = [
            (self.score(self.observer.fit, self.observer.validation, **self._terms(unit, noise, each))[1], number, each)
            for number, each in enumerate(_grid(self.scenario.statistics))
        ]
        best, _, settings = min(found)
        return settings, best

    def test(self, *, unit: str, noise: float, settings: StatisticsConfig, seeds: int) -> dict[str, Any]:
        """Scores on test rows, one a seed; released is what all training rows give."""
        terms = self._terms(unit, noise, settings)
        found = [self.score(self.observer.train, self.observer.test, **terms | {"seed": seed}) for seed in range(seeds)]
        shared, personal = np.array(found).T
        return {"shared": _spread(shared), "personal": _spread(personal)}

    @staticmethod
    def _terms(unit: str, noise: float, settings: StatisticsConfig) -> dict[str, Any]:
        return {"unit": unit, "noise": noise, "settings": settings, "seed": _CHOOSING}


def measure(*, rounds: int = 4, quiet: bool = False, scenario: Scenario | None = None) -> dict[str, Any]:
    """Choose the constants for every unit and epsilon, and score them on test rows.

    Args:
        rounds: Seeds of the noise in every cell.
        quiet: Show no progress.
        scenario: Data, base, delta and private part; by default the shipped one.

    Returns:
        ``cells``: unit, trust, epsilon, what was ``chosen``, its ``validation`` score; ``test``, the scores ``shared``
        and ``personal`` with mean, sd and values; ``test_at_defaults``, the same with the row's own constants; at unit
        user ``test_in_groups`` of ``group`` users, each with the whole noise. Machine and versions.
    """
    scenario = scenario or load_scenario(_SCENARIO)
    use_threads(scenario.performance.threads)
    bench = _Bench(scenario)
    cells = [(unit, epsilon) for unit in TRUST for epsilon in (None, *EPSILONS)]
    with progress(total=len(cells), description="bench statistics", unit="cell", quiet=quiet) as bar:
        measured = []
        for unit, epsilon in cells:
            measured.append(_measure_cell(bench, unit, epsilon, seeds=rounds))
            bar.update(1)
    return {
        "data": bench.dataset.name,
        "seeds": rounds,
        "delta": scenario.privacy.delta,
        "group": GROUP,
        "personal": scenario.personal.model_dump(),
        "cells": measured,
        **about("numpy", "scipy", "dp-accounting"),
    }


def _measure_cell(bench: _Bench, unit: str, epsilon: float | None, *, seeds: int) -> dict[str, Any]:
    trust = TRUST[unit] if epsilon else "none"
    changes = {"unit": unit, "trust": trust} | ({"epsilon": epsilon} if epsilon else {})
    privacy = bench.scenario.privacy.model_copy(update=changes)
    noise, defaults = bench.noise(privacy), bench.scenario.statistics
    settings, validation = bench.choose(unit=unit, noise=noise)
    cell = {
        "unit": unit,
        "trust": trust,
        "epsilon": epsilon,
        "chosen": {name: getattr(settings, name) for name in GRID},
        "validation": validation,
        "test": bench.test(unit=unit, noise=noise, settings=settings, seeds=seeds if epsilon else 1),
        "test_at_defaults": bench.test(unit=unit, noise=noise, settings=defaults, seeds=seeds if epsilon else 1),
    }
    if unit == "user" and epsilon:
        noise = bench.noise(privacy, group=GROUP)
        cell["test_in_groups"] = bench.test(unit=unit, noise=noise, settings=settings, seeds=seeds)
    return cell


def _grid(settings: StatisticsConfig) -> Iterator[StatisticsConfig]:
    for values in itertools.product(*GRID.values()):
        yield settings.model_copy(update=dict(zip(GRID, values, strict=True)))


def _spread(values: np.ndarray) -> dict[str, Any]:
    sd = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(values.mean()), "sd": sd, "values": values.tolist()}


def lines(measured: dict[str, Any]) -> list[str]:
    """The measurements for a reader."""
    out = [
        f"dp-statistics on {measured['data']}: RMSE on test rows, mean of {measured['seeds']} seeds (sd); "
        f"delta {measured['delta']:g}; constants chosen on validation rows",
        f"{'unit':<8}{'epsilon':>8}  {'shared':>14}  {'personal':>14}  {'at defaults':>14}  "
        f"{'groups of ' + str(measured['group']):>14}  chosen",
    ]
    for cell in measured["cells"]:
        groups = cell.get("test_in_groups")
        scores = (cell["test"]["shared"], cell["test"]["personal"], cell["test_at_defaults"]["personal"])
        words = [_words(score) for score in scores] + [_words(groups["personal"]) if groups else "–"]
        chosen = ", ".join(f"{name} {value:g}" for name, value in cell["chosen"].items())
        epsilon = f"{cell['epsilon']:g}" if cell["epsilon"] else "–"
        out.append(f"{cell['unit']:<8}{epsilon:>8}  " + "  ".join(f"{word:>14}" for word in words) + f"  {chosen}")
    return out


def _words(score: dict[str, Any]) -> str:
    return f"{score['mean']:.4f} ({score['sd']:.4f})"
