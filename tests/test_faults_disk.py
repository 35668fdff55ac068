"""A disk with no room left, page by page; checkpoints that are damaged; budgets that are spent.

The full disk is a small file system of its own, which gives out whole pages: a step that needs one more than is left
fails there and nowhere else, so that one page less at a time lets every single write run out of room once.
"""

import os
import shutil
import subprocess
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

import client.app
from client.home.home import open_home
from server.app import run_rounds
from server.checkpoint import checkpoint_path, last_checkpoint, load_checkpoint, put_aside
from server.judge import Judge
from server.rollback import pass_over
from server.rounds import read_rounds
from shared.errors import CampaignError, LedgerError, SottovoceError, StoreError

PAGE = os.sysconf("SC_PAGE_SIZE")
DISK_PAGES = 4096  # far more than anything here needs

every = pytest.mark.parametrize(
    "step", [pytest.param(1, marks=pytest.mark.slow, id="every page"), pytest.param(9, id="some pages")]
)


@dataclass(frozen=True)
class Disk:
    """A small file system in memory."""

    folder: Path

    @property
    def _ballast(self) -> Path:
        return self.folder / "ballast"

    def leave(self, pages: int) -> None:
        """Fill it, but for so many pages."""
        self.free()
        with self._ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, PAGE)  # the file itself may cost something
            left = os.statvfs(self.folder).f_bavail
            if left > pages:
                os.posix_fallocate(file.fileno(), 0, (1 + left - pages) * PAGE)
        assert os.statvfs(self.folder).f_bavail == pages

    def fill(self) -> None:
        """Fill it while others write to it."""
        with suppress(OSError), self._ballast.open("wb") as file:
            for page in range(2**20):
                os.posix_fallocate(file.fileno(), page * PAGE, PAGE)

    def free(self) -> None:
        """Give the room back."""
        self._ballast.unlink(missing_ok=True)


@contextmanager
def mounted(folder, *, pages=DISK_PAGES):
    """A disk of its own in place of a folder, with what the folder held."""
    held = folder.with_name(f"{folder.name}-was")
    folder.rename(held)
    folder.mkdir(mode=0o700)
    options = f"size={pages * PAGE},mode=0700"
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"a file system of its own needs the right to mount one: {made.stderr.decode().strip()}")
    try:
        shutil.copytree(held, folder, symlinks=True, dirs_exist_ok=True)
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def disk(tmp_path):
    (tmp_path / "disk").mkdir()
    with mounted(tmp_path / "disk") as disk:
        yield disk


def fresh(disk, template):
    """A copy of a folder on the disk, with all its room."""
    disk.free()
    place = disk.folder / template.name
    shutil.rmtree(place, ignore_errors=True)
    return Path(shutil.copytree(template, place))


