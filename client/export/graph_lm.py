"""A causal language model as one ONNX graph with a key-value cache and empty LoRA slots.

The graph is made by the model builder of onnxruntime-genai, in a process of its own, and runs in plain onnxruntime, in
float32 or with its products in 8 bits. For
SmolLM2-135M on one thread it took 12 s and 1.1 GB where ``torch.onnx.export`` of the same model with flat caches took
185 s and 4.4 GB, with the same logits to 1.2e-4, the same greedy tokens, and 20 instead of 17 tokens a second.
"""

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from safetensors import safe_open

from client.export.slots import (
    add_optional_input,
    check_found,
    check_size,
    check_unchanged,
    describe_slot,
    lora_nodes,
    lora_slot,
    strip_metadata,
)
from client.runtime.artifact import MODEL
from client.runtime.language import CacheShape, run_step
from client.runtime.parity import PRECISIONS
from client.runtime.session import open_session
from shared.errors import HeadError

_GRAPH_VERSION = 2  # raise when the graph this module makes changes: it names the cached graphs
_NODE = re.compile(r"/model/layers\.(\d+)/(attn|mlp)/(\w+)/MatMul(_Q8)?$")
_PARTS = {"attn": "self_attn", "mlp": "mlp"}  # the builder's names -> the model's


@dataclass(frozen=True)
class Layer:
    """A linear layer of a block: its name in the model's file, and sizes."""

    weight: str
    inputs: int
    outputs: int


def read_cache_shape(folder: Path) -> tuple[CacheShape, int]:
    """Shape of the key-value cache, and how many positions the model knows, from its ``config.json``.

    Raises:
        HeadError: The builder's fused attention cannot run such a model.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    heads = int(config["num_attention_heads"])
    width = int(config.get("head_dim") or config["hidden_size"] // heads)
    if width % 16:
        raise HeadError(
            f"the width of an attention head must be a multiple of 16 for onnxruntime, got {width}; "
            "use another base model."
        )
    shape = CacheShape(int(config["num_hidden_layers"]), int(config.get("num_key_value_heads") or heads), width)
    return shape, int(config["max_position_embeddings"])


def read_stop_ids(folder: Path) -> list[int]:
    """The tokens that end an answer, as the model's own files say; the pad token, often the same, is none by itself."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        if found is not None:
            return sorted(found) if isinstance(found, list) else [int(found)]
    return []


def slot_layers(folder: Path, blocks: Sequence[int], targets: Sequence[str]) -> dict[str, Layer]:
    """Slot -> the linear layer it belongs to, from the header of ``model.safetensors``.

    Raises:
        HeadError: A block does not exist, or a target is no linear layer of it.
    """
    num_blocks = read_cache_shape(folder)[0].layers
    found = {}
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        for number in sorted(set(blocks)):
            if not 0 <= number < num_blocks:
                raise HeadError(f"blocks must lie between 0 and {num_blocks - 1} for this base, got {number}.")
            block = f"model.layers.{number}."
            linear = {n.removeprefix(block).removesuffix(".weight") for n in names if n.startswith(block)}
            linear = {n for n in linear if n.partition(".")[0] in _PARTS.values() and not n.endswith("bias")}
            for target in sorted(set(targets)):
                if target not in linear:
                    known = ", ".join(sorted(linear))
                    raise HeadError(f"targets must name linear layers of a block ({known}), got {target!r}.")
                outputs, inputs = file.get_slice(f"{block}{target}.weight").get_shape()
                found[lora_slot(number, target)] = Layer(f"{block}{target}.weight", inputs, outputs)
    return found


def list_slots(layers: Mapping[str, Layer]) -> list[dict[str, Any]]:
    """Every optional input. One rank symbol per layer: ONNX Runtime plans equal sizes for a shared one."""
    return [
        describe_slot(f"{slot}.{part}", shape)
        for slot, layer in layers.items()
        for part, shape in (("A", (layer.inputs, f"rank.{slot}")), ("B", (f"rank.{slot}", layer.outputs)))
    ]


