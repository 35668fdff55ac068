"""An owner's records as a head takes them: backbone outputs, computed text by text and sealed; and targets."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from safetensors.numpy import load, save

from client.home.home import Home
from client.training.site import Workbench
from client.vault.vault import Vault
from shared.datasets import Record
from shared.heads.pairs import join, joined_labels
from shared.heads.tasks import TASKS, Encoded, Labels, Scores, Targets
from shared.models.features import Features, compute_hidden

_MOST_SEALED_BYTES = 2**30  # of backbone outputs; more are computed anew in every round


def read_inputs(home: Home, bench: Workbench, records: Sequence[Record]) -> tuple[Features, Targets]:
    """Backbone outputs and targets of an owner's records, but for those the base cannot take.

    Such a record counts as zero, as one with a NaN does: an error would tell that it is there. The outputs are as
    telling as the text: they are kept in the vault, with hashes of what they were computed from.
    """
    if not records:
        if (home.folder / "vault").exists():
            home.vault().delete(_sealed_name(bench))
        return Features([]), Scores([])
    encoded = [_encode(bench, record) for record in records]
    if encoded[0].rejected is not None:
        return _read_pairs(home, bench, encoded)
    features = _sealed_features(home.vault(), bench, [one.token_ids[0] for one in encoded])
    rows = np.flatnonzero(features.lengths).tolist()
    targets: Targets = Scores([records[row].target for row in rows])
    if encoded[0].labels is not None:
        targets = Labels([labels[0] for row in rows if (labels := encoded[row].labels) is not None])
    return features.select(rows), targets


def _read_pairs(home: Home, bench: Workbench, encoded: Sequence[Encoded]) -> tuple[Features, Targets]:
    """Pairs of answers, each answer sealed as a text of its own; one that the base cannot take voids its pair.

    What the base itself makes of a pair is computed of each alone, as everything on an owner's device.
    """
    count = len(encoded)
    ids = [one.token_ids[0] for one in encoded] + [one.rejected.token_ids[0] for one in encoded if one.rejected]
    features = _sealed_features(home.vault(), bench, ids)
    rows = np.flatnonzero((features.lengths[:count] > 0) & (features.lengths[count:] > 0)).tolist()
    chosen, rejected = features.select(rows), features.select([count + row for row in rows])
    labels = [joined_labels(encoded[row])[0] for row in rows]
    return join(bench.base, chosen, rejected, labels, blocks=len(bench.head.blocks), micro_batch=1)


def _encode(bench: Workbench, record: Record) -> Encoded:
    """Tokens of one record, none where there is no way to have them."""
    scenario = bench.campaign.scenario
    if scenario.task.name == "preference" and not record.rejected:
        return _nothing(scenario.task.name)
    try:
        return TASKS[scenario.task.name](bench.base, [record.key], scenario)
    except MemoryError:  # says nothing of the record, and must not be kept as if it did
        raise
    except Exception:  # a tokenizer raises it bare
        return _nothing(scenario.task.name)


def _nothing(task: str) -> Encoded:
    labels = [np.zeros(0, dtype=np.int64)] if task in ("generation", "preference") else None
    return Encoded([[]], labels, Encoded([[]], labels) if task == "preference" else None)


def _hidden(bench: Workbench, token_ids: list[int], blocks: int) -> np.ndarray:
    """Backbone outputs (T, d) of one text, computed alone; (0, d) where the base cannot take it."""
    try:
        return only(compute_hidden(bench.base, [token_ids], head_blocks=blocks))
    except MemoryError:
        raise
    except Exception:  # no tokens, more than there are positions, or an id that is not embedded: each its own type
        return np.zeros((0, bench.base.hidden_size), dtype=np.float32)


def only(features: Features) -> np.ndarray:
    """The array of the one text."""
    hidden, _ = features.batch([0])
    array: np.ndarray = hidden[0].numpy()
    return array


def _sealed_name(bench: Workbench) -> str:
    return f"features/{bench.base.sha256[:16]}-{len(bench.head.blocks)}"


def _sealed_features(vault: Vault, bench: Workbench, token_ids: list[list[int]]) -> Features:
    """Backbone outputs from the vault, or computed and sealed there; of a cut only the newest set is kept.

    A text is found by the hash of its tokens: where records come and go only what is new is computed.
    """
    blocks, name = len(bench.head.blocks), _sealed_name(bench)
    keys = [hashlib.sha256(",".join(map(str, ids)).encode()).digest() for ids in token_ids]
    texts = dict(zip(keys, token_ids, strict=True))
    kept = _unpack_features(vault.open(name)) if vault.names(name) else {}
    arrays = {key: kept[key] if key in kept else _hidden(bench, ids, blocks) for key, ids in texts.items()}
    if arrays.keys() != kept.keys() and sum(array.nbytes for array in arrays.values()) <= _MOST_SEALED_BYTES:
        vault.seal(name, _pack_features(arrays))
    return Features([arrays[key] for key in keys])


def _pack_features(arrays: Mapping[bytes, np.ndarray]) -> bytes:
    keys = np.frombuffer(b"".join(arrays), dtype=np.uint8)  # inside: a name would confirm a guess
    lengths = np.array([len(array) for array in arrays.values()], dtype=np.int64)
    return save({"keys": keys, "values": np.concatenate(list(arrays.values())), "lengths": lengths})


def _unpack_features(content: bytes) -> dict[bytes, np.ndarray]:
    found = load(content)
    if "keys" not in found:  # sealed by an earlier version, under one hash of all of them
        return {}
    keys = [key.tobytes() for key in found["keys"].reshape(-1, hashlib.sha256().digest_size)]
    return dict(zip(keys, np.split(found["values"], np.cumsum(found["lengths"])[:-1]), strict=True))
