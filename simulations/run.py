"""Run a scenario: its campaigns over an engine, the rows beside them, personal heads, summary and report.

A run folder holds everything the report is made of; ``docs/summary.md`` describes its files.
"""

import platform
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from flwr.app.user_config import UserConfig
from flwr.serverapp import Grid

from client.app import app as client_app
from client.training.site import campaign_dataset, resident_base, use_threads
from shared.assets import resolve
from shared.config import Scenario
from shared.datasets import Dataset
from shared.errors import ScenarioError
from shared.flower.grid import Metered, metered, run_inline, seats
from shared.flower.ray_engine import run_ray
from shared.models.model import Base
from simulations.campaigns import (
    Opened,
    Plan,
    Result,
    exported_users,
    open_campaign,
    plan_campaigns,
    plan_unprotected,
    run_campaign,
)
from simulations.cold_start import measure_cold_start
from simulations.fairness import check_groups
from simulations.folder import (
    check_same_scenario,
    note_resumption,
    open_events,
    open_journal,
    run_folder,
    write_json,
)
from simulations.journal import Journal
from simulations.lamp import check_labels
from simulations.machine import commit
from simulations.membership import attack_membership
from simulations.poison import with_liars
from simulations.robustness import measure_poison, plan_rivals
from simulations.score import score_run

VERSIONS = (
    "sottovoce",
    "flwr",
    "torch",
    "opacus",
    "peft",
    "transformers",
    "dp-accounting",
    "onnxruntime",
    "numpy",
)


def simulate(
    scenario: Scenario,
    *,
    out: Path,
    command: str = "",
    quiet: bool = False,
    resume: bool = False,
    grid: Grid | None = None,
) -> dict[str, Any]:
    """Run a scenario from its data to its report.

    Args:
        scenario: The settings, from ``load_scenario``.
        out: The run folder; must not exist, unless ``resume``.
        command: What was typed, for the record.
        quiet: No progress on stderr.
        resume: Go on with the run in ``out`` after the last whole round of every campaign.
        grid: Flower's way to devices that are there already; by default ``performance.engine`` makes them.

    Returns:
        The content of ``summary.json``.

    Raises:
        SottovoceError: Anything that is the user's to mend; finished rounds stay in the folder.
    """
    started = time.perf_counter()
    out = out.resolve()  # devices and server look for campaigns under one name, wherever a worker runs
    with run_folder(out, resume=resume):
        if resume:
            scenario = check_same_scenario(out, scenario)
        else:
            write_json(out / "run.json", _describe_run(scenario, command))
            write_json(out / "scenario.json", scenario.model_dump(mode="json"))
        plans, base, dataset, exported = _prepare(scenario, quiet=quiet)
        unprotected = plan_unprotected(plans, base, dataset)
        rivals = plan_rivals(plans, base, dataset)
        opened = [open_campaign(plan, out / "campaigns") for plan in [*plans, *unprotected, *rivals]]
        resumed = note_resumption(out, opened, command) if resume else []
        with open_events(out) as events:
            results = _run_campaigns(
                opened, scenario, base, dataset, journal=open_journal(out, opened, events.add), grid=grid, quiet=quiet
            )
            compared = results[len(plans) : len(plans) + len(unprotected)]
            summary = score_run(scenario, dataset, results[: len(plans)], out=out, quiet=quiet)
            events.add_summary(summary)
        summary |= measure_cold_start(scenario, base, dataset, results[: len(plans)], quiet=quiet)
        from simulations.heads import export_heads  # onnx is slow to import, and not needed before

        summary |= export_heads(results[0], exported, base, dataset, folder=out / "heads", quiet=quiet)
        if scenario.evaluation.answers:
            from simulations.answers import measure_answers

            summary |= measure_answers(scenario, base, dataset, results[0], folder=out, quiet=quiet)
        if scenario.attack.membership:
            summary |= attack_membership(scenario, base, dataset, results[: len(plans)], compared, quiet=quiet)
        if scenario.poison.enabled:
            among = results[len(plans) + len(unprotected) :]
            summary |= measure_poison(scenario, base, dataset, results[: len(plans)], among, quiet=quiet)
        summary["resumed"] = resumed
        summary["cost"]["wall_s"] = time.perf_counter() - started
        write_json(out / "summary.json", summary)
        from simulations.report.report import write_report

        write_report(out)
        return summary


def _run_campaigns(
    opened: Sequence[Opened],
    scenario: Scenario,
    base: Base,
    dataset: Dataset,
    *,
    journal: Journal,
    grid: Grid | None,
    quiet: bool,
) -> list[Result]:
    """All campaigns one after the other, over devices that live as long as all of them."""
    results: list[Result] = []

    def main(devices: Metered) -> None:
        roster = seats(devices, devices=len(dataset.users))
        for each in opened:
            results.append(
                run_campaign(
                    each,
                    base,
                    dataset,
                    grid=devices,
                    roster=roster,
                    journal=journal,
                    resident=scenario.performance.engine == "inline" and grid is None,
                    quiet=quiet,
                )
            )

    campaigns = opened[0].campaign.folder.parent
    _run_engine(main, scenario, devices=len(dataset.users), campaigns=campaigns, grid=grid)
    journal.sort()
    return results


def _run_engine(
    main: Callable[[Metered], None], scenario: Scenario, *, devices: int, campaigns: Path, grid: Grid | None
) -> None:
    """Bring the devices to life and call ``main`` with the way to them."""
    run_config: UserConfig = {"campaigns": str(campaigns)}
    performance = scenario.performance
    if grid is not None:
        if scenario.poison.enabled:
            raise ScenarioError(
                f"poison.kind must be 'none' over devices that are there already, got {scenario.poison.kind!r}; run it "
                "with sottovoce simulate."
            )
        main(metered(grid))
    elif performance.engine == "inline":
        devices_app = with_liars(client_app) if scenario.poison.enabled else client_app
        run_inline(main, devices_app, devices=devices, run_config=run_config)
    else:
        run_ray(
            main,
            client_app,
            devices=devices,
            run_config=run_config,
            workers=performance.workers,
            address=performance.ray_address or None,
        )


def _prepare(scenario: Scenario, *, quiet: bool) -> tuple[list[Plan], Base, Dataset, list[int]]:
    """Everything that can be refused before a run begins."""
    use_threads(scenario.performance.threads)
    encoders = (scenario.prompt.encoder,) if scenario.evaluation.answers or scenario.prompt.retriever == "dense" else ()
    for reference in (scenario.data.source, scenario.model.base, *encoders):
        resolve(reference, quiet=quiet)
    dataset = campaign_dataset(scenario)
    check_groups(scenario, dataset)
    check_labels(scenario)
    base = resident_base(scenario.model.base, scenario.performance.device)
    exported = exported_users(scenario, dataset)
    plans = plan_campaigns(scenario, base, dataset, quiet=quiet)
    for texts in {id(plan.texts): plan.texts for plan in plans}.values():
        texts.compute()
    return plans, base, dataset, exported


def _describe_run(scenario: Scenario, command: str) -> dict[str, Any]:
    return {
        "scenario_name": scenario.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "versions": {name: version(name) for name in VERSIONS},
        "seeds": {"scenario": scenario.seed, "all": scenario.seeds()},
        "machine": {
            "cpus": torch.multiprocessing.cpu_count(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "platform": f"{platform.system()} {platform.machine()}",
        },
        "commit": commit(),
    }