def build_lm_graph(
    folder: Path, layers: Mapping[str, Layer], *, token_ids: Sequence[Sequence[int]], precision: str = "fp32"
) -> bytes:
    """Have the graph built, put the slots in, and show that they change nothing while they are empty.

    In 8 bits they may; see ``client.export.graph.build_graph``.

    Args:
        folder: The model in the hub's layout.
        layers: What ``slot_layers`` found.
        token_ids: Texts on which both graphs are compared.
        precision: ``fp32`` or ``int8``.

    Raises:
        HeadError: The builder is missing or fails, a slot finds no product, the graph is too large for one file, or
            the slots change its outputs.
    """
    shape, _ = read_cache_shape(folder)
    with tempfile.TemporaryDirectory(prefix="sottovoce-graph-") as scratch:
        plain = _run_builder(folder, Path(scratch), precision)
        before = _logits(plain, shape, token_ids) if precision == "fp32" else None
        graph = onnx.load(plain)
    _insert_slots(graph, folder, layers)
    _fix_cache_width(graph.graph, shape)
    strip_metadata(graph)
    check_size(graph)
    slotted: bytes = graph.SerializeToString()
    del graph
    if before is not None:
        check_unchanged(before, _logits(slotted, shape, token_ids))
    return slotted


def lm_graph_key(base_sha256: str, slots: Sequence[str], precision: str) -> str:
    """Names a graph by all that decides its bytes."""
    versions = [version(name) for name in ("torch", "transformers", "onnx", "onnxruntime-genai")]
    decisive = ["lm", _GRAPH_VERSION, versions, base_sha256, list(slots), PRECISIONS[precision]]
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:24]


def check_builder() -> None:
    """Raise HeadError where the builder is not installed."""
    if importlib.util.find_spec("onnxruntime_genai") is None:
        raise HeadError(
            "exporting a language model needs the package onnxruntime-genai, which is not installed; "
            'run: pip install "sottovoce[train]".'
        )


def _run_builder(folder: Path, scratch: Path, precision: str) -> Path:
    """The plain graph, its weights in a file beside it."""
    check_builder()
    command = [sys.executable, "-P", "-m", "onnxruntime_genai.models.builder"]
    where = ["-i", str(folder.resolve()), "-o", str(scratch / "built"), "-c", str(scratch / "hub")]
    extra = ["fuse_qkv=false"]  # else q, k and v are one product
    if precision == "int8":
        scheme = PRECISIONS[precision]
        extra += [f"int4_accuracy_level={scheme['accuracy_level']}", f"int4_block_size={scheme['block']}"]
    how = ["-p", precision, "-e", "cpu", "--extra_options", *extra]
    done = subprocess.run(
        [*command, *where, *how],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    model = scratch / "built" / MODEL
    if done.returncode != 0 or not model.is_file():
        last = ([line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no word"])[-1]
        raise HeadError(f"onnxruntime-genai must be able to build the graph of {folder}, got: {last[:300]}")
    return model


def _insert_slots(model: onnx.ModelProto, folder: Path, layers: Mapping[str, Layer]) -> None:
    """Add x @ A @ B beside every layer's product, in place; the product's weights must be the layer's."""
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes, done = [], []
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for node in graph.node:
            nodes.append(node)
            match = _NODE.match(node.name)
            slot = lora_slot(int(match[1]), f"{_PARTS[match[2]]}.{match[3]}") if match else ""
            if slot not in layers or node.input[1] not in weights:
                continue
            if node.op_type == "MatMul":
                wanted = file.get_tensor(layers[slot].weight).float().numpy().T  # (K, N)
                same = np.array_equal(numpy_helper.to_array(weights[node.input[1]]), wanted)
            else:  # in 8 bits the sizes must do; what the layer computes is compared with torch at the end
                sizes = {item.name: item.i for item in node.attribute}
                wanted_sizes = (layers[slot].inputs, layers[slot].outputs, 8)
                same = node.op_type == "MatMulNBits" and (sizes["K"], sizes["N"], sizes["bits"]) == wanted_sizes
            if same:
                nodes += lora_nodes(node, slot)
                done.append(slot)
    check_found(done, layers)
    del graph.node[:]
    graph.node.extend(nodes)
    for item in list_slots(layers):
        add_optional_input(graph, item)


def _fix_cache_width(graph: onnx.GraphProto, shape: CacheShape) -> None:
    """Write the width of a head where the builder leaves a name."""
    for value in (*graph.input, *graph.output):
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.shape.dim[3].dim_value = shape.width


def _logits(model: Path | bytes, shape: CacheShape, token_ids: Sequence[Sequence[int]]) -> list[np.ndarray]:
    session = open_session(model, threads=1)
    return [run_step(session, shape, ids, shape.empty(), adapter={})[0] for ids in token_ids]
