"""Generate text on the device with a language model and a user's adapter. Needs no more than the base install.

A head folder holds the user's ``adapter.safetensors`` and a manifest with a known answer that shows, on this very
device, that the adapter is at work; client/runtime/language.py opens the base beside it.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from client.runtime.artifact import (
    ADAPTER,
    MANIFEST,
    Arrays,
    Files,
    base_folder,
    check_binding,
    check_listed,
    check_slots,
    damaged,
    lora_differs,
    parse_adapter,
    place_of,
    read_file,
    read_manifest,
)
from client.runtime.language import PREFIX, Cache, LanguageBase, open_lm_base, read_prefix
from client.runtime.runtime import MAX_TOLERANCE, identity, wrong_answer
from client.runtime.session import check_runtime
from shared.errors import HeadError

_CHUNK_TOKENS = 128  # of a prompt read at once; its logits are V floats a token


@dataclass(frozen=True)
class Generation:
    """An answer.

    Attributes:
        text: Without the token that ended it.
        token_ids: Of the answer, the token that ended it included.
        prompt_tokens: How many tokens the prompt had.
        stopped: ``eos`` or, at ``max_new_tokens``, ``length``.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    stopped: Literal["eos", "length"]


@dataclass(frozen=True)
class Generator:
    """A language model with one user's adapter, or alone; generators share a base.

    Attributes:
        user: The user's id; None for the base alone.
        manifest: Of the head, or of the base where there is none.
        prefix: The key-value cache of the user's soft tokens, which stand before every prompt; empty without any.
    """

    user: str | None
    base: LanguageBase
    adapter: Arrays
    manifest: Mapping[str, Any]
    prefix: Arrays = field(default_factory=dict)

    @property
    def room(self) -> int:
        """Tokens that prompt and answer may have together: soft tokens take the first positions."""
        return self.base.max_tokens - (next(iter(self.prefix.values())).shape[2] if self.prefix else 0)

    def start(self) -> Cache:
        """The cache before the first token of a prompt."""
        return self.base.cache.empty() | dict(self.prefix)

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Logits (T, V) float32 after each of the tokens; the export compares these with torch.

        Raises:
            HeadError: There is no token, there are more than the model takes, or a logit is not finite.
        """
        _check_length(self.room, len(token_ids), 0)
        return self.base.run(token_ids, self.start(), adapter=self.adapter)[0]

    def steps(
        self,
        token_ids: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop_at_eos: bool = True,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Each new token and the logits (V,) it was chosen from, one run of the model a token."""
        _check_settings(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
        _check_length(self.room, len(token_ids), max_new_tokens)
        random = np.random.default_rng(seed)
        logits, cache = self._read(token_ids)
        for count in range(1, max_new_tokens + 1):
            token = choose(logits[-1], temperature=temperature, top_p=top_p, random=random)
            yield token, logits[-1]
            if count == max_new_tokens or (stop_at_eos and token in self.base.stop_ids):
                return
            logits, cache = self.base.run([token], cache, adapter=self.adapter)

    def _read(self, token_ids: Sequence[int]) -> tuple[np.ndarray, Cache]:
        """The prompt's last logits (1, V) and its cache; of a long prompt the others are never held together."""
        cache = self.start()
        for start in range(0, len(token_ids), _CHUNK_TOKENS):
            logits, cache = self.base.run(token_ids[start : start + _CHUNK_TOKENS], cache, adapter=self.adapter)
        return logits[-1:], cache

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop_at_eos: bool = True,
    ) -> Generation:
        """Answer a prompt.

        Args:
            prompt: Put into the base's template, as in training. Special tokens in it count as such.
            max_new_tokens: The answer is cut after so many.
            temperature: 0 takes the likeliest token each time; higher draws.
            top_p: Draw only from the likeliest tokens that together have this probability.
            seed: Of the draws; None takes fresh randomness.
            stop_at_eos: Whether the model's end-of-text token ends the answer.

        Raises:
            HeadError: A setting is impossible, prompt and answer do not fit the model, or a logit is not finite.
        """
        token_ids = self.base.encode(prompt)
        found = self.steps(
            token_ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop_at_eos=stop_at_eos,
        )
        answer = tuple(token for token, _ in found)
        ended = stop_at_eos and answer[-1] in self.base.stop_ids
        return Generation(_decode(self.base, answer), answer, len(token_ids), "eos" if ended else "length")

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop_at_eos: bool = True,
    ) -> Iterator[str]:
        """The text of ``generate``, same arguments, piece by piece as it comes; no character is ever split."""
        found = self.steps(
            self.base.encode(prompt),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop_at_eos=stop_at_eos,
        )
        return (piece for piece in spell(self.base, (token for token, _ in found)) if piece)


def spell(base: LanguageBase, token_ids: Iterable[int]) -> Iterator[str]:
    """The text of tokens: a piece a token, empty while a character's bytes are still coming, and then the rest."""
    answer: list[int] = []
    shown = ""
    for token in token_ids:
        answer.append(token)
        text = _decode(base, answer)
        certain = len(text) > len(shown) and not text.endswith("\ufffd")
        yield text[len(shown) :] if certain else ""
        shown = text if certain else shown
    yield _decode(base, answer)[len(shown) :]


