"""Tensor parallelism at each degree: the model loads and answers, the GPUs hold alike, and it is as fast as its baseline.

Record with `pytest examples/test_tensor_parallel.py --llmperf-model=qwen2.5-7b-shape --update-baselines`: a real shape that comes
with the plugin, without weights. Without `--llmperf-model` it is a small model, which vLLM's CPU build runs too, a rank per core.
"""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.llmperf(tp=[1, 2, 4])


@pytest.fixture
def llm_workload(llm_engine, llmperf_axes):
    """Return what every test of this file sends: some waves of requests, which are short on CPU."""
    prompt_tokens, output_tokens = (512, 128) if llm_engine.gpus else (64, 16)
    requests = max(8, min(4 * llmperf_axes.concurrency, 512))
    return {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens, "requests": requests}


def test_it_loads_and_answers(llm_engine):
    answer = llm_engine.generate("The capital of France is", max_tokens=8)
    assert answer.output_tokens > 0


# Unequal memory means that the model was not split. With one GPU there is nothing to compare, and CPUs have none: skipped there.
@pytest.mark.llmperf(tp=[2, 4], min_gpus=2)
def test_every_gpu_holds_as_much(llmperf):
    measured = llmperf()
    assert measured.gpu_memory.is_equal(rel=0.02)


# So many at once wait for each other: the time to the first token is mostly queueing, and differs more between launches.
@pytest.mark.llmperf(concurrency=[1, 16, 64, 256], gate={"ttft_p50_s": "20 %"})
def test_it_is_as_fast_as_its_baseline(llmperf, baseline):
    measured = llmperf()
    assert measured == baseline
    # The KV cache has room for all of them: no request was put back to make room for another one.
    assert measured.preemptions == 0


# `vllm.LLM` without a server: what the engine itself gives. Where the server gives far less, HTTP is the limit and not the GPU.
@pytest.mark.llmperf(engine="offline", concurrency=[1, 16, 64, 256], gate={"ttft_p50_s": "20 %"})
def test_the_engine_alone_is_as_fast_as_its_baseline(llmperf, baseline):
    assert llmperf() == baseline
