"""The package of docs/extending.md, on the path as an installed one is: run, recorded, and refused where due."""

import json
import re
import sys
import tomllib
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import ElectraConfig, ElectraModel

from client.personal.personalize import PersonalMethod, PrivateOutput, personal_method
from client.service.conditions import Surroundings, unmet
from shared.config import PersonalConfig, Scenario, load_scenario
from shared.datasets import read
from shared.errors import AssetError, CampaignError, DataError, PrivacyError, ScenarioError
from shared.heads.lora import inject
from shared.metrics.ratings import METRICS, score_row
from shared.metrics.text import judge_named
from shared.models.model import load_base
from shared.privacy.compatible import check_compatible, check_extensions, check_family, choices, extensions
from shared.privacy.policy import Policy, read_policy
from shared.protocol.campaign import make_head
from shared.registry import KINDS
from simulations.run import simulate

DOCUMENT = (Path(__file__).parent.parent / "docs" / "extending.md").read_text(encoding="utf-8")
CODE = "\n".join(re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL))
(_TOML,) = re.findall(r"```toml\n(.*?)```", DOCUMENT, re.DOTALL)
ENTRIES = {
    group.removeprefix("sottovoce."): {name: value.removeprefix("my_package:") for name, value in registered.items()}
    for group, registered in tomllib.loads(_TOML)["project"]["entry-points"].items()
}
CHOICES = """
data.format = "diary"
personal.method = "level"
federation.method = "output-only"
federation.aggregation = "middle-half"
adapter.technique = "rslora"
evaluation.metrics = ["largest_error"]
linear.enabled = false
"""


@pytest.fixture
def my_package(install_package):
    return install_package("my_package", CODE, ENTRIES)


@pytest.fixture
def diaries(tmp_path):
    folder = tmp_path / "diaries"
    folder.mkdir()
    draw = np.random.default_rng(0)
    words = ["rain", "sun", "snow", "wind", "fog"] + [f"wonder {i}" for i in range(15)]
    for user in range(12):
        rows = [f"{time}\t{draw.integers(1, 6)}\tDay of {draw.choice(words)}, {time}" for time in range(15)]
        (folder / f"anna-{user}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (folder / "public.txt").write_text("\n".join(f"Day of {word}" for word in words) + "\n", encoding="utf-8")
    return folder


def test_a_judge_from_outside_compares(my_package):
    assert Scenario.model_validate({"name": "x", "evaluation": {"judge": "shorter"}}).evaluation.judge == "shorter"
    said = {"prompt": "?", "own": "", "embed": None}
    judge = judge_named("shorter")
    assert [judge(first=a, second=b, **said) for a, b in (("a", "b c"), ("b c", "a"), ("a", "b"))] == [1.0, 0.0, 0.5]


def test_a_condition_from_outside_says_when(my_package, tmp_path):
    zone = tmp_path / "sys/class/thermal/thermal_zone0"
    zone.mkdir(parents=True)
    (zone / "temp").write_text("55400\n")
    seen = Surroundings(now=datetime.now().astimezone(), root=tmp_path)
    assert unmet({"cool": "60"}, seen) == {}
    assert unmet({"cool": "50"}, seen) == {"cool": "it is 55 degrees warm"}
    assert unmet({"cool": "60"}, Surroundings(now=seen.now, root=tmp_path / "none")).keys() == {"cool"}


def named(**tables):
    return Scenario.model_validate({"name": "x", "personal": {"method": "mine"}, **tables})


def test_the_document_registers_one_of_each_kind():
    assert set(ENTRIES) == set(KINDS)
    for block in re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL):
        assert len([line for line in block.splitlines() if line.strip()]) <= 10


@pytest.mark.slow
def test_a_whole_simulation_with_everything_from_outside(my_package, diaries, tiny_world, tmp_path):
    scenario = load_scenario(tiny_world(tmp_path, body=CHOICES), (f"data.source={diaries}",))
    summary = simulate(scenario, out=tmp_path / "out", quiet=True)
    assert summary["data"]["name"] == "diary"
    assert summary["federation"]["method"] == "output-only"
    assert summary["federation"]["personal_method"] == "level"
    for row in summary["rows"].values():
        assert set(row) == {*METRICS, "largest_error"}
        assert row["largest_error"]["value"] >= row["user_rmse"]["value"] > 0
    policies = [read_policy(path.read_text()) for path in (tmp_path / "out").rglob("policy.json")]
    assert [policy.extensions for policy in policies] == [
        (
            "federation method 'output-only' of my_package 1.2",
            "personal method 'level' of my_package 1.2",
            "technique 'rslora' of my_package 1.2",
            "data format 'diary' of my_package 1.2",
            "aggregation rule 'middle-half' of my_package 1.2",
        )
    ]
    assert [name for name, _ in policies[0].slots] == ["output.weight"]
    assert json.loads((tmp_path / "out" / "scenario.json").read_text())["personal"]["method"] == "level"


