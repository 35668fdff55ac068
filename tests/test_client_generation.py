"""A language head generates without torch; whatever is not exactly the exported head is refused."""

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import client.cli
from client.runtime.artifact import ADAPTER, MANIFEST, MODEL, TOKENIZER
from client.runtime.generation import choose, open_generator
from client.runtime.language import lm_base_id, open_lm_base
from client.runtime.runtime import open_base, open_head
from shared.errors import HeadError

PROMPT = "Fargo (1996)"
SLOT = "lora.block.1.mlp.down_proj"


@pytest.fixture(scope="module")
def heads(tiny_llama, tiny_lm_fleet, tiny_texts, tmp_path_factory):
    """A folder with ``base`` and the heads of two users."""
    path = Path(__file__).with_name("test_client_export_lm.py")
    spec = importlib.util.spec_from_file_location("export_lm_helpers", path)
    helpers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(helpers)
    folder = tmp_path_factory.mktemp("lm-heads")
    shutil.copytree(tiny_lm_fleet, folder / "base")
    for seed, user in enumerate(("ann", "bob")):
        adapted = helpers.Adapted(tiny_llama, seed=seed, rank=2 + seed)
        helpers.write_head(folder / user, folder / "base", adapted, tiny_texts, user=user)
    return folder


@pytest.fixture
def copied(heads, tmp_path):
    """The same folder, free to be damaged."""
    return Path(shutil.copytree(heads, tmp_path / "heads"))


@pytest.fixture(scope="module")
def ann(heads):
    return open_generator(heads / "ann")


def test_users_swap_in_one_session(heads):
    base = open_lm_base(heads / "base")
    bare = open_generator(heads / "base").generate(PROMPT, max_new_tokens=12)
    generators = {user: open_generator(heads / user, base=base) for user in ("ann", "bob")}
    alone = {user: open_generator(heads / user).generate(PROMPT, max_new_tokens=12) for user in generators}
    assert len({alone["ann"].token_ids, alone["bob"].token_ids, bare.token_ids}) == 3
    for _ in range(2):
        for user, generator in generators.items():
            assert generator.generate(PROMPT, max_new_tokens=12) == alone[user]
            assert generator.user == user


def test_a_long_prompt_in_chunks_is_the_prompt_at_once(ann, monkeypatch):
    ids = ann.base.tokenizer.encode("The Wrong Trousers (1993). Animation, Comedy").ids
    whole = ann.logits(ids)
    monkeypatch.setattr("client.runtime.language._CHUNK_TOKENS", 7)
    np.testing.assert_allclose(ann.logits(ids), whole, atol=1e-5)
    assert whole.shape == (len(ids), 263)


def test_the_stream_is_the_text_and_splits_no_character(ann, monkeypatch):
    for seed in range(5):
        settings = {"max_new_tokens": 40, "temperature": 1.5, "seed": seed, "stop_at_eos": False}
        pieces = list(ann.stream(PROMPT, **settings))
        assert "".join(pieces) == ann.generate(PROMPT, **settings).text
        assert len(pieces) > 5
    letters = ann.base.tokenizer.encode("aé😀b").ids  # 1, 2, 4 and 1 bytes
    monkeypatch.setattr("client.runtime.generation.choose", lambda logits, **_: letters[len(drawn)])
    drawn = []
    steps = type(ann).steps
    monkeypatch.setattr(
        type(ann), "steps", lambda self, ids, **k: (drawn.append(1) or step for step in steps(self, ids, **k))
    )
    assert list(ann.stream("x", max_new_tokens=8)) == ["a", "é", "😀", "b"]


def test_an_answer_ends_at_the_stop_token(ann, monkeypatch):
    script = iter([70, 71, 2, 72, 73] * 2)
    monkeypatch.setattr("client.runtime.generation.choose", lambda logits, **_: next(script))
    found = ann.generate(PROMPT, max_new_tokens=5)
    assert (found.token_ids, found.stopped) == ((70, 71, 2), "eos")
    assert found.text == ann.base.tokenizer.decode([70, 71])
    assert found.prompt_tokens == len(ann.base.tokenizer.encode(PROMPT).ids)
    script = iter([70, 71, 2, 72, 73])
    found = ann.generate(PROMPT, max_new_tokens=5, stop_at_eos=False)
    assert (found.token_ids, found.stopped) == ((70, 71, 2, 72, 73), "length")
    script = iter([70, 71])
    assert ann.generate(PROMPT, max_new_tokens=2).stopped == "length"


