"""The size of an engine's KV cache, fixed at its start: from its `/metrics`, else from its log.

A line of a log is of one rank, or of one engine core, and says so at most in its prefix. Of the ranks that run the same requests
together the smallest cache counts, because a token needs its place in each; the caches of engine cores are added.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pytest_llmperf.measure.dialects import VLLM_CACHE, block_tokens, canonical, value_of
from pytest_llmperf.measure.exposition import read_series

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pytest_llmperf.measure.exposition import Scrape

_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_PREFIX = re.compile(r"\(([A-Za-z_][\w:.-]*)? ?((?:\w+=[^\s,)]+(?:, )?| )*)\)")
"""`(EngineCore_DP0 pid=7)`, `(VllmWorker rank=1 pid=88)`, Ray's `(RayWorkerWrapper pid=88, ip=10.0.0.2)` and `(pid=88)`."""
_DATA_PARALLEL = re.compile(r"(?:\b|_)DP(\d+)(?:\b|_)|^(?:Proc)?EngineCore_(\d+)$")
_BLOCK = re.compile(r"""\bblock[-_]size['"]?\s*[=:\s]\s*['"]?(\d+)""")
_USUAL_BLOCK = 16
"""vLLM's --block-size on GPUs as long as it logged blocks."""


@dataclass(frozen=True)
class Capacity:
    """The size of the KV cache, fixed at the engine's start; None where the engine doesn't tell."""

    kv_cache_tokens: float | None = None
    max_concurrency: float | None = None


@dataclass(frozen=True)
class _Line:
    """How an engine logs the size of its cache."""

    pattern: re.Pattern[str]
    """Its one group is the number."""
    of_core: Literal["min", "last", "alike"] = "min"
    """What several lines of one core come to: the smallest rank; the last, where a first one was only tried; or unknown unless
    they are alike."""


_TOKENS = (
    _Line(re.compile(r"KV cache size: ([\d,]+) tokens")),  # vLLM since 0.8 (V1): vllm/v1/core/kv_cache_utils.py
    _Line(re.compile(r"\bmax_total_num_tokens=(\d+)")),  # SGLang: managers/scheduler.py, once per rank
    _Line(re.compile(r"Setting max batch total tokens to (\d+)")),  # TGI: router/src/server.rs
    # TensorRT-LLM: once for the cache by which memory is measured, then for the real one.
    _Line(re.compile(r"for max tokens in paged KV cache \((\d+)\)"), "last"),
    # llama.cpp: src/llama-context.cpp; a draft model has a context of its own, which nothing tells apart.
    _Line(re.compile(r"llama_context: n_ctx\s+= (\d+)"), "alike"),
)
_CONCURRENCY = _Line(re.compile(r"Maximum concurrency for [\d,]+ tokens per request: ([\d.,]+)x"))
_BLOCKS = _Line(re.compile(r"# (?!CPU)\w+ blocks: (\d+)"))
"""vLLM up to 0.8: `# GPU blocks: 27000`, `# cuda blocks: 27000, # CPU blocks: 2048`."""


def read_capacity(metrics: str | None, log: str, *, cores: int = 1) -> Capacity:
    """Return the KV cache's size from `/metrics`, else from the engine's log; `cores` are its engine cores (data parallel)."""
    scrape = read_series(metrics, ("vllm", "ray_", "sglang", "trtllm", "nv_trt_llm"))
    lines = _COLOUR.sub("", log).splitlines()
    tokens = [
        lambda: _of_labels(scrape, "kv_cache_size_tokens"),
        lambda: value_of(scrape, "kv_tokens"),
        lambda: _blocks_told(scrape),
        *((lambda line=line: _logged(lines, line, cores)) for line in _TOKENS),
        lambda: _blocks_logged(lines, log, cores),
        lambda: _of_labels(scrape, "num_gpu_blocks", block_tokens(scrape, "vllm")),
    ]
    concurrency = [
        lambda: _of_labels(scrape, "kv_cache_max_concurrency"),
        lambda: _logged(lines, _CONCURRENCY, cores),
    ]
    return Capacity(_first(tokens), _first(concurrency))


def _first(sources: Iterable[Callable[[], float | None]]) -> float | None:
    """Return what the first source says that knows; a cache of nothing, or of less, is none."""
    return next((number for source in sources if (number := source()) is not None and number > 0), None)


def _of_labels(scrape: Scrape, label: str, factor: float = 1.0) -> float | None:
    """Return the sum over engine cores of a number in the labels of vLLM's cache; None where a core does not tell it."""
    cores: dict[str, list[float | None]] = defaultdict(list)
    for each in scrape.series:
        if canonical(each.name) == VLLM_CACHE:
            cores[each.label("engine") + each.label("ReplicaId")].append(_number(each.label(label)))
    smallest = [None if None in values else min(value for value in values if value is not None) for values in cores.values()]
    known = [value for value in smallest if value is not None]
    return sum(known) * factor if known and len(known) == len(smallest) else None


def _blocks_told(scrape: Scrape) -> float | None:
    blocks, size = value_of(scrape, "kv_blocks"), value_of(scrape, "block_tokens")
    return None if blocks is None or size is None else blocks * size


def _blocks_logged(lines: Iterable[str], log: str, cores: int) -> float | None:
    blocks, sizes = _logged(lines, _BLOCKS, cores), {int(size) for size in _BLOCK.findall(log)}
    if blocks is None or len(sizes) > 1:
        return None
    return blocks * (min(sizes) if sizes else _USUAL_BLOCK)


def _number(text: str) -> float | None:
    plain = text.replace(",", "")
    return float(plain) if re.fullmatch(r"\d{1,18}(\.\d+)?", plain) else None


def _logged(lines: Iterable[str], line: _Line, cores: int) -> float | None:
    """Return what a kind of line says of the engine as a whole, None where there is no such line."""
    said: dict[str | None, list[float]] = defaultdict(list)
    for text in lines:
        match = line.pattern.search(text)
        number = _number(match[1]) if match else None
        if match and number is not None:
            said[_core(text[: match.start()])].append(number)
    # Lines that don't say whose they are can be of several ranks or of several cores; each core has at least one.
    unnamed = said.pop(None, [])
    named = [_of_core(values, line) for values in said.values()]
    if not named and unnamed:
        core = _of_core(unnamed, line)
        return None if core is None else core * min(cores, len(unnamed))
    known = [value for value in named if value is not None]
    return sum(known) if known and len(known) == len(named) else None


def _of_core(values: list[float], line: _Line) -> float | None:
    if line.of_core == "last":
        return values[-1]
    return min(values) if line.of_core == "min" or len(set(values)) == 1 else None


def _core(prefix: str) -> str | None:
    """Return which engine core a line is of, by what stands in front of it; None where nothing says so."""
    processes = _PREFIX.findall(prefix)
    for name in (*(name for name, _ in processes), *re.findall(r"^\[[^\]]*\]", prefix)):
        if match := _DATA_PARALLEL.search(name):
            return match[1] or match[2]
    # A worker without a number is of the one core that there is, or of the core that stands in front of it.
    named = [f"{name} {rest}" for name, rest in processes if "EngineCore" in name or "Replica" in name]
    return named[0] if named else None
