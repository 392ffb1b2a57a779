"""Prompts from a seed: token ids, so that no tokenizer's merges decide how long a prompt is."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_llmperf.plan import Workload

WARM_UP = -1
"""The number of the warm-up round, whose prompts no measured round repeats."""

_COMMON_VOCABULARY = 30_000


@dataclass(frozen=True)
class Prompt:
    """One request: a prompt as token ids, and how many tokens to generate."""

    token_ids: tuple[int, ...]
    output_tokens: int


def prompts(workload: Workload, number: int, *, vocabulary: int | None, nonce: str) -> list[Prompt]:
    """Return the prompts of round `number`, unlike each other and those of every other round.

    `vocabulary` is the model's number of token ids; None (a model whose config is not at hand) uses ids that every common
    model has. The `nonce` keeps apart what an engine sees: with a case's id the prompts are the same in every launch of the
    case and in no other case; an endpoint that outlives the run needs a new one each time, or answers from its prefix cache.
    """
    size = vocabulary or _COMMON_VOCABULARY
    low = min(size // 4, 1000)  # the first ids are the special tokens in most vocabularies
    count = workload.concurrency if number == WARM_UP else workload.requests
    rng = random.Random(f"{workload.seed}/{nonce}/{number}")
    return [Prompt(tuple(rng.choices(range(low, size), k=workload.prompt_tokens)), workload.output_tokens) for _ in range(count)]
