"""The metrics in one table: name, unit, direction, class and formula.

The documentation page of metrics is generated from it (`documentation`). A metric that could not
be measured is None and never 0. `FORMULAS` goes into every baseline: when a formula changes, old numbers are not comparable.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from pytest_llmperf.measure import dialects, formulas
from pytest_llmperf.measure.metric import (
    CLASS_LATENCIES,
    GPU_ROWS,
    MIN_EXCEEDANCES,
    SAMPLED,
    capacity_rows,
    idle_rows,
    latency_rows,
    sent_rows,
    statistic,
)
from pytest_llmperf.measure.metric import CLASS_SEPARATOR as CLASS_SEPARATOR
from pytest_llmperf.measure.metric import Metric as Metric

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pytest_llmperf.measure.formulas import LaunchSample, RoundSample
    from pytest_llmperf.plan.workload import Workload

FORMULAS = 2
"""Version of the formulas below. History: 1, the first; 2, p90 and p99 are those of all requests of a launch."""

COUNT_TOLERANCE = 0.5
"""5 % of a few random events is beyond any budget of launches, so counts have a tolerance of their own (and one event)."""
EXACT_TOLERANCE = 0.005

METRICS: tuple[Metric, ...] = (
    Metric(
        "output_tokens_per_s", "tokens/s", "higher", "ratio", True,
        "output tokens of complete requests / (last response complete - first request sent)",
        formulas.rate(lambda record: record.output_tokens),
    ),
    Metric(
        "total_tokens_per_s", "tokens/s", "higher", "ratio", False,
        "prompt and output tokens of complete requests / (last response complete - first request sent)",
        formulas.rate(formulas.all_tokens),
    ),
    Metric(
        "requests_per_s", "requests/s", "higher", "ratio", False,
        "complete requests / (last response complete - first request sent)",
        formulas.rate(lambda _: 1),
    ),
    Metric(
        "steady_output_tokens_per_s", "tokens/s", "higher", "ratio", False,
        "output tokens that arrived in the steady window / its length; the window begins when as many requests as are kept in"
        " flight have been answered (at a rate: the first), and ends when the last is sent; missing where that is less than a"
        " tenth of the round",
        formulas.steady_rate,
    ),
    *latency_rows(),
    *sent_rows(),
    Metric(
        "goodput_requests_per_s", "requests/s", "higher", "ratio", False,
        "complete requests within every limit of `slo` (itl_s: every gap) / (last response complete - first request sent)",
        formulas.goodput,
    ),
    Metric(
        "goodput_ratio", "share", "higher", "ratio", False,
        "complete requests within every limit of `slo` / requests", formulas.good_share,
    ),
    Metric(
        "jain_fairness", "index", "higher", "ratio", False,
        "Jain's index of the requests' speeds (output tokens / E2E): 1 is all alike, 1/n is one served and the others starved",
        formulas.jain,
    ),
    Metric(
        "in_flight_mean", "requests", "higher", "ratio", False,
        "mean number of requests in flight in the steady window, from sending to the last byte", formulas.in_flight,
    ),
    Metric(
        "send_delay_p99_s", "s", "lower", "quantile", False,
        "p99 of request sent - instant it was due; in a closed loop: - end of the response that it waited for; where"
        " `max_concurrency` held it back: - end of the response that made room",
        formulas.spread(formulas.delay, formulas.percentile(99)),
    ),
    Metric(
        "client_cpu_cores", "cores", "lower", "ratio", False,
        "CPU time of the busiest load process / its time, parsing included", lambda sample: sample.cpu_share,
    ),
    Metric(
        "shared_arrivals_ratio", "share", "lower", "ratio", False,
        "output tokens that came in one read with the token before them / output tokens", formulas.shared_arrivals,
    ),
    Metric(
        "failed_requests", "requests", "lower", "count", True,
        "requests with an error: bad status, error in the stream, cut stream, wrong number of tokens, time-out; any makes the"
        " launch INVALID, unless `tolerated_failures` allows for such a share",
        lambda sample: float(len(sample.records) - len(sample.complete)), tolerance=COUNT_TOLERANCE,
    ),
    Metric(
        "preemptions", "preemptions", "lower", "count", True,
        "the engine's count of preemptions (SGLang's: retracted requests) after the round - before it, summed over engine cores",
        lambda sample: sample.telemetry.preemptions, tolerance=COUNT_TOLERANCE,
    ),
    Metric(
        "kv_cache_peak_ratio", "share", "lower", "ratio", False,
        "largest use of the KV cache that the engine told in the round, sampled every 0.5 s: a lower bound of the true peak",
        lambda sample: sample.telemetry.kv_cache_peak or None,  # 0 is what samples between two steps see
    ),
    Metric(
        "prefix_cache_hit_tokens", "tokens", "higher", "ratio", False,
        "prompt tokens that the engine counts as found in its prefix cache, after the round - before it, summed over engine"
        " cores; blocks times their size where it counts blocks",
        lambda sample: sample.telemetry.prefix_hit_tokens,
    ),
    Metric(
        "external_prefix_cache_hit_tokens", "tokens", "higher", "ratio", False,
        "prompt tokens whose KV cache came from outside of the engine (LMCache, other connectors), after the round - before it",
        lambda sample: sample.telemetry.external_hit_tokens,
    ),
    Metric(
        "spec_decode_acceptance_length", "tokens/step", "higher", "ratio", False,
        "speculative decoding: 1 + accepted tokens / drafts, both of the round (vLLM, llama.cpp): tokens per step of the model",
        lambda sample: sample.telemetry.acceptance_length,
    ),
    Metric(
        "running_requests_mean", "requests", "higher", "ratio", False,
        "mean number of requests that the engine says are running, sampled every 0.5 s, summed over engine cores: the batch",
        lambda sample: sample.telemetry.running_mean or None,
    ),
    *GPU_ROWS,
    Metric(
        "gpu_memory_peak_bytes", "bytes", "lower", "exact", True,
        "most GPU memory that the fullest rank had in the rounds, of its own processes, sampled ten times a second",
        of_launch=formulas.peak_memory, tolerance=EXACT_TOLERANCE,
    ),
    Metric(
        "gpu_memory_balance_ratio", "share", "higher", "exact", True,
        "peak GPU memory of the emptiest rank / that of the fullest: 1 is equal; only for several ranks",
        of_launch=formulas.memory_balance, tolerance=EXACT_TOLERANCE,
    ),
    Metric(
        "gpu_memory_growth_bytes", "bytes", "lower", "ratio", False,
        "GPU memory at the end of the last round - that at the end of the first, of the rank that grew most",
        of_launch=formulas.memory_growth,
    ),
    Metric(
        "kv_cache_tokens", "tokens", "higher", "exact", True,
        "size of the KV cache as the engine's metrics tell it, else its log: the smallest rank's, summed over engine cores",
        of_launch=lambda sample: sample.capacity.kv_cache_tokens or None, tolerance=EXACT_TOLERANCE,
    ),
    Metric(
        "max_concurrency", "requests", "higher", "exact", False,
        "requests of full length that fit into the KV cache: vLLM's metrics, else its log",
        of_launch=lambda sample: sample.capacity.max_concurrency or None, tolerance=EXACT_TOLERANCE,
    ),
    Metric(
        "startup_s", "s", "lower", "ratio", False,
        "launch of the engine's process to its first real token",
        of_launch=lambda sample: sample.startup_s,
    ),
    *capacity_rows(),
    *idle_rows(),
)  # fmt: skip

BY_NAME = {metric.name: metric for metric in METRICS}
GATING = tuple(metric.name for metric in METRICS if metric.gating)


_OF_CLASS = (
    "output_tokens_per_s",
    "requests_per_s",
    "failed_requests",
    "goodput_requests_per_s",
    "goodput_ratio",
    "jain_fairness",
)


def find(name: str) -> Metric:
    """Return a metric by its name: of the table, any percentile of a latency, or a counter of the engine.

    That of a class of requests is `CLASS/NAME`. Raises KeyError for any other name.
    """
    group, separator, plain = name.rpartition(CLASS_SEPARATOR)
    if is_counter(name):
        return _counter(name)
    metric = BY_NAME.get(plain) or statistic(plain)
    if metric is None:
        raise KeyError(name)
    if not separator:
        return metric
    if not group or not _has_class(metric):
        raise KeyError(name)
    beyond = None if metric.beyond is None else _of_share(metric.beyond, group)
    return replace(metric, name=name, gating=False, formula=f"{metric.formula}, of the class {group}", beyond=beyond)


def _counter(name: str) -> Metric:
    """Return the metric of a counter of the engine; whether the engine has it is known when it has been measured."""
    return Metric(
        name, "events", "lower", "count", False,
        "a counter of the engine (or the sum or count of a histogram) after the round - before it, summed over engine cores",
        tolerance=COUNT_TOLERANCE,
    )  # fmt: skip


def _of_share(beyond: Callable[[Workload], float], group: str) -> Callable[[Workload], float]:
    return lambda workload: beyond(workload) * workload.class_share(group)


def is_counter(name: str) -> bool:
    """Return whether a name can only be a counter of the engine."""
    return name not in BY_NAME and dialects.is_engine_metric(name)


def is_metric(name: str) -> bool:
    """Return whether there is such a metric, or could be one of a class of requests."""
    try:
        find(name)
    except KeyError:
        return False
    return True


def _has_class(metric: Metric) -> bool:
    """Return whether a metric is taken of each class too: latencies and what is counted in requests."""
    return metric.name in _OF_CLASS or metric.name.startswith(tuple(f"{name}_" for name in CLASS_LATENCIES))


def names_of(classes: Iterable[str]) -> list[str]:
    """Return the names of all metrics of a workload with these classes."""
    each = [metric.name for metric in METRICS if _has_class(metric)]
    return [*BY_NAME, *(f"{group}{CLASS_SEPARATOR}{name}" for group in classes for name in each)]


_Sample = TypeVar("_Sample", "RoundSample", "LaunchSample")


def _values(sample: _Sample, formula_of: Callable[[Metric], Callable[[_Sample], float | None] | None]) -> dict[str, float | None]:
    """Return every metric of a sample that has such a formula, and those of each of its classes."""
    groups: dict[str, _Sample] = {"": sample}
    groups |= {group + CLASS_SEPARATOR: sample.of_class(group) for group in dict.fromkeys(sample.classes)}
    return {
        prefix + metric.name: formula(part)
        for prefix, part in groups.items()
        for metric in METRICS
        if (formula := formula_of(metric)) and (not prefix or _has_class(metric))
    }


def round_metrics(sample: RoundSample) -> dict[str, float | None]:
    """Return every metric of a round; None for what could not be measured. A percentile of a launch is none of a round."""
    return _values(sample, lambda metric: metric.of_round)


def launch_metrics(sample: LaunchSample) -> dict[str, float | None]:
    """Return every metric of a launch as a whole; None for what could not be measured."""
    return _values(sample, lambda metric: metric.of_launch)


def documentation() -> str:
    """Return the table as the Markdown page `docs/metrics.md`."""
    lines = [
        "# Metrics",
        "",
        "Generated from the table in `pytest_llmperf/measure/metrics.py`. Names of latencies are vLLM's. Times are taken at the",
        "client, on one monotonic clock. A metric that could not be measured is missing, never 0.",
        "",
        "Where requests are sent at a rate, latencies count from the instant at which a request was due, not from that at which",
        "it was sent: a late client must not make an engine look faster. `ttft_from_send` and `e2e_from_send` are the others.",
        "",
        "Each class of a workload has latencies, throughput, failures, goodput and fairness of its own, `CLASS/METRIC`",
        '(`short/ttft_p50_s`). They are observed; `gate={"short/ttft_p50_s": "8 %"}` makes one gate.',
        "",
        "Any other percentile of a latency has a name too: `ttft_p95_s`, `itl_p99.9_s`, `e2e_max_s`, `tpot_min_s`,",
        f"`ttft_std_s`; of {', '.join(SAMPLED)}.",
        "It is that of all requests of a launch, is computed when it is asked for (`measured['ttft_p95_s']`), and gates where a",
        "gate names it: with 8 % up to p90, 10 % up to p95, 15 % beyond, or what the gate says. A minimum or maximum can never",
        "gate: no value lies beyond it.",
        "",
        "Every counter of the engine has the name under which it is exported, with or without `_total`:",
        "`measured['vllm:spec_decode_num_accepted_tokens_total']` is its growth in a round, summed over engine cores; so are the",
        "`_sum` and `_count` of a histogram. A gauge has no growth, and is no such metric.",
        "`gate={'vllm:num_preemptions_total': '50 %'}` judges a counter as a count: fewer is better. `'higher 10 %'` says that",
        "more is better; such numbers are large, and are judged as ratios.",
        "",
        f"A percentile beyond the median can gate only where a launch has {MIN_EXCEEDANCES} values beyond it. The tolerance is",
        "that of `--llmperf-tolerance` (5 %), or the one named here if it is larger; counts and exact metrics have their own.",
        "",
        "| metric | unit | better | class | gates | tolerance | formula |",
        "|---|---|---|---|---|---|---|",
    ]
    for metric in METRICS:
        gates = "yes" if metric.gating else "no"
        tolerance = f"{metric.tolerance:.3g}" if metric.tolerance else ""
        lines.append(
            f"| `{metric.name}` | {metric.unit} | {metric.better} | {metric.kind} | {gates} | {tolerance} | {metric.formula} |"
        )
    return "\n".join(lines) + "\n"
