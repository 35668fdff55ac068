"""Whatever is not exactly the exported head is refused; what is, predicts without torch."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import client.cli
from client.export.encoder import export_head
from client.runtime.artifact import ADAPTER, MANIFEST, MODEL, TOKENIZER
from client.runtime.runtime import base_id, open_base, open_head
from shared.config import AdapterConfig, Scenario
from shared.errors import HeadError
from shared.heads.output import OutputLayer
from shared.heads.rating import RatingHead

TEXT = "Fargo (1996). Crime, Drama, Thriller"
SLOT = "lora.block.1.output.dense"


@pytest.fixture(scope="module")
def heads(tiny_base, tiny_fleet, tiny_texts, tmp_path_factory):
    """A folder with ``base`` and the heads of two users."""
    folder = tmp_path_factory.mktemp("heads")
    shutil.copytree(tiny_fleet, folder / "base")
    for seed, (user, rank) in enumerate((("ann", 2), ("bob", 5))):
        adapter = AdapterConfig(rank=rank, whitened_features=8)
        head = RatingHead(tiny_base, Scenario(name="tiny", adapter=adapter))
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in head.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3, generator=generator)
        export_head(
            folder / user,
            base_folder=folder / "base",
            head=head,
            output=OutputLayer(np.random.default_rng(seed).normal(size=tiny_base.hidden_size) * 6, 3.0),
            user=user,
            privacy={},
            probe_texts=tiny_texts,
            created=datetime(2026, 1, 1, tzinfo=UTC),
        )
    return folder


@pytest.fixture
def copied(heads, tmp_path):
    """The same folder, free to be damaged."""
    shutil.copytree(heads, tmp_path / "heads")
    return tmp_path / "heads"


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def rehash(folder, name):
    """Make the manifest name the damaged file, so that only the checks behind the hash are left."""
    content = (folder / name).read_bytes()
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit_json(folder / MANIFEST, lambda manifest: manifest["files"].update({name: entry}))


def rewrite(folder, change, *, listed=True):
    """Change an adapter's tensors with a manifest that fits them."""
    tensors = load_file(folder / ADAPTER)
    change(tensors)
    save_file(tensors, folder / ADAPTER)
    rehash(folder, ADAPTER)
    slots = [{"name": n, "shape": list(a.shape), "dtype": str(a.dtype)} for n, a in tensors.items()]
    if listed:
        edit_json(folder / MANIFEST, lambda manifest: manifest.update(slots=slots))


def test_predictions_are_clipped_and_in_order(heads, tiny_texts):
    head = open_head(heads / "ann")
    raw, clipped = head.raw(tiny_texts), head.predict(tiny_texts)
    assert raw.min() < 1 < raw.max()  # else the clip is not seen, or nothing else
    np.testing.assert_array_equal(clipped, np.clip(raw, 1, 5))
    for text, value in zip(tiny_texts, raw, strict=True):
        np.testing.assert_allclose(head.raw([text]), [value], atol=1e-5)
    many = head.raw(tiny_texts * 7)  # several batches
    np.testing.assert_allclose(many, np.tile(raw, 7), atol=1e-5)
    assert head.predict([]).shape == (0,)
    with pytest.raises(TypeError, match="one string"):
        head.predict(TEXT)


def test_users_swap_in_one_session(heads, tiny_texts):
    base = open_base(heads / "base")
    ann, bob = (open_head(heads / user, base=base) for user in ("ann", "bob"))
    bare = base.run(tiny_texts)[0]
    alone = {user: open_head(heads / user).raw(tiny_texts) for user in ("ann", "bob")}
    assert not np.allclose(alone["ann"], alone["bob"], atol=0.1)
    for _ in range(2):
        np.testing.assert_array_equal(ann.raw(tiny_texts), alone["ann"])
        np.testing.assert_array_equal(bob.raw(tiny_texts), alone["bob"])
    np.testing.assert_array_equal(base.run(tiny_texts)[0], bare)  # no trace of either
    assert (ann.user, bob.user) == ("ann", "bob")


def test_files_changed_after_opening_change_nothing(copied, tiny_texts):
    head = open_head(copied / "ann")
    before = head.raw(tiny_texts)
    for path in (copied / "ann" / ADAPTER, copied / "base" / MODEL, copied / "base" / TOKENIZER):
        path.write_bytes(bytes(path.stat().st_size))
    np.testing.assert_array_equal(head.raw(tiny_texts), before)


