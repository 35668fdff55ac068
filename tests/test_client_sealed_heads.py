"""Private heads are kept, gone back to and opened without one of their tensors in plain on disk."""

import importlib.util
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch

from client.export.encoder import export_head
from client.home.sealed_heads import HeadShelf, HeadVersion
from client.runtime.artifact import ADAPTER, MANIFEST
from client.runtime.generation import open_generator
from client.runtime.runtime import open_base, open_head
from client.vault.keystore import file_keystore
from client.vault.vault import create_vault, open_vault, shred_vault
from shared.config import AdapterConfig, Scenario
from shared.errors import HeadError, StoreError
from shared.heads.output import OutputLayer
from shared.heads.rating import RatingHead

SENTINEL = b"xyzzy-7f3a-a-personal-tensor"


@pytest.fixture
def home(tmp_path):
    keystore = file_keystore(tmp_path / "home")
    keystore.write("ledger-key", bytes(32))
    create_vault(tmp_path / "home" / "vault", keystore)
    return tmp_path / "home"


@pytest.fixture
def vault(home):
    return open_vault(home / "vault", file_keystore(home))


@pytest.fixture
def shelf(vault):
    return HeadShelf(vault)


def reopen(home):
    return HeadShelf(open_vault(home / "vault", file_keystore(home)))


def files(number):
    return {MANIFEST: b'{"n": %d}' % number, ADAPTER: SENTINEL + b"%d" % number, "empty": b""}


def about(number):
    return {"created": f"2026-01-{number:02d}T00:00:00+00:00", "campaign": f"spring-{number}", "round": str(number)}


def fill(shelf, count):
    for number in range(1, count + 1):
        assert shelf.add(files(number), about(number)) == number


def numbers(shelf):
    return [version.number for version in shelf.versions()]


def test_an_empty_shelf(shelf):
    assert (shelf.current(), shelf.versions()) == (None, ())
    for call in (shelf.read, shelf.roll_back, lambda: shelf.read(1), lambda: shelf.roll_back(1)):
        with pytest.raises(StoreError, match=r"one that is kept \(none\)"):
            call()
    assert shelf.prune(1) == []


def test_what_is_added_is_current_and_read_back(home, shelf):
    fill(shelf, 3)
    for opened in (shelf, reopen(home)):
        assert opened.current() == 3
        assert opened.read() == files(3)
        assert [opened.read(number) for number in (1, 2, 3)] == [files(1), files(2), files(3)]
        assert list(opened.read()) == [MANIFEST, ADAPTER, "empty"]
        wanted = tuple(HeadVersion(number=n, after=n - 1 or None, **about(n)) for n in (1, 2, 3))
        assert opened.versions() == wanted
    for missing in (0, 4, -1):
        with pytest.raises(StoreError, match=r"one that is kept \(1, 2, 3\)"):
            shelf.read(missing)


@pytest.mark.parametrize("wrong", [{}, {"created": "x"}, {**about(1), "user": "ann"}])
def test_what_is_said_of_a_version_is_fixed(shelf, wrong):
    with pytest.raises(ValueError, match="needs files, created"):
        shelf.add(files(1), wrong)
    with pytest.raises(ValueError, match="needs files, created"):
        shelf.add({}, about(1))
    assert shelf.versions() == ()


def test_going_back_goes_to_what_was_in_use_before(home, shelf):
    fill(shelf, 3)
    assert shelf.roll_back() == 2
    assert (shelf.current(), shelf.read(), numbers(shelf)) == (2, files(2), [1, 2, 3])
    assert shelf.add(files(4), about(4)) == 4  # after 2; 3 was not liked
    assert shelf.roll_back() == 2
    assert shelf.roll_back() == 1
    with pytest.raises(StoreError, match="none before this one"):
        shelf.roll_back()
    assert reopen(home).current() == 1
    assert shelf.roll_back(3) == 3  # and forward, where it is named
    assert reopen(home).read() == files(3)
    with pytest.raises(StoreError, match="got 5"):
        shelf.roll_back(5)
    assert shelf.current() == 3


