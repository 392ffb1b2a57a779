"""What vLLM-Omni's performance list asks for as text (vllm-project/vllm-omni, tests/dfx/perf/tests/*.json) as tests.

15 entries there want nothing but text as the answer. 4 of them send text too: these are here, with 12 points of load. Each pairs
a number of requests in flight with its number of requests and its limits, which are the list's own: mean TTFT and mean E2E, for
all accelerators or for H100 alone. They were chosen for the real models; how near a shape with dummy weights comes is not known.

Not here: 11 entries whose prompts hold images, video or audio; and whatever answers in sound, of which there is no text to time.
Of the engine's arguments `--async-chunk` is left out: it is about the stages behind the text.
"""

from __future__ import annotations

import os

import pytest

QWEN3_OMNI = os.environ.get("QWEN3_OMNI", "qwen3-30b-a3b-shape")  # the part of it that thinks and writes
MINICPM_O = os.environ.get("MINICPM_O", "llama-3.1-8b-shape")
TEXT = {"modalities": ["text"]}
ENGINE = "--max-model-len 4096"


def ladder(requests, **limits):
    """Return a point for each concurrency, with its number of requests and, in order, its limits in seconds."""
    return [
        {"concurrency": concurrency, "requests": number, "limits": {name: values[place] for name, values in limits.items()}}
        for place, (concurrency, number) in enumerate(requests.items())
    ]


def on_h100(points):
    """Return points whose limits are those of one accelerator."""
    return [point | {"limits": {"H100": point["limits"]}} for point in points]


@pytest.mark.llmperf(
    model=QWEN3_OMNI,
    engine_args=f"{ENGINE} --no-enable-prefix-caching",
    points=ladder(
        {1: 4, 4: 16, 8: 32, 16: 64, 32: 128},
        ttft_mean_s=[0.3, 0.3, 1.1, 0.6, 0.8],
        e2e_mean_s=[6, 8, 11, 13, 17],
    ),
)
def test_qwen3_omni_vllm_text(llmperf):
    sampling = {"temperature": 0.4, "top_p": 0.9, "top_k": 1, "repetition_penalty": 1.05}
    measured = llmperf(prompt_tokens=2500, output_tokens=900, seed=42, extra_body=TEXT | sampling)
    assert not measured.broken_limits()


@pytest.mark.llmperf(
    model=QWEN3_OMNI,
    engine_args=ENGINE,
    points=on_h100(ladder({1: 4, 8: 32, 32: 128}, e2e_mean_s=[4.3548945, 9.8611687, 18.716709])),
)
def test_qwen3_omni_chunk_cuda(llmperf):
    measured = llmperf(prompt_tokens=100, output_tokens=100, api="chat", extra_body=TEXT)
    assert not measured.broken_limits()


@pytest.mark.llmperf(
    model=QWEN3_OMNI,
    engine_args=ENGINE,
    points=on_h100(ladder({1: 4, 8: 32, 32: 128}, e2e_mean_s=[4.3548945, 9.8611687, 18.716709])),
)
def test_qwen3_omni_chunk_cuda_weekly(llmperf):
    measured = llmperf(prompt_tokens=2500, output_tokens=900, api="chat", extra_body=TEXT)
    assert not measured.broken_limits()


# The list gives no limits here: a baseline of one's own judges.
@pytest.mark.llmperf(model=MINICPM_O, engine_args=ENGINE, points=ladder({1: 4}))
def test_minicpm_o_4_5_latency_text_no_tts(llmperf, baseline):
    assert llmperf(prompt_tokens=2500, output_tokens=400, api="chat", extra_body=TEXT) == baseline