def test_draws_follow_temperature_and_top_p():
    probabilities = np.array([0.1, 0.5, 0.1, 0.3])
    logits = np.log(probabilities).astype(np.float32)

    def shares(**settings):
        random = np.random.default_rng(0)
        drawn = [choose(logits, random=random, **settings) for _ in range(2000)]
        return np.bincount(drawn, minlength=4) / 2000

    np.testing.assert_allclose(shares(temperature=1.0, top_p=1.0), probabilities, atol=0.04)
    sharp = probabilities**2 / (probabilities**2).sum()
    np.testing.assert_allclose(shares(temperature=0.5, top_p=1.0), sharp, atol=0.04)
    np.testing.assert_allclose(shares(temperature=1.0, top_p=0.7), [0, 0.625, 0, 0.375], atol=0.04)
    np.testing.assert_allclose(shares(temperature=1.0, top_p=0.4), [0, 1, 0, 0])
    np.testing.assert_allclose(shares(temperature=0.0, top_p=1.0), [0, 1, 0, 0])
    np.testing.assert_allclose(shares(temperature=1e-9, top_p=1.0), [0, 1, 0, 0])  # no overflow


def test_a_seed_repeats_an_answer(ann):
    settings = {"max_new_tokens": 20, "temperature": 1.0, "stop_at_eos": False}
    first = ann.generate(PROMPT, seed=1, **settings)
    assert ann.generate(PROMPT, seed=1, **settings) == first
    assert ann.generate(PROMPT, seed=2, **settings) != first
    assert ann.generate(PROMPT, **settings) != ann.generate(PROMPT, **settings)


def test_the_context_is_respected(ann):
    ids = ann.base.tokenizer.encode("x" * 100).ids
    assert len(ids) == 100
    assert len(ann.generate("x" * 100, max_new_tokens=28, stop_at_eos=False).token_ids) == 28
    with pytest.raises(HeadError, match="must fit the model's 128 tokens, got 100 and up to 29"):
        ann.generate("x" * 100, max_new_tokens=29)
    with pytest.raises(HeadError, match="128 tokens, got 129 and up to 0"):
        ann.logits([5] * 129)
    with pytest.raises(HeadError, match="at least one token, got none"):
        ann.generate("", max_new_tokens=1)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": float("nan")}, "temperature must be finite"),
        ({"temperature": -1.0}, "temperature must be finite"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": float("nan")}, "top_p must be above 0"),
    ],
)
def test_impossible_settings_are_refused(ann, settings, match):
    with pytest.raises(HeadError, match=match):
        ann.generate(PROMPT, **{"max_new_tokens": 4} | settings)


def test_generates_without_the_training_packages(heads, ann):
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from client.runtime.generation import open_generator\n"
        f"found = open_generator(Path({str(heads / 'ann')!r})).generate({PROMPT!r}, max_new_tokens=8)\n"
        "heavy = {'torch', 'transformers', 'peft', 'onnx', 'flwr', 'opacus', 'pydantic'} & set(sys.modules)\n"
        "print(list(found.token_ids), sorted(heavy), sep='|')\n"
    )
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    wanted = list(ann.generate(PROMPT, max_new_tokens=8).token_ids)
    assert done.stdout.strip() == f"{wanted}|[]"


def test_files_changed_after_opening_change_nothing(copied):
    generator = open_generator(copied / "ann")
    before = generator.generate(PROMPT, max_new_tokens=6)
    for path in (copied / "ann" / ADAPTER, copied / "base" / MODEL, copied / "base" / TOKENIZER):
        path.write_bytes(bytes(path.stat().st_size))
    assert generator.generate(PROMPT, max_new_tokens=6) == before


def test_a_prompt_is_put_into_the_template(copied):
    edit_json(copied / "base" / MANIFEST, lambda m: m["tokenizer"].update(template="Q: {text} A:"))
    edit_json(copied / "base" / MANIFEST, lambda m: m.update(id=lm_base_id(m)))
    asked = open_generator(copied / "base")
    bare = dataclasses.replace(asked, base=dataclasses.replace(asked.base, template="{text}"))
    wanted = bare.generate("Q: Heat A:", max_new_tokens=8)
    assert asked.generate("Heat", max_new_tokens=8) == wanted
    assert "".join(asked.stream("Heat", max_new_tokens=8)) == wanted.text
    assert asked.generate("Heat", max_new_tokens=8) != bare.generate("Heat", max_new_tokens=8)
    edit_json(copied / "base" / MANIFEST, lambda m: m["tokenizer"].update(template="no place"))
    with pytest.raises(HeadError, match="unreadable entry template"):
        open_generator(copied / "base")


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def rewrite(folder, change):
    """Change an adapter's tensors with a manifest that fits them."""
    tensors = load_file(folder / ADAPTER)
    change(tensors)
    save_file(tensors, folder / ADAPTER)
    content = (folder / ADAPTER).read_bytes()
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    slots = [{"name": n, "shape": list(a.shape), "dtype": str(a.dtype)} for n, a in tensors.items()]
    edit_json(folder / MANIFEST, lambda m: m.update(files={ADAPTER: entry}, slots=slots))


