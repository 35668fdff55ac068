"""Level L2: sentences nobody else would write, each in the data by a coin, and how well that can be told afterwards.

A small random language model is trained with the subject's unit, trust, promise, sampling and method, by the real code;
the score of a canary is how much likelier the released parameters make it. Only the bound on epsilon is a theorem: AUC
and TPR say what this attack does, not what the best one would.
"""

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from client.training.site import Workbench
from client.training.train import make_trainable
from shared.config import AdapterConfig, Scenario, TaskConfig
from shared.heads.adapter import Arrays, load_shared, make_start, trained_slots
from shared.heads.registry import make_head
from shared.heads.tasks import Labels, encode_dialogues
from shared.models.features import Features, compute_hidden
from shared.models.model import Base, load_base
from shared.privacy.policy import Policy
from shared.progress import track
from shared.protocol.audits import LevelResult, conclude
from simulations.audit.bounds import auc, count_correct, fewest_correct, one_run_bound, tpr_at_fpr
from simulations.audit.mutants import MUTANTS, mutant
from simulations.audit.stage import Part, Subject, make_campaign, play, unprotected

_CANARIES = {"record": 500, "user": 200}  # each user is a device with a reply of its own
_WORDS, _SENTENCE = 256, 12  # of the language, and of a canary
_WIDTH, _BLOCKS, _RANK = 128, 2, 16
_TARGETS = ("mlp.down_proj", "mlp.up_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj")
_ROUNDS, _STEPS = {"record": 4, "user": 2}, 8  # at the most; the noise is calibrated to as many as are played
_DENOMINATOR = 64.0
_TYPICAL_NORM = 0.7  # of a canary's gradient, about: the control's rate goes by it, for there nothing is clipped
_CONTROL_AUC = 0.9
_MUTANTS = ("no-noise", "quarter-noise")
_REQUIRED = ("no-noise",)  # at a small epsilon a quarter of the noise may still be too much for this attack


