"""What one process of devices keeps resident: base, trainable head, backbone outputs, and the records of its devices.

In a simulation one process plays many devices; each call reads only the records of the device it is asked for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path

import numpy as np
import platformdirs
import torch
from opacus import GradSampleModule
from threadpoolctl import threadpool_limits

from client.personal.prompting import Embed, profiled_tests, profiled_training, with_earlier
from client.training.train import make_trainable
from shared.assets import resolve
from shared.config import DataConfig, Scenario
from shared.datasets import Dataset, Record, choose_users, deal_out, hold_out, read, without_test
from shared.errors import RefusedError, ScenarioError
from shared.heads.adapter import load_start
from shared.heads.head import Head
from shared.heads.pairs import PairTargets, join, joined_labels
from shared.heads.tasks import TASKS, Key, Labels, Scores, Targets
from shared.models.features import Features, cached_features, compute_hidden
from shared.models.model import Base, load_base
from shared.models.products import resolve_precision
from shared.privacy.compatible import check_prompt, choices
from shared.protocol.campaign import Campaign, certify, find_campaign

_EMBEDDED_TOKENS = 256  # of a text, by the encoder that finds similar ones


@lru_cache(maxsize=4)
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
    chosen = choose_users(everybody, data.users, tuning_share=data.tuning_share)
    dealt = deal_out(chosen) if data.shuffled else chosen
    return hold_out(without_test(dealt) if data.scored == "validation" else dealt, held_out)[0]


def campaign_dataset(scenario: Scenario) -> Dataset:
    """The users of a simulated campaign, their records as they are trained on; test prompts stand alone.

    Raises:
        ScenarioError, PrivacyError: As ``check_prompt``: before anything is computed of prompts that may not be.
    """
    check_prompt(scenario, choices(scenario))
    found = resident_dataset(scenario.data, held_out=scenario.attack.held_out)
    prompt = scenario.prompt
    return (
        profiled_training(found, prompt=prompt, embed=_embed(scenario, feature_cache())) if prompt.training else found
    )


def asked_with_profiles(dataset: Dataset, scenario: Scenario) -> Dataset:
    """The users' test records alone, their prompts after what ``[prompt]`` finds in training records as written."""
    written = dataset
    if scenario.prompt.training:
        written = resident_dataset(scenario.data, held_out=scenario.attack.held_out)
    known = [user.train for user in written.users]
    return profiled_tests(dataset, known, prompt=scenario.prompt, embed=_embed(scenario, feature_cache()))


def trained_records(scenario: Scenario, records: Sequence[Record], profile: Mapping[str, str]) -> Sequence[Record]:
    """An owner's records as a campaign trains on them; by the functions of the simulation, with no file written."""
    if not scenario.prompt.training:
        return records
    in_time = sorted(records, key=lambda record: record.timestamp)
    return with_earlier(in_time, prompt=scenario.prompt, profile=profile, embed=_embed(scenario, None))


def embed_texts(encoder: str, texts: Sequence[str], *, cache: Path | None) -> np.ndarray:
    """Pooled features (n, d) of texts by an encoder of their own; without a cache nothing is written."""
    base = resident_base(encoder)
    token_ids = base.tokenize(texts, max_tokens=min(base.positions, _EMBEDDED_TOKENS))
    row = {ids: i for i, ids in enumerate(dict.fromkeys(map(tuple, token_ids)))}
    if cache is None:
        found = compute_hidden(base, list(row), head_blocks=0)
    else:
        found = cached_features(base, list(row), head_blocks=0, cache=cache, quiet=True)
    return found.batch([row[tuple(ids)] for ids in token_ids])[0][:, 0].numpy()


def _embed(scenario: Scenario, cache: Path | None) -> Embed:
    return partial(embed_texts, scenario.prompt.encoder, cache=cache)


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
    """Backbone outputs of every distinct input of a data set, looked up by record; computed when first asked for.

    Args:
        base: The frozen base.
        scenario: Task, cut and longest text.
        dataset: Whose records, and which public texts.
        quiet: No progress on stderr.

    Raises:
        ScenarioError: The task cannot be made of these records.
    """

    def __init__(self, base: Base, scenario: Scenario, dataset: Dataset, *, quiet: bool = True) -> None:
        self._public: list[Key] = [(text, "") for text in dataset.public_texts]
        keys = dict.fromkeys(self._public)
        keys.update(dict.fromkeys(r.key for user in dataset.users for r in (*user.train, *user.test)))
        self.row = {key: i for i, key in enumerate(keys)}
        self._encoded = TASKS[scenario.task.name](base, list(keys), scenario)
        self._base, self._quiet = base, quiet
        self._blocks, self._micro_batch = base.head_blocks(scenario.model.head_blocks), scenario.performance.micro_batch

    @cached_property
    def _computed(self) -> tuple[Features, PairTargets | None]:
        """Of every input, and where two answers are compared what is compared."""
        encoded, base, blocks = self._encoded, self._base, self._blocks
        chosen = self._hidden(encoded.token_ids)
        if encoded.rejected is None:
            return chosen, None
        rejected = self._hidden(encoded.rejected.token_ids)
        return join(base, chosen, rejected, joined_labels(encoded), blocks=blocks, micro_batch=self._micro_batch)

    def _hidden(self, token_ids: list[list[int]]) -> Features:
        return cached_features(
            self._base, token_ids, head_blocks=self._blocks, cache=feature_cache(), quiet=self._quiet
        )

    @property
    def all(self) -> Features:
        """Backbone outputs of every distinct input, in the order of ``row``."""
        return self._computed[0]

    def compute(self) -> None:
        """Do the work now, where progress is shown and no worker repeats it."""
        self._computed  # noqa: B018

    def public(self) -> Features:
        """Backbone outputs of the texts the policy names as public; nothing is computed where there are none."""
        return self.all.select([self.row[key] for key in self._public]) if self._public else Features([])

    def rows(self, records: Sequence[Record]) -> list[int]:
        """Where the inputs of records stand in ``all``."""
        return [self.row[record.key] for record in records]

    def of(self, records: Sequence[Record]) -> Features:
        """Backbone outputs of records, in their order."""
        return self.all.select(self.rows(records))

    def targets(self, records: Sequence[Record]) -> Targets:
        """What records are to predict, in their order."""
        pairs = self._computed[1] if self._encoded.rejected else None
        if pairs is not None:
            return pairs.select(self.rows(records))
        if self._encoded.labels is None:
            return Scores([record.target for record in records])
        return Labels([self._encoded.labels[row] for row in self.rows(records)])


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
    precision = resolve_precision(campaign.scenario.performance.precision)
    return Workbench(campaign, base, head, make_trainable(head, campaign.policy, precision=precision))


@dataclass
class Site(Workbench):
    """A process of simulated devices in one campaign: a workbench, and the data set of all of them."""

    dataset: Dataset
    texts: TextFeatures
    inputs: Features  # of every text, prepared for the head, with what of it is frozen

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
    dataset = campaign_dataset(scenario)
    texts = TextFeatures(bench.base, scenario, dataset)
    return Site(
        bench.campaign, bench.base, bench.head, bench.module, dataset, texts, inputs=bench.head.run_ahead(texts.all)
    )
