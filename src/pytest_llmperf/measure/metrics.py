"""The metrics in one table: name, unit, direction, class and formula.

The documentation page of metrics is generated from it (`documentation`). A metric that could not
be measured is None and never 0. `FORMULAS` goes into every baseline: when a formula changes, old numbers are not comparable.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_llmperf.measure.client import RequestRecord
    from pytest_llmperf.measure.telemetry import Capacity, Telemetry
    from pytest_llmperf.plan import Workload

FORMULAS = 2
"""Version of the formulas below. History: 1, the first; 2, p90 and p99 are those of all requests of a launch."""

MIN_EXCEEDANCES = 10
"""A percentile gates only where at least this many values of a launch are expected beyond it. With fewer it is the largest
value but a few, whose noise no tolerance covers: p99 of 200 requests has no finite 95 % bound."""


@dataclass(frozen=True)
class RoundSample:
    """What a round's metrics are computed from."""

    records: tuple[RequestRecord, ...]
    telemetry: Telemetry

    @property
    def complete(self) -> list[RequestRecord]:
        """Return the requests that were answered in full."""
        return [record for record in self.records if record.error is None]

    @property
    def duration_s(self) -> float | None:
        """Return the seconds from the first request sent to the last response complete."""
        sent = [record.sent_s for record in self.complete if record.sent_s is not None]
        ends = [record.end_s for record in self.complete if record.end_s is not None]
        return max(ends) - min(sent) if sent and ends else None


@dataclass(frozen=True)
class LaunchSample:
    """What the metrics of a launch as a whole are computed from."""

    startup_s: float | None
    capacity: Capacity
    complete: tuple[RequestRecord, ...] = ()
    """The requests of all its rounds that were answered in full."""


@dataclass(frozen=True)
class Metric:
    """One row of the table."""

    name: str
    unit: str
    better: Literal["lower", "higher"]
    kind: Literal["ratio", "quantile", "tail", "count", "exact"]
    """How it is judged. Ratio and quantile (a round's median): t-test on the levels of launches. Tail: the same, but the
    percentile is that of all requests of a launch. Count: counting tests. Exact: a narrow rule."""
    gating: bool
    """Whether it can fail a test by default; the others are observed."""
    formula: str
    of_round: Callable[[RoundSample], float | None] | None = None
    of_launch: Callable[[LaunchSample], float | None] | None = None
    tolerance: float | None = None
    """The least tolerance that gates by default, as a fraction; None: the run's."""
    beyond: Callable[[Workload], float] | None = None
    """How many values of a round lie beyond the percentile; None where that does not matter."""

    def too_few(self, workload: Workload, rounds: int) -> str | None:
        """Return why a launch of so many rounds is too small for this percentile, None where it is large enough."""
        if self.beyond is None or (found := self.beyond(workload) * rounds) >= MIN_EXCEEDANCES:
            return None
        needed = math.ceil(workload.requests * rounds * MIN_EXCEEDANCES / found) if found else None
        more = f"; about {needed:,} requests a launch would do" if needed else ""
        return f"a launch has {found:.2g} values beyond it, {MIN_EXCEEDANCES} are needed{more}"


def _rate(amount: Callable[[RequestRecord], float]) -> Callable[[RoundSample], float | None]:
    def of_round(sample: RoundSample) -> float | None:
        duration_s = sample.duration_s
        return sum(map(amount, sample.complete)) / duration_s if duration_s else None

    return of_round


def _ttft(record: RequestRecord) -> list[float]:
    if record.sent_s is None or record.first_token_s is None:
        return []
    return [record.first_token_s - record.sent_s]


def _itl(record: RequestRecord) -> list[float]:
    arrivals = sorted(set(record.token_times_s))
    return [later - earlier for earlier, later in itertools.pairwise(arrivals)]


def _tpot(record: RequestRecord) -> list[float]:
    times = record.token_times_s
    count = record.output_tokens or len(times)
    return [(times[-1] - times[0]) / (count - 1)] if len(times) > 1 and count > 1 else []


def _e2e(record: RequestRecord) -> list[float]:
    return [record.end_s - record.sent_s] if record.sent_s is not None and record.end_s is not None else []


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _percentile(percent: int) -> Callable[[Sequence[float]], float]:
    return lambda values: float(np.percentile(values, percent))


def _spread(
    times: Callable[[RequestRecord], list[float]], reduce: Callable[[Sequence[float]], float]
) -> Callable[[RoundSample | LaunchSample], float | None]:
    def of_sample(sample: RoundSample | LaunchSample) -> float | None:
        values = [value for record in sample.complete for value in times(record)]
        return reduce(values) if values else None

    return of_sample


def _once(_: Workload) -> float:
    return 1.0


def _gaps(workload: Workload) -> float:
    return workload.output_tokens - 1.0


# name, values of a request, how many these are, formula
_LATENCIES = (
    ("ttft", _ttft, _once, "time to first token: first output token's arrival - request sent"),
    ("itl", _itl, _gaps, "inter-token latency: time between two arrivals of output tokens; tokens of one read arrive together"),
    ("tpot", _tpot, _once, "time per output token of a request: (last token - first token) / (output tokens - 1)"),
    ("e2e", _e2e, _once, "end to end: response complete - request sent"),
)
_TAILS = {90: 0.08, 99: 0.15}
"""Percentiles of a launch and the tolerance that they gate with, where a project makes them gate: they are noisier."""