def refuse(folder, match):
    """The head is refused in one line."""
    with pytest.raises(HeadError, match=match) as caught:
        open_generator(folder / "ann")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", [f"ann/{ADAPTER}", f"base/{MODEL}", f"base/{TOKENIZER}"])
def test_a_damaged_file_is_refused(copied, file):
    content = bytearray((copied / file).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / file).write_bytes(content)
    refuse(copied, "sha256")
    (copied / file).write_bytes(content[:-1])
    refuse(copied, "must have the")
    (copied / file).unlink()
    refuse(copied, "must exist")


@pytest.mark.parametrize("key", ["id", "model_sha256", "base_sha256"])
def test_another_base_is_refused(copied, key):
    edit_json(copied / "ann" / MANIFEST, lambda m: m["base"].update({key: "0" * 64}))
    refuse(copied, "must be used with the base it was exported for")


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["tokenizer"].update(max_tokens=64),
        lambda m: m["tokenizer"].update(stop_ids=[]),
        lambda m: m["tokenizer"].update(template="Q: {text}"),
        lambda m: m.update(base_sha256="0" * 64),
    ],
)
def test_a_base_with_other_settings_is_another_base(copied, change):
    edit_json(copied / "base" / MANIFEST, change)
    refuse(copied, "its id must be")
    edit_json(copied / "base" / MANIFEST, lambda m: m.update(id=lm_base_id(m)))
    refuse(copied, "must be used with the base it was exported for")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m["slots"].pop(), "not the optional inputs"),
        (lambda m: m["cache"].update(layers=1), "its cache is not"),
        (lambda m: m["cache"].update(heads=4), "its cache is not"),
        (lambda m: m["cache"].update(width=8), "its cache is not"),
    ],
)
def test_the_base_s_manifest_must_be_the_model_s(copied, change, match):
    edit_json(copied / "base" / MANIFEST, change)
    edit_json(copied / "base" / MANIFEST, lambda m: m.update(id=lm_base_id(m)))
    refuse(copied, match)


CHANGES = {
    "missing A": (lambda t: t.pop(f"{SLOT}.A"), f"must hold {SLOT}.A"),
    "extra": (lambda t: t.update(extra=np.ones(1, np.float32)), "no slot extra"),
    "graph input": (lambda t: t.update(input_ids=np.ones((1, 1), np.float32)), "no slot input_ids"),
    "NaN": (lambda t: t[f"{SLOT}.B"].__setitem__((1, 0), np.nan), "must be finite"),
    "transposed": (lambda t: t.update({f"{SLOT}.A": t[f"{SLOT}.A"].T.copy()}), "must have shape"),
    "half": (lambda t: t.update({f"{SLOT}.A": t[f"{SLOT}.A"].astype(np.float16)}), "must be float32"),
    "overflow": (lambda t: t.update({n: a * np.float32(1e25) for n, a in t.items()}), "logits must be finite"),
    "slot left out": (lambda t: [t.pop(f"{SLOT}.{part}") for part in "AB"], "must give its known answer"),
    "no adapter": (lambda t: t.clear(), "must give its known answer"),
    "zeros": (lambda t: t.update({n: a * 0 for n, a in t.items()}), "must give its known answer"),
    "one value": (lambda t: t[f"{SLOT}.A"].__iadd__(np.float32(0.02)), "must give its known answer"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_tensors_that_are_not_the_exported_ones_are_refused(copied, change):
    do, match = CHANGES[change]
    rewrite(copied / "ann", do)
    refuse(copied, match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda k: k.update(tolerance=1.0), "must have a tolerance"),
        (lambda k: k.update(tolerance=float("nan")), "must have a tolerance"),
        (lambda k: k.update(places=[], logits=[], without_adapter=[]), "must have a tolerance"),
        (lambda k: k.update(without_adapter=k["logits"]), "must tell the adapter from its absence"),
        (lambda k: k.update(logits=k["without_adapter"]), "must tell the adapter from its absence"),
        (lambda k: k.update(places=[-1] * 8), "must lie in a vocabulary of 263"),
        (lambda k: k.update(places=[263] * 8), "must lie in a vocabulary of 263"),
        (lambda k: k.update(logits=[float("nan")] * 8), "must tell|known answer"),
        (lambda k: k.update(token_ids="x"), "unreadable known answer"),
        (lambda k: k.update(token_ids=[]), "at least one token"),
        (lambda k: k.update(token_ids=[10**6]), "must run on onnxruntime"),
        (lambda k: k.clear(), "unreadable known answer"),
    ],
)
def test_a_known_answer_that_proves_nothing_is_refused(copied, change, match):
    edit_json(copied / "ann" / MANIFEST, lambda m: change(m["known_answer"]))
    refuse(copied, match)


