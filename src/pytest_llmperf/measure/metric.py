"""What a metric is, and the rows of the latencies, which are all alike; the other rows are in `metrics.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pytest_llmperf.measure import formulas

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_llmperf.measure.formulas import LaunchSample, RoundSample
    from pytest_llmperf.plan.workload import Workload

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
    start: Literal["warm", "cold"] | None = None
    """Which starts it is compared of: those that found their graphs in the compile cache, those that compiled, or all (None)."""
    beyond: Callable[[Workload], float] | None = None
    """How many values of a round lie beyond the percentile; None where that does not matter."""

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


def _beyond(number: Callable[[Workload], float], percent: int) -> Callable[[Workload], float]:
    return lambda workload: workload.requests * number(workload) * (100 - percent) / 100


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
