"""The base as one ONNX graph with empty slots, traced by torch; in float32, or its weights in 8 bits."""

import ast
import contextlib
import hashlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from client.export.graph_kernel import KernelTerm
from client.export.quantize import quantize_weights
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
from client.runtime.parity import PRECISIONS
from client.runtime.runtime import KERNEL_SLOT
from client.runtime.session import open_session, run_session
from shared.errors import HeadError
from shared.models.model import Base

_OPSET = 20
_GRAPH_VERSION = 2  # raise when the graph this module makes changes: it names the cached graphs


def slot_layers(base: Base, blocks: Sequence[int], targets: Sequence[str]) -> dict[str, nn.Linear]:
    """Slot -> the linear layer it belongs to."""
    layers = {}
    for number in sorted(set(blocks)):
        if not 0 <= number < base.num_blocks:
            raise HeadError(f"blocks must lie between 0 and {base.num_blocks - 1} for this base, got {number}.")
        modules = dict(base.family.blocks(base.model)[number].named_modules())
        for target in sorted(set(targets)):
            layer = modules.get(target)
            if not isinstance(layer, nn.Linear):
                known = sorted(name for name, module in modules.items() if isinstance(module, nn.Linear))
                raise HeadError(f"targets must name linear layers of a block ({', '.join(known)}), got {target!r}.")
            layers[lora_slot(number, target)] = layer
    return layers


def list_slots(
    width: int, layers: Mapping[str, nn.Linear], kernel: KernelTerm | None = None, *, outputs: int = 1
) -> list[dict[str, Any]]:
    """Every optional input. One rank symbol per layer: ONNX Runtime plans equal sizes for a shared one."""
    found = [describe_slot("output.weight", (width, outputs)), describe_slot("output.bias", (outputs,))]
    if kernel:
        found.append(describe_slot(KERNEL_SLOT, (len(kernel.anchors), outputs)))
    for slot, layer in layers.items():
        rank = f"rank.{slot}"
        found += [
            describe_slot(f"{slot}.A", (layer.in_features, rank)),
            describe_slot(f"{slot}.B", (rank, layer.out_features)),
        ]
    return found


class PooledBase(nn.Module):
    """The whole base as one function of token ids (B, T) and mask (B, T)."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.base = (base,)
        self.model = base.model  # registered, so that the graph's nodes carry its modules' names

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Pooled features (B, d)."""
        (base,) = self.base
        return base.backbone(input_ids, attention_mask.bool(), head_blocks=0)[:, 0]  # (B, d)


def build_graph(
    base: Base,
    layers: Mapping[str, nn.Linear],
    *,
    max_tokens: int,
    centre: float,
    token_ids: Sequence[Sequence[int]],
    precision: str = "fp32",
    kernel: KernelTerm | None = None,
    outputs: int = 1,
) -> bytes:
    """Trace the base, put the slots in, and show that they change nothing while they are empty.

    In 8 bits they may: ONNX Runtime fuses the graph without slots otherwise, and each rounds activations at its places.
    The graph with slots is the one that the export then compares with torch.
    """
    graph = _trace(PooledBase(base), max_tokens=max_tokens)
    check_size(graph)
    _name_products(graph, base, layers)
    if precision == "int8":
        graph = quantize_weights(graph)
        _insert_slots(graph, base, layers, centre=centre, kernel=kernel, outputs=outputs)
        strip_metadata(graph)
        return bytes(graph.SerializeToString())
    plain = graph.SerializeToString()
    _insert_slots(graph, base, layers, centre=centre, kernel=kernel, outputs=outputs)
    strip_metadata(graph)
    slotted: bytes = graph.SerializeToString()
    before, after = (
        run_session(open_session(model, threads=1), token_ids, {}, ["pooled"])[0] for model in (plain, slotted)
    )
    check_unchanged([before], [after])
    return slotted


