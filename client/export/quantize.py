"""Weights of an ONNX graph in 8 bits: products in blocks of 32 values with a scale each, embeddings with one a table.

Must come before slots are put in: the quantiser takes the default of an optional input for a constant.
"""

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx

from client.runtime.parity import PRECISIONS


def quantize_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with ``MatMulNBits`` of 8 bits and embedding tables of 8 bits; the model given is used up.

    Nodes keep their outputs; a product called ``x`` is then called ``x_Q8``.
    """
    scheme = PRECISIONS["int8"]
    del model.graph.value_info[:]  # shapes noted by the exporter that quantize_dynamic takes for contradictions
    with _quiet_quantizer():
        from onnxruntime.quantization import QuantType, quantize_dynamic
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        products = MatMulNBitsQuantizer(
            model,
            bits=8,
            block_size=scheme["block"],
            is_symmetric=True,
            accuracy_level=scheme["accuracy_level"],
        )
        products.process()
        with tempfile.TemporaryDirectory(prefix="sottovoce-graph-") as scratch:
            plain, small = Path(scratch) / "plain.onnx", Path(scratch) / "small.onnx"
            onnx.save(products.model.model, plain)
            quantize_dynamic(plain, small, op_types_to_quantize=["Gather"], weight_type=QuantType.QUInt8)
            return onnx.load(small)


@contextlib.contextmanager
def _quiet_quantizer() -> Iterator[None]:
    """The quantiser sets up the root logger when it is imported, and tells of every node."""
    root = logging.getLogger()
    handler = logging.NullHandler()
    root.addHandler(handler)
    logger = logging.getLogger("onnxruntime.quantization")
    level, disabled = logger.level, root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        logger.setLevel(level)
        root.removeHandler(handler)
