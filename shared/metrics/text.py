"""Score answers in words against what the user wrote, and one answer against another."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from shared.metrics.ratings import Described, Interval, draw_users, interval
from shared.registry import lookup

Tokens = Callable[[Sequence[str]], list[np.ndarray]]  # texts -> for each, (T, d) states of its tokens by an encoder


class Judge(Protocol):
    """Says which of two answers is better."""

    def __call__(self, *, prompt: str, own: str, first: str, second: str, embed: Tokens) -> float:
        """1 where the first is better than the second, 0 where it is worse, 0.5 where neither is.

        Args:
            prompt: What was asked, in the template's place.
            own: What the user answered.
            first: An answer.
            second: Another.
            embed: Of the local encoder.
        """


TEXT_METRICS: Mapping[str, Described] = {
    "rouge_1": Described("F-measure of the words that answer and user's own share (rouge-score, no stemming)", "more"),
    "rouge_2": Described("the same of pairs of words", "more"),
    "rouge_l": Described("the same of the longest common subsequence of words", "more"),
    "bleu": Described("BLEU of each answer, from 0 to 1 (sacrebleu, effective order), then the mean", "more"),
    "meteor": Described("METEOR of words in lower case, with exact and stem matching, no synonyms (nltk)", "more"),
    "bertscore": Described("F-measure of the tokens' best cosines by the local encoder, no idf, no rescaling", "more"),
}


def rouge(predicted: str, gold: str, kind: str) -> float:
    """F-measure of ``rouge1``, ``rouge2`` or ``rougeL``, without stemming.

    Source:
        Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries, by the package rouge-score.

    Example:
        >>> rouge("the cat sat", "The cat!", "rouge1"), rouge("he killed the dog", "he kill the dog", "rougeL")
        (0.8, 0.75)
    """
    return float(_rouge_scorer(kind).score(gold, predicted)[kind].fmeasure)


@lru_cache(maxsize=3)
def _rouge_scorer(kind: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # what a device imports of this module must not need it

    return RougeScorer([kind], use_stemmer=False)


def bleu(predicted: str, gold: str) -> float:
    """BLEU of one answer from 0 to 1, n-grams that a short answer cannot have left out.

    Source:
        Papineni et al. 2002, by the package sacrebleu (Post 2018, arXiv:1804.08771), ``effective_order``.
    """
    from sacrebleu.metrics.bleu import BLEU

    return float(BLEU(effective_order=True).sentence_score(predicted, [gold]).score) / 100


def meteor(predicted: str, gold: str) -> float:
    """METEOR of one answer, words matched exactly or by Porter's stem: synonyms would need a dictionary beside it.

    Source:
        Banerjee and Lavie 2005, by nltk, with its constants of 2007 (alpha .9, beta 3, gamma .5).
    """
    from nltk.stem.porter import PorterStemmer
    from nltk.translate.meteor_score import single_meteor_score

    words = [re.findall(r"\w+", text.lower()) for text in (gold, predicted)]
    return float(single_meteor_score(*words, stemmer=PorterStemmer(), wordnet=_NoSynonyms())) if all(words) else 0.0


class _NoSynonyms:
    def synsets(self, word: str) -> list[object]:
        del word
        return []


def bertscore(predicted: np.ndarray, gold: np.ndarray) -> float:
    """F-measure of two texts' tokens (n, d) and (m, d), each matched with the most similar one of the other text.

    Source:
        Zhang et al. 2020, arXiv:1904.09675, equations of section 3, without idf weights and without rescaling.

    Example:
        >>> bertscore(np.array([[1.0, 0.0]]), np.array([[1.0, 0.0], [0.0, 1.0]]))
        0.6666666666666666
    """
    if not (len(predicted) and len(gold)):
        return 0.0
    unit = [tokens / np.linalg.norm(tokens, axis=1, keepdims=True).clip(1e-12) for tokens in (predicted, gold)]
    cosines = unit[0] @ unit[1].T
    precision, recall = float(cosines.max(axis=1).mean()), float(cosines.max(axis=0).mean())
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def score_answers(
    answers: Sequence[str], own: Sequence[str], users: np.ndarray, *, embed: Tokens, seed: int, resamples: int
) -> dict[str, Interval]:
    """Every metric of ``TEXT_METRICS``, its mean over all answers with an interval over users.

    Args:
        answers: Of a model (n of them).
        own: What the users wrote.
        users: Index of the user of each (n,).
        embed: Of the local encoder.
        seed: Of the bootstrap; the same for rows that are to be paired.
        resamples: Of the bootstrap.

    Raises:
        ValueError: There is no answer.
    """
    pairs = list(zip(answers, own, strict=True))
    if not pairs:
        raise ValueError("there must be at least one answer to score, got none; set evaluation.answers.")
    values: dict[str, list[float]] = {
        "rouge_1": [rouge(*pair, "rouge1") for pair in pairs],
        "rouge_2": [rouge(*pair, "rouge2") for pair in pairs],
        "rouge_l": [rouge(*pair, "rougeL") for pair in pairs],
        "bleu": [bleu(*pair) for pair in pairs],
        "meteor": [meteor(*pair) for pair in pairs],
        "bertscore": [bertscore(*both) for both in zip(embed(answers), embed(own), strict=True)],
    }
    return {name: over_answers(each, users, seed=seed, resamples=resamples) for name, each in values.items()}


def over_answers(values: Sequence[float], users: np.ndarray, *, seed: int, resamples: int) -> Interval:
    """Mean of a value per answer (n,), with an interval from a bootstrap over their users (n,)."""
    index = np.unique(users, return_inverse=True)[1]
    sums, counts = np.bincount(index, np.asarray(values, dtype=np.float64)), np.bincount(index).astype(np.float64)
    draws = draw_users(len(sums), seed=seed, resamples=resamples)
    return interval(lambda drawn: np.asarray(drawn @ sums / (drawn @ counts)), draws)


def nearer_by_rouge(*, prompt: str, own: str, first: str, second: str, embed: Tokens) -> float:
    """Whichever is closer to the user's own answer by ROUGE-L."""
    del prompt, embed
    return _prefers(rouge(first, own, "rougeL"), rouge(second, own, "rougeL"))


def nearer_by_meteor(*, prompt: str, own: str, first: str, second: str, embed: Tokens) -> float:
    """Whichever is closer to the user's own answer by METEOR, exact and stem matching."""
    del prompt, embed
    return _prefers(meteor(first, own), meteor(second, own))


def nearer_by_bertscore(*, prompt: str, own: str, first: str, second: str, embed: Tokens) -> float:
    """Whichever is closer to the user's own answer by BERTScore of the local encoder."""
    del prompt
    mine, one, other = embed([own, first, second])
    return _prefers(bertscore(one, mine), bertscore(other, mine))


def _prefers(first: float, second: float) -> float:
    return 0.5 if first == second else float(first > second)


JUDGES: dict[str, Judge] = {
    "rouge-l": nearer_by_rouge,
    "meteor": nearer_by_meteor,
    "bertscore": nearer_by_bertscore,
}


def judge_named(name: str) -> Judge:
    """A judge by name, built in or installed.

    Raises:
        ScenarioError: Nobody registers it, or its package is broken.
    """
    found: Judge = lookup("judges", name, JUDGES, Callable)
    return found
