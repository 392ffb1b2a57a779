"""How each engine names what it tells: one table of rows, from the newest release to the oldest, and what its rows come to.

A row says what one name means: in which unit, and what its labels count per. Names that differ only in how they were exported
are one name here: a counter with or without `_total`, and vLLM's and SGLang's through Ray (`ray_vllm_x`, `ray_vllm:x`,
`vllm_x`), which forbids colons.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from pytest_llmperf.measure.exposition import Scrape, Series

Feature = Literal[
    "preemptions", "prompt_tokens", "output_tokens", "prefix_hits", "external_hits", "accepted_tokens", "drafts", "requests",
    "kv_usage", "running", "kv_tokens", "kv_blocks", "block_tokens",
]  # fmt: skip
COUNTERS: tuple[Feature, ...] = (
    "preemptions", "prompt_tokens", "output_tokens", "prefix_hits", "external_hits", "accepted_tokens", "drafts", "requests",
)  # fmt: skip
"""Features that only grow; the others are gauges."""
_RANKS = frozenset({"tp_rank", "pp_rank", "moe_ep_rank", "ep_rank"})
"""Labels of ranks that run the same requests together: each counts all of them, and their sum would count them twice.
SGLang's schedulers have them (`--enable-metrics-for-all-schedulers`). Whatever else labels tell apart is summed: engine cores,
data-parallel ranks, replicas, models, finished reasons, tiers of a cache."""


@dataclass(frozen=True)
class Row:
    """One name by which an engine tells a feature."""

    software: str
    feature: Feature
    name: str
    unit: Literal["", "blocks", "help"] = ""
    """`blocks`: of a KV cache, to be multiplied by their size; `help`: as the answer's own HELP says, blocks or tokens."""
    where: tuple[str, str] | None = None
    """A label and its value: only such series count."""
    ranks: Literal["max", "min"] = "max"
    """What joins the ranks of one engine core."""
    proves: str = ""
    """A name whose presence proves that this release has the counter, though it is not exported before its first event."""


