"""What the engine says of itself: its `/metrics` before and after a round, and the size of its KV cache.

Counters are cumulative and per engine: what counts is the difference, summed over engines, and a counter that went down
means that the engine was restarted behind our back.
"""

from __future__ import annotations

import contextlib
import re
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Self

    from pytest_llmperf.measure.engines.engine import Engine

_LOG_CAPACITY = re.compile(r"KV cache size: ([\d,]+) tokens")
_LOG_CONCURRENCY = re.compile(r"Maximum concurrency for [\d,]+ tokens per request: ([\d.,]+)x")
SAMPLE_INTERVAL_S = 0.5
_COUNTERS = {
    "preemptions": "vllm:num_preemptions_total",
    "prompt_tokens": "vllm:prompt_tokens_total",
    "output_tokens": "vllm:generation_tokens_total",
    "prefix_hit_tokens": "vllm:prefix_cache_hits_total",
}
_USE, _RUNNING, _CACHE = "vllm:kv_cache_usage_perc", "vllm:num_requests_running", "vllm:cache_config_info"
_MALFORMED = (ValueError, IndexError, OverflowError)
"""What the parser raises for a malformed line: IndexError for `{a="b", ="c"}`; the last is that of a count beyond all floats."""


@dataclass(frozen=True)
class Counters:
    """The engine's cumulative counters, summed over its engine cores; None where it has none."""

    preemptions: float | None = None
    prompt_tokens: float | None = None
    output_tokens: float | None = None
    prefix_hit_tokens: float | None = None


@dataclass(frozen=True)
class Capacity:
    """The size of the KV cache, fixed at the engine's start; None where the engine doesn't tell."""

    kv_cache_tokens: float | None = None
    max_concurrency: float | None = None


@dataclass(frozen=True)
class Telemetry:
    """What happened inside the engine during one round; None where it doesn't tell."""

    preemptions: float | None = None
    prompt_tokens: float | None = None
    output_tokens: float | None = None
    prefix_hit_tokens: float | None = None
    kv_cache_peak: float | None = None
    """Largest share of the KV cache seen in use; sampled, hence a lower bound of the true peak."""
    running_mean: float | None = None
    """Mean number of requests in the batch; sampled."""
    restarted: bool = False
    """A counter went down: the engine was restarted during the round."""


def parse_metrics(text: str, *names: str) -> list[tuple[str, dict[str, str], float]]:
    """Return (name, labels, value) of every series whose name begins like one of these; malformed lines are passed over."""
    series = []
    for line in text.splitlines():
        # Only these lines are parsed: all 466 series of a vLLM take 9 ms, twice a second beside the load; two of them 0.1 ms.
        if line.startswith(names):
            with contextlib.suppress(*_MALFORMED):
                [family] = text_string_to_metric_families(line)
                series += [(sample.name, sample.labels, float(sample.value)) for sample in family.samples]
    return series


def _total(series: list[tuple[str, dict[str, str], float]], name: str) -> float | None:
    values = [value for series_name, _, value in series if series_name == name]
    return sum(values) if values else None


def read_counters(text: str | None) -> Counters:
    """Return the counters in a `/metrics` answer."""
    series = parse_metrics(text or "", *_COUNTERS.values())
    return Counters(**{field: _total(series, name) for field, name in _COUNTERS.items()})


def read_capacity(metrics: str | None, log: str) -> Capacity:
    """Return the KV cache's size from `/metrics` (vLLM since 0.3x), else from the engine's log."""
    infos = [labels for name, labels, _ in parse_metrics(metrics or "", _CACHE) if name == _CACHE]
    return Capacity(
        kv_cache_tokens=_sum(info.get("kv_cache_size_tokens") for info in infos) or _sum(_LOG_CAPACITY.findall(log)),
        max_concurrency=_sum(info.get("kv_cache_max_concurrency") for info in infos) or _sum(_LOG_CONCURRENCY.findall(log)),
    )


def _sum(texts: Iterable[str | None]) -> float | None:
    """Return the sum over engine cores; None where a number is missing."""
    plain = [(text or "").replace(",", "") for text in texts]
    if not plain or not all(re.fullmatch(r"\d+(\.\d+)?", text) for text in plain):
        return None
    return sum(float(text) for text in plain)


class Recorder:
    """A context manager around one round: counters before and after, KV-cache use in between."""

    def __init__(self, engine: Engine) -> None:
        """Note whose `/metrics` to read."""
        self._read: Callable[[], str | None] = engine.metrics_text
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample, name="llmperf-telemetry", daemon=True)
        self._peaks: list[float] = []
        self._running: list[float] = []
        self._before = Counters()

    def __enter__(self) -> Self:
        """Read the counters and begin to sample."""
        self._before = read_counters(self._read())
        if self._before != Counters():
            self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End the sampling."""
        self._ended.set()
        if self._sampler.is_alive():
            self._sampler.join()

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLE_INTERVAL_S):
            series = parse_metrics(self._read() or "", _USE, _RUNNING)
            use = [value for name, _, value in series if name == _USE]
            self._peaks += [max(use)] if use else []
            running = _total(series, _RUNNING)
            self._running += [] if running is None else [running]

    def result(self) -> Telemetry:
        """Return what the round brought; call it after the block."""
        after = read_counters(self._read())
        pairs = {name: (getattr(self._before, name), getattr(after, name)) for name in Counters.__dataclass_fields__}
        deltas = {name: None if old is None or new is None else new - old for name, (old, new) in pairs.items()}
        return Telemetry(
            **deltas,
            kv_cache_peak=max(self._peaks) if self._peaks else None,
            running_mean=sum(self._running) / len(self._running) if self._running else None,
            restarted=any(delta is not None and delta < 0 for delta in deltas.values()),
        )
