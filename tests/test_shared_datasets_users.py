"""The public split of users: who is in which part, and that a run, a hold-out and a roster hold no others."""

import json
import typing

import pytest

from client.training.site import resident_dataset
from server.holdout import read_holdout
from shared.assets import resolve
from shared.config import DataConfig, Scenario, load_scenario
from shared.datasets import Dataset, Record, UserData, choose_users, deal_out, read
from shared.datasets.users import PARTS
from shared.errors import DataError, ScenarioError
from shared.privacy.policy import hash_settings
from simulations.campaigns import exported_users
from simulations.inspect import inspect_data
from simulations.run import simulate

RECORD = Record("Fargo", 4.0, "1", 0)
SPLIT = ("data.users=campaign", "data.tuning_share=0.3")


def world(count, *, name="films", records=(RECORD,)):
    return Dataset(name, tuple(UserData(str(n), records, (), ()) for n in range(count)), ("Fargo", "Heat"))


def names(dataset, part, share=0.2):
    return [user.user for user in choose_users(dataset, part, tuning_share=share).users]


def test_the_parts_are_disjoint_whole_and_in_order():
    everybody = world(1000)
    tuning, campaign = names(everybody, "tuning"), names(everybody, "campaign")
    assert not set(tuning) & set(campaign)
    assert sorted(tuning + campaign, key=int) == names(everybody, "all") == [str(n) for n in range(1000)]
    assert tuning == sorted(tuning, key=int)
    assert 160 < len(tuning) < 240
    assert choose_users(everybody, "tuning", tuning_share=0.2).public_texts == everybody.public_texts


def test_who_is_where_depends_on_nobody_else_and_on_no_record():
    few = world(50, records=(RECORD, RECORD))
    assert names(few, "tuning") == [user for user in names(world(1000), "tuning") if int(user) < 50]
    assert set(names(few, "tuning")) < set(names(few, "tuning", share=0.5))
    assert names(few, "tuning") != names(world(50, name="songs"), "tuning")


def test_a_part_that_does_not_exist_or_is_empty_is_refused():
    with pytest.raises(ScenarioError, match="one of all, tuning, campaign, got 'test'"):
        choose_users(world(3), "test", tuning_share=0.2)
    with pytest.raises(DataError, match="at least one user"):
        choose_users(world(3), "tuning", tuning_share=1e-9)
    assert typing.get_args(DataConfig.model_fields["users"].annotation) == PARTS


def test_the_settings_that_devices_agree_on_do_not_name_the_part():
    """A device has its own data: which users a simulation is about is not its business."""
    assert hash_settings(Scenario(name="x")) == hash_settings(Scenario(name="x", data=DataConfig(users="campaign")))


def test_hold_out_users_and_exports_are_of_their_part(tiny_world, tmp_path):
    path = tiny_world(tmp_path)
    scenario = load_scenario(path, SPLIT)
    data = scenario.data
    everybody = {user.user: user for user in read(data.format, resolve(data.source)).users}
    campaign = resident_dataset(data)
    mine = [user.user for user in campaign.users]
    others = [name for name in everybody if name not in mine]
    assert mine
    assert others
    holdout = read_holdout(data.format, data.source, data=data)
    assert list(holdout.records) == [record for name in others for record in everybody[name].test]
    assert exported_users(scenario, campaign) == [0, 1]
    with pytest.raises(ScenarioError, match=r"export\.users must name users"):
        exported_users(load_scenario(path, (*SPLIT, f'export.users=["{others[0]}"]')), campaign)
    split = tmp_path / "split.toml"
    split.write_text(path.read_text() + 'data.users = "campaign"\ndata.tuning_share = 0.3\n')
    assert inspect_data(str(split))["users"] == len(mine)


@pytest.mark.parametrize(
    ("part", "stamp"),
    [
        ("tuning", "tuning run: these users take part in no campaign"),
        ("campaign", "tuning: constants chosen on users outside the campaign, as the scenario states"),
    ],
)
def test_a_run_holds_its_part_alone_and_says_so(part, stamp, tiny_world, tmp_path):
    changes = ("linear.enabled=false", "export.users=0", "federation.rounds=1", "federation.cohort_size=all")
    scenario = load_scenario(tiny_world(tmp_path), (f"data.users={part}", "data.tuning_share=0.3", *changes))
    summary = simulate(scenario, out=tmp_path / "out", quiet=True)
    wanted = [user.user for user in resident_dataset(scenario.data).users]
    assert 0 < len(wanted) < 12
    assert json.loads((tmp_path / "out" / "user_scores.json").read_text())["users"] == wanted
    assert summary["data"]["users"] == summary["federation"]["clients"] == summary["federation"]["replies"]
    assert stamp in summary["stamps"]
    assert "tuning: not covered" not in summary["stamps"]
    assert stamp in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def part_of(dataset, name):
    return [record for user in dataset.users for record in getattr(user, name)]


def test_records_are_dealt_out_anew_and_none_changes_its_part():
    def said(name, first, count):
        return tuple(Record(f"{name} {place}", 0.0, str(place), place) for place in range(first, first + count))

    users = tuple(
        UserData(str(n), said(f"{n}", 0, 5 + n % 3), said(f"{n}", 10, 2), said(f"{n}", 20, 3), {"name": str(n)})
        for n in range(30)
    )
    everybody = Dataset("films", users, ("Fargo",))
    dealt = deal_out(everybody)
    assert dealt == deal_out(everybody) != deal_out(everybody, seed=1)
    assert (dealt.name, dealt.public_texts) == (everybody.name, everybody.public_texts)
    for part in ("fit", "validation", "test"):
        before, after = part_of(everybody, part), part_of(dealt, part)
        assert sorted(map(repr, after)) == sorted(map(repr, before))
        assert [len(getattr(user, part)) for user in dealt.users] == [len(getattr(user, part)) for user in users]
        times = [[record.timestamp for record in getattr(user, part)] for user in dealt.users]
        assert times == [sorted(each) for each in times]
        kept = sum(record in getattr(user, part) for user, d in zip(users, dealt.users, strict=True)
                   for record in getattr(d, part))  # fmt: skip
        assert kept < len(after) / 6  # a thirtieth by chance; one who kept theirs would have all
    assert [(user.user, user.profile) for user in dealt.users] == [(user.user, user.profile) for user in users]


def test_a_shuffled_run_reads_the_dealt_records(tiny, tmp_path):
    data = DataConfig(format="convai2", source=str(tiny.tiny_dialogues(tmp_path)))
    plain, dealt = resident_dataset(data), resident_dataset(data.model_copy(update={"shuffled": True}))
    assert dealt == deal_out(plain) != plain
