"""Every setting of a run: read once from TOML into frozen models, checked once, public from then on.

A default stands beside the word on why. Nothing here is computed from users' data: what is (a count of records, a
mean) is an argument where it is used, never a field, never logged.
"""

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from shared.datasets import READERS
from shared.errors import ScenarioError
from shared.metrics.ratings import METRICS
from shared.registry import check_name

# The outer bounds keep every product of settings within float32; no sensible value comes near them.
FiniteFloat = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
Priced = Annotated[float, Field(ge=1e-9, le=1e9, allow_inf_nan=False)]  # as devices accept it
NonNegative = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
NaturalCount = Annotated[int, Field(ge=0, le=1_000_000)]
KernelWidth = Annotated[float, Field(ge=1e-3, le=1e3)]  # narrower ones would make rounding errors of a cosine large


def _named(kind: str, *built_in: str, setting: str) -> AfterValidator:
    """A name that is built in, or that an installed package registers."""

    def check(name: str) -> str:
        try:
            check_name(kind, name, built_in, setting=setting)
        except ScenarioError as error:
            raise ValueError(str(error)) from None
        return name

    return AfterValidator(check)


# Names, where the dict stands beside functions that need torch; a test compares the two.
FEDERATION_NAMES = ("fedavg", "ffa-lora", "rolora", "ifca")
PERSONAL_NAMES = (
    "none",
    "fine-tune",
    "ditto",
    "feddpa",
    "fedbabu",
    "fedper",
    "fedsa-lora",
    "user-embedding",
    "retrieval",
)
FederationMethodName = Annotated[str, _named("federation_methods", *FEDERATION_NAMES, setting="federation.method")]
PersonalMethodName = Annotated[str, _named("personal_methods", *PERSONAL_NAMES, setting="personal.method")]
# Of ``server/robust.py``, with the fewest vectors each needs against f liars: (factor of f, constant).
AGGREGATION_NEEDS = {
    "mean": (0, 1),
    "norm-bound": (0, 1),
    "median": (2, 1),
    "trimmed-mean": (2, 1),
    "krum": (2, 3),
    "multi-krum": (2, 3),
}
AggregationName = Annotated[str, _named("aggregators", *AGGREGATION_NEEDS, setting="federation.aggregation")]
FormatName = Annotated[str, _named("readers", *READERS, setting="data.format")]
TechniqueName = Annotated[str, _named("techniques", "lora", "prompt-tuning", setting="adapter.technique")]
JUDGE_NAMES = ("rouge-l", "meteor", "bertscore")
JudgeName = Annotated[str, _named("judges", *JUDGE_NAMES, setting="evaluation.judge")]
MetricName = Annotated[str, _named("metrics", *METRICS, setting="evaluation.metrics")]


class Settings(BaseModel):
    """A frozen table of settings that forbids keys it does not know and never coerces a type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class DataConfig(Settings):
    """Which users' data, in which published format."""

    format: FormatName = "movielens-100k"
    source: str = "asset:ml-100k"  # asset:NAME, or a folder that holds the published files
    columns: dict[str, str] = {}  # format jsonl, csv, parquet: field of a record, or "user" -> column of the files
    shuffled: bool = False  # negative control: the records of all users are dealt out anew, as many to each
    min_records: Count = 1  # users with fewer are left out, as publishers of data sets do
    users: Literal["all", "tuning", "campaign"] = "all"  # tuning: for choosing constants; campaign: all others
    tuning_share: Annotated[float, Field(gt=0, lt=1)] = 0.2  # of the users, by a public hash of their ids
    scored: Literal["test", "validation"] = "test"  # validation: for choosing constants; the test records are dropped


