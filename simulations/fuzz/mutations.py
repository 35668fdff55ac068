"""Valid inputs made hostile: edits that know the form of what they change, each a few whole numbers.

An edit is the same whoever draws it: a test's strategy, which makes a failure small again, or ``bench fuzz``, which
draws thousands a second. Each form has ways of its own beside those of plain bytes, which fit every form.
"""

import base64
import gzip
import json
import random
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Form = Literal["bytes", "json", "tree", "lines", "framed", "gzip", "pem"]
LARGEST = 2**16 - 1  # of an edit's numbers
_NESTED = 100_000
_BOMB_BYTES = 8 * 2**20

# Values that a parser of JSON may meet and its reader did not expect, as they are spelled.
HOSTILE_JSON: tuple[str, ...] = (
    "null", "true", "0", "-1", "1.5", '""', "[]", "{}", '"1"', "[[]]", '[null]', '{"": {}}',
    "NaN", "Infinity", "-Infinity", "1e400", "-0.0", "1e-400",
    "4294967296", "9007199254740993", "9223372036854775808", "18446744073709551616", "9" * 400, "-" + "9" * 5000,
    '"' + "9" * 5000 + '"', '"٣"', '"1_0"', '"\\ud800"', '"\\u0000"', '"\\u001b[2J\\r\\n"', '"\\u202e\\u2028"',
    '"../../../../etc/passwd"', '"/dev/zero"', '"' + "x" * 70_000 + '"', '"9999-12-31T23:59:59+00:00"',
    '"0001-01-01T00:00:00+23:59"', "[" * 300 + "]" * 300, "[" * 980 + "]" * 980, '{"a":' * 400 + "1" + "}" * 400,
    "[" * _NESTED + "]" * _NESTED, '[["a","b"],["a","c"]]', '"nan"', '"1e999"', "[1,2,3,4,5,6,7,8]",
)  # fmt: skip
# Pieces that mean something to one parser or another.
TOKENS: tuple[bytes, ...] = (
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\x80", b"\r", b"\n", b"\r\n", b"\t", b'"', b"'", b",",
    b"::", b"|", b"=", b"[", b"{", b"}", b"#", b"\\", b"\x1b[31m", "\u2028".encode(), "\u0663".encode(), b"NaN", b"-1",
    b"1e999", b"inf", b"9" * 19, b"9" * 5000, b"0x10", b"1_000", b"null", b"[" * 3000, b'{"a":' * 3000, b"x" * 20_000,
    b"../", b"\x1f\x8b\x08\0\0\0\0\0\0\xff", b"PK\x03\x04", b"-----BEGIN CERTIFICATE-----", b'"\\ud800"', b"\x00" * 64,
    b"\xff" * 8, b"\x7f\xff\xff\xff",
)  # fmt: skip
_NUMBERS = (0, 1, 2, 0x7F, 0xFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)

Way = Callable[[bytes, int, int], bytes]  # content, where and with what -> content


@dataclass(frozen=True)
class Edit:
    """One change, the same for the same content.

    Attributes:
        how: Which of a form's ways.
        where: Which of the places the content has.
        what: Which value is put there. All are taken modulo what there is.
    """

    how: int
    where: int
    what: int


def mutate(content: bytes, form: Form, edits: Sequence[Edit]) -> bytes:
    """Apply edits one after the other; what an edit broke is plain bytes for the next.

    Example:
        >>> mutate(b'{"a": 1}', "json", [Edit(0, 0, 0)])
        b'{"a": null}'
    """
    for edit in edits:
        ways = WAYS[form] if form in ("bytes", "tree") else (*WAYS[form], *WAYS["bytes"])
        try:
            content = ways[edit.how % len(ways)](content, edit.where, edit.what)
        except _BrokenError:
            content = WAYS["bytes"][edit.how % len(WAYS["bytes"])](content, edit.where, edit.what)
    return content


