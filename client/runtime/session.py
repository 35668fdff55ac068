"""ONNX Runtime as heads use it: its version, sessions that load nothing but what they are given, texts in batches."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors
from tokenizers import Tokenizer

from client.runtime.artifact import MANIFEST, MODEL, TOKENIZER, Arrays, damaged, read_file
from shared.errors import HeadError

_BATCH_TEXTS, _BATCH_TOKENS = 64, 4096  # per run; bounds memory, not the result


def read_tokenizer(folder: Path, manifest: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a base, once its bytes are known to be those the manifest names."""
    content = read_file(folder, manifest, TOKENIZER)
    try:
        return Tokenizer.from_str(content.decode("utf-8"))
    except Exception:  # the package raises nothing more specific
        raise damaged(folder / TOKENIZER, "it must be a tokenizer of this version of the package tokenizers") from None


def check_runtime(folder: Path, manifest: Mapping[str, Any]) -> None:
    """The onnxruntime here is new enough for what the manifest describes.

    Raises:
        HeadError: It is not, or the manifest does not say what it needs.
    """
    try:
        wanted = str(manifest["runtime"]["onnxruntime"])
        fits = _release(onnxruntime.__version__) >= _release(wanted)
    except (KeyError, TypeError, ValueError):
        raise damaged(folder / MANIFEST, "it must say which onnxruntime it needs") from None
    if not fits:
        raise HeadError(
            f"{folder} needs onnxruntime {wanted} or newer, got {onnxruntime.__version__}; upgrade onnxruntime."
        )


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def open_session(model: bytes | Path, *, threads: int, name: str = MODEL) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU that neither spins nor loads anything but what it is given."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = min(threads, os.cpu_count() or 1)
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # the default warns of every slot that it is not a constant, which is its purpose
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if isinstance(model, bytes):  # weights in other files would not be the bytes that were hashed: none can be found
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except (
        UnicodeDecodeError,  # it quotes a damaged model, whose bytes may be no text
        ort_errors.Fail,
        ort_errors.InvalidArgument,
        ort_errors.InvalidGraph,
        ort_errors.InvalidProtobuf,
        ort_errors.NotImplemented,
        ort_errors.RuntimeException,
    ) as error:
        reason = " ".join(str(error).split())[:200]
        raise HeadError(
            f"{name} must run on this onnxruntime {onnxruntime.__version__}, got: {reason}; "
            "upgrade onnxruntime or export the base again."
        ) from None


def run_session(
    session: onnxruntime.InferenceSession,
    token_ids: Sequence[Sequence[int]],
    adapter: Arrays,
    outputs: Sequence[str],
) -> list[np.ndarray]:
    """Run the model over texts of any length, shortest first so that padding stays small.

    Returns:
        One array per output, in the texts' order.

    Raises:
        HeadError: An output is not finite.
    """
    found: dict[str, list[np.ndarray]] = {name: [] for name in outputs}
    order: list[int] = []
    for rows in _batches(token_ids):
        longest = max(1, *(len(token_ids[row]) for row in rows))
        ids = np.zeros((len(rows), longest), dtype=np.int64)  # (B, T)
        mask = np.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(token_ids[row])] = token_ids[row]
            mask[i, : len(token_ids[row])] = 1
        results = session.run(list(outputs), {"input_ids": ids, "attention_mask": mask, **adapter})
        for name, result in zip(outputs, results, strict=True):
            if not np.isfinite(result).all():
                raise HeadError(f"{name} must be finite, got NaN or infinity; export the head again.")
            found[name].append(result)
        order.extend(rows)
    if not order:
        return [np.zeros((0, 1), dtype=np.float32) for _ in outputs]
    back = np.argsort(order)
    return [np.concatenate(found[name])[back] for name in outputs]


def _batches(token_ids: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Rows sorted by length, in batches of bounded size."""
    batch: list[int] = []
    for row in sorted(range(len(token_ids)), key=lambda row: len(token_ids[row])):
        if batch and (len(batch) == _BATCH_TEXTS or (len(batch) + 1) * len(token_ids[row]) > _BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
