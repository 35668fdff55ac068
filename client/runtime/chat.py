"""A conversation as the token ids a language model was trained to see; what users type can never end their turn.

The model's own chat template travels in the manifest of its base. A template is a program, so it runs in Jinja's
sandbox, as in transformers, which renders the same text and, control tokens in a message included, the same ids.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from client.runtime.language import LanguageBase
from shared.errors import HeadError

_OPEN, _CLOSE = "\U000f0000", "\U000f0001"  # around a control token that a user typed; private use
_NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
_SLOT = "{text}"


@dataclass(frozen=True)
class Turn:
    """One message: ``system``, ``user`` or ``assistant``, and its text."""

    role: str
    content: str


class ChatError(HeadError):
    """A conversation has no place in the model's format; the message quotes nothing of it."""


class ChatFormat:
    """How a base, or an adapter trained on it, wants a conversation put.

    Attributes:
        trained: Whether adapters were trained inside the chat template, or else in a template of their own.
    """

    def __init__(self, base: LanguageBase, *, chat_template: str | None, named_tokens: Mapping[str, str]) -> None:
        self._tokenizer = base.tokenizer
        self._training = base.template
        self._chat = None if chat_template is None else compile_template(chat_template)
        self._named = dict(named_tokens)
        self._control = _Control(base.tokenizer, written=(chat_template or "") + base.template)
        self.trained = base.template in self._user_turns()

    def takes_history(self, *, personal: bool) -> bool:
        """Whether the whole conversation is put to the model, or only the last message of the user."""
        return self._chat is not None and (self.trained or not personal)

    def encode(self, turns: Sequence[Turn], *, personal: bool) -> list[int]:
        """Token ids of a conversation, up to where the answer begins.

        Args:
            turns: Oldest first.
            personal: Whether an adapter answers. A lone message of the user is then put as its records were in
                training. A longer conversation goes through the chat template if training was inside it; otherwise
                only the last message of the user is put, as in training, because the adapter knows nothing else.

        Raises:
            ChatError: There is no message of the user, or the chat template refuses the order of roles.

        Guarantee:
            No control token comes from a message's text: what looks like one is encoded as the characters it has.
        """
        alone = [turn.role for turn in turns] == ["user"]
        if self.takes_history(personal=personal) and not (personal and alone):
            text = self._render([Turn(turn.role, self._control.mark(turn.content)) for turn in turns])
        else:
            last = next((turn for turn in reversed(turns) if turn.role == "user"), None)
            if last is None:
                raise ChatError("a conversation must hold a message of the user, got none; add one.")
            text = self._training.replace(_SLOT, self._control.mark(last.content))
        return self._control.encode(text)

    def _render(self, turns: Sequence[Turn], *, answer: bool = True) -> str:
        if self._chat is None:
            raise ChatError("the base must bring a chat template, it has none; export it again.")
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            return self._chat.render(messages=messages, add_generation_prompt=answer, **self._named)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError):
            raise ChatError(  # what a template says may quote a message
                "the model's chat template must take these roles in this order, it refuses them; let user and "
                "assistant alternate, after at most one system message."
            ) from None

    def _user_turns(self) -> set[str]:
        """The chat template around one message of the user: with what it puts before a first one, and without."""
        if self._chat is None:
            return set()
        user, system = Turn("user", _SLOT), Turn("system", "x")
        found = set()
        for before in ([], [system]):
            try:
                start = self._render(before, answer=False) if before else ""
                found.add(self._render([*before, user]).removeprefix(start))
            except ChatError:
                continue
        return found


