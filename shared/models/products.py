"""Products with frozen weights, most of a training step: in which library, and in which precision.

float32 is computed by oneDNN where torch's own choice, MKL, uses half of the processor (it takes other makers' AVX-512
for AVX2); both sum float32 products in float32, in another order. Mixed precision rounds both factors of such a product
to bfloat16, sums in float32, and rounds the result; attention, norms, losses, LoRA factors, per-sample gradients and
all that follows them stay in float32.
"""

import functools
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Precision = Literal["fp32", "mixed"]


class Frozen:
    """A frozen matrix (m, d) as the products of a training step need it.

    Args:
        weight: The matrix, float32; never changed afterwards.
        precision: Of the products.
    """

    def __init__(self, weight: Tensor, *, precision: Precision) -> None:
        self._weight = weight.detach()
        self._half = self._weight.bfloat16() if precision == "mixed" else None
        self._onednn = uses_onednn() and weight.device.type == "cpu"

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(..., d) -> (..., m) float32, without any gradient."""
        if self._half is not None:
            rounded = F.linear(x.bfloat16(), self._half)
            return rounded.float() if bias is None else rounded + bias  # the sum is float32
        if self._onednn:
            found: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, bias, "none", [], "")
            return found
        return F.linear(x, self._weight, bias)

    def backward(self, gradient: Tensor) -> Tensor:
        """(..., m) -> (..., d) float32."""
        if self._half is not None:
            return (gradient.bfloat16() @ self._half).float()
        if self._onednn:
            found: Tensor = torch.ops.mkldnn._linear_pointwise(gradient, self._weight.t(), None, "none", [], "")
            return found
        return gradient @ self._weight


class _Product(torch.autograd.Function):
    """x -> x W^T + b of a frozen matrix; nothing of x is kept for the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen: Frozen, bias: Tensor | None) -> Tensor:
        ctx.frozen = frozen
        return frozen.forward(x, bias)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, None, None]:
        return (ctx.frozen.backward(outer[0]) if ctx.needs_input_grad[0] else None), None, None


class FrozenLinear(nn.Linear):
    """A frozen linear layer, its parameters those of another one, its products those of ``Frozen``."""

    def __init__(self, linear: nn.Linear, *, precision: Precision) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)
        self.frozen = Frozen(linear.weight, precision=precision)

    def forward(self, input: Tensor) -> Tensor:
        """(..., d) -> (..., m)."""
        found: Tensor = _Product.apply(input, self.frozen, self.bias)  # type: ignore[no-untyped-call]
        return found


def quicken(module: nn.Module, *, precision: Precision) -> None:
    """Give every frozen linear layer in a module the fastest product of a precision; LoRA factors are left as they are.

    Weights stay where they are, under their names; at mixed precision a copy of half the size stands beside each. They
    must not be changed afterwards.

    Args:
        module: Blocks of a head; marked what of them is trained.
        precision: Of the products with frozen weights.
    """
    if precision == "fp32" and not uses_onednn():
        return
    for path, parent in list(module.named_modules()):
        for name, child in list(parent.named_children()):
            trains = "lora_" in path or any(p.requires_grad for p in child.parameters())
            if type(child) is nn.Linear and not trains:
                setattr(parent, name, FrozenLinear(child, precision=precision))


@contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """Meanwhile, products of quickened layers are float32 at either precision."""
    layers = [each for each in module.modules() if isinstance(each, FrozenLinear)]
    usual = [layer.frozen for layer in layers]
    try:
        for layer in layers:
            layer.frozen = Frozen(layer.weight, precision="fp32")
        yield
    finally:
        for layer, frozen in zip(layers, usual, strict=True):
            layer.frozen = frozen


def resolve_precision(setting: Literal["auto", "fp32", "mixed"]) -> Precision:
    """A setting made exact: ``auto`` is mixed where the processor multiplies bfloat16, by what it says of itself.

    Nothing is timed: on one machine a run's numbers are always the same.
    """
    if setting != "auto":
        return setting
    return "mixed" if multiplies_bfloat16() else "fp32"


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions that multiply bfloat16: AMX, or AVX-512 with them."""
    able = torch.cpu.get_capabilities()
    return bool(able.get("amx_bf16") or able.get("avx512_bf16"))


@functools.cache
def uses_onednn() -> bool:
    """Whether float32 products are faster with oneDNN than as torch computes them: AVX-512 of another maker than Intel.

    Measured on AMD Zen 5: 230 against 104 GFLOP/s on one core (``sottovoce bench speed``).
    """
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return bool(torch.cpu.get_capabilities().get("avx512_f")) and "GenuineIntel" not in _maker()


def _maker() -> str:
    """What the processor says of its maker; where nobody can tell, Intel's name, which changes nothing."""
    try:
        return next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("vendor_id"))
    except (OSError, StopIteration):
        return platform.processor() or "GenuineIntel"
