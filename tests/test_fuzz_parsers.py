"""Every parser of what comes from elsewhere takes an input apart or refuses it in its own words; nothing else happens.

The inputs are those of ``sottovoce bench fuzz``, which draws thousands a second; here a strategy draws a few and makes
a failure small again.
"""

import logging

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from simulations.fuzz.mutations import LARGEST, Edit
from simulations.fuzz.parsers import attempt, make_input
from simulations.fuzz.targets import TARGETS

numbers = st.integers(0, LARGEST)
edits = st.lists(st.builds(Edit, numbers, numbers, numbers), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Name -> its parser, made ready once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = TARGETS[name].open(tmp_path_factory.mktemp("parser"))
        return made[name]

    return get


@pytest.fixture(autouse=True)
def quiet():
    """What parsers say to the log of thousands of inputs is not looked at."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def try_some(opened, name, *, examples):
    target, parser = TARGETS[name], opened(name)
    taken = []

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(numbers, edits)
    def nothing_else_happens(seed, changes):
        outcome = attempt(target, parser, make_input(parser, target.form, seed=seed, edits=changes))
        assert outcome.problem is None
        taken.append(outcome.refused is None)

    nothing_else_happens()
    return taken


@pytest.mark.parametrize("name", TARGETS)
def test_any_input_is_taken_or_refused_in_words(opened, name):
    parser = opened(name)
    assert [attempt(TARGETS[name], parser, valid).refused for valid in parser.seeds] == [None] * len(parser.seeds)
    assert len(try_some(opened, name, examples=8)) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_many_inputs_are_taken_or_refused_in_words(opened, name):
    try_some(opened, name, examples=400)
