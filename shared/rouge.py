"""ROUGE of a predicted text against the right one: overlap of n-grams, and the longest common subsequence."""

import re
from collections import Counter

_BREAK = re.compile(r"[^a-z0-9]+")


def rouge_n(predicted: str, gold: str, *, n: int) -> float:
    """F-measure of the n-grams that two texts share, each counted as often as both have it.

    Args:
        predicted: Any text.
        gold: The right one.
        n: Words of an n-gram, at least 1.

    Source:
        Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries, §2; words as the package rouge-score 0.1.2
        has them without stemming: lower case, runs of a-z and 0-9.

    Example:
        >>> rouge_n("the cat sat", "The cat!", n=1), rouge_n("the cat sat", "a cat sat", n=2)
        (0.8, 0.5)
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}.")
    mine, theirs = (_grams(_words(text), n) for text in (predicted, gold))
    return _f_measure((Counter(mine) & Counter(theirs)).total(), len(mine), len(theirs))


def rouge_l(predicted: str, gold: str) -> float:
    """F-measure of the longest common subsequence of words of two texts, each read as one sentence.

    Source:
        Lin 2004, §3.1, with precision and recall weighed equally, as rouge-score 0.1.2 does.

    Example:
        >>> rouge_l("police killed the gunman", "police kill the gunman")
        0.75
    """
    mine, theirs = _words(predicted), _words(gold)
    lengths = [0] * (len(theirs) + 1)  # of the subsequences common to the words so far and each beginning of theirs
    for word in mine:
        before = 0
        for i, other in enumerate(theirs, start=1):
            before, lengths[i] = lengths[i], before + 1 if word == other else max(lengths[i], lengths[i - 1])
    return _f_measure(lengths[-1], len(mine), len(theirs))


def _words(text: str) -> list[str]:
    return _BREAK.sub(" ", text.lower()).split()


def _grams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _f_measure(shared: int, predicted: int, gold: int) -> float:
    return 2 * shared / (predicted + gold) if shared else 0.0
