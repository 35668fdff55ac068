"""Nothing of an owner's text is anywhere but in the vault: words are planted, everything runs, every byte is read.

Logs at the finest level, standard output and error, the wire, databases, temporary files, caches and run folders are
searched for the words in several encodings, for their token ids and for the backbone's output; failures included.
"""

import base64
import io
import json
import logging
import sqlite3
import tempfile
from pathlib import Path

import numpy as np
import pytest

import client.app
import client.training.device
import shared.flower.grid
from client.home.store import RecordStore
from client.log import describe_error
from client.training.site import resident_base
from client.vault.vault import Vault
from server.app import run_rounds
from shared.datasets.records import Record
from shared.errors import CampaignError
from shared.models.features import compute_features
from shared.protocol import wire
from shared.protocol.campaign import read_campaign
from sottovoce.cli import main

WORDS = ("xylophagous7f3a9c1e", "Qwertzuiop8b2d4417", "ñandúes5c66e0aa")
TEXT = f"my diary says {WORDS[0]} and {WORDS[1]}"
RECORDS = [
    Record(text=TEXT, target=4.0, item=f"item-{WORDS[2]}", timestamp=5, response=f"{WORDS[2]} it is"),
    *(Record(text=f"{word} number {i}", target=2.0, item=str(i), timestamp=i) for i, word in enumerate(WORDS)),
]


