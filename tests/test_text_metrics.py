"""Scores of answers in words: known values, conventions, and judges that can lose."""

import numpy as np
import pytest

from shared.errors import ScenarioError
from shared.metrics.text import (
    JUDGES,
    TEXT_METRICS,
    bertscore,
    bleu,
    judge_named,
    meteor,
    over_answers,
    rouge,
    score_answers,
)


def letters(texts):
    """An encoder by hand: a word is the direction of its first letter."""
    return [np.eye(26)[[ord(word[0]) - 97 for word in text.split()]].reshape(-1, 26) for text in texts]


def test_bleu_by_hand():
    """1 to 4-grams 5/6, 3/5, 2/4, 1/3 of equal lengths; a text of two words has no longer n-grams to be wrong in."""
    assert bleu("the cat sat on the mat", "the cat sat on a mat") == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 / 3) ** 0.25)
    assert bleu("two words", "two words") == pytest.approx(1.0)
    assert bleu("", "two words") == 0.0


def test_meteor_by_hand():
    """Six matches, one by its stem, in one chunk: precision and recall 1, penalty gamma / 6^3."""
    assert meteor("the cat runs over the hill", "the cats run over the hill") == pytest.approx(1 - 0.5 / 6**3)
    assert meteor("a film", "a movie") < 0.6  # no synonyms
    assert meteor("", "a") == meteor("a", "") == 0.0


def test_bertscore_matches_each_token_with_its_nearest():
    gold, near = letters(["ab cd ef", "ax cy"])
    assert bertscore(near, gold) == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))
    assert bertscore(*letters(["zz", "ab cd"])) == 0.0
    assert bertscore(np.zeros((0, 26)), gold) == 0.0
    assert bertscore(7 * near, gold) == bertscore(near, gold)


def test_rouge_counts_a_word_as_often_as_both_have_it():
    assert rouge("the the cat", "The cat's the hat", "rouge1") == pytest.approx(0.75)
    assert rouge("a b c d", "a x c b d", "rougeL") == pytest.approx(2 / 3)
    assert rouge("b a", "a b", "rouge2") == 0.0


def test_every_metric_of_a_row_and_its_mean_over_answers():
    answers, own = ["ab cd", "ab", "zz"], ["ab cd", "cd", "ab"]
    found = score_answers(answers, own, np.array([3, 3, 8]), embed=letters, seed=0, resamples=20)
    assert list(found) == list(TEXT_METRICS)
    assert found["rouge_1"].value == pytest.approx(1 / 3)
    assert found["bertscore"].value == pytest.approx(1 / 3)
    assert found["rouge_1"].low == 0.0  # the second user alone
    assert found["rouge_1"].high == pytest.approx(0.5)  # the first user alone
    with pytest.raises(ValueError, match="at least one answer"):
        score_answers([], [], np.array([]), embed=letters, seed=0, resamples=20)


def test_users_and_not_answers_are_drawn():
    wide = over_answers([1.0] * 50 + [0.0] * 50, np.repeat([0, 1], 50), seed=0, resamples=200)
    assert (wide.low, wide.value, wide.high) == (0.0, 0.5, 1.0)


@pytest.mark.parametrize("name", JUDGES)
def test_a_judge_prefers_what_the_user_would_have_said(name):
    judge, said = judge_named(name), {"prompt": "?", "own": "ab cd ef", "embed": letters}
    assert judge(first="ab cd zz", second="zz yy", **said) == 1.0
    assert judge(first="zz yy", second="ab cd zz", **said) == 0.0
    assert judge(first="ab", second="ab", **said) == 0.5


def test_a_judge_nobody_knows_is_refused():
    with pytest.raises(ScenarioError, match="judge"):
        judge_named("oracle")
