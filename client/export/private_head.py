"""The owner's private head: fitted on the device, compared with the device's own runtime, and kept encrypted.

It never leaves the device, so it needs no noise. Text, features and tensors are in memory and in the vault, nowhere
else: the head is opened from the very bytes that are sealed.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError

from client.export.soft_prompt import soft_prefix
from client.home.attributes import read_profile
from client.home.home import Home
from client.home.sources import records_of
from client.ledger.ledger import Standing
from client.owner.owner import checked_ledger, find_consent
from client.owner.verify import keep_head, next_sequence, open_home_base
from client.personal.personalize import PrivateOutput, fit_labels, fit_lora, fit_private
from client.personal.profile import profile_of
from client.personal.tagging import PrivateTags
from client.runtime.artifact import MANIFEST
from client.training.device import newest_shared
from client.training.inputs import read_inputs
from client.training.site import Workbench, resident_base, trained_records, use_threads
from shared.config import Scenario
from shared.errors import CampaignError, HeadError, LedgerError, StoreError
from shared.heads.adapter import Arrays, load_shared, load_start, read_start
from shared.heads.causal import CausalHead
from shared.heads.output import OutputLayer
from shared.heads.ranking import RankingHead
from shared.heads.rating import RatingHead
from shared.heads.scoring import text_predictions
from shared.heads.tagging import TaggingHead
from shared.heads.tasks import Targets
from shared.models.features import Features
from shared.models.model import Base
from shared.privacy.accounting import epsilon
from shared.privacy.claims import claim_of
from shared.privacy.compatible import check_extensions
from shared.privacy.policy import Policy
from shared.protocol.campaign import Campaign, read_campaign

OWNER = "owner"  # the name in the manifest; whoever opens the vault knows whose it is
# Texts that torch and the graph are compared on, whatever the owner wrote; public.
PROBES = (
    "The film begins in a small town.",
    "A letter arrives a year too late.",
    "I liked the music more than the story.",
    "Two sisters open a bakery by the sea.",
    "The train leaves at seven in the morning.",
    "Crime, Drama, Thriller",
    "Comedy, Romance",
    "What would you like to drink?",
    "It rained for three days and nobody complained.",
    "The committee will publish its report in May.",
    "She taught herself to repair clocks.",
    "An old map, a new boat and too little bread.",
    "Fellow citizens, the year has been a good one.",
    "He never understood why the garden had no gate.",
    "Science fiction of the seventies, slow and blue.",
    "Thank you, I will think about it and call you tomorrow.",
)
_OWN_PROBES = 16  # of the owner's texts; compared and not written
VALID_DAYS = 365  # until a head expires
_KEPT = 10  # newest versions of the head an owner can go back to
_MAX_VALID_DAYS = 3650


@dataclass(frozen=True)
class Personalized:
    """A private head that was fitted.

    Attributes:
        version: Its number on the shelf.
        records: How many it was fitted to.
        shared: What shared arrays it stands on, in words.
        parity: Difference between torch and the device's runtime.
        measure: Of that difference: ``max_abs``, the largest, or ``rel_rms``, a share, on a base in 8 bits.
    """

    version: int
    records: int
    shared: str
    parity: float
    measure: str


def personalize(
    home: Home,
    *,
    base_folder: Path,
    prefix: str | None = None,
    generator: np.random.Generator | None = None,
    valid_days: int = VALID_DAYS,
) -> Personalized:
    """Fit the private part to all records of a home and make it the current private head; ten versions are kept.

    Args:
        home: Its owner consented to the campaign; it holds at least one record.
        base_folder: The fleet's ONNX base, exported for this campaign's base, blocks and targets and signed by the
            operator whom the owner trusted at the consent.
        prefix: First digits of the campaign's policy; by default the only one consented to.
        generator: Of the order of records in fine-tuning; fresh randomness by default.
        valid_days: The head expires after so many.

    Raises:
        SottovoceError: There is no such campaign, no record, the newest shared arrays are damaged, the base is not the
            operator's, or the head does not compute what torch does. The shelf is as it was.

    Guarantee:
        No file but sealed ones is written.
    """
    if not 1 <= valid_days <= _MAX_VALID_DAYS:
        raise HeadError(f"--valid-days must be between 1 and {_MAX_VALID_DAYS}, got {valid_days}.")
    standing = _choose(home, prefix)
    campaign = _kept_campaign(home, standing.consent.policy)
    task, operators = campaign.scenario.task.name, (standing.consent.operator,)
    kind: Any = "lm-base" if task in ("generation", "preference") else "base"
    fleet = open_home_base(home, base_folder, kind=kind, operators=operators)
    start = {slot.name: campaign.start[slot.name] for slot in campaign.policy.array_slots()}
    arrays, round_number = newest_shared(home, campaign.policy) or (start, 0)
    bench = _bench(campaign)
    records = records_of(home, task=task)
    if not records:
        raise StoreError("a private head is fitted to records, this home has none; run: sottovoce client add.")
    profile = read_profile(home)
    features, targets = read_inputs(home, bench, trained_records(campaign.scenario, records, profile))
    settings: dict[str, Any] = {
        "base_folder": fleet,
        "user": OWNER,
        "privacy": _spent(campaign.policy, standing),
        "created": home.clock(),
        "expires": home.clock() + timedelta(days=valid_days),
        "sequence": next_sequence(home),
    }
    texts = list(dict.fromkeys((*PROBES, *(record.text for record in records[:_OWN_PROBES] if record.text))))
    build = _BUILDERS[task]
    generator = generator or np.random.default_rng()
    said = [record.text for record in records] if len(targets) == len(records) else []
    files = build(bench, arrays, features, targets, texts, generator, settings, profile=profile, own=said)
    about = {
        "created": home.clock().isoformat(timespec="seconds"),
        "campaign": campaign.policy.campaign,
        "round": str(round_number),
    }
    version = keep_head(home, files, about)
    home.heads().prune(_KEPT)
    shared = f"the shared part of round {round_number}" if round_number else "the campaign's public start"
    parity = json.loads(files[MANIFEST])["parity"]
    return Personalized(version, len(targets), shared, parity[parity["measure"]], parity["measure"])


def _spent(policy: Policy, standing: Standing) -> dict[str, Any]:
    """What the shared part of a head may say about this device's records, for the whole campaign and until now."""
    delta = policy.delta or 0.0  # a device takes part in private campaigns only, whose policies state it
    until_now = replace(policy.mechanism, max_participations=standing.spent) if standing.spent else None
    return {
        "claim": claim_of(policy, noise="secure").sentence(),
        "policy_sha256": policy.sha256,
        "unit": policy.unit,
        "epsilon": epsilon(until_now, delta=delta) if until_now else 0.0,
        "delta": delta,
        "rounds_joined": standing.spent,
        "epsilon_reserved": standing.consent.epsilon,
        "rounds_allowed": standing.consent.max_participations,
    }


