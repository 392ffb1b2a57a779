"""What a metric is, and the rows of the latencies, which are all alike; the other rows are in `metrics.py`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pytest_llmperf.measure import formulas

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_llmperf.measure.formulas import LaunchSample, RoundSample
    from pytest_llmperf.plan.workload import Workload

CLASS_SEPARATOR = "/"
"""Stands between a class of requests and its metric: `short/ttft_p50_s`."""
MIN_EXCEEDANCES = 10
"""A percentile gates only where at least this many values of a launch are expected beyond it. With fewer it is the largest
value but a few, whose noise no tolerance covers: p99 of 200 requests has no finite 95 % bound."""


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
    sampled: tuple[str, Callable[[Sequence[float]], float]] | None = None
    """A latency and its statistic, of what a launch keeps of all its requests; only for one that is no row of the table."""
    separate: bool = False
    """Measured in a way of its own (a search, an engine that has idled) and only where that is asked for, by no formula here."""

    def too_few(self, workload: Workload, rounds: int) -> str | None:
        """Return why a launch of so many rounds is too small for this percentile, None where it is large enough."""
        if self.beyond is None or (values := self.beyond(workload) * rounds) >= MIN_EXCEEDANCES:
            return None
        needed = math.ceil(workload.requests * rounds * MIN_EXCEEDANCES / values) if values else None
        more = f"; about {needed:,} requests a launch would do" if needed else ""
        return f"a launch has {values:.2g} values beyond it, {MIN_EXCEEDANCES} are needed{more}"


def _once(_: Workload) -> float:
    return 1.0


def _gaps(workload: Workload) -> float:
    return workload.mean_output_tokens - 1.0


# name, values of a request, how many these are, formula
LATENCIES = (
    ("ttft", formulas.ttft, _once, "time to first token: first output token's arrival - request sent"),
    (
        "itl",
        formulas.itl,
        _gaps,
        "inter-token latency: time between two arrivals of output tokens; tokens of one read arrive together. Of tokens that"
        " come in clumps (a quarter of the gaps or more below 5 % of the mean and 1 ms) there is only the mean",
    ),
    (
        "tpot",
        formulas.tpot,
        _once,
        "time per output token of a request: (last token - first token) / (output tokens - 1);"
        " missing where most of an answer came in its first read",
    ),
    ("e2e", formulas.e2e, _once, "end to end: response complete - request sent"),
)
_TAILS = {90: 0.08, 99: 0.15}
"""Percentiles of a launch and the tolerance that they gate with, where a project makes them gate: they are noisier."""


def latency_rows() -> list[Metric]:
    """Return mean, median and tails of each latency."""
    rows = []
    for name, times, number, formula in LATENCIES:
        rows.append(
            Metric(f"{name}_mean_s", "s", "lower", "ratio", False, f"mean of {formula}", formulas.spread(times, formulas.mean))
        )
        # ITL says what TPOT says, and two gates would only split alpha; TPOT hardly depends on how many tokens one read brings.
        gating = name != "itl"
        p50 = formulas.spread(times, formulas.percentile(50))
        rows.append(Metric(f"{name}_p50_s", "s", "lower", "quantile", gating, f"p50 of {formula}", p50))
        for percent, tolerance in _TAILS.items():
            rows.append(Metric(
                f"{name}_p{percent}_s", "s", "lower", "tail", False, f"p{percent}, over all rounds of a launch, of {formula}",
                of_launch=formulas.spread(times, formulas.percentile(percent)), tolerance=tolerance,
                beyond=_beyond(number, percent),
            ))  # fmt: skip
    return rows


def _beyond(number: Callable[[Workload], float], percent: float) -> Callable[[Workload], float]:
    return lambda workload: workload.requests * number(workload) * (100 - percent) / 100


CLASS_LATENCIES = tuple(name for name, *_ in LATENCIES)
"""Latencies that a class of requests has of its own."""
# Latencies of which any percentile can be asked for, their values, and how many a request has.
SAMPLED = {name: (times, number) for name, times, number, _ in LATENCIES} | {
    "ttft_from_send": (formulas.sent_ttft, _once),
    "e2e_from_send": (formulas.sent_e2e, _once),
    "send_delay": (formulas.delay, _once),
}
_STATISTIC = re.compile(r"([a-z0-9_]+?)_(?:p(\d{1,2}(?:\.\d{1,6})?)|(min|max|std))_s", re.ASCII)
_WHOLE: dict[str, Callable[[Sequence[float]], float]] = {"min": min, "max": max, "std": formulas.deviation}


def statistic(name: str) -> Metric | None:
    """Return the metric of a percentile by its name (`ttft_p95_s`, `itl_p99.9_s`, `e2e_max_s`), None where it is none.

    It is that of all requests of a launch. Above 0, below 100, and written in one way only: two names would be two gates.
    """
    match = _STATISTIC.fullmatch(name)
    if match is None or match[1] not in SAMPLED:
        return None
    latency, percent = match[1], float(match[2]) if match[2] else None
    if percent is not None and (not 0 < percent < 100 or f"{percent:.8g}" != match[2]):
        return None
    number = SAMPLED[latency][1]
    shown, reduce = (match[3], _WHOLE[match[3]]) if percent is None else (f"p{match[2]}", formulas.percentile(percent))
    beyond = None if match[3] == "std" else _beyond(number, 100.0 if percent is None else max(percent, 100 - percent))
    return Metric(
        name, "s", "lower", "tail", False, f"{shown}, over all rounds of a launch, of {latency.upper()}",
        of_launch=formulas.spread(SAMPLED[latency][0], reduce), tolerance=_tolerance(percent), beyond=beyond,
        sampled=(latency, reduce),
    )  # fmt: skip


def _tolerance(percent: float | None) -> float:
    if percent is None or percent > 95:
        return _TAILS[99]
    return 0.1 if percent > 90 else _TAILS[90]


def sent_rows() -> list[Metric]:
    """Return latencies from the instant of sending, which an open loop has besides those from the instant that was due."""
    rows = []
    for name, times in (("ttft_from_send", formulas.sent_ttft), ("e2e_from_send", formulas.sent_e2e)):
        for percent in (50, 99):
            formula = (
                f"p{percent} of {name[: name.index('_')].upper()} counted from sending; only where requests are sent at a rate"
            )
            value = formulas.spread(times, formulas.percentile(percent))
            rows.append(Metric(f"{name}_p{percent}_s", "s", "lower", "quantile", False, formula, value))
    return rows


GPU_ROWS = (
    Metric(
        "gpu_power_w", "W", "lower", "ratio", False,
        "energy of all GPUs of the engine in the round / its time", formulas.of_gpus("power_w"),
    ),
    Metric(
        "energy_per_output_token_j", "J", "lower", "ratio", False,
        "energy of all GPUs of the engine in the round / output tokens of complete requests", formulas.energy_per_token,
    ),
    Metric(
        "gpu_utilization_ratio", "share", "higher", "ratio", False,
        "mean over GPUs and samples (10 a second) of the share of time in which a kernel ran", formulas.of_gpus("utilization"),
    ),
    Metric(
        "gpu_sm_clock_mhz", "MHz", "higher", "quantile", False,
        "median SM clock of the samples in which a GPU was busy", formulas.of_gpus("sm_clock_mhz"),
    ),
    Metric(
        "gpu_temperature_c", "degrees", "lower", "quantile", False,
        "highest temperature of the engine's GPUs in the round", formulas.of_gpus("temperature_c"),
    ),
    Metric(
        "gpu_power_capped_ratio", "share", "lower", "ratio", False,
        "share of busy samples in which the power limit held a GPU's clock down: normal under full load",
        formulas.of_gpus("power_capped"),
    ),
    Metric(
        "gpu_watch_cpu_cores", "cores", "lower", "ratio", False,
        "CPU time of what samples the GPUs in the round / its time", formulas.of_gpus("cpu_share"),
    ),
)  # fmt: skip


_CAPACITY_TOLERANCE = 0.10
"""Two cells of a search's usual resolution: a value in the middle of one is known to half of it."""


