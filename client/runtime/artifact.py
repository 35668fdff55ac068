"""What an export writes and a device reads: folders with a manifest, and files known by hash.

A head is read from its folder or from memory, where a device keeps no personal file in plain: ``Files`` is either.

Every byte used is read once, hashed and used from memory, so a file changed on disk later changes nothing. Whatever
does not fit is refused. Hashes bind files to manifests and an adapter to its base; a manifest's signature, which a home
asks for (client/owner/verify.py), binds it to the operator or to the device. Heads of a simulation carry none.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors import SafetensorError, deserialize

from client.runtime.parity import PRECISIONS
from client.vault.plain_files import read_plain
from shared.errors import HeadError, PrivacyError
from shared.files import write_atomically
from shared.protocol.signing import check_signature_file, signature_file

SCHEMA = 2
MIN_PROBES = 16
MIN_ONNXRUNTIME = "1.27"
MODEL, TOKENIZER, ADAPTER, MANIFEST = "model.onnx", "tokenizer.json", "adapter.safetensors", "manifest.json"
MEMORY_PREFIX = "memory."  # of tensors that no slot takes: see client/runtime/memory.py
SIGNATURE = "manifest.sig"
DEFAULT_BASE = "../base"
PERSONAL_NOTE = (
    "This head was fitted to one user's data and contains personal data: keep it on the user's device and "
    "delete it with the user's data. The privacy block covers what left the device during the federation, "
    "not this file."
)
# Kind of a manifest -> what it describes, the option that names its folder, and the command that takes it.
KINDS = {
    "base": ("a fleet's base", "--base", "predict"),
    "adapter": ("a personal head", "--head", "predict"),
    "lm-base": ("a fleet's language model", "--base", "generate"),
    "lm-adapter": ("a personal language head", "--head", "generate"),
}
# Kind of a manifest -> the files it must name, and what its signature says it is.
FILES = {kind: {ADAPTER} if kind.endswith("adapter") else {MODEL, TOKENIZER} for kind in KINDS}
PURPOSES = {kind: "adapter" if kind.endswith("adapter") else "base" for kind in KINDS}

_MAX_MANIFEST_BYTES = 2**20
_MAX_SIGNATURE_BYTES = 2**12
_MAX_HEADER_BYTES = 2**20  # of a safetensors file; some hundred slots need 30 KiB
_MAX_FILE_BYTES = 2**31 - 1  # an ONNX file cannot be larger

Arrays = Mapping[str, np.ndarray]
Shape = tuple[int | str, ...]  # a string is a rank that the adapter chooses
Files = Path | Mapping[str, bytes]  # a folder, or its files by name, as a device has them that keeps none in plain


def manifest_id(manifest: Mapping[str, Any], *decisive: str) -> str:
    """Short hash over the entries of a manifest that decide a base's outputs."""
    canonical = json.dumps({key: manifest[key] for key in decisive}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def place_of(files: Files) -> Path:
    """What messages call the files."""
    return files if isinstance(files, Path) else Path("head in memory")


def base_folder(files: Files, base: Path | None) -> Path:
    """The base that is named, or the one beside the head's folder.

    Raises:
        HeadError: None is named and the head lies in no folder.
    """
    if base is not None:
        return base
    if not isinstance(files, Path):
        raise HeadError("base must be named for a head in memory, got none; give the folder of its base.")
    return files / DEFAULT_BASE


def read_manifest(files: Files, *kinds: str, signers: Collection[str] | None = None) -> dict[str, Any]:
    """The manifest of a folder, which must be of the first kind or one of the others.

    Args:
        files: The folder, or its files.
        kinds: Keys of ``KINDS``.
        signers: Fingerprints of the keys of which one must have signed its very bytes; None asks for no signature.

    Raises:
        HeadError: There is none, it is not signed as it must be, it cannot be read, or it is of another kind.
    """
    path = place_of(files) / MANIFEST
    what, option, _ = KINDS[kinds[0]]
    content = _read(files, MANIFEST, _MAX_MANIFEST_BYTES + 1)
    if content is None:
        raise HeadError(f"{place_of(files)} must hold {what}, but has no {MANIFEST}; name its folder with {option}.")
    if len(content) > _MAX_MANIFEST_BYTES:
        raise damaged(path, f"it must be at most {_MAX_MANIFEST_BYTES} bytes")
    if signers is not None:
        _check_signed(files, content, PURPOSES[kinds[0]], signers)
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError):
        raise damaged(path, "it must be JSON") from None
    schema, kind = (manifest.get("schema"), manifest.get("kind")) if isinstance(manifest, dict) else (None, None)
    if schema != SCHEMA or kind not in kinds:
        other = KINDS.get(kind) if isinstance(kind, str) and schema == SCHEMA else None
        hint = f"that is for sottovoce client {other[2]}" if other else "name the right folder"
        if type(schema) is int and schema != SCHEMA:
            newer = "a newer Sottovoce wrote it, install that version"
            hint = newer if schema > SCHEMA else "an earlier Sottovoce wrote it, export or personalize again"
        found = other[0] if other else (schema, kind)
        raise HeadError(f"{path} must describe {what} of schema {SCHEMA}, got {found}; {hint}.")
    return dict(manifest)