def test_a_device_with_another_version_refuses(my_package, install_package, tmp_path):
    scenario = Scenario.model_validate({"name": "x", "personal": {"method": "level"}})
    policy = _policy(extensions(scenario))
    check_extensions(policy, scenario)
    for path in my_package.glob("*.dist-info"):
        (path / "METADATA").write_text("Metadata-Version: 2.1\nName: my_package\nVersion: 1.3\n")
    sys.path.insert(0, str(tmp_path))  # the path decides, so that what is installed is looked at again
    try:
        with pytest.raises(CampaignError, match=r"my_package 1\.2; here is personal method 'level' of my_package 1\.3"):
            check_extensions(policy, scenario)
    finally:
        sys.path.remove(str(tmp_path))
    with pytest.raises(CampaignError, match="the policy names no extension"):
        check_extensions(_policy(()), scenario)


def _policy(named_extensions):
    return Policy.model_construct(extensions=named_extensions)


@pytest.mark.parametrize(
    "declared",
    [
        "PersonalMethod(fit, read_by_shared_step=True, summary='joint')",
        "PersonalMethod(fit, read_by_shared_step=None, summary='silent')",
        "PersonalMethod(fit, read_by_shared_step=0, summary='nearly')",
        "fit",
    ],
)
def test_a_personal_method_that_does_not_declare_itself_unread_is_refused(install_package, declared):
    code = f"from client.personal.personalize import PersonalMethod, fit_none as fit\nmine = {declared}\n"
    install_package("ext", code, {"personal_methods": {"mine": "mine"}})
    with pytest.raises(PrivacyError, match=r"'mine' .* not private at unit 'record'.*\['none', 'fine-tune', "):
        check_compatible(choices(named()))
    check_compatible(choices(named(privacy={"trust": "none"})))


def test_a_personal_method_that_cannot_be_imported_is_not_taken_for_private(install_package):
    install_package("ext", "raise ImportError('gone')", {"personal_methods": {"mine": "mine"}})
    with pytest.raises(ScenarioError, match=r"ext 1\.2 cannot be imported"):
        check_compatible(choices(named()))


def test_the_personal_method_of_the_document_by_hand(my_package):
    fitted = personal_method("level")(
        np.ones((2, 3)), np.array([1.0, 3.0]), mean=np.zeros(3), personal=PersonalConfig(bias_shrinkage=2.0)
    )
    assert (fitted.weight.tolist(), fitted.bias) == ([0.0, 0.0, 0.0], 1.0)


@pytest.mark.parametrize(
    "found",
    [
        None,
        PrivateOutput(np.zeros(2), 0.0),
        PrivateOutput(np.zeros(3), np.nan),
        PrivateOutput(np.full(3, np.inf), 0),
        PrivateOutput(np.zeros(3), None),
        PrivateOutput(["a", "b", "c"], 0.0),
    ],
)
def test_what_a_personal_method_gives_is_checked(found):
    method = PersonalMethod(lambda *_, **__: found, read_by_shared_step=False, summary="broken")
    with pytest.raises(ScenarioError, match="must give a finite PrivateOutput of width 3"):
        method(np.zeros((1, 3)), np.zeros(1), mean=np.zeros(3), personal=PersonalConfig())


def test_the_technique_of_the_document_scales_by_the_root(my_package, tiny_base):
    plain, rooted = (
        make_head(tiny_base, Scenario.model_validate({"name": "x", "adapter": {"technique": name, "rank": 4}}))
        for name in ("lora", "rslora")
    )
    assert plain.state_dict().keys() == rooted.state_dict().keys()
    layers = [head.blocks[0].output.dense for head in (plain, rooted)]
    assert [layer.scaling["default"] for layer in layers] == [2.0, 1.0]


def test_a_personal_method_cannot_change_the_public_centre():
    def fit(features, residuals, *, mean, personal):
        mean += 1
        return PrivateOutput(np.zeros(2), 0.0)

    mean = np.zeros(2)
    PersonalMethod(fit, read_by_shared_step=False, summary="")(
        np.ones((1, 2)), np.ones(1), mean=mean, personal=PersonalConfig()
    )
    assert mean.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("code", ["blocks[0].extra = torch.nn.Linear(2, 2)", "pass"])
def test_a_technique_adds_lora_and_nothing_else(install_package, tiny_base, code):
    install_package("ext", f"import torch\ndef mine(blocks, adapter):\n    {code}\n", {"techniques": {"mine": "mine"}})
    scenario = Scenario.model_validate({"name": "x", "adapter": {"technique": "mine"}})
    with pytest.raises(ScenarioError, match="'mine' must add peft's LoRA layers and nothing else"):
        inject(torch.nn.ModuleList([torch.nn.Linear(2, 2)]), scenario.adapter)


