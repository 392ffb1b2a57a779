"""One workload on two engines whose arguments differ: what the difference brings is asserted, and each has a baseline of its own.

The test's own engine is the marker's; `llmperf(..., engine_args=...)` starts the other one in its place. Record with
`pytest examples/test_engine_arguments.py --update-baselines`.
"""

from __future__ import annotations

import pytest

CHATS = {"prompt_tokens": 32, "output_tokens": 16, "prefix_tokens": 768, "prefixes": 2, "requests": 48}
"""Long system prompts, which many users share."""


@pytest.mark.llmperf(concurrency=8, engine_args="--no-enable-prefix-caching")
def test_prefix_caching_pays(llmperf, baseline):
    without = llmperf(**CHATS)
    cached = llmperf(**CHATS, engine_args="--enable-prefix-caching")
    assert cached == baseline
    speed_up = without["ttft_p50_s"] / cached["ttft_p50_s"]
    assert speed_up > 1.5, f"with a prefix cache the first token comes {speed_up:.2f} times as fast"


@pytest.mark.llmperf(concurrency=16)
def test_a_larger_batch_pays(llmperf, baseline):
    small = llmperf(prompt_tokens=32, output_tokens=32, requests=48, engine_args={"max_num_seqs": 4})
    large = llmperf(prompt_tokens=32, output_tokens=32, requests=48, engine_args={"max_num_seqs": 16})
    assert small == baseline
    assert large == baseline
    assert large["output_tokens_per_s"] > 1.2 * small["output_tokens_per_s"]
