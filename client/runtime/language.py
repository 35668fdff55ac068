"""An exported language model, opened: logits of tokens, and the key-value cache that spares computing them again.

A base folder holds ``model.onnx`` (LoRA slots as optional inputs), ``tokenizer.json`` and ``manifest.json``;
client/runtime/artifact.py reads and checks them. Needs no more than the base install.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors
from tokenizers import Tokenizer

from client.runtime.artifact import (
    MANIFEST,
    MODEL,
    Arrays,
    Shape,
    damaged,
    manifest_id,
    parse_shape,
    precision_of,
    read_file,
    read_manifest,
)
from client.runtime.session import check_runtime, open_session, read_tokenizer
from shared.errors import HeadError

PREFIX = "prefix."  # of the names of soft tokens' keys and values in an adapter
_CHUNK_TOKENS = 128  # of a prompt per run; bounds the memory of the logits, V floats a token

Cache = dict[str, np.ndarray]  # past_key_values.<layer>.<key|value> -> (1, heads, tokens so far, width)


@dataclass(frozen=True)
class CacheShape:
    """What the key-value cache of a model looks like."""

    layers: int
    heads: int
    width: int

    @property
    def names(self) -> list[str]:
        """Of its tensors, without what tells inputs from outputs, in the order of the layers."""
        return [f"{layer}.{part}" for layer in range(self.layers) for part in ("key", "value")]

    def empty(self) -> Cache:
        """The cache before the first token."""
        start = np.zeros((1, self.heads, 0, self.width), dtype=np.float32)
        return {f"past_key_values.{name}": start for name in self.names}


@dataclass(frozen=True)
class LanguageBase:
    """An opened language model: the same for every user of the fleet, so one of it serves many heads.

    Attributes:
        id: Short hash over everything that decides its outputs; see ``lm_base_id``.
        slots: Optional inputs of the graph: name -> shape.
        stop_ids: Tokens that end an answer.
        max_tokens: Prompt and answer together.
        template: What is put around a prompt's text, at ``{text}``, as in training.
        precision: ``fp32`` or ``int8``.
    """

    id: str
    model_sha256: str
    base_sha256: str
    session: onnxruntime.InferenceSession
    tokenizer: Tokenizer
    slots: Mapping[str, Shape]
    cache: CacheShape
    stop_ids: frozenset[int]
    max_tokens: int
    template: str
    precision: str

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt inside the template."""
        return self.tokens(self.template.replace("{text}", prompt))

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text as it stands: no special token is put around it, as in training."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def run(self, token_ids: Sequence[int], cache: Cache, *, adapter: Arrays) -> tuple[np.ndarray, Cache]:
        """Logits (T, V) of the given tokens, which follow those in the cache, and the longer cache."""
        pieces = []
        for start in range(0, len(token_ids), _CHUNK_TOKENS):
            part = token_ids[start : start + _CHUNK_TOKENS]
            logits, cache = run_step(self.session, self.cache, part, cache, adapter=adapter)
            pieces.append(logits)
        return (pieces[0] if len(pieces) == 1 else np.concatenate(pieces)), cache