def test_pruning_keeps_the_newest_and_the_current(home, shelf, vault):
    fill(shelf, 6)
    shelf.roll_back(2)
    assert shelf.prune(2) == [1, 3, 4]
    assert (shelf.current(), numbers(shelf)) == (2, [2, 5, 6])
    assert vault.names("heads/") == ["heads/000002", "heads/000005", "heads/000006", "heads/index"]
    assert [reopen(home).read(number) for number in (2, 5, 6)] == [files(2), files(5), files(6)]
    assert {version.number: version.after for version in shelf.versions()} == {2: None, 5: 2, 6: 5}
    assert shelf.add(files(7), about(7)) == 7
    assert shelf.prune(1) == [2, 5, 6]
    assert shelf.add(files(8), about(8)) == 8  # a number is never given twice
    for wrong in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="at least 1"):
            shelf.prune(wrong)


def test_pruned_versions_are_skipped_on_the_way_back(shelf):
    fill(shelf, 2)
    shelf.roll_back(1)
    fill_more = [shelf.add(files(n), about(n)) for n in (3, 4)]  # 1 <- 3 <- 4, and 2 beside them
    assert fill_more == [3, 4]
    assert shelf.prune(2) == [1, 2]
    assert shelf.roll_back() == 3
    with pytest.raises(StoreError, match="none before this one"):
        shelf.roll_back()


def test_no_tensor_lies_in_plain(home, shelf):
    fill(shelf, 3)
    shelf.prune(1)
    contents = [path.read_bytes() for path in home.rglob("*") if path.is_file()]
    assert len(contents) == 5  # two keys, the wrapped key, a version, the index
    assert not any(SENTINEL in content or b"spring" in content for content in contents)


def test_a_crash_leaves_the_shelf_before_or_after(home, shelf, crash_at_each_step):
    fill(shelf, 2)
    code = f"""shelf = client.home.sealed_heads.HeadShelf(
    client.vault.vault.open_vault(home / "vault", client.vault.keystore.file_keystore(home)))
shelf.add({files(3)!r}, {about(3)!r})
shelf.prune(1)
shelf.roll_back(3)"""
    states = []
    for crashed in crash_at_each_step(home, code):
        again = reopen(crashed)
        kept = numbers(again)
        states.append((again.current(), tuple(kept)))
        assert [again.read(number) for number in kept] == [files(number) for number in kept]
        assert not any(SENTINEL in path.read_bytes() for path in crashed.rglob("*") if path.is_file())
        last = max(kept)
        assert again.add(files(last + 1), about(last + 1)) == last + 1
        assert again.read() == files(last + 1)
        again.prune(1)
        left = {path.name for path in (crashed / "vault" / "heads").iterdir()}
        assert left == {"index", f"{last + 1:06d}"}
    wanted = [(2, (1, 2)), (3, (1, 2, 3)), (3, (3,))]
    assert sorted(set(states), key=states.index) == wanted


@pytest.mark.fault("R10")
def test_a_full_disk_leaves_the_shelf_as_it_was(home, shelf):
    fill(shelf, 2)
    code = """
import resource, sys
from pathlib import Path
from client.vault.keystore import file_keystore
from client.home.sealed_heads import HeadShelf
from client.vault.vault import open_vault
from shared.errors import StoreError
home = Path(sys.argv[1])
shelf = HeadShelf(open_vault(home / "vault", file_keystore(home)))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    shelf.add({"adapter": bytes(2000)}, {"created": "", "campaign": "", "round": ""})
except StoreError:
    print("full")
"""
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", code, str(home)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "full\n"
    assert (shelf.current(), shelf.read(), numbers(shelf)) == (2, files(2), [1, 2])
    assert sorted(path.name for path in (home / "vault" / "heads").iterdir()) == ["000001", "000002", "index"]


def test_versions_cannot_be_swapped(home, shelf):
    fill(shelf, 2)
    folder = home / "vault" / "heads"
    (folder / "000001").replace(folder / "000002")
    with pytest.raises(StoreError, match="damaged or moved"):
        shelf.read()
    with pytest.raises(StoreError, match="must exist"):
        shelf.read(1)


