"""Predict with a personal head: a small adapter on a shared ONNX base. Needs no more than the base install.

A head folder holds ``adapter.safetensors`` and ``manifest.json``; the base folder, by convention its sibling
``base``, holds ``model.onnx``, ``tokenizer.json`` and ``manifest.json``. Every byte used is read once, hashed
and used from memory, so a file changed on disk later changes nothing. Whatever does not fit is refused: a
damaged adapter never becomes an unpersonalised prediction. Hashes bind files to manifests and the adapter to
its base; they detect damage and mix-ups, not an attacker who may rewrite the manifests as well.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors
from safetensors import SafetensorError, deserialize
from tokenizers import Tokenizer

from shared.errors import HeadError

SCHEMA = 1
MODEL, TOKENIZER, ADAPTER, MANIFEST = "model.onnx", "tokenizer.json", "adapter.safetensors", "manifest.json"
OUTPUT_SLOTS = ("output.weight", "output.bias")
DEFAULT_BASE = "../base"

_MAX_MANIFEST_BYTES = 2**20
_MAX_HEADER_BYTES = 2**20  # of a safetensors file; some hundred slots need 30 KiB
_MAX_FILE_BYTES = 2**31 - 1  # an ONNX file cannot be larger
_BATCH_TEXTS, _BATCH_TOKENS = 64, 4096  # per run; bounds memory, not the result

Arrays = Mapping[str, np.ndarray]
Shape = tuple[int | str, ...]  # a string is a rank that the adapter chooses


@dataclass(frozen=True)
class FleetBase:
    """An opened base: the same for every user of the fleet, so one of it serves many heads.

    Attributes:
        id: Short hash over everything that decides its outputs; see ``base_id``.
        slots: Optional inputs of the graph: name -> shape.
    """

    id: str
    model_sha256: str
    base_sha256: str
    session: onnxruntime.InferenceSession
    tokenizer: Tokenizer
    slots: Mapping[str, Shape]
    low: float
    high: float

    def run(self, texts: Sequence[str], *, adapter: Arrays | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Pooled features (n, d) and unclipped predictions (n,); without adapter those of the bare base."""
        token_ids = [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]
        pooled, prediction = run_session(self.session, token_ids, adapter or {}, ("pooled", "prediction"))
        return pooled, prediction.reshape(-1)


@dataclass(frozen=True)
class PersonalHead:
    """One user's adapter on a base; heads share a base because each run brings its own tensors."""

    user: str
    base: FleetBase
    adapter: Arrays
    manifest: Mapping[str, Any]

    def predict(self, texts: Sequence[str]) -> np.ndarray:
        """Predictions (n,) float32 for texts, clipped to the task's scale.

        Raises:
            HeadError: An output is not finite.
        """
        clipped: np.ndarray = np.clip(self.raw(texts), self.base.low, self.base.high)
        return clipped

    def raw(self, texts: Sequence[str]) -> np.ndarray:
        """Predictions (n,) before clipping; the export compares these with torch."""
        if isinstance(texts, str):
            raise TypeError("texts must be a sequence of strings, got one string; put it in a list.")
        return self.base.run(texts, adapter=self.adapter)[1]


def open_head(folder: Path, *, base: Path | FleetBase | None = None, threads: int = 1) -> PersonalHead:
    """Open a personal head, checking everything before the first prediction.

    Args:
        folder: Holds the user's adapter and its manifest.
        base: Folder of the fleet's base, or an opened one; by default the sibling ``base`` of ``folder``.
        threads: Of a base that is opened here; see ``open_base``.

    Raises:
        HeadError: A file is missing, damaged or not the one its manifest names; the adapter is another
            base's; its tensors are not the base's slots or not finite.

    Guarantee:
        What runs are the bytes whose hashes were checked, and never the base without its adapter.
    """
    manifest = _read_manifest(folder, kind="adapter")
    content = _read_file(folder, manifest, ADAPTER)
    if not isinstance(base, FleetBase):
        base = open_base(folder / DEFAULT_BASE if base is None else base, threads=threads)
    _check_binding(folder, manifest, base)
    adapter = _parse_adapter(folder / ADAPTER, content)
    _check_listed(folder, manifest, adapter)
    _check_slots(folder, adapter, base)
    user = manifest.get("user")
    if not isinstance(user, str):
        raise _damaged(folder / MANIFEST, f"user must be a string, got {user!r}")
    return PersonalHead(user=user, base=base, adapter=adapter, manifest=manifest)


