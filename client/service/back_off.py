"""How long to wait before trying again what failed: longer and longer, at random, and never longer than a bound."""

import random
from collections.abc import Callable


class BackOff:
    """Waiting times that double from one failure to the next.

    Each is drawn evenly from half of its bound to the whole, so that devices that fell together do not come back
    together, and none at once.

    Args:
        first_s: Bound of the first.
        cap_s: Of all.
        steady_s: What went well for as long begins again with the first.
        draw: A number evenly between two.

    Source:
        Brooker 2015, "Exponential Backoff And Jitter", AWS Architecture Blog ("equal jitter").
    """

    def __init__(
        self,
        *,
        first_s: float,
        cap_s: float,
        steady_s: float,
        draw: Callable[[float, float], float] = random.uniform,
    ) -> None:
        if not 0 < first_s <= cap_s:
            raise ValueError(f"first_s must be above 0 and at most cap_s, got {first_s} and {cap_s}.")
        self._first_s, self._cap_s, self._steady_s, self._draw = first_s, cap_s, steady_s, draw
        self.failures = 0

    def failed(self, *, went_well_s: float) -> float:
        """Seconds to wait after a failure.

        Args:
            went_well_s: For how long it had gone well before it failed; 0 where it never did.
        """
        if went_well_s >= self._steady_s:
            self.failures = 0
        bound_s = min(self._cap_s, self._first_s * 2.0 ** min(self.failures, 60))
        self.failures += 1
        return self._draw(bound_s / 2, bound_s)
