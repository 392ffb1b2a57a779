"""Many clients at once: throughput at each concurrency, fairness between requests, and what the server costs.

Record with `pytest examples/test_concurrent_requests.py --update-baselines`. Without vLLM on GPUs it runs on vLLM's CPU build,
with a small model that comes with the plugin.
"""

from __future__ import annotations

import pytest


@pytest.mark.llmperf(concurrency=[1, 4, 16])
def test_concurrency(llmperf, baseline):
    measured = llmperf(prompt_tokens=64, output_tokens=32, requests=48)
    assert measured == baseline
    # Requests of one kind are to be served alike: 1 is all at the same speed.
    assert measured["jain_fairness"] > 0.9


@pytest.mark.llmperf(rate=5)
def test_users_who_do_not_wait(llmperf, baseline):
    measured = llmperf(prompt_tokens="lognormal(64, 0.5, 256)", output_tokens=32, requests=60, slo={"ttft_s": 1.0, "e2e_s": 5.0})
    assert measured == baseline
    assert measured["goodput_ratio"] > 0.9


@pytest.mark.llmperf(concurrency=16)
def test_continuous_batching_serves_concurrent_requests_like_a_batch(llmperf):
    online = llmperf(prompt_tokens=64, output_tokens=32, requests=48)
    batch = llmperf(prompt_tokens=64, output_tokens=32, requests=48, engine="offline")
    print(online.limited_by(batch))
    assert online["output_tokens_per_s"] / batch["output_tokens_per_s"] > 0.25
