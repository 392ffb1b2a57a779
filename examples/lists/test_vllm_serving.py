"""vLLM's own serving list (vllm-project/vllm, .buildkite/performance-benchmarks/tests/serving-tests.json) as tests.

Each entry there is a test here, by the same name: 7 entries at 7 numbers of requests in flight, 49 points. `--request-rate inf
--max-concurrency N` is a closed loop: `concurrency`. What the list leaves to a dashboard, a baseline judges. Other than there:

- Models are bundled shapes with dummy weights; `LLAMA_8B=meta-llama/Llama-3.1-8B-Instruct` and the like take the real ones.
- `serving_llama70B_tp4_random_128_128` has its TP 4 from its name: the list itself leaves it to the default, 1.
- Gemma's parsers of tools and reasoning are left out: they look for words that dummy weights do not say.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

LLAMA_8B = os.environ.get("LLAMA_8B", "llama-3.1-8b-shape")
LLAMA_70B = os.environ.get("LLAMA_70B", "llama-3.3-70b-shape")
GEMMA_E4B = os.environ.get("GEMMA_E4B", "qwen2.5-7b-shape")  # the nearest in size
SHAREGPT = Path(__file__).with_name("ShareGPT_V3_unfiltered_cleaned_split.json")

pytestmark = pytest.mark.llmperf(
    model=LLAMA_8B,
    tp=1,
    engine_args="--dtype bfloat16 --max-model-len 4160",
    points=[{"concurrency": number, "requests": 200} for number in (12, 16, 24, 32, 64, 128, 200)],
    # With so many at once the first token mostly waits for others.
    gate={"ttft_p50_s": "20 %"},
)


@pytest.fixture
def llm_workload():
    return {"extra_body": {"temperature": 0}}


@pytest.mark.skipif(not SHAREGPT.is_file(), reason=f"put {SHAREGPT.name} beside this file")
def test_serving_llama8B_tp1_sharegpt(llmperf, baseline):  # noqa: N802
    # As the list's client does it: each answer as long as the recorded one, prompts of 1,024 tokens at most.
    assert llmperf(dataset=SHAREGPT.name, output_tokens="dataset", max_prompt_tokens=1024) == baseline


def test_serving_llama8B_tp1_random_128_128(llmperf, baseline):  # noqa: N802
    assert llmperf(prompt_tokens=128, output_tokens=128) == baseline


def test_serving_llama8B_tp1_random_128_2048(llmperf, baseline):  # noqa: N802
    assert llmperf(prompt_tokens=128, output_tokens=2048) == baseline


def test_serving_llama8B_tp1_random_2048_128(llmperf, baseline):  # noqa: N802
    assert llmperf(prompt_tokens=2048, output_tokens=128) == baseline


def test_serving_llama8B_tp1_random_2048_2048(llmperf, baseline):  # noqa: N802
    assert llmperf(prompt_tokens=2048, output_tokens=2048) == baseline


@pytest.mark.llmperf(
    model=LLAMA_70B,
    tp=4,
    engine_args="--dtype bfloat16 --async-scheduling --no-enable-prefix-caching --max-num-batched-tokens 8192",
)
def test_serving_llama70B_tp4_random_128_128(llmperf, baseline):  # noqa: N802
    assert llmperf(prompt_tokens=128, output_tokens=128) == baseline


@pytest.mark.llmperf(model=GEMMA_E4B)
def test_serving_gemma4_e4b_tp1_random_128_128(llmperf, baseline):
    assert llmperf(prompt_tokens=128, output_tokens=128) == baseline
