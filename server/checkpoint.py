"""One atomic folder a round: the shared arrays, the optimiser's state, who took part, and their hash.

A checkpoint is written beside its place, flushed to disk and renamed, so that a kill leaves the round whole or absent.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from server.aggregate import OptimizerState
from shared.adapter import Arrays
from shared.errors import CampaignError
from shared.files import flush_folder, write_durably


@dataclass(frozen=True)
class Counts:
    """Replies accepted, replies rejected by code, and bytes of all messages, of one round or of several."""

    replies: int = 0
    rejected: Mapping[str, int] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.replies + other.replies,
            dict(Counter(self.rejected) + Counter(other.rejected)),
            self.bytes_up + other.bytes_up,
            self.bytes_down + other.bytes_down,
        )


@dataclass(frozen=True)
class Checkpoint:
    """The server's whole state after a round.

    Attributes:
        participations: Rounds each device was asked in, by its seat in the roster.
        answered: Rounds in which a reply of it was used; a device asks this to know whether its ledger was rolled back.
        latest: What the last round took.
        total: What all rounds so far took.
    """

    round_number: int
    policy_sha256: str
    arrays: Arrays
    optimizer: OptimizerState
    participations: dict[int, int]
    answered: dict[int, int] = field(default_factory=dict)
    latest: Counts = Counts()
    total: Counts = Counts()


def checkpoint_path(folder: Path, round_number: int) -> Path:
    """Where the checkpoint of a round lies."""
    return folder / f"round-{round_number:04d}"


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint as ``folder/round-0007``, atomically and durably."""
    parts = {
        "arrays": checkpoint.arrays,
        "first": checkpoint.optimizer.first,
        "second": checkpoint.optimizer.second,
    }
    payload = save({f"{part}/{name}": array for part, named in parts.items() for name, array in named.items()})
    state: dict[str, Any] = {
        "round": checkpoint.round_number,
        "optimizer_step": checkpoint.optimizer.step,
        "policy_sha256": checkpoint.policy_sha256,
        "participations": {str(seat): count for seat, count in checkpoint.participations.items()},
        "answered": {str(seat): count for seat, count in checkpoint.answered.items()},
        "latest": asdict(checkpoint.latest),
        "total": asdict(checkpoint.total),
        "tensors_sha256": hashlib.sha256(payload).hexdigest(),
    }
    state["state_sha256"] = _hash_state(state)
    target = checkpoint_path(folder, checkpoint.round_number)
    temporary = folder / f".{target.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_durably(temporary / "tensors.safetensors", payload)
    write_durably(temporary / "state.json", json.dumps(state, indent=2).encode())
    temporary.rename(target)
    flush_folder(folder)
    return target


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint folder.

    Raises:
        CampaignError: A file is missing, unreadable or not the one that was written.
    """
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if state.pop("state_sha256") != _hash_state(state):
            raise CampaignError(f"{path} must hold the state that was saved; it was altered.")
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
            participations={int(seat): int(count) for seat, count in state["participations"].items()},
            answered={int(seat): int(count) for seat, count in state["answered"].items()},
            latest=Counts(**state["latest"]),
            total=Counts(**state["total"]),
            arrays=parts["arrays"],
            optimizer=OptimizerState(int(state["optimizer_step"]), parts["first"], parts["second"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CampaignError(f"{path} must be a readable checkpoint: {error}.") from None


def last_checkpoint(folder: Path, *, policy_sha256: str) -> Checkpoint | None:
    """The newest checkpoint that is what was saved; newer ones that are not are put aside as ``damaged-…``.

    Args:
        folder: Holds one folder a round; need not exist.
        policy_sha256: Hash of the campaign's policy.

    Returns:
        None where there is no good checkpoint.

    Raises:
        CampaignError: A checkpoint belongs to another policy.
    """
    for unfinished in folder.glob(".round-*"):
        shutil.rmtree(unfinished)
    for path in sorted(folder.glob("round-*"), reverse=True):
        try:
            checkpoint = load_checkpoint(path)
        except CampaignError:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            continue
        if checkpoint.policy_sha256 != policy_sha256 or path != checkpoint_path(folder, checkpoint.round_number):
            raise CampaignError(
                f"{path} must belong to the policy {policy_sha256[:12]}…, it is round {checkpoint.round_number} of "
                f"{checkpoint.policy_sha256[:12]}…: a checkpoint of another scenario. Start a new run."
            )
        return checkpoint
    return None


def _hash_state(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
