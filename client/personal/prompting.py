"""What of a user's own stands before a prompt: records a retriever finds, and what the user states. Needs no torch.

Put together where the records are, on the device; nothing of it is uploaded. In training it puts one record into many
examples, so that no noise for a record would cover it (rule P7): ``compatible.py`` allows it at unit user alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from client.runtime.retrieval import BM25, cosines, nearest
from shared.config import PromptConfig
from shared.datasets.records import Dataset, Record, UserData

Embed = Callable[[Sequence[str]], np.ndarray]  # texts -> (n, d), what the retriever dense compares


def lines_before(
    texts: Sequence[str],
    known: Sequence[Record],
    *,
    prompt: PromptConfig,
    profile: Mapping[str, str],
    embed: Embed | None = None,
) -> list[list[str]]:
    """What stands before each text: a line for each declared attribute, then one for each record that was found.

    Args:
        texts: Prompts.
        known: The user's own records, oldest first; none is allowed.
        prompt: How many are found, which, and how they are written.
        profile: What the user states of themself: attribute -> value.
        embed: Of the local encoder; needed by the retriever ``dense`` alone.

    Returns:
        The lines, the most similar record last.

    Source:
        Salemi et al. 2024, LaMP, arXiv:2304.11406, section 4: prompts augmented by BM25, a dense encoder or recency,
        looked up in items with their answers. There the entries are one sentence, here a line each.
    """
    stated, entries = _stated(prompt, profile), [entry_of(record, prompt) for record in known]
    if not prompt.records:
        return [stated] * len(texts)
    found = nearest(_similarities(texts, known, prompt.retriever, embed), count=prompt.records)
    return [[*stated, *(entries[row] for row in rows[::-1])] for rows in found.tolist()]


def prompted(
    asked: Sequence[Record],
    known: Sequence[Record],
    *,
    prompt: PromptConfig,
    profile: Mapping[str, str],
    embed: Embed | None = None,
) -> list[Record]:
    """Records, the text of each after ``lines_before`` it; of what is too long for a model the beginning is cut."""
    texts = [record.text for record in asked]
    before = lines_before(texts, known, prompt=prompt, profile=profile, embed=embed)
    return [_after(lines, record) for lines, record in zip(before, asked, strict=True)]


def with_earlier(
    records: Sequence[Record], *, prompt: PromptConfig, profile: Mapping[str, str], embed: Embed | None = None
) -> list[Record]:
    """Training records of one user, the text of each after what is found among those before it.

    Args:
        records: Oldest first.
        prompt: As for ``lines_before``, and so are the others.
        profile: As there.
        embed: As there.

    Guarantee:
        No record stands before itself or before an earlier one. How rare a word is, BM25 knows from all of them.
    """
    stated, entries = _stated(prompt, profile), [entry_of(record, prompt) for record in records]
    if not prompt.records:
        return [_after(stated, record) for record in records]
    similar = _similarities([record.text for record in records], records, prompt.retriever, embed)
    found = []
    for place, record in enumerate(records):
        [rows] = nearest(similar[[place], :place], count=prompt.records).tolist()
        found.append(_after([*stated, *(entries[row] for row in rows[::-1])], record))
    return found


def entry_of(record: Record, prompt: PromptConfig) -> str:
    """One record as it is written before a prompt, its text and response cut to so many words.

    Example:
        >>> settings = PromptConfig(entry="{text} -> {response}", words=2)
        >>> entry_of(Record("a long  question", 0.0, "1", 0, "{text}"), settings)
        'a long -> {text}'
    """
    pieces = prompt.entry.split("{response}")  # so that a place's name in what a user wrote is no place
    text, response = (" ".join(part.split()[: prompt.words]) for part in (record.text, record.response))
    return response.join(piece.replace("{text}", text) for piece in pieces)


def profiled_tests(
    dataset: Dataset, known: Sequence[Sequence[Record]], *, prompt: PromptConfig, embed: Embed | None = None
) -> Dataset:
    """Users with their test records alone, as ``prompted``.

    Args:
        dataset: Any.
        known: Of each user, the training records.
        prompt: As for ``lines_before``.
        embed: As there.
    """

    def of(user: UserData, own: Sequence[Record]) -> UserData:
        found = prompted(user.test, own, prompt=prompt, profile=user.profile, embed=embed)
        return replace(user, fit=(), validation=(), test=tuple(found))

    return replace(dataset, users=tuple(map(of, dataset.users, known)), public_texts=())


def profiled_training(dataset: Dataset, *, prompt: PromptConfig, embed: Embed | None = None) -> Dataset:
    """Users whose training and validation prompts stand after what was said earlier; as ``with_earlier``."""

    def of(user: UserData) -> UserData:
        found = with_earlier(user.train, prompt=prompt, profile=user.profile, embed=embed)
        return replace(user, fit=tuple(found[: len(user.fit)]), validation=tuple(found[len(user.fit) :]))

    return replace(dataset, users=tuple(map(of, dataset.users)))


def _stated(prompt: PromptConfig, profile: Mapping[str, str]) -> list[str]:
    return [f"{name}: {profile[name]}" for name in prompt.declared if name in profile]


def _after(lines: Sequence[str], record: Record) -> Record:
    return replace(record, text="\n".join([*lines, record.text]))


def _similarities(texts: Sequence[str], known: Sequence[Record], retriever: str, embed: Embed | None) -> np.ndarray:
    """(m, n) of texts with records, larger is more similar; a record is compared whole, for a prompt may be empty."""
    whole = [f"{record.text} {record.response}".strip() for record in known]
    if retriever == "bm25":
        index = BM25(whole)
        return np.array([index.scores(text) for text in texts]).reshape(len(texts), len(whole))
    if retriever == "dense" and whole and texts:
        if embed is None:
            raise ValueError("the retriever dense needs an encoder, got none; choose bm25 or recency.")
        vectors = embed([*whole, *texts])
        return cosines(vectors[: len(whole)], vectors[len(whole) :], mean=np.zeros(vectors.shape[1]))
    return np.ones((len(texts), len(whole)))  # recency: of equals the newest are the nearest
