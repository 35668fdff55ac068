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
from torch import Tensor

from client.train import make_trainable
from shared.adapter import Head, load_start
from shared.assets import resolve
from shared.campaign import Campaign, read_campaign
from shared.config import Scenario
from shared.datasets import Dataset, Record, read
from shared.features import Features, cached_features
from shared.model import Base, load_base
from shared.policy import check_price


@lru_cache(maxsize=2)
def resident_base(reference: str) -> Base:
    """The base model, loaded once per process."""
    return load_base(resolve(reference))


@lru_cache(maxsize=2)
def resident_dataset(format_name: str, source: str) -> Dataset:
    """The users of a simulation, read once per process."""
    return read(format_name, resolve(source))


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
    """Backbone outputs of every text of a data set, looked up by record."""

    def __init__(self, base: Base, scenario: Scenario, dataset: Dataset, *, quiet: bool = True) -> None:
        texts = dict.fromkeys(dataset.public_texts)
        texts.update(dict.fromkeys(r.text for user in dataset.users for r in (*user.train, *user.test)))
        self.row = {text: i for i, text in enumerate(texts)}
        self.all = cached_features(
            base,
            list(texts),
            head_blocks=base.head_blocks(scenario.model.head_blocks),
            max_tokens=scenario.model.max_tokens,
            cache=feature_cache(),
            quiet=quiet,
        )

    def of(self, records: Sequence[Record]) -> Features:
        """Backbone outputs of records, in their order."""
        return self.all.select([self.row[record.text] for record in records])


@dataclass
class Site:
    """One process of devices in one campaign."""

    campaign: Campaign
    base: Base
    head: Head
    module: GradSampleModule | Head
    dataset: Dataset
    row: dict[str, int]  # text -> row of inputs
    inputs: Features  # of every text, prepared for the head
    busy_s: float = field(default=0.0)  # time spent in the devices' own work, for the cost table

    def shared_records(self, device: int) -> tuple[Features, Tensor]:
        """The records one device trains the shared part on: backbone outputs and targets (n,)."""
        records = self.dataset.users[device].fit
        rows = [self.row[record.text] for record in records]
        return self.inputs.select(rows), torch.tensor([r.target for r in records], dtype=torch.float32)


@lru_cache(maxsize=4)
def accepted_campaign(folder: str) -> Campaign:
    """A campaign whose stated epsilon this device has certified itself; read once per process.

    Raises:
        PrivacyError: The policy's constants do not give the epsilon it states.
    """
    campaign = read_campaign(Path(folder))
    check_price(campaign.policy)
    return campaign


@lru_cache(maxsize=2)
def open_site(campaign_folder: str) -> Site:
    """Load everything a process of devices needs, once."""
    campaign = accepted_campaign(campaign_folder)
    scenario = campaign.scenario
    use_threads(scenario.performance.threads)
    base = resident_base(scenario.model.base)
    head = campaign.new_head(base)
    load_start(head, campaign.start)
    dataset = resident_dataset(scenario.data.format, scenario.data.source)
    texts = TextFeatures(base, scenario, dataset)
    return Site(
        campaign=campaign,
        base=base,
        head=head,
        module=make_trainable(head, campaign.policy),
        dataset=dataset,
        row=texts.row,
        inputs=head.prepare(texts.all),
    )
