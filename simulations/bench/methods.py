"""Compare the personal methods on MovieLens 100k: constants chosen on validation rows, scores on test rows.

Not a matter of speed. The methods follow the federation, so that all of them stand on the very same shared arrays: one
campaign a cell, without privacy and with it. Whether they answer what a hand computation does, tests say.
"""

import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from client.training.site import TextFeatures, resident_base, resident_dataset, use_threads
from server.checkpoint import newest_checkpoint
from shared.config import PersonalConfig, Scenario, load_scenario
from shared.heads.adapter import Arrays, load_start, make_start
from shared.heads.registry import make_head
from shared.heads.scoring import rmse
from shared.metrics.ratings import user_rmse
from shared.progress import progress
from simulations.machine import about
from simulations.observe.observe import RatingObserver
from simulations.run import simulate

_SCENARIO = Path(__file__).parents[1] / "scenarios" / "retrieval.toml"
TRUSTS = ("none", "local")  # with the scenario's epsilon under local
_MEMORY = {"ridge": (0.1, 0.3), "temperature": (0.1, 0.2), "neighbours": (20,)}
# Row -> settings that are fixed, and the grid of those that are chosen.
METHODS: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Sequence[Any]]]] = {
    "none": ({"method": "none"}, {}),
    "fine-tune": ({"method": "fine-tune"}, {"ridge": (1.0, 3.0, 10.0), "bias_shrinkage": (5.0, 10.0)}),
    "ditto": ({"method": "ditto"}, {"proximal": (0.00001, 0.0001, 0.001, 0.01)}),
    "feddpa": (
        {"method": "feddpa"},
        {"learning_rate": (0.03, 0.1), "neighbours": (5,)},
    ),
    "retrieval, dense": ({"method": "retrieval", "retriever": "dense"}, _MEMORY),
    "retrieval, bm25": ({"method": "retrieval", "retriever": "bm25"}, _MEMORY),
    "retrieval, recency": (
        {"method": "retrieval", "retriever": "recency"},
        {"ridge": (3.0, 10.0), "neighbours": (20, 50)},
    ),
}


def measure(*, rounds: int = 1, quiet: bool = False, scenario: Scenario | None = None) -> dict[str, Any]:
    """Train the shared part once a trust and seed, then choose and score every method on it.

    Args:
        rounds: Seeds: everything that is drawn is drawn anew for each. Constants are chosen with the first.
        quiet: No progress on stderr.
        scenario: Of task ``rating``; by default the shipped one.

    Returns:
        ``cells``: trust, epsilon, method, what was ``chosen``, its ``validation`` RMSE, and of test rows ``rmse`` and
        ``user_rmse``, one a seed. Machine and versions.
    """
    scenario = scenario or load_scenario(_SCENARIO)
    use_threads(scenario.performance.threads)
    cells = []
    with progress(
        total=len(TRUSTS) * rounds * len(METHODS), description="bench methods", unit="row", quiet=quiet
    ) as bar:
        for trust in TRUSTS:
            rows: dict[str, dict[str, Any]] = {}
            for seed in range(scenario.seed, scenario.seed + rounds):
                changed = _changed(scenario, trust, seed)
                arrays = train(changed)
                for name in METHODS:
                    row = rows.setdefault(name, _choose(changed, name, arrays) | {"rmse": [], "user_rmse": []})
                    for metric, value in _test(changed, row["personal"], arrays).items():
                        row[metric].append(value)
                    bar.update(1)
            epsilon = None if trust == "none" else scenario.privacy.epsilon
            cells += [{"trust": trust, "epsilon": epsilon, "method": name, **row} for name, row in rows.items()]
    return {
        "data": scenario.data.source,
        "seeds": rounds,
        "delta": scenario.privacy.delta,
        "cells": [{key: value for key, value in cell.items() if key != "personal"} for cell in cells],
        **about("numpy", "torch", "flwr"),
    }


def _changed(scenario: Scenario, trust: str, seed: int) -> Scenario:
    tables = {
        "privacy": {"trust": trust},
        "personal": {"method": "none"},
        "linear": {"enabled": False},
        "statistics": {"enabled": False},
        "export": {"users": 0},
        "evaluation": {"every_rounds": scenario.federation.rounds, "seeds": 1, "cold_start": ()},
    }
    update = {name: getattr(scenario, name).model_copy(update=table) for name, table in tables.items()}
    return scenario.model_copy(update={**update, "seed": seed})


def train(scenario: Scenario) -> Arrays:
    """Shared arrays of a scenario's campaign."""
    with tempfile.TemporaryDirectory() as folder:
        simulate(scenario, out=Path(folder) / "run", command="bench", quiet=True)
        (checkpoints,) = (Path(folder) / "run" / "campaigns").glob("*/checkpoints")
        last = newest_checkpoint(checkpoints)
        return dict(last.arrays) if last else {}


def observer_of(scenario: Scenario) -> RatingObserver:
    """The observer of a scenario, at the public start."""
    base, dataset = resident_base(scenario.model.base), resident_dataset(scenario.data)
    texts = TextFeatures(base, scenario, dataset)
    head: Any = make_head(base, scenario, public_texts=len(dataset.public_texts))
    load_start(head, make_start(head, texts.public(), ridge=scenario.adapter.whitening_ridge, seed=scenario.seed))
    return RatingObserver(head, texts, dataset, scenario)


def _with(scenario: Scenario, personal: PersonalConfig) -> RatingObserver:
    return observer_of(scenario.model_copy(update={"personal": personal}))


def _choose(scenario: Scenario, name: str, arrays: Arrays) -> dict[str, Any]:
    """The point of the grid with the best personal score on validation rows."""
    fixed, grid = METHODS[name]
    tried = []
    for number, point in enumerate(_grid(grid)):
        personal = PersonalConfig.model_validate({**scenario.personal.model_dump(), **fixed, **point})
        tried.append((_with(scenario, personal).validate(arrays)["personal"], number, point, personal))
    best, _, point, personal = min(tried, key=lambda each: each[:2])
    return {"chosen": point, "validation": best, "personal": personal}


def _test(scenario: Scenario, personal: PersonalConfig, arrays: Arrays) -> dict[str, float]:
    observer = _with(scenario, personal)
    seen = observer.federated(arrays)["personal"]
    test = observer.test
    return {"rmse": rmse(seen, test.target), "user_rmse": float(user_rmse(seen, test.target, test.user).mean())}


def _grid(grid: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def lines(measured: dict[str, Any]) -> list[str]:
    """The measurements for a reader."""
    out = [
        f"personal methods on {measured['data']}: RMSE on test rows, mean of {measured['seeds']} seeds; constants "
        "chosen on validation rows",
        f"{'method':<20}{'epsilon':>8}{'validation':>12}{'rmse':>9}{'a user':>9}  chosen",
    ]
    for cell in measured["cells"]:
        epsilon = f"{cell['epsilon']:g}" if cell["epsilon"] else "–"
        chosen = ", ".join(f"{name} {value:g}" for name, value in cell["chosen"].items())
        means = "".join(f"{sum(cell[metric]) / len(cell[metric]):>9.4f}" for metric in ("rmse", "user_rmse"))
        out.append(f"{cell['method']:<20}{epsilon:>8}{cell['validation']:>12.4f}{means}  {chosen}")
    return out