def _choose(home: Home, prefix: str | None) -> Standing:
    """The campaign to personalize."""
    with checked_ledger(home) as ledger:
        standings = ledger.consents()
    if prefix is not None:
        return find_consent(standings, prefix)
    if len(standings) != 1:
        known = ", ".join(standing.consent.policy[:12] for standing in standings) or "none"
        raise LedgerError(f"--campaign must name one of the campaigns you consented to ({known}), got none.")
    return standings[0]


def _kept_campaign(home: Home, policy_sha256: str) -> Campaign:
    """What the owner agreed to, as it is kept; nothing is sent, so its price is not certified again."""
    try:
        campaign = read_campaign(home.campaign_folder(policy_sha256))
    except (SafetensorError, UnicodeDecodeError):
        raise CampaignError(f"{home.campaign_folder(policy_sha256)} is damaged; restore it from a backup.") from None
    if campaign.policy.sha256 != policy_sha256:
        raise CampaignError(f"{campaign.folder} must hold the policy you agreed to; it was altered.")
    check_extensions(campaign.policy, campaign.scenario)
    return campaign


def _bench(campaign: Campaign) -> Workbench:
    """Base and head without the machinery of private training: nothing of this fit is released."""
    use_threads(campaign.scenario.performance.threads)
    base = resident_base(campaign.scenario.model.base, campaign.scenario.performance.device)
    head = campaign.new_head(base)
    load_start(head.to(base.device), campaign.start)
    return Workbench(campaign, base, head, head)


