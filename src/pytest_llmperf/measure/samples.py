"""What a launch keeps for metrics that nobody has asked for yet: percentiles by name, and counters by name.

All samples would make baselines and reports large, and a fixed list of percentiles lacks the one that somebody wants. So they
are kept as long as a test runs, four bytes each, and only the percentiles that gate are stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pytest_llmperf.measure.metric import CLASS_LATENCIES, CLASS_SEPARATOR, SAMPLED, statistic

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pytest_llmperf.measure.formulas import LaunchSample

MOST_SAMPLES = 100_000
"""More values than this are kept as that many quantiles of theirs, which no percentile but the last one in 100,000 can tell."""


def _packed(values: Sequence[float]) -> bytes:
    """Return values in ascending order, four bytes each (seven digits), for percentiles that somebody may ask for later."""
    if len(values) > MOST_SAMPLES:
        return np.quantile(values, np.linspace(0, 1, MOST_SAMPLES)).astype(np.float32).tobytes()
    return np.sort(np.asarray(values, dtype=np.float32)).tobytes()


def _statistic_of(kept: bytes, reduce: Callable[[Sequence[float]], float]) -> float | None:
    """Return a statistic of kept values; None where there are none."""
    values = np.frombuffer(kept, dtype=np.float32).astype(np.float64)
    return float(reduce(values)) if values.size else None  # type: ignore[arg-type]  # numpy's arrays are sequences, but don't say so


def kept_samples(sample: LaunchSample) -> dict[str, bytes]:
    """Return what percentiles that are no rows of the table are computed from, by latency (`ttft`, `short/ttft`)."""
    groups = {"": sample} | {group + CLASS_SEPARATOR: sample.of_class(group) for group in dict.fromkeys(sample.classes)}
    values = {
        prefix + latency: [value for record in part.complete for value in times(record)]
        for prefix, part in groups.items()
        for latency, (times, _) in SAMPLED.items()
        if not prefix or latency.startswith(CLASS_LATENCIES)
    }
    return {name: _packed(each) for name, each in values.items() if each}


def of_samples(kept: Mapping[str, bytes], name: str) -> float | None:
    """Return a percentile by its name from what a launch has kept; None for any other metric, and where nothing was kept."""
    group, separator, plain = name.rpartition(CLASS_SEPARATOR)
    metric = statistic(plain)
    if metric is None or metric.sampled is None:
        return None
    latency, reduce = metric.sampled
    return _statistic_of(kept.get(group + separator + latency, b""), reduce)


def of_counters(counters: Mapping[str, float], name: str) -> float | None:
    """Return a counter by its name, with or without `_total`; None where the engine has none of this name."""
    other = name.removesuffix("_total") if name.endswith("_total") else f"{name}_total"
    return counters.get(name, counters.get(other))