def everything_in(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# R10 on a device


@pytest.fixture(scope="module")
def device(homes, published, tmp_path_factory):
    """A home that has answered nothing yet; base and head of its campaign are loaded."""
    folder = tmp_path_factory.mktemp("device")
    assert homes.ask(homes.make_home(folder / "warm", published), published.campaign)[0] is None
    return homes.make_home(folder / "home", published).folder


def play_a_round(homes, published, disk, device, pages, monkeypatch):
    """One request on a disk with so many pages; returns the code, how often it trained, and what was spent."""
    home = open_home(fresh(disk, device), clock=homes.clock)
    kept = home.records().read()
    trained = []
    train = client.app.train_shared
    with monkeypatch.context() as patch:
        patch.setattr(client.app, "train_shared", lambda *args, **named: trained.append(1) or train(*args, **named))
        disk.leave(pages)
        code, reply = homes.ask(home, published.campaign)
    disk.free()
    with home.ledger(round_running=False) as ledger:  # checks every event, the chain and the anchor
        [standing] = ledger.consents()
    assert standing.spent >= max(len(trained), standing.released), (pages, code)
    assert home.records().read() == kept
    assert standing.pending == 0
    again, repeated = homes.ask(home, published.campaign)
    if code is None:
        assert (standing.spent, standing.released, again) == (1, 1, None)
        for name, array in homes.update_in(reply, published.campaign).items():
            np.testing.assert_array_equal(array, homes.update_in(repeated, published.campaign)[name])
    else:
        assert code in {"LEDGER", "STORE"}, code
        # released, and only then no room for the anchor: asked again it sends what was released
        assert again == ("BURNT" if standing.spent > standing.released else None)
    assert homes.ask(home, published.campaign, round_number=2)[0] is None  # with room again it goes on
    return code, len(trained), standing.spent


@pytest.mark.fault("R10")
@every
def test_wherever_a_round_runs_out_of_room_nothing_is_sent_unspent(homes, published, disk, device, monkeypatch, step):
    seen = Counter()
    for pages in range(0, 500, step):
        found = play_a_round(homes, published, disk, device, pages, monkeypatch)
        seen[found] += 1
        if found == (None, 1, 1):
            break
    assert found == (None, 1, 1)
    assert ("LEDGER", 0, 0) in seen  # nothing was spent, and nothing trained
    assert seen.keys() <= {("LEDGER", 0, 0), ("LEDGER", 0, 1), ("STORE", 0, 1), ("LEDGER", 1, 1), (None, 1, 1)}


@pytest.mark.fault("R10")
@every
def test_wherever_an_owner_s_command_runs_out_of_room_all_of_it_is_done_or_nothing(
    homes, published, disk, tmp_path, step
):
    """Adding records, agreeing to a campaign, pausing: each ends in an error of one line, or is done."""
    home = homes.make_home(tmp_path / "home")
    records = published.dataset.users[0].train
    home.records().add(records[:3])

    def add(home):
        home.records().add(records[3:])

    def agree(home):
        homes.consent(home, published)

    def pause(home):
        with home.ledger() as ledger:
            ledger.pause()

    def state(home):
        with home.ledger() as ledger:
            paused, consents = ledger.totals().paused, [each.consent.policy for each in ledger.consents()]
        return len(home.records().read()), consents, paused

    before = (3, [], False)
    done = {add: (len(records), [], False), agree: (3, [published.campaign.policy.sha256], False), pause: (3, [], True)}
    for command, after in done.items():
        refused = 0
        for pages in range(0, 500, step):
            used = open_home(fresh(disk, home.folder), clock=homes.clock)
            disk.leave(pages)
            try:
                command(used)
            except (StoreError, LedgerError):
                refused += 1
            else:
                break
            disk.free()
            found = state(used)
            assert found in (before, after), (command, pages)
            if found == before:
                command(used)  # again, with room
            assert state(used) == after, (command, pages)
        disk.free()
        assert refused
        assert state(used) == after


# R10 on a server


@pytest.fixture(scope="module")
def served(homes, tiny_world, tmp_path_factory):
    """A campaign of three rounds, and two devices at home that answer each of them."""
    folder = tmp_path_factory.mktemp("served")
    overrides = ("federation.rounds=3", "federation.cohort_size=2", "privacy.max_participations=3")
    published = homes.publish(tiny_world(folder), folder, overrides=overrides)
    made = [homes.make_home(folder / "homes" / str(user), published, user=user).folder for user in range(2)]
    return published.campaign, made


def serve(campaign, grid):
    """Rounds as a server runs them, from where they were left."""
    judge = Judge(campaign, None)
    judge.begin()
    good = last_checkpoint(campaign.folder / "checkpoints", policy_sha256=campaign.policy.sha256)
    roster = {node: seat for seat, node in enumerate(grid.get_node_ids())}
    start = pass_over(campaign, good)
    return run_rounds(grid, campaign, roster=roster, start=start, on_round=judge.on_round, attempts=2)


@pytest.mark.fault("R10")
@every
def test_wherever_a_server_runs_out_of_room_its_last_round_stands_and_it_goes_on(homes, served, disk, tmp_path, step):
    published, made = served
    refused, stopped_after = 0, set()
    for pages in range(0, 500, step):
        devices = [Path(shutil.copytree(home, tmp_path / str(pages) / home.name)) for home in made]
        grid = homes.grid_of(devices)
        campaign = replace(published, folder=fresh(disk, published.folder))
        checkpoints = campaign.folder / "checkpoints"
        disk.leave(pages)
        try:
            last = serve(campaign, grid)
        except (OSError, SottovoceError):
            refused += 1
        else:
            break
        full = everything_in(checkpoints) if checkpoints.exists() else {}
        assert not [path for path in full if path.parts[0].startswith(".")], "what was not finished takes room"
        disk.free()
        stood = last_checkpoint(checkpoints, policy_sha256=campaign.policy.sha256)
        stopped_after.add(stood.round_number if stood else 0)
        assert not list(checkpoints.glob("damaged-*"))
        assert everything_in(checkpoints) == full if checkpoints.exists() else not full
        last = serve(campaign, grid)
        assert last.answered == {0: 3, 1: 3}  # asked again, they answered with the same bytes: nothing is counted twice
        assert {number: line.accepted for number, line in read_rounds(campaign.folder).items()} == {
            0: 0,
            1: 2,
            2: 2,
            3: 2,
        }
        for device in devices:
            with open_home(device, clock=homes.clock).ledger() as ledger:
                [standing] = ledger.consents()
            assert (standing.spent, standing.released) == (3, 3)
    assert refused
    assert last.round_number == 3
    if step == 1:
        assert stopped_after == {0, 1, 2}


# R11


class Power(Exception):  # noqa: N818 - it goes out
    """A power cut."""


@pytest.fixture(scope="module")
def long(homes, tiny_world, tmp_path_factory):
    """A campaign of six rounds and the homes of its two devices."""
    folder = tmp_path_factory.mktemp("long")
    overrides = ("federation.rounds=6", "federation.cohort_size=2", "privacy.max_participations=6")
    published = homes.publish(tiny_world(folder), folder, overrides=overrides)
    for user in range(2):
        homes.make_home(folder / "homes" / str(user), published, user=user)
    return published.campaign, folder / "homes"


def truncate(checkpoint):
    tensors = checkpoint / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])


