"""Backbone outputs, computed once per distinct text and memory-mapped from disk ever after.

Key: (base hash, cut) names the folder, the hash of the token ids the entry. A shard is one ``.npy`` matrix and one
``.json`` index that is written last, so an interrupted run leaves a shard that does not exist. The frozen backbone
never changes, so an entry is good for every round, epoch, sweep and seed.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shared.errors import AssetError
from shared.models.model import Base
from shared.progress import progress

_BATCH_TOKENS = 4096  # per forward pass of the backbone; bounds memory, not the result
_MAX_PADDING = 1.15  # padded over real tokens of one micro-batch: less costs more passes than it saves


class Features:
    """Backbone outputs of a fixed list of texts.

    Args:
        arrays: One float32 array (T_i, d) per text, in the texts' order; memory-mapped where they come from disk.
    """

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self._arrays = list(arrays)
        self.lengths = np.array([len(array) for array in arrays], dtype=np.int64)
        self._even = bool(arrays) and bool((self.lengths == self.lengths[0]).all())
        self._stacked: np.ndarray | None = None  # all of them as one array, where none needs padding

    def __len__(self) -> int:
        return len(self._arrays)

    def select(self, rows: Sequence[int]) -> "Features":
        """The outputs of some of the texts, in the order given; nothing is copied."""
        return Features([self._arrays[row] for row in rows])

    def batch(self, rows: Sequence[int] | np.ndarray) -> tuple[Tensor, Tensor]:
        """Pad some texts to the longest of them: hidden (B, T, d) float32 and mask (B, T), True at real tokens."""
        rows = np.asarray(rows)
        lengths = self.lengths[rows]
        longest, width = int(lengths.max()), self._arrays[rows[0]].shape[1]
        mask = np.arange(longest)[None, :] < lengths[:, None]
        if self._even:
            if self._stacked is None:
                self._stacked = np.stack(self._arrays)
            return torch.from_numpy(self._stacked[rows]), torch.from_numpy(mask)
        hidden = np.zeros((len(rows), longest, width), dtype=np.float32)
        for i, row in enumerate(rows):
            hidden[i, : lengths[i]] = self._arrays[row]
        return torch.from_numpy(hidden), torch.from_numpy(mask)


def micro_batches(rows: np.ndarray, lengths: np.ndarray, max_tokens: int) -> Iterator[np.ndarray]:
    """Cut the drawn rows, sorted by length, into runs that waste little on padding; order does not change a sum."""
    rows = rows[np.argsort(lengths[rows], kind="stable")]
    start = tokens = 0
    for end, length in enumerate(lengths[rows].tolist()):
        padded = length * (end - start + 1)
        if end > start and (padded > max_tokens or padded > _MAX_PADDING * (tokens + length)):
            yield rows[start:end]
            start, tokens = end, 0
        tokens += length
    if len(rows):
        yield rows[start:]


def compute_features(
    base: Base,
    texts: Sequence[str],
    *,
    head_blocks: int,
    max_tokens: int,
) -> Features:
    """Run the backbone over texts without any cache; see ``compute_hidden``."""
    return compute_hidden(base, base.tokenize(texts, max_tokens=max_tokens), head_blocks=head_blocks)


def compute_hidden(
    base: Base,
    token_ids: Sequence[Sequence[int]],
    *,
    head_blocks: int,
    on_progress: Callable[[int], object] | None = None,
) -> Features:
    """Run the backbone over token ids without any cache, sorted by length so that padding stays small."""
    order = sorted(range(len(token_ids)), key=lambda i: len(token_ids[i]))
    arrays: dict[int, np.ndarray] = {}
    start = 0
    while start < len(order):
        longest = len(token_ids[order[min(start + 63, len(order) - 1)]])
        rows = order[start : start + max(1, min(64, _BATCH_TOKENS // longest))]
        start += len(rows)
        hidden = _run_backbone(base, [token_ids[row] for row in rows], head_blocks=head_blocks)
        for i, row in enumerate(rows):
            length = len(token_ids[row]) if head_blocks else 1
            arrays[row] = hidden[i, :length].copy()
        if on_progress:
            on_progress(len(rows))
    return Features([arrays[i] for i in range(len(token_ids))])


@torch.inference_mode()
def _run_backbone(base: Base, token_ids: Sequence[Sequence[int]], *, head_blocks: int) -> np.ndarray:
    longest = max(len(ids) for ids in token_ids)
    padded = torch.zeros(len(token_ids), longest, dtype=torch.int64)  # (B, T); which token pads is of no account
    mask = torch.zeros(len(token_ids), longest, dtype=torch.bool)
    for i, ids in enumerate(token_ids):
        padded[i, : len(ids)], mask[i, : len(ids)] = torch.tensor(ids), True
    hidden = base.backbone(padded.to(base.device), mask.to(base.device), head_blocks=head_blocks)
    out: np.ndarray = hidden.cpu().numpy()
    return out


def cached_features(
    base: Base, token_ids: Sequence[Sequence[int]], *, head_blocks: int, cache: Path, quiet: bool = False
) -> Features:
    """Backbone outputs of token ids, computing and storing only what the cache does not hold yet.

    Args:
        cache: Folder for all bases and cuts; this base and cut get a folder of their own in it.

    Returns:
        One entry per sequence of ids, equal ones sharing one array.
    """
    folder = cache / f"{base.sha256[:16]}-blocks{head_blocks}"
    keys = [hashlib.sha256(np.asarray(ids, dtype="<i4").tobytes()).hexdigest() for ids in token_ids]
    known = _open_shards(folder)
    missing = {key: ids for key, ids in zip(keys, token_ids, strict=True) if key not in known}
    if missing:
        with progress(total=len(missing), description="backbone", unit="text", quiet=quiet) as bar:
            fresh = compute_hidden(base, list(missing.values()), head_blocks=head_blocks, on_progress=bar.update)
        try:
            _write_shard(folder, list(missing), fresh)
        except OSError as error:
            raise AssetError(
                f"the cache {folder} must be writable: {error.strerror or error}; make room or set XDG_CACHE_HOME."
            ) from None
        known = _open_shards(folder)
    return Features([known[key] for key in keys])


def _write_shard(folder: Path, keys: list[str], features: Features) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    matrix = np.concatenate([features._arrays[i] for i in range(len(keys))])
    name = hashlib.sha256("".join(keys).encode()).hexdigest()[:16]
    temporary = folder / f".{name}.{os.getpid()}"
    with temporary.open("wb") as file:
        np.save(file, matrix)
    ends = np.cumsum(features.lengths).tolist()
    index = {"sha256": hashlib.sha256(temporary.read_bytes()).hexdigest(), "keys": keys, "ends": ends}
    temporary.replace(folder / f"{name}.npy")
    temporary.write_text(json.dumps(index))
    temporary.replace(folder / f"{name}.json")


def _open_shards(folder: Path) -> dict[str, np.ndarray]:
    """Every readable entry; a shard whose matrix is not the one its index names is computed anew, never used."""
    known: dict[str, np.ndarray] = {}
    for index_file in sorted(folder.glob("*.json")):
        matrix_file = index_file.with_suffix(".npy")
        try:
            index = json.loads(index_file.read_text())
            if hashlib.sha256(matrix_file.read_bytes()).hexdigest() != index["sha256"]:
                continue
            keys, ends = index["keys"], index["ends"]
            spans = list(zip(keys, [0, *ends[:-1]], ends, strict=True))
        except (OSError, ValueError, KeyError, TypeError):
            continue
        matrix = np.load(matrix_file, mmap_mode="r").view(np.ndarray)  # mapped still, but slicing is ten times faster
        known.update((key, matrix[start:end]) for key, start, end in spans)
    return known
