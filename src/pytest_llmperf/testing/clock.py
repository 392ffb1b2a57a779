"""A deterministic clock model of a continuous-batching LLM engine: no I/O, no real time.

The opinion: an engine is a loop of steps, and everything a load test can see of it (TTFT, ITL, throughput, preemptions,
KV use) follows from how long a step takes and which requests are in it. How long: this file; which: `scheduler.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Clock:
    """How long the steps of the simulated engine take and what fits into one.

    A step takes `(step_s + sequence_s * sequences + prefill_token_s * prompt tokens) / tp + communication_s * (tp - 1)`
    seconds, times `slow_down` and the noise factors of the launch and of the round.
    """

    step_s: float = 0.002
    sequence_s: float = 0.00005
    """Seconds added per sequence of the step."""
    prefill_token_s: float = 1e-5
    """Seconds added per prompt token computed; tokens found in the prefix cache are free."""
    tp: int = 1
    communication_s: float = 0.0001
    """Seconds of communication per step and per rank beyond the first: what tensor parallelism costs."""
    slow_down: float = 1.0
    """Factor on every duration: 1.1 is an engine that is 10 % slower."""
    idle_slow_down: float = 1.0
    """The same once the engine has had nothing to do for `idle_s`: what an engine that does not stay warm is like."""
    idle_s: float = 600.0
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    num_gpu_blocks: int = 7680
    """KV blocks; one of them is never used, as in vLLM (its null block)."""
    block_size: int = 16
    """Tokens per KV block."""
    prefix_cache: bool = True
    """A leading prompt block seen before costs no prefill time. Blocks are not shared: KV use is without the cache."""
    launch_cv: float = 0.0
    """Coefficient of variation of the launch factor (lognormal, mean 1), drawn from `seed` and `launch`."""
    round_cv: float = 0.0
    """The same for the round factor, drawn from `seed`, `launch` and the round's number."""
    seed: int = 0
    launch: int = 0
    launch_factor: float | None = None
    """Fixes the launch factor instead of drawing it."""
    preemptions_per_round: int = 0
    """Preemptions that are counted at the start of each round though none happened."""

    def __post_init__(self) -> None:
        """Raise ValueError for a count that no engine can have."""
        for name in ("tp", "max_num_seqs", "max_num_batched_tokens", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.num_gpu_blocks < 2:
            raise ValueError(f"num_gpu_blocks must be at least 2 (one is never used), not {self.num_gpu_blocks}.")

    @property
    def kv_tokens(self) -> int:
        """Return how many tokens the KV cache holds as vLLM reports it: all blocks, the null block too."""
        return self.num_gpu_blocks * self.block_size

    def noise(self, round_index: int | None = None) -> float:
        """Return the noise factor of this launch, or with an index that of one of its rounds."""
        if round_index is None:
            if self.launch_factor is not None:
                return self.launch_factor
            return _lognormal(self.launch_cv, f"{self.seed}/{self.launch}")
        return _lognormal(self.round_cv, f"{self.seed}/{self.launch}/{round_index}")

    def step_duration_s(self, sequences: int, prefilled: int) -> float:
        """Return the seconds one step takes, without the noise factors."""
        compute_s = self.step_s + self.sequence_s * sequences + self.prefill_token_s * prefilled
        return (compute_s / self.tp + self.communication_s * (self.tp - 1)) * self.slow_down


def _lognormal(cv: float, seed: str) -> float:
    if cv <= 0:
        return 1.0
    sigma = math.sqrt(math.log1p(cv * cv))
    return Random(seed).lognormvariate(-sigma * sigma / 2, sigma)
