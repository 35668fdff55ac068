"""Write personal heads of a causal language model: one ONNX base with empty slots, and one small adapter per user.

The folders are those of client/export/encoder.py, their manifests of other kinds (``lm-base``, ``lm-adapter``). Nothing
takes its place before the device's own runtime has run it, from the written files, and agreed with torch: on the
logits of probe texts, on a greedy answer through the key-value cache, and on the known answer that each device will
repeat.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from client.export.encoder import head_manifest
from client.export.graph_lm import (
    build_lm_graph,
    list_slots,
    lm_graph_key,
    read_cache_shape,
    read_stop_ids,
    slot_layers,
)
from client.export.slots import describe_slot, graph_format, read_graph, store_graph
from client.runtime.artifact import (
    ADAPTER,
    DEFAULT_BASE,
    MANIFEST,
    MIN_ONNXRUNTIME,
    MODEL,
    SCHEMA,
    TOKENIZER,
    describe_contents,
    describe_files,
    distinct,
    lora_differs,
    manifest_bytes,
    new_folder,
    write_head,
    write_json,
)
from client.runtime.chat import read_chat
from client.runtime.generation import Generator, bind_generator, check_known_answer, open_generator
from client.runtime.language import LanguageBase, lm_base_id, open_lm_base, read_prefix
from client.runtime.parity import PRECISIONS, Parity, check_precision
from client.runtime.runtime import MAX_TOLERANCE, identity
from shared.errors import HeadError

Logits = Callable[[np.ndarray], np.ndarray]  # token ids (1, T) int64 -> logits (1, T, V)

TOLERANCE = 1e-3  # largest absolute difference of a logit between torch and ONNX Runtime, in fp32
REL_RMS, HEAD_REL_RMS = 0.1, 0.2  # of the logits in 8 bits: the base's alone, and with an adapter
GREEDY_TOKENS, HEAD_GREEDY_TOKENS = 32, 4  # of an answer that torch must give too: the base's, and with an adapter
_HEAD_PROBES, _PROBE_TOKENS = 3, 24  # what a head is compared on; its base was, on every text, at its own export
_KNOWN_TEXT = "The film begins in a small town. I liked it because"  # public: it goes into every manifest
_KNOWN_PLACES = 8  # logits in a known answer
_MIN_EFFECT = 1e-3  # an adapter that changes less cannot be told from another machine's rounding


def export_lm_base(
    model_folder: Path,
    folder: Path,
    *,
    base_sha256: str,
    blocks: Sequence[int],
    targets: Sequence[str],
    max_tokens: int,
    probe_texts: Sequence[str],
    logits: Logits | None = None,
    template: str = "{text}",
    cache: Path | None = None,
    precision: str = "fp32",
) -> dict[str, Any]:
    """Write the fleet's language model: one ONNX graph with a key-value cache and empty LoRA slots.

    Args:
        model_folder: The model in the hub's layout, weights in one ``model.safetensors``.
        folder: Replaced as a whole at the end, or left as it was.
        base_sha256: Hash of the frozen base, as the campaign's policy names it.
        blocks: Absolute numbers of the blocks that get LoRA slots.
        targets: Linear layers of a block that get slots, such as ``self_attn.q_proj``.
        max_tokens: Prompt and answer together; at most what the model knows positions for.
        probe_texts: At least 16 different texts; they are compared and not written.
        logits: The reference; by default the model as transformers loads it.
        template: What devices put around a prompt, at ``{text}``, as in training; not around the probe texts.
        cache: Folder of finished graphs; one made before from the same base and slots is used again.
        precision: ``fp32``, or ``int8`` for products in 8 bits.

    Returns:
        The manifest as written.

    Raises:
        HeadError: A block or target does not exist, the graph cannot be built or is too large, empty slots change its
            outputs, or torch and ONNX Runtime differ. The folder is left as it was.

    Guarantee:
        With no adapter the logits of an fp32 base equal those of the graph without slots bit for bit on the probe
        texts.
    """
    check_precision(precision)
    probes = distinct(probe_texts)
    shape, positions = read_cache_shape(model_folder)
    if not 1 <= max_tokens <= positions:
        raise HeadError(f"max_tokens must be between 1 and the model's {positions} positions, got {max_tokens}.")
    if template.count("{text}") != 1:
        raise HeadError(f"template must hold {{text}} exactly once, got {template!r}.")
    layers = slot_layers(model_folder, blocks, targets)
    key = lm_graph_key(base_sha256, list(layers), precision)
    model = read_graph(cache, key)
    if model is None:
        token_ids = _encode(model_folder / TOKENIZER, probes, max_tokens)
        model = build_lm_graph(model_folder, layers, token_ids=token_ids, precision=precision)
        store_graph(cache, key, model)
    with new_folder(folder) as new:
        (new / MODEL).write_bytes(model)
        shutil.copyfile(model_folder / TOKENIZER, new / TOKENIZER)
        manifest: dict[str, Any] = {
            "schema": SCHEMA,
            "kind": "lm-base",
            "base_sha256": base_sha256,
            "files": describe_files(new, MODEL, TOKENIZER),
            "tokenizer": {
                "max_tokens": max_tokens,
                "stop_ids": read_stop_ids(model_folder),
                "template": template,
                **read_chat(model_folder),
            },
            "slots": list_slots(layers),
            "cache": {"layers": shape.layers, "heads": shape.heads, "width": shape.width},
            "quant": PRECISIONS[precision],
            "onnx": graph_format(model),
            "runtime": {"onnxruntime": MIN_ONNXRUNTIME},
        }
        del model
        manifest["id"] = lm_base_id(manifest)
        write_json(new / MANIFEST, manifest)
        bare = open_generator(new)
        manifest["parity"] = _compare(bare, logits or torch_logits(model_folder), probes)
        write_json(new / MANIFEST, manifest)
    return manifest


def build_lm_head(
    *,
    base_folder: Path | LanguageBase,
    base_sha256: str,
    lora: Mapping[str, np.ndarray],
    scaling: float,
    logits: Logits,
    user: str,
    privacy: Mapping[str, object],
    probe_texts: Sequence[str],
    created: datetime,
    prefix: Mapping[str, np.ndarray] | None = None,
    sequence: int = 0,
    expires: datetime | None = None,
) -> dict[str, bytes]:
    """Make one user's adapter for an exported language model, and prove that the device computes what torch does.

    Args:
        base_folder: What ``export_lm_base`` wrote, or that opened, which many exports can share.
        base_sha256: Hash of the frozen base the adapter was trained on.
        lora: Wire name (``block.<n>.<target>.lora_A`` (r, K) and ``.lora_B`` (N, r)) -> float32 array.
        scaling: The factor of B @ A in training.
        logits: The reference in torch, with this adapter.
        user: The user's id, written to the manifest.
        privacy: What left the device before, written as given.
        probe_texts: At least 16 different texts, of which three are compared; none is written.
        created: Time of the export, written to the manifest.
        prefix: Keys and values of soft tokens with this adapter (``client.export.soft_prompt.soft_prefix``).
        sequence: Of the home's heads, counting up; 0 for a head of no home.
        expires: From when on a home takes it no more; None for a head of no home.

    Returns:
        The files of the head by name; nothing of them has been on disk.

    Raises:
        HeadError: The base does not fit the adapter, logits or greedy answers differ from torch's, or the adapter has
            no effect although its tensors say otherwise.

    Guarantee:
        The device's own runtime, reading these very bytes, agrees with torch: on the known text, 24 tokens of three
        texts after it, four that it then chooses through its cache, and the known answer. What no adapter touches was
        proven on all texts at the base's own export.
    """
    probes = distinct(probe_texts)
    base = base_folder if isinstance(base_folder, LanguageBase) else open_lm_base(base_folder)
    tensors = slot_tensors(lora, scaling=scaling) | dict(sorted((prefix or {}).items()))
    content = save(tensors)
    manifest: dict[str, Any] = {
        **head_manifest("lm-adapter", user=user, privacy=privacy, created=created, sequence=sequence, expires=expires),
        "base": {**identity(base), "base_sha256": base_sha256, "folder": DEFAULT_BASE},
        "files": describe_contents({ADAPTER: content}),
        "rank": max((array.shape[1] for name, array in tensors.items() if name.endswith(".A")), default=0),
        "slots": [describe_slot(name, array.shape) for name, array in tensors.items()],
    }
    personal = bind_generator({ADAPTER: content, MANIFEST: manifest_bytes(manifest)}, base)
    manifest["parity"], manifest["known_answer"] = _compare_head(personal, logits, probes)
    files = {ADAPTER: content, MANIFEST: manifest_bytes(manifest)}
    check_known_answer(Path("head in memory"), bind_generator(files, base))
    return files


def export_lm_head(
    folder: Path,
    *,
    base_folder: Path | LanguageBase,
    base_sha256: str,
    lora: Mapping[str, np.ndarray],
    scaling: float,
    logits: Logits,
    user: str,
    privacy: Mapping[str, object],
    probe_texts: Sequence[str],
    created: datetime,
    prefix: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """Write the head that ``build_lm_head`` makes of the same arguments, in plain and unsigned, into a folder.

    Args:
        folder: Replaced as a whole at the end, or left as it was; the base's sibling by convention.

    Returns:
        The manifest as written.

    Raises:
        HeadError: As ``build_lm_head``, or the folder holds something else. The folder is left as it was.
    """
    with new_folder(folder) as new:
        files = build_lm_head(
            base_folder=base_folder,
            base_sha256=base_sha256,
            lora=lora,
            scaling=scaling,
            logits=logits,
            user=user,
            privacy=privacy,
            probe_texts=probe_texts,
            created=created,
            prefix=prefix,
        )
        write_head(new, files)
    return dict(json.loads(files[MANIFEST]))


def bound_arrays(
    base: LanguageBase,
    lora: Mapping[str, np.ndarray],
    *,
    scaling: float,
    prefix: Mapping[str, np.ndarray],
    user: str | None = None,
) -> Generator:
    """A generator over tensors in memory, without a head file: what a simulation answers with, unchecked by torch."""
    soft = read_prefix(Path("adapter in memory"), prefix, base.cache)
    return Generator(user, base, slot_tensors(lora, scaling=scaling), {}, soft)


def slot_tensors(lora: Mapping[str, np.ndarray], *, scaling: float) -> dict[str, np.ndarray]:
    """Wire names -> slots: LoRA transposed to x @ A @ B, its scaling in B.

    Raises:
        HeadError: A name is not of a LoRA factor.

    Example:
        >>> found = slot_tensors({"block.3.mlp.up_proj.lora_B": np.ones((5, 2), np.float32)}, scaling=4.0)
        >>> {name: (array.shape, array.max().item()) for name, array in found.items()}
        {'lora.block.3.mlp.up_proj.B': ((2, 5), 4.0)}
    """
    tensors = {}
    for name, array in lora.items():
        layer, _, factor = name.rpartition(".lora_")
        if not layer.startswith("block.") or factor not in ("A", "B"):
            raise HeadError(f"an adapter must hold block.<n>.<layer>.lora_A and lora_B, got {name!r}.")
        scale = np.float32(scaling if factor == "B" else 1.0)
        tensors[f"lora.{layer}.{factor}"] = np.ascontiguousarray(array.T, dtype=np.float32) * scale
    return dict(sorted(tensors.items()))


def torch_logits(model_folder: Path) -> Logits:
    """The model's own logits, as transformers computes them in float32 without an adapter."""
    import torch
    from transformers import LlamaForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    loader: Any = LlamaForCausalLM
    model = loader.from_pretrained(model_folder, local_files_only=True, dtype=torch.float32).eval()

    @torch.inference_mode()
    def logits(token_ids: np.ndarray) -> np.ndarray:
        found: np.ndarray = model(input_ids=torch.from_numpy(token_ids)).logits.numpy()
        return found

    return logits


