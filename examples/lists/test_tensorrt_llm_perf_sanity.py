"""TensorRT-LLM's aggregated perf-sanity list (NVIDIA/TensorRT-LLM, tests/scripts/perf-sanity/aggregated/*.yaml) as tests.

A server there is a row here, by file and name; each of its clients is a point of load: requests in flight, and as many times that
number of requests as the list has iterations. 174 entries (a client of a server) are here; not here are 17 whose server spans two
nodes. Their judge is a database of earlier runs; here it is a baseline. Other than there:

- Models are bundled shapes with dummy weights; `MOE=...` and the like name real ones. Shapes have no MTP layers and no draft
  model: speculation is n-grams, with as many drafted tokens. How many of them are accepted is forced there, and cannot be here.
- Attention DP over N GPUs is data parallelism of N with experts spread over all of them.
- FP4 and FP8 weights, attention and MoE kernels, AutoDeploy and the sizes of CUDA graphs are left to the engine, and the share of
  memory for the KV cache too: vLLM counts it of the whole GPU. Prompts are random, of the lengths that the data sets there have.
- Which GPU an entry is for is in its file's name; `@pytest.mark.llmperf(gpu="H200")` would demand it.
"""

from __future__ import annotations

import os

import pytest

MOE = os.environ.get("MOE", "qwen3-30b-a3b-shape")
LLAMA_8B = os.environ.get("LLAMA_8B", "llama-3.1-8b-shape")
LLAMA_70B = os.environ.get("LLAMA_70B", "llama-3.3-70b-shape")

K1_K1, K1_K8, K8_K1, K32_K8, K50_K2 = (1024, 1024), (1024, 8192), (8192, 1024), (32768, 8192), (50000, 2048)


def server(name, lengths, clients, *, tp=1, dp=1, ep=False, draft=0, batch=None, tokens=None, length=None, kv="fp8",
           reuse=False, model=MOE, spread=0.0, **workload):  # fmt: skip
    """Return a parameter: a server with its clients, as `{requests in flight: iterations}`.

    `spread` is the share by which lengths differ to both sides.
    """
    prompt, output = (f"uniform({n - int(n * spread)}, {n + int(n * spread)})" if spread else n for n in lengths)
    speculation = {"method": "ngram", "num_speculative_tokens": draft, "prompt_lookup_max": 4}
    arguments = {
        "max-num-seqs": batch,
        "max-num-batched-tokens": tokens,
        "max-model-len": length or int(sum(lengths) * (1 + spread)) + 64,
        "kv-cache-dtype": kv,
        "enable-prefix-caching": reuse,
        "enable-expert-parallel": True if ep or dp > 1 else None,
        "speculative-config": speculation if draft else None,
    }
    points = [{"concurrency": number, "requests": number * iterations} for number, iterations in clients.items()]
    marker = pytest.mark.llmperf(model=model, tp=tp, dp=dp, engine_args=arguments, points=points)
    return pytest.param({"prompt_tokens": prompt, "output_tokens": output} | workload, id=name, marks=marker)


def database(prefix, *rows, **common):
    """Return the servers of a configuration database: (lengths, requests in flight, GPUs, arguments that differ)."""
    return [
        server(
            f"{prefix}_{lengths[0]}_{lengths[1]}_conc{number}_gpu{gpus}", lengths, {number: 10},
            **({"dp": gpus} if own.pop("adp", False) else {"tp": gpus}), **(common | own),
        )
        for lengths, number, gpus, own in rows
    ]  # fmt: skip


