"""The answers of one head in CPU-seconds: by precision, with the adapter and without; text beside torch's."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from client.runtime.generation import Generator
from client.runtime.language import LanguageBase
from client.runtime.runtime import FleetBase
from shared.errors import CampaignError
from simulations.bench.trained_heads import TOKENS, Fleet, Trained, peft_model
from simulations.machine import spread

NEW_TOKENS = 33  # the first comes of the prompt, 32 of decoding
_PROMPT_TOKENS = 32
_RUNS = 10  # per timing, so that some milliseconds are not lost in the clock


class Answers:
    """One head's answers, timed in both precisions, bare and adapted; a language model's beside torch's."""

    def __init__(self, trained: Trained, fleets: dict[str, Fleet], adapters: dict[str, dict[str, np.ndarray]]) -> None:
        self._trained, self._precisions = trained, tuple(fleets)
        self._ways: dict[str, Callable[[], tuple[float, ...]]] = {}
        self._ids: dict[str, list[int]] = {}
        prompt = self._prompt()
        for precision, fleet in fleets.items():
            for state, adapter in (("bare", {}), ("adapted", adapters[precision])):
                name = f"{precision} {state}"
                if isinstance(fleet, LanguageBase):
                    generator = Generator(None, fleet, adapter, {})
                    self._ways[name] = partial(self._decode, name, partial(_steps, generator, prompt))
                else:
                    self._ways[name] = partial(_encode, fleet, prompt, adapter)
        if trained.language:
            model = peft_model(trained)
            self._ways["torch adapted"] = partial(self._decode, "torch adapted", partial(_torch_steps, model, prompt))

    def _prompt(self) -> list[int]:
        ids = self._trained.token_ids()
        if self._trained.language:
            return max(ids, key=len)[:_PROMPT_TOKENS]
        joined = [" ".join(self._trained.texts)]
        return self._trained.base.tokenize(joined, max_tokens=TOKENS)[0]

    def _decode(self, name: str, steps: Callable[[], Iterator[int]]) -> tuple[float, ...]:
        ids, first, rest = decode(steps())
        self._ids[name] = ids
        return rest, first

    def measure(self, rounds: int) -> dict[str, Any]:
        """Times by precision and state, and what they are worth.

        Raises:
            CampaignError: The greedy tokens of fp32 and torch differ.
        """
        for run in self._ways.values():
            run()  # warm-up
        if self._trained.language and self._ids["fp32 adapted"] != self._ids["torch adapted"]:
            raise CampaignError(f"onnxruntime and torch must choose the same {NEW_TOKENS} greedy tokens, they do not.")
        seconds: dict[str, list[tuple[float, ...]]] = {name: [] for name in self._ways}
        for _ in range(rounds):
            for name, run in self._ways.items():
                seconds[name].append(run())
        times = {name: [each[0] for each in timed] for name, timed in seconds.items()}
        found: dict[str, Any] = {
            "adapted_over_bare": {
                p: spread(over(times[f"{p} adapted"], times[f"{p} bare"])) for p in self._precisions
            }
        }  # fmt: skip
        if not self._trained.language:
            found["cpu_ms_per_text"] = {name: spread([1000 * s for s in each]) for name, each in times.items()}
            return found
        found["tokens_per_cpu_s"] = {name: spread([1 / s for s in each]) for name, each in times.items()}
        found["prompt_cpu_ms"] = {name: spread([1000 * s for _, s in each]) for name, each in seconds.items()}
        found["over_torch"] = {p: spread(over(times["torch adapted"], times[f"{p} adapted"])) for p in self._precisions}
        same = np.equal(self._ids["int8 adapted"], self._ids["torch adapted"])
        found["greedy_tokens"] = {"asked": NEW_TOKENS, "fp32": NEW_TOKENS, "int8_until": int(np.cumprod(same).sum())}
        return found


def over(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """Ratios, pair by pair."""
    return [x / y for x, y in zip(a, b, strict=True)]


def _encode(fleet: FleetBase, token_ids: list[int], adapter: dict[str, np.ndarray]) -> tuple[float]:
    """CPU-seconds of one text."""
    began = time.process_time()
    for _ in range(_RUNS):
        fleet.run_tokens([token_ids], adapter=adapter)
    return ((time.process_time() - began) / _RUNS,)


def decode(steps: Iterator[int]) -> tuple[list[int], float, float]:
    """Token ids, CPU-seconds until the first of them, and CPU-seconds of each that follows."""
    began = time.process_time()
    ids = [next(steps)]
    first = time.process_time()
    ids += steps
    return ids, first - began, (time.process_time() - first) / (len(ids) - 1)


def _steps(generator: Generator, prompt: list[int]) -> Iterator[int]:
    return (token for token, _ in generator.steps(prompt, max_new_tokens=NEW_TOKENS, stop_at_eos=False))


@torch.inference_mode()
def _torch_steps(model: Any, prompt: list[int]) -> Iterator[int]:
    """Greedy, with a key-value cache, and without what ``generate`` adds to every step."""
    ids, cache = torch.tensor([prompt]), None
    for _ in range(NEW_TOKENS):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, token = out.past_key_values, int(out.logits[0, -1].argmax())
        ids = torch.tensor([[token]])
        yield token
