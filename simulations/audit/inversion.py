"""Level L5: read a text out of LoRA's change on the wire, and what is left of that with the campaign's privacy.

The attack is that of ``simulations/audit/span.py``, on the subject's base, data and promise, where it is strongest:
LoRA on the first block, A trained, one record, one step, and a start at which nothing is zero.
"""

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from client.training.site import Workbench
from client.training.train import make_trainable
from shared.config import AdapterConfig, Scenario
from shared.datasets import Record
from shared.errors import PrivacyError
from shared.heads.adapter import load_start, make_start, trained_slots
from shared.heads.lora import FEDERATION_METHODS, FederationMethod
from shared.heads.registry import make_head
from shared.heads.tasks import TASKS, Labels, Scores, Targets
from shared.models.features import Features, compute_hidden
from shared.privacy.policy import SUM
from shared.protocol.audits import LevelResult, conclude
from shared.registry import lookup
from simulations.audit.mutants import mutant
from simulations.audit.span import Layer, find_layer, row_space, span_check
from simulations.audit.stage import Part, Played, Subject, make_campaign, play, unprotected

_LEAST_RANK = 4
_RANK = 32  # of the attack's LoRA: a text of as many tokens spans what its rows can hold
_TEXTS = 3
_PUBLIC_TEXTS = 24  # for the whitening of a rating head
_B_STDDEV, _OUTPUT_STDDEV = 0.02, 0.2  # of the start: where B or the output is zero, A has no gradient
_CONTROL_SHARE = 0.8
_FALSE_ALARMS = 0.00135  # three standard deviations, one-sided
_MUTANTS = ("no-noise",)


@dataclass(frozen=True)
class Setting:
    """An attack's campaign and what its devices hold."""

    layer: Layer
    scenario: Scenario
    token_ids: list[list[int]]
    targets: list[Targets]
    known: frozenset[int]  # tokens that every text has

    def secrets(self) -> list[set[tuple[int, int]]]:
        """The (place, token) pairs of each text that are not in every text."""
        return [
            {(p if self.layer.placed else 0, token) for p, token in enumerate(ids) if token not in self.known}
            for ids in self.token_ids
        ]

    @property
    def places(self) -> int:
        """Tokens of the longest text."""
        return max(map(len, self.token_ids))


