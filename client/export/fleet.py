"""The base of a whole fleet: exported for what a campaign trains, compared with torch, signed by the operator."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.export.encoder import export_base
from client.export.graph_kernel import kernel_term
from client.export.language_model import export_lm_base
from client.export.private_head import PROBES, head_logits
from client.export.soft_prompt import check_soft_export
from client.runtime.artifact import sign_folder
from client.training.site import resident_base
from shared.config import Scenario
from shared.heads.adapter import load_start
from shared.heads.head import Head
from shared.models.model import Base
from shared.protocol.campaign import Campaign


def export_campaign_base(
    campaign: Campaign,
    folder: Path,
    *,
    key: Ed25519PrivateKey,
    precision: str = "fp32",
    probe_texts: Sequence[str] = PROBES,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Write and sign the base that all devices of a campaign answer with.

    Args:
        campaign: Names base, blocks and targets.
        folder: Replaced as a whole at the end, or left as it was.
        key: The operator's, which signed the campaign; devices trust no other.
        precision: ``fp32`` or ``int8``.
        probe_texts: Real and public; torch and the graph are compared on them.
        cache: Folder of finished graphs.

    Returns:
        The manifest as written.

    Raises:
        HeadError: The graph does not answer as torch does; see ``export_base`` and ``export_lm_base``.
        CampaignError: The base found here is not the campaign's.
    """
    scenario = campaign.scenario
    base = resident_base(scenario.model.base, scenario.performance.device)
    head = campaign.new_head(base)
    load_start(head.to(base.device), campaign.start)
    manifest = export_fleet(base, head, scenario, folder, probe_texts=probe_texts, precision=precision, cache=cache)
    sign_folder(folder, key)
    return manifest


def export_fleet(
    base: Base,
    head: Head,
    scenario: Scenario,
    folder: Path,
    *,
    probe_texts: Sequence[str],
    precision: str = "fp32",
    cache: Path | None = None,
) -> dict[str, Any]:
    """Write the base for the heads of a scenario, unsigned; arguments as for ``export_campaign_base``.

    Args:
        head: At the campaign's public start or after it: what a kernel of it is made of is part of the base.
    """
    check_soft_export(scenario)
    settings: dict[str, Any] = {
        "blocks": range(head.first_block, base.num_blocks),
        "targets": () if scenario.adapter.technique == "prompt-tuning" else scenario.adapter.targets,
        "precision": precision,
        "cache": cache,
    }
    return EXPORTS[scenario.task.name](base, head, scenario, folder, list(probe_texts), settings)


def _export_encoder(
    base: Base, head: Head, scenario: Scenario, folder: Path, probes: list[str], settings: dict[str, Any]
) -> dict[str, Any]:
    return export_base(
        base,
        folder,
        max_tokens=scenario.model.max_tokens,
        task=scenario.task,
        probe_texts=probes,
        kernel=kernel_term(head),
        **settings,
    )


def _export_generation(
    base: Base, head: Head, scenario: Scenario, folder: Path, probes: list[str], settings: dict[str, Any]
) -> dict[str, Any]:
    del head
    return export_lm_base(
        base.folder,
        folder,
        base_sha256=base.sha256,
        template=scenario.task.template,
        max_tokens=base.positions,
        probe_texts=[scenario.task.template.replace("{text}", text) for text in probes],
        logits=lambda token_ids: head_logits(None, base, token_ids),
        **settings,
    )


EXPORTS: dict[str, Callable[..., dict[str, Any]]] = {
    "rating": _export_encoder,
    "tagging": _export_encoder,
    "ranking": _export_encoder,
    "generation": _export_generation,
    "preference": _export_generation,
}