class TaskConfig(Settings):
    """What is predicted from a text: a rating on a public scale, a public tag, whether it is liked, an answer, or which
    of two answers a user likes better.
    """

    name: Literal["rating", "tagging", "ranking", "generation", "preference"] = "rating"
    low: FiniteFloat = 1.0  # of a rating; predictions are clipped to the scale
    high: FiniteFloat = 5.0
    labels: tuple[str, ...] = ()  # tagging: every tag there is, public; a record's target is its place in this list
    liked: FiniteFloat = 4.0  # ranking: records of at least this rating are liked, the others move nothing
    negatives: Count = 100  # ranking: texts from the catalogue that a held-out one is ranked among
    held_out: Literal["next", "last", "drawn"] = "next"  # ranking: which of a user's liked held-out records is asked
    template: str = "{text}"  # of a prompt to a language model; the response follows it
    beta: Positive = 0.1  # preference: how much the log-probabilities' distance from the base's own counts, in DPO

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"task.low must be below task.high, got {self.low} and {self.high}.")
        if self.template.count("{text}") != 1:
            raise ValueError(f"task.template must hold {{text}} exactly once, got {self.template!r}.")
        if self.name == "tagging" and not 2 <= len(set(self.labels)) == len(self.labels):
            raise ValueError(
                f"task.labels must list at least two labels with task.name = 'tagging', all different, "
                f"got {list(self.labels)}."
            )
        return self

    @property
    def centre(self) -> float:
        """Midpoint of the scale: the public start value. A mean of the data would leak."""
        return (self.low + self.high) / 2


class ModelConfig(Settings):
    """The frozen base model and where it is cut into backbone and head."""

    base: str = "asset:all-MiniLM-L6-v2"  # asset:NAME, hub:ORG/NAME, or a local folder
    head_blocks: Annotated[int, Field(ge=0)] | Literal["all"] = 1  # 0 = linear head on frozen features
    max_tokens: Annotated[int, Field(ge=8, le=512)] = 64  # a title with its genres has about 14


class AdapterConfig(Settings):
    """The trainable part of the head: LoRA on its blocks and the task output on public, whitened features."""

    technique: TechniqueName = "lora"
    rank: Count = 4
    scaling: Positive = 2.0  # LoRA's alpha / rank: how far one unit of B moves a layer
    targets: tuple[str, ...] = ("output.dense",)  # the top layer: nothing below it needs a backward pass
    whitened_features: NaturalCount | Literal["all"] = "all"  # leading directions of the public texts' features
    whitening_ridge: NonNegative = 0.02  # share of the largest eigenvalue added to every one
    constant_feature: NonNegative = 0.7  # the output's bias, as a feature of the same size as the others; 0: none
    kernel_features: NaturalCount | Literal["all"] = 0  # leading directions of a kernel between the public texts
    kernel_widths: tuple[KernelWidth, ...] = (0.3, 0.02)  # of 1 - cosine: for similar texts, and for the very text
    kernel_weights: tuple[Positive, ...] = (0.5, 0.5)  # one a width; their sum bounds a text's squared norm
    kernel_scale: Positive = 1.0  # size of the kernel features beside the others
    prompt_tokens: NaturalCount = 0  # soft tokens before the text, at the head's first block; with LoRA or alone

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if not self.whitened_features and not self.kernel_features:
            raise ValueError("adapter.whitened_features must be at least 1 where adapter.kernel_features is 0, got 0.")
        if not len(self.kernel_widths) == len(self.kernel_weights) >= 1:
            raise ValueError(
                "adapter.kernel_weights must hold one number for each of adapter.kernel_widths, at least one, "
                f"got {len(self.kernel_weights)} for {len(self.kernel_widths)}."
            )
        return self