def test_a_base_of_a_family_from_outside(my_package, tiny_base, tmp_path):
    config = ElectraConfig(
        vocab_size=tiny_base.model.config.vocab_size,
        embedding_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    folder = tmp_path / "electra"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ElectraModel(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((tiny_base.folder / "tokenizer.json").read_bytes())
    base = load_base(folder)
    ids = torch.tensor([[2, 9, 11, 3]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    expected = ElectraModel.from_pretrained(folder).eval()(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(base.backbone(ids, mask, head_blocks=0), expected.mean(1, keepdim=True))
    assert base.extension == "model family 'electra' of my_package 1.2"  # its code runs in the shared step
    check_family(_policy((base.extension,)), base.extension)
    check_extensions(_policy((base.extension,)), Scenario(name="x"))  # which knows no base
    for named, found in (((), base.extension), ((base.extension,), None), ((base.extension,), base.extension + ".1")):
        with pytest.raises(CampaignError, match="Install what the policy names"):
            check_family(_policy(named), found)
    assert tiny_base.extension is None


def test_a_base_of_no_family_names_the_installed_ones_too(my_package, tiny_base, tmp_path):
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((tiny_base.folder / name).read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(AssetError, match=r"known family \(bert, .*electra\), got 'mamba'"):
        load_base(tmp_path)


def test_the_metric_of_the_document_by_hand(my_package):
    users = np.array([0, 1, 1])
    row = score_row(np.array([1.0, 2.0, 5.0]), np.array([2.0, 2.0, 2.0]), users, seed=0, metrics=("largest_error",))
    assert {name: value.value for name, value in row.items()} == {"largest_error": (1 + 3) / 2}
    assert (row["largest_error"].low, row["largest_error"].high) == (1.0, 3.0)


def test_a_metric_that_gives_a_number_is_refused(install_package):
    install_package("ext", "def mine(rows):\n    return 3.0\n", {"metrics": {"mine": "mine"}})
    with pytest.raises(ScenarioError, match="'mine' must give a function of draws, as over_users does, got float"):
        score_row(np.ones(2), np.ones(2), np.arange(2), seed=0, metrics=("mine",))


def test_a_metric_that_is_not_finite_is_refused(install_package):
    code = (
        "from shared.metrics.ratings import over_users\n"
        "def mine(rows):\n    return over_users([float('nan')] * len(rows.count))\n"
    )
    install_package("ext", code, {"metrics": {"mine": "mine"}})
    with pytest.raises(ScenarioError, match="'mine' must give finite values, got nan"):
        score_row(np.ones(2), np.ones(2), np.arange(2), seed=0, metrics=("mine",))


def test_a_row_the_reader_of_the_document_does_not_expect_is_one_line(my_package, diaries):
    (diaries / "anna-3.tsv").write_text("1\tfive\tDay\n")
    with pytest.raises(DataError, match="must hold data of format 'diary', its reader says: could not convert"):
        read("diary", diaries)
    (diaries / "anna-3.tsv").write_text("1\tnan\tDay\n")
    with pytest.raises(DataError, match="user 'anna-3': target must be finite, got nan"):
        read("diary", diaries)


@pytest.mark.parametrize(
    ("made", "says"),
    [
        ("[1, 2]", "must give a Dataset, got list"),
        ("Dataset('mine', (), ('a', 'b'))", "at least one user"),
        ("Dataset('mine', (user('1'), user('1')), ('a', 'b'))", "user '1' must occur once"),
        ("Dataset('mine', (user('../1'),), ('a', 'b'))", "must be a plain name"),
        ("Dataset('mine', (user(''),), ('a', 'b'))", "must be a plain name"),
        ("Dataset('mine', (user('1', float('nan')),), ('a', 'b'))", "user '1': target must be finite, got nan"),
        ("Dataset('mine', (user('1', float('inf')),), ('a', 'b'))", "user '1': target must be finite, got inf"),
        ("Dataset('mine', (user('1', text=3),), ('a', 'b'))", "user '1': text must be a string, got int"),
        ("Dataset('mine', (user('1'),), ('a', 'a'))", "public texts must be distinct"),
    ],
)
def test_what_a_reader_gives_is_checked(install_package, tmp_path, made, says):
    code = (
        "from shared.datasets import Dataset, Record, UserData\n"
        "def user(name, target=1.0, text='t'):\n    return UserData(name, (Record(text, target, '1', 1),), (), ())\n"
        f"def mine(folder):\n    return {made}\n"
    )
    install_package("ext", code, {"readers": {"mine": "mine"}})
    with pytest.raises(DataError, match=re.escape(says)) as caught:
        read("mine", tmp_path)
    assert "\n" not in str(caught.value)
