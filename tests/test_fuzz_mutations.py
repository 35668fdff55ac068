"""Hostile inputs are hostile, the same for the same edits, and a parser that breaks its promise is found."""

import gzip
import json
import random
import struct
import time
import zlib
from pathlib import Path

import pytest

from shared.errors import DataError
from simulations.bench import fuzz as bench_fuzz
from simulations.fuzz import targets
from simulations.fuzz.mutations import HOSTILE_JSON, LARGEST, WAYS, Edit, draw_edits, mutate
from simulations.fuzz.parsers import Parser, Target, attempt, authentic, make_input

VALID = {
    "bytes": bytes(range(200)),
    "json": b'{"a": [1, 2, {"b": "c"}], "d": null, "e": 1.5}',
    "tree": b'{"a": [1, 2, {"b": "c"}], "d": null, "e": 1.5}',
    "lines": b'a,b\n1,2\n{"x": 1}\n',
    "framed": struct.pack("<Q", 55) + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0, 4]}}' + b"\0\0\0\0",
    "gzip": gzip.compress(b'{"a": 1}\nb\n', mtime=0),
    "pem": b"-----BEGIN X-----\nAAECAwQFBgc=\n-----END X-----\n",
}


def some(form, count=400):
    draw = random.Random(3)
    return [mutate(VALID[form], form, draw_edits(draw)) for _ in range(count)]


@pytest.mark.parametrize("form", WAYS)
def test_the_same_edits_give_the_same_input_and_others_give_others(form):
    made = some(form)
    assert made == some(form)
    assert len(set(made)) > 200
    assert sum(content != VALID[form] for content in made) > 320


def test_edits_of_json_reach_every_hostile_value_and_leave_the_rest():
    for number, raw in enumerate(HOSTILE_JSON):
        made = mutate(b'{"a": 1, "b": 2}', "json", [Edit(0, 0, number)])
        assert made == b'{"a": ' + raw.encode("utf-8", "surrogatepass") + b', "b": 2}'


def test_a_key_stands_twice_as_an_edit_says():
    way = next(i for i, each in enumerate(WAYS["json"]) if each.__name__ == "_json_twice")
    made = {mutate(b'{"a": 1, "b": 2}', "json", [Edit(way, 2, what)]) for what in range(8)}
    assert {b'{"a": 1, "b": 2, "b": 2}', b'{"a": 1, "b": 2, "a": null}'} <= made


def test_edits_inside_a_frame_keep_its_length_field_true():
    true = 0
    for what in range(200):
        made = mutate(VALID["framed"], "framed", [Edit(0, what, what)])
        size = int.from_bytes(made[:8], "little")
        true += made[8:9] == b"{" and made[8 + size :] == b"\0\0\0\0"
    assert true > 150


def test_edits_inside_gzip_are_whole_gzip_again():
    whole = 0
    for content in some("gzip", 200):
        try:
            gzip.decompress(content)
            whole += 1
        except (OSError, EOFError, zlib.error):
            continue
    assert 40 < whole < 200


def test_a_bomb_is_small_and_unpacks_to_a_long_file():
    bomb = mutate(VALID["gzip"], "gzip", [Edit(3, 0, 1)])
    assert len(bomb) < 100_000
    assert len(gzip.decompress(bomb)) == 8 * 2**20


def length_of(content: bytes) -> int:
    """A parser with the mistake that fuzzing is for: it believes a length field."""
    if not content.startswith(b"{"):
        raise DataError("it must be JSON, it is not; mend it.")
    try:
        return len(json.loads(content)["a"])
    except ValueError:
        raise DataError("it must be JSON, it is not; mend it.") from None


def target(read, *, form="json", written=None, seeds=(b'{"a": [1]}',)):
    return Target("anybody", form, lambda folder: Parser(seeds, read, written))


def outcomes(found: Target):
    parser, draw = found.open(Path()), random.Random(1)
    for seed in range(500):
        yield attempt(found, parser, make_input(parser, found.form, seed=seed, edits=draw_edits(draw)))


def test_a_parser_that_lets_another_exception_through_is_found():
    found = {each.problem.split(":")[0] for each in outcomes(target(length_of)) if each.problem}
    assert found == {"builtins.TypeError", "builtins.KeyError", "builtins.RecursionError"}


def test_a_parser_that_keeps_its_promise_is_not():
    def careful(content):
        try:
            return length_of(content)
        except (TypeError, KeyError, RecursionError):
            raise DataError("a must be a list, it is not; mend it.") from None

    said = list(outcomes(target(careful)))
    assert not [each.problem for each in said if each.problem]
    assert {each.refused for each in said} == {None, "DataError"}


def test_another_spelling_a_slow_answer_and_an_altered_value_are_found(monkeypatch):
    spelled = target(lambda content: int(content), written=lambda n: b"%d" % n, seeds=(b"12",), form="bytes")
    assert attempt(spelled, spelled.open(Path()), b"012").problem == "another spelling was taken"
    monkeypatch.setattr("simulations.fuzz.parsers.MAX_SECONDS", 0.01)
    slow = target(lambda content: sum(range(2_000_000)))
    assert "took more than" in attempt(slow, slow.open(Path()), b"").problem
    signed = authentic(Parser([b"a"], lambda content: content))
    assert attempt(target(None), signed, b"a").problem is None
    assert "was believed" in attempt(target(None), signed, b"b").problem


def test_bench_counts_every_input(capsys):
    found = bench_fuzz.measure(rounds=1, only=("secure sum: advert", "client import"), quiet=True)
    assert list(found["parsers"]) == ["secure sum: advert", "client import --jsonl"]
    for each in found["parsers"].values():
        assert each["inputs"] == each["taken"] + sum(each["refused"].values()) > 50
        assert each["problems"] == []
    assert found["inputs"] == sum(each["inputs"] for each in found["parsers"].values())
    assert "no problems" in bench_fuzz.lines(found)[-1]


@pytest.mark.parametrize(
    ("what", "said"),
    [("os.kill(os.getpid(), 9)", "the process ended, -9"), ("time.sleep(60)", "it took more than 1 s")],
)
def test_bench_outlives_what_kills_or_stalls_a_parser(monkeypatch, what, said):
    """Children are made by a fork here, so that they have the parser this test made."""
    import multiprocessing
    import os

    def read(content):
        if b"\\u0000" in content:
            eval(what, {"os": os, "time": time})
        return content

    monkeypatch.setattr(targets, "TARGETS", {"planted": target(read)})
    monkeypatch.setattr(bench_fuzz, "_STALLED_S", 1.0)
    found = bench_fuzz._fuzzed(multiprocessing.get_context("fork"), "planted", 30.0, 0)
    assert said in found["problems"][0]["what"]
    assert found["inputs"] > 1


def test_numbers_of_an_edit_are_bounded():
    draw = random.Random(5)
    drawn = [number for _ in range(300) for edit in draw_edits(draw) for number in (edit.how, edit.where, edit.what)]
    assert 0 <= min(drawn) <= max(drawn) <= LARGEST
