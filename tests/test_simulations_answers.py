"""Answers in words of a whole run: by the devices' runtime, scored, kept without what users wrote, and shown."""

import json

import numpy as np
import pytest

import simulations.answers as answers
from shared.config import load_scenario
from shared.models.model import load_base
from simulations.run import simulate

BODY = """
prompt.records = 1
personal.learning_rate = 0.05
evaluation.answers = 1
evaluation.answer_tokens = 5
evaluation.cold_start = []
"""


@pytest.fixture
def scenario(tiny, tiny_base, tmp_path):
    tiny.tiny_llama(tmp_path / "base")
    tiny.tiny_dialogues(tmp_path / "data")
    path = tiny.tiny_generation(tmp_path, base=tmp_path / "base", data=tmp_path / "data", body=BODY)
    return load_scenario(path, ("export.users=0", f"prompt.encoder={tiny_base.folder}"))


@pytest.mark.slow
def test_a_run_answers_and_says_how_well(scenario, tmp_path):
    found = simulate(scenario, out=tmp_path / "run", quiet=True)["answers"]
    rows = [name + more for name in ("base", "federated", "personal") for more in ("", " + profile")]
    assert sorted(found["rows"]) == sorted(rows)
    kept = json.loads((tmp_path / "run" / "answers.json").read_text())
    assert len(kept) == found["answers"] == found["users"]
    assert all(set(each) == {"user", "item", *rows} for each in kept)
    assert any(each["personal"] != each["base"] for each in kept)
    assert set(found["win_rates"]) >= {"personal - base", "personal - federated", "federated - base"}
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Answers in words" in page
    assert "win rate" in page


def test_states_of_an_encoder_are_those_of_its_words_alone(tiny_base):
    both = answers.token_states(tiny_base, ["crime drama", "crime drama thriller comedy"])
    assert [len(states) for states in both] == [2, 4]
    alone = answers.token_states(load_base(tiny_base.folder), ["crime drama"])
    np.testing.assert_allclose(both[0], alone[0], atol=1e-6)
