"""Personal ONNX heads at the end of a simulation: the same export a device runs, for a few of its users."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import platformdirs

from client.export import export_base, export_head
from shared.adapter import load_shared
from shared.datasets import Dataset
from shared.model import Base
from shared.progress import progress
from simulations.campaigns import Result

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
    scenario, observer = result.plan.scenario, result.observer
    probes = dataset.public_texts[:_PROBES]
    head = observer.head
    with progress(total=len(users) + 1, description="personal heads", unit="file", quiet=quiet) as bar:
        manifest = export_base(
            base,
            folder / "base",
            blocks=range(head.first_block, base.num_blocks),
            targets=scenario.adapter.targets,
            max_tokens=scenario.model.max_tokens,
            task=scenario.task,
            probe_texts=probes,
            cache=platformdirs.user_cache_path("sottovoce") / "onnx",
        )
        bar.update(1)
        load_shared(head, result.arrays)
        shared_weight, shared_bias = head.output_layer()
        heads = []
        for user in users:
            private = observer.private_output(result.arrays, user)
            name = dataset.users[user].user
            target = folder / f"user-{name}"
            written = export_head(
                target,
                base_folder=folder / "base",
                head=head,
                output_weight=(shared_weight + private.weight).astype("float32"),
                output_bias=shared_bias + private.bias,
                user=name,
                privacy={"claim": result.plan.claim.sentence(), "policy_sha256": result.plan.policy.sha256},
                probe_texts=probes,
                created=datetime.now(UTC),
            )
            heads.append(
                {
                    "user": name,
                    "path": f"heads/{target.name}",
                    "bytes": sum(file.stat().st_size for file in target.iterdir()),
                    "parity_max_abs": written["parity"]["max_abs"],
                }
            )
            bar.update(1)
    size = sum(file.stat().st_size for file in (folder / "base").iterdir())
    return {
        "heads": heads,
        "heads_base": {"path": "heads/base", "bytes": size, "parity_max_abs": manifest["parity"]["max_abs"]},
    }
