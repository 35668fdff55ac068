"""Parsers of what lies on a device: heads and bases from elsewhere, and an owner's home when somebody altered it."""

import hashlib
import json
from collections.abc import Callable
from datetime import UTC, date, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from safetensors.numpy import save

from client.home.home import create_home
from client.home.sealed_heads import _pack, _unpack
from client.home.sources import make_source, read_source, set_source
from client.home.store import _line, _parse
from client.ledger.book import read_anchor
from client.ledger.ledger import open_ledger
from client.owner import device_key as own_key
from client.owner.forget import _read_begun
from client.runtime.artifact import ADAPTER, MANIFEST, MODEL, SIGNATURE, TOKENIZER, parse_adapter
from client.runtime.chat import read_chat
from client.runtime.runtime import FleetBase, base_id, bind_head, check_known_answer, open_base
from client.serve.guard import read_token
from client.service.schedule import change_schedule, read_schedule
from client.vault.keystore import open_keystore
from shared.datasets import Record
from shared.models.gguf import RECORD, _verify
from shared.protocol.signing import fingerprint, signature_file
from simulations.fuzz.campaigns import device_key, operator
from simulations.fuzz.parsers import Parser, Target, authentic, file_parser

_CLOCK = datetime(2030, 5, 1, 12, tzinfo=UTC)
_KNOWN_TOKENS = [[1, 2, 3], [4, 5]]
_SLOTS = {"output.bias": (1,), "output.weight": (1, 6)}


def _describe(content: bytes) -> dict[str, Any]:
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@cache
def _model() -> bytes:
    """The smallest graph that is a fleet's base: features from token ids, and an output layer in two slots."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    def weight(name: str) -> Any:
        return numpy_helper.from_array(np.zeros(_SLOTS[name], np.float32), name)

    ids, mask = (
        helper.make_tensor_value_info(n, TensorProto.INT64, ["b", "t"]) for n in ("input_ids", "attention_mask")
    )
    slots = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in _SLOTS.items()]
    outputs = [
        helper.make_tensor_value_info("pooled", TensorProto.FLOAT, ["b", 6]),
        helper.make_tensor_value_info("prediction", TensorProto.FLOAT, ["b", 1]),
    ]
    ones = numpy_helper.from_array(np.full((1, 6), 0.01, np.float32))
    axes = numpy_helper.from_array(np.array([1], np.int64))
    nodes = [
        helper.make_node("Constant", [], ["ones"], value=ones),
        helper.make_node("Constant", [], ["axes"], value=axes),
        helper.make_node("Cast", ["input_ids"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats", "axes"], ["mean"], keepdims=1),
        helper.make_node("Mul", ["mean", "ones"], ["pooled"]),
        helper.make_node("Transpose", ["output.weight"], ["turned"]),
        helper.make_node("MatMul", ["pooled", "turned"], ["product"]),
        helper.make_node("Add", ["product", "output.bias"], ["prediction"]),
    ]
    graph = helper.make_graph(nodes, "base", [ids, mask, *slots], outputs, [weight(name) for name in _SLOTS])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    packed: bytes = model.SerializeToString()
    return packed


@cache
def _tokenizer() -> bytes:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", *"abcdefghij"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return str(tokenizer.to_str()).encode()


def _base_manifest(model: bytes, tokenizer: bytes) -> dict[str, Any]:
    said: dict[str, Any] = {
        "schema": 2,
        "kind": "base",
        "files": {MODEL: _describe(model), TOKENIZER: _describe(tokenizer)},
        "base_sha256": "ab" * 32,
        "tokenizer": {"max_tokens": 16},
        "slots": [{"name": name, "shape": list(shape), "dtype": "float32"} for name, shape in _SLOTS.items()],
        "task": {"name": "rating", "low": 1.0, "high": 5.0},
        "quant": {"scheme": "fp32"},
        "runtime": {"onnxruntime": "1.20"},
    }
    return said | {"id": base_id(said)}


def _write_base(folder: Path, manifest: bytes, model: bytes, tokenizer: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in ((MANIFEST, manifest), (MODEL, model), (TOKENIZER, tokenizer)):
        (folder / name).write_bytes(content)
    return folder


def _base(part: str) -> Callable[[Path], Parser]:
    """A fleet's base, one file of it made up by an operator, who then writes the manifest anew."""

    def opened(folder: Path) -> Parser:
        files = {MODEL: _model(), TOKENIZER: _tokenizer()}
        valid = files | {MANIFEST: json.dumps(_base_manifest(*files.values())).encode()}

        def read(content: bytes) -> Any:
            found = files | ({part: content} if part in files else {})
            manifest = content if part == MANIFEST else json.dumps(_base_manifest(*found.values())).encode()
            return open_base(_write_base(folder / "base", _hashed(manifest), found[MODEL], found[TOKENIZER]))

        return Parser([valid[part]], read)

    return opened