def sign_manifest(content: bytes, key: Ed25519PrivateKey) -> bytes:
    """The file ``manifest.sig`` for the bytes of a manifest."""
    return signature_file(key, purpose=PURPOSES[json.loads(content)["kind"]], content=content)


def sign_folder(folder: Path, key: Ed25519PrivateKey) -> None:
    """Sign the manifest of an exported folder; an earlier signature is replaced.

    Raises:
        HeadError: The folder holds no manifest.
    """
    read_manifest(folder, *KINDS)
    write_atomically(folder / SIGNATURE, sign_manifest((folder / MANIFEST).read_bytes(), key))


def _check_signed(files: Files, content: bytes, purpose: str, signers: Collection[str]) -> None:
    path = place_of(files) / SIGNATURE
    signature = _read(files, SIGNATURE, _MAX_SIGNATURE_BYTES)
    if signature is None:
        raise HeadError(f"{path} must exist, {MANIFEST} is not signed; get the folder from whoever made it.")
    try:
        check_signature_file(signature, purpose=purpose, content=content, trusted=signers)
    except PrivacyError as error:
        raise HeadError(f"{path} must sign this {MANIFEST}: {error}") from None


def read_file(files: Files, manifest: Mapping[str, Any], name: str) -> bytes:
    """The file's bytes, once they are known to be those the manifest names."""
    folder = place_of(files)
    try:
        if manifest["files"].keys() != FILES[manifest["kind"]]:
            raise damaged(folder / MANIFEST, f"its files must be {', '.join(sorted(FILES[manifest['kind']]))}")
        size, sha256 = manifest["files"][name]["size"], manifest["files"][name]["sha256"]
    except (KeyError, TypeError, AttributeError):
        raise damaged(folder / MANIFEST, f"it must name size and sha256 of {name}") from None
    if type(size) is not int or not 0 < size <= _MAX_FILE_BYTES:
        raise damaged(folder / MANIFEST, f"the size of {name} must be between 1 and {_MAX_FILE_BYTES}, got {size!r}")
    path = folder / name
    content = _read(files, name, size + 1)
    if content is None:
        raise HeadError(f"{path} must exist, as {MANIFEST} names it; export it again.")
    found = hashlib.sha256(content).hexdigest()
    if len(content) != size or found != sha256:
        raise HeadError(
            f"{path} must have the {size} bytes with sha256 {str(sha256)[:12]}… that {MANIFEST} names, "
            f"got {'more' if len(content) > size else len(content)} with {found[:12]}…; "
            "export or copy it again."
        )
    return content


def _read(files: Files, name: str, limit: int) -> bytes | None:
    """At most so many bytes of a file; None where there is none."""
    if not isinstance(files, Path):
        content = files.get(name)
        return None if content is None else bytes(content[:limit])
    return read_plain(files, name, limit=limit)


def check_binding(folder: Path, manifest: Mapping[str, Any], found: Mapping[str, str]) -> None:
    """The head was exported for the base whose ``id``, ``model_sha256`` and ``base_sha256`` are ``found``."""
    wanted = manifest.get("base")
    if not isinstance(wanted, dict) or any(wanted.get(key) != value for key, value in found.items()):
        other = wanted.get("id") if isinstance(wanted, dict) else wanted
        raise HeadError(
            f"{folder} must be used with the base it was exported for ({other}), got base {found['id']}; "
            "name the right one with --base or export the head again."
        )


def parse_adapter(path: Path, content: bytes) -> dict[str, np.ndarray]:
    """Named float32 arrays of a safetensors file, finite and of bounded header."""
    if not int.from_bytes(content[:8], "little") <= _MAX_HEADER_BYTES:
        raise damaged(path, f"its header must be at most {_MAX_HEADER_BYTES} bytes")
    try:
        tensors = deserialize(content)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise damaged(path, f"it must be a safetensors file ({error})") from None
    adapter = {}
    for name, tensor in tensors:
        if tensor["dtype"] != "F32":
            raise damaged(path, f"{name} must be float32, got {tensor['dtype']}")
        adapter[name] = np.frombuffer(tensor["data"], dtype="<f4").reshape(tensor["shape"])
        if not np.isfinite(adapter[name]).all():
            raise damaged(path, f"{name} must be finite, got NaN or infinity")
    return adapter


