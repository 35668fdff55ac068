"""Task tagging whole: a run with its rows and heads, a device's own head, an operator's hold-out, and the page."""

import copy
import json
from datetime import UTC, datetime

import numpy as np
import pytest
import torch

import client.export.graph
from client.cli import _in_words, _said
from client.export.encoder import export_head
from client.export.fleet import export_fleet
from client.export.private_head import encoder_parts, personalize
from client.runtime.runtime import base_id, open_base, open_head
from client.training.site import TextFeatures, resident_base
from server.app import start_checkpoint
from server.holdout import Examiner, Holdout, read_holdout
from shared.config import load_scenario
from shared.datasets import Record
from shared.errors import DataError, HeadError
from shared.heads.adapter import load_start
from simulations.observe.tagging import TaggingObserver
from simulations.report.report import headline, write_report
from simulations.run import simulate

CREATED = datetime(2031, 1, 2, tzinfo=UTC)
LABELS = ("none", "liked", "disliked")
BODY = f"""
task.name = "tagging"
task.labels = {json.dumps(LABELS)}
linear.enabled = false
personal.ridge = 0.1
personal.bias_shrinkage = 1.0
"""


def write_data(folder, *, users=12, films=40, each=20):
    """Write films of two kinds, in MovieLens' layout; every second user likes the other kind."""
    folder.mkdir()
    draw = np.random.default_rng(4)
    items = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"]
    titles = ("Sunny sunny comedy", "Dark dark horror")
    items += [f"{n}\t{titles[n % 2]} {n}\t{1950 + n}\t{('Comedy', 'Horror')[n % 2]}" for n in range(1, films + 1)]
    ratings = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for user in range(1, users + 1):
        for when, film in enumerate(draw.permutation(np.arange(1, films + 1))[:each]):
            ratings.append(f"{user}\t{film}\t{1 + (film + user) % 2}\t{when}")
    (folder / "ml-100k.item").write_text("\n".join(items) + "\n", encoding="utf-8")
    (folder / "ml-100k.inter").write_text("\n".join(ratings) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def scenario_file(tiny, tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tagging")
    return tiny.tiny_scenario(folder, base=tiny_base.folder, data=write_data(folder / "data"), body=BODY)


@pytest.fixture(scope="module")
def run(scenario_file, tiny_graph, tmp_path_factory):
    out = tmp_path_factory.mktemp("tagging-run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client.export.graph, "_trace", lambda model, *, max_tokens: copy.deepcopy(tiny_graph))
        summary = simulate(load_scenario(scenario_file, ("export.users=1",)), out=out, quiet=True)
    return out, summary


@pytest.fixture(scope="module")
def published(homes, scenario_file, tmp_path_factory):
    return homes.publish(scenario_file, tmp_path_factory.mktemp("tagging-published"))


@pytest.fixture(scope="module")
def base_folder(homes, published, tiny_graph, tmp_path_factory):
    """The base of the campaign's fleet, signed by its operator."""
    campaign, folder = published.campaign, tmp_path_factory.mktemp("tagging-base")
    base = resident_base(campaign.scenario.model.base)
    head = campaign.new_head(base)
    load_start(head, campaign.start)
    texts = [f"A film about number {n}" for n in range(16)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client.export.graph, "_trace", lambda model, *, max_tokens: copy.deepcopy(tiny_graph))
        export_fleet(base, head, campaign.scenario, folder / "plain", probe_texts=texts)
    return homes.sign_base(folder / "plain", published, folder / "base")


def observe(published):
    campaign = published.campaign
    base = resident_base(campaign.scenario.model.base)
    head = campaign.new_head(base)
    load_start(head, campaign.start)
    texts = TextFeatures(base, campaign.scenario, published.dataset)
    return TaggingObserver(head, texts, published.dataset, campaign.scenario)


def moved(campaign):
    """Shared arrays as they might be after some rounds."""
    draw = np.random.default_rng(0)
    slots = campaign.policy.array_slots()
    return {slot.name: draw.normal(scale=0.2, size=slot.shape).astype(np.float32) for slot in slots}


def test_a_private_part_is_right_where_half_of_the_users_mean_the_opposite(published):
    observer, arrays = observe(published), moved(published.campaign)
    seen = observer.predict(arrays, known=observer.train, asked=observer.test)
    truth = observer.test.target
    assert np.mean(seen.personal == truth) > 0.95
    assert np.mean(seen.shared == truth) < 0.75
    cold = observer.cold_rows(arrays, [0, 3, 1000])
    assert np.array_equal(cold[0]["personal"], seen.shared)
    assert np.array_equal(cold[1000]["personal"], seen.personal)
    right = [np.mean(cold[count]["local"] == truth) for count in (0, 3, 1000)]
    assert right[0] == 0
    assert right[1] < right[2]


@pytest.mark.slow
def test_where_half_of_the_users_mean_the_opposite_only_a_private_part_is_right(run):
    _, summary = run
    accuracy = {row: scores["accuracy"]["value"] for row, scores in summary["rows"].items()}
    assert list(accuracy) == ["constant", "user-majority", "pooled", "local", "federated", "personal"]
    assert accuracy["personal"] > 0.95
    assert accuracy["local"] > 0.9
    assert max(accuracy[row] for row in ("constant", "user-majority", "pooled", "federated")) < 0.75
    assert summary["metric"] == "accuracy"
    assert summary["metrics"]["accuracy"]["better"] == "more"
    assert summary["differences"]["personal - federated"]["accuracy"]["low"] > 0


@pytest.mark.slow
def test_the_report_takes_more_for_better(run):
    out, summary = run
    page = write_report(out).read_text(encoding="utf-8")
    assert "It is better than <code>pooled</code>" in page
    assert "It is worse than" not in page
    assert any("above 0: personal is better" in line for line in headline(summary))


def test_a_run_without_a_record_of_a_label_is_no_error_and_one_beyond_the_list_is(scenario_file, tmp_path):
    with pytest.raises(DataError, match=r"must be a place in task\.labels, 0 to 1"):
        simulate(load_scenario(scenario_file, ('task.labels=["none","liked"]',)), out=tmp_path / "out", quiet=True)


@pytest.mark.slow
def test_an_exported_head_gives_the_probabilities_torch_gives(run, published):
    out, summary = run
    [exported] = summary["heads"]
    assert 0 <= exported["parity_max_abs"] <= 1e-5
    head = open_head(out / exported["path"])
    assert head.base.labels == LABELS
    assert head.base.slots["output.bias"] == (3,)
    texts = [record.text for record in published.dataset.users[0].test]
    found = head.predict(texts)
    assert found.shape == (len(texts), 3)
    assert found.min() > 0
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)
    assert head.predict([]).shape == (0, 3)
    wanted = [int(record.target) for record in published.dataset.users[0].test]
    assert (found.argmax(1) == wanted).mean() > 0.9
    said = _said(found[0].tolist(), LABELS)
    assert said["prediction"] == LABELS[found[0].argmax()]
    assert list(said["probabilities"]) == list(LABELS)
    assert _in_words([0.1, 0.7, 0.2], LABELS) == "liked 0.70 (disliked 0.20, none 0.10)"


def test_a_device_fits_and_keeps_the_head_the_simulation_measures(homes, published, base_folder, tmp_path):
    campaign = published.campaign
    home = homes.make_home(tmp_path / "home", published)
    assert homes.ask(home, campaign, arrays=moved(campaign))[0] is None
    done = personalize(home, base_folder=base_folder)
    assert done.parity <= 1e-5
    assert done.records == len(published.dataset.users[0].train)
    observer = observe(published)
    texts = [record.text for record in published.dataset.users[0].test]
    rows = [observer._texts.row[text, ""] for text in texts]
    features, shared = observer.text_predictions(moved(campaign))
    wanted = observer.private_output(moved(campaign), 0).predict(features[rows], shared[rows])
    assert np.abs(wanted - shared[rows]).max() > 0.1  # the private part is at work
    np.testing.assert_allclose(open_head(home.heads().read(), base=base_folder).raw(texts), wanted, atol=1e-4)


def test_heads_that_do_not_compute_what_torch_does_are_not_written(published, base_folder, tmp_path, monkeypatch):
    campaign, observer = published.campaign, observe(published)
    private = observer.private_output(moved(campaign), 0)
    fleet = open_base(base_folder)
    settings = {
        "base_folder": fleet, "user": "u", "privacy": {}, "created": CREATED,
        "probe_texts": [f"{n} films" for n in range(16)],
    }  # fmt: skip
    parts = encoder_parts(observer.head, private)
    export_head(tmp_path / "good", **parts, **settings)
    swapped = parts["output"]._replace(weight=parts["output"].weight[:, ::-1])
    with pytest.raises(HeadError, match="folded from shape"):
        export_head(
            tmp_path / "bad", head=parts["head"], output=swapped._replace(weight=swapped.weight[:, 0]), **settings
        )
    head, right = parts["head"], parts["head"].apply_output
    monkeypatch.setattr(head, "apply_output", lambda pooled, output: right(pooled, swapped))
    with pytest.raises(HeadError, match="must agree within"):
        export_head(tmp_path / "bad", **parts, **settings)
    assert not (tmp_path / "bad").exists()


def test_a_base_whose_labels_are_not_its_outputs_is_refused(base_folder, tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    for file in base_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    for labels, words in (
        (["a", "b"], "as many outputs"),
        (["a", "a", "b"], "labels"),
        ([1, 2, 3], "labels"),
        (["a"], "labels"),
    ):
        manifest["task"]["labels"] = labels
        manifest["id"] = base_id(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        with pytest.raises(HeadError, match=words):
            open_base(folder)


def test_a_hold_out_is_scored_by_what_less_of_is_better(published, tmp_path):
    campaign = published.campaign
    holdout = read_holdout(campaign.scenario.data.format, campaign.scenario.data.source, records=20)
    examiner = Examiner(campaign, holdout, cache=tmp_path)
    start = examiner.score(start_checkpoint(campaign).arrays)
    assert start.metric == "cross_entropy"
    assert start.value == pytest.approx(np.log(3))
    score = examiner.score(moved(campaign))
    observer = observe(published)
    losses = observer.losses(moved(campaign), holdout.records)
    assert score.value == pytest.approx(losses.mean())
    _, logits = observer.text_predictions(moved(campaign))
    said = logits[[observer._texts.row[record.key] for record in holdout.records]].argmax(1)
    assert score.others["accuracy"] == pytest.approx(np.mean(said == [record.target for record in holdout.records]))
    wanted = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits[[observer._texts.row[record.key] for record in holdout.records]]),
        torch.tensor([int(record.target) for record in holdout.records]),
    )
    assert score.value == pytest.approx(float(wanted))
    with pytest.raises(DataError, match=r"places in task\.labels, 0 to 2"):
        Examiner(campaign, Holdout((Record("a", 3.0, "1", 0),), "own"), cache=tmp_path)
