"""Write personal heads: one ONNX base with empty slots for the whole fleet, and one small adapter per user.

    base/    model.onnx  tokenizer.json  manifest.json         once per fleet, nothing personal in it
    <user>/  adapter.safetensors  manifest.json                personal data; fills the slots of the base

A slot is an optional input of the graph whose default has rank 0, so that the base alone computes exactly
what it did before the slots were put in. Nothing takes its place before the device's own runtime has run it,
from the written files, and agreed with torch: value by value in fp32, in the mean on a base of 8 bits.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from client.export.graph import build_graph, graph_key, list_slots, slot_layers
from client.export.graph_kernel import KernelTerm
from client.export.slots import describe_slot, graph_format, lora_slot, read_graph, store_graph
from client.runtime.artifact import (
    ADAPTER,
    DEFAULT_BASE,
    MANIFEST,
    MIN_ONNXRUNTIME,
    MODEL,
    PERSONAL_NOTE,
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
from client.runtime.memory import Memory
from client.runtime.parity import PRECISIONS, Parity, check_precision
from client.runtime.runtime import (
    KERNEL_SLOT,
    MAX_TOLERANCE,
    FleetBase,
    PersonalHead,
    base_id,
    bind_head,
    check_known_answer,
    identity,
    open_base,
    output_differs,
)
from shared.config import TaskConfig
from shared.errors import HeadError
from shared.heads.output import OutputLayer, pooled_features
from shared.heads.rating import RatingHead
from shared.heads.tagging import TaggingHead
from shared.models.features import compute_features
from shared.models.model import Base

TOLERANCE = 1e-5  # largest absolute difference between torch and ONNX Runtime, in fp32
KERNEL_TOLERANCE = 1e-4  # with kernel features or a memory: what is narrow magnifies the last bits of a cosine
REL_RMS = 0.05  # of the pooled features on a base of 8 bits
HEAD_REL_RMS = 0.2  # of how far predictions lie from the centre, on a base of 8 bits
_KNOWN_TEXTS = (  # public: their tokens go into every manifest
    "The film begins in a small town. I liked it because",
    "Comedy, Romance",
    "An old map, a new boat and too little bread.",
)

_MAX_SCORE = 1e6  # of a ranking


def export_base(
    base: Base,
    folder: Path,
    *,
    blocks: Sequence[int],
    targets: Sequence[str],
    max_tokens: int,
    task: TaskConfig,
    probe_texts: Sequence[str],
    cache: Path | None = None,
    precision: str = "fp32",
    kernel: KernelTerm | None = None,
) -> dict[str, Any]:
    """Write the fleet's base: the whole model as one ONNX graph with empty slots.

    Args:
        base: The frozen base of the campaign.
        folder: Replaced as a whole at the end, or left as it was.
        blocks: Absolute numbers of the blocks that get LoRA slots; none for a linear head.
        targets: Linear layers of a block that get slots, as ``adapter.targets``.
        max_tokens: Texts are cut after so many tokens.
        task: Scale of the predictions, or their labels; without an adapter the base predicts the scale's centre, or
            logits of zero.
        probe_texts: At least 16 different texts; they are compared and not written.
        cache: Folder of finished graphs; one made before from the same base and settings is used again.
        precision: ``fp32``, or ``int8`` for weights in 8 bits.
        kernel: Of the campaign's heads, where they have one; its slot then takes a weight for each public text.

    Returns:
        The manifest as written.

    Raises:
        HeadError: A block or target does not exist, the graph is too large, empty slots change its outputs,
            or torch and ONNX Runtime differ. The folder is left as it was.

    Guarantee:
        With no adapter ``pooled`` of an fp32 base equals that of the graph without slots bit for bit on the probe
        texts, and every prediction is the centre.
    """
    check_precision(precision)
    probes = distinct(probe_texts)
    token_ids = base.tokenize(probes, max_tokens=max_tokens)
    layers = slot_layers(base, blocks, targets)
    outputs = len(task.labels) if task.name == "tagging" else 1
    centre = task.centre if task.name == "rating" else 0.0
    key = graph_key(base, list(layers), max_tokens, centre, precision, kernel, outputs=outputs)
    model = read_graph(cache, key)
    if model is None:
        model = build_graph(
            base,
            layers,
            max_tokens=max_tokens,
            centre=centre,
            token_ids=token_ids,
            precision=precision,
            kernel=kernel,
            outputs=outputs,
        )
        store_graph(cache, key, model)
    with new_folder(folder) as new:
        (new / MODEL).write_bytes(model)
        shutil.copyfile(base.folder / "tokenizer.json", new / TOKENIZER)
        manifest: dict[str, Any] = {
            "schema": SCHEMA,
            "kind": "base",
            "base_sha256": base.sha256,
            "files": describe_files(new, MODEL, TOKENIZER),
            "tokenizer": {"max_tokens": max_tokens},
            "slots": list_slots(base.hidden_size, layers, kernel, outputs=outputs),
            "task": _describe_task(task),
            "quant": PRECISIONS[precision],
            "onnx": graph_format(model),
            "runtime": {"onnxruntime": MIN_ONNXRUNTIME},
        }
        manifest["id"] = base_id(manifest)
        write_json(new / MANIFEST, manifest)
        pooled, predictions = open_base(new).run(probes)
        wanted = compute_features(base, probes, head_blocks=0, max_tokens=max_tokens)
        parity = Parity("the probe texts", precision=precision, max_abs=TOLERANCE, rel_rms=REL_RMS)
        parity.add(pooled, np.stack([wanted.batch([row])[0][0, 0].numpy() for row in range(len(probes))]))
        if not (predictions == np.float32(centre)).all():
            raise HeadError(
                f"the base without adapter must predict {centre} for every text, "
                f"got {predictions.tolist()[:3]}; this is a fault of the export, please report it."
            )
        manifest["parity"] = {"n_probes": len(probes), **parity.described()}
        write_json(new / MANIFEST, manifest)
    return manifest


def _describe_task(task: TaskConfig) -> dict[str, Any]:
    if task.name == "tagging":
        return {"name": task.name, "labels": list(task.labels)}
    if task.name == "ranking":  # scores have no scale; ends that none comes near clip nothing
        return {"name": task.name, "low": -_MAX_SCORE, "high": _MAX_SCORE, "centre": 0.0}
    return {"name": task.name, "low": task.low, "high": task.high, "centre": task.centre}


def build_head(
    *,
    base_folder: Path | FleetBase,
    head: RatingHead | TaggingHead,
    output: OutputLayer,
    user: str,
    privacy: Mapping[str, object],
    probe_texts: Sequence[str],
    created: datetime,
    sequence: int = 0,
    expires: datetime | None = None,
    memory: Memory | None = None,
) -> dict[str, bytes]:
    """Make one user's adapter for an exported base, and prove that the device computes what torch does.

    Args:
        base_folder: What ``export_base`` wrote for this head's base, with slots for its blocks and targets; or that
            opened, which many exports can share.
        head: Holds the LoRA; its output layer is not read.
        output: Of the predictions before clipping.
        user: The user's id, written to the manifest.
        privacy: What left the device before, written as given.
        probe_texts: At least 16 different texts; they are compared and not written.
        created: Time of the export, written to the manifest.
        sequence: Of the home's heads, counting up; 0 for a head of no home.
        expires: From when on a home takes it no more; None for a head of no home.
        memory: Of the user's own records; its texts go into the manifest where the retriever compares words.

    Returns:
        The files of the head by name; nothing of them has been on disk.

    Raises:
        HeadError: The base does not fit the head, the predictions are further from torch's than the base's precision
            allows, or the adapter has no effect although its tensors say otherwise.

    Guarantee:
        The device's own runtime, reading these very bytes, agrees with torch on every probe text.
    """
    probes = distinct(probe_texts)
    fleet = base_folder if isinstance(base_folder, FleetBase) else open_base(base_folder)
    tensors = _adapter_tensors(head, output)
    lora = {name: array for name, array in tensors.items() if name.startswith("lora.")}
    kept = tensors | (memory.tensors() if memory else {})
    content = save(kept)
    manifest: dict[str, Any] = {
        **head_manifest("adapter", user=user, privacy=privacy, created=created, sequence=sequence, expires=expires),
        "base": {**identity(fleet), "base_sha256": head.base[0].sha256, "folder": DEFAULT_BASE},
        "files": describe_contents({ADAPTER: content}),
        "rank": max((array.shape[1] for name, array in lora.items() if name.endswith(".A")), default=0),
        "slots": [describe_slot(name, array.shape) for name, array in kept.items()],
        **({"memory": memory.described()} if memory else {}),
    }
    personal = bind_head({ADAPTER: content, MANIFEST: manifest_bytes(manifest)}, fleet)
    texts = [*probes, *_KNOWN_TEXTS]
    wanted = _torch_pooled(head, fleet, texts)
    predictions = head.apply_output(wanted, output)
    found, bare = fleet.run(texts, adapter=tensors), fleet.run(texts)
    parity = _head_parity(
        fleet.precision,
        (found[0], personal.raw(texts)),
        (wanted, predictions + memory.correct(wanted, texts) if memory else predictions),
        head=head,
        magnified=bool(head.kernel or memory),
    )
    manifest["parity"] = {"n_probes": len(probes), **parity}
    _check_active(found[1], bare[1], active=_output_differs(tensors, head.centre), what="head")
    _check_active(found[0], bare[0], active=lora_differs(lora), what="LoRA")
    manifest["known_answer"] = _known_answer(personal, predictions[len(probes) :])
    files = {ADAPTER: content, MANIFEST: manifest_bytes(manifest)}
    check_known_answer(Path("head in memory"), bind_head(files, fleet))
    return files


def head_manifest(
    kind: str,
    *,
    user: str,
    privacy: Mapping[str, object],
    created: datetime,
    sequence: int,
    expires: datetime | None,
) -> dict[str, Any]:
    """What the manifests of all heads say first."""
    return {
        "schema": SCHEMA,
        "kind": kind,
        "user": user,
        "sequence": sequence,
        "created": created.isoformat(timespec="seconds"),
        "expires": None if expires is None else expires.isoformat(timespec="seconds"),
        "personal_data": PERSONAL_NOTE,
        "privacy": dict(privacy),
        "runtime": {"onnxruntime": MIN_ONNXRUNTIME},
    }


def export_head(
    folder: Path,
    *,
    base_folder: Path | FleetBase,
    head: RatingHead | TaggingHead,
    output: OutputLayer,
    user: str,
    privacy: Mapping[str, object],
    probe_texts: Sequence[str],
    created: datetime,
    memory: Memory | None = None,
) -> dict[str, Any]:
    """Write the head that ``build_head`` makes of the same arguments, in plain and unsigned, into a folder.

    Args:
        folder: Replaced as a whole at the end, or left as it was; the base's sibling by convention.

    Returns:
        The manifest as written.

    Raises:
        HeadError: As ``build_head``, or the folder holds something else. The folder is left as it was.
    """
    with new_folder(folder) as new:
        files = build_head(
            base_folder=base_folder,
            head=head,
            output=output,
            user=user,
            privacy=privacy,
            probe_texts=probe_texts,
            created=created,
            memory=memory,
        )
        write_head(new, files)
    return dict(json.loads(files[MANIFEST]))


def _torch_pooled(head: RatingHead | TaggingHead, fleet: FleetBase, texts: Sequence[str]) -> np.ndarray:
    """The reference (n, d) in torch, from the texts on."""
    max_tokens = int((fleet.tokenizer.truncation or {})["max_length"])  # open_base set it
    features = compute_features(head.base[0], texts, head_blocks=len(head.blocks), max_tokens=max_tokens)
    pooled: np.ndarray = pooled_features(head, features).astype(np.float64)
    return pooled


def _head_parity(
    precision: str,
    found: tuple[np.ndarray, np.ndarray],
    wanted: tuple[np.ndarray, np.ndarray],
    *,
    head: RatingHead | TaggingHead,
    magnified: bool,
) -> dict[str, Any]:
    """The device's features and predictions against torch's, or HeadError."""
    if precision != "fp32":
        gate = Parity("the features of the probe texts", precision=precision, max_abs=TOLERANCE, rel_rms=REL_RMS)
        gate.add(found[0], wanted[0])
        gate.described()
    max_abs = KERNEL_TOLERANCE if magnified else TOLERANCE
    gate = Parity("the probe texts", precision=precision, max_abs=max_abs, rel_rms=HEAD_REL_RMS)
    gate.add(found[1] - head.centre, wanted[1] - head.centre)
    return gate.described()


def _known_answer(personal: PersonalHead, wanted: np.ndarray) -> dict[str, Any]:
    """What the head predicts for public tokens: torch's word in fp32, the runtime's own on a base of 8 bits."""
    base = personal.base
    token_ids = base.encode(_KNOWN_TEXTS)
    answer = wanted if base.precision == "fp32" else base.run_tokens(token_ids, adapter=personal.adapter)[1]
    bare = base.run_tokens(token_ids)[1]
    effect = float(np.abs(answer - bare).max())
    limit = MAX_TOLERANCE[base.precision]
    return {
        "token_ids": token_ids,
        "predictions": answer.tolist(),
        "without_adapter": bare.tolist(),
        "tolerance": min(limit, effect / 4) if effect > 0 else limit,
    }


def _check_active(personal: np.ndarray, bare: np.ndarray, *, active: bool, what: str) -> None:
    """An adapter that should change something does, on at least one text."""
    if active and np.array_equal(personal, bare):
        raise HeadError(
            f"the {what}'s tensors must change the base's outputs on the probe texts, "
            "got the same to the last bit; nothing was written. "
            "The tensors are too small for float32, or the base ignores them."
        )


def _output_differs(tensors: Mapping[str, np.ndarray], centre: float) -> bool:
    return output_differs(tensors) or bool((tensors["output.bias"] != np.float32(centre)).any())


def _adapter_tensors(head: RatingHead | TaggingHead, output: OutputLayer) -> dict[str, np.ndarray]:
    """Slot name -> float32 array: LoRA transposed to x @ A @ B, its scaling in B; and the output layer."""
    outputs = head.output.out_features
    columns = [("output.weight", output.weight, head.base[0].hidden_size)]
    if head.kernel or output.kernel.size:
        columns.append((KERNEL_SLOT, output.kernel, len(head.kernel.anchors) if head.kernel else 0))
    tensors = {"output.bias": np.array(output.bias, dtype=np.float32).reshape(outputs)}
    for slot, column, size in columns:
        wanted = (size,) if outputs == 1 else (size, outputs)
        if column.shape != wanted:
            raise HeadError(f"{slot} must be folded from shape {wanted}, got {column.shape}.")
        tensors[slot] = np.ascontiguousarray(column.reshape(size, outputs), dtype=np.float32)
    for name, module in head.blocks.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        block, _, target = name.partition(".")
        a = module.lora_A["default"].weight.detach().numpy()  # (r, K)
        b = module.lora_B["default"].weight.detach().numpy()  # (N, r)
        scaling = np.float32(module.scaling["default"])
        slot = lora_slot(head.first_block + int(block), target)
        tensors[f"{slot}.A"] = np.ascontiguousarray(a.T)
        tensors[f"{slot}.B"] = np.ascontiguousarray(b.T * scaling)
    return dict(sorted(tensors.items()))
