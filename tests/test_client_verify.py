"""Whatever is wrong with a private head, the bare base answers, bit for bit; a bad base answers nothing."""

import hashlib
import json
import os
import shutil
from datetime import timedelta
from pathlib import Path

import numpy as np
import onnx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from onnx import TensorProto, helper
from safetensors.numpy import load, save

import client.runtime.runtime
from client.export.private_head import personalize
from client.home.home import open_home
from client.owner.owner import roll_back
from client.owner.verify import (
    SEQUENCE,
    highest_sequence,
    keep_head,
    open_home_base,
    open_personal,
    reactivate,
    trusted_operators,
)
from client.runtime.artifact import ADAPTER, MANIFEST, MODEL, SIGNATURE, TOKENIZER, sign_folder, sign_manifest
from client.runtime.runtime import base_id, open_base
from client.runtime.session import open_session
from client.service.join import Service
from client.vault.vault import signing_key
from shared.errors import HeadError, StoreError
from shared.protocol.signing import fingerprint, load_private, signature_file
from sottovoce.cli import main

TEXTS = ["Fargo (1996). Crime, Drama, Thriller", "Heat (1995). Action", "It rained for three days."]
SLOT = "lora.block.1.output.dense"


@pytest.fixture(scope="module")
def prepared(homes, published, tiny_fleet, tmp_path_factory):
    """A home with two versions of a private head, and the signed base beside it."""
    folder = tmp_path_factory.mktemp("prepared")
    fleet = homes.sign_base(tiny_fleet, published, folder / "base")
    home = homes.make_home(folder / "home", published)
    for _ in range(2):
        personalize(home, base_folder=fleet)
    return folder


@pytest.fixture
def place(prepared, tmp_path):
    """A copy to be damaged."""
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


@pytest.fixture
def home(place, homes):
    return open_home(place / "home", clock=homes.clock)


@pytest.fixture(scope="module")
def fleet(prepared, homes):
    """The opened base, which the tests of heads share."""
    return open_home_base(open_home(prepared / "home", clock=homes.clock), prepared / "base", kind="base")


def sealed(home):
    vault = home.vault()
    return vault, f"heads/{home.heads().current():06d}"


def put(home, files):
    """Seal files as the current version, as a thief of the keys could."""
    vault, name = sealed(home)
    table = json.dumps({key: len(content) for key, content in files.items()}).encode()
    vault.seal(name, len(table).to_bytes(4, "big") + table + b"".join(files.values()))


def resign(home, change=lambda manifest: None, tensors=None, key=None):
    """Change the current head and sign it with the home's own key, so that only the checks behind are left."""
    files = home.heads().read()
    manifest = json.loads(files[MANIFEST])
    if tensors is not None:
        arrays = {name: array.copy() for name, array in load(files[ADAPTER]).items()}
        tensors(arrays)
        files[ADAPTER] = save(arrays)
        described = {"size": len(files[ADAPTER]), "sha256": hashlib.sha256(files[ADAPTER]).hexdigest()}
        manifest["files"][ADAPTER] = described
        manifest["slots"] = [{"name": n, "shape": list(a.shape), "dtype": str(a.dtype)} for n, a in arrays.items()]
    change(manifest)
    content = json.dumps(manifest).encode()
    signature = sign_manifest(content, key or signing_key(home.keystore))
    put(home, files | {MANIFEST: content, SIGNATURE: signature})


def refused(home, base, match, **settings):
    """The head is refused for the reason, and what answers is the bare base to the last bit."""
    opened = open_personal(home, base, **settings)
    assert opened.problem is not None
    assert match in opened.problem, opened.problem
    assert "\n" not in opened.problem
    wanted = base.run(TEXTS)
    for found, bare in zip(opened.model.base.run(TEXTS, adapter=opened.model.adapter), wanted, strict=True):
        np.testing.assert_array_equal(found, bare)
    np.testing.assert_array_equal(opened.model.raw(TEXTS), wanted[1])
    assert opened.model.user is None


def test_a_sound_head_answers(home, fleet):
    opened = open_personal(home, fleet)
    assert opened.problem is None
    assert np.abs(opened.model.raw(TEXTS) - fleet.run(TEXTS)[1]).max() > 0.01
    manifest = opened.model.manifest
    assert manifest["sequence"] == 2 == highest_sequence(home.keystore)
    assert manifest["expires"] == "2031-05-01T12:00:00+00:00"
    privacy = manifest["privacy"]
    assert (privacy["epsilon"], privacy["rounds_joined"]) == (0.0, 0)
    assert privacy["epsilon_reserved"] > 0
    assert open_personal(home, fleet, version=1).problem is None  # asked for by its number


