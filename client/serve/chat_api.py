"""The OpenAI chat format: what a request may say, and the objects that answer it.

What changes an answer is obeyed or refused; what changes none is accepted. No error quotes what a user wrote.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic_core
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from client.runtime.chat import Turn
from shared.errors import SottovoceError

DEFAULT_NEW_TOKENS = 512  # a small model without an end in sight would fill its context
_MAX_MESSAGES = 512
_MAX_STOPS = 4

_HARMLESS = {  # what a service keeps, bills by or does with tools and thoughts
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("parallel_tool_calls", "verbosity", "reasoning_effort"),
}
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {  # parameters we do not have, and the values that ask for nothing
    "n": (1,),
    "best_of": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}


class ApiError(SottovoceError):
    """A request that is refused, as OpenAI words it.

    Args:
        text: What must hold, what was found, what to do.
        status: Of HTTP.
        code: A fixed word for programs.
        param: The parameter that is wrong.
    """

    def __init__(self, text: str, *, status: int = 400, code: str | None = None, param: str | None = None) -> None:
        super().__init__(text)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _Part(_Strict):
    type: Literal["text"]
    text: str


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)  # names, refusals and the like change nothing

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]

    def turn(self) -> Turn:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Turn("system" if self.role == "developer" else self.role, text)


class _StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


def _distinct_stops(stops: str | list[str]) -> str | list[str]:
    if not (stops and all(stops)) or (len(stops) > _MAX_STOPS and not isinstance(stops, str)):
        raise ValueError(f"stop must be a text that is not empty, or up to {_MAX_STOPS} of them")
    return stops


class ChatRequest(_Strict):
    """What decides an answer; the fields are OpenAI's."""

    model: str
    messages: Annotated[list[_Message], Field(min_length=1, max_length=_MAX_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Annotated[str | list[str], AfterValidator(_distinct_stops)] = Field(default_factory=list)
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()

    @property
    def turns(self) -> list[Turn]:
        """The conversation."""
        return [message.turn() for message in self.messages]

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer and are left out of it."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def limit(self) -> int:
        """New tokens at most."""
        return self.max_completion_tokens or self.max_tokens or DEFAULT_NEW_TOKENS


def parse_request(body: bytes) -> ChatRequest:
    """What a request says.

    Raises:
        ApiError: It is not JSON, a value is impossible, or a parameter asks for what we do not have.

    Example:
        >>> parse_request(b'{"model": "base", "messages": [{"role": "user", "content": "Hi"}], "n": 1}').turns
        [Turn(role='user', content='Hi')]
    """
    try:
        said = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError:
        raise ApiError("the body must be JSON in UTF-8, it is not; send one object.") from None
    if not isinstance(said, dict):
        raise ApiError("the body must be a JSON object, got something else; send one with model and messages.")
    wanted = {}
    for name, value in said.items():
        if value is None or name in _HARMLESS:
            continue
        if name not in _NEUTRAL:
            wanted[name] = value
        elif value not in _NEUTRAL[name]:
            raise ApiError(f"{name} is not supported here; leave it out.", code="unsupported_parameter", param=name)
    try:
        return ChatRequest.model_validate(wanted)
    except ValidationError as error:
        raise _wrong_value(error) from None


def _wrong_value(error: ValidationError) -> ApiError:
    """The first mistake: where it is and what must hold; an unknown name may be a user's text, so it is not said."""
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    if first["type"] == "extra_forbidden":
        known = first["loc"][0] if len(first["loc"]) > 1 else None
        return ApiError(
            "the request must have OpenAI's parameters and no others, got one that is unknown here; leave it out.",
            code="unknown_parameter",
            param=known if isinstance(known, str) else None,
        )
    names = {*ChatRequest.model_fields, *_Message.model_fields, *_Part.model_fields, *_StreamOptions.model_fields}
    param = ".".join(str(step) for step in first["loc"] if isinstance(step, int) or step in names)
    return ApiError(f"{param}: {first['msg']}; send another value.", code="invalid_value", param=param)


class Reply:
    """The objects of one answer, whole or in chunks."""

    def __init__(
        self, *, number: str, created: int, model: str, fingerprint: str, include_usage: bool, warning: str | None
    ) -> None:
        self._about = {
            "id": f"chatcmpl-{number}",
            "created": created,
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._warning = {} if warning is None else {"warning": warning}
        self._include_usage = include_usage

    def whole(self, text: str, *, finish: str, usage: Mapping[str, int]) -> dict[str, Any]:
        """A ``chat.completion``."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        about = self._about | {"object": "chat.completion"}
        return about | {"choices": [choice], "usage": dict(usage)} | self._warning

    def begin(self) -> dict[str, Any]:
        """The first chunk: who speaks."""
        return self._chunk({"role": "assistant", "content": "", "refusal": None}) | self._warning

    def piece(self, text: str) -> dict[str, Any]:
        """A chunk of the answer."""
        return self._chunk({"content": text})

    def end(self, finish: str) -> dict[str, Any]:
        """The last chunk of the answer: why it ended."""
        return self._chunk({}, finish=finish)

    def usage(self, usage: Mapping[str, int]) -> list[dict[str, Any]]:
        """The chunk with the counts of tokens, where it was asked for."""
        chunk = self._about | {"object": "chat.completion.chunk", "choices": [], "usage": dict(usage)}
        return [chunk] if self._include_usage else []

    def _chunk(self, delta: Mapping[str, Any], *, finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": dict(delta), "logprobs": None, "finish_reason": finish}
        chunk: dict[str, Any] = self._about | {"object": "chat.completion.chunk", "choices": [choice]}
        return chunk | ({"usage": None} if self._include_usage else {})
