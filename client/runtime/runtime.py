"""Predict with a personal head: a small adapter on a shared ONNX base. Needs no more than the base install.

A head folder holds ``adapter.safetensors`` and ``manifest.json``; the base folder, by convention its sibling
``base``, holds ``model.onnx``, ``tokenizer.json`` and ``manifest.json``; client/runtime/artifact.py checks them.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

from client.runtime.artifact import (
    ADAPTER,
    MANIFEST,
    MEMORY_PREFIX,
    MODEL,
    Arrays,
    Files,
    Shape,
    base_folder,
    check_binding,
    check_listed,
    check_slots,
    damaged,
    manifest_id,
    parse_adapter,
    parse_shape,
    place_of,
    precision_of,
    read_file,
    read_manifest,
)
from client.runtime.session import check_runtime, open_session, read_tokenizer, run_session
from shared.errors import HeadError

if TYPE_CHECKING:
    from client.runtime.language import LanguageBase
    from client.runtime.memory import Memory

OUTPUT_SLOTS = ("output.weight", "output.bias")
KERNEL_SLOT = "output.kernel"  # of a base with kernel features: one weight for each public text
# Largest difference between a head's known answer and this device's, by the base's precision: in 8 bits kernels of
# other processors round activations otherwise.
MAX_TOLERANCE = {"fp32": 1e-3, "int8": 0.1}


@dataclass(frozen=True)
class FleetBase:
    """An opened base: the same for every user of the fleet, so one of it serves many heads.

    Attributes:
        id: Short hash over everything that decides its outputs; see ``base_id``.
        slots: Optional inputs of the graph: name -> shape.
        low: End of the scale of the predictions; ``high`` likewise.
        precision: ``fp32`` or ``int8``.
        labels: What is predicted is one of them (K); none where it is a number.
    """

    id: str
    model_sha256: str
    base_sha256: str
    session: onnxruntime.InferenceSession
    tokenizer: Tokenizer
    slots: Mapping[str, Shape]
    low: float
    high: float
    precision: str
    labels: tuple[str, ...] = ()

    def run(self, texts: Sequence[str], *, adapter: Arrays | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Pooled features (n, d) and unclipped predictions (n,), or logits (n, K); without adapter the bare base's."""
        return self.run_tokens(self.encode(texts), adapter=adapter)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts, cut to what the base takes."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]

    def run_tokens(
        self, token_ids: Sequence[Sequence[int]], *, adapter: Arrays | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """As ``run``, of texts that are tokens already."""
        pooled, prediction = run_session(self.session, token_ids, adapter or {}, ("pooled", "prediction"))
        return pooled, prediction.reshape(self.shape(len(token_ids)))

    def shape(self, texts: int) -> tuple[int, ...]:
        """Of the predictions for so many texts."""
        return (texts, len(self.labels)) if self.labels else (texts,)


@dataclass(frozen=True)
class PersonalHead:
    """One user's adapter on a base, or the base alone; heads share a base because each run brings its own tensors.

    Attributes:
        user: The user's id; None for the base alone, which predicts the centre of the scale.
        manifest: Of the head; empty where there is none.
        memory: Of the user's own records, where the head carries one.
    """

    user: str | None
    base: FleetBase
    adapter: Arrays
    manifest: Mapping[str, Any]
    memory: "Memory | None" = None

    def predict(self, texts: Sequence[str]) -> np.ndarray:
        """Predictions (n,) float32 for texts, clipped to the task's scale; or the probability of each label (n, K).

        Raises:
            HeadError: An output is not finite.
        """
        raw = self.raw(texts)
        if self.base.labels:
            above = np.exp(raw - raw.max(axis=1, keepdims=True))
            return np.asarray(above / above.sum(axis=1, keepdims=True))
        clipped: np.ndarray = np.clip(raw, self.base.low, self.base.high)
        return clipped

    def raw(self, texts: Sequence[str]) -> np.ndarray:
        """Predictions (n,) before clipping, or logits (n, K); the export compares these with torch."""
        if isinstance(texts, str):
            raise TypeError("texts must be a sequence of strings, got one string; put it in a list.")
        pooled, predictions = self.base.run(texts, adapter=self.adapter)
        if self.memory is None:
            return predictions
        return np.asarray(predictions + self.memory.correct(pooled, texts), dtype=np.float32)


def open_head(
    folder: Files,
    *,
    base: Path | FleetBase | None = None,
    threads: int = 1,
    signers: Collection[str] | None = None,
) -> PersonalHead:
    """Open a personal head, checking everything before the first prediction.

    Args:
        folder: Holds the user's adapter and its manifest; or these files themselves, by name.
        base: Folder of the fleet's base, or an opened one; by default the sibling ``base`` of ``folder``.
        threads: Of a base that is opened here; see ``open_base``.
        signers: Fingerprints of the keys of which one must have signed the manifest; None asks for no signature.

    Raises:
        HeadError: A file is missing, damaged or not the one its manifest names; the adapter is another
            base's; its tensors are not the base's slots or not finite; its known answer does not come out.

    Guarantee:
        What runs are the bytes whose hashes were checked, and never the base without its adapter.
    """
    if not isinstance(base, FleetBase):
        read_manifest(folder, "adapter")  # a folder that is no head is named before its base is
        base = open_base(base_folder(folder, base), threads=threads)
    head = bind_head(folder, base, signers=signers)
    check_known_answer(place_of(folder), head)
    return head


def bind_head(folder: Files, base: FleetBase, *, signers: Collection[str] | None = None) -> PersonalHead:
    """A head whose every check is passed but the known answer; see ``open_head``."""
    manifest = read_manifest(folder, "adapter", signers=signers)
    place = place_of(folder)
    check_binding(place, manifest, identity(base))
    check_runtime(place, manifest)
    content = read_file(folder, manifest, ADAPTER)
    tensors = parse_adapter(place / ADAPTER, content)
    check_listed(place, manifest, tensors)
    adapter = {name: array for name, array in tensors.items() if not name.startswith(MEMORY_PREFIX)}
    memory = None
    if "memory" in manifest or adapter.keys() != tensors.keys():
        from client.runtime.memory import read_memory  # settings take their time to import, and few heads have a memory

        memory = read_memory(place, manifest, tensors)
    check_slots(place, adapter, base.slots, required=(*OUTPUT_SLOTS, *({KERNEL_SLOT} & base.slots.keys())))
    user = manifest.get("user")
    if not isinstance(user, str):
        raise damaged(place / MANIFEST, f"user must be a string, got {user!r}")
    if memory is not None and base.labels:
        raise damaged(place / MANIFEST, "a memory corrects numbers, and this base predicts labels")
    return PersonalHead(user=user, base=base, adapter=adapter, manifest=manifest, memory=memory)


def check_known_answer(folder: Path, head: PersonalHead) -> None:
    """The head's manifest says what it predicts for fixed public tokens; this device must find the same.

    Raises:
        HeadError: It does not.
    """
    path, limit = folder / MANIFEST, MAX_TOLERANCE[head.base.precision]
    try:
        known = head.manifest["known_answer"]
        token_ids = [[int(token) for token in ids] for ids in known["token_ids"]]
        wanted, bare = (np.array(known[key], dtype=np.float64) for key in ("predictions", "without_adapter"))
        tolerance = float(known["tolerance"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise damaged(path, f"unreadable known answer {error}") from None
    shapes = {wanted.shape, bare.shape}
    if not (0 < tolerance <= limit and shapes == {head.base.shape(len(token_ids))} and token_ids and all(token_ids)):
        raise damaged(path, "its known answer must have a tolerance, texts and as many predictions")
    if not (np.isfinite(wanted).all() and np.isfinite(bare).all()):
        raise damaged(path, "its known answer must be finite")
    if not 0 <= min(map(min, token_ids)) <= max(map(max, token_ids)) < head.base.tokenizer.get_vocab_size():
        raise damaged(path, "its known answer must be of the base's tokens")
    found = head.base.run_tokens(token_ids, adapter=head.adapter)[1]
    if output_differs(head.adapter) and not np.abs(wanted - bare).max() >= 2 * tolerance:
        raise damaged(path, "its known answer must tell the adapter from its absence")
    difference = float(np.abs(found - wanted).max())
    if not difference <= tolerance:
        raise wrong_answer(folder, difference, tolerance)


def output_differs(adapter: Arrays) -> bool:
    """Whether the output layer tells one text from another."""
    return any(adapter[name].any() for name in ("output.weight", KERNEL_SLOT) if name in adapter)


def wrong_answer(folder: Path, difference: float, tolerance: float) -> HeadError:
    """The error of a head whose known answer does not come out."""
    return HeadError(
        f"{folder} must give its known answer within {tolerance:g} on this device, got a difference of "
        f"{difference:.3g}: the adapter is not at work, or onnxruntime {onnxruntime.__version__} computes "
        "otherwise; export the head again."
    )


def identity(base: "FleetBase | LanguageBase") -> dict[str, str]:
    """What an adapter's manifest must say of the base it was exported for."""
    return {"id": base.id, "model_sha256": base.model_sha256, "base_sha256": base.base_sha256}


def open_base(folder: Path, *, threads: int = 1, signers: Collection[str] | None = None) -> FleetBase:
    """Open the fleet's base from the very bytes that were hashed.

    Args:
        folder: Holds ``model.onnx``, ``tokenizer.json`` and ``manifest.json``.
        threads: For the matrix products; more than the machine has processors are not started.
        signers: As for ``open_head``; of a base these are operators' keys.

    Raises:
        HeadError: A file is missing or not the one the manifest names, or this onnxruntime cannot run it.
    """
    if not threads >= 1:
        raise HeadError(f"threads must be at least 1, got {threads}.")
    manifest = read_manifest(folder, "base", signers=signers)
    check_runtime(folder, manifest)
    model = read_file(folder, manifest, MODEL)
    tokenizer = read_tokenizer(folder, manifest)
    try:
        slots = {slot["name"]: parse_shape(slot["shape"]) for slot in manifest["slots"]}
        floats = all(slot["dtype"] == "float32" for slot in manifest["slots"])
        labels = _labels_of(manifest["task"])
        low, high = (0.0, 1.0) if labels else (float(manifest["task"][end]) for end in ("low", "high"))
        max_tokens = int(manifest["tokenizer"]["max_tokens"])
        base_sha256 = str(manifest["base_sha256"])
        precision = precision_of(manifest)
        model_sha256 = str(manifest["files"][MODEL]["sha256"])
        wanted_id = base_id(manifest)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise damaged(folder / MANIFEST, f"unreadable entry {error}") from None
    if not (low < high and max_tokens >= 1):
        raise damaged(folder / MANIFEST, f"impossible scale {low} to {high} or max_tokens {max_tokens}")
    if manifest.get("id") != wanted_id:
        raise damaged(folder / MANIFEST, f"its id must be {wanted_id}, got {manifest.get('id')!r}")
    session = open_session(model, threads=threads, name=str(folder / MODEL))
    found = {arg.name: (tuple(arg.shape), arg.type) for arg in session.get_overridable_initializers()}
    if slots.get("output.bias") != (max(1, len(labels)),):
        raise damaged(folder / MANIFEST, "its task and its slots must have as many outputs")
    if not floats or found != {name: (shape, "tensor(float)") for name, shape in slots.items()}:
        raise damaged(folder / MANIFEST, "its slots are not the optional inputs of the model")
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length=max_tokens)
    return FleetBase(wanted_id, model_sha256, base_sha256, session, tokenizer, slots, low, high, precision, labels)


def _labels_of(task: Mapping[str, Any]) -> tuple[str, ...]:
    """The labels a base tells apart, () where its task has none; or ValueError."""
    if not isinstance(task, dict):
        raise ValueError(f"task {task!r:.80}")
    labels = task.get("labels", [])
    texts = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    if not texts or len(set(labels)) != len(labels) or (task.get("name") == "tagging" and len(labels) < 2):
        raise ValueError(f"labels {labels!r:.80}")
    return tuple(labels)


def base_id(manifest: Mapping[str, Any]) -> str:
    """Short hash over what decides a base's outputs: its files, tokenizer settings, slots, task and precision."""
    return manifest_id(manifest, "schema", "files", "base_sha256", "tokenizer", "slots", "task", "quant")
