"""The head of every task, by its name."""

from shared.config import Scenario
from shared.heads.causal import CausalHead
from shared.heads.head import Head
from shared.heads.preference import PreferenceHead
from shared.heads.ranking import RankingHead
from shared.heads.rating import RatingHead
from shared.heads.tagging import TaggingHead
from shared.models.model import Base

HEADS: dict[str, type[Head]] = {
    "rating": RatingHead,
    "tagging": TaggingHead,
    "ranking": RankingHead,
    "generation": CausalHead,
    "preference": PreferenceHead,
}


def make_head(base: Base, scenario: Scenario, *, public_texts: int = 0) -> Head:
    """The head a scenario describes on a base, its public tensors still zero; arguments as for ``Head``."""
    return HEADS[scenario.task.name](base, scenario, public_texts=public_texts)
