"""A language model in a GGUF file, turned once into the hub's layout: config, safetensors in float32, tokenizer.

The weights are those of the file, dequantised: what was lost when it was made is not brought back. In many such models,
SmolLM2 among them, the padding token is the end-of-text token: mask padding by length, never by ``token == pad``, or
the model never learns to stop.
"""

import contextlib
import gc
import hashlib
import importlib.util
import io
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from shared.errors import AssetError

RECORD = "converted.json"
_NEEDED = ("gguf", "torch", "transformers")
_VOLATILE = ("transformers_version", "_name_or_path", "_model_name_or_path")  # say nothing of the model


def ensure_converted(folder: Path, gguf: str, *, quiet: bool) -> None:
    """Make the converted files beside a GGUF file the first time; later find them to be the ones that were made.

    Args:
        folder: Holds the GGUF file, known to be the pinned one.
        gguf: Its name.
        quiet: Say nothing on stderr.

    Raises:
        AssetError: A package for the conversion is missing, or a converted file is not the one that was made.
        OSError: The disk is full or the folder cannot be written.

    Guarantee:
        The record of hashes is written last, so that what an interrupted conversion left is made again.
    """
    if not (folder / RECORD).exists():
        missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
        if missing:
            raise AssetError(
                f"{gguf} must be converted once, which needs {', '.join(missing)}; "
                'run: pip install "sottovoce[train]", then fetch it again.'
            )
        if not quiet:
            print(f"converting {gguf} to safetensors, once; this takes half a minute", file=sys.stderr, flush=True)
        _convert_into(folder, gguf)
    _verify(folder)


def convert(gguf: Path, folder: Path) -> None:
    """Write the hub's layout of a GGUF file into a new folder; its logits are those of the file, bit for bit.

    Args:
        gguf: Alone in its folder: transformers would take a chat template or a tokenizer beside it for the file's.
        folder: Made here.

    Raises:
        OSError: The disk is full or the folder cannot be written.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.mkdir()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # bars that no setting of transformers silences
            tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
            tokenizer.save_pretrained(folder)
            model: Any = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, local_files_only=True, dtype=torch.float32
            )
            # Dequantised, but still marked as quantised, which transformers refuses to save.
            del model.config.quantization_config
            model.hf_quantizer = None
            model.save_pretrained(folder)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    del model
    gc.collect()
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        entries = json.loads(path.read_text(encoding="utf-8"))
        kept = {key: value for key, value in entries.items() if key not in _VOLATILE}
        path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _convert_into(folder: Path, gguf: str) -> None:
    """Convert beside the folder, then move every file into it and the record of their hashes last."""
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        source, made = Path(scratch) / "source", Path(scratch) / "made"
        source.mkdir()
        (source / gguf).symlink_to((folder / gguf).resolve())
        convert(source / gguf, made)
        files = sorted(path for path in made.iterdir() if path.is_file())
        record = {
            "source": {"name": gguf, "sha256": _sha256(folder / gguf)},
            "made_with": {name: version(name) for name in _NEEDED},
            "files": {path.name: _sha256(path) for path in files},
        }
        (Path(scratch) / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        for path in (*files, Path(scratch) / RECORD):
            path.replace(folder / path.name)


def _verify(folder: Path) -> None:
    path = folder / RECORD
    again = f"If you did not change it, delete {path} and run again; it is made anew."
    try:
        files = json.loads(path.read_bytes())["files"]
        wanted = {str(name): str(sha256) for name, sha256 in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise AssetError(
            f"{path} must list the converted files and their hashes, got something else. {again}"
        ) from None
    if "model.safetensors" not in wanted or any(Path(name).name != name for name in wanted):
        raise AssetError(f"{path} must list model.safetensors and files beside it, got {sorted(wanted)}. {again}")
    for name, sha256 in wanted.items():
        found = _sha256(folder / name) if (folder / name).is_file() else "no such file"
        if found != sha256:
            raise AssetError(f"{folder / name} must have sha256 {sha256}, got {found}. {again}")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
