"""Task preference: one pair is one row, its loss DPO's, its gradient its own; from ratings, PRISM and own records."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from client.owner.reading import read_jsonl
from client.training.inputs import read_inputs
from client.training.site import open_workbench
from server.holdout import Examiner, read_holdout
from shared.config import AdapterConfig, ModelConfig, Scenario, TaskConfig, load_scenario
from shared.datasets import read
from shared.datasets.pairs import pairs_of_ratings
from shared.datasets.records import Record
from shared.errors import DataError, ScenarioError
from shared.heads.pairs import PairTargets, check_apart, join, joined_labels
from shared.heads.registry import make_head
from shared.heads.tasks import IGNORE, encode_pairs
from shared.metrics.preference import PairScores, accuracy_difference, score_pairs
from shared.models.features import Features, compute_hidden
from shared.models.model import LlamaFamily
from simulations.run import simulate

KEYS = (
    ("tea or rain ?", "tea , always .", "rain"),
    ("who are you", "nobody .", "a long answer about boats and hills and songs"),
    ("", "hello there !", "go away"),
    ("a question about cake and dogs and trains", "cake .", "dogs and trains and dogs ."),
    ("again ?", "yes", "no"),
)


def scenario_of(**task):
    return Scenario(
        name="tiny",
        task=TaskConfig(name="preference", template="<|im_start|>{text}<|im_end|>", **task),
        model=ModelConfig(head_blocks=1, max_tokens=128),
        adapter=AdapterConfig(rank=2, targets=("mlp.down_proj", "self_attn.q_proj")),
    )


def pairs_of(base, scenario, keys=KEYS):
    encoded = encode_pairs(base, keys, scenario)
    chosen, rejected = (compute_hidden(base, e.token_ids, head_blocks=1) for e in (encoded, encoded.rejected))
    return join(base, chosen, rejected, joined_labels(encoded), blocks=1, micro_batch=256), encoded


@pytest.fixture(scope="module")
def setting(tiny_causal, steps):
    """Five pairs on a head away from its public start."""
    scenario = scenario_of(beta=0.5)
    (features, targets), _ = pairs_of(tiny_causal, scenario)
    rows = [targets.batch(np.array([i]), int(features.lengths[i]))[0].numpy() for i in range(len(features))]
    return steps.Setting(tiny_causal, scenario, features, rows, PairTargets.of_rows)


def log_prob(model, encoded, row):
    """Log p of one answer by the whole model of transformers, on that text alone."""
    ids, labels = encoded.token_ids[row], encoded.labels[row]
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(1)
    return sum(float(scores[i, label]) for i, label in enumerate(labels) if label != IGNORE)


def losses(head, features, targets, rows):
    hidden, mask = features.batch(rows)
    return head(hidden, mask, targets.batch(np.asarray(rows), hidden.shape[1]))


def test_the_reference_is_the_published_base_s(tiny_causal, tiny_llama):
    (_, targets), encoded = pairs_of(tiny_causal, scenario_of())
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    wanted = [log_prob(model, encoded, i) - log_prob(model, encoded.rejected, i) for i in range(len(KEYS))]
    found = targets.batch(np.arange(len(KEYS)), 128)[:, 0]
    assert np.allclose(found, wanted, atol=1e-3)
    assert np.ptp(wanted) > 1


def test_the_loss_is_that_of_dpo(setting, tiny_causal):
    """The policy's margin by the two answers each in a pass of its own, without segments."""
    (features, targets), encoded = pairs_of(tiny_causal, setting.scenario)
    reference = targets.batch(np.arange(len(KEYS)), 128)[:, 0].double().numpy()
    margin = np.zeros(len(KEYS))
    for sign, part in ((1, encoded), (-1, encoded.rejected)):
        hidden = compute_hidden(tiny_causal, part.token_ids, head_blocks=1)
        for row in range(len(KEYS)):
            states, mask = hidden.batch([row])
            nll, _, _ = setting.head.token_scores(states, mask, torch.from_numpy(part.labels[row])[None])
            margin[row] -= sign * float(nll.sum())
    wanted = np.log1p(np.exp(-0.5 * (margin - reference)))
    found = losses(setting.head, features, targets, range(len(KEYS))).detach().numpy()
    assert np.allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert np.abs(found - math.log(2)).min() > 1e-3  # the head is away from the base
    fresh = losses(setting.fresh_head(), features, targets, range(len(KEYS))).detach().numpy()
    assert np.allclose(fresh, math.log(2), atol=1e-4)  # at its public start it is the base


