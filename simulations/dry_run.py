"""What a scenario would do, spend and send, without training anything."""

import json
from typing import Any

from client.training.site import campaign_dataset, resident_base, use_threads
from shared.assets import resolve
from shared.config import Scenario
from shared.datasets import Dataset
from simulations.campaigns import Plan, exported_users, plan_campaigns, plan_unprotected
from simulations.fairness import check_groups
from simulations.lamp import check_labels
from simulations.observe.dp_statistics import applies, promise


def describe(scenario: Scenario, *, quiet: bool = False) -> dict[str, Any]:
    """Settings, privacy to be spent and bytes per round of every campaign of a scenario, and releases beside them.

    Raises:
        SottovoceError: The scenario would not run.
    """
    use_threads(scenario.performance.threads)
    for reference in (scenario.data.source, scenario.model.base):
        resolve(reference, quiet=quiet)
    dataset = campaign_dataset(scenario)
    base = resident_base(scenario.model.base, scenario.performance.device)
    exported_users(scenario, dataset)
    check_groups(scenario, dataset)
    check_labels(scenario)
    plans = plan_campaigns(scenario, base, dataset, quiet=quiet)
    plans += plan_unprotected(plans, base, dataset)
    return {
        "scenario": scenario.model_dump(mode="json"),
        "clients": len(dataset.users),
        "campaigns": {plan.name: _describe_plan(plan) for plan in plans},
        "releases": _releases(scenario, dataset),
    }


def _releases(scenario: Scenario, dataset: Dataset) -> dict[str, str]:
    """What is released beside the campaigns, for a row of the report, and what it claims."""
    if not applies(scenario, dataset) or scenario.privacy.trust == "none":
        return {}
    users = len(dataset.users)
    return {"dp-statistics": promise(scenario.privacy, texts=len(dataset.public_texts), users=users).claim.sentence()}


def _describe_plan(plan: Plan) -> dict[str, Any]:
    policy, claim = plan.policy, plan.claim
    down, up = plan.bytes_per_client_round()
    return {
        "claim": claim.sentence(),
        "epsilon": claim.epsilon,
        "delta": claim.delta,
        "noise_multiplier": policy.noise_multiplier,
        "rounds": policy.rounds,
        "cohort_size": policy.cohort_size,
        "parameters": sum(plan.start[name].size for name, _ in policy.slots),
        "tensors": {name: list(shape) for name, shape in policy.slots},
        "bytes_per_client_round": {"down": down, "up": up},
        "bytes_per_round": {"down": down * policy.cohort_size, "up": up * policy.cohort_size},
    }


def lines(plan: dict[str, Any]) -> list[str]:
    """The same for a reader."""
    out = [f"settings of {plan['scenario']['name']}:"]
    for table, values in plan["scenario"].items():
        if isinstance(values, dict):
            out += [f"  {table}.{key} = {json.dumps(value)}" for key, value in values.items() if value is not None]
        else:
            out.append(f"  {table} = {json.dumps(values)}")
    for name, campaign in plan["campaigns"].items():
        down, up = campaign["bytes_per_round"]["down"], campaign["bytes_per_round"]["up"]
        each = campaign["bytes_per_client_round"]
        out += [
            f"campaign {name}: {campaign['rounds']} rounds with {campaign['cohort_size']} of {plan['clients']} clients "
            f"each, {campaign['parameters']} shared parameters",
            f"  to be spent: {campaign['claim']}",
            f"  noise multiplier {campaign['noise_multiplier']:.3f}",
            f"  bytes per round: {down:,} down, {up:,} up ({each['down']:,} and {each['up']:,} a client)",
        ]
    for row, claim in plan["releases"].items():
        out += [f"release for the row {row}, once, by the same users:", f"  to be spent: {claim}"]
    return out
