"""The owner's personal model beside the base alone, on the same text. Needs no more than the base install.

Which head there is and whether it may be used is asked at every question, so that one that is new, rolled back, expired
or forgotten is noticed at once. Nothing that is asked or answered is kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.home.home import Home
from client.owner.verify import highest_sequence, open_home_base, open_personal, trusted_operators
from client.runtime.artifact import read_manifest
from client.runtime.runtime import FleetBase, PersonalHead
from client.serve.answer import Answer, prepare
from client.serve.chat_api import ApiError, ChatRequest
from client.serve.models import BASE, PERSONAL, Models, open_models
from shared.errors import HeadError

NO_HEAD = "you have no private head yet; make one with: sottovoce client personalize"
MAX_TEXTS = 20


@dataclass(frozen=True)
class Compared:
    """What both say of some texts.

    Attributes:
        texts: As they were asked.
        personal: One answer a text, as ``PersonalHead.predict`` gives them; None where no private head answers.
        base: Likewise of the base alone.
        problem: Why no private head answers; None where one does.
        version: Of the private head that answers.
    """

    texts: tuple[str, ...]
    personal: Any
    base: Any
    problem: str | None
    version: int | None


class Numbers:
    """Ratings, scores, or the probabilities of labels.

    Attributes:
        task: As the base's manifest names it.
        labels: What is told apart (K); none where a number is predicted.
        ends: Of the scale; None where it has none.
    """

    def __init__(self, home: Home, base: FleetBase, *, task: str) -> None:
        self._home, self._base = home, base
        self.task, self.labels = task, base.labels
        self.ends = None if base.labels or task == "ranking" else (base.low, base.high)

    def compare(self, texts: Sequence[str]) -> Compared:
        """Both answers to each text.

        Raises:
            HeadError: There is no text or there are too many, or an answer is not finite.
            StoreError: The home cannot be read.
        """
        if not 1 <= len(texts) <= MAX_TEXTS:
            raise HeadError(f"between 1 and {MAX_TEXTS} texts must be given, got {len(texts)}; one a line.")
        bare = PersonalHead(None, self._base, {}, {}).predict(texts)
        if not highest_sequence(self._home.keystore):
            return Compared(tuple(texts), None, bare, NO_HEAD, None)
        found = open_personal(self._home, self._base)
        if found.problem is not None:
            return Compared(tuple(texts), None, bare, found.problem, None)
        return Compared(tuple(texts), found.model.predict(texts), bare, None, self._home.heads().current())


class Words:
    """Answers in words, as ``client serve`` makes them, each the likeliest."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def ask(self, prompt: str, *, limit: int) -> tuple[Answer | str, Answer]:
        """The personal answer, or why there is none, and the base's; each is made while it is read.

        Args:
            prompt: The text.
            limit: New tokens at most.

        Raises:
            HeadError: The prompt does not fit.
        """
        base = self._answer(BASE, prompt, limit)
        if not isinstance(base, Answer):
            raise HeadError(base)
        return self._answer(PERSONAL, prompt, limit), base

    def _answer(self, model: str, prompt: str, limit: int) -> Answer | str:
        said = {"role": "user", "content": prompt}
        request = ChatRequest.model_validate(
            {"model": model, "messages": [said], "max_tokens": limit, "temperature": 0.0}
        )
        try:
            answer = prepare(self._models, request)
        except ApiError as refusal:
            return NO_HEAD if refusal.code == "model_not_found" else str(refusal)
        if model == PERSONAL and not answer.chosen.personal:
            return answer.chosen.problem or NO_HEAD
        return answer

    def drop(self) -> None:
        """Let go of heads that are listed no more."""
        self._models.choose(PERSONAL)


def read_pieces(answer: Answer | str) -> Iterator[str]:
    """The text of an answer as it comes; nothing where there is none.

    Raises:
        HeadError: A logit is not finite.
    """
    return iter(()) if isinstance(answer, str) else iter(answer)


Beside = Numbers | Words


def open_beside(home: Home, folder: Path, *, threads: int = 1) -> Beside:
    """Open a fleet's base, of whatever kind.

    Args:
        home: Whose private heads answer beside it; an operator its owner agreed with must have signed the base.
        folder: Of the base.
        threads: Of the matrix products.

    Raises:
        HeadError: The base cannot be used.
        LedgerError: The home's ledger, which knows whom to trust, cannot be used.
    """
    manifest = read_manifest(folder, "base", "lm-base", signers=trusted_operators(home))
    if manifest["kind"] == "lm-base":
        return Words(open_models(home, folder, threads=threads))
    base = open_home_base(home, folder, kind="base", threads=threads)
    return Numbers(home, base, task=str(manifest["task"].get("name", "")))