def _latency_rows() -> list[Metric]:
    rows = []
    for name, times, number, formula in _LATENCIES:
        rows.append(Metric(f"{name}_mean_s", "s", "lower", "ratio", False, f"mean of {formula}", _spread(times, _mean)))
        gating = name != "tpot"  # TPOT says what ITL says; two gates would only split alpha
        p50 = _spread(times, _percentile(50))
        rows.append(Metric(f"{name}_p50_s", "s", "lower", "quantile", gating, f"p50 of {formula}", p50))
        for percent, tolerance in _TAILS.items():
            rows.append(Metric(
                f"{name}_p{percent}_s", "s", "lower", "tail", False, f"p{percent}, over all rounds of a launch, of {formula}",
                of_launch=_spread(times, _percentile(percent)), tolerance=tolerance,
                beyond=_beyond(number, percent),
            ))  # fmt: skip
    return rows


def _beyond(number: Callable[[Workload], float], percent: int) -> Callable[[Workload], float]:
    return lambda workload: workload.requests * number(workload) * (100 - percent) / 100


COUNT_TOLERANCE = 0.5
"""5 % of a few random events is beyond any budget of launches, so counts have a tolerance of their own (and one event)."""
EXACT_TOLERANCE = 0.005

METRICS: tuple[Metric, ...] = (
    Metric(
        "output_tokens_per_s", "tokens/s", "higher", "ratio", True,
        "output tokens of complete requests / (last response complete - first request sent)",
        _rate(lambda record: record.output_tokens or 0),
    ),
    Metric(
        "total_tokens_per_s", "tokens/s", "higher", "ratio", False,
        "prompt and output tokens of complete requests / (last response complete - first request sent)",
        _rate(lambda record: (record.prompt_tokens or 0) + (record.output_tokens or 0)),
    ),
    Metric(
        "requests_per_s", "requests/s", "higher", "ratio", False,
        "complete requests / (last response complete - first request sent)",
        _rate(lambda _: 1),
    ),
    *_latency_rows(),
    Metric(
        "failed_requests", "requests", "lower", "count", True,
        "requests with an error: bad status, error in the stream, cut stream, wrong number of tokens, time-out",
        lambda sample: float(len(sample.records) - len(sample.complete)), tolerance=COUNT_TOLERANCE,
    ),
    Metric(
        "preemptions", "preemptions", "lower", "count", True,
        "vllm:num_preemptions_total after the round - before it, summed over engine cores",
        lambda sample: sample.telemetry.preemptions, tolerance=COUNT_TOLERANCE,
    ),
    Metric(
        "kv_cache_peak_ratio", "share", "lower", "ratio", False,
        "largest vllm:kv_cache_usage_perc seen in the round, sampled every 0.5 s: a lower bound of the true peak",
        lambda sample: sample.telemetry.kv_cache_peak,
    ),
    Metric(
        "prefix_cache_hit_tokens", "tokens", "higher", "ratio", False,
        "vllm:prefix_cache_hits_total after the round - before it, summed over engine cores",
        lambda sample: sample.telemetry.prefix_hit_tokens,
    ),
    Metric(
        "kv_cache_tokens", "tokens", "higher", "exact", True,
        "size of the KV cache: kv_cache_size_tokens of vllm:cache_config_info, else the engine's log",
        of_launch=lambda sample: sample.capacity.kv_cache_tokens, tolerance=EXACT_TOLERANCE,
    ),
    Metric(
        "max_concurrency", "requests", "higher", "exact", False,
        "requests of full length that fit into the KV cache: kv_cache_max_concurrency, else the engine's log",
        of_launch=lambda sample: sample.capacity.max_concurrency, tolerance=EXACT_TOLERANCE,
    ),
    Metric(
        "startup_s", "s", "lower", "ratio", False,
        "launch of the engine's process to its first real token",
        of_launch=lambda sample: sample.startup_s,
    ),
)  # fmt: skip

BY_NAME = {metric.name: metric for metric in METRICS}
GATING = tuple(metric.name for metric in METRICS if metric.gating)


def round_metrics(sample: RoundSample) -> dict[str, float | None]:
    """Return every metric of a round; None for what could not be measured."""
    return {metric.name: metric.of_round(sample) for metric in METRICS if metric.of_round}


def launch_metrics(sample: LaunchSample) -> dict[str, float | None]:
    """Return every metric of a launch as a whole; None for what could not be measured."""
    return {metric.name: metric.of_launch(sample) for metric in METRICS if metric.of_launch}


def documentation() -> str:
    """Return the table as the Markdown page `docs/metrics.md`."""
    lines = [
        "# Metrics",
        "",
        "Generated from the table in `pytest_llmperf/measure/metrics.py`. Names of latencies are vLLM's. Times are taken at the",
        "client, on one monotonic clock. A metric that could not be measured is missing, never 0.",
        "",
        f"A percentile beyond the median can gate only where a launch has {MIN_EXCEEDANCES} values beyond it. The tolerance is",
        "that of `--llmperf-tolerance` (5 %), or the one named here if it is larger; counts and exact metrics have their own.",
        "",
        "| metric | unit | better | class | gates | tolerance | formula |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in METRICS:
        gates = "yes" if one.gating else "no"
        tolerance = f"{one.tolerance:.3g}" if one.tolerance else ""
        lines.append(f"| `{one.name}` | {one.unit} | {one.better} | {one.kind} | {gates} | {tolerance} | {one.formula} |")
    return "\n".join(lines) + "\n"