def _trace(model: PooledBase, *, max_tokens: int) -> onnx.ModelProto:
    """The ONNX graph for any number of texts of up to ``max_tokens`` tokens."""
    token_ids = torch.ones(2, 5, dtype=torch.int64)  # sizes 0 and 1 would be taken for constants
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    sizes = {0: torch.export.Dim("texts"), 1: torch.export.Dim("tokens", max=max_tokens)}
    with _quiet_exporter():
        program = torch.onnx.export(
            model.eval(),
            (token_ids, mask),
            dynamo=True,
            input_names=["input_ids", "attention_mask"],
            output_names=["pooled"],
            dynamic_shapes={"input_ids": sizes, "attention_mask": sizes},
            opset_version=_OPSET,
            verbose=False,
        )
    if program is None:
        raise HeadError("torch.onnx.export must return a program, got none; check the version of torch.")
    graph: onnx.ModelProto = program.model_proto
    return graph


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence what the exporter says about itself, by the words it uses, and nothing else."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")  # "torchvision is not installed"
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
            warnings.filterwarnings("ignore", message=r"# The axis name: \w+ will not be used")
            yield
    finally:
        logger.setLevel(level)


def _name_products(graph_model: onnx.ModelProto, base: Base, layers: Mapping[str, nn.Linear]) -> None:
    """Call the product of every layer as its slot, so that it is found again after quantisation."""
    graph = graph_model.graph
    module_names = {module: name for name, module in PooledBase(base).named_modules()}
    by_module = {module_names[layer]: (slot, layer) for slot, layer in layers.items()}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    done = []
    for node in graph.node:
        if node.op_type != "MatMul" or node.input[1] not in weights:
            continue
        for name in by_module.keys() & set(_name_scopes(node)):
            slot, layer = by_module[name]
            weight = numpy_helper.to_array(weights[node.input[1]])  # (K, N)
            if np.array_equal(weight, layer.weight.detach().numpy().T):
                node.name = slot
                done.append(slot)
    check_found(done, layers)


def _insert_slots(
    graph_model: onnx.ModelProto,
    base: Base,
    layers: Mapping[str, nn.Linear],
    *,
    centre: float,
    kernel: KernelTerm | None,
    outputs: int,
) -> None:
    """Add x @ A @ B beside every named product, and the output layer after the pooling, in place."""
    graph = graph_model.graph
    products = {name: slot for slot in layers for name in (slot, f"{slot}_Q8")}
    nodes, done = [], []
    for node in graph.node:
        nodes.append(node)
        if node.name in products:
            nodes += lora_nodes(node, products[node.name])
            done.append(products[node.name])
    check_found(done, layers)
    nodes += [
        helper.make_node("MatMul", ["pooled", "output.weight"], ["output.product"]),
        helper.make_node("Add", ["output.product", "output.bias"], ["output.linear" if kernel else "prediction"]),
    ]
    if kernel:
        nodes += kernel.nodes(graph, before="output.linear", after="prediction")
    del graph.node[:]
    graph.node.extend(nodes)
    graph.output.append(helper.make_tensor_value_info("prediction", TensorProto.FLOAT, ["texts", outputs]))
    for item in list_slots(base.hidden_size, layers, kernel, outputs=outputs):
        add_optional_input(graph, item, fill=centre if item["name"] == "output.bias" else 0.0)


def _name_scopes(node: onnx.NodeProto) -> list[str]:
    """Names of the modules a node was traced in, outermost first."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            return [str(name) for name in ast.literal_eval(entry.value)]
    return []


def graph_key(
    base: Base,
    slots: Sequence[str],
    max_tokens: int,
    centre: float,
    precision: str,
    kernel: KernelTerm | None = None,
    *,
    outputs: int = 1,
) -> str:
    """Names a graph by all that decides its bytes."""
    versions = [version(name) for name in ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")]
    decisive = [_GRAPH_VERSION, _OPSET, versions, base.sha256, list(slots), max_tokens, centre, PRECISIONS[precision]]
    decisive += [kernel.sha256] if kernel else []
    decisive += [outputs] if outputs > 1 else []
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:24]