def flip(checkpoint):
    state = checkpoint / "state.json"
    state.write_text(state.read_text().replace('"0": 3', '"0": 2'))  # a round that would cost nothing


def lose(checkpoint):
    (checkpoint / "state.json").unlink()


def cut_after(monkeypatch, grid, round_number, *, answered):
    """The power goes in a round: before anybody has it, or when all have answered it."""
    send = type(grid).send_and_receive

    def cut(messages, **named):
        messages = list(messages)
        here = messages[0].content["config"]["round"] == round_number
        if here and not answered:
            raise Power
        replies = list(send(grid, messages, **named))
        if here:
            raise Power
        return replies

    monkeypatch.setattr(grid, "send_and_receive", cut)


@pytest.mark.fault("R11")
@pytest.mark.parametrize(
    ("damage", "answered", "lost", "void"),
    [
        (truncate, False, 1, []),
        (flip, False, 1, []),
        (lose, False, 1, []),
        (truncate, True, 1, [3, 4]),  # what devices have gone on from is asked for in vain, once each
        (truncate, True, 2, []),  # passed over
    ],
)
def test_with_its_newest_checkpoints_damaged_a_server_goes_on_from_the_one_before(
    homes, long, tmp_path, monkeypatch, damage, answered, lost, void
):
    """The power goes in round 4, and takes the checkpoint of round 3, or of 2 and 3, with it."""
    published, made = long
    homes_folder = Path(shutil.copytree(made, tmp_path / "homes"))
    campaign = replace(published, folder=Path(shutil.copytree(published.folder, tmp_path / "campaign")))
    folder = campaign.folder / "checkpoints"
    devices = sorted(homes_folder.iterdir())
    grid = homes.grid_of(devices)
    with monkeypatch.context() as patch:
        cut_after(patch, grid, 4, answered=answered)
        with pytest.raises(Power):
            serve(campaign, grid)
    third = last_checkpoint(folder, policy_sha256=campaign.policy.sha256).arrays
    for number in range(4 - lost, 4):
        damage(checkpoint_path(folder, number))

    last = serve(campaign, grid)
    assert last.round_number == 6
    assert put_aside(folder) == [f"round-000{number}" for number in range(4 - lost, 4)]
    lines = read_rounds(campaign.folder)
    assert [number for number, line in lines.items() if "VOID" in line.rejected] == void
    if not answered:  # round 3 again, from the very bytes of the first time
        again = load_checkpoint(checkpoint_path(folder, 3))
        for name, array in third.items():
            np.testing.assert_array_equal(array, again.arrays[name])
    for device in devices:
        with open_home(device, clock=homes.clock).ledger() as ledger:
            [standing] = ledger.consents()
        assert standing.spent == standing.released == 6  # each number once


# R17