_RAY_PROOF = "vllm:prompt_tokens_total"
TABLE: tuple[Row, ...] = (
    # vLLM. github.com/vllm-project/vllm: vllm/v1/metrics/loggers.py, at 0.8.0, 0.10.0 and 0.32.0; vllm/engine/metrics.py (V0) had
    # the same names for all but prefix hits, of which it told a rate alone (gpu_prefix_cache_hit_rate), and a rate is no count.
    # Through Ray a counter that is 0 is not exported (vllm/v1/metrics/ray_wrappers.py), hence the proof.
    Row("vllm", "preemptions", "vllm:num_preemptions_total", proves=_RAY_PROOF),
    Row("vllm", "prompt_tokens", "vllm:prompt_tokens_total"),
    Row("vllm", "output_tokens", "vllm:generation_tokens_total"),
    Row("vllm", "prefix_hits", "vllm:prefix_cache_hits_total", "help", proves=_RAY_PROOF),
    # Until 0.9 (vllm#18354); in 0.8 in blocks, in 0.9 in tokens, as its HELP says.
    Row("vllm", "prefix_hits", "vllm:gpu_prefix_cache_hits_total", "help"),
    # KV connectors (LMCache, NIXL, Mooncake): tokens that came from outside of this engine, beside the local hits.
    Row("vllm", "external_hits", "vllm:external_prefix_cache_hits_total"),
    # vllm/v1/spec_decode/metrics.py
    Row("vllm", "accepted_tokens", "vllm:spec_decode_num_accepted_tokens_total"),
    Row("vllm", "drafts", "vllm:spec_decode_num_drafts_total"),
    # Requests that are over, one series for each reason why.
    Row("vllm", "requests", "vllm:request_success_total"),
    Row("vllm", "kv_usage", "vllm:kv_cache_usage_perc"),
    Row("vllm", "kv_usage", "vllm:gpu_cache_usage_perc"),  # until 0.9
    Row("vllm", "running", "vllm:num_requests_running"),
    # LMCache in the engine's process: lmcache/observability.py; as a server of its own (lmcache_mp_): its docs, observability.
    Row("lmcache", "external_hits", "lmcache:num_hit_tokens_total"),
    Row("lmcache", "external_hits", "lmcache_mp_lookup_hit_tokens_total"),
    # SGLang. github.com/sgl-project/sglang: python/sglang/srt/metrics/collector.py (since 2026 srt/observability). Its processes
    # share a folder, where a counter begins to exist with its first event; max_total_num_tokens is younger than all of these.
    Row("sglang", "preemptions", "sglang:num_retracted_requests_total", proves="sglang:max_total_num_tokens"),
    Row("sglang", "prompt_tokens", "sglang:prompt_tokens_total", proves="sglang:max_total_num_tokens"),
    Row("sglang", "output_tokens", "sglang:generation_tokens_total", proves="sglang:max_total_num_tokens"),
    Row("sglang", "prefix_hits", "sglang:cached_tokens_total", proves="sglang:max_total_num_tokens"),
    Row("sglang", "requests", "sglang:num_requests_total", proves="sglang:max_total_num_tokens"),
    Row("sglang", "kv_usage", "sglang:token_usage"),
    Row("sglang", "running", "sglang:num_running_reqs"),
    Row("sglang", "kv_tokens", "sglang:max_total_num_tokens", ranks="min"),
    # TGI. huggingface.co/docs/text-generation-inference/reference/metrics: histograms, of which the sums are the tokens.
    Row("tgi", "prompt_tokens", "tgi_request_input_length_sum"),
    Row("tgi", "output_tokens", "tgi_request_generated_tokens_sum"),
    Row("tgi", "requests", "tgi_request_success"),
    Row("tgi", "running", "tgi_batch_current_size"),
    # llama.cpp. github.com/ggml-org/llama.cpp: tools/server/README.md, GET /metrics; hits and drafts since 2026, the usage of the
    # KV cache until 2025.
    Row("llama.cpp", "prompt_tokens", "llamacpp:prompt_tokens_total"),
    Row("llama.cpp", "output_tokens", "llamacpp:tokens_predicted_total"),
    Row("llama.cpp", "prefix_hits", "llamacpp:prompt_tokens_cached_total"),
    Row("llama.cpp", "accepted_tokens", "llamacpp:spec_decode_num_accepted_tokens_total"),
    Row("llama.cpp", "drafts", "llamacpp:spec_decode_num_drafts_total"),
    Row("llama.cpp", "kv_usage", "llamacpp:kv_cache_usage_ratio"),
    Row("llama.cpp", "running", "llamacpp:requests_processing"),
    # TensorRT-LLM. github.com/NVIDIA/TensorRT-LLM: tensorrt_llm/metrics/collector.py; trtllm-serve has them under
    # /prometheus/metrics, Dynamo under /metrics, in 2025 as `trtllm:`. Until 1.1 only latencies and counts of requests.
    Row("tensorrt-llm", "prompt_tokens", "trtllm_prompt_tokens_total"),
    Row("tensorrt-llm", "output_tokens", "trtllm_generation_tokens_total"),
    Row("tensorrt-llm", "requests", "trtllm_request_success_total"),
    Row("tensorrt-llm", "prefix_hits", "trtllm_prompt_cached_tokens_total"),
    Row("tensorrt-llm", "prefix_hits", "trtllm_kv_cache_reused_blocks_total", "blocks"),
    Row("tensorrt-llm", "kv_usage", "trtllm_kv_cache_utilization"),
    Row("tensorrt-llm", "running", "trtllm_num_requests_running"),
    Row("tensorrt-llm", "kv_blocks", "trtllm_kv_cache_max_blocks", ranks="min"),
    Row("tensorrt-llm", "block_tokens", "trtllm_kv_cache_tokens_per_block"),
    # Triton in front of TensorRT-LLM. github.com/triton-inference-server/tensorrtllm_backend: README.md, Triton Metrics.
    Row("tensorrt-llm", "kv_usage", "nv_trt_llm_kv_cache_block_metrics", where=("kv_cache_block_type", "fraction")),
    Row("tensorrt-llm", "running", "nv_trt_llm_request_metrics", where=("request_type", "scheduled")),
    Row("tensorrt-llm", "kv_blocks", "nv_trt_llm_kv_cache_block_metrics", where=("kv_cache_block_type", "max"), ranks="min"),
    Row("tensorrt-llm", "block_tokens", "nv_trt_llm_kv_cache_block_metrics", where=("kv_cache_block_type", "tokens_per")),
)
VLLM_CACHE = "vllm:cache_config_info"
"""A gauge of 1 whose labels say how the KV cache is laid out; its size in tokens since 0.27."""
NIXL = "vllm:nixl_"
"""What a decoding engine got from the one that prefilled is told under such names (docs/features/nixl_connector_usage.md)."""
_PREFIXES = {
    "vllm:": "vllm", "sglang:": "sglang", "tgi_": "tgi", "llamacpp:": "llama.cpp", "trtllm_": "tensorrt-llm",
    "nv_trt_llm_": "tensorrt-llm", "lmcache:": "lmcache", "lmcache_": "lmcache",
}  # fmt: skip
_ENGINES = ("vllm", "sglang", "tgi", "llama.cpp", "tensorrt-llm")
_DEFAULT_BLOCK = {"vllm": 16, "tensorrt-llm": 32}
"""Tokens of a block where the engine doesn't say: --block-size on CUDA; KvCacheConfig.tokens_per_block."""
_THROUGH_RAY = re.compile(r"(?:ray_)?(vllm|sglang)[_:](?=\w)|(?:ray_)?trtllm:(?=\w)")
_WRITTEN = ("", "ray_")
OTHER_PREFIXES = ("ray_", "http_", "process_", "python_", "dynamo_", "nv_")
"""Names without a colon that are metrics of a server and none of this plugin's."""


