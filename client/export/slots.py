"""Slots in an ONNX graph: optional inputs that take a user's LoRA and are empty without; and a cache of such graphs."""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from shared.errors import HeadError

_MAX_MODEL_BYTES = 2**31 - 2**20  # a protobuf message ends at 2 GiB


def lora_slot(block: int, target: str) -> str:
    """Name of a layer's pair of slots; its inputs are this with ``.A`` and ``.B``."""
    return f"lora.block.{block}.{target}"


def describe_slot(name: str, shape: Sequence[int | str]) -> dict[str, Any]:
    """A slot or its tensor as manifests list it."""
    return {"name": name, "shape": list(shape), "dtype": "float32"}


def lora_nodes(product: onnx.NodeProto, slot: str) -> list[onnx.NodeProto]:
    """What follows a layer's product, which is changed to feed it, so that x @ A @ B is added."""
    out = product.output[0]
    product.output[0] = f"{slot}.base"
    return [
        helper.make_node("MatMul", [product.input[0], f"{slot}.A"], [f"{slot}.xA"]),
        helper.make_node("MatMul", [f"{slot}.xA", f"{slot}.B"], [f"{slot}.xAB"]),
        helper.make_node("Add", [f"{slot}.base", f"{slot}.xAB"], [out]),
    ]


def check_found(done: Sequence[str], slots: Iterable[str]) -> None:
    """Raise HeadError unless every slot found exactly one product."""
    wrong = sorted(slot for slot in slots if done.count(slot) != 1)
    if wrong:
        raise HeadError(
            f"every slot must find its one product in the graph, got none or several for {', '.join(wrong)}; "
            "the installed exporter makes another graph."
        )


def add_optional_input(graph: onnx.GraphProto, slot: Mapping[str, Any], *, fill: float = 0.0) -> None:
    """An input with a default, whose ranks are 0 where they are names."""
    default = np.full([0 if isinstance(size, str) else size for size in slot["shape"]], fill, dtype=np.float32)
    graph.input.append(helper.make_tensor_value_info(slot["name"], TensorProto.FLOAT, slot["shape"]))
    graph.initializer.append(numpy_helper.from_array(default, slot["name"]))


def check_size(graph: onnx.ModelProto) -> None:
    """Raise HeadError unless the graph fits one file."""
    if not graph.ByteSize() < _MAX_MODEL_BYTES:
        raise HeadError(
            f"the base must fit one ONNX file of 2 GiB, got {graph.ByteSize() / 2**30:.1f} GiB; use a smaller base."
        )


def check_unchanged(before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> None:
    """Raise HeadError unless the outputs without slots and with empty ones are the same bits."""
    if not all(np.array_equal(a, b) for a, b in zip(before, after, strict=True)):
        raise HeadError(
            "empty slots must not change the base's outputs, but they do in the last bits on this machine; "
            "nothing was written. Please report it with your onnxruntime version."
        )


def strip_metadata(model: onnx.ModelProto) -> None:
    """Remove what the exporter notes on the side: its stack traces name files and folders of this machine."""
    graph = model.graph  # its value_info stays: without those shapes ONNX Runtime fuses fewer nodes
    values = (*graph.input, *graph.output, *graph.value_info)
    for item in (model, graph, *graph.node, *graph.initializer, *values):
        del item.metadata_props[:]
        item.doc_string = ""


def graph_format(model: bytes) -> dict[str, Any]:
    """What a runtime must understand to open the model."""
    graph = onnx.load_model_from_string(model)
    return {"opset": graph.opset_import[0].version, "ir": graph.ir_version}


def read_graph(cache: Path | None, key: str) -> bytes | None:
    """A graph made before, or None where there is none or its bytes are not those that were stored."""
    if cache is None:
        return None
    try:
        wanted = (cache / f"{key}.sha256").read_text(encoding="ascii")
        model = (cache / f"{key}.onnx").read_bytes()
    except OSError:
        return None
    return model if hashlib.sha256(model).hexdigest() == wanted else None


def store_graph(cache: Path | None, key: str, model: bytes) -> None:
    """Keep a graph under its key, the hash last, so that an interrupted write is no entry."""
    if cache is None:
        return
    cache.mkdir(parents=True, exist_ok=True)
    for name, content in (
        (f"{key}.onnx", model),
        (f"{key}.sha256", hashlib.sha256(model).hexdigest().encode()),
    ):
        temporary = cache / f".{name}.{os.getpid()}"
        temporary.write_bytes(content)
        temporary.replace(cache / name)
