"""The kernel term of a head as ONNX nodes: public constants in the base, and a slot for what weighs them."""

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from client.runtime.runtime import KERNEL_SLOT
from shared.heads.head import Head
from shared.heads.output import OutputHead
from shared.models.kernel import SMALLEST_NORM


@dataclass(frozen=True)
class KernelTerm:
    """Prediction += k(pooled, anchors) @ ``output.kernel``; the formula is that of ``shared.models.kernel.Kernel``.

    Attributes:
        mean: Public centre (d,) of the pooled features.
        anchors: (M, d) centred public features of unit norm.
        widths: Of 1 - cosine.
        weights: One a width.
    """

    mean: np.ndarray
    anchors: np.ndarray
    widths: tuple[float, ...]
    weights: tuple[float, ...]

    @property
    def sha256(self) -> str:
        """Hash over all of it."""
        digest = hashlib.sha256(json.dumps([self.anchors.shape, self.widths, self.weights, SMALLEST_NORM]).encode())
        for array in (self.mean, self.anchors):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def nodes(self, graph: onnx.GraphProto, *, before: str, after: str) -> list[onnx.NodeProto]:
        """Nodes that add the term to the predictions ``before``; their constants are put into the graph."""

        def constant(name: str, value: object, dtype: type = np.float32) -> str:
            graph.initializer.append(numpy_helper.from_array(np.array(value, dtype=dtype), f"kernel.{name}"))
            return f"kernel.{name}"

        def node(operation: str, name: str, *inputs: str) -> str:
            found.append(helper.make_node(operation, list(inputs), [f"kernel.{name}"]))
            return f"kernel.{name}"

        found: list[onnx.NodeProto] = []
        centred = node("Sub", "centred", "pooled", constant("mean", self.mean))  # (B, d)
        norm = node("ReduceL2", "norm", centred, constant("axes", [1], np.int64))  # (B, 1)
        unit = node("Div", "unit", centred, node("Max", "size", norm, constant("smallest_norm", SMALLEST_NORM)))
        cosines = node("MatMul", "cosines", unit, constant("anchors", self.anchors.T))  # (B, M)
        below = node("Sub", "below", cosines, constant("one", 1.0))
        terms = []
        for i, (width, weight) in enumerate(zip(self.widths, self.weights, strict=True)):
            near = node("Exp", f"near.{i}", node("Div", f"scaled.{i}", below, constant(f"width.{i}", width)))
            terms.append(node("Mul", f"term.{i}", near, constant(f"weight.{i}", weight)))
        product = node("MatMul", "product", node("Sum", "values", *terms), KERNEL_SLOT)  # (B, K)
        return [*found, helper.make_node("Add", [before, product], [after])]


def kernel_term(head: Head) -> KernelTerm | None:
    """The term of a head at its public start; None where it has no kernel."""
    if not isinstance(head, OutputHead) or head.kernel is None:
        return None
    mean, anchors = (tensor.detach().cpu().numpy().copy() for tensor in (head.mean, head.kernel.anchors))
    return KernelTerm(mean, anchors, head.kernel.widths, head.kernel.weights)