class FederationConfig(Settings):
    """How the shared part is trained and averaged."""

    method: FederationMethodName = "ffa-lora"  # half the bytes, exact mean
    rounds: Count = 20
    cohort_size: Count | Literal["all"] = "all"  # devices asked per round, in shuffled passes over everyone
    min_reply_share: Annotated[float, Field(gt=0, le=1)] = 0.5  # fewer good replies stop the campaign
    aggregation: AggregationName = "mean"  # the others withstand devices that lie, and use fewer of the honest ones
    malicious_share: Annotated[float, Field(ge=0, lt=0.5)] = 0.1  # of the devices asked, that a rule is to withstand
    norm_bound: Positive | Literal["median"] = "median"  # of aggregation norm-bound: the longest change that counts
    groups: Annotated[int, Field(ge=1, le=10_000)] = 1  # trust distributed: sums a round, each with the whole noise
    server_optimizer: Literal["momentum", "adam"] = "adam"  # post-processing: costs no privacy
    server_learning_rate: Positive = 0.084
    lora_learning_rate_factor: Positive = 0.12  # LoRA's rate relative to the output's
    server_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5  # Adam's beta1
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    adam_epsilon: Positive = 1e-3
    round_timeout_s: Positive = 600.0


class TrainingConfig(Settings):
    """The local step on a device."""

    steps: Annotated[int, Field(ge=1, le=10_000)] = 1  # per round, exactly this many; at unit record each is noisy
    learning_rate: Priced = 1.0  # with one step a round the server's rate is the one that matters
    record_exponent: Annotated[float, Field(ge=0, le=1)] = 0.5  # unit user: a sum over n records is divided by n^this


class PrivacyConfig(Settings):
    """Everything that changes the guarantee. A run states all of it or claims nothing."""

    trust: Literal["local", "distributed", "central", "none"] = "local"
    unit: Literal["record", "user"] = "record"
    epsilon: Positive = 8.0
    delta: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = 1e-5
    clip_norm: Priced = 0.7  # of one record's gradient; at unit user, of a user's whole change
    sampling_rate: Annotated[float, Field(gt=0, le=1)] = 1.0  # 1 = full batch: no sampling assumption at all
    denominator: Priced = 64.0  # public constant the summed gradient is divided by, never a batch size
    max_participations: Count = 20  # rounds one device may join in the whole campaign
    added_records: Literal["next-round", "next-campaign"] = "next-round"  # when a device uses one it gets meanwhile
    survivors: Annotated[float, Field(gt=0, le=1)] = 0.8  # distributed: a round with a smaller share of them is void
    colluders: Annotated[float, Field(ge=0, lt=1)] = 0.1  # distributed: share of the cohort whose noise may be known
    neighbours: Annotated[int, Field(ge=2)] | Literal["auto"] = "auto"  # distributed: each device shares masks with


class PersonalConfig(Settings):
    """What a device adds for itself after the federation; it never leaves, so it needs no noise."""

    method: PersonalMethodName = "fine-tune"
    ridge: Positive = 3.0  # penalty of the private output layer on centred features of unit norm
    bias_shrinkage: NonNegative = 10.0  # the private bias counts as many records at zero
    epochs: Count = 3  # passes over the device's own records, where a private copy of the LoRA is trained
    learning_rate: Positive = 1e-3  # of Adam in those passes
    batch_size: Count = 8
    profile: NonNegative = 28.0  # ranking: weight of what a user likes more than others; bias_shrinkage holds it back
    proximal: NonNegative = 0.1  # ditto: pull towards the shared tensors (lambda)
    neighbours: Count = 20  # retrieval, feddpa: records of the device's own that are looked up for a text
    retriever: Literal["dense", "bm25", "recency"] = "dense"  # retrieval: by the local encoder, by words, or the newest
    temperature: Positive = 0.1  # retrieval, feddpa: of similarities; small ones count the nearest record alone
    dimensions: Count = 8  # user-embedding: of a user's vector