def _encoder_files(
    bench: Workbench,
    arrays: Arrays,
    features: Features,
    targets: Targets,
    texts: Sequence[str],
    generator: np.random.Generator,
    settings: dict[str, Any],
    *,
    profile: Mapping[str, str],
    own: Sequence[str],
) -> dict[str, bytes]:
    from client.export.encoder import build_head

    head, scenario = cast(RatingHead | TaggingHead, bench.head), bench.campaign.scenario
    personal = scenario.personal
    if type(head) is RatingHead:
        more: dict[str, Any] = {"persona": scenario.persona, "profile": profile, "texts": own}
        output = fit_private(head, arrays, features, targets, personal=personal, generator=generator, **more)
        return build_head(**encoder_parts(head, output), probe_texts=texts, **settings)
    pooled, shared = text_predictions(head, arrays, features)
    said = targets.batch(np.arange(len(targets)), 0).numpy().astype(np.float64)
    private: PrivateOutput | PrivateTags
    if isinstance(head, TaggingHead):
        private = fit_labels(head, pooled, shared, said, personal=personal)
    else:
        private = profile_of(cast(RankingHead, head), pooled, said, personal=personal)
    return build_head(**encoder_parts(head, private), probe_texts=texts, **settings)


def _language_files(
    bench: Workbench,
    arrays: Arrays,
    features: Features,
    targets: Targets,
    texts: Sequence[str],
    generator: np.random.Generator,
    settings: dict[str, Any],
    *,
    profile: Mapping[str, str],
    own: Sequence[str],
) -> dict[str, bytes]:
    from client.export.language_model import build_lm_head

    del profile, own  # there are no personas of language models, and their memory is in the prompt
    head, scenario = cast(CausalHead, bench.head), bench.campaign.scenario
    private = fit_lora(head, arrays, features, targets, personal=scenario.personal, generator=generator)
    load_shared(head, private)
    probes = [scenario.task.template.replace("{text}", text) for text in texts]
    return build_lm_head(**language_parts(head, bench.base, scenario), probe_texts=probes, **settings)


_BUILDERS: dict[str, Callable[..., dict[str, bytes]]] = {
    "rating": _encoder_files,
    "tagging": _encoder_files,
    "ranking": _encoder_files,
    "generation": _language_files,
    "preference": _language_files,
}


def encoder_parts(head: RatingHead | TaggingHead, private: PrivateOutput | PrivateTags) -> dict[str, Any]:
    """What ``build_head`` needs of a head that holds shared arrays, and of a user's private output."""
    shared = head.output_layer()
    weight = (shared.weight + private.weight).astype("float32")
    parts = {"head": head, "output": OutputLayer(weight, shared.bias + private.bias, shared.kernel)}
    return parts | ({"memory": private.memory} if isinstance(private, PrivateOutput) else {})


def language_parts(head: CausalHead, base: Base, scenario: Scenario) -> dict[str, Any]:
    """What ``build_lm_head`` needs of a head that holds a user's arrays."""
    return {
        "base_sha256": base.sha256,
        "lora": {name: array for name, array in read_start(head).items() if "lora_" in name},
        "scaling": scenario.adapter.scaling,
        "prefix": soft_prefix(head),
        "logits": lambda token_ids: head_logits(head, base, token_ids),
    }


@torch.inference_mode()
def head_logits(head: CausalHead | None, base: Base, token_ids: np.ndarray) -> np.ndarray:
    """Logits (1, T, V) of token ids (1, T) in torch, through the head or the bare base."""
    ids = torch.from_numpy(token_ids).to(base.device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    blocks = len(head.blocks) if head else base.num_blocks
    hidden = base.backbone(ids, mask, head_blocks=blocks)
    if head:
        states = head.states(hidden, mask)
    else:
        for block in base.family.blocks(base.model):
            hidden = base.family.run(base.model, block, hidden, mask)
        states = base.family.finish(base.model, hidden)
    weight = base.family.vocabulary(base.model)
    logits: np.ndarray = (states @ weight.T).cpu().numpy()  # type: ignore[union-attr]
    return logits
