"""A private head fitted in a home: the simulation's own fit, sealed before it touches the disk, used without torch."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from client.export.language_model import export_lm_base
from client.export.private_head import PROBES, head_logits, language_parts, personalize
from client.runtime.artifact import ADAPTER, sign_folder
from client.runtime.generation import open_generator
from client.runtime.runtime import open_head
from client.training.site import TextFeatures, resident_base
from shared.config import load_scenario
from shared.errors import CampaignError, HeadError, LedgerError, SottovoceError, StoreError
from shared.heads.adapter import load_shared, load_start
from shared.privacy.noise import seeded_generator
from shared.protocol.signing import load_private
from simulations.observe.language import LanguageObserver
from simulations.observe.observe import RatingObserver
from sottovoce.cli import main

ROOT = Path(__file__).parent.parent


def run(capsys, *arguments):
    """Exit code, standard output, standard error of a command."""
    code = main(["client", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys, *arguments):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("sottovoce: ")
    assert err.count("\n") == 1
    return err


def moved(campaign, *, seed=0):
    """Shared arrays as they might be after some rounds."""
    random = np.random.default_rng(seed)
    start = {slot.name: campaign.start[slot.name] for slot in campaign.policy.array_slots()}
    return {name: array + random.normal(0, 0.1, array.shape).astype("float32") for name, array in start.items()}


def observer_of(kind, published):
    """The simulation's observer of a campaign."""
    campaign = published.campaign
    base = resident_base(campaign.scenario.model.base)
    head = campaign.new_head(base)
    load_start(head, campaign.start)
    texts = TextFeatures(base, campaign.scenario, published.dataset)
    return kind(head, texts, published.dataset, campaign.scenario, quiet=True)


@pytest.fixture(scope="module")
def tiny_fleet(tiny_fleet, homes, published, tmp_path_factory):
    """The fleet's base, signed by the campaign's operator."""
    return homes.sign_base(tiny_fleet, published, tmp_path_factory.mktemp("signed") / "base")


@pytest.fixture
def home(homes, published, tmp_path):
    """A home with the records of user 0 that has answered round 1."""
    made = homes.make_home(tmp_path / "home", published)
    assert homes.ask(made, published.campaign, arrays=moved(published.campaign))[0] is None
    return made


def test_the_head_is_the_one_the_simulation_measures(home, published, tiny_fleet):
    done = personalize(home, base_folder=tiny_fleet)
    observer = observer_of(RatingObserver, published)
    private = observer.private_output(moved(published.campaign), 0)
    texts = [record.text for record in published.dataset.users[3].train]
    rows = [observer._texts.row[text, ""] for text in texts]
    features, shared = observer.text_predictions(moved(published.campaign))
    wanted = private.predict(features[rows], shared[rows])
    assert np.abs(wanted - shared[rows]).max() > 0.05  # the private part is at work
    found = open_head(home.heads().read(), base=tiny_fleet)
    np.testing.assert_allclose(found.raw(texts), wanted, atol=1e-4)
    assert (done.version, done.records) == (1, len(published.dataset.users[0].train))
    assert done.shared == "the shared part of round 1"
    assert done.parity <= 1e-4
    assert done.measure == "max_abs"
    [version] = home.heads().versions()
    assert (version.campaign, version.round) == (published.campaign.policy.campaign, "1")
    privacy = found.manifest["privacy"]
    assert privacy["policy_sha256"] == published.campaign.policy.sha256
    assert f"epsilon = {published.campaign.policy.epsilon:g}" in privacy["claim"]


def test_before_the_first_round_the_public_start_is_personalized(homes, published, tiny_fleet, tmp_path):
    home = homes.make_home(tmp_path / "new", published)
    assert personalize(home, base_folder=tiny_fleet).shared == "the campaign's public start"
    texts = [record.text for record in published.dataset.users[0].test]
    observer = observer_of(RatingObserver, published)
    start = {slot.name: published.campaign.start[slot.name] for slot in published.campaign.policy.array_slots()}
    private = observer.private_output(start, 0)
    rows = [observer._texts.row[text, ""] for text in texts]
    features, shared = observer.text_predictions(start)
    found = open_head(home.heads().read(), base=tiny_fleet).raw(texts)
    np.testing.assert_allclose(found, private.predict(features[rows], shared[rows]), atol=1e-4)


