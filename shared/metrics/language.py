"""Score predicted responses by their tokens, with intervals from the same bootstrap over users as ratings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shared.metrics.ratings import (
    Described,
    Floats,
    Interval,
    Statistic,
    draw_users,
    interval,
    over_users,
    worst_decile,
)

LANGUAGE_METRICS: Mapping[str, Described] = {
    "perplexity": Described("exp of the mean negative log-likelihood of a response token, pooled over test responses"),
    "nll": Described("mean negative log-likelihood of a response token in nats, pooled"),
    "token_accuracy": Described("share of response tokens that were the likeliest one, pooled", better="more"),
    "user_nll": Described("nll of each user, then the mean over users"),
    "worst_decile": Described("mean of the users' nll over the worst tenth of users"),
    "share_gaining": Described("share of users whose nll is below that of the row local", better="more"),
}
NEXT_UTTERANCE: Mapping[str, Described] = {  # where evaluation.candidates asks for it
    "hits@1": Described(
        "share of test responses whose tokens' mean log-likelihood is above that of every other candidate, pooled",
        better="more",
    ),
}


@dataclass(frozen=True)
class TokenScores:
    """What a model made of a list of responses, (n,) each.

    Attributes:
        nll: Sum of the negative log-likelihood of a response's tokens, its end included, in nats.
        tokens: How many they are, at least 1.
        hits: How many of them were the likeliest token.
        told: 1 where the response was told from the candidates, 0 where not; None where there were none.
    """

    nll: Floats
    tokens: Floats
    hits: Floats
    told: Floats | None = None

    @classmethod
    def joined(cls, parts: Sequence["TokenScores"]) -> "TokenScores":
        """The same of several lists, one after the other."""
        told = [part.told for part in parts if part.told is not None]
        nll, tokens, hits = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("nll", "tokens", "hits")
        )
        return cls(nll, tokens, hits, np.concatenate(told) if told else None)

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean negative log-likelihood of a token, pooled over all responses."""
        return float(np.exp(self.nll.sum() / self.tokens.sum()))

    def of_users(self, users: np.ndarray) -> tuple[Floats, Floats, Floats]:
        """The three summed over each user in ``numpy.unique(users)``, (U,) each."""
        index = np.unique(users, return_inverse=True)[1]
        nll, tokens, hits = (
            np.bincount(index, values).astype(np.float64) for values in (self.nll, self.tokens, self.hits)
        )
        return nll, tokens, hits


def score_tokens(
    scores: TokenScores, users: np.ndarray, *, reference: TokenScores, seed: int, resamples: int
) -> dict[str, Interval]:
    """Every metric of ``LANGUAGE_METRICS`` with its interval, and of ``NEXT_UTTERANCE`` where there were candidates.

    Args:
        scores: Of the row.
        users: Index of the user of each response (n,).
        reference: Of the row that a user gains against.
        seed: Of the bootstrap; the same for rows that are to be paired.
        resamples: Of the bootstrap.

    Raises:
        ValueError: There is no response, or a value is not finite.

    Example:
        >>> row = TokenScores(np.array([2.0, 4.0]), np.array([2.0, 2.0]), np.array([1.0, 0.0]))
        >>> found = score_tokens(row, np.array([0, 1]), reference=row, seed=1, resamples=10)
        >>> found["nll"].value, found["token_accuracy"].value, found["worst_decile"].value
        (1.5, 0.25, 2.0)
    """
    nll, tokens, hits = _checked(scores, users)
    per_user = nll / tokens
    theirs, their_tokens, _ = reference.of_users(users)
    statistics: dict[str, Statistic] = {
        "perplexity": lambda draws: np.exp(draws @ nll / (draws @ tokens)),
        "nll": lambda draws: draws @ nll / (draws @ tokens),
        "token_accuracy": lambda draws: draws @ hits / (draws @ tokens),
        "user_nll": over_users(per_user),
        "worst_decile": lambda draws: worst_decile(per_user, draws),
        "share_gaining": over_users(per_user < theirs / their_tokens),
    }
    if scores.told is not None:
        index = np.unique(users, return_inverse=True)[1]
        told, asked = np.bincount(index, scores.told), np.bincount(index)
        statistics["hits@1"] = lambda draws: draws @ told / (draws @ asked)
    draws = draw_users(len(nll), seed=seed, resamples=resamples)
    return {name: interval(statistic, draws) for name, statistic in statistics.items()}


def perplexity_difference(a: TokenScores, b: TokenScores, users: np.ndarray, *, seed: int, resamples: int) -> Interval:
    """Perplexity of ``a`` minus that of ``b`` on the same resamples; below 0, ``a`` is better."""
    nll_a, tokens, _ = _checked(a, users)
    nll_b, _, _ = _checked(b, users)

    def difference(draws: Floats) -> Floats:
        return np.asarray(np.exp(draws @ nll_a / (draws @ tokens)) - np.exp(draws @ nll_b / (draws @ tokens)))

    return interval(difference, draw_users(len(tokens), seed=seed, resamples=resamples))


def _checked(scores: TokenScores, users: np.ndarray) -> tuple[Floats, Floats, Floats]:
    if not len(users):
        raise ValueError("there must be at least one test response, got none; check the split.")
    if not (np.isfinite(scores.nll).all() and (scores.tokens >= 1).all()):
        raise ValueError("every response must have a finite likelihood and at least one token; mend the model.")
    return scores.of_users(users)