def make_setting(
    subject: Subject, *, rank: int, method: str, seed: int, last: Sequence[int] = (), name: str = "inversion"
) -> Setting:
    """An audit's campaign on the subject's base, data and promise, with LoRA on the first block, and some real texts.

    Args:
        last: Tokens to keep of each text, from its end; by default texts that the rank suffices for.
    """
    layer = find_layer(subject.base)
    old = subject.scenario
    longest = old.model.max_tokens if last else max(8, min(old.model.max_tokens, rank * 3 // 4))
    scenario = old.model_copy(
        update={
            "name": name,
            "model": old.model.model_copy(update={"head_blocks": "all", "max_tokens": longest}),
            "adapter": AdapterConfig(rank=rank, targets=(layer.name,), whitened_features=8),
            "federation": old.federation.model_copy(
                update={
                    "method": method,
                    "rounds": 1,
                    "cohort_size": "all",
                    "server_optimizer": "momentum",
                    "server_learning_rate": 0.1,
                    "lora_learning_rate_factor": 1.0,
                }
            ),
            "training": old.training.model_copy(update={"steps": 1, "learning_rate": 1.0}),
            "privacy": old.privacy.model_copy(
                update={"sampling_rate": 1.0, "denominator": 1.0, "neighbours": "auto", "survivors": 1.0}
            ),
        }
    )
    lengths = list(last) or [0] * _TEXTS
    records = _choose(subject, count=len(lengths), seed=seed)
    encoded = TASKS[scenario.task.name](subject.base, [("", ""), *(record.key for record in records)], scenario)
    token_ids = [ids[-n:] for ids, n in zip(encoded.token_ids[1:], lengths, strict=True)]
    if encoded.labels is None:
        targets: list[Targets] = [Scores([record.target]) for record in records]
    else:
        targets = [Labels([labels[-n:]]) for labels, n in zip(encoded.labels[1:], lengths, strict=True)]
    return Setting(layer, scenario, token_ids, targets, frozenset(encoded.token_ids[0]))


def _choose(subject: Subject, *, count: int, seed: int) -> list[Record]:
    """Records of the data set with distinct inputs, by lot."""
    keys = {record.key: record for user in subject.dataset.users for record in user.fit}
    rows = np.random.default_rng([seed, 5]).choice(len(keys), size=count, replace=len(keys) < count)
    records = list(keys.values())
    return [records[row] for row in rows]


def open_bench(subject: Subject, scenario: Scenario, *, clients: int, seed: int) -> Workbench:
    """Publish a campaign whose start has a gradient everywhere, and make its head ready."""
    base = subject.base
    public = tuple(subject.dataset.public_texts[:_PUBLIC_TEXTS]) if scenario.task.name != "generation" else ()
    head = make_head(base, scenario, public_texts=len(public))
    encoded = TASKS[scenario.task.name](base, [(text, "") for text in public], subject.scenario)  # not cut short
    features = compute_hidden(base, encoded.token_ids, head_blocks=base.num_blocks)
    start = make_start(head, features, ridge=scenario.adapter.whitening_ridge, seed=seed)
    draw = np.random.default_rng([seed, 6])
    for name, array in start.items():
        stddev = _B_STDDEV if name.endswith("lora_B") else _OUTPUT_STDDEV if name == "output.weight" else 0.0
        start[name] = (array + stddev * draw.standard_normal(array.shape)).astype(np.float32)
    load_start(head, start)
    campaign = make_campaign(
        scenario,
        folder=subject.folder / "inversion",
        slots=trained_slots(head),
        start=start,
        clients=clients,
        head_blocks=base.num_blocks,
        base=base,
        public_texts=public,
    )
    return Workbench(campaign, base, head, make_trainable(head, campaign.policy))


def seen(played: Played, name: str) -> list[np.ndarray]:
    """The changes of one tensor that an adversary sees, from the bytes of the replies.

    At unit record every device's. Under ``distributed`` the sum alone, which is what the masks leave; under ``central``
    what the server releases, for the server itself is trusted with the rest.
    """
    policy = played.campaign.policy
    if policy.trust == "central":
        return [played.arrays[1][name] - played.arrays[0][name]]
    replies = [played.update(1, seat) for seat in range(policy.cohort_size)]
    if policy.trust != "distributed":
        return [reply[name] for reply in replies]
    total = np.sum([reply[SUM] for reply in replies], axis=0, dtype=np.uint32).view(np.int32)
    ends = np.cumsum([int(np.prod(shape)) for _, shape in policy.slots])
    place = [slot for slot, _ in policy.slots].index(name)
    part: np.ndarray = np.split(total, ends[:-1])[place].reshape(policy.slots[place][1])
    return [part * (policy.grid or math.nan)]


def recovered(
    subject: Subject, setting: Setting, *, seed: int, faults: Sequence[str] = (), private: bool = True
) -> dict[str, dict[str, Any]]:
    """What the span check finds in what the devices of a campaign send, as they are and with each fault.

    Returns:
        Fault, or "" for the real code -> ``tokens`` there are, ``hits``, ``guesses``, ``share``, ``chance`` (expected
        hits of guesses at random), ``limit`` (hits that three standard deviations of chance allow), ``p_value``.
    """
    scenario = setting.scenario if private else _control(setting.scenario)
    apart = not private or scenario.privacy.unit == "record"  # whether each text is seen by itself in one play
    count = len(setting.token_ids)
    bench = open_bench(subject, scenario, clients=max(count, 3), seed=seed)
    texts = compute_hidden(subject.base, setting.token_ids, head_blocks=subject.base.num_blocks)
    parts = [Part(bench, texts.select([row]), setting.targets[row]) for row in range(count)]
    nobody = Part(bench, Features([]), Scores([]))
    plays = [[*parts, *[nobody] * (3 - count)]] if apart else [[part, nobody, nobody] for part in parts]
    name = f"block.0.{setting.layer.name}.lora_A"
    project = None
    if name not in dict(bench.campaign.policy.slots):
        project, name = bench.campaign.start[name], name.removesuffix("A") + "B"
    changes: list[np.ndarray] = []
    for fault in ("", *faults):
        with mutant(fault) if fault else nullcontext():
            found = [change for devices in plays for change in seen(play(bench.campaign, devices), name)]
        changes += found[:count]
    largest = float(np.abs(bench.campaign.start[name]).max())
    spaces = [row_space(change, largest=largest) for change in changes]
    guesses = span_check(setting.layer, spaces, places=setting.places, project=project)
    return {fault: _count(setting, guesses[i * count : (i + 1) * count]) for i, fault in enumerate(("", *faults))}


def _count(setting: Setting, guesses: Sequence[list[tuple[int, int]]]) -> dict[str, Any]:
    """Hits of guesses, and how many there would be by chance."""
    config: Any = setting.layer.base.model.config
    secrets = setting.secrets()
    told = [{guess for guess in each if guess[1] not in setting.known} for each in guesses]
    each = [len(mine & found) for mine, found in zip(secrets, told, strict=True)]
    tokens, hits = sum(map(len, secrets)), sum(each)
    # A guess at random is one of the vocabulary: at each place, or once for the whole text.
    tries = [1 if setting.layer.placed else len(found) for found in told]
    chance = sum(len(mine) * n for mine, n in zip(secrets, tries, strict=True)) / max(tokens, 1) / config.vocab_size
    return {
        "tokens": tokens,
        "hits": hits,
        "guesses": sum(map(len, told)),
        "share": hits / max(tokens, 1),
        "shares": [n / max(len(mine), 1) for n, mine in zip(each, secrets, strict=True)],
        "precision": hits / max(sum(map(len, told)), 1),
        "chance": chance,
        "limit": int(stats.binom.isf(_FALSE_ALARMS, tokens, min(chance, 1.0))),
        "p_value": float(stats.binom.sf(hits - 1, tokens, min(chance, 1.0))),
    }


def _control(scenario: Scenario) -> Scenario:
    return unprotected(scenario.model_copy(update={"name": f"{scenario.name}-control"}))


def audit(subject: Subject, *, seed: int, quiet: bool) -> LevelResult:
    """Attack texts of the subject's data on its base and at its promise, and again without privacy and without noise.

    Args:
        subject: What is audited.
        seed: Of the texts and of the start.
        quiet: No progress on stderr.
    """
    del quiet  # seconds
    started = time.perf_counter()
    rank = min(_RANK, subject.base.hidden_size // 2)
    while True:
        setting = make_setting(subject, rank=rank, method="fedavg", seed=seed)
        try:
            found = recovered(subject, setting, seed=seed, faults=_MUTANTS)
        except PrivacyError:  # so much noise in shares leaves so many numbers no grid: no device would take part
            if rank < 2 * _LEAST_RANK:
                raise
            rank //= 2
        else:
            break
    control = recovered(subject, setting, seed=seed, private=False)[""]
    real = found.pop("")
    caught = {fault: result["hits"] > result["limit"] for fault, result in found.items()}
    detected = control["share"] >= _CONTROL_SHARE
    own = _own_method(subject, seed=seed)
    return conclude(
        title="words of a text, read out of LoRA's change on the wire",
        held=real["hits"] <= real["limit"],
        control_detected=detected,
        caught=caught,
        started=started,
        facts={
            "rank": rank,
            "layer": f"block.0.{setting.layer.name}",
            "texts": len(setting.token_ids),
            "control": control,
            "private": real,
            **found,
            "own_method": own,
        },
        words=_words(subject, control, real, found["no-noise"], own, rank=rank),
    )


def _own_method(subject: Subject, *, seed: int) -> dict[str, Any]:
    """What a span check finds, without privacy, where only B travels: by length of the text, at the subject's rank."""
    rank, method = subject.scenario.adapter.rank, subject.scenario.federation.method
    own: dict[str, Any] = {
        "method": method,
        "rank": rank,
        "blocks": subject.campaign.policy.head_blocks,
        "blocks_of_base": subject.base.num_blocks,
    }
    parts = lookup("federation_methods", method, FEDERATION_METHODS, FederationMethod).parts
    if "lora_A" in parts or not own["blocks"]:
        return own
    lengths = sorted({max(2, rank - 2), max(2, rank - 1), rank, rank + 1, rank + 4})
    setting = make_setting(subject, rank=rank, method=method, seed=seed, last=lengths, name="inversion-own")
    found = recovered(subject, setting, seed=seed, private=False)[""]
    shares = dict(zip(map(len, setting.token_ids), found["shares"], strict=True))
    read = [tokens for tokens, share in shares.items() if share > 0]
    beyond = [tokens for tokens in shares if tokens > max(read, default=0)]  # none where the texts were too short
    void_from = min(beyond, default=None)
    return own | {"share_by_tokens": shares, "void_from": void_from}


def _words(
    subject: Subject,
    control: dict[str, Any],
    real: dict[str, Any],
    bare: dict[str, Any],
    own: dict[str, Any],
    *,
    rank: int,
) -> tuple[str, ...]:
    policy = subject.campaign.policy
    where = {
        "local": "each device's reply",
        "distributed": "the sum of a round in which one user has a record",
        "central": "what the server releases of a round in which one user has a record",
    }[policy.trust]
    words = [
        f"Without privacy, one step of LoRA on the first block (fedavg, rank {rank}) gave away {control['hits']} of "
        f"{control['tokens']} tokens.",
        f"At this campaign's promise (epsilon {policy.epsilon:g}, clip norm {policy.clip_norm:g}) {where} gave away "
        f"{real['hits']} of {real['tokens']}; guessing at random gives {real['limit']} at the most.",
        f"Clipped and not noised it gave away {bare['hits']} of {bare['tokens']}"
        f"{': noise protects here, not clipping' if bare['hits'] > bare['limit'] else ''}.",
    ]
    if not own["blocks"]:
        words.append("This campaign trains no LoRA: attacked were its base, its data and its promise alone.")
    if "share_by_tokens" in own:
        listed = ", ".join(f"{share:.0%} of {tokens}" for tokens, share in own["share_by_tokens"].items())
        void = (
            f"it is void from {own['void_from']} tokens on" if own["void_from"] else "no text here was too long for it"
        )
        words.append(
            f"With A frozen as in this campaign ({own['method']}, rank {own['rank']}) and no privacy, a span check "
            f"reads this share of so many tokens: {listed}; {void}. "
            "That says nothing of other attacks."
        )
    if 0 < own["blocks"] < own["blocks_of_base"]:
        words.append(
            f"This campaign's LoRA is on the last {own['blocks']} of {own['blocks_of_base']} blocks, which see states "
            "of whole texts: a check token by token does not apply; one of whole texts out of a list of texts would."
        )
    return tuple(words)
