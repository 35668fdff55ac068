"""LaMP 1 to 7 as published: a profile holds a user's own records, a question with its gold answer is a test record."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shared.errors import DataError
from shared.metrics.lamp import HIGH, LOW, check_ids, read_answers, stars

from .records import Dataset, Record, UserData, is_text

SPLITS = ("train", "dev", "test")
PUBLIC = "public.txt"
_MEND = "Compare the file with the published one."
_MOST_DEEP = 64  # a question's profile lies three deep in the file
_DAY = re.compile(r"\d{4}(-\d{1,2}){0,2}")


@dataclass(frozen=True)
class Form:
    """How one task's questions and profile items are read.

    Args:
        summary: What is asked.
        text: Key of a profile item that holds what the model reads; empty where it reads nothing.
        answer: Key of what the user made of it.
        question: What stands before the text of a question.
        labels: Every answer there is, in the order of targets; empty where answers are texts or scores.
    """

    summary: str
    text: str
    answer: str
    question: re.Pattern[str]
    labels: tuple[str, ...] = ()


_AFTER_COLON, _WHOLE = re.compile(r"[^:]*:"), re.compile("")
FORMS: Mapping[int, Form] = {
    1: Form("LaMP-1: which of two papers an author cites, as text; the profile is abstracts and their titles",
            "abstract", "title", _WHOLE),
    2: Form("LaMP-2: the tag a user gives a film, or an author's article; the older and the newer form",
            "description", "tag", re.compile(r"[^\[]*tags: *\[([^\]]*)\] *description:")),
    3: Form("LaMP-3: the score of a user's review", "text", "score", re.compile(r".*?review:", re.DOTALL)),
    4: Form("LaMP-4: the headline an author gives an article", "text", "title", _AFTER_COLON),
    5: Form("LaMP-5: the title an author gives a paper, from its abstract", "abstract", "title", _AFTER_COLON),
    6: Form("LaMP-6: the subject of a user's e-mail", "text", "title", _AFTER_COLON),
    7: Form("LaMP-7: a tweet in its author's words", "", "text", _AFTER_COLON),
}  # fmt: skip
_NEWS = Form("", "text", "category", re.compile(r"[^\[]*categories: *\[([^\]]*)\] *article:"))  # LaMP-2 as it was first


@dataclass
class _Person:
    """What the files hold of one user."""

    past: dict[tuple[str, str, float, str], str] = field(default_factory=dict)  # day, text, target, answer -> item
    earlier: list[Record] = field(default_factory=list)  # questions of splits before the last one
    asked: list[Record] = field(default_factory=list)


def read_lamp(folder: Path, number: int) -> Dataset:
    """Read one of LaMP's tasks.

    Args:
        folder: Holds ``{split}_questions.json`` and ``{split}_outputs.json`` of one split or more of train, dev, test;
            a split without outputs is not read. Beside them ``public.txt``: texts that are public whoever the users
            are, one a line, for LaMP publishes none; the heads of tasks 2 and 3 need at least two.
        number: Of the task, 1 to 7.

    Returns:
        The users in the order of the files: by ``user_id`` where questions have one (time-based split), else every
        question is a user of its own, named by split and id (user-based split). The questions of the last split read
        are the test records, their ids the items; those of earlier splits are records of their users like the
        profile's items, after them. Profile items are in the order of their dates where all have one, else of the
        files; the last tenth of a user's training records is validation. Targets are the score, or the place in
        the list of labels that every question names; the answers of other tasks are the records' responses.

    Raises:
        DataError: A file is missing or broken, questions and answers do not belong together, a question is not of its
            task, or more than half of all the profile items cannot be used.

    Guarantee:
        Items of a user that are equal in text, answer and date are one record, and none is equal to a question asked.
        Items without a text or a usable answer are left out. Of a file of questions, one question is in memory at a
        time.

    Source:
        Salemi et al. 2024, LaMP: When Large Language Models Meet Personalization, arXiv:2304.11406.
    """
    splits = _splits(folder)
    public = _public_texts(folder, needed=number in (2, 3))
    reading = _Reading(number)
    for split in splits:
        reading.add(folder, split, asked=split == splits[-1])
    return Dataset(f"lamp-{number}", reading.users(), public)


def question_labels(folder: Path) -> tuple[str, ...]:
    """The labels that LaMP-2's first question names, in the order of ``Record.target``.

    Raises:
        DataError: As ``read_lamp``.
    """
    for split in _splits(folder):
        questions, _ = _paths(folder, split)
        for row in _stream(questions):
            asked = row.get("input") if isinstance(row, dict) else None
            for form in (FORMS[2], _NEWS):
                if isinstance(asked, str) and (found := form.question.match(asked)):
                    return _named_labels(found)
            raise DataError(f"{questions}, question 1: must name its labels as LaMP-2 does, got another. {_MEND}")
    raise DataError(f"{folder} must hold at least one question, got none. {_MEND}")


class _Reading:
    """Users as the files add to them."""

    def __init__(self, number: int) -> None:
        self._number, self._form = number, FORMS[number]
        self._people: dict[str, _Person] = {}
        self._named: bool | None = None  # whether questions have a user_id
        self._items = self._unusable = 0

    def add(self, folder: Path, split: str, *, asked: bool) -> None:
        """Read the questions of a split with their answers."""
        questions, outputs = _paths(folder, split)
        gold = read_answers(outputs)
        if gold.task != self._number:
            raise DataError(f"{outputs} must hold answers of LaMP_{self._number}, got LaMP_{gold.task}.")
        seen: set[str] = set()
        for count, row in enumerate(_stream(questions), start=1):
            try:
                name, person = self._person(row, split)
                if name in seen:
                    raise ValueError("its id must occur once, got it again")
                seen.add(name)
                if name in gold.outputs:  # those without are named below, together
                    record = self._question(row["input"], name, gold.outputs[name])
                    (person.asked if asked else person.earlier).append(record)
                    self._add_profile(person, row.get("profile"))
            except ValueError as error:
                raise DataError(f"{questions}, question {count}: {error}. {_MEND}") from None
        check_ids(gold.outputs, seen, what=f"the answers in {outputs}")
        if not seen:
            raise DataError(f"{questions} must hold at least one question, got none. {_MEND}")

    def users(self) -> tuple[UserData, ...]:
        """Everybody's records, split."""
        if self._unusable * 2 > self._items:
            raise DataError(
                f"most profile items of LaMP-{self._number} must have {self._form.text or 'a text'} and "
                f"{self._form.answer}, {self._unusable:,} of {self._items:,} have none that can be used. {_MEND}"
            )
        return tuple(_user(name, person) for name, person in self._people.items())

    def _person(self, row: object, split: str) -> tuple[str, _Person]:
        if not (isinstance(row, dict) and isinstance(row.get("input"), str) and _plain(row.get("id"))):
            raise ValueError("must be an object with id and input, got another")
        user = row.get("user_id")
        if self._named not in (None, user is not None) or not (user is None or _plain(user)):
            raise ValueError("all questions of a folder must have a user_id, or none; got both, or an empty one")
        self._named = user is not None
        name = _plain(row["id"])
        return name, self._people.setdefault(f"{split}-{name}" if user is None else _plain(user), _Person())

    def _question(self, asked: str, name: str, output: str) -> Record:
        """The record of a question; the first one of LaMP-2 says which form the files have, and the labels."""
        form = self._form
        if self._number == 2 and not form.labels and _NEWS.question.match(asked):
            form = _NEWS
        found = form.question.match(asked)
        if not found or not is_text(asked):
            raise ValueError(f"its input must be a text as LaMP-{self._number} puts it, got another")
        if found.groups():
            labels = _named_labels(found)
            form = form if form.labels else replace(form, labels=labels)
            if labels != form.labels or len(set(labels)) != len(labels) or not all(labels):
                raise ValueError("it must name distinct labels, the same as the questions before it, got others")
        self._form = form
        answer = self._answer(output)
        if answer is None:
            raise ValueError("its gold answer must be one that the task allows, got another")
        return Record(asked[found.end() :].strip(), answer[0], name, 0, answer[1])

    def _answer(self, value: str) -> tuple[float, str] | None:
        """Target and response; None where the task has no such answer."""
        value = value.strip()
        if self._number == 2:
            return (float(self._form.labels.index(value)), "") if value in self._form.labels else None
        if self._number == 3:
            score = stars(value)
            return (score, "") if score is not None and LOW <= score <= HIGH else None
        return (0.0, value) if value and is_text(value) else None

    def _add_profile(self, person: _Person, profile: object) -> None:
        if not isinstance(profile, list):
            raise ValueError("its profile must be a list, got another")
        for item in profile:
            self._items += 1
            row = item if isinstance(item, dict) else {}
            text = _plain(row.get(self._form.text)).strip()
            answer = self._answer(_plain(row.get(self._form.answer)))
            if answer is None or (self._form.text and not text) or not is_text(text):
                self._unusable += 1
                continue
            person.past.setdefault((_plain(row.get("date")), text, *answer), _plain(row.get("id")))