def test_predicts_without_the_training_packages(heads):
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from client.runtime.runtime import open_head\n"
        f"value = open_head(Path({str(heads / 'ann')!r})).predict([{TEXT!r}])[0]\n"
        "heavy = {'torch', 'transformers', 'peft', 'onnx', 'flwr', 'opacus', 'pydantic'} & set(sys.modules)\n"
        "print(float(value), sorted(heavy))\n"
    )
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    value, heavy = done.stdout.split(maxsplit=1)
    assert heavy.strip() == "[]"
    assert float(value) == pytest.approx(float(open_head(heads / "ann").predict([TEXT])[0]), abs=1e-5)


def refuse(folder, match):
    """The head is refused in one line."""
    with pytest.raises(HeadError, match=match) as caught:
        open_head(folder / "ann")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", [f"ann/{ADAPTER}", f"base/{MODEL}", f"base/{TOKENIZER}"])
def test_a_flipped_bit_is_refused(copied, file):
    content = bytearray((copied / file).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / file).write_bytes(content)
    refuse(copied, "sha256")


@pytest.mark.parametrize("file", [f"ann/{ADAPTER}", f"base/{MODEL}", f"base/{TOKENIZER}"])
def test_a_file_cut_or_grown_is_refused(copied, file):
    content = (copied / file).read_bytes()
    for wrong in (content[:-1], content + b"\0", b""):
        (copied / file).write_bytes(wrong)
        refuse(copied, "must have the")


@pytest.mark.parametrize("file", [ADAPTER, MANIFEST, f"../base/{MODEL}", f"../base/{MANIFEST}"])
def test_a_missing_file_is_refused(copied, file):
    (copied / "ann" / file).unlink()
    refuse(copied, "must")


def test_another_base_is_refused(copied, tiny_base):
    edit_json(copied / "ann" / MANIFEST, lambda m: m["base"].update(model_sha256="0" * 64))
    refuse(copied, "must be used with the base it was exported for")


@pytest.mark.parametrize("key", ["id", "model_sha256", "base_sha256"])
def test_every_part_of_the_binding_counts(copied, key):
    edit_json(copied / "ann" / MANIFEST, lambda m: m["base"].pop(key))
    refuse(copied, "must be used with the base it was exported for")


def test_a_base_with_other_settings_is_another_base(copied):
    def shorten(manifest):
        manifest["tokenizer"]["max_tokens"] = 8

    edit_json(copied / "base" / MANIFEST, shorten)
    refuse(copied, "its id must be")
    edit_json(copied / "base" / MANIFEST, lambda m: m.update(id=base_id(m)))
    refuse(copied, "must be used with the base it was exported for")


def test_base_slots_must_be_those_of_the_model(copied):
    edit_json(copied / "base" / MANIFEST, lambda m: m["slots"].pop())
    edit_json(copied / "base" / MANIFEST, lambda m: m.update(id=base_id(m)))
    refuse(copied, "not the optional inputs")


def test_a_changed_hash_in_the_manifest_is_refused(copied):
    edit_json(copied / "ann" / MANIFEST, lambda m: m["files"][ADAPTER].update(sha256="0" * 64))
    refuse(copied, "sha256 000000000000")


