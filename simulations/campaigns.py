"""One campaign from its plan to its last checkpoint, over the inline engine, with an observer beside it."""

import json
import resource
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from client.app import app as client_app
from client.site import Site, TextFeatures, open_site
from server.app import make_server_app
from server.checkpoint import load_checkpoint
from server.strategy import EqualWeights
from shared import wire
from shared.accounting import Claim, Mechanism, epsilon_by_participation, no_claim, record_claim
from shared.adapter import Arrays, load_start, make_start, shared_slots
from shared.campaign import Campaign, make_head, write_campaign
from shared.config import Scenario
from shared.datasets import Dataset
from shared.flower import InlineGrid, round_trip_bytes, run_inline
from shared.model import Base
from shared.policy import Policy, make_policy
from shared.progress import progress
from simulations.observe import Observer, rmse


@dataclass(frozen=True)
class Plan:
    """One campaign before it starts: nothing has been trained or spent.

    Attributes:
        suffix: Added to the names of its rows; empty for the scenario's own campaign.
    """

    name: str
    suffix: str
    scenario: Scenario
    policy: Policy
    start: Arrays
    texts: TextFeatures

    def claim(self) -> Claim:
        """What the campaign spends, in words and numbers."""
        if self.policy.delta is None:
            return no_claim(max_participations=self.policy.max_participations)
        return record_claim(_mechanism(self.policy), delta=self.policy.delta)

    def bytes_per_client_round(self) -> tuple[int, int]:
        """Bytes a device receives and sends in one round."""
        arrays = {slot.name: self.start[slot.name] for slot in self.policy.array_slots()}
        content = wire.pack_request(arrays, round_number=1, policy_sha256=self.policy.sha256)
        return round_trip_bytes(content, content)


def _mechanism(policy: Policy) -> Mechanism:
    return Mechanism(
        noise_multiplier=policy.noise_multiplier,
        sampling_rate=policy.sampling_rate,
        steps=policy.steps,
        max_participations=policy.max_participations,
    )


@dataclass(frozen=True)
class Result:
    """A finished campaign."""

    plan: Plan
    campaign: Campaign
    arrays: Arrays
    observer: Observer
    cost: dict[str, float]
    replies: int
    rejected: dict[str, int]


def plan_campaigns(scenario: Scenario, base: Base, dataset: Dataset, *, quiet: bool = False) -> list[Plan]:
    """Fix policies and public starts of the scenario's campaign and of its linear companion.

    Raises:
        ScenarioError, PrivacyError: The scenario does not fit the base or the data, or its target cannot be met.
    """
    linear = scenario.linear_campaign()
    main = "linear" if base.head_blocks(scenario.model.head_blocks) == 0 else "lora"
    wanted = [(main, "", scenario)] + ([("linear", "-linear", linear)] if linear else [])
    return [_plan(name, suffix, each, base, dataset, quiet=quiet) for name, suffix, each in wanted]


def _plan(name: str, suffix: str, scenario: Scenario, base: Base, dataset: Dataset, *, quiet: bool) -> Plan:
    head = make_head(base, scenario)
    texts = TextFeatures(base, scenario, dataset, quiet=quiet)
    public = texts.all.select([texts.row[text] for text in dataset.public_texts])
    start = make_start(head, public, ridge=scenario.adapter.whitening_ridge, seed=scenario.seed)
    policy = make_policy(
        scenario,
        clients=len(dataset.users),
        head_blocks=len(head.blocks),
        slots=shared_slots(head),
        base_sha256=base.sha256,
        start=start,
        public_texts=dataset.public_texts,
    )
    return Plan(name, suffix, scenario, policy, start, texts)


def run_campaign(plan: Plan, base: Base, dataset: Dataset, *, out: Path, quiet: bool) -> Result:
    """All rounds of one campaign over the inline engine, watched by an observer."""
    campaign = write_campaign(out / "campaigns" / plan.name, plan.scenario, plan.policy, plan.start)
    head = campaign.new_head(base)
    load_start(head, plan.start)
    observer = Observer(head, plan.texts, dataset, plan.scenario)
    site = open_site(str(campaign.folder))
    policy, devices = plan.policy, len(dataset.users)
    spent = epsilon_by_participation(_mechanism(policy), delta=policy.delta) if policy.delta else None
    rejected: Counter[str] = Counter()
    replies = 0
    total = policy.rounds * policy.cohort_size
    with (
        progress(total=total, description=f"federation ({plan.name})", unit="device", quiet=quiet) as bar,
        (out / "metrics.jsonl").open("a", encoding="utf-8") as log,
    ):
        grid = InlineGrid(
            client_app,
            devices=devices,
            run_config={"campaign": str(campaign.folder)},
            on_reply=lambda: bar.update(1),
        )

        def observe(round_number: int, arrays: Arrays, accepted: int, codes: dict[str, int]) -> None:
            seen = observer.predict(arrays, known=observer.fit, asked=observer.validation)
            target = observer.validation.target
            participations = -(-round_number * policy.cohort_size // devices)
            epsilon_now = None if spent is None else (spent[participations - 1] if round_number else 0.0)
            line = {
                "campaign": plan.name,
                "round": round_number,
                "validation_rmse_federated": rmse(seen.shared, target),
                "validation_rmse_personal": rmse(seen.personal, target),
                "epsilon": epsilon_now,
                "bytes_up": grid.bytes_up,
                "bytes_down": grid.bytes_down,
                "replies": accepted,
                "rejected": codes,
            }
            log.write(json.dumps(line) + "\n")
            log.flush()

        def on_round(strategy: EqualWeights) -> None:
            nonlocal replies
            replies += strategy.accepted
            rejected.update(strategy.rejected)
            done = strategy.checkpoint.round_number
            if done % plan.scenario.evaluation.every_rounds == 0 or done == policy.rounds:
                observe(done, strategy.checkpoint.arrays, strategy.accepted, dict(strategy.rejected))

        shared_start = {slot.name: plan.start[slot.name] for slot in policy.array_slots()}
        observe(0, shared_start, 0, {})
        started = time.perf_counter()
        run_inline(make_server_app(on_round=on_round), grid, run_config={"campaign": str(campaign.folder)})
        wall_s = time.perf_counter() - started
    last = load_checkpoint(campaign.folder / "checkpoints" / f"round-{policy.rounds:04d}")
    cost = _cost(grid, site, wall_s=wall_s)
    return Result(plan, campaign, last.arrays, observer, cost, replies, dict(rejected))


def _cost(grid: InlineGrid, site: Site, *, wall_s: float) -> dict[str, float]:
    return {
        "wall_s": wall_s,
        "client_rounds": grid.messages,
        "engine_ms_per_client_round": 1000 * (grid.wall_s - site.busy_s) / grid.messages,
        "device_ms_per_client_round": 1000 * site.busy_s / grid.messages,
        "bytes_up_per_client_round": grid.bytes_up / grid.messages,
        "bytes_down_per_client_round": grid.bytes_down / grid.messages,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