def needles(base) -> dict[str, bytes]:
    """What must not be found: the words in what encodings they may take, token ids, hidden states."""
    found = {}
    for word in WORDS:
        found[f"{word} in UTF-8"] = word.encode()
        found[f"{word} in UTF-16"] = word.encode("utf-16-le")
        found[f"{word} in hexadecimal"] = word.encode().hex().encode()
        found[f"{word} escaped"] = json.dumps(word)[1:-1].encode()
        for shift in range(3):  # where the word may stand in what is encoded
            encoded = base64.b64encode(b"\0" * shift + word.encode())
            found[f"{word} in base64, {shift}"] = encoded[4 * ((shift + 2) // 3) : -4]
    [ids] = base.tokenize([TEXT], max_tokens=64)
    middle = ids[2:-2]
    assert len(middle) >= 8
    for dtype in ("<i4", "<i8"):
        found[f"token ids as {dtype}"] = np.asarray(middle, dtype).tobytes()
    found["token ids as text"] = ", ".join(map(str, middle)).encode()
    hidden = compute_features(base, [TEXT], head_blocks=1, max_tokens=64).batch([0])[0][0]
    found["hidden states"] = hidden[3, :8].numpy().tobytes()
    return found


class Watch:
    """Everything that could hold a word: files below some folders, the log, the wire, the terminal."""

    def __init__(self, folders, monkeypatch) -> None:
        self.folders, self.wire, self.terminal = folders, [], []
        self.log = io.StringIO()
        handler = logging.StreamHandler(self.log)
        handler.setLevel(logging.DEBUG)
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s %(exc_info)s %(args)s"))
        root = logging.getLogger()
        monkeypatch.setattr(root, "level", logging.DEBUG)
        monkeypatch.setattr(root, "handlers", [*root.handlers, handler])
        for name in ("sottovoce", "flwr", "opacus"):
            monkeypatch.setattr(logging.getLogger(name), "level", logging.DEBUG)
        root.setLevel(logging.DEBUG)  # loggers remember which levels they let through until somebody says so
        over_the_wire = shared.flower.grid._over_the_wire

        def listen(message):
            self.wire.append(shared.flower.grid.message_to_proto(message).SerializeToString())
            return over_the_wire(message)

        monkeypatch.setattr(shared.flower.grid, "_over_the_wire", listen)

    def places(self) -> dict[str, bytes]:
        files = {str(path): path.read_bytes() for f in self.folders for path in Path(f).rglob("*") if path.is_file()}
        return files | {
            "log": self.log.getvalue().encode(),
            "wire": b"|".join(self.wire),
            "terminal": "\n".join(self.terminal).encode(),
        }

    def find(self, needles: dict[str, bytes]) -> set[tuple[str, str]]:
        places = self.places()
        return {(place, what) for place in places for what, needle in needles.items() if needle in places[place]}


@pytest.fixture
def watched(tmp_path, monkeypatch, homes, published):
    """A home with planted records, and everything around it watched."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    watch = Watch([tmp_path], monkeypatch)
    home = homes.make_home(tmp_path / "home", published, user=None)
    home.records().add(RECORDS)
    return home, watch


def run_command(watch, capsys, *arguments) -> int:
    try:
        code = main(["client", *map(str, arguments)])
    finally:
        watch.terminal += capsys.readouterr()
    return code


def fail_with(error):
    def fail(*_, **__):
        raise error

    return fail


# Where something breaks with the user's text in its mouth, and what the server is told.
BREAKS = {
    "a tensor that does not fit": (client.app, "train_shared", RuntimeError(f"bad value in {TEXT!r}"), "INTERNAL"),
    "no memory": (client.app, "train_shared", MemoryError(TEXT), "INTERNAL"),
    "a key that is missing": (client.training.device, "read_inputs", KeyError(TEXT), "INTERNAL"),
    "a damaged record": (RecordStore, "read", ValueError(f"line 1: {TEXT}"), "INTERNAL"),
    "a character nobody can encode": (
        RecordStore,
        "read",
        UnicodeEncodeError("ascii", TEXT, 0, 1, "ordinal not in range"),
        "INTERNAL",
    ),
    "a database that quotes": (client.training.device.OwnedDevice, "release", sqlite3.IntegrityError(TEXT), "INTERNAL"),
}


def test_no_word_of_the_owner_leaves_the_vault(watched, homes, published, tmp_path, tiny_fleet, capsys):
    home, watch = watched
    fleet = homes.sign_base(tiny_fleet, published, tmp_path / "signed-base")
    campaign = published.campaign
    assert homes.ask(home, campaign)[0] is None
    assert homes.ask(home, campaign)[0] is None  # again, from the outbox
    other = homes.make_home(tmp_path / "other", published, user=None)
    other.records().add(RECORDS)
    served = tmp_path / "served"
    for path in campaign.folder.iterdir():
        if path.is_file():
            (served).mkdir(exist_ok=True)
            (served / path.name).write_bytes(path.read_bytes())
    grid = homes.grid_of([home.folder, other.folder])
    with pytest.raises(CampaignError, match="BUDGET"):  # checkpoints, and then both have spent what they may
        run_rounds(grid, read_campaign(served), roster={1000: 0, 1001: 1})
    for command in ("status", "history", "pause", "resume"):
        assert run_command(watch, capsys, command, "--home", home.folder) == 0
    for command in ("status", "history"):
        assert run_command(watch, capsys, command, "--json", "--home", home.folder) == 0
    assert run_command(watch, capsys, "personalize", "--home", home.folder, "--base", fleet) == 0
    assert run_command(watch, capsys, "personalize", "--home", home.folder, "--base", fleet) == 0
    assert run_command(watch, capsys, "rollback", "--home", home.folder) == 0
    assert run_command(watch, capsys, "forget", "--yes", "--home", home.folder) == 0
    assert watch.wire
    assert len(watch.log.getvalue()) > 500
    assert watch.find(needles(resident_base(campaign.scenario.model.base))) == set()


@pytest.mark.fault("R16")
@pytest.mark.parametrize("broken", BREAKS)
def test_no_failure_tells_a_word(watched, homes, published, monkeypatch, broken):
    home, watch = watched
    owner, name, error, code = BREAKS[broken]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail_with(error))
        assert homes.ask(home, published.campaign)[0] == code
    assert homes.ask(home, published.campaign)[0] == "BURNT"
    assert '"code": "INTERNAL"' in watch.log.getvalue()
    assert type(error).__name__ in watch.log.getvalue()
    assert watch.find(needles(resident_base(published.campaign.scenario.model.base))) == set()


def test_a_wrong_line_of_a_file_is_not_quoted(watched, tmp_path, capsys):
    home, watch = watched
    lines = ["{", json.dumps({"text": TEXT}), json.dumps({"text": TEXT, "target": WORDS[0]}), TEXT]
    lines += [json.dumps({"text": TEXT, "target": 1.0, WORDS[1]: 2}), json.dumps([TEXT])]
    given = tmp_path.parent / f"{tmp_path.name}-given.jsonl"  # the owner's own file is not searched
    for line in lines:
        given.write_text(line + "\n", encoding="utf-8")
        assert run_command(watch, capsys, "add", "--home", home.folder, "--jsonl", given) == 2
    assert watch.terminal
    assert watch.find({word: word.encode() for word in WORDS}) == set()


class TestTheSearchFindsWhatIsThere:
    """Each of these is a fault that the tests above would have to notice."""

    def leaks(self, watched, homes, published):
        home, watch = watched
        homes.ask(home, published.campaign)
        found = watch.find(needles(resident_base(published.campaign.scenario.model.base)))
        return {(place.rpartition("/")[2], what) for place, what in found}

    def test_a_vault_that_does_not_encrypt(self, homes, published, tmp_path, monkeypatch):
        def plain(self, name, content):
            path = self._path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

        monkeypatch.setattr(Vault, "seal", plain)
        monkeypatch.setattr(Vault, "open", lambda self, name: self._path(name).read_bytes())
        watch = Watch([tmp_path], monkeypatch)
        home = homes.make_home(tmp_path / "home", published, user=None)
        home.records().add(RECORDS)
        found = {what for _, what in self.leaks((home, watch), homes, published)}
        assert any("UTF-8" in what or "escaped" in what for what in found)
        assert "hidden states" in found

    def test_a_log_that_quotes_the_error(self, watched, homes, published, monkeypatch):
        monkeypatch.setattr(client.app, "train_shared", fail_with(RuntimeError(TEXT)))
        monkeypatch.setattr(client.app, "note", lambda *_, **fields: logging.getLogger("sottovoce").error(fields))
        monkeypatch.setattr(client.app, "describe_error", lambda e: describe_error(e) | {"error": str(e)})
        assert {("log", f"{word} in UTF-8") for word in WORDS[:2]} <= self.leaks(watched, homes, published)

    def test_a_reply_that_says_why(self, watched, homes, published, monkeypatch):
        def say(code, error):
            return wire.RecordDict({"why": wire.ConfigRecord({"text": str(error)})})

        monkeypatch.setattr(client.app, "train_shared", fail_with(RuntimeError(TEXT)))
        monkeypatch.setattr(client.app, "_refuse", say)
        assert {("wire", f"{word} in UTF-8") for word in WORDS[:2]} <= self.leaks(watched, homes, published)

    def test_a_temporary_file(self, watched, homes, published, monkeypatch):
        read = RecordStore.read

        def careless(self):
            with tempfile.NamedTemporaryFile("wb", delete=False) as file:
                file.write(base64.b64encode(TEXT.encode()) + np.arange(3).tobytes())
            return read(self)

        monkeypatch.setattr(RecordStore, "read", careless)
        assert any("base64" in what for _, what in self.leaks(watched, homes, published))


def test_the_needles_are_no_common_bytes(tiny_base):
    found = needles(tiny_base)
    assert min(len(needle) for needle in found.values()) >= 12
