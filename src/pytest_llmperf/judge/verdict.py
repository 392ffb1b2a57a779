"""The verdict on a case: every gating metric against its baseline, and what they come to together.

Whatever cannot be judged gets a name of its own that is never PASS: no baseline, another workload, a metric that is missing
on one side, an invalid launch.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

from pytest_llmperf.judge import counts, stats
from pytest_llmperf.measure import metrics

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from pytest_llmperf.judge.baseline import Baseline
    from pytest_llmperf.measure import Launch, Measurement
    from pytest_llmperf.measure.metrics import Metric


class Status(StrEnum):
    """What a comparison, or a case, comes to."""

    PASS = "PASS"
    IMPROVED = "IMPROVED"
    REGRESSED = "REGRESSED"
    INCONCLUSIVE = "INCONCLUSIVE"
    UNDECIDED = "UNDECIDED"
    """Another launch must tell; never a final status."""
    NO_BASELINE = "NO-BASELINE"
    NOT_COMPARABLE = "NOT-COMPARABLE"
    INVALID = "INVALID"
    RECORDED = "RECORDED"
    SKIPPED = "SKIPPED"
    """Never measured: the host cannot run it, or the test skipped itself."""
    MEASURED = "MEASURED"
    """The test never asked for the baseline."""

    @property
    def compared(self) -> bool:
        """Return whether numbers were held against a baseline."""
        return self in (Status.PASS, Status.IMPROVED, Status.REGRESSED, Status.INCONCLUSIVE)


_OUTCOMES = {
    "pass": Status.PASS,
    "improved": Status.IMPROVED,
    "regressed": Status.REGRESSED,
    "inconclusive": Status.INCONCLUSIVE,
    "more": Status.UNDECIDED,
}


@dataclass(frozen=True)
class MetricVerdict:
    """The verdict on one metric. Changes are fractions, + is worse whatever the metric's direction."""

    metric: str
    status: Status | None
    """None for a metric that is only observed."""
    baseline: float | None
    """Median over the baseline's rounds, in the metric's unit."""
    measured: float | None
    worse: float | None = None
    """How much worse: 0.05 is a value 5 % higher where lower is better, 5 % lower where higher is."""
    worse_low: float | None = None
    """One-sided lower bound of `worse`, at the level that a regression needs; None where there is none."""
    worse_high: float | None = None
    """One-sided upper bound of `worse`, at the level that a pass needs; None where there is none."""
    rule: str = ""


@dataclass(frozen=True)
class Verdict:
    """The verdict on a case."""

    status: Status
    metrics: tuple[MetricVerdict, ...] = ()
    reasons: tuple[str, ...] = ()
    """Why it was not compared, or what changed since the baseline."""
    launches: int = 0
    baseline_launches: int = 0


def judge(
    measurement: Measurement,
    stored: Baseline | None,
    *,
    design: stats.Design,
    priors: Mapping[str, stats.Prior],
) -> Verdict:
    """Return the verdict on a measurement; UNDECIDED asks for one more launch.

    `design` holds tolerance, budget and error rates, fixed before the run; `priors` the noise that is believed of each metric
    (`fit_priors`), where nothing is known that of its class.
    """
    launches = len(measurement.launches)
    if not launches:
        return Verdict(Status.INVALID, reasons=("nothing was measured",))
    if measurement.invalid:
        return Verdict(Status.INVALID, reasons=measurement.invalid, launches=launches)
    if stored is None:
        return Verdict(Status.NO_BASELINE, observed(measurement.launches, None), launches=launches)
    if reasons := not_comparable(measurement, stored):
        rows = observed(measurement.launches, stored.launches)
        return Verdict(Status.NOT_COMPARABLE, rows, reasons, launches, len(stored.launches))
    rows = tuple(_judge_metric(one, stored.launches, measurement.launches, design, priors) for one in metrics.METRICS)
    return Verdict(_together(rows), rows, launches=launches, baseline_launches=len(stored.launches))


def not_comparable(measurement: Measurement, stored: Baseline) -> tuple[str, ...]:
    """Return why the two cannot be held against each other: another workload, or other formulas."""
    from dataclasses import asdict

    reasons = []
    if measurement.case.workload.fingerprint != stored.workload_fingerprint:
        now = asdict(measurement.case.workload)
        changed = sorted(name for name in now | stored.workload if now.get(name) != stored.workload.get(name))
        reasons += [f"the workload has changed: {name} {stored.workload.get(name)} -> {now.get(name)}" for name in changed]
        reasons += [] if changed else ["the workload has changed"]
    if stored.formulas != metrics.FORMULAS:
        reasons.append(f"the formulas of metrics have changed: version {stored.formulas} -> {metrics.FORMULAS}")
    return tuple(reasons)


def _together(rows: Iterable[MetricVerdict]) -> Status:
    found = {row.status for row in rows}
    order = (Status.REGRESSED, Status.NOT_COMPARABLE, Status.UNDECIDED, Status.INCONCLUSIVE, Status.IMPROVED)
    # Without a single comparison nothing has passed.
    return next((one for one in order if one in found), Status.PASS if Status.PASS in found else Status.NOT_COMPARABLE)


