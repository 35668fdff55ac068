"""``sottovoce policy`` from a scenario to a verified campaign, and everything that must not pass."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import simulations.publish
from shared.config import load_scenario
from shared.privacy.accounting import calibrate_noise, epsilon
from shared.privacy.compatible import extensions
from shared.privacy.noise import GRID_SIGMA
from shared.privacy.policy import hash_arrays, hash_settings
from shared.protocol.campaign import read_campaign
from shared.protocol.signing import fingerprint, load_private, load_public, sign_policy
from simulations.publish import WORDS, constant_lines, describe, lines, publish
from sottovoce.cli import main


@pytest.fixture(scope="module")
def scenario(tiny_world, tmp_path_factory):
    return tiny_world(tmp_path_factory.mktemp("scenario"), body="evaluation.seeds = 2")


@pytest.fixture(scope="module")
def signed(scenario, tmp_path_factory):
    """A folder with a key pair and a campaign signed by it. Read only."""
    place = tmp_path_factory.mktemp("signed")
    assert main(["policy", "new", str(scenario), "--out", str(place / "campaign"), "--quiet"]) == 0
    assert main(["policy", "key", str(place / "operator")]) == 0
    assert main(["policy", "sign", str(place / "campaign"), "--key", str(place / "operator")]) == 0
    return place


@pytest.fixture
def place(signed, tmp_path):
    """A copy of it that may be broken."""
    shutil.copytree(signed, tmp_path / "place")
    return tmp_path / "place"


@pytest.fixture
def run(capsys):
    """Gives what a command said that must succeed."""

    def succeed(*words):
        capsys.readouterr()
        assert main(["policy", *map(str, words)]) == 0
        return capsys.readouterr().out

    return succeed


@pytest.fixture
def refused(capsys):
    """Gives the one line a command said that must fail."""

    def fail(*words):
        capsys.readouterr()
        try:
            code = main(["policy", *map(str, words)])
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        assert code == 2
        assert said.out == ""
        [line] = said.err.strip().splitlines()
        return line

    return fail


def verify(place):
    return "verify", place / "campaign", "--key", place / "operator.pub"


def alter(folder, **changes):
    """Change constants of a policy as somebody does who may write the folder."""
    path = folder / "policy.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def sign_again(place):
    sign_policy(place / "campaign", load_private(place / "operator"))


def test_a_campaign_is_calibrated_for_its_target_and_roster(scenario, run, tmp_path):
    settings = ("--epsilon", "2", "--delta", "1e-5", "--clients", "30", "--set", "privacy.max_participations=2")
    said = run("new", scenario, "--out", tmp_path / "new" / "campaign", "--quiet", *settings)
    campaign = read_campaign(tmp_path / "new" / "campaign")
    policy = campaign.policy
    assert (policy.epsilon, policy.delta, policy.max_participations) == (2.0, 1e-5, 2)
    assert 2 * 0.998 <= epsilon(policy.mechanism, delta=1e-5) <= 2
    assert policy.noise_multiplier == calibrate_noise(
        epsilon=2.0,
        delta=1e-5,
        sampling_rate=1.0,
        steps=1,
        max_participations=2,
        coordinates=policy.mechanism.coordinates,
        grid_sigma=policy.mechanism.grid_sigma,
    )
    assert sorted(path.name for path in campaign.folder.iterdir()) == [
        "policy.json",
        "scenario.json",
        "start.safetensors",
    ]
    assert "(epsilon = 1.99" in said or "(epsilon = 2," in said
    assert "one device joins at most 2" in said
    assert "signature: none yet" in said


def test_the_roster_decides_who_is_asked_and_how_small_delta_must_be(scenario, refused, tmp_path):
    new = ("new", scenario, "--out", tmp_path / "campaign", "--quiet")
    assert "privacy.delta must be at most 1 / (10 x 5000 clients)" in refused(*new, "--clients", "5000")
    assert "at most the 3 clients, got 4" in refused(*new, "--clients", "3")
    assert "must be at least 3 for 3 rounds of 4 of 4 clients, got 1" in refused(*new, "--clients", "4")
    assert list(tmp_path.iterdir()) == []


def test_by_default_the_roster_is_the_users_of_the_data(scenario, run, tmp_path):
    settings = ("--set", "federation.cohort_size=all", "--set", "privacy.max_participations=3")
    run("new", scenario, "--out", tmp_path / "all", "--quiet", *settings)
    assert read_campaign(tmp_path / "all").policy.cohort_size == 12


def test_no_record_of_a_user_is_looked_at(scenario, tmp_path, monkeypatch):
    """The same campaign, whoever the users are: only the catalogue and their number count."""
    made = publish(load_scenario(scenario), out=tmp_path / "one", quiet=True)
    read = simulations.publish.resident_dataset

    def strangers(*words):
        found = read(*words)
        return replace(found, users=tuple(reversed(found.users[:1] * len(found.users))))

    monkeypatch.setattr(simulations.publish, "resident_dataset", strangers)
    again = publish(load_scenario(scenario), out=tmp_path / "two", quiet=True)
    assert again.policy == made.policy


def test_a_campaign_on_devices_has_neither_a_companion_nor_further_seeds(signed):
    settings = read_campaign(signed / "campaign").scenario
    assert (settings.seeds(), settings.linear_campaign()) == ([3], None)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--epsilon", "nan"), "privacy.epsilon must be"),
        (("--epsilon", "0"), "privacy.epsilon must be greater than 0, got 0"),
        (("--epsilon", "much"), "privacy.epsilon must be a valid number, got 'much'"),
        (("--delta", "1"), "privacy.delta must be less than 1, got 1"),
        (("--clients", "0"), "--clients must be from 1 to 10,000,000, got 0"),
        (("--clients", "100000000000"), "--clients must be from 1 to 10,000,000, got"),
        (("--clients", "many"), "argument --clients: invalid int value: 'many'"),
        (("--set", "privacy.trust=none"), "privacy.trust must be 'local', 'distributed' or 'central' for"),
        (("--set", "privacy.unit=user"), "unit 'user' under trust 'local' has no mechanism; allowed: unit 'record'"),
        (("--set", "privacy.trust=central"), "unit 'record' under trust 'central' has no mechanism"),
        (("--set", "privacy.unit=team"), "privacy.unit must be"),
        (("--set", "colour=red"), "colour is not a setting"),
        (("--set", "personal.method=pfedme"), "personal.method must be"),
    ],
)
def test_wrong_settings_are_refused_and_nothing_is_written(scenario, refused, tmp_path, words, says):
    assert says in refused("new", scenario, "--out", tmp_path / "campaign", "--quiet", *words)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_left_as_it_is(scenario, refused, tmp_path):
    said = refused("new", scenario, "--out", tmp_path, "--quiet")
    assert "--out must be a new folder" in said
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "link exists" in refused("new", scenario, "--out", tmp_path / "link")
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_a_scenario_that_is_not_there_is_named(refused, tmp_path):
    said = refused("new", tmp_path / "none.toml", "--out", tmp_path / "campaign")
    assert "none.toml must be a readable scenario file" in said
    assert "the following arguments are required: --out" in refused("new", tmp_path / "none.toml")


def test_show_says_every_constant_and_recomputes_the_price(signed, run):
    folder = signed / "campaign"
    found = json.loads(run("show", folder, "--json"))
    policy = read_campaign(folder).policy
    assert found["constants"] == policy.model_dump(mode="json")
    assert found["policy_sha256"] == policy.sha256
    assert found["price"]["epsilon"] == epsilon(policy.mechanism, delta=policy.delta)
    assert found["price"]["kept"] is True
    assert found["price"]["accountant"].startswith("dp-accounting 0.")
    assert found["signature"]["state"] == "valid"
    assert found["signature"]["key"] == fingerprint(load_public(signed / "operator.pub"))
    sent = found["per_device_and_round"]
    assert sent["parameters"] == sum(np.prod(shape) for _, shape in policy.slots)
    assert sent["bytes_up"] > 4 * sent["parameters"]
    text = run("show", folder)
    for name, value in found["constants"].items():
        assert name == "campaign" or f"  {name} " in text
        assert json.dumps(value) in text
    assert found["signature"]["key"] in text
    assert f"{sent['bytes_up']:,} bytes: the noised change of {sent['parameters']:,} shared numbers" in text


def shown(campaign):
    found = describe(campaign)
    return found, "\n".join([*lines(found), *constant_lines(found)])


def test_show_says_of_central_that_the_server_sees_changes_without_noise(hiding_users):
    campaign = hiding_users["central"].campaign
    found, text = shown(campaign)
    assert (found["price"]["unit"], found["price"]["kept"]) == ("user", True)
    assert found["price"]["epsilon"] == epsilon(campaign.policy.mechanism, delta=1e-4)
    assert "user-level (epsilon = " in text
    assert "for all that everybody but the server ever sees of one device" in text
    assert "trusted: the server (noise is added there)" in text
    assert "not hidden: anything from the server, which sees every device's change without noise" in text
    assert "the clipped change, WITHOUT noise, of" in text
    for wrong in ("one-time keys", "nobody (local noise", "whether any one record", "noised change"):
        assert wrong not in text


def test_show_says_of_distributed_what_it_rests_on(hiding_users):
    campaign = hiding_users["distributed"].campaign
    found, text = shown(campaign)
    terms = campaign.policy.secure_sum
    assert found["price"]["epsilon"] == epsilon(campaign.policy.mechanism, delta=1e-4)
    assert found["price"]["kept"] is True
    assert "all that a server that keeps to the protocol, and everybody else, ever sees of one device" in text
    assert f"t = {terms.threshold} of {terms.neighbours} neighbours" in text
    assert f"c = {terms.colluders} of at least {terms.min_survivors} survivors" in text
    assert "the masked change, with a share of the noise, of" in text
    assert "one-time keys, and sealed shares of them for other devices" in text
    assert f'"min_survivors": {terms.min_survivors}' in text
    for wrong in ("WITHOUT noise", "nobody (local noise", "whether any one record"):
        assert wrong not in text


def test_every_constant_of_a_policy_has_words(signed):
    assert set(WORDS) == set(type(read_campaign(signed / "campaign").policy).model_fields)


def test_show_gives_epsilon_round_by_round(scenario, run, tmp_path):
    run("new", scenario, "--out", tmp_path / "c", "--quiet", "--set", "privacy.max_participations=3")
    found = json.loads(run("show", tmp_path / "c", "--json"))
    mechanism, delta = read_campaign(tmp_path / "c").policy.mechanism, 1e-4
    spent = {int(k): value for k, value in found["price"]["epsilon_after_rounds"].items()}
    assert spent == {k: epsilon(replace(mechanism, max_participations=k), delta=delta) for k in (1, 2, 3)}
    assert spent[1] < spent[2] < spent[3] == found["price"]["epsilon"] <= 8
    assert f"1 {math.ceil(1000 * spent[1]) / 1000:g} · 2 " in run("show", tmp_path / "c")


@pytest.mark.parametrize(
    ("last", "shown"),
    [
        (1, [1]),
        (2, [1, 2]),
        (10, [*range(1, 11)]),
        (25, [*range(1, 11), 20, 25]),
        (200, [*range(1, 11), 20, 50, 100, 200]),
    ],
)
def test_a_long_campaign_is_shown_in_few_lines(signed, last, shown):
    policy = read_campaign(signed / "campaign").policy
    assert simulations.publish._milestones(policy.model_copy(update={"max_participations": last})) == shown


def test_show_does_not_believe_what_a_policy_states(place, run):
    folder = place / "campaign"
    policy = read_campaign(folder).policy
    alter(folder, noise_multiplier=policy.noise_multiplier / 2, grid=policy.grid / 2)
    found = json.loads(run("show", folder, "--json"))
    assert found["price"]["kept"] is False
    assert found["price"]["epsilon"] > 16
    assert found["signature"]["state"] == "invalid"
    text = run("show", folder)
    assert "NOT KEPT by these constants" in text
    assert "signature: INVALID" in text


def test_a_name_cannot_write_on_the_terminal(place, run):
    alter(place / "campaign", campaign="\x1b[2Jkept\nsignature: fine")
    text = run("show", place / "campaign")
    assert "\x1b" not in text
    assert "\nsignature: fine" not in text


def test_verify_accepts_what_its_operator_signed(signed, run):
    said = run(*verify(signed))
    policy = read_campaign(signed / "campaign").policy
    assert policy.sha256 in said
    assert fingerprint(load_public(signed / "operator.pub")) in said
    assert "stated: epsilon = 8.0; kept" in said


def test_a_policy_of_another_format_passes_but_not_another_spelling(place, run, refused):
    path = place / "campaign" / "policy.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7, sort_keys=True))
    run(*verify(place))
    alter(place / "campaign", epsilon=8)  # the same number, but another hash than the one devices compute
    sign_again(place)
    assert "must be spelled as 'sottovoce policy new' does" in refused(*verify(place))


def lowered_noise(folder):
    policy = read_campaign(folder).policy
    lower = policy.noise_multiplier * 0.95
    alter(folder, noise_multiplier=lower, grid=lower * policy.clip_norm / GRID_SIGMA)


def other_start(folder):
    start = {name: array + 1 for name, array in load_file(folder / "start.safetensors").items()}
    save_file(start, folder / "start.safetensors")


def shorter_start(folder):
    path = folder / "start.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def other_settings(folder):
    path = folder / "scenario.json"
    tables = json.loads(path.read_text())
    tables["training"]["learning_rate"] = 2.0
    path.write_text(json.dumps(tables))


def more_rounds(folder):
    alter(folder, max_participations=2)


def another_slot(folder):
    alter(folder, slots=[["stranger", [2]]])


def another_shape(folder):
    [(name, shape), *rest] = json.loads((folder / "policy.json").read_text())["slots"]
    alter(folder, slots=[[name, [*shape, 1]], *rest])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lowered_noise, "a policy's constants must give the epsilon it states, 8; they give 8."),
        (more_rounds, "a policy's constants must give the epsilon it states"),
        (lambda f: alter(f, epsilon=1.0), "must give the epsilon it states, 1;"),
        (lambda f: alter(f, delta=1e-9), "must give the epsilon it states"),
        (lambda f: alter(f, clip_norm=1.4), "as its noise, its bound and who adds noise say"),
        (lambda f: alter(f, noise_multiplier=0.0), "as its noise, its bound"),
        (lambda f: alter(f, trust="none", epsilon=None, delta=None), "it was altered"),
        (lambda f: alter(f, personal_method="none"), "it was altered"),
        (lambda f: alter(f, extensions=["technique 'x' of y 1"]), "the policy names technique 'x' of y 1"),
        (lambda f: alter(f, reply_fields=["arrays", "losses"]), "losses"),
        (lambda f: alter(f, note="x"), "the policy must be readable"),
        (lambda f: alter(f, protocol=1), "must be of protocol"),
        (another_slot, "must hold 'stranger' as float32"),
        (another_shape, "as float32 of shape"),
        (other_start, "must be the start the policy names"),
        (shorter_start, "a file in it is damaged"),
        (other_settings, "must hold the settings the policy names"),
        (lambda f: (f / "scenario.json").unlink(), "scenario.json must be a readable scenario file"),
        (lambda f: (f / "start.safetensors").unlink(), "must hold a campaign"),
    ],
)
def test_the_operators_own_key_does_not_make_a_broken_promise_good(place, refused, damage, says):
    damage(place / "campaign")
    sign_again(place)
    assert says in refused(*verify(place))
    (place / "campaign" / "policy.sig").unlink()
    assert says in refused("sign", place / "campaign", "--key", place / "operator")
    assert not (place / "campaign" / "policy.sig").exists()


def test_a_private_part_that_the_shared_step_reads_is_refused(place, refused, install_package):
    """Settings, policy and signature agree; only rule P1 speaks against it."""
    code = (
        "from client.personal.personalize import PersonalMethod, fit_ridge\n"
        "joint = PersonalMethod(fit_ridge, read_by_shared_step=True, summary='read by the shared step')\n"
    )
    install_package("joint_package", code, {"personal_methods": {"joint": "joint"}})
    folder = place / "campaign"
    tables = json.loads((folder / "scenario.json").read_text())
    tables["personal"]["method"] = "joint"
    (folder / "scenario.json").write_text(json.dumps(tables))
    settings = load_scenario(folder / "scenario.json")
    alter(
        folder,
        personal_method="joint",
        settings_sha256=hash_settings(settings),
        extensions=list(extensions(settings)),
    )
    sign_again(place)
    assert "personal.method = 'joint'" in refused(*verify(place))


def test_a_nonprivate_policy_is_not_verified(place, refused):
    folder = place / "campaign"
    tables = json.loads((folder / "scenario.json").read_text())
    tables["privacy"]["trust"] = "none"
    (folder / "scenario.json").write_text(json.dumps(tables))
    alter(folder, trust="none", settings_sha256=hash_settings(load_scenario(folder / "scenario.json")))
    sign_again(place)
    assert "NOT PRIVATE" in refused(*verify(place))


def test_a_start_swapped_together_with_its_hash_needs_the_operators_key(place, refused):
    other_start(place / "campaign")
    start = dict(sorted(load_file(place / "campaign" / "start.safetensors").items()))
    alter(place / "campaign", start_sha256=hash_arrays(start))
    assert "it is not" in refused(*verify(place))


def test_verify_wants_a_signature_by_this_key(place, scenario, run, refused):
    run("key", place / "stranger")
    run("sign", place / "campaign", "--key", place / "stranger")
    assert "must be made by the trusted key" in refused(*verify(place))
    run("new", scenario, "--out", place / "laxer", "--quiet", "--epsilon", "9")
    run("sign", place / "laxer", "--key", place / "operator")
    shutil.copy(place / "laxer" / "policy.sig", place / "campaign" / "policy.sig")
    assert "it is not" in refused(*verify(place))
    (place / "campaign" / "policy.sig").unlink()
    assert "must hold the operator's signature policy.sig, got none" in refused(*verify(place))


def test_the_halves_of_a_key_are_not_mixed_up(place, refused):
    campaign = place / "campaign"
    before = (campaign / "policy.sig").read_bytes()
    assert "must be a private Ed25519 key" in refused("sign", campaign, "--key", place / "operator.pub")
    assert "ends in .pub" in refused("verify", campaign, "--key", place / "operator")
    assert "No such file" in refused("verify", campaign, "--key", place / "missing")
    assert (campaign / "policy.sig").read_bytes() == before


def test_a_key_is_made_once(run, refused, tmp_path):
    said = run("key", tmp_path / "operator")
    assert fingerprint(load_public(tmp_path / "operator.pub")) in said
    content = (tmp_path / "operator").read_bytes()
    assert content not in said.encode()
    assert "never overwritten" in refused("key", tmp_path / "operator")
    assert (tmp_path / "operator").read_bytes() == content
    assert "No such file or directory" in refused("key", tmp_path / "missing" / "operator")


@pytest.mark.parametrize("action", ["show", "sign", "verify"])
def test_a_folder_without_a_campaign_is_named(place, refused, tmp_path, action):
    half = {"show": (), "sign": ("--key", place / "operator"), "verify": ("--key", place / "operator.pub")}[action]
    assert "must hold a campaign: No such file" in refused(action, tmp_path / "nowhere", *half)
    assert not (tmp_path / "nowhere").exists()


def test_help_shows_the_whole_way(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["policy", "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for action in ("new", "show", "key", "sign", "verify"):
        assert f"sottovoce policy {action} " in said