@pytest.mark.parametrize("clip_norm", [0.05, 1e6])
def test_the_step_sums_each_record_s_own_clipped_gradient(setting, steps, clip_norm):
    policy = setting.policy(clip_norm=clip_norm)
    found = steps.flat(setting.train(policy)) * -policy.denominator / policy.learning_rate
    wanted = np.zeros_like(found)
    norms = []
    for row in range(len(setting)):
        gradient = np.concatenate([g.ravel() for g in setting.gradients(row)]).astype(np.float64)
        norms.append(np.linalg.norm(gradient))
        wanted += gradient * min(1.0, clip_norm / norms[-1])
    assert min(norms) > 0.05
    assert np.linalg.norm(found - wanted) <= 1e-3 * np.linalg.norm(wanted) + setting.size**0.5 * policy.grid


def test_one_record_more_moves_the_sum_by_no_more_than_the_bound(setting, steps):
    policy = setting.policy(clip_norm=0.05)
    whole = setting.train(policy)
    moves = []
    for left_out in range(len(setting)):
        rows = [row for row in range(len(setting)) if row != left_out]
        moves.append(setting.moved(policy, whole, setting.train(policy, rows=rows)))
    assert max(moves) <= 0.05 * 1.001
    assert min(moves) > 0.05 * 0.99  # everybody is clipped: a bound that counted answers would show


def test_batches_padding_and_broken_neighbours_move_nothing(setting, steps):
    policy = setting.policy(clip_norm=0.05)
    alone = [steps.flat(setting.train(policy, rows=[row], micro_batch=1)) for row in range(len(setting))]
    together = steps.flat(setting.train(policy, micro_batch=10**6))
    assert np.allclose(together, sum(alone), atol=1e-5 * np.abs(together).max() + 2 * len(setting) * policy.grid)
    arrays = [setting.features.batch([row])[0][0].numpy() for row in range(len(setting))]
    arrays[1] = np.full_like(arrays[1], np.nan)
    broken = steps.flat(setting.train(policy, features=Features(arrays), micro_batch=10**6))
    assert np.allclose(broken, together - alone[1], atol=1e-5 * np.abs(together).max() + 10 * policy.grid)


def test_what_is_rejected_does_not_reach_the_chosen_answer(setting):
    head, features = setting.head, setting.features
    hidden, mask = features.batch([0])
    segments = torch.ones_like(mask, dtype=torch.int64)
    start = int(setting.targets[0][1])
    segments[:, start:] = 2
    moved = hidden.clone()
    moved[:, start:] += torch.randn(moved[:, start:].shape, generator=torch.Generator().manual_seed(1))
    for marks, apart in ((segments, True), (mask, False)):  # without marks both are one text: the test has power
        one, other = (head.states(states, marks) for states in (hidden, moved))
        assert torch.equal(one[:, :start], other[:, :start])
        swapped = head.states(torch.cat([moved[:, :start] + 1, hidden[:, start:]], dim=1), marks)
        assert torch.allclose(swapped[:, start:], one[:, start:], atol=1e-5) == apart


def test_a_family_that_mixes_answers_is_refused(tiny_causal, monkeypatch):
    check_apart(tiny_causal)
    run = LlamaFamily.run
    monkeypatch.setattr(LlamaFamily, "run", lambda self, model, block, hidden, mask: run(
        self, model, block, hidden, mask.bool()))  # fmt: skip
    with pytest.raises(ScenarioError, match="keeps the texts of a row apart"):
        make_head(tiny_causal, scenario_of())


def test_both_answers_follow_the_same_prompt_also_where_it_is_cut(tiny_causal):
    scenario = scenario_of().model_copy(update={"model": ModelConfig(head_blocks=1, max_tokens=24)})
    encoded = encode_pairs(tiny_causal, [("x" * 40 + " end ?", "yes", "no , not at all")], scenario)
    prompts = []
    for part in (encoded, encoded.rejected):
        count = int((part.labels[0] == IGNORE).sum()) + 1
        prompts.append(part.token_ids[0][:count])
        assert len(part.token_ids[0]) == len(part.labels[0]) <= 24
    assert prompts[0] == prompts[1]


def test_what_is_no_pair_is_refused(tiny_causal, tiny_base):
    with pytest.raises(ScenarioError, match="needs a rejected answer"):
        encode_pairs(tiny_causal, [("a", "b")], scenario_of())
    with pytest.raises(ScenarioError, match="predicts tokens"):
        make_head(tiny_base, scenario_of())
    empty = Features([np.zeros((2, 32), np.float32)])
    with pytest.raises(ScenarioError, match="a label for every position"):
        join(tiny_causal, empty, empty, [np.zeros(3, np.int64)], blocks=1, micro_batch=1)


