"""Before a prompt on the device: what its owner's own records say. They are read, sealed, at every prompt; no torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from client.home.attributes import read_profile
from client.home.home import Home
from client.home.sources import records_of
from client.personal.prompting import lines_before
from shared.config import PromptConfig


@dataclass(frozen=True)
class Remembering:
    """What a home puts before prompts.

    Attributes:
        home: Its records with a response are looked through, and what its owner states.
        prompt: How many, by ``bm25`` or ``recency``, and how they are written.
    """

    home: Home
    prompt: PromptConfig

    def before(self, text: str, tokenizer: Tokenizer, *, fits: Callable[[str], bool]) -> str:
        """A prompt after what is remembered, as much of it as fits: what is least similar is left away first.

        Args:
            text: The prompt, which itself is always there, as it is.
            tokenizer: Of the model, whose control tokens are taken out of what is remembered: others may have written
                parts of it.
            fits: Whether the model has room for a prompt.

        Raises:
            StoreError: Records or profile cannot be read.
        """
        known = [record for record in records_of(self.home, task="generation") if record.response]
        known.sort(key=lambda record: record.timestamp)
        [lines] = lines_before([text], known, prompt=self.prompt, profile=read_profile(self.home))
        plain = [without_control(line, tokenizer) for line in lines]
        return next((found for found in _shorter(plain, text) if fits(found)), text)


def _shorter(lines: Sequence[str], text: str) -> list[str]:
    return ["\n".join([*lines[start:], text]) for start in range(len(lines))]


def without_control(text: str, tokenizer: Tokenizer) -> str:
    """A text without anything that a tokenizer reads as one of its control tokens."""
    names = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.content.strip()]
    before = ""
    while before != text:  # what is left may make another
        before = text
        for name in names:
            text = text.replace(name, "")
    return text