VERSION = b'{"number":1,"created":"","campaign":"","round":"","after":null}'


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"{}",
        b"[" * 100_000,
        b"\xff",
        b'{"current":1,"last":1,"versions":3}',
        b'{"current":1,"last":1,"versions":[{"number":1}]}',
        b'{"current":1,"versions":[%b]}' % VERSION,
        b'{"current":"1","last":1,"versions":[%b]}' % VERSION,
        b'{"current":1,"last":true,"versions":[%b]}' % VERSION,
        b'{"current":2,"last":2,"versions":[%b]}' % VERSION,
        b'{"current":null,"last":1,"versions":[%b]}' % VERSION,
        b'{"current":1,"last":1,"versions":[%b],"schema":2}' % VERSION,
    ],
)
def test_an_index_that_is_none_is_refused(shelf, vault, content):
    fill(shelf, 1)
    vault.seal("heads/index", content)
    for call in (shelf.current, shelf.versions, shelf.read, lambda: shelf.add(files(2), about(2))):
        with pytest.raises(StoreError, match="as this version of sottovoce writes it"):
            call()
    assert vault.open("heads/index") == content
    vault.seal("heads/index", b'{"current":1,"last":1,"versions":[%b]}' % VERSION)
    assert shelf.read() == files(1)


@pytest.mark.parametrize(
    ("table", "rest"),
    [
        (b"", b""),
        (b"{}", b"x"),
        (b"[]", b""),
        (b"null", b""),
        (b'{"a":3}', b"xy"),
        (b'{"a":1}', b"xy"),
        (b'{"a":"1"}', b"x"),
        (b'{"a":true}', b"x"),
        (b'{"a":1.0}', b"x"),
        (b'{"a":-1,"b":2}', b"x"),
    ],
)
def test_a_version_that_is_none_is_refused(shelf, vault, table, rest):
    fill(shelf, 1)
    vault.seal("heads/000001", len(table).to_bytes(4, "big") + table + rest)
    with pytest.raises(StoreError, match="as this version of sottovoce writes it"):
        shelf.read()
    for short in (b"", b"\0\0\0", b"\xff\xff\xff\xff{}"):
        vault.seal("heads/000001", short)
        with pytest.raises(StoreError, match="as this version of sottovoce writes it"):
            shelf.read()


def test_a_shredded_shelf_is_gone(home, shelf):
    fill(shelf, 2)
    shred_vault(home / "vault", file_keystore(home))
    with pytest.raises(StoreError):
        shelf.read()
    with pytest.raises(StoreError):
        shelf.add(files(3), about(3))
    assert [path.name for path in home.rglob("*") if path.is_file()] == ["ledger-key"]


@pytest.fixture(scope="module")
def head(tiny_base, tiny_fleet, tiny_texts, tmp_path_factory):
    """The folder of a user's head."""
    folder = tmp_path_factory.mktemp("heads") / "ann"
    module = RatingHead(tiny_base, Scenario(name="tiny", adapter=AdapterConfig(rank=2, whitened_features=8)))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    export_head(
        folder,
        base_folder=tiny_fleet,
        head=module,
        output=OutputLayer(np.random.default_rng(0).normal(size=tiny_base.hidden_size) * 6, 3.0),
        user="ann",
        privacy={},
        probe_texts=tiny_texts,
        created=datetime(2026, 1, 1, tzinfo=UTC),
    )
    return folder


@pytest.fixture(scope="module")
def lm_head(tiny_llama, tiny_lm_fleet, tiny_texts, tmp_path_factory):
    """The folder of a user's language head."""
    path = Path(__file__).with_name("test_client_export_lm.py")
    spec = importlib.util.spec_from_file_location("export_lm_helpers", path)
    helpers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(helpers)
    folder = tmp_path_factory.mktemp("lm-heads") / "ann"
    helpers.write_head(folder, tiny_lm_fleet, helpers.Adapted(tiny_llama, seed=0, rank=2), tiny_texts, user="ann")
    return folder


def contents(folder):
    return {name: (folder / name).read_bytes() for name in (MANIFEST, ADAPTER)}