def test_a_rating_is_in_one_pair_at_most(tiny, tmp_path):
    data = tiny.tiny_movielens(tmp_path / "data")
    stars = {
        user.user: {r.item: r.target for r in user.train + user.test} for user in read("movielens-100k", data).users
    }
    pairs = read("movielens-pairs", data)
    assert sum(len(user.train + user.test) for user in pairs.users) > 20
    for user in pairs.users:
        items = [item.split("-") for item in (r.item for r in user.train + user.test)]
        assert len(set(itertools.chain(*items))) == 2 * len(items)
        assert all(stars[user.user][a] - stars[user.user][b] >= 2 for a, b in items)
    rows = [Record("same", 5.0, "1", 0), Record("same", 1.0, "2", 1)]
    assert pairs_of_ratings(rows) == ()


def prism_row(number, answers, **changes):
    history = [{"turn": 0, "role": "user", "content": f"question {number}"}]
    history += [
        {"turn": 0, "role": "model", "content": text, "score": score, "if_chosen": chosen}
        for text, score, chosen in answers
    ]
    history += [{"turn": 1, "role": "user", "content": "more"},
                {"turn": 1, "role": "model", "content": "later", "score": 9, "if_chosen": True}]  # fmt: skip
    row = {"conversation_id": f"c{number}", "user_id": f"user{number % 2}", "conversation_history": history,
           "generated_datetime": f"2023-11-2{number} 10:00:00.5"}  # fmt: skip
    return row | changes