class PromptConfig(Settings):
    """What of a user's own stands before a prompt to a language model; put together on the device, never uploaded.

    In training it would put one record into many examples (rule P7), so that no noise for a record covers it: there it
    is allowed at unit user alone.
    """

    records: Annotated[int, Field(ge=0, le=64)] = 0  # of the user's own, those the retriever finds for the text
    retriever: Literal["dense", "bm25", "recency"] = "bm25"
    encoder: str = "asset:all-MiniLM-L6-v2"  # dense: what embeds texts, a base in the hub's layout
    entry: str = "{text} {response}"  # how one is put, a line each
    words: Count = 40  # of a text or a response in an entry; the rest is left away
    declared: tuple[str, ...] = ()  # attributes of the user's profile that stand first
    training: bool = False  # in the rounds too, not only where a prompt is answered

    @model_validator(mode="after")
    def _shows(self) -> Self:
        if not any(place in self.entry for place in ("{text}", "{response}")):
            raise ValueError(f"prompt.entry must hold {{text}} or {{response}}, got {self.entry!r}.")
        return self

    @property
    def used(self) -> bool:
        """Whether anything stands before a prompt."""
        return bool(self.records or self.declared)


class PersonaConfig(Settings):
    """Groups of users, each with an output of its own between the shared one and the private one (scope persona).

    Every group's tensors travel, those of the others as zeros: at unit user that hides which group a device is of.
    """

    count: Annotated[int, Field(ge=0, le=64)] = 0  # 0: no personas
    choice: Literal["loss", "declared"] = "loss"  # of least loss on the device's records, or by what its user declared
    attribute: str = ""  # declared: which attribute of the users' profiles
    values: tuple[tuple[str, ...], ...] = ()  # declared: the values of each persona; a user of no value is in none
    epsilon: Priced = 1.0  # unit record, choice loss: what the choice costs, once, out of privacy.epsilon
    loss_bound: Priced = 2.0  # a record's loss counts up to this in the choice
    spread: NonNegative = 0.1  # size of the personas' public start: equal ones would never part
    shrinkage: NonNegative = 20.0  # a user's n records weigh personas like n s / (n + s) independent ones

    @model_validator(mode="after")
    def _named(self) -> Self:
        values = [value for each in self.values for value in each]
        if self.choice == "declared" and not (self.attribute and len(self.values) == self.count):
            raise ValueError(
                "persona.choice = 'declared' needs persona.attribute and a list of values for each of the "
                f"{self.count} personas, got {self.attribute!r} and {len(self.values)} lists."
            )
        if len(set(values)) < len(values):
            raise ValueError("persona.values must name each value once, got one twice.")
        return self


class LinearConfig(Settings):
    """The comparison campaign with a linear head on whitened features, no blocks and no kernel, on the same data.

    Empty means 'as the main one'.
    """

    enabled: bool = True
    rounds: Count | None = None
    cohort_size: Count | Literal["all"] | None = None
    max_participations: Count | None = None
    learning_rate: Positive | None = None
    server_optimizer: Literal["momentum", "adam"] | None = None
    server_learning_rate: Positive | None = None
    server_momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    clip_norm: Positive | None = None
    whitened_features: Count | Literal["all"] | None = None
    constant_feature: NonNegative | None = None
    steps: Count | None = None
    sampling_rate: Annotated[float, Field(gt=0, le=1)] | None = None


class StatisticsConfig(Settings):
    """The comparison row ``dp-statistics``: one release of item statistics, as private as the campaign, smoothed.

    Ratings count from -1 to 1 here. Chosen on validation rows at unit user, epsilon 8: ``sottovoce bench statistics``.
    """

    enabled: bool = True
    count_weight: Positive = 0.3  # of a count beside a rating: counts need less precision
    variance: Positive = 0.05  # of a text's mean rating
    text_share: Annotated[float, Field(ge=0, le=1)] = 0.8  # of that variance that similar texts have in common
    width: Positive = 0.3  # of the kernel exp((cosine - 1) / width) of two texts
    rating_variance: NonNegative = 0.3  # of single ratings about their text's mean
    records_per_user: Positive = 70.0  # a guess, never a count: at unit user it sets how much one rating weighs


class ExportConfig(Settings):
    """Which users get an ONNX head at the end."""

    users: Annotated[int, Field(ge=0)] | tuple[str, ...] = 3  # a number (the first ones), or user ids