def open_base(folder: Path, *, threads: int = 1) -> FleetBase:
    """Open the fleet's base from the very bytes that were hashed.

    Args:
        folder: Holds ``model.onnx``, ``tokenizer.json`` and ``manifest.json``.
        threads: For the matrix products; more than the machine has processors are not started.

    Raises:
        HeadError: A file is missing or not the one the manifest names, or this onnxruntime cannot run it.
    """
    if not threads >= 1:
        raise HeadError(f"threads must be at least 1, got {threads}.")
    manifest = _read_manifest(folder, kind="base")
    model = _read_file(folder, manifest, MODEL)
    tokenizer = Tokenizer.from_str(_read_file(folder, manifest, TOKENIZER).decode("utf-8"))
    try:
        slots = {slot["name"]: _shape(slot["shape"]) for slot in manifest["slots"]}
        floats = all(slot["dtype"] == "float32" for slot in manifest["slots"])
        low, high = float(manifest["task"]["low"]), float(manifest["task"]["high"])
        max_tokens = int(manifest["tokenizer"]["max_tokens"])
        base_sha256 = str(manifest["base_sha256"])
        model_sha256 = str(manifest["files"][MODEL]["sha256"])
        wanted_id = base_id(manifest)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _damaged(folder / MANIFEST, f"unreadable entry {error}") from None
    if not (low < high and max_tokens >= 1):
        raise _damaged(folder / MANIFEST, f"impossible scale {low} to {high} or max_tokens {max_tokens}")
    if manifest.get("id") != wanted_id:
        raise _damaged(folder / MANIFEST, f"its id must be {wanted_id}, got {manifest.get('id')!r}")
    session = open_session(model, threads=threads, name=str(folder / MODEL))
    found = {arg.name: (tuple(arg.shape), arg.type) for arg in session.get_overridable_initializers()}
    if not floats or found != {name: (shape, "tensor(float)") for name, shape in slots.items()}:
        raise _damaged(folder / MANIFEST, "its slots are not the optional inputs of the model")
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length=max_tokens)
    return FleetBase(wanted_id, model_sha256, base_sha256, session, tokenizer, slots, low, high)


