"""Personal ONNX heads at the end of a simulation: the same export a device runs, for a few of its users.

They carry no signature: they belong to no home, and are opened by ``--head``, which checks every hash.
"""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import platformdirs

from client.export.encoder import export_head
from client.export.fleet import export_fleet
from client.export.private_head import encoder_parts, language_parts
from shared.config import Scenario
from shared.datasets import Dataset
from shared.heads.adapter import load_shared
from shared.heads.head import Head
from shared.models.model import Base
from shared.progress import progress
from simulations.campaigns import Result
from simulations.observe.language import LanguageObserver
from simulations.observe.observe import RatingObserver
from simulations.observe.tagging import TaggingObserver

_PROBES = 32


def export_heads(
    result: Result, users: Sequence[int], base: Base, dataset: Dataset, *, folder: Path, quiet: bool
) -> dict[str, Any]:
    """Write one base for the fleet and a head per user, each behind its parity gate.

    Args:
        result: The finished campaign; its shared arrays go into every head.
        users: Indices of the users.
        folder: Gets ``base`` and one folder ``user-ID`` each.

    Returns:
        ``heads`` and ``heads_base`` of the summary.

    Raises:
        HeadError: A graph does not answer as torch does.
    """
    if not users:
        return {"heads": []}
    return EXPORTS[result.plan.scenario.task.name](result, users, base, dataset, folder=folder, quiet=quiet)


def probe_texts(dataset: Dataset) -> list[str]:
    """Texts that torch and the exported graph are compared on: public ones first, then users'; none is written."""
    texts = dict.fromkeys(dataset.public_texts)
    records = (record for user in dataset.users for record in user.train)
    texts.update(dict.fromkeys(r.response if r.rejected else r.text for r in records))  # pairs may share one question
    return list(texts)[:_PROBES]


def _export_encoder(
    result: Result, users: Sequence[int], base: Base, dataset: Dataset, *, folder: Path, quiet: bool
) -> dict[str, Any]:
    """Heads of an encoder: LoRA and a private output layer."""
    scenario, observer = result.plan.scenario, cast(RatingObserver | TaggingObserver, result.observer)
    probes = probe_texts(dataset)
    head = observer.head
    with progress(total=len(users) + 1, description="personal heads", unit="file", quiet=quiet) as bar:
        manifest = export_base(head, scenario, base, folder, probes)
        bar.update(1)
        heads = []
        for user in users:
            private = observer.private_output(result.last.arrays, user)
            name = dataset.users[user].user
            target = folder / f"user-{name}"
            written = export_head(
                target,
                base_folder=folder / "base",
                **encoder_parts(head, private),
                user=name,
                privacy={"claim": result.plan.claim.sentence(), "policy_sha256": result.plan.policy.sha256},
                probe_texts=probes,
                created=datetime.now(UTC),
            )
            heads.append(_entry(target, name, written))
            bar.update(1)
    return {"heads": heads, "heads_base": _base_entry(folder / "base", manifest)}


def _export_language(
    result: Result, users: Sequence[int], base: Base, dataset: Dataset, *, folder: Path, quiet: bool
) -> dict[str, Any]:
    """Heads of task ``generation``: the whole LoRA of each user, private where the personal method adapts it."""
    from client.export.language_model import export_lm_head

    scenario, observer = result.plan.scenario, cast(LanguageObserver, result.observer)
    head = observer.head
    texts = probe_texts(dataset)
    probes = [scenario.task.template.replace("{text}", text) for text in texts]
    heads = []
    with progress(total=len(users) + 1, description="personal heads", unit="file", quiet=quiet) as bar:
        manifest = export_base(head, scenario, base, folder, texts)
        bar.update(1)
        for user in users:
            load_shared(head, observer.private_arrays(result.last.arrays, user))
            name = dataset.users[user].user
            target = folder / f"user-{name}"
            written = export_lm_head(
                target,
                base_folder=folder / "base",
                **language_parts(head, base, scenario),
                user=name,
                privacy={"claim": result.plan.claim.sentence(), "policy_sha256": result.plan.policy.sha256},
                probe_texts=probes,
                created=datetime.now(UTC),
            )
            heads.append(_entry(target, name, written))
            bar.update(1)
    return {"heads": heads, "heads_base": _base_entry(folder / "base", manifest)}


def export_base(head: Head, scenario: Scenario, base: Base, folder: Path, probes: Sequence[str]) -> dict[str, Any]:
    """Write the fleet's base in fp32: a published result should be that of the model and not of its rounding."""
    cache = platformdirs.user_cache_path("sottovoce") / "onnx"
    return export_fleet(base, head, scenario, folder / "base", probe_texts=probes, cache=cache)


def _entry(folder: Path, user: str, manifest: dict[str, Any]) -> dict[str, Any]:
    return {
        "user": user,
        "path": f"heads/{folder.name}",
        "bytes": sum(file.stat().st_size for file in folder.iterdir()),
        "parity_max_abs": manifest["parity"]["max_abs"],
    }


def _base_entry(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    size = sum(file.stat().st_size for file in folder.iterdir())
    return {"path": "heads/base", "bytes": size, "parity_max_abs": manifest["parity"]["max_abs"]}


EXPORTS: dict[str, Callable[..., dict[str, Any]]] = {
    "rating": _export_encoder,
    "tagging": _export_encoder,
    "ranking": _export_encoder,
    "generation": _export_language,
    "preference": _export_language,
}