@pytest.mark.parametrize("name", [ADAPTER, MANIFEST, SIGNATURE])
def test_a_flipped_bit_or_a_cut_in_any_file_is_refused(home, fleet, name):
    files = home.heads().read()
    content = files[name]
    for spot in (0, len(content) // 2, len(content) - 3):
        flipped = bytearray(content)
        flipped[spot] ^= 1
        put(home, files | {name: bytes(flipped)})
        refused(home, fleet, "must")
    for cut in (content[:-1], content + b"\0", b""):
        put(home, files | {name: cut})
        refused(home, fleet, "must")
    put(home, {key: value for key, value in files.items() if key != name})
    refused(home, fleet, "must")
    put(home, files)
    assert open_personal(home, fleet).problem is None  # it was each of these, and nothing else


def test_a_flipped_bit_in_the_sealed_file_is_refused(home, fleet):
    _, name = sealed(home)
    for file in (name, "heads/index"):
        path = home.folder / "vault" / file
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        refused(home, fleet, "must be the file that this home sealed")
        path.write_bytes(good)
    assert open_personal(home, fleet).problem is None


CHANGES = {
    "wrong base": (lambda m: m["base"].update(model_sha256="0" * 64), None, "must be used with the base"),
    "missing slot": (None, lambda t: t.pop(f"{SLOT}.A"), f"must hold {SLOT}.A"),
    "extra slot": (None, lambda t: t.update({"lora.block.7.x.A": np.ones((1, 1), "float32")}), "no slot"),
    "shape": (None, lambda t: t.update({f"{SLOT}.A": t[f"{SLOT}.A"].T.copy()}), "must have shape"),
    "NaN": (None, lambda t: t["output.weight"].__setitem__((3, 0), np.nan), "finite"),
    "infinity": (None, lambda t: t["output.bias"].__setitem__(0, np.inf), "finite"),
    "other values": (None, lambda t: t["output.weight"].__imul__(1.5), "known answer"),
    "known answer": (lambda m: m["known_answer"]["predictions"].__setitem__(0, 3.7), None, "known answer"),
    "no known answer": (lambda m: m.pop("known_answer"), None, "known answer"),
    "a tolerance for anything": (lambda m: m["known_answer"].update(tolerance=9.0), None, "known answer"),
    "NaN in the answer": (
        lambda m: m["known_answer"]["predictions"].__setitem__(0, float("nan")),
        None,
        "must be finite",
    ),
    "parent": (lambda m: m["files"].update({f"../{ADAPTER}": m["files"][ADAPTER]}), None, "its files must be"),
    "absolute": (lambda m: m["files"].update({"/etc/passwd": m["files"][ADAPTER]}), None, "its files must be"),
    "no sequence": (lambda m: m.update(sequence=0), None, "sequence above 0"),
    "sequence as text": (lambda m: m.update(sequence="9"), None, "sequence above 0"),
    "no expiry": (lambda m: m.update(expires=None), None, "when it expires"),
    "expiry without zone": (lambda m: m.update(expires="2999-01-01T00:00:00"), None, "when it expires"),
    "newer runtime": (lambda m: m["runtime"].update(onnxruntime="99.1"), None, "needs onnxruntime 99.1"),
    "schema": (lambda m: m.update(schema=1), None, "of schema 2"),
    "kind": (lambda m: m.update(kind="lm-adapter"), None, "must describe"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_signed_and_does_not_fit_is_refused(home, fleet, name):
    change, tensors, match = CHANGES[name]
    resign(home, change or (lambda manifest: None), tensors)
    refused(home, fleet, match)


def test_only_the_home_s_own_key_signs_its_heads(home, fleet, published, homes, tmp_path):
    for key in (Ed25519PrivateKey.generate(), load_private(published.private)):
        resign(home, key=key)
        refused(home, fleet, "must be signed by the trusted key")
    content = home.heads().read()[MANIFEST]
    wrong = signature_file(signing_key(home.keystore), purpose="base", content=content)
    put(home, home.heads().read() | {SIGNATURE: wrong})
    refused(home, fleet, "must sign this")
    resign(home)
    assert open_personal(home, fleet).problem is None  # so the helper signs as it should


def test_an_old_head_put_back_is_refused_and_a_deliberate_return_is_not(home, fleet, homes):
    current = open_personal(home, fleet).model.raw(TEXTS)
    vault = home.folder / "vault"
    shutil.copytree(vault, home.folder.parent / "backup")
    personalize(home, base_folder=home.folder.parent / "base")
    assert highest_sequence(home.keystore) == 3
    shutil.rmtree(vault)
    shutil.copytree(home.folder.parent / "backup", vault)
    refused(home, fleet, "an old one was put back")
    assert roll_back(home, 1) == (2, 1)
    assert open_personal(home, fleet).problem is None
    assert open_personal(home, fleet).model.manifest["sequence"] == 4 == highest_sequence(home.keystore)
    assert reactivate(home, 2) == 2
    opened = open_personal(home, fleet)
    assert (opened.problem, opened.model.manifest["sequence"]) == (None, 5)
    np.testing.assert_array_equal(opened.model.raw(TEXTS), current)


def test_an_old_file_under_a_new_name_is_refused(home, fleet):
    old = home.heads().read(1)
    put(home, old)
    refused(home, fleet, "an old one was put back")
    with pytest.raises(StoreError, match="another was made meanwhile"):
        keep_head(home, old, {"created": "x", "campaign": "y", "round": "1"})


def test_a_crash_before_the_sequence_is_noted_loses_nothing(home, fleet):
    home.keystore.write(SEQUENCE, b"1")
    assert open_personal(home, fleet).problem is None
    assert highest_sequence(home.keystore) == 2
    home.keystore.write(SEQUENCE, b"many")
    refused(home, fleet, "must be a number")


def test_a_head_expires(home, fleet, homes):
    last = homes.clock() + timedelta(days=365)
    assert open_personal(home, fleet, clock=lambda: last - timedelta(seconds=1)).problem is None
    refused(home, fleet, "must not have expired", clock=lambda: last)
    for days in (0, -1, 10**6):
        with pytest.raises(HeadError, match="--valid-days must be between"):
            personalize(home, base_folder=home.folder.parent / "base", valid_days=days)


def test_a_head_of_another_base_of_the_operator_is_refused(home, place, published):
    manifest = json.loads((place / "base" / MANIFEST).read_text())
    manifest["tokenizer"]["max_tokens"] = 20
    manifest["id"] = base_id(manifest)
    (place / "base" / MANIFEST).write_text(json.dumps(manifest))
    sign_folder(place / "base", load_private(published.private))
    refused(home, open_home_base(home, place / "base", kind="base"), "must be used with the base")


def bad_base(home, place, match):
    with pytest.raises(HeadError, match=match) as caught:
        open_home_base(home, place / "base", kind="base")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [MODEL, TOKENIZER, MANIFEST, SIGNATURE])
def test_a_base_with_any_file_damaged_answers_nothing(home, place, name):
    path = place / "base" / name
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    for wrong in (bytes(flipped), good[:-1], good + b"\0", b""):
        path.write_bytes(wrong)
        bad_base(home, place, "must")
    path.unlink()
    bad_base(home, place, "must|has no")
    path.symlink_to(shutil.copyfile(place / "base" / next(iter({MODEL, TOKENIZER} - {name})), place / "elsewhere"))
    (place / "elsewhere").write_bytes(good)
    bad_base(home, place, "symbolic link")
    path.unlink()
    os.link(place / "elsewhere", path)
    bad_base(home, place, "2 names")
    path.unlink()
    os.mkfifo(path)
    bad_base(home, place, "regular file")
    path.unlink()
    path.mkdir()
    bad_base(home, place, "regular file")
    path.rmdir()
    path.write_bytes(good)
    open_home_base(home, place / "base", kind="base")


def test_a_base_must_be_signed_by_an_operator_of_a_consent(home, place, published):
    assert trusted_operators(home) == {fingerprint(published.key)}
    stranger = Ed25519PrivateKey.generate()
    sign_folder(place / "base", stranger)
    bad_base(home, place, "must be signed by the trusted key")
    with pytest.raises(HeadError, match="must be signed by the trusted key"):
        personalize(home, base_folder=place / "base")
    known = [fingerprint(stranger.public_key())]
    assert open_home_base(home, place / "base", kind="base", operators=known).id
    content = (place / "base" / MANIFEST).read_bytes()
    key = load_private(published.private)
    (place / "base" / SIGNATURE).write_bytes(signature_file(key, purpose="adapter", content=content))
    bad_base(home, place, "must be a file as sottovoce writes it")
    (place / "base" / SIGNATURE).unlink()
    bad_base(home, place, "is not signed")


@pytest.mark.parametrize("name", [f"../base/{MODEL}", f"/etc/{MODEL}", f"deep/{MODEL}"])
def test_a_base_whose_manifest_names_other_places_is_refused(home, place, published, name):
    manifest = json.loads((place / "base" / MANIFEST).read_text())
    manifest["files"][name] = manifest["files"].pop(MODEL)
    manifest["id"] = base_id(manifest)
    (place / "base" / MANIFEST).write_text(json.dumps(manifest))
    sign_folder(place / "base", load_private(published.private))
    bad_base(home, place, "its files must be")


def test_files_swapped_after_the_check_have_no_effect(home, place):
    base = open_home_base(home, place / "base", kind="base")
    personal = open_personal(home, base).model
    before = (base.run(TEXTS)[0], personal.raw(TEXTS))
    for path in (place / "base").iterdir():
        path.write_bytes(bytes(path.stat().st_size))
    shutil.rmtree(home.folder / "vault")
    np.testing.assert_array_equal(base.run(TEXTS)[0], before[0])
    np.testing.assert_array_equal(personal.raw(TEXTS), before[1])


def test_a_file_swapped_between_manifest_and_model_is_refused(home, place, monkeypatch):
    read = client.runtime.runtime.read_manifest

    def swap(*args, **kwargs):
        found = read(*args, **kwargs)
        new = place / "new"
        new.write_bytes((place / "base" / MODEL).read_bytes()[:-1] + b"\0")
        new.replace(place / "base" / MODEL)
        return found

    monkeypatch.setattr(client.runtime.runtime, "read_manifest", swap)
    bad_base(home, place, "sha256")


def graph(node, initializers=(), domain=""):
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
    made = helper.make_graph([node], "g", value[:1], value[1:], list(initializers))
    opsets = [helper.make_opsetid("", 20), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(made, opset_imports=opsets, ir_version=10).SerializeToString()


def test_operators_of_strangers_and_weights_in_other_files_do_not_open(tmp_path, monkeypatch):
    open_session(graph(helper.make_node("Neg", ["x"], ["y"])), threads=1)
    with pytest.raises(HeadError, match="evil"):
        open_session(graph(helper.make_node("Foo", ["x"], ["y"], domain="evil"), domain="evil"), threads=1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.data").write_bytes(np.ones(4, np.float32).tobytes())
    for location in ("w.data", "../w.data", str(tmp_path / "w.data"), "./w.data"):
        weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
        weight.external_data.append(onnx.StringStringEntryProto(key="location", value=location))
        with pytest.raises(HeadError, match="xternal"):
            open_session(graph(helper.make_node("Add", ["x", "w"], ["y"]), [weight]), threads=1)


def test_the_command_says_that_the_bare_base_answers(home, place, capsys):
    arguments = ["client", "predict", "--home", str(home.folder), "--base", str(place / "base"), "--text", "Heat"]
    clock = open_base(place / "base")  # unexpired by the wall clock too
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["personal"], found["problem"]) == (True, None)
    resign(home, lambda manifest: manifest.update(sequence=1))
    assert main([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["personal"] is False
    assert "put back" in found["problem"]
    assert found["predictions"][0]["prediction"] == pytest.approx(float(clock.run(["Heat"])[1][0]))
    assert err.count("\n") == 1
    assert "the bare base answers" in err
    (place / "base" / SIGNATURE).unlink()
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)


def test_the_service_s_socket_verifies_as_the_command_does(home, place, fleet, monkeypatch):
    import client.owner.verify

    opened = []
    monkeypatch.setattr(client.owner.verify, "open_home_base", lambda *args, **settings: opened.append(args) or fleet)
    service = Service(home, base=place / "base")
    wanted = [float(value) for value in open_personal(home, fleet).model.predict(TEXTS)]
    assert service.predict(TEXTS) == {"predictions": wanted, "problem": None}
    put(home, home.heads().read() | {ADAPTER: b"damaged"})
    found = service.predict(TEXTS)
    assert found["predictions"] == [float(value) for value in np.clip(fleet.run(TEXTS)[1], fleet.low, fleet.high)]
    assert ADAPTER in found["problem"]
    assert len(opened) == 1


def test_the_service_answers_with_no_base_but_the_operator_s(home, place):
    (place / "base" / SIGNATURE).unlink()
    with pytest.raises(HeadError, match="not signed"):
        Service(home, base=place / "base").predict(TEXTS)


@pytest.mark.parametrize("content", [b"no tokenizer", b"\xff\xfe"])
def test_a_tokenizer_that_is_none_is_refused_in_one_line(place, content):
    manifest = json.loads((place / "base" / MANIFEST).read_text())
    (place / "base" / TOKENIZER).write_bytes(content)
    manifest["files"][TOKENIZER] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (place / "base" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(HeadError, match="must be a tokenizer") as refusal:
        open_base(place / "base")
    assert "\n" not in str(refusal.value)