class EvaluationConfig(Settings):
    """What the observer of a simulation measures. It stands outside the federation and may read everything."""

    seeds: Annotated[int, Field(ge=1, le=100)] = 1  # runs with seed, seed + 1, …: everything drawn is drawn anew
    every_rounds: Count = 1
    bootstrap_resamples: Count = 2000
    cold_start: tuple[NaturalCount, ...] = (0, 1, 2, 5, 10, 20, 50)  # own records a user is scored with
    groups: tuple[str, ...] = ()  # attributes of profiles that users opted in to be compared by
    candidates: NaturalCount = 0  # generation: answers among which a dialogue's next one is to be found; ConvAI2 has 20
    swapped: bool = False  # generation: also every user's private part on the test records of another user
    answers: NaturalCount = 0  # generation: test prompts of each user that are answered, and the answers compared
    answer_tokens: Count = 48  # the longest answer
    judge: JudgeName = "rouge-l"  # which of two answers is better, for win rates
    metrics: tuple[MetricName, ...] = ()  # of installed packages, beside the built-in ones

    @model_validator(mode="after")
    def _tells_apart(self) -> Self:
        if self.candidates == 1:
            raise ValueError("evaluation.candidates must be 0 or at least 2, got 1: it would always be found.")
        return self


class AttackConfig(Settings):
    """Attacks of a simulation on its own result; they change what it trains on. A device with an owner reads none."""

    membership: bool = False  # who was trained on? Runs the campaign a second time, without privacy, to compare with
    held_out_share: Annotated[float, Field(gt=0, lt=1)] = 0.2  # of a user's fit records, by a public hash: for nobody

    @property
    def held_out(self) -> float:
        """Share of the records that nobody may train on."""
        return self.held_out_share if self.membership else 0.0


class PoisonConfig(Settings):
    """Devices of a simulation that lie. Nothing in ``client`` or ``server`` reads it, and no campaign on owners'
    devices may hold it: what lies stands in ``simulations/poison.py``.
    """

    kind: Literal["none", "sign-flip", "random", "label-flip", "alie", "backdoor"] = "none"
    share: Annotated[float, Field(gt=0, lt=0.5)] = 0.1  # of all devices, drawn by the seed
    strength: Positive = 1.0  # sign-flip, random, backdoor: times what an honest device sends; alie: deviations, z
    trigger: str = "zq"  # backdoor: the word that stands before a text
    rules: tuple[AggregationName, ...] = ()  # that the run compares beside federation.aggregation

    @property
    def enabled(self) -> bool:
        """Whether anybody lies."""
        return self.kind != "none"


class PerformanceConfig(Settings):
    """Must not change the guarantee or, beyond rounding, the result."""

    threads: Annotated[int, Field(ge=1, le=256)] = (
        1  # of torch; a device's batches are too small to share out, and a busy core stalls the other
    )
    device: Literal["cpu", "cuda"] = "cpu"  # of training; cuda is untested
    engine: Literal["inline", "ray"] = "inline"  # devices in this process, or on Flower's simulation engine
    workers: Annotated[int, Field(ge=1, le=1024)] | None = None  # of ray; by default one for each processor
    ray_address: str = ""  # of a Ray cluster that runs already; empty starts one on this machine
    micro_batch: Count = (
        512  # tokens per forward pass, which is what a step's memory is of; the clipped sum does not see it
    )
    # Of products with frozen weights in a training step: mixed rounds to bfloat16 what it multiplies, which moves a
    # gradient by about a hundredth; auto is mixed where the processor multiplies bfloat16.
    precision: Literal["auto", "fp32", "mixed"] = "fp32"
    secure_sum: Literal["plain", "masked"] = "plain"  # of a simulation: masks cost time and change no bit of the sum


