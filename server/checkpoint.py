"""One atomic folder a round: the shared arrays, the optimiser's state, who took part, and their hash.

A checkpoint is written beside its place, flushed to disk and renamed, so that a kill leaves the round whole or absent.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save

from server.aggregate import OptimizerState
from shared.adapter import Arrays
from shared.errors import CampaignError


@dataclass(frozen=True)
class Checkpoint:
    """The server's whole state after a round.

    Attributes:
        participations: Rounds each node was asked in, by node id.
    """

    round_number: int
    policy_sha256: str
    arrays: Arrays
    optimizer: OptimizerState
    participations: dict[int, int]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint as ``folder/round-0007``, atomically and durably."""
    parts = {
        "arrays": checkpoint.arrays,
        "first": checkpoint.optimizer.first,
        "second": checkpoint.optimizer.second,
    }
    payload = save({f"{part}/{name}": array for part, named in parts.items() for name, array in named.items()})
    state = {
        "round": checkpoint.round_number,
        "optimizer_step": checkpoint.optimizer.step,
        "policy_sha256": checkpoint.policy_sha256,
        "participations": {str(node): count for node, count in checkpoint.participations.items()},
        "tensors_sha256": hashlib.sha256(payload).hexdigest(),
    }
    target = folder / f"round-{checkpoint.round_number:04d}"
    temporary = folder / f".{target.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    _write(temporary / "tensors.safetensors", payload)
    _write(temporary / "state.json", json.dumps(state, indent=2).encode())
    temporary.rename(target)
    _flush(folder)
    return target


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint folder.

    Raises:
        CampaignError: A file is missing, unreadable or not the one that was written.
    """
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        payload = (path / "tensors.safetensors").read_bytes()
        if hashlib.sha256(payload).hexdigest() != state["tensors_sha256"]:
            raise CampaignError(f"{path} must hold the tensors that were saved; they were altered or cut short.")
        tensors = load(payload)
        parts: dict[str, dict[str, np.ndarray]] = {"arrays": {}, "first": {}, "second": {}}
        for name in sorted(tensors):
            part, _, slot = name.partition("/")
            parts[part][slot] = tensors[name]
        return Checkpoint(
            round_number=int(state["round"]),
            policy_sha256=str(state["policy_sha256"]),
            participations={int(node): int(count) for node, count in state["participations"].items()},
            arrays=parts["arrays"],
            optimizer=OptimizerState(int(state["optimizer_step"]), parts["first"], parts["second"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CampaignError(f"{path} must be a readable checkpoint: {error}.") from None


def _write(path: Path, payload: bytes) -> None:
    with path.open("wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
