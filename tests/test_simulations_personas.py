"""Personas in a run: their row, what a device of few records gets, and the head that is exported."""

import json
from pathlib import Path

import numpy as np
import pytest

from client.runtime.runtime import open_head
from client.training.site import TextFeatures, resident_base, resident_dataset
from server.checkpoint import last_checkpoint
from shared.config import load_scenario
from shared.heads.adapter import load_start
from shared.heads.scoring import persona_predictions, text_predictions
from shared.protocol.campaign import read_campaign
from simulations.observe.observe import RatingObserver
from simulations.run import simulate

LEAN = ("linear.enabled=false", "statistics.enabled=false", "evaluation.every_rounds=3", "export.users=1")
PERSONAS = (
    "model.head_blocks=0", "federation.method=ifca", "persona.count=3", "persona.spread=0.5", "privacy.trust=none",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tiny_world, tmp_path_factory):
    """Folder and summary of a run with three personas, and an observer of it."""
    folder = tmp_path_factory.mktemp("personas")
    scenario = load_scenario(tiny_world(folder), (*LEAN, *PERSONAS))
    summary = simulate(scenario, out=folder / "out", quiet=True)
    [place] = (folder / "out" / "campaigns").iterdir()
    campaign = read_campaign(place)
    base, dataset = resident_base(scenario.model.base), resident_dataset(scenario.data)
    head = campaign.new_head(base)
    load_start(head, campaign.start)
    observer = RatingObserver(head, TextFeatures(base, scenario, dataset), dataset, scenario)
    arrays = last_checkpoint(place / "checkpoints", policy_sha256=campaign.policy.sha256).arrays
    return folder / "out", summary, observer, arrays


def test_a_row_for_the_groups_stands_between_all_and_one(run):
    folder, summary, _, _ = run
    assert list(summary["rows"]).index("persona") == list(summary["rows"]).index("federated") + 1
    assert {"persona - federated", "personal - persona"} <= set(summary["differences"])
    assert "the shared part with the personas of a user" in (Path(folder) / "report.html").read_text(encoding="utf-8")


def test_every_user_weighs_the_personas_by_their_own_records_alone(run):
    _, _, observer, arrays = run
    seen = observer.predict(arrays, known=observer.train, asked=observer.test)
    features, alike = text_predictions(observer.head, arrays, observer._texts.all)
    each = persona_predictions(observer.head, features)
    np.testing.assert_allclose(alike, each.mean(1), atol=1e-6)
    for user in (0, 5):
        rows, asked = observer.train.of(user), observer.test.of(user)
        losses = 0.5 * (observer.train.target[rows][:, None] - each[observer.train.text[rows]]) ** 2
        count = len(losses)
        weights = np.exp(-losses.mean(0) * count * 20 / (count + 20))
        wanted = each[observer.test.text[asked]] @ (weights / weights.sum())
        np.testing.assert_allclose(seen.persona[asked], np.clip(wanted, 1, 5), atol=1e-6)
    nobody = observer.predict(arrays, known=observer.train.first(0), asked=observer.test)
    np.testing.assert_allclose(nobody.persona, nobody.shared, atol=1e-6)
    np.testing.assert_allclose(nobody.personal, nobody.shared, atol=1e-6)


def test_an_exported_head_is_of_its_users_personas(run):
    folder, summary, observer, arrays = run
    [entry] = summary["heads"]
    texts = list(dict.fromkeys(record.text for record in observer._dataset.users[0].test))
    found = open_head(folder / entry["path"]).predict(texts)
    seen = observer.predict(arrays, known=observer.train, asked=observer.test)
    own = observer.test.of(0)
    by_text = {int(row): value for row, value in zip(observer.test.text[own], seen.personal[own], strict=True)}
    wanted = [by_text[observer._texts.row[text, ""]] for text in texts]
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    _, alike = text_predictions(observer.head, arrays, observer._texts.all)
    assert np.abs(np.array(found) - alike[[observer._texts.row[text, ""] for text in texts]]).max() > 0.01
    assert json.loads((folder / entry["path"] / "manifest.json").read_text(encoding="utf-8"))