def _hashed(manifest: bytes) -> bytes:
    """A manifest whose id is that of what it says, as whoever made it up would write it."""
    try:
        said = json.loads(manifest)
        return json.dumps(said | {"id": base_id(said)}).encode()
    except (ValueError, TypeError, KeyError, RecursionError):
        return manifest


def _adapter_values() -> dict[str, np.ndarray]:
    return {"output.bias": np.full(1, 3.0, np.float32), "output.weight": np.full((1, 6), 0.5, np.float32)}


def _head_files(base: FleetBase, *, memory: bool) -> dict[str, bytes]:
    """A personal head of that base, signed by its device."""
    values, described = _adapter_values(), {}
    if memory:
        from client.runtime.memory import make_memory
        from shared.config import PersonalConfig

        residuals, features = np.array([0.5, -0.5]), np.ones((2, 6))
        settings = PersonalConfig(method="retrieval", retriever="dense")
        kept = make_memory(features, ("a", "b"), residuals, centre=np.zeros(6), personal=settings)
        if kept is not None:
            values, described = values | kept.tensors(), {"memory": kept.described()}
    adapter = save(values)
    bare = base.run_tokens(_KNOWN_TOKENS)[1]
    plain = {name: array for name, array in values.items() if name in _SLOTS}
    known = {
        "token_ids": _KNOWN_TOKENS,
        "predictions": base.run_tokens(_KNOWN_TOKENS, adapter=plain)[1].tolist(),
        "without_adapter": bare.tolist(),
        "tolerance": 1e-4,
    }
    manifest = {
        "schema": 2,
        "kind": "adapter",
        "user": "7",
        "files": {ADAPTER: _describe(adapter)},
        "base": {"id": base.id, "model_sha256": base.model_sha256, "base_sha256": base.base_sha256},
        "runtime": {"onnxruntime": "1.20"},
        "slots": [{"name": n, "shape": list(a.shape), "dtype": str(a.dtype)} for n, a in values.items()],
        "known_answer": known,
        **described,
    }
    return {MANIFEST: json.dumps(manifest).encode(), ADAPTER: adapter}


def _head(part: str, *, memory: bool = False) -> Callable[[Path], Parser]:
    """A personal head in memory, one file of it altered; hashes and signature fit again."""

    def opened(folder: Path) -> Parser:
        files = (_model(), _tokenizer())
        base = open_base(_write_base(folder / "base", json.dumps(_base_manifest(*files)).encode(), *files))
        valid = _head_files(base, memory=memory)
        trusted = {fingerprint(operator().public_key())}

        def read(content: bytes) -> Any:
            found = valid | {part: content}
            if part == ADAPTER:
                said = json.loads(found[MANIFEST])
                found[MANIFEST] = json.dumps(said | {"files": {ADAPTER: _describe(content)}}).encode()
            if part != SIGNATURE:
                found[SIGNATURE] = _signed(found[MANIFEST])
            head = bind_head(found, base, signers=trusted)
            check_known_answer(folder, head)
            return head.predict(["a b", "c"])

        if part == SIGNATURE:
            return authentic(Parser([_signed(valid[MANIFEST])], read), value=np.ndarray.tolist)
        return Parser([valid[part]], read)

    return opened


def _signed(manifest: bytes) -> bytes:
    return signature_file(operator(), purpose="adapter", content=manifest)


def _adapter(folder: Path) -> Parser:
    return Parser([save(_adapter_values())], lambda content: parse_adapter(folder / ADAPTER, content))


def _chat_template(name: str) -> Callable[[Path], Parser]:
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    config = {"chat_template": template, "bos_token": "<s>", "eos_token": {"content": "</s>"}}
    listed = config | {"chat_template": [{"name": "default", "template": template}]}
    valid = [json.dumps(each).encode() for each in (config, listed)] if name.endswith("json") else [template.encode()]
    return lambda folder: file_parser(folder, name, valid, lambda path: read_chat(path.parent))


def _converted(folder: Path) -> Parser:
    model = b"weights"
    said = {"source": {"name": "a.gguf", "sha256": "0" * 64}, "made_with": {"gguf": "1"}}
    said["files"] = {"model.safetensors": hashlib.sha256(model).hexdigest()}
    valid, beside = json.dumps(said).encode(), {"model.safetensors": model}
    return file_parser(folder, RECORD, [valid], lambda path: _verify(path.parent), others=beside)


# An owner's home


def _home(folder: Path) -> Any:
    return create_home(folder / "home", keystore="file", cap_epsilon=10.0, cap_delta=1e-3, clock=lambda: _CLOCK)