class Scenario(Settings):
    """One experiment: one TOML file of these tables."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: DataConfig = DataConfig()
    task: TaskConfig = TaskConfig()
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    federation: FederationConfig = FederationConfig()
    training: TrainingConfig = TrainingConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    personal: PersonalConfig = PersonalConfig()
    persona: PersonaConfig = PersonaConfig()
    prompt: PromptConfig = PromptConfig()
    linear: LinearConfig = LinearConfig()
    statistics: StatisticsConfig = StatisticsConfig()
    export: ExportConfig = ExportConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    attack: AttackConfig = AttackConfig()
    poison: PoisonConfig = PoisonConfig()
    performance: PerformanceConfig = PerformanceConfig()

    @model_validator(mode="after")
    def _lies_about_ratings(self) -> Self:
        if self.poison.kind in ("label-flip", "backdoor") and self.task.name != "rating":
            raise ValueError(f"poison.kind = {self.poison.kind!r} is for task.name = 'rating', got {self.task.name!r}.")
        if self.poison.enabled and self.performance.engine != "inline":
            raise ValueError(
                f"poison.kind = {self.poison.kind!r} needs performance.engine = 'inline', got "
                f"{self.performance.engine!r}: devices that collude live in one process."
            )
        if self.poison.enabled and self.performance.secure_sum == "masked":
            raise ValueError(
                f"poison.kind = {self.poison.kind!r} needs performance.secure_sum = 'plain': masks change no bit of a "
                "sum."
            )
        return self

    @model_validator(mode="after")
    def _asks_what_its_task_has(self) -> Self:
        asked = [name for name in ("candidates", "swapped", "answers") if getattr(self.evaluation, name)]
        if asked and self.task.name != "generation":
            raise ValueError(
                f"evaluation.{asked[0]} is for task.name = 'generation', got {self.task.name!r}; leave it out."
            )
        return self

    def seeds(self) -> list[int]:
        """The seeds of the run: everything that is drawn is drawn anew for each."""
        return [self.seed + i for i in range(self.evaluation.seeds)]

    def linear_campaign(self) -> "Scenario | None":
        """The same experiment with a linear head, or None when it is off or would be this very campaign."""
        adapter = self.adapter
        if not self.linear.enabled or (self.model.head_blocks == 0 and not adapter.kernel_features):
            return None
        changed: dict[str, dict[str, Any]] = {"model": {"head_blocks": 0}}
        if adapter.kernel_features:
            changed["adapter"] = {"kernel_features": 0, "whitened_features": adapter.whitened_features or "all"}
        if adapter.prompt_tokens:  # which have no place below the blocks
            changed.setdefault("adapter", {}).update(prompt_tokens=0, technique="lora")
        for field, table in _LINEAR_FIELDS.items():
            value = getattr(self.linear, field)
            if value is not None:
                changed.setdefault(table, {})[field] = value
        tables = {t: getattr(self, t).model_copy(update=update) for t, update in changed.items()}
        return self.model_copy(update=tables | {"name": f"{self.name}-linear"})


_LINEAR_FIELDS = {
    "rounds": "federation",
    "cohort_size": "federation",
    "server_optimizer": "federation",
    "server_learning_rate": "federation",
    "server_momentum": "federation",
    "max_participations": "privacy",
    "clip_norm": "privacy",
    "sampling_rate": "privacy",
    "learning_rate": "training",
    "steps": "training",
    "whitened_features": "adapter",
    "constant_feature": "adapter",
}


def load_scenario(path: Path, overrides: tuple[str, ...] = ()) -> Scenario:
    """Read a scenario and lay ``key=value`` overrides over it.

    Args:
        path: A ``.toml`` file, or a resolved ``.json`` one from a run folder. With ``extends = "other.toml"`` it holds
            only what differs from a file beside it.
        overrides: ``"privacy.epsilon=3"``; the value is read as TOML, and as a plain string where it is none.

    Raises:
        ScenarioError: Unreadable file, unknown key, wrong type or impossible value; one line in the file's spelling.
    """
    tables = _read_tables(path)
    for override in overrides:
        _lay_over(tables, override)
    tables.setdefault("name", path.stem)
    try:
        return Scenario.model_validate_json(json.dumps(tables))
    except (ValidationError, TypeError) as error:
        raise ScenarioError(f"{path.name}: {_first_problem(error)}") from None


def _read_tables(path: Path, *, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The tables of a file, laid over those of the file it extends; the name is each file's own."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        tables: dict[str, Any] = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ScenarioError(f"{path} must be a readable scenario file: {_reason(error)}.") from None
    except (ValueError, RecursionError) as error:
        raise ScenarioError(f"{path} must be a valid {path.suffix[1:].upper()} file: {error}.") from None
    if not isinstance(tables, dict) or not tables:
        raise ScenarioError(f"{path} must hold tables of settings, got none; start from simulations/scenarios.")
    if "extends" not in tables:
        return tables
    other = tables.pop("extends")
    if not isinstance(other, str) or (path.parent / other).resolve() in (above := (*below, path.resolve())):
        raise ScenarioError(f"{path}: extends must name another scenario file beside this one, got {other!r}.")
    lower = _read_tables(path.parent / other, below=above)
    lower.pop("name", None)
    return _merged(lower, tables)


def _merged(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    found = dict(lower)
    for key, value in upper.items():
        both = isinstance(value, dict) and isinstance(lower.get(key), dict)
        found[key] = lower[key] | value if both else value
    return found


def _lay_over(tables: dict[str, Any], override: str) -> None:
    """Set one dotted key; the value is TOML where it parses as such."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ScenarioError(f"--set must read key=value, e.g. privacy.epsilon=3, got {override!r}.")
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except (ValueError, RecursionError):  # of TOML, or of a number of thousands of digits
        value = text.strip()
    for part in parts[:-1]:
        tables = tables.setdefault(part, {})
        if not isinstance(tables, dict):
            raise ScenarioError(f"--set {key}: {part} is a value, not a table; drop what follows it.")
    tables[parts[-1]] = value


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _first_problem(error: ValidationError | TypeError) -> str:
    """The first problem as one line: key in the file's spelling, what must hold, what we got, what to do."""
    if isinstance(error, TypeError):
        return f"dates and times are not used here ({error}); write a number or a string."
    problem = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    key = ".".join(str(part) for part in problem["loc"] if not _is_union_tag(part))
    if problem["type"] == "extra_forbidden":
        table = _known_keys(problem["loc"][:-1])
        return f"{key} is not a setting; known here: {', '.join(table)}."
    if problem["type"] == "missing":
        return f"{key} must be given."
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    same = [item for item in error.errors() if _loc(item) == _loc(problem)]  # the branches of a union
    wanted = " or ".join(dict.fromkeys(item["msg"].lower().removeprefix("input should be ") for item in same))
    return f"{key} must be {wanted}, got {problem['input']!r}. {_ADVICE.get(key, '')}".rstrip()


def _loc(item: Any) -> tuple[Any, ...]:
    return tuple(part for part in item["loc"] if not _is_union_tag(part))


def _is_union_tag(part: object) -> bool:
    """Pydantic puts the branch of a union into the location; our keys hold only letters and underscores."""
    return (isinstance(part, str) and not part.replace("_", "").isalpha()) or part in _UNION_TAGS


_UNION_TAGS = {"int", "float", "str", "bool"}

_ADVICE = {
    "privacy.delta": "A common choice is below 1 / number of clients.",
    "privacy.epsilon": 'A common choice is between 1 and 8; for no privacy set privacy.trust = "none".',
    "privacy.sampling_rate": "1 takes every record in every step.",
    "privacy.trust": "local protects records; distributed and central protect users.",
}


def _known_keys(loc: tuple[int | str, ...]) -> list[str]:
    """Keys of the table at a location of the scenario."""
    model: type[BaseModel] = Scenario
    for part in loc:
        field = model.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            break
        model = field.annotation
    return sorted(model.model_fields)