def base_id(manifest: Mapping[str, Any]) -> str:
    """Short hash over what decides a base's outputs: its files, tokenizer settings, slots and task."""
    decisive = {key: manifest[key] for key in ("schema", "files", "base_sha256", "tokenizer", "slots", "task")}
    canonical = json.dumps(decisive, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def open_session(model: bytes, *, threads: int, name: str = MODEL) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU that neither spins nor loads anything but these bytes."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = min(threads, os.cpu_count() or 1)
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # the default warns of every slot that it is not a constant, which is its purpose
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except (
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


def _read_manifest(folder: Path, *, kind: str) -> dict[str, Any]:
    path = folder / MANIFEST
    what = "a personal head" if kind == "adapter" else "a fleet's base"
    if not path.is_file():
        option = "--head" if kind == "adapter" else "--base"
        raise HeadError(f"{folder} must hold {what}, but has no {MANIFEST}; name its folder with {option}.")
    with path.open("rb") as file:
        content = file.read(_MAX_MANIFEST_BYTES + 1)
    if len(content) > _MAX_MANIFEST_BYTES:
        raise _damaged(path, f"it must be at most {_MAX_MANIFEST_BYTES} bytes")
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError):
        raise _damaged(path, "it must be JSON") from None
    found = (manifest.get("schema"), manifest.get("kind")) if isinstance(manifest, dict) else manifest
    if found != (SCHEMA, kind):
        raise HeadError(f"{path} must describe {what} of schema {SCHEMA}, got {found!r}; name the right folder.")
    return dict(manifest)


def _read_file(folder: Path, manifest: Mapping[str, Any], name: str) -> bytes:
    """The file's bytes, once they are known to be those the manifest names."""
    try:
        size, sha256 = manifest["files"][name]["size"], manifest["files"][name]["sha256"]
    except (KeyError, TypeError):
        raise _damaged(folder / MANIFEST, f"it must name size and sha256 of {name}") from None
    if type(size) is not int or not 0 < size <= _MAX_FILE_BYTES:
        raise _damaged(folder / MANIFEST, f"the size of {name} must be between 1 and {_MAX_FILE_BYTES}, got {size!r}")
    path = folder / name
    if not path.is_file():
        raise HeadError(f"{path} must exist, as {MANIFEST} names it; export it again.")
    with path.open("rb") as file:
        content = file.read(size + 1)
    found = hashlib.sha256(content).hexdigest()
    if len(content) != size or found != sha256:
        raise HeadError(
            f"{path} must have the {size} bytes with sha256 {str(sha256)[:12]}… that {MANIFEST} names, "
            f"got {'more' if len(content) > size else len(content)} with {found[:12]}…; "
            "export or copy it again."
        )
    return content


def _check_binding(folder: Path, manifest: Mapping[str, Any], base: FleetBase) -> None:
    wanted = manifest.get("base")
    found = {"id": base.id, "model_sha256": base.model_sha256, "base_sha256": base.base_sha256}
    if not isinstance(wanted, dict) or any(wanted.get(key) != value for key, value in found.items()):
        other = wanted.get("id") if isinstance(wanted, dict) else wanted
        raise HeadError(
            f"{folder} must be used with the base it was exported for ({other}), got base {base.id}; "
            "name the right one with --base or export the head again."
        )


def _parse_adapter(path: Path, content: bytes) -> dict[str, np.ndarray]:
    """Named float32 arrays of a safetensors file, finite and of bounded header."""
    if not int.from_bytes(content[:8], "little") <= _MAX_HEADER_BYTES:
        raise _damaged(path, f"its header must be at most {_MAX_HEADER_BYTES} bytes")
    try:
        tensors = deserialize(content)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise _damaged(path, f"it must be a safetensors file ({error})") from None
    adapter = {}
    for name, tensor in tensors:
        if tensor["dtype"] != "F32":
            raise _damaged(path, f"{name} must be float32, got {tensor['dtype']}")
        adapter[name] = np.frombuffer(tensor["data"], dtype="<f4").reshape(tensor["shape"])
        if not np.isfinite(adapter[name]).all():
            raise _damaged(path, f"{name} must be finite, got NaN or infinity")
    return adapter


def _check_listed(folder: Path, manifest: Mapping[str, Any], adapter: Arrays) -> None:
    """The tensors are exactly those the manifest lists."""
    try:
        listed = {slot["name"]: (tuple(slot["shape"]), slot["dtype"]) for slot in manifest["slots"]}
    except (KeyError, TypeError):
        raise _damaged(folder / MANIFEST, "it must list the adapter's slots") from None
    found = {name: (array.shape, str(array.dtype)) for name, array in adapter.items()}
    if found != listed:
        wrong = sorted(str(name) for name in {*found, *listed} if found.get(name) != listed.get(name))
        raise _damaged(
            folder / ADAPTER, f"its tensors must be those {MANIFEST} lists; they differ in {', '.join(wrong)}"
        )


def _check_slots(folder: Path, adapter: Arrays, base: FleetBase) -> None:
    """The tensors fit the base's slots: known names, right shapes, A and B of a layer together."""
    path = folder / ADAPTER
    unknown = sorted(set(adapter) - set(base.slots))
    if unknown:
        raise _damaged(path, f"the base has no slot {', '.join(unknown)}")
    needed = {
        *OUTPUT_SLOTS,
        *(name[:-1] + letter for name in adapter if name.startswith("lora.") for letter in "AB"),
    }
    missing = sorted(needed - set(adapter))
    if missing:
        raise _damaged(path, f"it must hold {', '.join(missing)}")
    ranks: dict[str, int] = {}
    for name, array in adapter.items():
        shape = base.slots[name]
        fits = len(shape) == array.ndim and math.prod(array.shape) > 0
        for wanted, got in zip(shape, array.shape, strict=False):
            fits = fits and got == (ranks.setdefault(wanted, got) if isinstance(wanted, str) else wanted)
        if not fits:
            raise _damaged(path, f"{name} must have shape {shape}, got {array.shape}")


def _shape(value: Sequence[int | str]) -> Shape:
    if not all(isinstance(size, str) or (type(size) is int and size > 0) for size in value):
        raise ValueError(f"shape {value!r}")
    return tuple(value)


def _damaged(path: Path, problem: str) -> HeadError:
    return HeadError(f"{path} cannot be used: {problem}; export or copy it again.")
