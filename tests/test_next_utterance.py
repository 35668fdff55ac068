"""Dialogue: candidates published or drawn, hits@1 against a slow count, and the persona's lines before the prompt."""

import json
from dataclasses import replace

import numpy as np
import pytest

from client.training.site import TextFeatures, resident_base, resident_dataset
from shared.config import load_scenario
from shared.datasets import Dataset, Record, UserData
from shared.datasets.candidates import with_candidates
from shared.errors import DataError, ScenarioError
from shared.heads.adapter import make_start
from shared.heads.registry import make_head
from shared.metrics.language import TokenScores, score_tokens
from shared.models.features import Features
from simulations.observe.language import LanguageObserver
from simulations.observe.next_utterance import NextUtterance
from simulations.run import simulate


def user(name, train, test):
    said = [Record(f"q{i}", 0.0, str(i), i, answer) for i, answer in enumerate([*train, *test])]
    return UserData(name, tuple(said[: len(train)]), (), tuple(said[len(train) :]))


A = user("a", ["x", "y"], ["yes", "a1"])
B = user("b", ["a1"], ["yes", "b1", "b2"])
C = user("c", [], ["c1", "c2"])
WORLD = Dataset("chats", (A, B, C), ())


def test_distractors_are_others_test_responses_and_nothing_of_ones_own():
    found = with_candidates(WORLD, count=3)
    for before, after in zip(WORLD.users, found.users, strict=True):
        own = {record.response for record in before.train + before.test}
        others = {record.response for each in WORLD.users if each != before for record in each.test} - own
        assert after.train == before.train
        for record, told in zip(before.test, after.test, strict=True):
            assert replace(told, candidates=()) == record
            assert told.candidates[0] == record.response
            assert len(set(told.candidates)) == 3
            assert set(told.candidates[1:]) <= others
    assert with_candidates(WORLD, count=3) == found
    draws = {with_candidates(WORLD, count=3, seed=seed).users[2].test[0].candidates for seed in range(20)}
    assert len(draws) > 3


def test_published_candidates_stay():
    published = replace(WORLD.users[2].test[0], candidates=("c1", "no", "never", "maybe"))
    users = (*WORLD.users[:2], replace(WORLD.users[2], test=(published,)))
    assert with_candidates(replace(WORLD, users=users), count=2).users[2].test == (published,)


def test_too_few_others_are_refused():
    with pytest.raises(DataError, match=r"evaluation\.candidates = 4 needs 3 test responses .* user b has 2"):
        with_candidates(WORLD, count=4)
    with pytest.raises(DataError, match="user a has 0"):
        with_candidates(Dataset("chats", WORLD.users[:1], ()), count=2)


@pytest.fixture(scope="module")
def scenario_file(tiny_llama, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dialogue")
    data = tiny.tiny_dialogues(folder / "data", dialogues=12)
    return tiny.tiny_generation(folder, base=tiny_llama, data=data, body="evaluation.candidates = 3")


def test_a_response_is_told_where_its_mean_likelihood_is_above_all_others(scenario_file):
    """Against transformers, candidate by candidate; and a response that is a candidate of others is not always told."""
    import torch
    from transformers import LlamaForCausalLM

    scenario = load_scenario(scenario_file, ("model.max_tokens=96",))
    base, dataset = resident_base(scenario.model.base), with_candidates(resident_dataset(scenario.data), count=3)
    head = make_head(base, scenario)
    make_start(head, Features([]), ridge=0.1, seed=scenario.seed)
    whole = LlamaForCausalLM.from_pretrained(base.folder, dtype=torch.float32)

    def mean_nll(text, answer):
        prompt = base.tokenizer.encode(f"<|im_start|>{text}<|im_end|>", add_special_tokens=False).ids
        response = [*base.tokenizer.encode(answer, add_special_tokens=False).ids, base.eos_id]
        assert len(response) <= 48  # nothing is cut, so that this is all there is to it
        assert len(prompt) + len(response) <= 97
        with torch.no_grad():
            logits = whole(torch.tensor([prompt + response])).logits[0, -len(response) - 1 : -1]
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor(response)))

    ranking = NextUtterance(base, scenario, dataset, quiet=True)
    records = [record for each in dataset.users for record in each.test]
    scores = TokenScores(np.array([mean_nll(r.text, r.response) for r in records]), *np.ones((2, len(records))))
    expected = [
        all(mean_nll(r.text, r.response) < mean_nll(r.text, other) for other in r.candidates[1:]) for r in records
    ]
    told = ranking.told(head, scores, records).told
    assert told.tolist() == expected
    assert 0 < sum(expected) < len(expected)
    nobody = replace(scores, nll=np.full(len(records), np.nan))
    assert not ranking.told(head, nobody, records).told.any()


