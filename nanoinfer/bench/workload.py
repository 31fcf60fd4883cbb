"""Requests to measure with: random token ids of drawn lengths, the same for every engine."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TOKEN_RANGE = (0, 10_000)


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts as token ids; request i is to give exactly output_lens[i] tokens, end-of-sequence ids included."""

    prompts: list[list[int]]
    output_lens: list[int]
    temperature: float
    sampling: Mapping[str, Any] = field(default_factory=dict)  # further options of SamplingParams, for all

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def num_output_tokens(self) -> int:
        return sum(self.output_lens)


def random_workload(
    num_requests: int, input_len: tuple[int, int], output_len: tuple[int, int], *, vocab_size: int,
    temperature: float, seed: int, sampling: Mapping[str, Any] | None = None,
) -> Workload:  # fmt: skip
    """Requests of lengths drawn evenly from [low, high] and of random ids.

    256 requests of 100 to 1024 tokens in and out with seed 0 are the workload of nano-vllm's benchmark, drawn in its
    order: 142,827 prompt tokens, 133,966 output tokens. A smaller vocabulary folds the ids, so lengths stay the same.
    """
    rng = random.Random(seed)
    prompts = [[rng.randint(*TOKEN_RANGE) % vocab_size for _ in range(rng.randint(*input_len))]
               for _ in range(num_requests)]  # fmt: skip
    return Workload(prompts, [rng.randint(*output_len) for _ in range(num_requests)], temperature, sampling or {})


def equal_workload(batch: int, context: int, output_len: int, *, vocab_size: int, seed: int) -> Workload:
    """A batch of requests that start and end together, greedy."""
    return random_workload(
        batch, (context, context), (output_len, output_len), vocab_size=vocab_size, temperature=0.0, seed=seed
    )