def test_a_sealed_head_predicts_as_its_folder_does(shelf, head, tiny_fleet, tiny_texts):
    shelf.add(contents(head), about(1))
    wanted = open_head(head, base=tiny_fleet)
    for base in (tiny_fleet, open_base(tiny_fleet)):
        found = open_head(shelf.read(), base=base)
        np.testing.assert_array_equal(found.raw(tiny_texts), wanted.raw(tiny_texts))
        assert (found.user, found.manifest) == ("ann", wanted.manifest)
    assert np.abs(wanted.raw(tiny_texts) - open_base(tiny_fleet).run(tiny_texts)[1]).max() > 0.1


def test_a_sealed_language_head_answers_as_its_folder_does(shelf, lm_head, tiny_lm_fleet):
    shelf.add(contents(lm_head), about(1))
    wanted, found = (open_generator(source, base=tiny_lm_fleet) for source in (lm_head, shelf.read()))
    bare = open_generator(tiny_lm_fleet).generate("Fargo (1996)", max_new_tokens=12)
    answers = [generator.generate("Fargo (1996)", max_new_tokens=12) for generator in (wanted, found)]
    assert answers[0] == answers[1] != bare
    assert found.user == "ann"


@pytest.mark.parametrize("kind", ["head", "lm_head"])
def test_a_head_in_memory_is_checked_as_one_in_a_folder(request, kind, tiny_fleet, tiny_lm_fleet):
    folder = request.getfixturevalue(kind)
    open_, base, other = (open_head, tiny_fleet, tiny_lm_fleet)
    if kind == "lm_head":
        open_, base, other = (open_generator, tiny_lm_fleet, tiny_fleet)
    good = contents(folder)
    flipped = good[ADAPTER][:-1] + bytes([good[ADAPTER][-1] ^ 1])
    cases = [
        ({}, "head in memory must hold a personal .*head, but has no manifest.json"),
        ({MANIFEST: good[MANIFEST]}, "adapter.safetensors must exist"),
        ({MANIFEST: b"{", ADAPTER: good[ADAPTER]}, "must be JSON"),
        ({MANIFEST: b" " * (2**20 + 1), ADAPTER: good[ADAPTER]}, "at most 1048576 bytes"),
        ({**good, ADAPTER: flipped}, "must have the"),
        ({**good, ADAPTER: good[ADAPTER] + b"\0"}, "got more"),
        ({**good, ADAPTER: good[ADAPTER][:-1]}, "must have the"),
        ({MANIFEST: good[MANIFEST].replace(b'"ann"', b"7"), ADAPTER: good[ADAPTER]}, "user must be a string"),
        ({**good, MANIFEST: (base / MANIFEST).read_bytes()}, "must describe a personal"),
    ]
    for files, match in cases:
        with pytest.raises(HeadError, match=match):
            open_(files, base=base)
    with pytest.raises(HeadError, match="must describe"):
        open_(good, base=other)
    with pytest.raises(HeadError, match="base must be named for a head in memory"):
        open_(good)
    assert open_({**good, "more": b"x"}, base=base).user == "ann"


def test_bytes_changed_after_opening_change_nothing(head, tiny_fleet, tiny_texts):
    content = {name: bytearray(value) for name, value in contents(head).items()}
    opened = open_head(content, base=tiny_fleet)
    before = opened.raw(tiny_texts)
    content[ADAPTER][:] = bytes(len(content[ADAPTER]))
    np.testing.assert_array_equal(opened.raw(tiny_texts), before)


@pytest.mark.parametrize("kind", ["symbolic link", "2 names", "regular file"])
def test_a_version_that_is_no_file_of_its_own_is_refused_at_once(home, shelf, tmp_path, kind):
    number = shelf.add({"manifest.json": b"{}"}, {"created": "now", "campaign": "films", "round": "1"})
    [path] = (home / "vault" / "heads").glob(f"{number:06d}")
    if kind == "2 names":
        os.link(path, tmp_path / "other")
    else:
        path.rename(tmp_path / "moved")
        path.symlink_to(tmp_path / "moved") if kind == "symbolic link" else os.mkfifo(path)
    with pytest.raises(StoreError, match=kind):
        shelf.read(number)
