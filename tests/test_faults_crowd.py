"""A hundred devices with ledgers, a fifth of which fail in every round: what is learnt, what is counted, what stays."""

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

from client.app import app as client_app
from client.training.site import open_site
from server.app import run_rounds
from shared.flower.grid import InlineGrid
from shared.heads.scoring import text_predictions
from shared.protocol.campaign import read_campaign

pytestmark = [
    pytest.mark.fault("R22"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),  # forked to be killed
]


@pytest.fixture
def memory_folder():
    """A folder that no disk slows down: processes are killed here, the machine is not."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture
def crowd_of(homes, tiny, tiny_base, crowds, memory_folder):
    """(users, rounds) -> published campaign and crowd."""

    def made(users, rounds):
        folder = memory_folder / "world"
        folder.mkdir()
        data = tiny.tiny_movielens(folder / "data", users=users)
        scenario = tiny.tiny_scenario(folder, base=tiny_base.folder, data=data)
        changes = (
            f"federation.rounds={rounds}",
            f"federation.cohort_size={users}",
            f"privacy.max_participations={rounds}",
            "model.head_blocks=0",
            "performance.micro_batch=1",
        )
        published = homes.publish(scenario, folder, overrides=changes)
        folders = []
        for user in range(users):
            home = homes.make_home(memory_folder / "homes" / str(user), published, user=None)
            home.records().add(published.dataset.users[user].fit)
            folders.append(home.folder)
        return published, crowds.Crowd(folders, published.campaign)

    return made


def copied(published, folder):
    """The campaign at a place of its own, where checkpoints go."""
    shutil.copytree(published.campaign.folder, folder / "campaign")
    return read_campaign(folder / "campaign")


def without_faults(published, folder):
    """The last checkpoint of the same devices as a simulation, which nothing happens to."""
    campaign = copied(published, folder)
    users = campaign.policy.cohort_size
    grid = InlineGrid(client_app, devices=users, run_config={"campaigns": str(folder)})
    return run_rounds(grid, campaign, roster=grid.seats)


def loss(published, arrays):
    """Mean squared error of the shared predictions of everybody's records."""
    site = open_site(str(published.campaign.folder.parent), published.campaign.policy.sha256)
    _, predicted = text_predictions(site.head, arrays, site.texts.all)
    records = [record for user in published.dataset.users for record in user.fit]
    wanted = np.array([record.target for record in records])
    return float(np.mean((predicted[site.texts.rows(records)] - wanted) ** 2))


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def resident_mib():
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) / 1024


def play(crowds, published, crowd, folder, monkeypatch, *, share, seed=0):
    """The last checkpoint, and what this process held after each round."""
    held = []
    grid = crowds.FaultyGrid(
        crowd, share=share, seed=seed, after_round=lambda: held.append((descriptors(), resident_mib()))
    )
    with crowds.watched(crowd, monkeypatch):
        last = run_rounds(grid, copied(published, folder), roster=grid.seats, accept_seeded=True)
    return last, held


def check_books(crowds, crowd, last):
    """Every accepted update is a row of its device's ledger, and nobody is counted twice."""
    ledgers = [crowds.released(folder) for folder in crowd.folders]
    clones = {}
    for folder in crowd.clones:
        clones.setdefault(int(folder.name.rpartition("-")[2]), []).append(crowds.released(folder))
    accepted = {(seat, number): update for seat, number, update in crowd.accepted}
    assert len(accepted) == len(crowd.accepted) == last.total.replies == crowd.spared
    assert last.total.rejected == +crowd.counted
    for (seat, number), update in accepted.items():
        owned = [ledgers[seat], *clones.get(seat, [])]
        assert update in [ledger.get(number) for ledger in owned], (seat, number)
    for seat, count in last.answered.items():
        assert count == len([1 for one, _ in accepted if one == seat])
        assert count <= len(ledgers[seat])


def test_without_faults_a_crowd_with_ledgers_learns_what_its_simulation_does(crowds, crowd_of, tmp_path, monkeypatch):
    published, crowd = crowd_of(users=4, rounds=2)
    for folder in ("quiet", "crowd"):
        (tmp_path / folder).mkdir()
    quiet = without_faults(published, tmp_path / "quiet")
    last, _ = play(crowds, published, crowd, tmp_path / "crowd", monkeypatch, share=0.0)
    for name, array in quiet.arrays.items():
        np.testing.assert_allclose(last.arrays[name], array, rtol=0, atol=1e-6)  # the backbone took others beside
    check_books(crowds, crowd, last)
    assert last.total.replies == 8
    assert not last.total.rejected


def test_every_fault_is_played_and_counted(crowds, crowd_of, tmp_path, monkeypatch):
    published, crowd = crowd_of(users=10, rounds=4)
    last, held = play(crowds, published, crowd, tmp_path, monkeypatch, share=0.5)
    assert crowd.played == dict.fromkeys(crowds.FAULTS, 2)
    check_books(crowds, crowd, last)
    assert len({open_files for open_files, _ in held}) == 1


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_hundred_devices_learn_although_a_fifth_of_them_fail_in_every_round(crowds, crowd_of, tmp_path, monkeypatch):
    published, crowd = crowd_of(users=100, rounds=20)
    for folder in ("quiet", "crowd"):
        (tmp_path / folder).mkdir()
    quiet = without_faults(published, tmp_path / "quiet")
    last, held = play(crowds, published, crowd, tmp_path / "crowd", monkeypatch, share=0.2)
    check_books(crowds, crowd, last)
    assert crowd.played == dict.fromkeys(crowds.FAULTS, 40)  # 10 faults, 20 rounds of 20
    start = {name: published.campaign.start[name] for name in last.arrays}
    before, without, after = (loss(published, arrays) for arrays in (start, quiet.arrays, last.arrays))
    assert without < 0.75 * before
    assert abs(after - without) < 0.05 * (before - without)
    warm = held[4:]
    assert len({open_files for open_files, _ in warm}) == 1
    assert warm[-1][1] - warm[0][1] < 16.0  # MiB: 10 KiB an answer would be seen