def check_listed(folder: Path, manifest: Mapping[str, Any], adapter: Arrays) -> None:
    """The tensors are exactly those the manifest lists."""
    try:
        listed = {slot["name"]: (tuple(slot["shape"]), slot["dtype"]) for slot in manifest["slots"]}
    except (KeyError, TypeError):
        raise damaged(folder / MANIFEST, "it must list the adapter's slots") from None
    found = {name: (array.shape, str(array.dtype)) for name, array in adapter.items()}
    if found != listed:
        wrong = sorted(str(name) for name in {*found, *listed} if found.get(name) != listed.get(name))
        raise damaged(
            folder / ADAPTER, f"its tensors must be those {MANIFEST} lists; they differ in {', '.join(wrong)}"
        )


def check_slots(folder: Path, adapter: Arrays, slots: Mapping[str, Shape], *, required: Sequence[str] = ()) -> None:
    """The tensors fit the base's slots: known names, right shapes, A and B of a layer together."""
    path = folder / ADAPTER
    unknown = sorted(set(adapter) - set(slots))
    if unknown:
        raise damaged(path, f"the base has no slot {', '.join(unknown)}")
    needed = {
        *required,
        *(name[:-1] + letter for name in adapter if name.startswith("lora.") for letter in "AB"),
    }
    missing = sorted(needed - set(adapter))
    if missing:
        raise damaged(path, f"it must hold {', '.join(missing)}")
    ranks: dict[str, int] = {}
    for name, array in adapter.items():
        shape = slots[name]
        fits = len(shape) == array.ndim and math.prod(array.shape) > 0
        for wanted, got in zip(shape, array.shape, strict=False):
            fits = fits and got == (ranks.setdefault(wanted, got) if isinstance(wanted, str) else wanted)
        if not fits:
            raise damaged(path, f"{name} must have shape {shape}, got {array.shape}")


def lora_differs(adapter: Arrays) -> bool:
    """Whether any layer's A @ B has a value that is not zero."""
    with np.errstate(over="ignore", invalid="ignore"):  # infinity and NaN differ from zero
        return any((a @ adapter[name[:-1] + "B"]).any() for name, a in adapter.items() if name.endswith(".A"))


def precision_of(manifest: Mapping[str, Any]) -> str:
    """The precision of a base, or ValueError."""
    scheme = manifest["quant"]["scheme"]
    if scheme not in PRECISIONS:
        raise ValueError(f"precision {scheme!r}")
    return str(scheme)


def parse_shape(value: Sequence[int | str]) -> Shape:
    """A slot's shape as its manifest lists it, or ValueError."""
    if not all(isinstance(size, str) or (type(size) is int and size > 0) for size in value):
        raise ValueError(f"shape {value!r}")
    return tuple(value)


def damaged(path: Path, problem: str) -> HeadError:
    """The error that says what is wrong with a file."""
    return HeadError(f"{path} cannot be used: {problem}; export or copy it again.")


def distinct(probe_texts: Sequence[str]) -> list[str]:
    """The different texts, or HeadError where they are too few."""
    probes = list(dict.fromkeys(probe_texts))
    if not len(probes) >= MIN_PROBES:
        raise HeadError(f"probe_texts must hold at least {MIN_PROBES} different texts, got {len(probes)}.")
    return probes


def describe_files(folder: Path, *names: str) -> dict[str, Any]:
    """Size and hash of files, as manifests list them."""
    return describe_contents({name: (folder / name).read_bytes() for name in names})


def describe_contents(contents: Mapping[str, bytes]) -> dict[str, Any]:
    """Size and hash of files in memory, as manifests list them."""
    return {n: {"size": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in contents.items()}


def manifest_bytes(value: Mapping[str, Any]) -> bytes:
    """A manifest as a file holds it."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a manifest."""
    path.write_bytes(manifest_bytes(value))


def write_head(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files of a head in plain, where a simulation or a test wants them."""
    for name, content in files.items():
        (folder / name).write_bytes(content)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A hidden sibling that takes the folder's place at the end, or vanishes when anything goes wrong."""
    if folder.exists() and not (folder / MANIFEST).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise HeadError(f"{folder} must be new, empty or an earlier export, got something else; choose another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{state}") for state in ("new", "old"))
    new.mkdir(mode=0o700)
    try:
        yield new
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)
