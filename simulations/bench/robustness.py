"""Measure what liars do to a federation under every rule, and what withstanding them costs where nobody lies.

Not a matter of speed. Every campaign of a scenario stands on the same records and public start, and runs once without
liars and once with each kind of them; whether rules and lies are the published ones, tests say.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app.user_config import UserConfig

from client.app import app as client_app
from client.training.site import campaign_dataset, resident_base, use_threads
from shared.config import Scenario, load_scenario
from shared.flower.grid import Metered, run_inline, seats
from simulations.campaigns import Plan, Result, open_campaign, plan_again, plan_campaigns, run_campaign
from simulations.journal import Journal
from simulations.machine import about
from simulations.poison import liars, with_liars
from simulations.robustness import ATTACKED, HONEST, Cell, played, price, score_cell, trap_of

_SCENARIOS = Path(__file__).parents[1] / "scenarios"
STRENGTHS: Mapping[str, float] = {"sign-flip": 10.0, "random": 10.0, "label-flip": 1.0, "alie": 1.0, "backdoor": 10.0}
# Scenario -> the kinds of liars it is played with.
PLAYED: Mapping[str, tuple[str, ...]] = {
    "poisoning": tuple(STRENGTHS),
    "poisoning-groups": ("sign-flip", "random"),
}


def measure(
    *, rounds: int = 1, quiet: bool = False, scenarios: Mapping[str, tuple[Scenario, tuple[str, ...]]] | None = None
) -> dict[str, Any]:
    """Play every scenario under every rule, without liars and with every kind.

    Args:
        rounds: Seeds: everything that is drawn is drawn anew for each, who lies included.
        quiet: No progress on stderr.
        scenarios: Name -> scenario and kinds; by default the shipped ones.

    Returns:
        ``cells``: scenario, rule, ``kind`` (null: nobody lies), epsilon, what noise the mean holds where a sum has any,
        and one number a seed of ``federated`` and ``personal``, the primary metric on test rows; of a backdoor also how
        often it opens and how far the trigger moves a prediction. Machine and versions.
    """
    scenarios = scenarios or {
        name: (load_scenario(_SCENARIOS / f"{name}.toml"), kinds) for name, kinds in PLAYED.items()
    }
    found: dict[tuple[str, str, str | None], dict[str, Any]] = {}
    described = {}
    for name, (scenario, kinds) in scenarios.items():
        users = len(campaign_dataset(scenario).users)
        described[name] = {
            "users": users,
            "liars": len(liars(_lying(scenario, kinds[0]), clients=users)),
            "cohort_size": scenario.federation.cohort_size,
            "rounds": scenario.federation.rounds,
            "trust": scenario.privacy.trust,
            "strengths": {kind: STRENGTHS[kind] for kind in kinds},
        }
        for seed in range(scenario.seed, scenario.seed + rounds):
            for key, cell in _play(scenario.model_copy(update={"seed": seed}), kinds, quiet=quiet).items():
                same = found.setdefault((name, *key), {"scenario": name, "rule": key[0], "kind": key[1]})
                for field, value in cell.items():
                    if field in _CONSTANT:
                        same[field] = value
                    else:
                        same.setdefault(field, []).append(value)
    return {"scenarios": described, "seeds": rounds, "cells": list(found.values()), **about("numpy", "torch", "flwr")}


_CONSTANT = ("epsilon", "noise_multiplier", "groups", "noise_in_mean")


def _lying(scenario: Scenario, kind: str) -> Scenario:
    poison = scenario.poison.model_copy(update={"kind": kind, "strength": STRENGTHS[kind]})
    return scenario.model_copy(update={"poison": poison})


def _play(scenario: Scenario, kinds: tuple[str, ...], *, quiet: bool) -> dict[tuple[str, str | None], dict[str, Any]]:
    """(rule, kind) -> what came of it; kind None is without liars."""
    use_threads(scenario.performance.threads)
    base, dataset = resident_base(scenario.model.base, scenario.performance.device), campaign_dataset(scenario)
    [first] = plan_campaigns(_lying(scenario, kinds[0]), base, dataset, quiet=quiet)
    plans: dict[tuple[str, str | None], Plan] = {}
    for rule in dict.fromkeys((scenario.federation.aggregation, *scenario.poison.rules)):
        for kind in (None, *kinds):
            settings = played(_lying(scenario, kind or kinds[0]), Cell(rule, ATTACKED if kind else HONEST))
            name = f"{rule}-{kind or HONEST}"
            named = settings.model_copy(update={"name": f"{scenario.name[: 62 - len(name)]}-{name}"})
            plans[rule, kind] = plan_again(first, name, named, base, dataset)
    results: dict[tuple[str, str | None], Result] = {}
    with tempfile.TemporaryDirectory() as folder:
        campaigns, journal = Path(folder) / "campaigns", Journal(Path(folder) / "metrics.jsonl", {})

        def main(devices: Metered) -> None:
            roster = seats(devices, devices=len(dataset.users))
            for key, plan in plans.items():
                opened = open_campaign(plan, campaigns)
                results[key] = run_campaign(
                    opened, base, dataset, grid=devices, roster=roster, journal=journal, resident=False, quiet=quiet
                )

        run_config: UserConfig = {"campaigns": str(campaigns)}
        run_inline(main, with_liars(client_app), devices=len(dataset.users), run_config=run_config)
        trap = trap_of(_lying(scenario, "backdoor"), base, dataset) if "backdoor" in kinds else None
        return {key: _cell(result, trap if key[1] in (None, "backdoor") else None) for key, result in results.items()}


def _cell(result: Result, trap: Any) -> dict[str, Any]:
    scores = {name: interval.value for name, interval in score_cell(result, trap).items()}
    return scores | price(result.plan.policy)


def lines(measured: dict[str, Any]) -> list[str]:
    """The measurements for a reader."""
    out = []
    for name, about_it in measured["scenarios"].items():
        out.append(
            f"{name}: {about_it['liars']} liars among {about_it['users']} devices, trust {about_it['trust']}, "
            f"{about_it['rounds']} rounds of {about_it['cohort_size']}; mean of {measured['seeds']} seeds"
        )
        out.append(f"{'rule':<14}{'liars':<12}{'epsilon':>8}{'federated':>11}{'personal':>10}{'opens':>8}{'shift':>8}")
        for cell in (each for each in measured["cells"] if each["scenario"] == name):
            columns = [_mean(cell, field, digits) for field, digits in _COLUMNS]
            epsilon = "–" if cell["epsilon"] is None else f"{cell['epsilon']:g}"
            out.append(
                f"{cell['rule']:<14}{cell['kind'] or 'none':<12}{epsilon:>8}"
                f"{columns[0]:>11}{columns[1]:>10}{columns[2]:>8}{columns[3]:>8}"
            )
    return out


_COLUMNS = (("federated", 4), ("personal", 4), ("success federated", 3), ("shift federated", 3))


def _mean(cell: dict[str, Any], field: str, digits: int) -> str:
    return f"{float(np.mean(cell[field])):.{digits}f}" if field in cell else ""