def test_prism_gives_one_comparison_a_conversation(tmp_path):
    rows = [
        prism_row(0, [("good", 80, True), ("bad", 10, False), ("worse", 5, False), ("unscored", None, False)]),
        prism_row(1, [("good", 80, True), ("EMPTY STRING", 1, False)]),
        prism_row(2, [("good", 40, True), ("better", 80, False)]),
        prism_row(3, [("fine", 40, True), ("poor", 39.5, False)]),
    ]
    (tmp_path / "conversations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    survey = {"user_id": "user0", "age": "25-34 years old", "gender": "EMPTY STRING", "religion": {"simplified": "x"}}
    (tmp_path / "survey.jsonl").write_text(json.dumps(survey) + "\n")
    found = read("prism", tmp_path)
    first, second = (user.train + user.test for user in found.users)
    assert [(r.text, r.response, r.rejected, r.target, r.item) for r in first] == [
        ("question 0", "good", "worse", 75.0, "c0")
    ]
    assert [(r.response, r.rejected, r.target) for r in second] == [("fine", "poor", 0.5)]
    assert list(found.left_out.values()) == [2]
    assert found.users[0].profile == {"age": "25-34 years old", "religion": "x"}
    for changes, said in (
        ({"user_id": 3}, "user_id must be a plain name"),
        ({"conversation_history": [3]}, "must be a list of objects"),
        ({"generated_datetime": "yesterday"}, "generated_datetime must be a date"),
        ({"conversation_id": "c0"}, "must occur once"),
    ):
        broken = json.dumps(prism_row(0, [("secret", 80, True), ("b", 1, False)]) | {"conversation_id": "c9"} | changes)
        (tmp_path / "conversations.jsonl").write_text(json.dumps(rows[0]) + "\n" + broken + "\n")
        with pytest.raises(DataError, match=f"line 2: .*{said}") as error:
            read("prism", tmp_path)
        assert "secret" not in str(error.value)


def test_pairs_are_scored_over_users():
    users, base = np.array([0, 0, 1]), np.zeros(3)
    row = PairScores(np.array([2.0, -2.0, 4.0]), base, beta=0.5)
    start = PairScores(base, base, beta=0.5)
    found = score_pairs(row, users, reference=start, seed=1, resamples=20)
    assert found["accuracy"].value == pytest.approx(2 / 3)
    assert found["user_accuracy"].value == pytest.approx(0.75)
    assert found["dpo_loss"].value == pytest.approx(np.mean([math.log1p(math.exp(-x)) for x in (1, -1, 2)]))
    assert found["share_gaining"].value == 0.5
    assert accuracy_difference(row, start, users, seed=1, resamples=20).value == pytest.approx(2 / 3 - 0.5)
    with pytest.raises(ValueError, match="finite margins"):
        score_pairs(PairScores(np.array([np.nan] * 3), base, 0.5), users, reference=start, seed=1, resamples=2)


@pytest.fixture(scope="module")
def scenario_file(tiny_llama, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("preference")
    data = tiny.tiny_movielens(folder / "data", users=12)
    path = tiny.tiny_generation(folder, base=tiny_llama, data=data)
    changes = {
        'data.format = "convai2"': 'data.format = "movielens-pairs"',
        'task.name = "generation"': 'task.name = "preference"',
        "model.max_tokens = 48": "model.max_tokens = 120",
    }
    text = path.read_text()
    for old, new in changes.items():
        text = text.replace(old, new)
    path.write_text(text)
    return path


def test_a_run_aligns_to_what_users_chose(scenario_file, tmp_path):
    summary = simulate(load_scenario(scenario_file, ("export.users=0",)), out=tmp_path / "run", quiet=True)
    assert (summary["task"], summary["metric"]) == ("preference", "accuracy")
    assert list(summary["rows"]) == ["base", "local", "federated", "personal"]
    assert summary["rows"]["base"]["accuracy"]["value"] == 0.5
    assert summary["rows"]["base"]["dpo_loss"]["value"] == pytest.approx(math.log(2))
    assert summary["rows"]["federated"]["dpo_loss"]["value"] != summary["rows"]["base"]["dpo_loss"]["value"]
    assert summary["privacy"]["epsilon"] <= 8.0


@pytest.mark.slow
def test_an_aligned_head_is_exported_as_a_language_model(scenario_file, tmp_path):
    summary = simulate(load_scenario(scenario_file), out=tmp_path / "run", quiet=True)
    assert summary["heads"][0]["parity_max_abs"] <= 1e-3


@pytest.fixture(scope="module")
def shipped(homes, scenario_file, tmp_path_factory):
    return homes.publish(scenario_file, tmp_path_factory.mktemp("preference-published"))


def test_an_owner_s_pairs_are_sealed_and_taken_as_in_a_simulation(shipped, homes, tmp_path):
    home = homes.make_home(tmp_path / "home", shipped)
    records = shipped.dataset.users[0].train
    assert home.records().read() == records
    bench = open_workbench(shipped.campaign)
    features, targets = read_inputs(home, bench, records)
    (wanted, expected), _ = pairs_of(bench.base, shipped.campaign.scenario, [r.key for r in records])
    rows = np.arange(len(records))
    for one, other in zip(features.batch(rows), wanted.batch(rows), strict=True):
        assert torch.allclose(one.float(), other.float(), atol=1e-4)
    length = int(features.lengths.max())
    assert torch.allclose(targets.batch(rows, length), expected.batch(rows, length), atol=1e-3)
    again, _ = read_inputs(home, bench, [*records, Record("no pair", 1.0, "1", 0), Record("none", 1.0, "2", 0, "a")])
    assert len(again) == len(records)
    code, reply = homes.ask(home, shipped.campaign)
    assert code is None
    assert all(np.isfinite(array).all() for array in homes.update_in(reply, shipped.campaign).values())


def test_what_was_rejected_is_read_and_kept(homes, tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"text": "q", "target": 0, "response": "a", "rejected": "b"}) + "\n")
    [record] = read_jsonl(path).records
    assert record.key == ("q", "a", "b")
    home = homes.make_home(tmp_path / "home")
    plain = Record("q", 1.0, "1", 2, "a")
    home.records().add([record, plain])
    assert home.records().read() == (record, plain)
    lines = home.vault().open("records/000001").splitlines()
    assert [b"rejected" in line for line in lines] == [True, False]  # as earlier versions wrote it


def test_an_operator_s_holdout_of_pairs_is_scored(shipped, tmp_path):
    records = shipped.dataset.users[1].train[:4]
    fields = {name: name for name in ("text", "target", "response", "rejected")}
    lines = [json.dumps({name: getattr(record, name) for name in fields}) for record in records]
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "rows.jsonl").write_text("\n".join(lines) + "\n")
    holdout = read_holdout("jsonl", str(tmp_path / "own"), columns=fields)
    assert holdout.records[0].rejected == records[0].rejected
    examiner = Examiner(shipped.campaign, holdout, cache=tmp_path / "cache")
    start, slots = shipped.campaign.start, shipped.campaign.policy.array_slots()
    score = examiner.score({slot.name: start[slot.name] for slot in slots})
    assert score.metric == "dpo_loss"
    assert score.value == pytest.approx(math.log(2), abs=1e-4)
    with pytest.raises(DataError, match="response and rejected in every record"):
        Examiner(shipped.campaign, replace(holdout, records=(Record("q", 1.0, "1", 0, "a"),)), cache=tmp_path)


def test_what_only_rounding_moves_is_no_preference():
    rounded = PairScores(np.array([2.0 + 1e-4, -3.0 - 1e-4, 2.1, 1.9]), np.array([2.0, -3.0, 2.0, 2.0]), beta=0.1)
    assert rounded.right.tolist() == [0.5, 0.5, 1.0, 0.0]