def canonical(name: str) -> str:
    """Return the name that the table has for an exported one: `ray_vllm_prompt_tokens` is `vllm:prompt_tokens`."""
    match = _THROUGH_RAY.match(name)
    if match is None:
        return name
    return (f"{match[1]}:" if match[1] else "trtllm_") + name[match.end() :]


def spellings(features: Iterable[Feature]) -> tuple[str, ...]:
    """Return how the lines of these features may begin, whoever exports them."""
    asked = set(features)
    names = {row.name.removesuffix("_total") for row in TABLE if row.feature in asked}
    written = {name.replace(":", mark, 1) for name in names for mark in (":", "_")}
    written |= {name.replace("trtllm_", "trtllm:", 1) for name in names}
    return tuple(sorted(prefix + name for prefix in _WRITTEN for name in written))


def is_engine_metric(name: str) -> bool:
    """Return whether a name can only be a metric of a server: it has a colon, or begins as such names do."""
    return bool(re.fullmatch(r"[a-zA-Z_:][a-zA-Z0-9_:]*", name)) and (
        ":" in name.strip(":") or name.startswith((*(prefix for prefix in _PREFIXES if ":" not in prefix), *OTHER_PREFIXES))
    )


def software_in(scrape: Scrape) -> str | None:
    """Return which engine's metrics these are, e.g. `sglang`; None where no name says it."""
    names = {canonical(each.name) for each in scrape.series}
    named = {software for name in names for prefix, software in _PREFIXES.items() if name.startswith(prefix)}
    return next((engine for engine in _ENGINES if engine in named), None)


def find_row(scrape: Scrape, feature: Feature) -> tuple[Row, tuple[Series, ...]] | None:
    """Return the row by which a feature is told, and its series; None where it isn't.

    A counter that exists, but had no event yet, has a row and no series.
    """
    by_name: dict[str, list[Series]] = defaultdict(list)
    for each in scrape.series:
        by_name[canonical(each.name)].append(each)
    rows = [row for row in TABLE if row.feature == feature]
    for row in rows:
        series = by_name.get(row.name) or by_name.get(row.name.removesuffix("_total")) or []
        if row.where:
            series = [each for each in series if each.label(row.where[0]) == row.where[1]]
        if series:
            return row, tuple(series)
    without_event = (row for row in rows if row.proves in by_name and (row.software != "vllm" or is_through_ray(scrape)))
    return next(((row, ()) for row in without_event), None)


def is_through_ray(scrape: Scrape) -> bool:
    """Return whether Ray, or what else forbids colons, exports the engine's metrics: some seconds late, and none that is 0."""
    return any(canonical(each.name) != each.name for each in scrape.series)


def join(series: Iterable[Series], ranks: Literal["max", "min"] = "max", together: Callable[[list[float]], float] = sum) -> float:
    """Return one number of many series: ranks that run the same requests count once, all others together."""
    cores: dict[frozenset[tuple[str, str]], list[float]] = defaultdict(list)
    for each in series:
        cores[frozenset(label for label in each.labels if label[0] not in _RANKS)].append(each.value)
    return together([max(values) if ranks == "max" else min(values) for values in cores.values()])


def value_of(scrape: Scrape, feature: Feature) -> float | None:
    """Return a feature's value in an answer, in tokens, requests or shares; None where it isn't told."""
    row_and_series = find_row(scrape, feature)
    if row_and_series is None:
        return None
    row, series = row_and_series
    if not series and feature not in COUNTERS:
        return None
    value = join(series, row.ranks, max if feature in ("kv_usage", "block_tokens") else sum)
    return value * tokens_per(scrape, row, series)


def tokens_per(scrape: Scrape, row: Row, series: Sequence[Series]) -> float:
    """Return how many tokens one of a row's unit is."""
    if row.unit == "blocks" or (row.unit == "help" and any("blocks" in scrape.help_of(each.name) for each in series)):
        return block_tokens(scrape, row.software)
    return 1.0


def block_tokens(scrape: Scrape, software: str) -> float:
    """Return the tokens of a block of the KV cache."""
    sizes = {each.label("block_size") for each in scrape.series if canonical(each.name) == VLLM_CACHE}
    if sizes and all(re.fullmatch(r"[1-9]\d{0,8}", size) for size in sizes):
        return float(min(map(int, sizes)))
    stated = find_row(scrape, "block_tokens")
    if stated and stated[1]:
        return join(stated[1], "max", max)
    return float(_DEFAULT_BLOCK.get(software, 1))