def _ledger(folder: Path) -> Parser:
    """A ledger's file with a consent, a round answered and one under way; its key and anchor are as they were."""
    home = _home(folder)
    path, anchor = home.folder / "ledger.db", home.folder / "keys" / "anchor"
    with home.ledger() as ledger:
        ledger.consent(
            policy="p",
            campaign="c",
            epsilon=1.0,
            delta=1e-5,
            max_participations=3,
            until=date(2031, 1, 1),
            operator="o",
        )
        ledger.spend(policy="p", round_number=1, request_sha256="r", answered=0)
        ledger.release(policy="p", round_number=1, payload=b"reply" * 20)
        ledger.spend(policy="p", round_number=2, request_sha256="s", answered=1)
    beside = [path.with_name(f"ledger.db{end}") for end in ("-wal", "-shm", "-journal")]
    remembered = anchor.read_bytes()

    def read(content: bytes) -> Any:
        for leftover in beside:
            leftover.unlink(missing_ok=True)
        path.write_bytes(content)
        anchor.write_bytes(remembered)
        with open_ledger(path, keystore=home.keystore, clock=lambda: _CLOCK, round_running=True) as opened:
            return opened.totals(), opened.history()

    return authentic(Parser([path.read_bytes()], read))


def _anchor(folder: Path) -> Parser:
    home = _home(folder)
    return Parser([(home.folder / "keys" / "anchor").read_bytes()], read_anchor)


def _vault(folder: Path) -> Parser:
    home = _home(folder)
    vault = home.vault()
    vault.seal("records/000001", b"what an owner wrote")
    path = home.folder / "vault" / "records" / "000001"

    def read(content: bytes) -> Any:
        path.write_bytes(content)
        return vault.open("records/000001")

    return authentic(Parser([path.read_bytes()], read))


def _wrapped_key(folder: Path) -> Parser:
    home = _home(folder)
    place = home.folder / "vault"
    return file_parser(place, "key", [(place / "key").read_bytes()], lambda _: home.vault())


def _source(folder: Path) -> Parser:
    home = _home(folder)
    (folder / "own").mkdir()
    set_source(home, make_source(folder / "own", format="csv", columns={"text": "review", "target": "stars"}))
    path = home.folder / "source.json"
    return file_parser(home.folder, path.name, [path.read_bytes()], lambda _: read_source(home))


def _schedule(folder: Path) -> Parser:
    """Settings of a service, which a running one reads again and again."""
    change_schedule(folder, put={"window": "22:00-06:00"})
    [path] = folder.iterdir()
    return file_parser(folder, path.name, [path.read_bytes()], lambda _: read_schedule(folder))


def _keystore(folder: Path) -> Parser:
    return file_parser(folder, "keystore.json", [b'{"kind": "file"}'], lambda path: open_keystore(path.parent))


def _device_file(folder: Path) -> Parser:
    valid = device_key().private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    return file_parser(folder, "device", [valid], own_key._read)


def _token(folder: Path) -> Parser:
    def read(path: Path) -> Any:
        path.chmod(0o600)
        return read_token(path)

    return file_parser(folder, "token", [b"t" * 43], read)


def _records(folder: Path) -> Parser:
    del folder
    rows = [Record(f"Words {i}.", 3.0, f"p{i}", i, "", "worse" if i % 2 else "") for i in range(3)]
    valid = b"".join(map(_line, rows))
    return Parser([valid], lambda content: _parse("records/000001", content), lambda found: b"".join(map(_line, found)))


def _sealed_head(folder: Path) -> Parser:
    del folder
    return Parser([_pack({"a": b"12", "b": b"345"})], lambda content: _unpack("head/000001", content))


DEVICES: dict[str, Target] = {
    "adapter.safetensors": Target("operator", "framed", _adapter),
    "head: manifest.json, signed": Target("operator", "json", _head(MANIFEST)),
    "head: adapter.safetensors, signed": Target("operator", "framed", _head(ADAPTER)),
    "head with a memory: manifest.json, signed": Target("operator", "json", _head(MANIFEST, memory=True)),
    "head with a memory: adapter.safetensors, signed": Target("operator", "framed", _head(ADAPTER, memory=True)),
    "head: manifest.sig": Target("operator", "json", _head(SIGNATURE)),
    "base: manifest.json": Target("operator", "json", _base(MANIFEST)),
    "base: model.onnx": Target("operator", "bytes", _base(MODEL)),
    "base: tokenizer.json": Target("operator", "json", _base(TOKENIZER)),
    "model: tokenizer_config.json": Target("anybody", "json", _chat_template("tokenizer_config.json")),
    "model: chat_template.jinja": Target("anybody", "bytes", _chat_template("chat_template.jinja")),
    "model: converted.json": Target("disk", "json", _converted),
    "home: ledger.db": Target("disk", "bytes", _ledger),
    "home: keys/anchor": Target("disk", "json", _anchor),
    "home: a sealed file": Target("disk", "bytes", _vault),
    "home: vault/key": Target("disk", "bytes", _wrapped_key),
    "home: source.json": Target("disk", "json", _source),
    "home: schedule.json": Target("disk", "json", _schedule),
    "home: keystore.json": Target("disk", "json", _keystore),
    "home: device": Target("disk", "pem", _device_file),
    "home: token": Target("disk", "bytes", _token),
    "home: note of a deletion": Target(
        "disk", "json", lambda _: Parser([b'{"names": ["a"], "records": 3}'], _read_begun)
    ),
    "home: records": Target("disk", "lines", _records),
    "home: a version of the head": Target("disk", "bytes", _sealed_head),
}