def test_hits_are_pooled_over_responses():
    scores = TokenScores(np.ones(4), np.ones(4), np.ones(4), told=np.array([1.0, 0.0, 0.0, 0.0]))
    found = score_tokens(scores, np.array([0, 1, 1, 1]), reference=scores, seed=0, resamples=200)["hits@1"]
    assert found.value == 0.25
    assert (found.low, found.high) == (0.0, 1.0)  # whole users are drawn: either alone, twice
    joined = TokenScores.joined([scores, scores])
    assert joined.told.tolist() == [1.0, 0.0, 0.0, 0.0] * 2
    silent = replace(scores, told=None)
    assert TokenScores.joined([silent, silent]).told is None
    assert "hits@1" not in score_tokens(silent, np.arange(4), reference=silent, seed=0, resamples=5)


def test_rows_are_ranked_with_and_without_the_persona_s_lines(scenario_file):
    scenario = load_scenario(scenario_file, ('prompt.declared=["persona"]', "model.max_tokens=96", "personal.epochs=1"))
    base, dataset = resident_base(scenario.model.base), resident_dataset(scenario.data)
    head = make_head(base, scenario)
    make_start(head, Features([]), ridge=0.1, seed=scenario.seed)
    observer = LanguageObserver(head, TextFeatures(base, scenario, dataset), dataset, scenario, quiet=True)
    rows = observer.baselines()
    assert list(observer.metrics)[-1] == "hits@1"
    asked = sum(len(each.test) for each in dataset.users)
    for name, row in rows.items():
        assert row.told.shape == (asked,), name
        found = observer.score(row, reference=rows["local"], seed=0, resamples=10)
        assert found["hits@1"].value == row.told.mean()
    assert list(rows) == ["base", "base + profile", "local", "local + profile"]
    assert rows["base + profile"].nll.tolist() != rows["base"].nll.tolist()


@pytest.mark.slow
def test_a_run_says_how_many_were_told_and_quotes_no_persona(scenario_file, tmp_path):
    scenario = load_scenario(
        scenario_file, ('prompt.declared=["persona"]', "model.max_tokens=96", "export.users=0", "federation.rounds=1")
    )
    summary = simulate(scenario, out=tmp_path / "out", quiet=True)
    assert set(summary["rows"]) >= {"base", "personal", "base + profile", "personal + profile"}
    assert summary["metrics"]["hits@1"]["better"] == "more"
    for row in summary["rows"].values():
        assert 0 <= row["hits@1"]["low"] <= row["hits@1"]["value"] <= row["hits@1"]["high"] <= 1
    assert summary["rows"]["base + profile"]["nll"] != summary["rows"]["base"]["nll"]
    persona = resident_dataset(scenario.data).users[0].profile["persona"]
    files = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not any(persona.encode() in content for content in files)
    assert "hits@1" in json.loads((tmp_path / "out" / "summary.json").read_text())["metrics"]


def test_one_candidate_is_refused(scenario_file):
    with pytest.raises(ScenarioError, match="candidates must be 0 or at least 2, got 1"):
        load_scenario(scenario_file, ("evaluation.candidates=1",))