def _user(name: str, person: _Person) -> UserData:
    asked = {_content(record) for record in person.asked}
    past = [(_seconds(day), Record(text, target, item, 0, response))
            for (day, text, target, response), item in person.past.items()]  # fmt: skip
    if all(second is not None for second, _ in past):
        past.sort(key=lambda each: each[0] or 0)
    known = asked | {_content(record) for _, record in past}
    past += [(None, record) for record in person.earlier if _content(record) not in known]
    train = _timed([each for each in past if _content(each[1]) not in asked], start=0)
    test = _timed([(None, record) for record in person.asked], start=train[-1].timestamp if train else 0)
    num_fit = len(train) - (max(1, len(train) // 10) if len(train) >= 2 else 0)
    return UserData(name, tuple(train[:num_fit]), tuple(train[num_fit:]), tuple(test))


def _content(record: Record) -> tuple[str, float, str]:
    return record.text, record.target, record.response


def _timed(records: list[tuple[int | None, Record]], *, start: int) -> list[Record]:
    """Records with their seconds where all before have some, else one second after the other."""
    timed = []
    for second, record in records:
        start = start + 1 if second is None else max(start, second)
        timed.append(replace(record, timestamp=start))
    return timed


def _seconds(day: str) -> int | None:
    """Seconds since 1970 of a date that may be a year or a month alone; None where there is none.

    Example:
        >>> _seconds("1970-01-02"), _seconds("1971"), _seconds("soon")
        (86400, 31536000, None)
    """
    if not _DAY.fullmatch(day):
        return None
    year, month, date, *_ = *map(int, day.split("-")), 1, 1
    try:
        return int(datetime(year, month, date, tzinfo=UTC).timestamp())
    except ValueError:
        return None


def _plain(value: object) -> str:
    """A string or a number as text; empty for anything else."""
    return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else ""


def _named_labels(question: re.Match[str]) -> tuple[str, ...]:
    return tuple(label.strip() for label in question[1].split(","))


def _splits(folder: Path) -> list[str]:
    splits = [split for split in SPLITS if all(path.is_file() for path in _paths(folder, split))]
    if not splits:
        raise DataError(
            f"LaMP needs {SPLITS[1]}_questions.json and {SPLITS[1]}_outputs.json, or those of another split; "
            f"{folder} holds both of none. Give the folder of the task's files."
        )
    return splits


def _paths(folder: Path, split: str) -> tuple[Path, Path]:
    return folder / f"{split}_questions.json", folder / f"{split}_outputs.json"


def _stream(path: Path) -> Iterator[Any]:
    """The elements of a file that is one JSON array, each read as it is asked for."""
    import ijson  # not on every device

    count = 0
    try:
        with path.open("rb") as file:
            if file.read(3) != b"\xef\xbb\xbf":
                file.seek(0)
            for row in _elements(ijson.basic_parse(file, use_float=True), ijson.ObjectBuilder):
                count += 1
                yield row
    except OSError as error:
        raise DataError(f"{path} must be readable, got: {error.strerror}; check its permissions.") from None
    except (ijson.JSONError, ValueError):  # ValueError: bytes that are not UTF-8, a number of thousands of digits
        raise DataError(f"{path} must be a JSON array, got something else after question {count}. {_MEND}") from None


def _elements(events: Iterable[tuple[str, Any]], builder: Callable[[], Any]) -> Iterator[Any]:
    """The elements of an array of bounded depth; ijson's own ``items`` takes memory by the square of it.

    Raises:
        ValueError: There is no array, or it is deeper than any question.
    """
    depth, element = 0, None
    for event, value in events:
        begins = event in ("start_map", "start_array")
        depth += begins - (event in ("end_map", "end_array"))
        if depth > _MOST_DEEP or (depth == 1 and event == "start_map") or (depth == 0 and event != "end_array"):
            raise ValueError("it must be an array of questions, got another")
        if depth == 0 or (depth == 1 and event == "start_array"):
            continue
        element = element or builder()
        element.event(event, value)
        if depth == 1:
            yield element.value
            element = None


def _public_texts(folder: Path, *, needed: bool) -> tuple[str, ...]:
    path = folder / PUBLIC
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n") if path.is_file() else []
    except (OSError, UnicodeDecodeError):
        raise DataError(f"{path} must be a readable text in UTF-8, got another; write one text a line.") from None
    texts = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if needed and len(texts) < 2:
        raise DataError(
            f"{path} must hold at least two texts, one a line, got {len(texts)}: LaMP publishes none that are public "
            "whoever the users are. Put some there that are like the questions' texts and are nobody's."
        )
    return texts


def _reader(number: int) -> Callable[[Path], Dataset]:
    def read(folder: Path) -> Dataset:
        return read_lamp(folder, number)

    read.__doc__ = f"{FORMS[number].summary}."
    return read


READERS: Mapping[str, Callable[[Path], Dataset]] = {f"lamp-{number}": _reader(number) for number in FORMS}