@pytest.mark.fault("R17")
def test_a_spent_budget_stays_spent_and_a_server_goes_on_with_who_is_left(homes, tiny_world, tmp_path):
    """A cohort shrinks by who has nothing left; with nobody left the campaign stops in words, its rounds kept."""
    overrides = ("federation.rounds=4", "federation.cohort_size=2", "privacy.max_participations=2")
    published = homes.publish(tiny_world(tmp_path), tmp_path, overrides=overrides)
    made = [homes.make_home(tmp_path / str(user), published, user=user) for user in range(2)]
    campaign = published.campaign
    earlier = replace(campaign, folder=Path(shutil.copytree(campaign.folder, tmp_path / "earlier")))
    assert homes.ask(made[0], earlier, round_number=1)[0] is None  # by a server that has lost its folder since
    with pytest.raises(CampaignError, match="BUDGET"):
        serve(campaign, homes.grid_of([home.folder for home in made]))
    lines = read_rounds(campaign.folder)
    assert [(line.accepted, dict(line.rejected)) for line in list(lines.values())[1:]] == [(2, {}), (2, {})]
    for home in made:
        again = open_home(home.folder, clock=homes.clock)
        assert homes.ask(again, campaign, round_number=4, answered=2)[0] == "BUDGET"
        with again.ledger() as ledger:
            [standing] = ledger.consents()
        assert (standing.spent, standing.state) == (2, "exhausted")


LIVE_ROUNDS = 3  # of a real service and a real server, within which a disk fills up
FLOWERS = "ignore:GitWildMatchPattern"  # of Flower's own way to build a bundle
ANSWERED = [(kind, n) for n in range(1, LIVE_ROUNDS + 1) for kind in ("spend", "release")]


@pytest.fixture
def fleet(fleets, tiny_world, tmp_path, monkeypatch):
    """A real server and two real devices that nobody has started."""
    template = fleets.make_template(tmp_path / "t", tiny_world, monkeypatch, devices=2, rounds=LIVE_ROUNDS)
    with fleets.playing(template, tmp_path / "f", seed=None) as fleet:
        yield fleet


@pytest.mark.fault("R10")
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings(FLOWERS)
def test_a_service_whose_disk_is_full_loses_its_round_and_is_back_when_there_is_room(fleet, record_property):
    with mounted(fleet.fleet.home(0), pages=16_384) as full:
        fleet.hold(0, 1, round_number=2)
        fleet.start()
        fleet.wait_held(0, 1, round_number=2)
        full.fill()
        (fleet.holds / "0-2").unlink()
        fleet.until(lambda: '"code": "LEDGER"' in fleet.said(), "a refusal: what is not noted is not sent")
        full.free()
        began = time.monotonic()
        fleet.let_go()
        fleet.wait_for_end()
        record_property("recover_s", time.monotonic() - began)
        found = {number: (line.accepted, dict(line.rejected)) for number, line in fleet.rounds().items()}
        assert found == {0: (0, {}), 1: (2, {}), 2: (1, {"LEDGER": 1}), 3: (2, {})}
        assert fleet.events(0) == [("burn", 2) if event == ("release", 2) else event for event in ANSWERED]
        assert fleet.events(1) == ANSWERED


@pytest.mark.fault("R10")
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings(FLOWERS)
def test_a_server_whose_disk_is_full_ends_in_a_line_and_goes_on_when_there_is_room(fleet, record_property):
    with mounted(fleet.fleet.server, pages=65_536) as full:
        fleet.hold(0, round_number=2)
        fleet.start()
        fleet.wait_held(0, round_number=2)
        full.fill()
        fleet.let_go()
        fleet.until(lambda: fleet.processes["server"].poll() is not None, "the end of the server")
        said = fleet.fleet.log("server").read_text(encoding="utf-8")
        assert "No space left on device" in said.splitlines()[-1], said
        assert "Traceback" not in said
        assert fleet.last().round_number == 1
        full.free()
        began = time.monotonic()
        fleet.start("server")
        fleet.wait_for_end()
        record_property("recover_s", time.monotonic() - began)
        # Asked again, the devices answered with the same bytes: nothing was spent twice.
        assert {number: line.accepted for number, line in fleet.rounds().items()} == {0: 0, 1: 2, 2: 2, 3: 2}
        assert fleet.events(0) == fleet.events(1) == ANSWERED
