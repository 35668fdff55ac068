"""Who shares masks with whom in a secure sum, and how many neighbours that takes."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import hypergeom

from shared.secure_sum.messages import Terms

FULL_GRAPH = 100  # up to so many devices everybody is everybody's neighbour


def make_graph(seats: Sequence[int], degree: int, generator: np.random.Generator) -> dict[int, tuple[int, ...]]:
    """Draw a graph: seats on a circle in random order, each with the ``degree`` nearest.

    Args:
        seats: Distinct.
        degree: ``Terms.degree`` of their number: even, or all others.
        generator: Source of the order; what it draws must be hidden from devices until they have advertised.

    Returns:
        Seat -> its neighbours, ascending; who is a neighbour has one.

    Raises:
        ValueError: There is no such graph.

    Source:
        Bell et al. 2020, eprint 2020/704, section 3: a Harary graph under a random permutation.

    Example:
        >>> make_graph([3, 5, 8], 2, np.random.default_rng(0))
        {3: (5, 8), 5: (3, 8), 8: (3, 5)}
    """
    count = len(seats)
    if degree != count - 1 and not (degree % 2 == 0 and 0 < degree < count - 1):
        raise ValueError(f"degree must be even, or one less than the {count} seats, got {degree}.")
    if degree == count - 1:
        return {seat: tuple(sorted(set(seats) - {seat})) for seat in sorted(seats)}
    circle = [seats[i] for i in generator.permutation(count)]
    steps = [step for step in range(-(degree // 2), degree // 2 + 1) if step]
    return {circle[i]: tuple(sorted(circle[(i + step) % count] for step in steps)) for i in range(count)}


def make_terms(count: int, *, min_survivors: int, colluders: int, neighbours: int | None = None) -> Terms:
    """Choose the terms of a campaign.

    Args:
        count: Devices asked in a round.
        min_survivors: How many of them must stay to the end.
        colluders: How many at most may be in league with the server or with one another.
        neighbours: None for all others up to 100 devices, and as few as ``needed_neighbours`` allows above.

    Returns:
        Threshold 2/3 of the neighbours and one, as is needed against a server that shows devices two views, or as near
        to it as so few survivors allow.

    Raises:
        ValueError: No terms give what is asked.

    Example:
        >>> make_terms(100, min_survivors=80, colluders=10)
        Terms(threshold=67, neighbours=99, min_survivors=80)
    """
    if not 0 <= colluders < min_survivors <= count or min_survivors < 2:
        raise ValueError(
            f"survivors must be 2..{count} and more than colluders, got {min_survivors} and {colluders} colluders."
        )
    if neighbours is None and count > FULL_GRAPH:
        neighbours, threshold = needed_neighbours(count, min_survivors=min_survivors, colluders=colluders)
        return Terms(threshold, neighbours, min_survivors)
    neighbours = min(count - 1, neighbours or count - 1)
    if neighbours < count - 1:
        neighbours += neighbours % 2
        possible = _thresholds(neighbours, count, min_survivors, colluders, bits=40)
    else:
        possible = np.arange(max(neighbours // 2, colluders) + 1, min(_two_thirds(neighbours), min_survivors - 1) + 1)
    if not possible.size:
        raise ValueError(
            f"{neighbours} neighbours of {count} devices allow no threshold above half of them, above {colluders} "
            f"colluders and within {min_survivors} survivors; ask for more survivors, fewer colluders, more neighbours."
        )
    return Terms(int(possible[-1]), neighbours, min_survivors)


def needed_neighbours(count: int, *, min_survivors: int, colluders: int, bits: int = 40) -> tuple[int, int]:
    """The fewest neighbours with which a sum is as safe and as sure to end as with all of them.

    Args:
        count: Devices asked in a round.
        min_survivors: How many of them stay to the end.
        colluders: How many are corrupt.
        bits: All of the guarantee holds except with probability 2^-bits.

    Returns:
        Neighbours (even, or all others) and the highest threshold that suits, at most 2/3 of them and one.

    Raises:
        ValueError: Not even all others suffice.

    Guarantee:
        Whichever devices are corrupt and whichever drop out, chosen without sight of the graph: every device has fewer
        corrupt neighbours than the threshold and at least as many surviving ones, and the honest survivors are
        connected, so that only the sum of all their vectors is unmasked.

    Source:
        Bell et al. 2020, eprint 2020/704, section 3.3 (which neighbours must be, for a server that follows the
        protocol). Our bound is a union over devices of exact tails. Given who is corrupt and who is lost, neighbours
        of a device are a uniform subset of the others, so the corrupt among them, and the surviving, are hypergeometric
        in number. Honest survivors who follow each other on the circle are neighbours unless neighbours / 2 places in
        a row between them are all corrupt or lost. Where a roster has lost devices already, only the corrupt weigh
        more: they are counted as if all losses came before it.
    """
    for neighbours in range(2, count - 1, 2):
        possible = _thresholds(neighbours, count, min_survivors, colluders, bits=bits)
        if possible.size:
            return neighbours, int(possible[-1])
    terms = make_terms(count, min_survivors=min_survivors, colluders=colluders, neighbours=count - 1)
    return terms.neighbours, terms.threshold


def _thresholds(neighbours: int, count: int, min_survivors: int, colluders: int, *, bits: int) -> "np.ndarray":
    """Thresholds that suit so many neighbours, ascending; none where there are none."""
    thresholds = np.arange(neighbours // 2 + 1, _two_thirds(neighbours) + 1)
    others = min_survivors - 1
    corrupt = count * hypergeom.sf(thresholds - 1, others, colluders, min(neighbours, others))
    starved = count * hypergeom.cdf(thresholds - 1, count - 1, others, neighbours)
    lost, half = count - min_survivors + colluders, neighbours // 2
    apart = count * hypergeom.pmf(half, count, min(lost, count), half)
    return np.asarray(thresholds[corrupt + starved + apart < 2.0**-bits])


def _two_thirds(neighbours: int) -> int:
    return 2 * neighbours // 3 + 1