def _compare(bare: Generator, logits: Logits, probes: Sequence[str]) -> dict[str, Any]:
    """The base in the device's runtime against torch, text by text and then token by token, or HeadError."""
    base = bare.base
    texts = [ids[: base.max_tokens] for ids in map(base.tokens, probes) if ids]
    parity = Parity("the logits of the probe texts", precision=base.precision, max_abs=TOLERANCE, rel_rms=REL_RMS)
    for ids in texts:
        parity.add(bare.logits(ids), _reference(logits, ids))
    longest = max(texts, key=len, default=[])[: max(0, base.max_tokens - GREEDY_TOKENS)]
    answer = _compare_answer(bare, logits, longest, parity, count=GREEDY_TOKENS) if longest else None
    return _described(parity, len(texts), answer, base)


def _compare_head(personal: Generator, logits: Logits, probes: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parity and known answer of a head, from one run of torch, or HeadError."""
    base = personal.base
    known = base.tokens(_KNOWN_TEXT)[: personal.room]
    chosen = probes[:: max(1, len(probes) // _HEAD_PROBES)][:_HEAD_PROBES]
    row = [*known, *[token for text in chosen for token in base.tokens(text)][:_PROBE_TOKENS]]
    room = personal.room - HEAD_GREEDY_TOKENS
    count = HEAD_GREEDY_TOKENS if room >= len(known) else 0
    parity = Parity("the logits of the probe texts", precision=base.precision, max_abs=TOLERANCE, rel_rms=HEAD_REL_RMS)
    answer = _compare_answer(personal, logits, row[: room if count else personal.room], parity, count=count)
    after = len(known) - 1
    # Torch's word in fp32; the runtime's own on a base of 8 bits, which is further from torch than from itself.
    said = (answer.wanted if base.precision == "fp32" else answer.found)[after].astype(np.float64)
    return _described(parity, len(chosen), answer, base), _known_answer(personal, known, said)


@dataclass(frozen=True)
class _Compared:
    """Logits (T, V) of a prompt by the device's runtime, by torch those of the answer too; and the answer's length."""

    found: np.ndarray
    wanted: np.ndarray
    tokens: int


def _compare_answer(
    generator: Generator, logits: Logits, prompt: Sequence[int], parity: Parity, *, count: int
) -> _Compared:
    """A prompt, and tokens chosen one by one through the cache, against torch, or HeadError."""
    base, answer = generator.base, list[int]()
    found, cache = base.run(prompt, generator.start(), adapter=generator.adapter)
    rows = [found]
    for _ in range(count):
        answer.append(int(rows[-1][-1].argmax()))
        if len(answer) < count:
            found, cache = base.run(answer[-1:], cache, adapter=generator.adapter)
            rows.append(found)
    # Torch reads prompt and answer at once; by induction its own greedy answer is the same where each choice is.
    wanted = _reference(logits, [*prompt, *answer[:-1]])
    parity.add(np.concatenate(rows), wanted)
    if base.precision == "fp32" and answer != wanted[len(prompt) - 1 :].argmax(1).tolist()[:count]:
        raise HeadError(
            f"ONNX Runtime and torch must choose the same {count} greedy tokens, got others with "
            f"logits within {TOLERANCE}; nothing was written. Choose other probe texts if two are as likely."
        )
    return _Compared(rows[0], wanted, count)


def _described(parity: Parity, texts: int, answer: _Compared | None, base: LanguageBase) -> dict[str, Any]:
    equal = answer.tokens if answer and base.precision == "fp32" else 0
    return {"n_probes": texts, **parity.described(), "greedy_tokens": equal}


def _known_answer(generator: Generator, token_ids: list[int], personal: np.ndarray) -> dict[str, Any]:
    """Logits (V,) with the adapter where it changes them most, and the base's without it."""
    base = generator.base
    bare = base.run(token_ids, base.cache.empty(), adapter={})[0][-1].astype(np.float64)
    change = np.abs(personal - bare)
    effect = float(change.max())
    if generator.prefix:  # a device that leaves only them out must find another answer too
        hard = base.run(token_ids, base.cache.empty(), adapter=generator.adapter)[0][-1]
        effect = min(effect, float(np.abs(personal - hard)[_most(change)].max()))
    active = bool(generator.prefix) or lora_differs(generator.adapter)
    if active and not effect >= _MIN_EFFECT:
        raise HeadError(
            f"the adapter must change a logit of the known text by at least {_MIN_EFFECT}, got {effect:.2g}; nothing "
            "was written. Its tensors are too small, or the reference ignores them."
        )
    places = _most(change)
    return {
        "token_ids": token_ids,
        "places": places.tolist(),
        "logits": personal[places].tolist(),
        "without_adapter": bare[places].tolist(),
        "tolerance": min(MAX_TOLERANCE[base.precision], effect / 4) if active else MAX_TOLERANCE[base.precision],
    }


def _most(change: np.ndarray) -> np.ndarray:
    """Where a known answer is taken."""
    return np.argsort(-change, kind="stable")[:_KNOWN_PLACES]


def _reference(logits: Logits, token_ids: Sequence[int]) -> np.ndarray:
    """Torch's logits (T, V)."""
    found: np.ndarray = logits(np.asarray([token_ids], dtype=np.int64))[0]
    return found


def _encode(tokenizer: Path, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    from tokenizers import Tokenizer

    read = Tokenizer.from_file(str(tokenizer))
    read.no_padding()
    read.no_truncation()
    encodings = read.encode_batch(list(texts), add_special_tokens=False)
    return [encoding.ids[:max_tokens] for encoding in encodings if encoding.ids]