@pytest.mark.parametrize("key", ["files", "slots", "base", "user", "known_answer"])
@pytest.mark.parametrize("value", [None, 3, [], {}, [[1]], {"a": 1}])
def test_manifest_entries_of_the_wrong_kind_are_refused(copied, key, value):
    edit_json(copied / "ann" / MANIFEST, lambda m: m.update({key: value}))
    refuse(copied, "must|unreadable")


@pytest.mark.parametrize("key", ["files", "slots", "base_sha256", "tokenizer", "cache", "id"])
@pytest.mark.parametrize("value", [None, 3, "x", [], {}, [[1]], {"a": 1}])
def test_base_manifest_entries_of_the_wrong_kind_are_refused(copied, key, value):
    edit_json(copied / "base" / MANIFEST, lambda m: m.update({key: value}))
    refuse(copied, "must|unreadable|cannot be used")


def test_threads_are_checked(heads):
    with pytest.raises(HeadError, match="threads must be at least 1, got 0"):
        open_lm_base(heads / "base", threads=0)


def test_a_head_of_the_other_kind_is_refused_in_one_line(heads, tiny_fleet):
    for opener, folder, says in (
        (open_head, heads / "ann", "got a personal language head; that is for sottovoce client generate"),
        (open_base, heads / "base", "got a fleet's language model; that is for sottovoce client generate"),
        (open_generator, tiny_fleet, "got a fleet's base; that is for sottovoce client predict"),
        (open_lm_base, tiny_fleet, "got a fleet's base; that is for sottovoce client predict"),
    ):
        with pytest.raises(HeadError, match=says) as caught:
            opener(folder)
        assert "\n" not in str(caught.value)
    with pytest.raises(HeadError, match="must be a head when a base is named"):
        open_generator(heads / "base", base=heads / "base")


def run_cli(*argv):
    parser = argparse.ArgumentParser(prog="sottovoce")
    client.cli.add_parser(parser.add_subparsers())
    args = parser.parse_args(["client", *argv])
    return args.handler(args)


def test_cli_generates(heads, ann, tmp_path, capsys):
    wanted = ann.generate(PROMPT, max_new_tokens=9)
    options = ["generate", "--head", str(heads / "ann"), "--max-new-tokens", "9"]
    assert run_cli(*options, "--prompt", PROMPT) == 0
    assert capsys.readouterr().out == wanted.text + "\n"
    (tmp_path / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    assert run_cli(*options, "--file", str(tmp_path / "prompt.txt"), "--json", "--base", str(heads / "base")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "head": str(heads / "ann"),
        "user": "ann",
        "prompt": PROMPT,
        "text": wanted.text,
        "token_ids": list(wanted.token_ids),
        "stopped": wanted.stopped,
    }
    options = [*options, "--prompt", PROMPT]
    assert run_cli("generate", "--base", str(heads / "base"), *options[3:], "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["user"] is None
    assert found["token_ids"] == list(open_generator(heads / "base").generate(PROMPT, max_new_tokens=9).token_ids)
    warm = [*options, "--temperature", "2", "--top-p", "0.9", "--seed", "5", "--json"]
    run_cli(*warm)
    first = capsys.readouterr().out
    run_cli(*warm)
    assert capsys.readouterr().out == first
    settings = {"max_new_tokens": 9, "temperature": 2.0, "top_p": 0.9, "seed": 5}
    assert json.loads(first)["token_ids"] == list(ann.generate(PROMPT, **settings).token_ids)


def test_cli_refuses_in_one_line(heads, tmp_path):
    with pytest.raises(HeadError, match="a head or a base must be named"):
        run_cli("generate", "--prompt", PROMPT)
    with pytest.raises(HeadError, match="readable text file"):
        run_cli("generate", "--head", str(heads / "ann"), "--file", str(tmp_path / "none.txt"))
    with pytest.raises(HeadError, match="name its folder with --head"):
        run_cli("generate", "--head", str(tmp_path), "--prompt", PROMPT)
    with pytest.raises(HeadError, match="must be UTF-8"):
        run_cli("generate", "--head", str(heads / "ann"), "--prompt", "\udc80")
    with pytest.raises(HeadError, match="that is for sottovoce client generate"):
        run_cli("predict", "--head", str(heads / "ann"), "--text", PROMPT)


def test_cli_exits_with_2(heads):
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "sottovoce.cli", "client", "predict", "--head", str(heads / "ann"), "--text", "x"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "that is for sottovoce client generate" in done.stderr


def test_cli_help_teaches(capsys):
    with pytest.raises(SystemExit) as caught:
        run_cli("generate", "--help")
    assert caught.value.code == 0
    assert 'generate --head runs/latest/heads/user-1 --prompt "The film was"' in capsys.readouterr().out