@pytest.mark.parametrize("retriever", ["dense", "bm25"])
def test_a_memory_is_sealed_with_the_head_and_recalls_what_was_said(homes, tiny_world, tiny_fleet, tmp_path, retriever):
    changes = ("personal.method=retrieval", f"personal.retriever={retriever}", "personal.neighbours=1")
    settings = (*changes, "personal.ridge=1e-6", "export.users=0")
    published = homes.publish(tiny_world(tmp_path), tmp_path / "published", overrides=settings)
    home = homes.make_home(tmp_path / "home", published)
    fleet = homes.sign_base(tiny_fleet, published, tmp_path / "signed")
    personalize(home, base_folder=fleet)
    records = {record.text: record.target for record in published.dataset.users[0].train}
    found = open_head(home.heads().read(), base=fleet).predict(list(records))
    np.testing.assert_allclose(found, list(records.values()), atol=0.01)
    files = [path.read_bytes() for path in home.folder.rglob("*") if path.is_file()]
    assert not any(text.encode() in content for text in records for content in files)


_written: list[str] | None = None


def _hook(event, arguments):
    if _written is not None and event in ("open", "os.rename"):
        path = arguments[0] if event == "open" else arguments[1]
        writes = event != "open" or (isinstance(arguments[2], int) and arguments[2] & 3)
        if writes and isinstance(path, str | bytes | Path):
            _written.append(str(path))


sys.addaudithook(_hook)


def test_no_personal_file_but_sealed_ones_is_written(home, published, tiny_fleet):
    global _written
    _written = []
    try:
        personalize(home, base_folder=tiny_fleet)
    finally:
        written, _written = _written, None
    outside = {path for path in written if not path.startswith(str(home.folder)) and path != "/dev/null"}
    assert any("heads" in path for path in written)  # the hook sees writes
    assert not outside
    inside = {Path(path).relative_to(home.folder).parts[0] for path in written if path not in outside | {"/dev/null"}}
    assert inside <= {"vault", "lock", "ledger.db", "ledger.db-wal", "ledger.db-shm", "keys"}
    adapter = home.heads().read()[ADAPTER]
    texts = {record.text.encode() for record in published.dataset.users[0].train}
    for path in home.folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert adapter[-64:] not in content
            assert not any(text in content for text in texts)


def test_predict_with_the_home_s_head_and_roll_back(home, homes, published, tiny_fleet, capsys):
    assert run(capsys, "personalize", "--home", home.folder, "--base", tiny_fleet)[0] == 0
    arguments = ("predict", "--home", home.folder, "--base", tiny_fleet, "--text", PROBES[0], "--json")
    first = json.loads(run(capsys, *arguments)[1])["predictions"]
    later = moved(published.campaign, seed=9)
    assert homes.ask(home, published.campaign, round_number=2, answered=1, arrays=later)[0] is None
    policy = published.campaign.policy.sha256[:6]
    code, out, _ = run(capsys, "personalize", "--home", home.folder, "--base", tiny_fleet, "--campaign", policy)
    assert code == 0
    assert "version 2 is current" in out
    assert "round 2" in out
    second = json.loads(run(capsys, *arguments)[1])["predictions"]
    assert second != first
    assert run(capsys, "rollback", "--home", home.folder)[0] == 0
    assert json.loads(run(capsys, *arguments)[1])["predictions"] == first
    assert "--base" in refused(capsys, "predict", "--home", home.folder, "--text", "x")
    with pytest.raises(SystemExit):
        main(["client", "predict", "--home", "h", "--head", "d", "--text", "x"])


def test_predict_from_a_home_needs_neither_torch_nor_flower(home, tiny_fleet):
    personalize(home, base_folder=tiny_fleet)
    arguments = ["client", "predict", "--home", str(home.folder), "--base", str(tiny_fleet), "--text", "Heat"]
    script = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "flwr", "dp_accounting", "transformers", "onnx"):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Block())
from sottovoce.cli import main
sys.exit(main({arguments!r}))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Heat" in done.stdout


def test_only_the_newest_heads_are_kept(home, tiny_fleet, monkeypatch):
    monkeypatch.setattr("client.export.private_head._KEPT", 2)
    for _ in range(3):
        personalize(home, base_folder=tiny_fleet)
    assert [version.number for version in home.heads().versions()] == [2, 3]
    assert home.heads().current() == 3