CHANGES = {
    "missing A": (lambda t: t.pop(f"{SLOT}.A"), f"must hold {SLOT}.A"),
    "missing B": (lambda t: t.pop(f"{SLOT}.B"), f"must hold {SLOT}.B"),
    "missing output": (lambda t: t.pop("output.weight"), "must hold output.weight"),
    "extra": (lambda t: t.update(extra=np.ones(1, np.float32)), "no slot extra"),
    "graph input": (lambda t: t.update(input_ids=np.ones((1, 1), np.float32)), "no slot input_ids"),
    "NaN": (lambda t: t["output.weight"].__setitem__((3, 0), np.nan), "output.weight must be finite"),
    "infinity": (lambda t: t[f"{SLOT}.A"].__setitem__((3, 0), np.inf), f"{SLOT}.A must be finite"),
    "flat": (lambda t: t.update({"output.weight": t["output.weight"][:, 0].copy()}), "must have shape"),
    "transposed": (lambda t: t.update({f"{SLOT}.A": t[f"{SLOT}.A"].T.copy()}), "must have shape"),
    "other rank": (lambda t: t.update({f"{SLOT}.A": t[f"{SLOT}.A"][:, :1].copy()}), "must have shape"),
    "rank 0": (
        lambda t: t.update({f"{SLOT}.A": t[f"{SLOT}.A"][:, :0].copy(), f"{SLOT}.B": t[f"{SLOT}.B"][:0].copy()}),
        "must have shape",
    ),
    "half": (lambda t: t.update({"output.bias": t["output.bias"].astype(np.float16)}), "must be float32"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_tensors_that_do_not_fit_are_refused(copied, change):
    do, match = CHANGES[change]
    rewrite(copied / "ann", do)
    refuse(copied, match)


def test_tensors_the_manifest_does_not_list_are_refused(copied):
    def drop(tensors):
        del tensors[f"{SLOT}.A"], tensors[f"{SLOT}.B"]

    rewrite(copied / "ann", drop, listed=False)
    refuse(copied, f"they differ in {SLOT}.A, {SLOT}.B")


@pytest.mark.parametrize("content", [b"", b"12345678", b"\xff" * 64, (2**40).to_bytes(8, "little") + b"{}"])
def test_what_is_no_safetensors_file_is_refused(copied, content):
    (copied / "ann" / ADAPTER).write_bytes(content)
    rehash(copied / "ann", ADAPTER)
    refuse(copied, "cannot be used")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        "null",
        "[" * 100_000,
        '{"schema": 2, "kind": "base"}',
        '{"schema": 1, "kind": "adapter"}',
        '{"schema": 3, "kind": "adapter"}',
    ],
)
def test_what_is_no_manifest_is_refused(copied, content):
    (copied / "ann" / MANIFEST).write_text(content)
    refuse(copied, MANIFEST)


@pytest.mark.parametrize("key", ["files", "slots", "base", "user"])
@pytest.mark.parametrize("value", [None, 3, [], {}, [[1]], {"a": 1}])
def test_manifest_entries_of_the_wrong_kind_are_refused(copied, key, value):
    edit_json(copied / "ann" / MANIFEST, lambda m: m.update({key: value}))
    refuse(copied, "must")


@pytest.mark.parametrize("key", ["files", "slots", "base_sha256", "tokenizer", "task", "id"])
@pytest.mark.parametrize("value", [None, 3, "x", [], {}, [[1]], {"a": 1}])
def test_base_manifest_entries_of_the_wrong_kind_are_refused(copied, key, value):
    edit_json(copied / "base" / MANIFEST, lambda m: m.update({key: value}))
    refuse(copied, "must|unreadable|cannot be used")


def test_threads_are_checked(heads):
    with pytest.raises(HeadError, match="threads must be at least 1, got 0"):
        open_base(heads / "base", threads=0)


def run_cli(*argv):
    import argparse

    parser = argparse.ArgumentParser(prog="sottovoce")
    client.cli.add_parser(parser.add_subparsers())
    args = parser.parse_args(["client", *argv])
    return args.handler(args)


def test_cli_predicts(heads, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("Heat (1995). Action\n\n  Jaws  \n", encoding="utf-8")
    head = open_head(heads / "ann")
    texts = [TEXT, "Heat (1995). Action", "Jaws"]
    wanted = head.predict(texts)
    options = ["predict", "--head", str(heads / "ann"), "--text", TEXT, "--file", str(tmp_path / "texts.txt")]
    assert run_cli(*options) == 0
    assert capsys.readouterr().out.splitlines() == [f"{v:.1f}  {t}" for v, t in zip(wanted, texts, strict=True)]
    assert run_cli(*options, "--json", "--base", str(heads / "base")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["user"] == "ann"
    assert [row["text"] for row in found["predictions"]] == texts
    np.testing.assert_allclose([row["prediction"] for row in found["predictions"]], wanted, atol=1e-4)


def test_cli_refuses_in_one_line(heads, tmp_path):
    with pytest.raises(HeadError, match="at least one text"):
        run_cli("predict", "--head", str(heads / "ann"))
    with pytest.raises(HeadError, match="readable text file"):
        run_cli("predict", "--head", str(heads / "ann"), "--file", str(tmp_path / "none.txt"))
    with pytest.raises(HeadError, match="name its folder with --head"):
        run_cli("predict", "--head", str(tmp_path), "--text", "x")


def test_cli_help_teaches(capsys):
    with pytest.raises(SystemExit) as caught:
        run_cli("predict", "--help")
    assert caught.value.code == 0
    assert 'predict --head runs/latest/heads/user-1 --text "Fargo (1996)' in capsys.readouterr().out