def draw_edits(draw: random.Random) -> list[Edit]:
    """One to four edits, mostly one: a parser that stops at the first mistake would hide the second."""
    count = draw.choices((1, 2, 3, 4), (10, 4, 2, 1))[0]
    return [Edit(*(draw.randint(0, LARGEST) for _ in range(3))) for _ in range(count)]


class _BrokenError(Exception):
    """The content has not the form any more."""


def _flip(content: bytes, where: int, what: int) -> bytes:
    at = _at(content, where)
    return content[:at] + bytes(byte ^ 1 << what % 8 for byte in content[at : at + 1]) + content[at + 1 :]


def _set(content: bytes, where: int, what: int) -> bytes:
    at = _at(content, where)
    return content[:at] + bytes([what % 256]) + content[at + 1 :]


def _cut(content: bytes, where: int, what: int) -> bytes:
    del what
    return content[: _at(content, where)]


def _drop(content: bytes, where: int, what: int) -> bytes:
    at = _at(content, where)
    return content[:at] + content[at + 1 + what % 64 :]


def _repeat(content: bytes, where: int, what: int) -> bytes:
    at = _at(content, where)
    return content[:at] + content[at : at + 1 + what % 256] * 2 + content[at + 1 + what % 256 :]


def _insert(content: bytes, where: int, what: int) -> bytes:
    at = _at(content, where)
    return content[:at] + TOKENS[what % len(TOKENS)] + content[at:]


def _append(content: bytes, where: int, what: int) -> bytes:
    return content + TOKENS[what % len(TOKENS)] * (1 + where % 3)


