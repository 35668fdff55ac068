"""The head of every task, by its name."""

from shared.heads.head import CausalHead, Head, RatingHead
from shared.heads.preference import PreferenceHead
from shared.heads.ranking import RankingHead
from shared.heads.tagging import TaggingHead

HEADS: dict[str, type[Head]] = {
    "rating": RatingHead,
    "tagging": TaggingHead,
    "ranking": RankingHead,
    "generation": CausalHead,
    "preference": PreferenceHead,
}