class _Control:
    """The tokens that structure a conversation, as opposed to the same characters typed by a user."""

    def __init__(self, tokenizer: Tokenizer, *, written: str) -> None:
        added = tokenizer.get_added_tokens_decoder()
        names = {t.content for t in added.values() if t.special or (t.content.strip() and t.content in written)}
        longest_first = "|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)"
        self._tokenizer = tokenizer
        self._ids = frozenset(added)
        self._names = re.compile(longest_first)
        self._marks = re.compile(f"{_OPEN}({longest_first}){_CLOSE}|[{_OPEN}{_CLOSE}]")
        self._heads = tuple(sorted({name[:end] for name in names for end in range(1, len(name))}))
        self._tails = tuple(sorted({name[start:] for name in names for start in range(1, len(name))}))

    def mark(self, text: str) -> str:
        """The text with marks around control tokens, and where it could complete one together with its neighbours."""
        text = text.replace(_OPEN, "").replace(_CLOSE, "")
        before = _OPEN if text.startswith(self._tails) else ""
        after = _CLOSE if text.endswith(self._heads) else ""
        return before + self._names.sub(f"{_OPEN}\\g<0>{_CLOSE}", text) + after

    def encode(self, text: str) -> list[int]:
        """Token ids of a text with marks: what stands between two is plain, whatever it looks like."""
        ids: list[int] = []
        for i, piece in enumerate(self._marks.split(text)):  # text, marked token or None, text, …
            if piece:
                ids += self._plain(piece) if i % 2 else self._tokenizer.encode(piece, add_special_tokens=False).ids
        return ids

    def _plain(self, text: str) -> list[int]:
        tokenizer = self._tokenizer
        if tokenizer.normalizer is not None:
            text = tokenizer.normalizer.normalize_str(text)
        words = [text]
        if tokenizer.pre_tokenizer is not None:
            words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        ids = [token.id for word in words for token in tokenizer.model.tokenize(word)]
        if not self._ids.isdisjoint(ids):
            raise ChatError("a message must not hold one of the model's control tokens, but does; take it out.")
        return ids


def chat_format(base: LanguageBase, manifest: Mapping[str, Any]) -> ChatFormat:
    """The format of a base, from its manifest.

    Raises:
        HeadError: The manifest's template cannot be read.
    """
    tokenizer = manifest["tokenizer"]
    template, named = tokenizer.get("chat_template"), tokenizer.get("named_tokens", {})
    strings = isinstance(named, dict) and all(isinstance(value, str) for value in named.values())
    if not (isinstance(template, str | None) and strings):
        raise HeadError("the base's chat_template and named_tokens must be text, got something else; export it again.")
    return ChatFormat(base, chat_template=template, named_tokens=named)


def read_chat(model_folder: Path) -> dict[str, Any]:
    """What a base's manifest says of conversations: ``chat_template`` and ``named_tokens``, or nothing.

    Args:
        model_folder: The model in the hub's layout: ``chat_template.jinja``, or ``tokenizer_config.json`` alone.

    Raises:
        HeadError: The model brings a template that cannot be read.
    """
    path, config = model_folder / "chat_template.jinja", model_folder / "tokenizer_config.json"
    try:
        entries = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        template = path.read_text(encoding="utf-8") if path.is_file() else entries.get("chat_template")
        if isinstance(template, list):  # several by name, as older files have them
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if not isinstance(template, str | None):
            raise TypeError("a template must be text")
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        raise HeadError(f"{config} and {path.name} must be JSON and text in UTF-8, got neither; mend them.") from None
    if template is None:
        return {}
    compile_template(template)
    return {"chat_template": template, "named_tokens": dict(_named_tokens(entries))}


def compile_template(template: str) -> jinja2.Template:
    """A chat template, ready to run in the sandbox with what transformers gives it.

    Raises:
        HeadError: It is not Jinja.

    Source:
        transformers 5.23, utils/chat_template_utils.py.

    Example:
        >>> compile_template("{% for m in messages %}{{ m.content | tojson }}{% endfor %}").render(
        ...     messages=[{"content": "<é>"}]
        ... )
        '"<é>"'
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    try:
        return environment.from_string(template)
    except (jinja2.TemplateError, RecursionError, ValueError) as error:
        raise HeadError(f"a chat template must be Jinja, got: {type(error).__name__}; mend the model's.") from None


class _Generation(jinja2.ext.Extension):
    """``{% generation %}``, which marks what an assistant said for training, and prints it as it is."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _named_tokens(entries: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for name in _NAMED_TOKENS:
        value = entries.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            yield name, text


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(format: str) -> str:
    return datetime.now().strftime(format)