def make_speaker(folder: Path, *, seed: int) -> Base:
    """Write a random causal language model over invented words, and load it as any other base."""
    folder.mkdir(parents=True)
    vocabulary = {"<eos>": 0} | {f"w{i}": i + 1 for i in range(_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=_WIDTH,
        num_hidden_layers=_BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=2 * _WIDTH,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.1,  # the usual 0.02 would leave the blocks nearly without effect
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    return load_base(folder)


@dataclass(frozen=True)
class Canaries:
    """Sentences of random words, as records of a head over the whole model.

    Attributes:
        features: What enters the first block.
        labels: The words to predict.
    """

    features: Features
    labels: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, bench: Workbench, rows: list[int]) -> Part:
        """A device that holds some of them."""
        return Part(bench, self.features.select(rows), Labels([self.labels[row] for row in rows]))

    @torch.no_grad()
    def losses(self, bench: Workbench, arrays: Arrays) -> np.ndarray:
        """Loss (m,) of each at given parameters."""
        load_shared(bench.head, arrays)
        rows = np.arange(len(self))
        hidden, mask = self.features.batch(rows)
        found: np.ndarray = bench.head(hidden, mask, Labels(self.labels).batch(rows, hidden.shape[1])).double().numpy()
        return found


def make_canaries(base: Base, scenario: Scenario, *, count: int, seed: int) -> Canaries:
    """Draw sentences."""
    words = np.random.default_rng([seed, 2]).integers(_WORDS, size=(count, _SENTENCE))
    encoded = encode_dialogues(base, [("", " ".join(f"w{word}" for word in sentence)) for sentence in words], scenario)
    return Canaries(compute_hidden(base, encoded.token_ids, head_blocks=base.num_blocks), encoded.labels or [])


def audit_scenario(old: Scenario, *, name: str) -> Scenario:
    """The subject's promise, sampling and method on the small model, at rates that suit its clip norm."""
    privacy, unit = old.privacy, old.privacy.unit
    rounds, steps = min(privacy.max_participations, _ROUNDS[unit]), min(old.training.steps, _STEPS)
    clip_norm = privacy.clip_norm if privacy.trust != "none" else _TYPICAL_NORM
    scaling = max(2.0, 4 * clip_norm)  # so that a canary's gradient is clipped, and not much smaller than the bound
    rate = 1 / (clip_norm * scaling * math.sqrt(rounds * steps))
    return old.model_copy(
        update={
            "name": name,
            "task": TaskConfig(name="generation", template="{text}"),
            "model": old.model.model_copy(update={"head_blocks": "all", "max_tokens": 3 * _SENTENCE}),
            "adapter": AdapterConfig(rank=_RANK, scaling=scaling, targets=_TARGETS),
            "federation": old.federation.model_copy(
                update={
                    "rounds": rounds,
                    "cohort_size": "all",
                    "server_optimizer": "momentum",
                    "server_momentum": 0.0,
                    "server_learning_rate": 1.0 if unit == "record" else rate,
                    "lora_learning_rate_factor": 1.0,
                }
            ),
            "training": old.training.model_copy(
                update={"steps": steps, "learning_rate": rate if unit == "record" else 1.0}
            ),
            "privacy": privacy.model_copy(
                update={"max_participations": rounds, "denominator": _DENOMINATOR, "neighbours": "auto"}
            ),
        }
    )


def open_bench(base: Base, scenario: Scenario, *, folder: Path, clients: int, seed: int) -> Workbench:
    """Publish a campaign on the small model, and make its head ready."""
    head = make_head(base, scenario)
    start = make_start(head, Features([]), ridge=0.0, seed=seed)
    campaign = make_campaign(
        scenario,
        folder=folder,
        slots=trained_slots(head),
        start=start,
        clients=clients,
        head_blocks=base.num_blocks,
        base=base,
    )
    return Workbench(campaign, base, head, make_trainable(head, campaign.policy))


def attack(bench: Workbench, canaries: Canaries, *, seed: int) -> dict[str, Any]:
    """Toss the coins, play the campaign, and guess them from the parameters it released.

    Returns:
        ``auc`` and ``tpr`` (at an FPR of 1 %) as value, low, high; ``correct`` of ``guesses``; ``epsilon_lower`` by the
        one-run bound.
    """
    policy = bench.campaign.policy
    inside = np.random.default_rng([seed, 3]).random(len(canaries)) < 0.5
    if policy.unit == "record":
        parts = [canaries.part(bench, np.flatnonzero(inside).tolist())]
    else:
        parts = [canaries.part(bench, [row] if inside[row] else []) for row in range(len(canaries))]
    played = play(bench.campaign, parts)
    before, after = (canaries.losses(bench, arrays) for arrays in (played.arrays[0], played.arrays[-1]))
    scores, guesses = before - after, len(canaries) // 4
    correct = count_correct(scores, inside, guesses=guesses)
    told, found = auc(scores[inside], scores[~inside]), tpr_at_fpr(scores[inside], scores[~inside])
    return {
        "auc": [told.value, told.low, told.high],
        "tpr": [found.value, found.low, found.high],
        "correct": correct,
        "guesses": guesses,
        "epsilon_lower": one_run_bound(
            canaries=len(canaries), guesses=guesses, correct=correct, delta=policy.delta or 0.0
        ),
    }


def most_auc(policy: Policy) -> float | None:
    """What the AUC of any attack on exchangeable canaries is at most, on average over runs; None under sampling.

    Source:
        Releases of the Gaussian mechanism are mu-GDP (Dong et al. 2019, arXiv:1905.02383), mu = sqrt(releases) / z. One
        canary in and another out, or the other way round, is two changes, so 2 mu; an attack that orders the two
        rightly with chance A in one case does so wrongly with chance 1 - A in the other: A is at most Phi(mu).
    """
    if policy.sampling_rate < 1:
        return None
    releases = policy.max_participations * (policy.steps if policy.unit == "record" else 1)
    return float(stats.norm.cdf(math.sqrt(releases) / policy.noise_multiplier))


def exceeds(found: dict[str, Any], *, epsilon: float, most: float | None) -> bool:
    """Whether an attack found more than the claim allows: its bound on epsilon, or the lower end of its AUC."""
    return bool(found["epsilon_lower"] > epsilon or (most is not None and found["auc"][1] > most))


def audit(subject: Subject, *, seed: int, quiet: bool) -> LevelResult:
    """Attack sentences of a small language model at the subject's promise, and again without privacy and with faults.

    Args:
        subject: Whose promise, sampling, method, steps and rounds are attacked.
        seed: Of model, canaries and coins.
        quiet: No progress on stderr.
    """
    return run(subject, canaries=_CANARIES[subject.scenario.privacy.unit], seed=seed, quiet=quiet)


def run(subject: Subject, *, canaries: int, seed: int, quiet: bool) -> LevelResult:
    """As ``audit``, with a number of canaries."""
    started = time.perf_counter()
    folder, old = subject.folder / "sentences", subject.scenario
    base = make_speaker(folder / "speaker", seed=seed)
    private = audit_scenario(old, name="sentences")
    bare = audit_scenario(unprotected(old), name="sentences-control")
    drawn = make_canaries(base, private, count=canaries, seed=seed)
    clients = canaries if old.privacy.unit == "user" else 1
    bench, control_bench = (
        open_bench(base, each, folder=folder / "campaigns", clients=clients, seed=seed) for each in (private, bare)
    )
    found: dict[str, dict[str, Any]] = {}
    plays = ("control", "private", *_MUTANTS)
    for i, name in enumerate(track(plays, description="sentences", unit="play", quiet=quiet)):
        with mutant(name) if name in _MUTANTS else nullcontext():
            found[name] = attack(control_bench if name == "control" else bench, drawn, seed=1000 * seed + i)
    claimed = old.privacy.epsilon
    real = found["private"]
    most = most_auc(bench.campaign.policy)
    caught = {
        name: exceeds(found[name], epsilon=claimed, most=most) or found[name]["auc"][1] > real["auc"][2]
        for name in _MUTANTS
    }
    detected = found["control"]["auc"][0] >= _CONTROL_AUC
    facts = found | _about(bench.campaign.policy, canaries=canaries, guesses=real["guesses"])
    return conclude(
        title="sentences of a small language model, told from the parameters it released",
        held=not exceeds(real, epsilon=claimed, most=most),
        epsilon_lower=real["epsilon_lower"],
        epsilon_audited=claimed,
        power=caught["quarter-noise"],
        control_detected=detected,
        caught=caught,
        required=_REQUIRED,
        started=started,
        facts=facts,
        words=_words(subject, facts, caught),
    )


def _about(policy: Policy, *, canaries: int, guesses: int) -> dict[str, Any]:
    epsilon, delta = policy.epsilon or math.nan, policy.delta or math.nan
    return {
        "canaries": canaries,
        "rounds": policy.rounds,
        "steps": policy.steps,
        "method": policy.federation_method,
        "parameters": policy.size,
        "noise_multiplier": policy.noise_multiplier,
        "fewest_correct": fewest_correct(canaries=canaries, guesses=guesses, epsilon=epsilon, delta=delta),
        "most_auc": most_auc(policy),
    }


def _words(subject: Subject, facts: dict[str, Any], caught: dict[str, bool]) -> tuple[str, ...]:
    """What was found, for a reader."""
    real, unit, claimed = facts["private"], subject.scenario.privacy.unit, subject.scenario.privacy.epsilon
    holder = "one device" if unit == "record" else "a user of its own"
    words = [
        f"{facts['canaries']} random sentences, each with {holder} by a coin, trained into a random language model of "
        f"{_BLOCKS} blocks ({facts['method']}, rounds: {facts['rounds']}, steps a round: {facts['steps']}). Without "
        f"privacy: {_told(facts['control'])}.",
        f"At the claimed epsilon {claimed:g}: {_told(real)}. {real['correct']} of {real['guesses']} guesses right: "
        f"epsilon is at least {real['epsilon_lower']:.2f} (95 % confidence).",
    ]
    if facts["most_auc"] is not None:
        words.append(f"Noise of the stated size allows an AUC of {facts['most_auc']:.2f} at the most, to any attack.")
    if facts["fewest_correct"] is None:
        words.append(
            f"No power at epsilon {claimed:g} for the bound on epsilon: with all {real['guesses']} guesses right it "
            "would not exceed the claim. Faults were told by AUC."
        )
    listed = "; ".join(
        f"{MUTANTS[name].what}: {facts[name]['auc'][0]:.2f}, {'found' if yes else 'not found, no power for it here'}"
        for name, yes in caught.items()
    )
    return (*words, f"AUC with faults put in on purpose: {listed}.")


def _told(found: dict[str, Any]) -> str:
    (area, low, high), (rate, least, most) = found["auc"], found["tpr"]
    return f"AUC {area:.2f} ({low:.2f} to {high:.2f}), {rate:.0%} ({least:.0%} to {most:.0%}) found at 1 % false alarms"