def open_lm_base(folder: Path, *, threads: int = 1, signers: Collection[str] | None = None) -> LanguageBase:
    """Open the fleet's language model from the very bytes that were hashed.

    Args:
        folder: Holds ``model.onnx``, ``tokenizer.json`` and ``manifest.json``.
        threads: For the matrix products; more than the machine has processors are not started.
        signers: Fingerprints of the keys of which one must have signed the manifest; None asks for no signature.

    Raises:
        HeadError: A file is missing or not the one the manifest names, or this onnxruntime cannot run it.
    """
    if not threads >= 1:
        raise HeadError(f"threads must be at least 1, got {threads}.")
    manifest = read_manifest(folder, "lm-base", signers=signers)
    check_runtime(folder, manifest)
    model = read_file(folder, manifest, MODEL)
    tokenizer = read_tokenizer(folder, manifest)
    try:
        slots = {slot["name"]: parse_shape(slot["shape"]) for slot in manifest["slots"]}
        floats = all(slot["dtype"] == "float32" for slot in manifest["slots"])
        cache = CacheShape(*(int(manifest["cache"][key]) for key in ("layers", "heads", "width")))
        max_tokens = int(manifest["tokenizer"]["max_tokens"])
        template = check_template(manifest["tokenizer"]["template"])
        stop_ids = frozenset(int(token) for token in manifest["tokenizer"]["stop_ids"])
        base_sha256, model_sha256 = str(manifest["base_sha256"]), str(manifest["files"][MODEL]["sha256"])
        precision = precision_of(manifest)
        wanted_id = lm_base_id(manifest)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise damaged(folder / MANIFEST, f"unreadable entry {error}") from None
    if manifest.get("id") != wanted_id:
        raise damaged(folder / MANIFEST, f"its id must be {wanted_id}, got {manifest.get('id')!r}")
    if not max_tokens >= 1:
        raise damaged(folder / MANIFEST, f"impossible max_tokens {max_tokens}")
    session = open_session(model, threads=threads, name=str(folder / MODEL))
    found = {arg.name: (tuple(arg.shape), arg.type) for arg in session.get_overridable_initializers()}
    if not floats or found != {name: (shape, "tensor(float)") for name, shape in slots.items()}:
        raise damaged(folder / MANIFEST, "its slots are not the optional inputs of the model")
    caches = {arg.name: tuple(arg.shape[1::2]) for arg in session.get_inputs() if arg.name.startswith("past")}
    if caches != dict.fromkeys(cache.empty(), (cache.heads, cache.width)):
        raise damaged(folder / MANIFEST, "its cache is not that of the model")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return LanguageBase(
        wanted_id,
        model_sha256,
        base_sha256,
        session,
        tokenizer,
        slots,
        cache,
        stop_ids,
        max_tokens,
        template,
        precision,
    )


def read_prefix(path: Path, adapter: Arrays, shape: CacheShape) -> Cache:
    """The keys and values of soft tokens that an adapter holds, as the cache that every prompt follows.

    Args:
        path: What messages call the adapter.
        adapter: All of its tensors.
        shape: Of the model's cache.

    Returns:
        Empty where it holds none.

    Raises:
        HeadError: A tensor of them is missing or unknown, or not (heads, P, width) with one P >= 1 for all.
    """
    found = {name: array for name, array in adapter.items() if name.startswith(PREFIX)}
    if not found:
        return {}
    wanted = [PREFIX + name for name in shape.names]
    wrong = sorted(found.keys() ^ set(wanted))
    if wrong:
        raise damaged(path, f"soft tokens must have key and value in {shape.layers} blocks; wrong: {', '.join(wrong)}")
    size = found[wanted[0]].shape[1] if found[wanted[0]].ndim == 3 else 0
    for name, array in found.items():
        if array.shape != (shape.heads, size, shape.width) or not size >= 1:
            raise damaged(
                path, f"{name} must have shape ({shape.heads}, soft tokens, {shape.width}), got {array.shape}"
            )
    return {f"past_key_values.{name}": found[PREFIX + name][None] for name in shape.names}


def check_template(template: str) -> str:
    """The template, or ValueError unless it has one place for the text."""
    if not isinstance(template, str) or template.count("{text}") != 1:
        raise ValueError(f"template {template!r}")
    return template


def lm_base_id(manifest: Mapping[str, Any]) -> str:
    """Short hash over what decides a language model's outputs."""
    return manifest_id(manifest, "schema", "kind", "files", "base_sha256", "tokenizer", "slots", "cache", "quant")


def run_step(
    session: onnxruntime.InferenceSession,
    shape: CacheShape,
    token_ids: Sequence[int],
    cache: Cache,
    *,
    adapter: Arrays,
) -> tuple[np.ndarray, Cache]:
    """One run of the model: logits (T, V) of the tokens, which follow those in the cache, and the longer cache.

    Raises:
        HeadError: A logit is not finite, or this onnxruntime cannot run the model.
    """
    past = next(iter(cache.values())).shape[2]
    feeds = {
        "input_ids": np.asarray([token_ids], dtype=np.int64),  # (1, T)
        "attention_mask": np.ones((1, past + len(token_ids)), dtype=np.int64),
    }
    try:
        logits, *grown = session.run(
            ["logits", *(f"present.{name}" for name in shape.names)], feeds | cache | dict(adapter)
        )
    except (ort_errors.Fail, ort_errors.InvalidArgument, ort_errors.RuntimeException) as error:
        reason = " ".join(str(error).split())[:200]
        raise HeadError(f"the model must run on onnxruntime {onnxruntime.__version__}, got: {reason}.") from None
    if not np.isfinite(logits).all():
        raise HeadError("logits must be finite, got NaN or infinity; export the head again.")
    return logits[0], dict(zip(cache, grown, strict=True))
