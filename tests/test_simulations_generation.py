"""A whole simulation of next utterances on a random two-layer Llama: private training, rows, a head that answers."""

import json

import numpy as np
import pytest

import sottovoce
from client.personal.personalize import PERSONAL_METHODS
from client.training.site import resident_base, resident_dataset
from shared.config import load_scenario
from shared.errors import ScenarioError
from shared.metrics.language import TokenScores, perplexity_difference, score_tokens
from simulations.run import simulate
from sottovoce.cli import main

PLANTED = "boatsqz7f31"  # what some users like, and nobody else says


@pytest.fixture(scope="module")
def scenario_file(tiny_llama, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generation")
    data = tiny.tiny_dialogues(folder / "data")
    [dialogues] = data.iterdir()
    dialogues.write_text(dialogues.read_text().replace("boats", PLANTED))
    return tiny.tiny_generation(folder, base=tiny_llama, data=data)


@pytest.fixture(scope="module")
def run(scenario_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    scenario = load_scenario(scenario_file)
    return scenario, out, simulate(scenario, out=out, quiet=True)


def test_the_summary_speaks_of_tokens(run):
    _, out, summary = run
    assert (summary["task"], summary["metric"]) == ("generation", "perplexity")
    assert list(summary["rows"]) == ["base", "local", "federated", "personal"]
    for row in summary["rows"].values():
        assert set(row) == set(summary["metrics"])
        assert row["perplexity"]["value"] == pytest.approx(np.exp(row["nll"]["value"]))
    assert summary["metrics"]["token_accuracy"]["better"] == "more"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2]
    assert all(line["validation"]["personal"] is None for line in lines)
    assert "perplexity" in (out / "report.html").read_text(encoding="utf-8").lower()


def test_a_run_folder_quotes_nobody(run):
    scenario, out, _ = run
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"report.html", "summary.json", "metrics.jsonl", "adapter.safetensors"}
    assert [path for path in files if PLANTED.encode() in path.read_bytes()] == []
    dataset = resident_dataset(scenario.data)
    assert any(PLANTED in record.text + record.response for user in dataset.users for record in user.train)


def test_training_helps_on_the_device_and_privacy_is_claimed(run):
    """Every persona repeats its own words: whoever trains on them must predict them better."""
    _, _, summary = run
    assert summary["differences"]["personal - base"]["perplexity"]["high"] < 0
    assert summary["privacy"]["epsilon"] <= 8.0
    assert summary["privacy"]["unit"] == "record"


def test_the_exported_head_answers_as_the_user_s_model(run, capsys):
    _, out, summary = run
    [head] = summary["heads"]
    assert head["parity_max_abs"] <= 1e-3
    folder = out / head["path"]
    assert (
        main(["client", "generate", "--head", str(folder), "--prompt", "tea ?", "--max-new-tokens", "5", "--json"]) == 0
    )
    answer = json.loads(capsys.readouterr().out)
    personal = sottovoce.open_generator(folder)
    assert list(personal.generate("tea ?", max_new_tokens=5).token_ids) == answer["token_ids"]
    bare = sottovoce.open_generator(out / "heads" / "base")
    assert not np.array_equal(personal.logits([1, 5, 9]), bare.logits([1, 5, 9]))


def test_without_a_private_part_personal_is_the_shared_model(scenario_file, tmp_path):
    scenario = load_scenario(scenario_file, ("personal.method=none", "export.users=0"))
    rows = simulate(scenario, out=tmp_path / "out", quiet=True)["rows"]
    assert rows["personal"] == rows["federated"]
    assert rows["local"]["perplexity"] == rows["base"]["perplexity"]


def test_the_base_s_row_is_what_transformers_says(run):
    """Perplexity of the frozen base over everybody's test responses, by the library's own forward pass."""
    import torch
    from transformers import LlamaForCausalLM

    scenario, _, summary = run
    base = resident_base(scenario.model.base)
    dataset = resident_dataset(scenario.data)
    whole = LlamaForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    total = tokens = 0.0
    for record in (record for user in dataset.users for record in user.test):
        prompt = base.tokenizer.encode(f"<|im_start|>{record.text}<|im_end|>", add_special_tokens=False).ids
        said = base.tokenizer.encode(record.response, add_special_tokens=False).ids
        response = [*said[: 48 // 2 - 1], base.eos_id]
        ids = prompt + response
        ids = ids[:1] + ids[1 + max(0, len(ids) - 49) :]
        with torch.no_grad():
            logits = whole(torch.tensor([ids])).logits[0, -len(response) - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(response), reduction="sum"))
        tokens += len(response)
    assert summary["rows"]["base"]["nll"]["value"] == pytest.approx(total / tokens, rel=1e-5)


def test_a_personal_method_for_ratings_alone_is_refused(scenario_file, tmp_path, monkeypatch):
    only = PERSONAL_METHODS["fine-tune"]
    monkeypatch.setitem(PERSONAL_METHODS, "fine-tune", type(only)(only.fit, False, "for ratings"))
    with pytest.raises(ScenarioError, match="has no form for task 'generation'"):
        simulate(load_scenario(scenario_file), out=tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_token_scores_by_hand():
    scores = TokenScores(np.array([2.0, 6.0, 4.0]), np.array([1.0, 2.0, 4.0]), np.array([1.0, 0.0, 2.0]))
    worse = TokenScores(scores.nll + np.array([1.0, 0.0, 0.0]), scores.tokens, scores.hits)
    users = np.array([3, 5, 3])
    found = score_tokens(scores, users, reference=worse, seed=0, resamples=20)
    assert found["nll"].value == pytest.approx(12 / 7)
    assert found["perplexity"].value == pytest.approx(np.exp(12 / 7))
    assert found["token_accuracy"].value == pytest.approx(3 / 7)
    assert found["user_nll"].value == pytest.approx((6 / 5 + 3.0) / 2)
    assert found["worst_decile"].value == pytest.approx(3.0)
    assert found["share_gaining"].value == 0.5
    difference = perplexity_difference(scores, worse, users, seed=0, resamples=20)
    assert difference.value == pytest.approx(np.exp(12 / 7) - np.exp(13 / 7))
    assert difference.high <= 0
    with pytest.raises(ValueError, match="finite likelihood"):
        score_tokens(
            TokenScores(np.array([np.nan]), np.ones(1), np.ones(1)), users[:1], reference=scores, seed=0, resamples=2
        )


def test_a_plan_passes_no_text_through_the_base(scenario_file, monkeypatch):
    """Nothing public is to be whitened, so that what a run would cost is said at once."""
    import client.training.site
    from simulations.dry_run import describe

    def never(*args, **kwargs):
        raise AssertionError("the backbone ran")

    monkeypatch.setattr(client.training.site, "cached_features", never)
    plan = describe(load_scenario(scenario_file), quiet=True)
    assert plan["campaigns"]["lora"]["bytes_per_round"]["up"] > 0
