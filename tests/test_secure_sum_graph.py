"""As many neighbours as are needed, and no more."""

import math
from fractions import Fraction

import numpy as np
import pytest

from shared.secure_sum.graph import _thresholds, make_graph, make_terms, needed_neighbours
from shared.secure_sum.messages import Terms


def exactly(neighbours: int, threshold: int, count: int, min_survivors: int, colluders: int) -> Fraction:
    """The bound that ``needed_neighbours`` keeps, in fractions, written out from binomial coefficients."""

    def at(hits: int, population: int, good: int, draws: int) -> Fraction:
        return Fraction(
            math.comb(good, hits) * math.comb(population - good, draws - hits), math.comb(population, draws)
        )

    others, lost, half = min_survivors - 1, count - min_survivors + colluders, neighbours // 2
    corrupt = sum(at(hits, others, colluders, neighbours) for hits in range(threshold, neighbours + 1))
    starved = sum(at(hits, count - 1, others, neighbours) for hits in range(threshold))
    return count * (corrupt + starved + at(half, count, lost, half))


@pytest.mark.parametrize(("count", "survive", "collude"), [(943, 755, 94), (101, 81, 10), (300, 270, 60)])
def test_the_bound_holds_in_exact_arithmetic_and_with_fewer_neighbours_it_does_not(count, survive, collude):
    neighbours, threshold = needed_neighbours(count, min_survivors=survive, colluders=collude)
    assert exactly(neighbours, threshold, count, survive, collude) < Fraction(1, 2**40)
    assert neighbours < count - 1
    assert threshold > neighbours / 2
    for other in range(neighbours // 2, (2 * neighbours - 4) // 3 + 2):
        assert exactly(neighbours - 2, other, count, survive, collude) >= Fraction(1, 2**40)
    if threshold < 2 * neighbours // 3 + 1:
        assert exactly(neighbours, threshold + 1, count, survive, collude) >= Fraction(1, 2**40)


def sound(generator: np.random.Generator, terms: Terms, count: int, colluders: int) -> bool:
    """Draw a graph, the corrupt and the lost; see whether all three conditions hold."""
    graph = make_graph(range(count), terms.neighbours, generator)
    survivors, honest = set(range(terms.min_survivors)), set(range(colluders, terms.min_survivors))
    if any(len(survivors & set(near)) < terms.threshold for near in graph.values()):
        return False
    if any(sum(other < colluders for other in near) >= terms.threshold for near in graph.values()):
        return False
    reached, frontier = set(), [colluders]
    while frontier:
        seat = frontier.pop()
        if seat not in reached:
            reached.add(seat)
            frontier += honest & set(graph[seat])
    return reached == honest


def test_graphs_of_so_many_neighbours_are_sound_as_often_as_is_said():
    generator = np.random.default_rng(7)
    neighbours, threshold = needed_neighbours(120, min_survivors=90, colluders=15, bits=4)
    terms = Terms(threshold, neighbours, 90)
    assert sum(not sound(generator, terms, 120, 15) for _ in range(150)) <= 150 / 2**4
    fewer = Terms(7, 10, 90)
    assert sum(not sound(generator, fewer, 120, 15) for _ in range(20)) == 20


def test_up_to_a_hundred_devices_everybody_is_everybodys_neighbour():
    for count in (2, 3, 10, 50, 100):
        terms = make_terms(count, min_survivors=max(2, -(-count * 4 // 5)), colluders=0)
        assert terms.neighbours == count - 1
        assert terms.threshold == min(2 * (count - 1) // 3 + 1, terms.min_survivors - 1)
    assert make_terms(101, min_survivors=81, colluders=10).neighbours < 100
    assert make_terms(943, min_survivors=755, colluders=94, neighbours=200).neighbours == 200
    assert make_terms(943, min_survivors=755, colluders=94, neighbours=201).neighbours == 202
    assert make_terms(943, min_survivors=755, colluders=94, neighbours=5000).neighbours == 942
    assert make_terms(100, min_survivors=60, colluders=10).threshold == 59


def test_where_nothing_smaller_does_everybody_is_a_neighbour():
    assert needed_neighbours(120, min_survivors=70, colluders=50) == (119, 69)


@pytest.mark.parametrize(
    ("count", "survive", "collude", "neighbours"),
    [
        (100, 101, 10, None),
        (100, 10, 10, None),
        (100, 80, -1, None),
        (10, 1, 0, None),
        (100, 50, 10, None),  # no threshold above half within the survivors
        (100, 80, 79, None),
        (943, 755, 94, 20),
    ],
)
def test_terms_that_cannot_be_kept_are_refused(count, survive, collude, neighbours):
    with pytest.raises(ValueError, match=r"survivors must|allow no threshold"):
        make_terms(count, min_survivors=survive, colluders=collude, neighbours=neighbours)


def test_more_safety_needs_more_neighbours():
    found = [needed_neighbours(500, min_survivors=400, colluders=50, bits=bits)[0] for bits in (10, 20, 40, 60)]
    assert found == sorted(set(found))
    assert not _thresholds(found[2] - 2, 500, 400, 50, bits=40).size


@pytest.mark.parametrize(("count", "degree"), [(5, 3), (5, 5), (5, 0), (1, 2), (6, -2)])
def test_a_graph_that_does_not_exist_is_refused(count, degree):
    with pytest.raises(ValueError, match="degree must"):
        make_graph(range(count), degree, np.random.default_rng(0))
