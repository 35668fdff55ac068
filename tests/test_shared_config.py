"""Scenarios: what is read, and the one line a reader gets for each mistake."""

from pathlib import Path

import pytest

from shared.config import Scenario, load_scenario
from shared.errors import ScenarioError

SHIPPED = sorted((Path(__file__).parent.parent / "simulations" / "scenarios").glob("*.toml"))


def write(folder: Path, body: str) -> Path:
    path = folder / "example.toml"
    path.write_text(body, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_scenario_loads_under_its_own_name(path):
    assert load_scenario(path).name == path.stem


def test_there_are_shipped_scenarios():
    assert {"movielens", "movielens-full"} <= {path.stem for path in SHIPPED}


def test_values_and_overrides_are_laid_over_defaults(tmp_path):
    path = write(tmp_path, "[privacy]\nepsilon = 3\n[model]\nhead_blocks = 2\n")
    scenario = load_scenario(path, ("privacy.delta=1e-6", 'model.head_blocks="all"', "data.source=/somewhere"))
    assert (scenario.privacy.epsilon, scenario.privacy.delta) == (3.0, 1e-6)
    assert (scenario.model.head_blocks, scenario.data.source, scenario.name) == (
        "all",
        "/somewhere",
        "example",
    )


def test_a_scenario_is_laid_over_the_one_it_extends_and_keeps_its_own_name(tmp_path):
    (tmp_path / "lowest.toml").write_text('name = "lowest"\nseed = 4\n[privacy]\nepsilon = 3\ndelta = 1e-6\n')
    (tmp_path / "lower.toml").write_text('extends = "lowest.toml"\n[privacy]\nepsilon = 2\n')
    scenario = load_scenario(
        write(tmp_path, 'extends = "lower.toml"\n[personal]\nridge = 7\n'), ("privacy.delta=1e-7",)
    )
    assert (scenario.name, scenario.seed) == ("example", 4)
    assert (scenario.privacy.epsilon, scenario.privacy.delta, scenario.personal.ridge) == (2, 1e-7, 7)


@pytest.mark.parametrize("other", ['"example.toml"', '"back.toml"', "3"])
def test_a_scenario_that_extends_itself_or_nothing_is_refused(tmp_path, other):
    (tmp_path / "back.toml").write_text('extends = "example.toml"')
    with pytest.raises(ScenarioError, match="extends must name another scenario file"):
        load_scenario(write(tmp_path, f"extends = {other}"))


def test_a_resolved_scenario_is_read_back_as_itself(tmp_path):
    scenario = load_scenario(write(tmp_path, 'name = "x"\n[export]\nusers = ["7", "9"]\n'))
    resolved = tmp_path / "scenario.json"
    resolved.write_text(scenario.model_dump_json(), encoding="utf-8")
    assert load_scenario(resolved) == scenario


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("colour = 1", ["colour is not a setting", "privacy"]),
        ("[privacy]\nepsilonn = 1", ["privacy.epsilonn is not a setting", "epsilon", "max_participations"]),
        ("[privacy]\ndelta = 1.5", ["privacy.delta must be less than 1", "1.5", "A common choice"]),
        ("[privacy]\nepsilon = 0", ["privacy.epsilon must be greater than 0", "got 0"]),
        ("[privacy]\nepsilon = nan", ["privacy.epsilon must be a finite number", "nan"]),
        ("[privacy]\nepsilon = inf", ["privacy.epsilon must be a finite number", "inf"]),
        ('[privacy]\nepsilon = "8"', ["privacy.epsilon must be a valid number", "'8'"]),
        (
            "[privacy]\nmax_participations = 2.5",
            ["privacy.max_participations must be a valid integer", "2.5"],
        ),
        (
            '[privacy]\ntrust = "nobody"',
            ["privacy.trust must be 'local', 'distributed', 'central' or 'none'", "'nobody'"],
        ),
        (
            '[federation]\nmethod = "fedsgd"',
            ["federation.method must be 'fedavg', 'ffa-lora', 'rolora' or 'ifca'", "'fedsgd'"],
        ),
        ('[model]\nhead_blocks = "some"', ["model.head_blocks must be a valid integer or 'all'", "'some'"]),
        ("[task]\nlow = 5.0\nhigh = 5.0", ["task.low must be below task.high", "5.0"]),
        ("[federation]\nrounds = true", ["federation.rounds must be", "True"]),
        ("privacy = 3", ["privacy must be an object", "3"]),
        ("[privacy\n", ["must be a valid TOML file"]),
        ("", ["must hold tables of settings"]),
        ("[privacy]\nclip_norm = 1e300", ["privacy.clip_norm must be less than or equal to 1000000000"]),
        ("[training]\nsteps = 1000000", ["training.steps must be less than or equal to 10000"]),
        ("seed = 2020-01-01", ["dates and times are not used here"]),
    ],
)
def test_a_mistake_is_one_line_in_the_spelling_of_the_file(tmp_path, body, says):
    with pytest.raises(ScenarioError) as caught:
        load_scenario(write(tmp_path, body))
    message = str(caught.value)
    assert "\n" not in message
    for part in says:
        assert part in message


@pytest.mark.parametrize("override", ["privacy.epsilon", "=3", "privacy..epsilon=3", "seed.x=3"])
def test_a_malformed_override_is_refused(tmp_path, override):
    with pytest.raises(ScenarioError, match=r"--set|seed"):
        load_scenario(write(tmp_path, "seed = 1"), (override,))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ScenarioError, match=r"nowhere\.toml must be a readable scenario file"):
        load_scenario(tmp_path / "nowhere.toml")


def test_the_linear_companion_changes_only_what_is_named():
    scenario = Scenario.model_validate(
        {"name": "x", "linear": {"rounds": 7, "clip_norm": 0.5, "max_participations": 9}}
    )
    linear = scenario.linear_campaign()
    assert linear is not None
    assert (linear.model.head_blocks, linear.federation.rounds) == (0, 7)
    assert (linear.privacy.clip_norm, linear.privacy.max_participations) == (0.5, 9)
    assert linear.privacy.epsilon == scenario.privacy.epsilon
    assert linear.federation.method == scenario.federation.method


def test_a_linear_scenario_has_no_companion():
    assert Scenario.model_validate({"name": "x", "model": {"head_blocks": 0}}).linear_campaign() is None
    assert Scenario.model_validate({"name": "x", "linear": {"enabled": False}}).linear_campaign() is None