def _number(content: bytes, where: int, what: int) -> bytes:
    """A length field, perhaps: 1, 2, 4 or 8 bytes of either order."""
    size = (1, 2, 4, 8)[what % 4]
    number = _NUMBERS[what // 8 % len(_NUMBERS)] % (1 << 8 * size)
    at = _at(content, where)
    return content[:at] + number.to_bytes(size, "big" if what & 4 else "little") + content[at + size :]


def _swap(content: bytes, where: int, what: int) -> bytes:
    at, size = _at(content, where), 1 + what % 32
    return content[:at] + content[at + size : at + 2 * size] + content[at : at + size] + content[at + 2 * size :]


def _at(content: bytes, where: int) -> int:
    """A place: near the beginning, where headers are, for small numbers, and anywhere for others."""
    if where % 2:
        return where // 2 % (min(len(content), 256) or 1)
    return where // 2 * 2_654_435_761 % (len(content) or 1)


def _json_value(content: bytes, where: int, what: int) -> bytes:
    return _json(content, where, lambda tree, place: _put(tree, place, _Raw(HOSTILE_JSON[what % len(HOSTILE_JSON)])))


def _json_drop(content: bytes, where: int, what: int) -> bytes:
    del what

    def drop(tree: Any, place: tuple[Any, ...]) -> Any:
        if not place:
            return None
        parent = _get(tree, place[:-1])
        del parent[place[-1]]
        return tree

    return _json(content, where, drop)


def _json_add(content: bytes, where: int, what: int) -> bytes:
    """One key more, or one element."""

    def add(tree: Any, place: tuple[Any, ...]) -> Any:
        found = _get(tree, place)
        if isinstance(found, dict):
            found[("x", "", "__proto__", "schema", "\x1b[2J")[what % 5]] = _Raw(HOSTILE_JSON[what % len(HOSTILE_JSON)])
        elif isinstance(found, list):
            found.extend([_Raw(HOSTILE_JSON[what % len(HOSTILE_JSON)]), *found[: what % 3]])
        return tree

    return _json(content, where, add)


def _json_twice(content: bytes, where: int, what: int) -> bytes:
    """A key twice: two readers may take two values."""

    def twice(tree: Any, place: tuple[Any, ...]) -> Any:
        found = _get(tree, place)
        if isinstance(found, dict) and found:
            name = list(found)[what % len(found)]
            found[_Key(name)] = found[name] if what & 1 else _Raw(HOSTILE_JSON[what % len(HOSTILE_JSON)])
        return tree

    return _json(content, where, twice)


def _json_move(content: bytes, where: int, what: int) -> bytes:
    """One value in another's place."""

    def move(tree: Any, place: tuple[Any, ...]) -> Any:
        places = list(_places(tree))
        return _put(tree, place, json.loads(json.dumps(_get(tree, places[what % len(places)]))))

    return _json(content, where, move)


def _json_near(content: bytes, where: int, what: int) -> bytes:
    """A number or text that is nearly the valid one."""

    def near(tree: Any, place: tuple[Any, ...]) -> Any:
        found = _get(tree, place)
        if isinstance(found, bool):
            return _put(tree, place, not found)
        if isinstance(found, int | float):
            nearly = min(max(found, -1e300), 1e300)
            changes = (found + 1, found - 1, -found, found * 2, found * 10**6, float(nearly), nearly / 3, f"{nearly}")
            return _put(tree, place, changes[what % len(changes)])
        if isinstance(found, str):
            changed = (
                found[1:],
                found + found,
                found.upper(),
                " " + found,
                found[::-1],
                found + "\n",
                "\u0000" + found,
            )
            return _put(tree, place, changed[what % len(changed)])
        return tree

    return _json(content, where, near)


def _json(content: bytes, where: int, change: Callable[[Any, tuple[Any, ...]], Any]) -> bytes:
    tree = _loads(content)
    places = list(_places(tree))
    return _render(change(tree, places[where % len(places)]))


def _loads(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise _BrokenError from None


def _places(tree: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to everything in a tree, the inner ones of a small tree first."""
    if len(place) > 50:
        return
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (*place, key)
        yield from _places(value, (*place, key))
    if not place:
        yield ()


def _get(tree: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        tree = tree[key]
    return tree


def _put(tree: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    _get(tree, place[:-1])[place[-1]] = value
    return tree


@dataclass(frozen=True)
class _Raw:
    """A value as it is spelled, which no writer of JSON would write."""

    text: str


class _Key(str):
    """A key that differs from an equal text."""

    __slots__ = ()
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


_MARK = "\ue000raw{}\ue001"
_MARKED = re.compile('"\ue000raw([0-9]+)\ue001"')


def _render(tree: Any) -> bytes:
    raw: list[str] = []

    def plain(value: Any) -> Any:
        if isinstance(value, _Raw):
            raw.append(value.text)
            return _MARK.format(len(raw) - 1)
        if isinstance(value, dict):
            return {_key(key, raw): plain(each) for key, each in value.items()}
        return [plain(each) for each in value] if isinstance(value, list) else value

    try:
        text = json.dumps(plain(tree), ensure_ascii=False)
    except (ValueError, RecursionError):
        raise _BrokenError from None
    text = _MARKED.sub(lambda found: raw[int(found[1])], text)
    return text.encode("utf-8", "surrogatepass")


def _key(key: Any, raw: list[str]) -> Any:
    if not isinstance(key, _Key):
        return key
    raw.append(json.dumps(str.__str__(key)))
    return _MARK.format(len(raw) - 1)


def _line_json(content: bytes, where: int, what: int) -> bytes:
    """One line of JSON lines, changed as JSON."""
    lines = content.split(b"\n")
    at = where % len(lines)
    lines[at] = WAYS["json"][what % len(WAYS["json"])](lines[at], where // len(lines), what // len(WAYS["json"]))
    return b"\n".join(lines)


def _line_move(content: bytes, where: int, what: int) -> bytes:
    """A line gone, twice, or in another place."""
    lines = content.split(b"\n")
    line = lines.pop(where % len(lines))
    for _ in range(what % 3):
        lines.insert(what // 3 % (len(lines) + 1), line)
    return b"\n".join(lines)


_FIELD = re.compile(rb"[^\t\n,;|:=\[\]{}\"' ]+")


def _line_field(content: bytes, where: int, what: int) -> bytes:
    """One word or number of a table, replaced by something hostile."""
    found = list(_FIELD.finditer(content[:200_000]))
    if not found:
        raise _BrokenError
    field = found[where % len(found)]
    tokens = (*TOKENS, *(value.encode("utf-8", "surrogatepass") for value in HOSTILE_JSON[:34]), b"")
    return content[: field.start()] + tokens[what % len(tokens)] + content[field.end() :]


def _framed(content: bytes, where: int, what: int) -> bytes:
    """The header of a safetensors file, changed as JSON; its length fits again."""
    size = int.from_bytes(content[:8], "little")
    if not 0 < size <= len(content) - 8:
        raise _BrokenError
    header = WAYS["json"][what % len(WAYS["json"])](content[8 : 8 + size], where, what // len(WAYS["json"]))
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def _framed_values(content: bytes, where: int, what: int) -> bytes:
    """A float32 behind the header: NaN, infinity, the largest, the smallest."""
    start = 8 + int.from_bytes(content[:8], "little")
    if not start < len(content):
        raise _BrokenError
    values = (b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\xff\xff\x7f\x7f", b"\1\0\0\0", b"\0\0\0\x80")
    at = start + where % ((len(content) - start) // 4 or 1) * 4
    return content[:at] + values[what % len(values)] + content[at + 4 :]


def _gzip_inside(content: bytes, where: int, what: int) -> bytes:
    try:
        inside = gzip.decompress(content)
    except (OSError, EOFError, ValueError, zlib.error):
        raise _BrokenError from None
    if len(inside) > 2**20:  # a bomb already
        raise _BrokenError
    ways = (*WAYS["lines"], *WAYS["bytes"])
    return gzip.compress(ways[what % len(ways)](inside, where, what // len(ways)), 1, mtime=0)


def _gzip_bomb(content: bytes, where: int, what: int) -> bytes:
    """A small file that unpacks to a long one, behind what was there."""
    filler = (b"\0", b" ", b"x", b"\n")[what % 4]
    bomb = gzip.compress(filler * (_BOMB_BYTES >> 4 * (where % 3)), 1, mtime=0)
    return content + bomb if where % 2 else bomb


def _pem_inside(content: bytes, where: int, what: int) -> bytes:
    """The bytes within a file of base64, changed; its lines fit again."""
    lines = content.split(b"\n")
    inner = [i for i, line in enumerate(lines) if line and not line.startswith(b"-----")]
    if not inner:
        raise _BrokenError
    try:
        inside = base64.b64decode(b"".join(lines[i] for i in inner), validate=True)
    except ValueError:
        raise _BrokenError from None
    ways = WAYS["bytes"]
    packed = base64.b64encode(ways[what % len(ways)](inside, where, what // len(ways)))
    wrapped = [packed[i : i + 64] for i in range(0, len(packed), 64)]
    return b"\n".join([*lines[: inner[0]], *wrapped, *lines[inner[-1] + 1 :]])


_JSON: tuple[Way, ...] = (_json_value, _json_value, _json_near, _json_drop, _json_add, _json_twice, _json_move)
WAYS: Mapping[Form, tuple[Way, ...]] = {
    "bytes": (_flip, _set, _cut, _drop, _repeat, _insert, _append, _number, _number, _swap),
    "json": _JSON,
    "tree": _JSON,  # JSON that stays JSON: it stands for something else
    "lines": (_line_field, _line_field, _line_field, _line_json, _line_json, _line_move),
    "framed": (_framed, _framed, _framed, _framed_values, _framed_values),
    "gzip": (_gzip_inside, _gzip_inside, _gzip_inside, _gzip_bomb),
    "pem": (_pem_inside, _pem_inside),
}