def open_generator(
    folder: Files,
    *,
    base: Path | LanguageBase | None = None,
    threads: int = 1,
    signers: Collection[str] | None = None,
) -> Generator:
    """Open a personal language head, or a base alone, checking everything before the first token.

    Args:
        folder: Holds the user's adapter and its manifest; or these files themselves, by name; or the base itself.
        base: Folder of the head's base, or an opened one; by default the sibling ``base`` of ``folder``.
        threads: Of a base that is opened here.
        signers: Fingerprints of the keys of which one must have signed the manifest; None asks for no signature.

    Raises:
        HeadError: A file is missing, damaged or not the one its manifest names; the adapter is another base's; its
            tensors are not the base's slots or not finite; the known answer does not come out.

    Guarantee:
        What runs are the bytes whose hashes were checked, and a head never answers as the base without its adapter.
    """
    in_folder = isinstance(folder, Path)  # a base is too large to be read from anywhere else
    manifest = read_manifest(folder, "lm-adapter", *(["lm-base"] if in_folder else []), signers=signers)
    place = place_of(folder)
    if manifest["kind"] == "lm-base":
        if base is not None:
            raise HeadError(f"{place} must be a head when a base is named, got a base; leave one of them out.")
        opened = open_lm_base(place, threads=threads)
        return Generator(None, opened, {}, manifest)
    if not isinstance(base, LanguageBase):
        base = open_lm_base(base_folder(folder, base), threads=threads)
    generator = bind_generator(folder, base, signers=signers)
    check_known_answer(place, generator)
    return generator


def bind_generator(folder: Files, base: LanguageBase, *, signers: Collection[str] | None = None) -> Generator:
    """A head whose every check is passed but the known answer; see ``open_generator``."""
    manifest = read_manifest(folder, "lm-adapter", signers=signers)
    place = place_of(folder)
    check_binding(place, manifest, identity(base))
    check_runtime(place, manifest)
    content = read_file(folder, manifest, ADAPTER)
    adapter = parse_adapter(place / ADAPTER, content)
    check_listed(place, manifest, adapter)
    prefix = read_prefix(place / ADAPTER, adapter, base.cache)
    lora = {name: array for name, array in adapter.items() if not name.startswith(PREFIX)}
    check_slots(place, lora, base.slots)
    user = manifest.get("user")
    if not isinstance(user, str):
        raise damaged(place / MANIFEST, f"user must be a string, got {user!r}")
    generator = Generator(user, base, lora, manifest, prefix)
    if not generator.room >= 1:
        raise damaged(place / ADAPTER, f"its soft tokens must leave room in the model's {base.max_tokens} positions")
    return generator


def choose(logits: np.ndarray, *, temperature: float, top_p: float, random: np.random.Generator) -> int:
    """The next token: the likeliest at temperature 0, else one drawn from the smallest set that holds ``top_p``.

    Source:
        Holtzman et al. 2020, arXiv:1904.09751, section 3.1 (nucleus sampling).

    Example:
        >>> logits = np.log(np.array([0.1, 0.6, 0.3]))
        >>> choose(logits, temperature=0.0, top_p=1.0, random=np.random.default_rng(0))
        1
    """
    if temperature == 0:
        return int(np.argmax(logits))
    scaled = (logits.astype(np.float64) - logits.max()) / temperature
    odds = np.exp(scaled)
    order = np.argsort(-odds, kind="stable")
    sums = np.cumsum(odds[order] / odds.sum())
    count = min(len(order), 1 + int(np.searchsorted(sums, top_p)))  # the token that reaches top_p is in
    kept = order[:count]
    return int(random.choice(kept, p=odds[kept] / odds[kept].sum()))


def check_known_answer(folder: Path, generator: Generator) -> None:
    """The head's manifest says what the adapter makes of a fixed text; this device must find the same.

    Raises:
        HeadError: It does not.
    """
    path = folder / MANIFEST
    try:
        known = generator.manifest["known_answer"]
        token_ids = [int(token) for token in known["token_ids"]]
        places = [int(token) for token in known["places"]]
        wanted, bare = (np.array(known[key], dtype=np.float64) for key in ("logits", "without_adapter"))
        tolerance = float(known["tolerance"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise damaged(path, f"unreadable known answer {error}") from None
    limit = MAX_TOLERANCE[generator.base.precision]
    if not (0 < tolerance <= limit and wanted.shape == bare.shape == (len(places),) and places):
        raise damaged(path, "its known answer must have a tolerance, places and as many logits")
    if (generator.prefix or lora_differs(generator.adapter)) and not np.abs(wanted - bare).max() >= 2 * tolerance:
        raise damaged(path, "its known answer must tell the adapter from its absence")
    logits = generator.logits(token_ids)[-1]
    if not 0 <= min(places) <= max(places) < len(logits):
        raise damaged(path, f"its known answer must lie in a vocabulary of {len(logits)}")
    difference = float(np.abs(logits[places] - wanted).max())
    if not difference <= tolerance:
        raise wrong_answer(folder, difference, tolerance)


def _check_settings(*, max_new_tokens: int, temperature: float, top_p: float) -> None:
    if not max_new_tokens >= 1:
        raise HeadError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise HeadError(f"temperature must be finite and at least 0, got {temperature}; 0 is greedy.")
    if not 0 < top_p <= 1:
        raise HeadError(f"top_p must be above 0 and at most 1, got {top_p}.")


def _check_length(room: int, prompt: int, answer: int) -> None:
    if not prompt >= 1:
        raise HeadError("a prompt must have at least one token, got none; give some text.")
    if not prompt + answer <= room:
        raise HeadError(
            f"prompt and answer must fit the model's {room} tokens, got {prompt} and up to {answer}; "
            "shorten the prompt or ask for fewer new tokens."
        )


def _decode(base: LanguageBase, token_ids: Sequence[int]) -> str:
    text: str = base.tokenizer.decode(list(token_ids), skip_special_tokens=True)
    return text