def test_what_cannot_be_fitted_is_refused_and_the_shelf_stays(home, homes, published, tiny_fleet, tmp_path, capsys):
    personalize(home, base_folder=tiny_fleet)
    shared = home.campaign_folder(published.campaign.policy.sha256) / "shared.safetensors"
    good = shared.read_bytes()
    common = ("personalize", "--home", home.folder, "--base", tiny_fleet)
    for content in (b"", good[:-4], b"\xff" * 100):
        shared.write_bytes(content)
        refused(capsys, *common)
    from safetensors.numpy import save

    for value in (np.nan, 1e6):
        arrays = moved(published.campaign)
        first = next(iter(arrays))
        arrays[first] = np.full_like(arrays[first], value)
        shared.write_bytes(save({**arrays, "round": np.array([1])}))
        refused(capsys, *common)
    shared.write_bytes(save({"other": np.zeros(2, "float32")}))
    refused(capsys, *common)
    shared.write_bytes(good)
    assert "first 4" in refused(capsys, *common, "--campaign", "ffffffff")
    refused(capsys, "personalize", "--home", home.folder, "--base", tmp_path / "nowhere")
    policy = home.campaign_folder(published.campaign.policy.sha256) / "policy.json"
    altered = policy.read_text().replace('"rounds": 3', '"rounds": 4')
    assert altered != policy.read_text()
    policy.write_text(altered)
    assert "altered" in refused(capsys, *common)
    assert len(home.heads().versions()) == 1
    stranger = homes.make_home(tmp_path / "no-consent")
    with pytest.raises(LedgerError, match="none"):
        personalize(stranger, base_folder=tiny_fleet)
    empty = homes.make_home(tmp_path / "no-records", published, user=None)
    with pytest.raises(StoreError, match="this home has none"):
        personalize(empty, base_folder=tiny_fleet)


def test_a_head_that_disagrees_with_torch_is_not_kept(home, tiny_fleet, monkeypatch):
    import client.export.encoder

    monkeypatch.setattr(client.export.encoder, "TOLERANCE", 1e-12)
    with pytest.raises(HeadError, match="must agree within"):
        personalize(home, base_folder=tiny_fleet)
    assert home.heads().versions() == ()


def test_a_home_whose_kept_campaign_is_gone_says_so(home, published, tiny_fleet):
    (home.campaign_folder(published.campaign.policy.sha256) / "policy.json").unlink()
    with pytest.raises(CampaignError):
        personalize(home, base_folder=tiny_fleet)


@pytest.fixture(scope="module")
def language(homes, tiny, tiny_llama, tmp_path_factory):
    """A signed campaign of next utterances, and the fleet's base for it."""
    folder = tmp_path_factory.mktemp("language")
    path = tiny.tiny_generation(folder, base=tiny_llama, data=tiny.tiny_dialogues(folder / "data"))
    published = homes.publish(path, folder, overrides=("personal.learning_rate=0.02", "personal.epochs=3"))
    scenario, base = load_scenario(path), resident_base(str(tiny_llama))
    head = published.campaign.new_head(base)
    fleet = folder / "heads" / "base"
    export_lm_base(
        base.folder,
        fleet,
        base_sha256=base.sha256,
        blocks=range(head.first_block, base.num_blocks),
        targets=scenario.adapter.targets,
        template=scenario.task.template,
        max_tokens=base.positions,
        probe_texts=PROBES,
        logits=lambda token_ids: head_logits(None, base, token_ids),
    )
    sign_folder(fleet, load_private(published.private))
    return published, fleet, base


def test_a_language_head_is_the_one_the_simulation_measures(language, homes, tmp_path, capsys):
    published, fleet, base = language
    campaign = published.campaign
    home = homes.make_home(tmp_path / "home", published)
    assert homes.ask(home, campaign, arrays=moved(campaign))[0] is None
    order = {"seed": campaign.scenario.seed, "purpose": "fine-tuning", "device": 0, "round_number": 0}
    personalize(home, base_folder=fleet, generator=seeded_generator(**order))
    observer = observer_of(LanguageObserver, published)
    load_shared(observer.head, observer.private_arrays(moved(campaign), 0))
    wanted = language_parts(observer.head, base, campaign.scenario)["logits"](np.array([[1, 5, 9, 30]]))[0]
    found = open_generator(home.heads().read(), base=fleet)
    np.testing.assert_allclose(found.logits([1, 5, 9, 30]), wanted, atol=2e-4)
    load_shared(observer.head, moved(campaign))
    bare = head_logits(observer.head, base, np.array([[1, 5, 9, 30]]))[0]
    assert np.abs(bare - wanted).max() > 0.01  # the private part is at work
    arguments = ("generate", "--home", home.folder, "--prompt", "tea ?", "--max-new-tokens", 5, "--json")
    code, out, _ = run(capsys, *arguments, "--base", fleet)
    assert code == 0
    assert json.loads(out)["token_ids"] == list(found.generate("tea ?", max_new_tokens=5).token_ids)
    assert "--base" in refused(capsys, *arguments)
    assert "--base" not in refused(capsys, "predict", "--home", home.folder, "--base", fleet, "--text", "x")


def test_a_base_of_another_kind_is_refused(language, homes, tiny_fleet, tmp_path):
    home = homes.make_home(tmp_path / "home", language[0])
    with pytest.raises(SottovoceError):
        personalize(home, base_folder=tiny_fleet)
    assert home.heads().versions() == ()
