"""One campaign from its plan to its last checkpoint, over the inline engine, with an observer beside it."""

import json
import resource
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from flwr.app.user_config import UserConfig

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
from shared.errors import ScenarioError, SottovoceError
from shared.flower import InlineGrid, round_trip_bytes, run_inline
from shared.model import Base
from shared.policy import Policy, make_policy
from shared.progress import progress, track
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

    @cached_property
    def claim(self) -> Claim:
        """What the campaign spends, in words and numbers."""
        if self.policy.delta is None:
            return no_claim(max_participations=self.policy.max_participations)
        return record_claim(mechanism_of(self.policy), delta=self.policy.delta)

    def bytes_per_client_round(self) -> tuple[int, int]:
        """Bytes a device receives and sends in one round."""
        arrays = {slot.name: self.start[slot.name] for slot in self.policy.array_slots()}
        content = wire.pack_request(arrays, round_number=1, policy_sha256=self.policy.sha256)
        return round_trip_bytes(content, content)


def mechanism_of(policy: Policy) -> Mechanism:
    """What one device releases under a policy."""
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
    steps = track(wanted, description="policies", unit="campaign", quiet=quiet)
    plans = []
    for name, suffix, each in steps:
        try:
            plans.append(_plan(name, suffix, each, base, dataset, quiet=quiet))
        except SottovoceError as error:
            if suffix:  # settings of the table [linear] carry the names of the tables they stand for
                raise type(error)(f"campaign {name}: {error}") from None
            raise
    return plans


def exported_users(scenario: Scenario, dataset: Dataset) -> list[int]:
    """Indices of the users who get a head.

    Raises:
        ScenarioError: A user does not exist.
    """
    wanted = scenario.export.users
    if isinstance(wanted, int):
        return list(range(min(wanted, len(dataset.users))))
    index = {user.user: i for i, user in enumerate(dataset.users)}
    unknown = [user for user in wanted if user not in index]
    if unknown:
        raise ScenarioError(f"export.users must name users of {dataset.name}, got {unknown}.")
    return [index[user] for user in wanted]


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


class _Log:
    """Counts replies and writes a line of ``metrics.jsonl`` for every observed round, in a thread of its own.

    The observer stands outside the federation, so nothing waits for it but the end of the campaign.
    """

    def __init__(self, plan: Plan, observer: Observer, grid: InlineGrid, *, devices: int, path: Path) -> None:
        self._plan, self._observer, self._grid, self._devices, self._path = plan, observer, grid, devices, path
        policy = plan.policy
        self._spent = epsilon_by_participation(mechanism_of(policy), delta=policy.delta) if policy.delta else None
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._written: list[Future[None]] = []
        self.replies = 0
        self.rejected: Counter[str] = Counter()

    def on_round(self, strategy: EqualWeights) -> None:
        """Count the round; observe it if it is its turn."""
        self.replies += strategy.accepted
        self.rejected.update(strategy.rejected)
        done = strategy.checkpoint.round_number
        if done % self._plan.scenario.evaluation.every_rounds == 0 or done == self._plan.policy.rounds:
            self.observe(done, strategy.checkpoint.arrays, strategy.accepted, strategy.rejected)

    def observe(self, round_number: int, arrays: Arrays, accepted: int, rejected: Mapping[str, int]) -> None:
        """Evaluate on everybody's validation rows, with private parts fitted on the rows before them."""
        line = {
            "campaign": self._plan.name,
            "round": round_number,
            "epsilon": self._epsilon(round_number),
            "bytes_up": self._grid.bytes_up,
            "bytes_down": self._grid.bytes_down,
            "replies": accepted,
            "rejected": dict(rejected),
        }
        self._written.append(self._thread.submit(self._write, line, arrays))

    def _write(self, line: dict[str, Any], arrays: Arrays) -> None:
        observer = self._observer
        seen = observer.predict(arrays, known=observer.fit, asked=observer.validation)
        line["validation_rmse_federated"] = rmse(seen.shared, observer.validation.target)
        line["validation_rmse_personal"] = rmse(seen.personal, observer.validation.target)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the last line; what went wrong in the observer's thread comes up here."""
        self._thread.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for written in self._written:
                written.result()

    def _epsilon(self, round_number: int) -> float | None:
        """Spent so far by the devices that took part most often."""
        if self._spent is None:
            return None
        asked = -(-round_number * self._plan.policy.cohort_size // self._devices)
        return self._spent[asked - 1] if asked else 0.0


def run_campaign(plan: Plan, base: Base, dataset: Dataset, *, out: Path, quiet: bool) -> Result:
    """All rounds of one campaign over the inline engine, watched by an observer."""
    campaign = write_campaign(out / "campaigns" / plan.name, plan.scenario, plan.policy, plan.start)
    head = campaign.new_head(base)
    load_start(head, plan.start)
    observer = Observer(head, plan.texts, dataset, plan.scenario)
    site = open_site(str(campaign.folder))  # now, so that the first device's time is its own
    run_config: UserConfig = {"campaign": str(campaign.folder)}
    devices, total = len(dataset.users), plan.policy.rounds * plan.policy.cohort_size
    grid = InlineGrid(client_app, devices=devices, run_config=run_config)
    start = {slot.name: plan.start[slot.name] for slot in plan.policy.array_slots()}
    started = time.perf_counter()
    with (
        _Log(plan, observer, grid, devices=devices, path=out / "metrics.jsonl") as log,
        progress(total=total, description=f"federation ({plan.name})", unit="device", quiet=quiet) as bar,
    ):
        grid.on_reply = lambda: bar.update(1)
        log.observe(0, start, 0, {})
        run_inline(make_server_app(on_round=log.on_round), grid, run_config=run_config)
    last = load_checkpoint(campaign.folder / "checkpoints" / f"round-{plan.policy.rounds:04d}")
    cost = _cost(grid, site, wall_s=time.perf_counter() - started)
    return Result(plan, campaign, last.arrays, observer, cost, log.replies, dict(log.rejected))


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
