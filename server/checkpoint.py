"""One atomic folder a round: the shared arrays, the optimiser's state, who took part, and their hash.

A checkpoint is written beside its place, flushed to disk and renamed, so that a kill leaves the round whole or absent.

    round-0005      after round 5
    round-0005.1    rolled back since: round and counts are those of round 5, arrays and optimiser of an earlier one

``state.json`` names its format; the hash over it is made alike in all formats, so that a newer one is told from damage.

    none    before formats were named: one count of optimiser steps for all slots, or no ``rolled_back_to``
    1       as it is written now
"""

import hashlib
import json
import os
import re
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
from shared.errors import CampaignError
from shared.files import flush_folder, write_durably
from shared.heads.adapter import Arrays

_FORMAT = 1
_NOT_READABLE = (ValueError, KeyError, TypeError, AttributeError, SafetensorError)


class NewerCheckpointError(CampaignError):
    """A checkpoint is of a newer format than this version reads; it is whole, and left as it is."""


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
        rolled_back_to: The round whose arrays and optimiser these are, where an operator went back; None: this one's.
    """

    round_number: int
    policy_sha256: str
    arrays: Arrays
    optimizer: OptimizerState
    participations: dict[int, int]
    answered: dict[int, int] = field(default_factory=dict)
    latest: Counts = Counts()
    total: Counts = Counts()
    rolled_back_to: int | None = None

    @property
    def arrays_of(self) -> int:
        """The round whose arrays these are; 0 is the public start."""
        return self.round_number if self.rolled_back_to is None else self.rolled_back_to


def checkpoint_path(folder: Path, round_number: int) -> Path:
    """Where the checkpoint of a round lies."""
    return folder / f"round-{round_number:04d}"


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints in a folder, good or not; a roll-back after a round is newer than the round."""
    return sorted(filter(_number, folder.glob("round-*")), key=_number, reverse=True)


def newest_checkpoint(folder: Path, *, before: int | None = None) -> Checkpoint | None:
    """The newest checkpoint that is what was saved. Nothing is touched: a server may be writing there.

    Args:
        folder: Holds one folder a round; need not exist.
        before: Only of rounds below this one.

    Raises:
        NewerCheckpointError: A newer version has served the campaign since.
    """
    for path in newest_first(folder):
        if before is None or _number(path)[0] < before:
            try:
                return load_checkpoint(path)
            except NewerCheckpointError:
                raise
            except CampaignError:
                continue
    return None


def put_aside(folder: Path) -> list[str]:
    """Names of the checkpoints that were found damaged, and were newer than those gone on from."""
    return sorted(path.name.removeprefix(_ASIDE) for path in folder.glob(f"{_ASIDE}*"))


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint as ``folder/round-0007``, after a roll-back ``round-0007.1``, atomically and durably.

    Raises:
        OSError: The disk is full or not writable; what was there is as it was, and nothing is left of this one.
    """
    parts = {
        "arrays": checkpoint.arrays,
        "first": checkpoint.optimizer.first,
        "second": checkpoint.optimizer.second,
    }
    payload = save({f"{part}/{name}": array for part, named in parts.items() for name, array in named.items()})
    state: dict[str, Any] = {
        "format": _FORMAT,
        "round": checkpoint.round_number,
        "optimizer_steps": dict(checkpoint.optimizer.steps),
        "policy_sha256": checkpoint.policy_sha256,
        "participations": {str(seat): count for seat, count in checkpoint.participations.items()},
        "answered": {str(seat): count for seat, count in checkpoint.answered.items()},
        "latest": asdict(checkpoint.latest),
        "total": asdict(checkpoint.total),
        "rolled_back_to": checkpoint.rolled_back_to,
        "tensors_sha256": hashlib.sha256(payload).hexdigest(),
    }
    state["state_sha256"] = _hash_state(state)
    target = checkpoint_path(folder, checkpoint.round_number)
    if checkpoint.rolled_back_to is not None:
        earlier = [back for done, back in map(_number, newest_first(folder)) if done == checkpoint.round_number]
        target = target.with_name(f"{target.name}.{max(earlier, default=0) + 1}")
    temporary = folder / f".{target.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write_durably(temporary / "tensors.safetensors", payload)
        write_durably(temporary / "state.json", json.dumps(state, indent=2).encode())
        flush_folder(temporary)
        temporary.rename(target)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    flush_folder(folder)
    return target


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint folder.

    Raises:
        NewerCheckpointError: A newer version wrote it.
        CampaignError: A file is missing, unreadable or not the one that was written.
    """
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if state.pop("state_sha256") != _hash_state(state):
            raise CampaignError(f"{path} must hold the state that was saved; it was altered.")
        if type(state.get("format", 0)) is not int or state.get("format", 0) > _FORMAT:
            raise NewerCheckpointError(
                f"{path} must be of format {_FORMAT} or older, it is of {state['format']!r}: a newer Sottovoce wrote "
                "it. Install that version."
            )
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
            rolled_back_to=state.get("rolled_back_to"),  # checkpoints of earlier versions have none
            arrays=parts["arrays"],
            optimizer=OptimizerState(_steps(state, parts["first"]), parts["first"], parts["second"]),
        )
    except (OSError, ArithmeticError, RecursionError, *_NOT_READABLE) as error:
        raise CampaignError(f"{path} must be a readable checkpoint: {error}.") from None


def _steps(state: Mapping[str, Any], moments: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Optimiser steps by slot; at first there was one count, and every slot took part in every step."""
    if "optimizer_step" in state and "format" not in state:
        return dict.fromkeys(moments, int(state["optimizer_step"]))
    return {str(name): int(count) for name, count in state["optimizer_steps"].items()}


def last_checkpoint(folder: Path, *, policy_sha256: str) -> Checkpoint | None:
    """The newest checkpoint that is what was saved; newer ones that are not are put aside as ``damaged-…``.

    Args:
        folder: Holds one folder a round; need not exist.
        policy_sha256: Hash of the campaign's policy.

    Returns:
        None where there is no good checkpoint.

    Raises:
        CampaignError: A checkpoint belongs to another policy, or a newer version wrote it; nothing is put aside then.
    """
    for unfinished in folder.glob(".round-*"):
        shutil.rmtree(unfinished)
    for path in newest_first(folder):
        try:
            checkpoint = load_checkpoint(path)
        except NewerCheckpointError:
            raise
        except CampaignError:
            aside = path.with_name(f"{_ASIDE}{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            continue
        if checkpoint.policy_sha256 != policy_sha256 or _number(path)[0] != checkpoint.round_number:
            raise CampaignError(
                f"{path} must belong to the policy {policy_sha256[:12]}…, it is round {checkpoint.round_number} of "
                f"{checkpoint.policy_sha256[:12]}…: a checkpoint of another scenario. Start a new run."
            )
        return checkpoint
    return None


_ASIDE = "damaged-"
_NAME = re.compile(r"round-(\d{4,})(?:\.(\d+))?")


def _number(path: Path) -> tuple[int, ...]:
    """Round and number of the roll-back of a checkpoint's folder; empty where it is none."""
    match = _NAME.fullmatch(path.name)
    return (int(match[1]), int(match[2] or 0)) if match else ()


def _hash_state(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
