"""The head of every task, by its name."""

from shared.head import CausalHead, Head, RatingHead
from shared.preference_head import PreferenceHead
from shared.ranking_head import RankingHead
from shared.tagging_head import TaggingHead

HEADS: dict[str, type[Head]] = {
    "rating": RatingHead,
    "tagging": TaggingHead,
    "ranking": RankingHead,
    "generation": CausalHead,
    "preference": PreferenceHead,
}