DEEPSEEK, DEEPSEEK_FP4, GPT_OSS = "deepseek_ai_DeepSeek_R1_0528", "nvidia_DeepSeek_R1_0528_FP4_v2", "openai_gpt_oss_120b"
FILES = {
    "config_database_h200_sxm": [
        *database(
            DEEPSEEK,
            (K1_K1, 1, 8, {"batch": 512, "draft": 3, "tokens": 3136, "length": 2068}),
            (K1_K1, 32, 8, {"batch": 1024, "draft": 3, "tokens": 5248, "length": 2068}),
            (K1_K1, 2048, 8, {"batch": 512, "draft": 1, "tokens": 2112, "length": 2068, "adp": True}),
            (K1_K8, 1, 8, {"batch": 512, "draft": 3, "tokens": 3136, "length": 9416}),
            (K1_K8, 16, 8, {"batch": 512, "draft": 3, "tokens": 3136, "length": 9416}),
            (K1_K8, 512, 8, {"batch": 128, "draft": 1, "tokens": 1344, "length": 9416, "adp": True}),
            (K8_K1, 1, 8, {"batch": 512, "draft": 3, "tokens": 10304, "length": 9416}),
            (K8_K1, 16, 8, {"batch": 512, "draft": 3, "tokens": 10304, "length": 9416}),
            (K8_K1, 256, 8, {"batch": 512, "draft": 3, "tokens": 10304, "length": 9416}),
            ep=True,
        ),
        *database(
            GPT_OSS,
            (K1_K1, 4, 8, {"length": 2068}),
            (K1_K1, 64, 8, {"length": 2068}),
            (K1_K1, 2048, 8, {"batch": 256, "length": 2068, "adp": True}),
            (K1_K1, 128, 4, {"batch": 128, "length": 2068}),
            (K1_K1, 384, 4, {"batch": 384, "length": 2068}),
            (K1_K1, 1024, 4, {"batch": 1024, "length": 2068}),
            (K1_K8, 1, 8, {"batch": 1}),
            (K1_K8, 64, 8, {"batch": 64}),
            (K1_K8, 1280, 8, {"batch": 1280}),
            (K1_K8, 512, 4, {"batch": 512}),
            (K8_K1, 1, 8, {"batch": 1}),
            (K8_K1, 64, 8, {"batch": 64}),
            (K8_K1, 1536, 8, {"batch": 1536}),
            (K8_K1, 2, 4, {"batch": 2}),
            (K8_K1, 4, 4, {"batch": 4}),
            (K8_K1, 768, 4, {"batch": 768}),
            (K8_K1, 16, 2, {"batch": 8, "adp": True}),
            (K8_K1, 256, 2, {"batch": 256}),
            (K8_K1, 384, 2, {"batch": 384}),
            ep=True,
            tokens=20000,
            kv="auto",
        ),
    ],
    "config_database_b200_nvl": [
        *database(
            DEEPSEEK,
            (K1_K1, 1, 8, {"batch": 512, "draft": 3, "tokens": 3136, "length": 2068}),
            (K1_K1, 32, 8, {"batch": 512, "draft": 3, "tokens": 3136, "length": 2068}),
            (K1_K1, 2048, 8, {"batch": 512, "draft": 1, "tokens": 2112, "length": 2068, "adp": True}),
            (K1_K8, 1, 8, {"batch": 512, "draft": 3, "tokens": 3136, "length": 9416}),
            (K1_K8, 32, 8, {"batch": 512, "draft": 3, "length": 9416}),
            (K1_K8, 2048, 8, {"batch": 256, "draft": 1, "tokens": 3072, "length": 9416, "adp": True}),
            (K8_K1, 1, 8, {"batch": 512, "draft": 3, "tokens": 10304, "length": 9416}),
            (K8_K1, 32, 8, {"batch": 32, "draft": 3, "tokens": 8384, "length": 9472, "ep": False}),
            (K8_K1, 2048, 8, {"batch": 512, "draft": 1, "tokens": 9280, "length": 9416, "adp": True}),
            (K1_K1, 8, 4, {"length": 8192, "ep": False}),
            (K1_K1, 16, 4, {"length": 8192, "ep": False}),
            (K8_K1, 8, 4, {"tokens": 8320, "length": 9472, "ep": False}),
            (K8_K1, 16, 4, {"tokens": 8320, "length": 9472, "ep": False}),
            (K8_K1, 32, 4, {"tokens": 8320, "length": 9472, "ep": False}),
            ep=True,
        ),
        *database(
            DEEPSEEK_FP4,
            (K1_K1, 1, 8, {"batch": 512, "draft": 3, "length": 2068}),
            (K1_K1, 32, 8, {"batch": 32, "draft": 3, "tokens": 1216, "length": 2304}),
            (K1_K1, 2048, 8, {"batch": 512, "length": 2068, "adp": True}),
            (K1_K8, 1, 8, {"batch": 1024, "draft": 3, "tokens": 5248, "length": 9416}),
            (K1_K8, 32, 8, {"batch": 1024, "draft": 3, "tokens": 5248, "length": 9416}),
            (K1_K8, 1024, 8, {"batch": 256, "draft": 1, "length": 9416, "adp": True}),
            (K1_K8, 2048, 4, {"batch": 256, "draft": 1, "length": 9416, "adp": True}),
            (K8_K1, 1, 8, {"batch": 512, "draft": 3, "tokens": 10304, "length": 9416}),
            (K8_K1, 16, 8, {"batch": 512, "draft": 3, "tokens": 10304, "length": 9416}),
            (K8_K1, 512, 8, {"draft": 1, "tokens": 8768, "length": 9416, "adp": True}),
            (K8_K1, 4, 4, {"batch": 4, "draft": 3, "tokens": 8320, "length": 9472, "ep": False}),
            (K8_K1, 16, 4, {"batch": 16, "draft": 3, "tokens": 8320, "length": 9472, "ep": False}),
            (K8_K1, 2048, 4, {"batch": 256, "draft": 1, "tokens": 8768, "length": 9416, "adp": True}),
            (K1_K1, 4, 4, {"batch": 4, "draft": 3, "tokens": 1152, "length": 2304, "ep": False}),
            (K1_K1, 8, 4, {"batch": 8, "draft": 3, "tokens": 1152, "length": 2304, "ep": False}),
            (K1_K1, 256, 4, {"batch": 64, "draft": 1, "tokens": 1216, "length": 2304, "adp": True}),
            ep=True,
        ),
        *database(
            GPT_OSS,
            (K1_K1, 1, 8, {"batch": 1, "length": 2068}),
            (K1_K1, 384, 8, {"batch": 384, "length": 2068}),
            (K1_K1, 2048, 8, {"batch": 256, "length": 2068, "adp": True, "kv": "auto"}),
            (K1_K1, 8, 4, {"batch": 8, "length": 2068}),
            (K1_K1, 256, 4, {"batch": 256, "length": 2068}),
            (K1_K1, 1536, 4, {"batch": 1536, "length": 2068}),
            (K1_K8, 1, 8, {"batch": 1}),
            (K1_K8, 32, 8, {"batch": 32}),
            (K1_K8, 2048, 8, {"batch": 256, "adp": True, "kv": "auto"}),
            (K1_K8, 4, 2, {"batch": 4}),
            (K1_K8, 256, 2, {"batch": 256}),
            (K1_K8, 10, 4, {"batch": 10}),
            (K1_K8, 128, 4, {"batch": 128}),
            (K1_K8, 896, 4, {"batch": 896}),
            (K8_K1, 1, 4, {"batch": 1}),
            (K8_K1, 32, 4, {"batch": 32}),
            (K8_K1, 1792, 4, {"batch": 1792}),
            (K8_K1, 8, 8, {"batch": 8}),
            (K8_K1, 128, 8, {"batch": 128}),
            (K8_K1, 2048, 8, {}),
            (K8_K1, 768, 2, {"batch": 384, "adp": True}),
            (K8_K1, 1280, 2, {"batch": 640, "adp": True}),
            (K1_K1, 256, 1, {"batch": 512, "length": 2304, "ep": False}),
            (K8_K1, 4, 1, {"batch": 512, "length": 9472, "ep": False}),
            (K8_K1, 32, 1, {"batch": 512, "length": 9472, "ep": False}),
            (K8_K1, 256, 1, {"batch": 512, "length": 9472, "ep": False}),
            (K1_K1, 256, 2, {"batch": 512, "length": 2304, "adp": True}),
            ep=True,
            tokens=20000,
        ),
    ],
    "deepseek_r1_distill_qwen_32b_autodeploy_h100": [
        server("distill_qwen32b_autodeploy_1k1k", K1_K1, {64: 8}, batch=512, tokens=2048, length=2048, kv="auto", model=LLAMA_8B),
    ],
    "deepseek_r1_fp4_v2_blackwell": [
        server("r1_fp4_v2_tp4_mtp3_1k1k", K1_K1, {2: 10}, tp=4, draft=3, batch=4, tokens=8192),
        server("r1_fp4_v2_dep8_mtp1_1k1k", K1_K1, {1024: 10}, dp=8, draft=1, batch=128, tokens=8192),
        server("r1_fp4_v2_tp4_mtp3_8k1k", K8_K1, {4: 10}, tp=4, draft=3, batch=4, tokens=12288),
        server("r1_fp4_v2_dep8_mtp1_8k1k", K8_K1, {256: 10}, dp=8, draft=1, batch=32, tokens=12288),
    ],
    "deepseek_r1_fp4_v2_grace_blackwell": [
        server("r1_fp4_v2_dep4_mtp1_1k1k", K1_K1, {1024: 10}, dp=4, draft=1, batch=512, tokens=8192),
        server("r1_fp4_v2_tep4_mtp3_1k1k", K1_K1, {32: 10}, tp=4, ep=True, draft=3, batch=32, tokens=8192),
        server("r1_fp4_v2_tp4_mtp3_1k1k", K1_K1, {2: 10}, tp=4, draft=3, batch=4, tokens=8192),
        server("r1_fp4_v2_dep4_mtp1_8k1k", K8_K1, {256: 10}, dp=4, draft=1, batch=512, tokens=12288),
        server("r1_fp4_v2_tep4_mtp3_8k1k", K8_K1, {32: 10}, tp=4, ep=True, draft=3, batch=32, tokens=12288),
        server("r1_fp4_v2_tp4_mtp3_8k1k", K8_K1, {2: 10}, tp=4, draft=3, batch=4, tokens=12288),
        server("r1_fp4_v2_dep4_mtp1_1k8k", K1_K8, {2048: 5}, dp=4, draft=1, batch=512, tokens=12288),
        server("r1_fp4_v2_tep4_mtp3_1k8k", K1_K8, {32: 10}, tp=4, ep=True, draft=3, batch=32, tokens=12288),
        server("r1_fp4_v2_tp4_mtp3_1k8k", K1_K8, {4: 10}, tp=4, draft=3, batch=4, tokens=12288),
    ],
    "deepseek_r1_fp8_ad_blackwell": [server("r1_fp8_ad_ws8_1k1k", K1_K1, {64: 10}, tp=8, kv="auto")],
    "deepseek_r1_fp8_blackwell": [
        server("r1_fp8_tp8_mtp3_1k1k", K1_K1, {4: 10}, tp=8, draft=3, batch=8, tokens=8192),
        server("r1_fp8_dep8_mtp1_1k1k", K1_K1, {1024: 10}, dp=8, draft=1, batch=128, tokens=8192),
        server("r1_fp8_tp8_mtp3_8k1k", K8_K1, {4: 10}, tp=8, draft=3, batch=8, tokens=12288),
        server("r1_fp8_dep8_mtp1_8k1k", K8_K1, {256: 10}, dp=8, draft=1, batch=32, tokens=12288),
        server("r1_fp8_tp8_6k1k", (6144, 1024), {64: 10}, tp=8, batch=512, tokens=8192, spread=0.2),
    ],
    "deepseek_v32_fp4_blackwell": [
        server("v32_fp4_tep8_mtp3_8k1k", K8_K1, {2: 10}, tp=8, ep=True, draft=3, batch=4, tokens=12288),
        server("v32_fp4_dep8_mtp1_8k1k", K8_K1, {256: 10}, dp=8, draft=1, batch=32, tokens=12288),
    ],
    "deepseek_v32_fp4_grace_blackwell": [
        server("v32_fp4_tep4_mtp3_1k1k", K1_K1, {2: 10}, tp=4, ep=True, draft=3, batch=4, tokens=8192),
        server("v32_fp4_dep4_mtp1_1k1k", K1_K1, {1024: 10}, dp=4, draft=1, batch=256, tokens=8192),
        server("v32_fp4_tep4_mtp3_8k1k", K8_K1, {2: 10}, tp=4, ep=True, draft=3, batch=4, tokens=12288),
        server("v32_fp4_dep4_mtp1_8k1k", K8_K1, {256: 10}, dp=4, draft=1, batch=64, tokens=12288),
    ],
    "deepseek_v41_flash_grace_blackwell": [
        server("v41_flash_tep4_8k1k", K8_K1, {8: 10}, tp=4, ep=True, batch=8, tokens=8192, length=9344, kv="auto"),
        server("v41_flash_dep4_8k1k", K8_K1, {128: 5}, dp=4, batch=32, tokens=8192, length=9344, kv="auto"),
        server(
            "v41_flash_tep4_dspark_8k1k", K8_K1, {8: 10}, tp=4, ep=True, draft=5, batch=8, tokens=8192, length=9344, kv="auto"
        ),
    ],
    "dynamo_gpt_oss_120b_fp4_blackwell": [
        server("gpt_oss_fp4_tep4_adp_cutlass_1k1k", K1_K1, {128: 10}, dp=4, batch=800, tokens=20000),
        server("gpt_oss_fp4_tep4_adp_cutlass_8k1k", K8_K1, {128: 10}, dp=4, batch=800, tokens=20000),
    ],
    "dynamo_k25_thinking_fp4_blackwell": [
        server("k25_thinking_fp4_tep8_adp_2k1k", (2048, 1024), {128: 5}, dp=8, batch=128, tokens=8448, length=8212, reuse=True),
    ],
    "dynamo_qwen3_235b_a22b_fp8_hopper": [
        server(
            "qwen3_235b_a22b_fp8_tp4_ep4_cutlass_8k1k",
            (7168, 1024),
            {128: 10},
            tp=4,
            ep=True,
            batch=128,
            tokens=8192,
            length=8192,
            kv="auto",
            reuse=True,
        ),
    ],
    "dynamo_qwen3_32b_fp8_hopper": [
        server("qwen3_32b_fp8_tp2_6k1k", (6912, 1024), {96: 10}, tp=2, batch=96, tokens=7964, length=7964, model=LLAMA_8B),
    ],
    "gb300_nemotron_ultra_v3_fp4_grace_blackwell": [
        server("nemotron_ultra_v3_fp4_tep4_mtp6_50k2k", K50_K2, {1: 4}, tp=4, draft=6, batch=1, tokens=50048, length=52096),
        server("nemotron_ultra_v3_fp4_dep4_mtp3_50k2k", K50_K2, {128: 4}, dp=4, draft=3, batch=32, tokens=50176, length=52096),
        server("nemotron_ultra_v3_fp4_dep4_mtp0_50k2k", K50_K2, {512: 4}, dp=4, batch=128, tokens=50128, length=52096),
    ],
    "gemma4_26b_a4b_nvfp4_blackwell": [
        server("gemma4_26b_a4b_nvfp4_tp1_1k1k", (1000, 1000), {64: 3}, batch=256, api="chat"),
    ],
    "glm5_fp4_blackwell": [
        server("glm5_fp4_tep8_mtp3_8k1k", K8_K1, {2: 10}, tp=8, ep=True, draft=3, batch=4, tokens=256),
        server("glm5_fp4_dep8_mtp1_8k1k", K8_K1, {2: 10}, dp=8, draft=1, batch=64, tokens=12288),
    ],
    "glm5_fp4_grace_blackwell": [
        server("glm5_fp4_tep4_mtp3_1k1k", K1_K1, {2: 10}, tp=4, ep=True, draft=3, batch=4, tokens=1024),
        server("glm5_fp4_dep4_mtp1_1k1k", K1_K1, {2: 10}, dp=4, draft=1, batch=256, tokens=8192),
    ],
    "gpt_oss_120b_fp4_blackwell": [
        server("gpt_oss_fp4_tp1_eagle3_startup", (16, 1), {1: 1}, draft=3, batch=1, tokens=256),
        server("gpt_oss_fp4_tp2_mtp0_1k1k", K1_K1, {4: 10}, tp=2, batch=512, tokens=20000),
        server("gpt_oss_fp4_tp1_mtp0_1k1k", K1_K1, {256: 10}, batch=512, tokens=20000),
        server("gpt_oss_fp4_tp1_mtp0_8k1k", K8_K1, {4: 10, 256: 10}, batch=512, tokens=20000),
    ],
    "gpt_oss_120b_fp4_grace_blackwell": [
        server("gpt_oss_fp4_dep4_1k8k", K1_K8, {2560: 5}, dp=4, batch=640, tokens=20000),
        server("gpt_oss_fp4_dep2_1k1k", K1_K1, {2048: 5}, dp=2, batch=1024, tokens=20000),
        server("gpt_oss_fp4_tep2_1k8k", K1_K8, {128: 10}, tp=2, ep=True, batch=128, tokens=20000),
        server("gpt_oss_fp4_tp2_1k8k", K1_K8, {8: 10}, tp=2, batch=8, tokens=20000),
        server("gpt_oss_fp4_tp4_eagle3_1k1k", K1_K1, {1: 32}, tp=4, draft=3, batch=1, tokens=20000),
        server("gpt_oss_fp4_tp2_mtp0_1k1k", K1_K1, {4: 10}, tp=2, batch=512, tokens=20000),
        server("gpt_oss_fp4_tp1_mtp0_1k1k", K1_K1, {256: 10}, batch=512, tokens=20000),
        server("gpt_oss_fp4_tp1_mtp0_8k1k", K8_K1, {4: 10, 256: 10}, batch=512, tokens=20000),
    ],
    "host_perf_deepseek_v3_lite": [
        server("v3lite_fp8_bs1_128_128", (128, 128), {1: 200}, batch=1, tokens=256, kv="auto", reuse=True),
        server("v3lite_fp8_bs8_128_256", (128, 256), {8: 200}, batch=8, tokens=2048, kv="auto", reuse=True),
    ],
    "host_perf_llama8b_spec_decode": [
        server(
            "llama8b_spec_bs1_128_128", (128, 128), {1: 200}, draft=3, batch=4, tokens=1024, kv="auto", reuse=True, model=LLAMA_8B
        ),
        server(
            "llama8b_spec_bs8_128_128",
            (128, 128),
            {8: 200},
            draft=3,
            batch=16,
            tokens=4096,
            kv="auto",
            reuse=True,
            model=LLAMA_8B,
        ),
    ],
    "k25_thinking_fp4_blackwell": [
        server("k25_thinking_fp4_tep8_8k1k", K8_K1, {2: 5}, tp=8, ep=True, batch=4, tokens=12288),
        server("k25_thinking_fp4_dep8_8k1k", K8_K1, {512: 5}, dp=8, batch=64, tokens=12288),
        server("k25_thinking_fp4_tep8_32k8k", K32_K8, {2: 5}, tp=8, ep=True, batch=4, tokens=8192),
        server("k25_thinking_fp4_dep8_32k8k", K32_K8, {128: 5}, dp=8, batch=32, tokens=8192),
    ],
    "k25_thinking_fp4_grace_blackwell": [
        server("k25_thinking_fp4_tep4_8k1k", K8_K1, {2: 10}, tp=4, ep=True, batch=4, tokens=12288),
        server("k25_thinking_fp4_dep4_8k1k", K8_K1, {256: 10}, dp=4, batch=64, tokens=12288),
    ],
    "k2_thinking_fp4_blackwell": [
        server("k2_thinking_fp4_tep8_8k1k", K8_K1, {2: 10}, tp=8, ep=True, batch=4, tokens=12288),
        server("k2_thinking_fp4_dep8_8k1k", K8_K1, {512: 10}, dp=8, batch=64, tokens=12288),
        server("k2_thinking_fp4_tep8_32k8k", K32_K8, {2: 10}, tp=8, ep=True, batch=4, tokens=8192),
        server("k2_thinking_fp4_dep8_32k8k", K32_K8, {128: 10}, dp=8, batch=32, tokens=8192),
    ],
    "k2_thinking_fp4_grace_blackwell": [
        server("k2_thinking_fp4_tep4_8k1k", K8_K1, {2: 10}, tp=4, ep=True, batch=4, tokens=12288),
        server("k2_thinking_fp4_dep4_8k1k", K8_K1, {256: 10}, dp=4, batch=64, tokens=12288),
    ],
    "llama3_1_8b_fp8_ad_hopper": [server("llama3_1_8b_ad_ws1_1k1k", K1_K1, {256: 10}, kv="auto", model=LLAMA_8B)],
    "llama_v3_3_70b_instruct_fp4_blackwell": [
        server("llama70b_fp4_tp4_512_32", (512, 32), {512: 10}, tp=4, batch=512, tokens=2048, kv="auto", model=LLAMA_70B),
        server("llama70b_fp4_tp4_1000_1000", (1000, 1000), {512: 10}, tp=4, batch=1024, tokens=4096, kv="auto", model=LLAMA_70B),
    ],
    "nemotron_ultra_v3_fp4_grace_blackwell": [
        server("nemotron_ultra_v3_fp4_tep4_mtp6_50k2k", K50_K2, {1: 4}, tp=4, draft=6, batch=1, tokens=50048, length=52096),
        server("nemotron_ultra_v3_fp4_dep4_mtp3_50k2k", K50_K2, {128: 4}, dp=4, draft=3, batch=32, tokens=50176, length=52096),
        server("nemotron_ultra_v3_fp4_dep4_mtp0_50k2k", K50_K2, {512: 4}, dp=4, batch=128, tokens=50128, length=52096),
    ],
    "qwen3_5_397b_fp4_blackwell": [
        server("qwen3_5_397b_fp4_tep8_1k1k", K1_K1, {4: 5}, tp=8, ep=True, batch=512, tokens=16384),
        server("qwen3_5_397b_fp4_dep4_1k1k", K1_K1, {1024: 5}, dp=4, batch=256, tokens=16384),
        server("qwen3_5_397b_fp4_tp2_mtp3_1k1k", K1_K1, {8: 5}, tp=2, draft=3, batch=8, tokens=16384),
        server("qwen3_5_397b_fp4_dep8_mtp3_1k1k", K1_K1, {128: 5}, dp=8, draft=3, batch=16, tokens=16384),
        server("qwen3_5_397b_fp4_tp4_8k1k", K8_K1, {4: 5}, tp=4, batch=512, tokens=32768),
        server("qwen3_5_397b_fp4_dep8_8k1k", K8_K1, {1024: 5}, dp=8, batch=128, tokens=32768),
        server("qwen3_5_397b_fp4_tep4_mtp3_8k1k", K8_K1, {4: 5}, tp=4, ep=True, draft=3, batch=4, tokens=32768),
        server("qwen3_5_397b_fp4_dep8_mtp3_8k1k", K8_K1, {256: 5}, dp=8, draft=3, batch=32, tokens=32768),
    ],
    "super_ad_blackwell": [server("super_ad_ws4_1k1k", K1_K1, {64: 10}, tp=4, batch=384, length=65536, kv="auto")],
    "super_mtp_ad_blackwell": [server("super_mtp_ad_ws4_1k1k", K1_K1, {32: 10}, tp=4, kv="auto")],
    "super_mtp_ad_nvfp4_blackwell": [server("super_mtp_ad_nvfp4_ws4_1k1k", K1_K1, {32: 10}, tp=4, kv="auto")],
}
ENTRIES = [
    pytest.param(*entry.values, id=f"{file}-{entry.id}", marks=entry.marks)
    for file, entries in FILES.items()
    for entry in entries
]


# Where more requests are sent than the engine has places for, the first token mostly waits for others.
@pytest.mark.parametrize("workload", ENTRIES)
@pytest.mark.llmperf(gate={"ttft_p50_s": "20 %"})
def test_perf_sanity(workload, llmperf, baseline):
    assert llmperf(**workload) == baseline
