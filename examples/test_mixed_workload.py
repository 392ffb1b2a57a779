"""Long and short requests together: each class has latencies of its own, and short requests must not wait for long ones.

Chunked prefill is what keeps them from it, so everything is measured with and without it, each with baselines of its own.
"""

from __future__ import annotations

import pytest

SHORT = {"prompt_tokens": 32, "output_tokens": 16}
LONG = {"prompt_tokens": 768, "output_tokens": 16}


@pytest.mark.parametrize(
    "prefill",
    [
        pytest.param("chunked", marks=pytest.mark.llmperf(engine_args="--enable-chunked-prefill --max-num-batched-tokens 256")),
        pytest.param("whole", marks=pytest.mark.llmperf(engine_args="--no-enable-chunked-prefill --max-num-batched-tokens 2048")),
    ],
)
@pytest.mark.llmperf(concurrency=8)
def test_short_requests_among_long_ones(prefill, llmperf, baseline):
    alone = llmperf(**SHORT, requests=48)
    mixed = llmperf(classes={"short": SHORT | {"share": 5}, "long": LONG | {"share": 1}}, requests=48)
    assert mixed == baseline
    slow_down = mixed["short/e2e_p50_s"] / alone["e2e_p50_s"]
    assert slow_down < 20, f"with {prefill} prefill short requests take {slow_down:.1f} times as long with long ones around"
