"""How far an exported graph may be from torch, by the precision of its base: gates that an export must pass.

fp32 is compared value by value. An 8-bit base rounds weights and activations, which moves every value a little; there
the measure is the root mean square of the differences over that of the reference.
"""

import math
from typing import Any

import numpy as np

from shared.errors import HeadError

# Precision -> what a manifest says of it.
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {"scheme": "fp32"},
    "int8": {"scheme": "int8", "block": 32, "accuracy_level": 4},
}


def check_precision(precision: str) -> None:
    """Raise HeadError unless there is such a precision."""
    if precision not in PRECISIONS:
        raise HeadError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}.")


class Parity:
    """Differences between ONNX Runtime and torch, gathered over texts and judged at the end.

    Args:
        what: Is compared, for messages.
        precision: Key of ``PRECISIONS``.
        max_abs: Largest difference allowed in fp32.
        rel_rms: Largest relative root mean square allowed in int8.
    """

    def __init__(self, what: str, *, precision: str, max_abs: float, rel_rms: float) -> None:
        self._what = what
        self._exact = precision == "fp32"
        self._limit = max_abs if self._exact else rel_rms
        self._largest = self._squares = self._reference = 0.0

    def add(self, found: np.ndarray, wanted: np.ndarray) -> None:
        """Compare two arrays of one shape; in fp32 a difference that is too large is refused at once."""
        if found.shape != wanted.shape:
            raise HeadError(f"{self._what} must have torch's shape {wanted.shape}, got {found.shape}.")
        wanted = wanted.astype(np.float64)
        off = found.astype(np.float64) - wanted
        largest = float(np.abs(off).max(initial=0.0))
        self._largest = largest if not math.isfinite(largest) else max(self._largest, largest)
        self._squares += float(np.vdot(off, off))
        self._reference += float(np.vdot(wanted, wanted))
        if self._exact:
            self._judge(self._largest)

    def described(self) -> dict[str, Any]:
        """What a manifest says, once everything was added.

        Raises:
            HeadError: The graph is too far from torch.
        """
        relative = math.sqrt(self._squares / self._reference) if self._reference > 0 else math.inf
        self._judge(self._largest if self._exact else relative)
        measure = "max_abs" if self._exact else "rel_rms"
        return {"max_abs": self._largest, "rel_rms": relative, "measure": measure, "tolerance": self._limit}

    def _judge(self, found: float) -> None:
        if not found <= self._limit:
            how = "" if self._exact else " (relative root mean square)"
            raise HeadError(
                f"ONNX Runtime and torch must agree within {self._limit}{how} on {self._what}, got {found:.3g}; "
                "nothing was written. Export the base again, or with precision fp32; if that does not help, please "
                "report it."
            )
