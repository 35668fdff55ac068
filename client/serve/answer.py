"""One answer of a served model: what is put to it, its text as it comes, and where it ends."""

from collections.abc import Iterator, Sequence

from client.runtime.chat import Turn
from client.runtime.generation import spell
from client.serve.chat_api import ApiError, ChatRequest
from client.serve.models import Chosen, Models
from shared.errors import HeadError, StoreError


class Answer:
    """One answer as it is made: an iterable of its text, and then its counts and how it ended."""

    def __init__(self, chosen: Chosen, token_ids: Sequence[int], *, request: ChatRequest) -> None:
        self.chosen = chosen
        self.finish = "length"
        self._token_ids = token_ids
        self._request = request
        self._made = 0

    def __iter__(self) -> Iterator[str]:
        """A piece a token, empty while it is uncertain, without the stop and what follows it; then the rest."""
        stops, held = self._request.stops, ""
        for piece in spell(self.chosen.generator.base, self._tokens()):
            held += piece
            found = [place for place in (held.find(stop) for stop in stops) if place >= 0]
            if found:
                self.finish = "stop"
                held = held[: min(found)]
                break
            safe = len(held) - _begun(held, stops)
            yield held[:safe]
            held = held[safe:]
        yield held

    def usage(self) -> dict[str, int]:
        """How many tokens were read and made."""
        read = len(self._token_ids)
        return {"prompt_tokens": read, "completion_tokens": self._made, "total_tokens": read + self._made}

    def _tokens(self) -> Iterator[int]:
        base, request = self.chosen.generator.base, self._request
        for token, _ in self.chosen.generator.steps(
            self._token_ids,
            max_new_tokens=min(request.limit, self.chosen.generator.room - len(self._token_ids)),
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
        ):
            self._made += 1
            if token in base.stop_ids:
                self.finish = "stop"
            yield token


def _begun(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of the text with which a stop may begin."""
    longest = max((len(stop) - 1 for stop in stops), default=0)
    return next((n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in stops)), 0)


def prepare(models: Models, request: ChatRequest) -> Answer:
    """Everything that can be wrong, before the first token.

    Raises:
        ApiError: There is no such model, or the conversation has no place in it.
    """
    chosen = models.choose(request.model)
    if chosen is None:
        raise ApiError(
            f"model must be one of {', '.join(models.names())}, got another; see /v1/models.",
            status=404,
            code="model_not_found",
            param="model",
        )
    try:
        token_ids = models.format.encode(_remembered(models, chosen, request), personal=chosen.personal)
    except StoreError as error:
        raise ApiError(str(error), status=503, code="records_unreadable") from None
    except HeadError as error:
        raise ApiError(str(error), code="invalid_value", param="messages") from None
    room = chosen.generator.room
    if not 0 < len(token_ids) < room:
        raise ApiError(
            f"the messages must have between 1 and {room - 1} tokens, got {len(token_ids)}; shorten the conversation.",
            code="context_length_exceeded" if token_ids else "invalid_value",
            param="messages",
        )
    return Answer(chosen, token_ids, request=request)


def _remembered(models: Models, chosen: Chosen, request: ChatRequest) -> Sequence[Turn]:
    """The conversation, what its owner's records say before the last message of the user where there is room for it."""
    turns, remembering = list(request.turns), models.remembering
    last = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=None)
    if remembering is None or last is None:
        return turns
    base, room = chosen.generator.base, chosen.generator.room
    room -= min(request.limit, room // 2)

    def put(text: str) -> list[Turn]:
        return [*turns[:last], Turn("user", text), *turns[last + 1 :]]

    def fits(text: str) -> bool:
        return len(models.format.encode(put(text), personal=chosen.personal)) <= room

    return put(remembering.before(turns[last].content, base.tokenizer, fits=fits))