def observed(now: Sequence[Launch], before: Sequence[Launch] | None) -> tuple[MetricVerdict, ...]:
    """Return every metric's medians without a verdict."""
    return tuple(_observe(metric, before or (), now) for metric in metrics.METRICS)


def _values(metric: Metric, launches: Iterable[Launch]) -> list[list[float]]:
    return [[value for value in launch.values(metric.name) if value is not None] for launch in launches]


def _median(values: list[list[float]]) -> float | None:
    flat = [value for one in values for value in one]
    return statistics.median(flat) if flat else None


def _observe(metric: Metric, before: Iterable[Launch], now: Iterable[Launch]) -> MetricVerdict:
    old, new = _median(_values(metric, before)), _median(_values(metric, now))
    worse = None
    if old and new:
        worse = new / old - 1 if metric.better == "lower" else 1 - new / old
    return MetricVerdict(metric.name, None, old, new, worse)


def _judge_metric(
    metric: Metric,
    before: Sequence[Launch],
    now: Sequence[Launch],
    design: stats.Design,
    priors: Mapping[str, stats.Prior],
) -> MetricVerdict:
    seen = _observe(metric, before, now)
    if not metric.gating:
        return seen
    old, new = _values(metric, before), _values(metric, now)
    if not all(old) or not all(new):
        if not any(old):
            return seen  # the baseline never had it: there is nothing to lose
        where = "this run" if not all(new) else "some baseline launches"
        return _with(seen, Status.NOT_COMPARABLE, f"not measured in {where}")
    try:
        # Judged as it was after each launch: a decision, once made, stands.
        for look in range(1, len(new) + 1):
            decision = _decide(metric, old, new[:look], design, priors)
            if decision.outcome != "more":
                break
    except stats.UnusableSampleError as error:
        return _with(seen, Status.NOT_COMPARABLE, str(error))
    return MetricVerdict(
        metric.name,
        _OUTCOMES[decision.outcome],
        seen.baseline,
        seen.measured,
        _fraction(decision.estimate, metric),
        _fraction(decision.lower, metric),
        _fraction(decision.upper, metric),
        decision.rule,
    )


def _with(seen: MetricVerdict, status: Status, rule: str) -> MetricVerdict:
    return MetricVerdict(seen.metric, status, seen.baseline, seen.measured, seen.worse, rule=rule)


def _fraction(log_percent: float, metric: Metric) -> float | None:
    sign = 1 if metric.better == "lower" else -1
    return sign * float(np.expm1(sign * log_percent / 100)) if abs(log_percent) < 2000 else None


def _decide(
    metric: Metric,
    old: list[list[float]],
    new: list[list[float]],
    design: stats.Design,
    priors: Mapping[str, stats.Prior],
) -> stats.Decision:
    higher = metric.better == "higher"
    if metric.kind == "count":
        return counts.decide_count(_counts(old), _counts(new), design=design)
    if metric.kind == "exact":
        before, now = ([one[0] for one in side] for side in (old, new))
        if len(before) == 1 or counts.is_exact(before, tolerance=design.tolerance):
            return counts.decide_exact(before, now, design=design, higher_is_better=higher)
    scatter = stats.round_scatter(old)
    levels = [stats.launch_levels(side, higher_is_better=higher, scatter=scatter) for side in (old, new)]
    return stats.decide(*levels, design=design, prior=priors.get(metric.name, _default_prior(metric)))


def _default_prior(metric: Metric) -> stats.Prior:
    return stats.PRIORS.get(metric.kind, stats.PRIORS["ratio"])


def _counts(side: list[list[float]]) -> counts.Counts:
    totals = [sum(one) for one in side]
    if not all(math.isfinite(total) for total in totals):
        raise stats.UnusableSampleError(f"A count is {next(one for one in totals if not math.isfinite(one))}.")
    return counts.Counts(tuple(int(total) for total in totals), tuple(len(one) for one in side))


def fit_priors(baselines: Iterable[Baseline]) -> dict[tuple[str, str], stats.Prior]:
    """Return per case id and metric the noise between launches that the suite's own baselines lead to expect."""
    fitted: dict[tuple[str, str], stats.Prior] = {}
    stored = list(baselines)
    for kind, default in stats.PRIORS.items():
        keys, noise = [], []
        for one in stored:
            for metric in metrics.METRICS:
                if metric.gating and metric.kind == kind and (found := _noise(metric, one.launches)):
                    keys.append((one.case_id, metric.name))
                    noise.append(found)
        if noise:
            variances, dfs, scatters = zip(*noise, strict=True)
            fitted |= zip(keys, stats.fit_priors(variances, dfs, scatters, default=default), strict=True)
    return fitted


def _noise(metric: Metric, launches: Sequence[Launch]) -> tuple[float, int, float] | None:
    """Return the variance between launches, its degrees of freedom and the scatter of rounds; None where it cannot be told."""
    values = _values(metric, launches)
    try:
        scatter = stats.round_scatter(values)
        levels = stats.launch_levels(values, higher_is_better=metric.better == "higher", scatter=scatter)
    except stats.UnusableSampleError:
        return None
    return (float(np.var(levels, ddof=1)), levels.size - 1, scatter) if levels.size > 1 else None
