"""What one process of devices keeps resident: base, trainable head, backbone outputs, and the records of its devices.

In a simulation one process plays many devices; each call reads only the records of the device it is asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import platformdirs
import torch
from opacus import GradSampleModule
from threadpoolctl import threadpool_limits

from client.train import make_trainable
from shared.adapter import load_start
from shared.assets import resolve
from shared.campaign import Campaign, certify, find_campaign
from shared.config import DataConfig, Scenario
from shared.datasets import Dataset, Record, choose_users, hold_out, read
from shared.errors import RefusedError, ScenarioError
from shared.features import Features, cached_features
from shared.head import Head
from shared.model import Base, load_base
from shared.tasks import TASKS, Key, Labels, Scores, Targets


@lru_cache(maxsize=2)
def resident_base(reference: str, device: str = "cpu") -> Base:
    """The base model, loaded once per process.

    Raises:
        ScenarioError: There is no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ScenarioError("performance.device = 'cuda' needs a GPU and a CUDA build of torch, got none; set cpu.")
    base = load_base(resolve(reference))
    base.model.to(device)
    return base


def resident_dataset(data: DataConfig, *, held_out: float = 0.0) -> Dataset:
    """The users of a simulation, read once per process: all, or the part of them that it is about.

    Args:
        data: Which data.
        held_out: Share of every user's records that nobody trains on.
    """
    return _resident_dataset(data.model_dump_json(), held_out)  # a map of columns has no hash


@lru_cache(maxsize=4)
def _resident_dataset(settings: str, held_out: float) -> Dataset:
    data = DataConfig.model_validate_json(settings)
    everybody = read(data.format, resolve(data.source), columns=data.columns, min_records=data.min_records)
    return hold_out(choose_users(everybody, data.users, tuning_share=data.tuning_share), held_out)[0]


def use_threads(count: int) -> None:
    """Bound the threads of torch and of numpy's linear algebra, for the whole process.

    A device's matrices are small: sharing one out costs more than it saves, and where another process holds a core,
    the shares wait for each other (a round's private fits took ten times as long).
    """
    torch.set_num_threads(count)
    threadpool_limits(limits=count)


def feature_cache() -> Path:
    """Folder of the backbone outputs, beside the other assets of the user's cache."""
    return platformdirs.user_cache_path("sottovoce") / "features"


class TextFeatures:
    """Backbone outputs of every distinct input of a data set, looked up by record."""

    def __init__(self, base: Base, scenario: Scenario, dataset: Dataset, *, quiet: bool = True) -> None:
        self._public: list[Key] = [(text, "") for text in dataset.public_texts]
        keys = dict.fromkeys(self._public)
        keys.update(dict.fromkeys(r.key for user in dataset.users for r in (*user.train, *user.test)))
        self.row = {key: i for i, key in enumerate(keys)}
        encoded = TASKS[scenario.task.name](base, list(keys), scenario)
        self._labels = encoded.labels
        self.all = cached_features(
            base,
            encoded.token_ids,
            head_blocks=base.head_blocks(scenario.model.head_blocks),
            cache=feature_cache(),
            quiet=quiet,
        )

    def public(self) -> Features:
        """Backbone outputs of the texts the policy names as public."""
        return self.all.select([self.row[key] for key in self._public])

    def rows(self, records: Sequence[Record]) -> list[int]:
        """Where the inputs of records stand in ``all``."""
        return [self.row[record.key] for record in records]

    def of(self, records: Sequence[Record]) -> Features:
        """Backbone outputs of records, in their order."""
        return self.all.select(self.rows(records))

    def targets(self, records: Sequence[Record]) -> Targets:
        """What records are to predict, in their order."""
        if self._labels is None:
            return Scores([record.target for record in records])
        return Labels([self._labels[row] for row in self.rows(records)])


@dataclass
class Workbench:
    """What a process trains one campaign with: the frozen base, and a head with per-sample gradients."""

    campaign: Campaign
    base: Base
    head: Head
    module: GradSampleModule | Head
    busy_s: float = field(default=0.0, kw_only=True)  # time spent in the devices' own work, for the cost table


def open_workbench(campaign: Campaign) -> Workbench:
    """Load base and head of a campaign, the head at its public start."""
    use_threads(campaign.scenario.performance.threads)
    base = resident_base(campaign.scenario.model.base, campaign.scenario.performance.device)
    head = campaign.new_head(base)
    load_start(head.to(base.device), campaign.start)
    return Workbench(campaign, base, head, make_trainable(head, campaign.policy))


@dataclass
class Site(Workbench):
    """A process of simulated devices in one campaign: a workbench, and the data set of all of them."""

    dataset: Dataset
    texts: TextFeatures
    inputs: Features  # of every text, prepared for the head

    def shared_records(self, device: int) -> tuple[Features, Targets]:
        """The records one device trains the shared part on: prepared backbone outputs, and targets."""
        records = self.dataset.users[device].fit
        return self.inputs.select(self.texts.rows(records)), self.texts.targets(records)


@lru_cache(maxsize=64)
def accepted_campaign(campaigns: str, policy_sha256: str) -> Campaign:
    """The campaign a request names, among those this device knows; its stated epsilon is certified here, once.

    Args:
        campaigns: Folder of the campaigns, one folder each.
        policy_sha256: Hash of the policy.

    Raises:
        RefusedError: ``POLICY``: none of them has this policy.
        PrivacyError: The policy's constants do not give the epsilon it states, or its methods break rule P1.
        CampaignError: The campaign's folder was altered, or its methods are not the ones installed here.
    """
    campaign = find_campaign(Path(campaigns), policy_sha256)
    if campaign is None:
        raise RefusedError("POLICY")
    certify(campaign)
    return campaign


@lru_cache(maxsize=2)
def open_site(campaigns: str, policy_sha256: str) -> Site:
    """Load everything a process of devices needs for one campaign, once; parameters as ``accepted_campaign``."""
    bench = open_workbench(accepted_campaign(campaigns, policy_sha256))
    scenario = bench.campaign.scenario
    dataset = resident_dataset(scenario.data, held_out=scenario.attack.held_out)
    texts = TextFeatures(bench.base, scenario, dataset)
    return Site(
        bench.campaign, bench.base, bench.head, bench.module, dataset, texts, inputs=bench.head.prepare(texts.all)
    )