def idle_rows() -> list[Metric]:
    """Return what is measured of an engine that has idled (`--llmperf-idle`), after over before."""
    after = "after the engine has idled (`--llmperf-idle`) / before, medians over as many rounds: 1 is unchanged"
    return [
        Metric("idle_ttft_ratio", "share", "lower", "ratio", False, f"p50 of TTFT {after}", separate=True),
        Metric("idle_output_tokens_ratio", "share", "higher", "ratio", False, f"output tokens per second {after}", separate=True),
        Metric(
            "idle_first_ttft_s", "s", "lower", "ratio", False, "TTFT of the first request after it, sent alone", separate=True
        ),
    ]


def end_name(capacity: str, end: Literal["low", "high"]) -> str:
    """Return the metric of an end of a capacity's interval, e.g. `capacity_low_requests_per_s`."""
    return capacity.replace("capacity_", f"capacity_{end}_", 1)


def capacity_rows() -> list[Metric]:
    """Return the largest loads that a search can find, with the ends of their intervals; no other launch has them.

    They gate where `llmperf.capacity(...)` was called, and are counted nowhere else: hence not in the table's own gates.
    """
    rows = []
    for name, unit, load in (
        ("capacity_requests_per_s", "requests/s", "rate"),
        ("capacity_concurrency", "requests", "number of requests in flight"),
    ):
        formulas_of = {
            name: f"`llmperf.capacity(...)`: the largest {load} at which the wanted share of requests keeps every limit of `slo`,"
            " the middle of the bracket that a bisection ends with; it gates there",
            end_name(name, "low"): f"the largest {load} that certainly held (95 %); missing where not even the smallest did",
            end_name(name, "high"): f"the smallest {load} that certainly failed (95 %); missing where the largest held",
        }
        rows += [
            Metric(each, unit, "higher", "ratio", False, formula, separate=True,
                   tolerance=_CAPACITY_TOLERANCE if each == name else None)
            for each, formula in formulas_of.items()
        ]  # fmt: skip
    return rows
