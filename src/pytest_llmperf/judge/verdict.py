"""The verdict on a case: every gating metric against its baseline, and what they come to together.

Whatever cannot be judged gets a name of its own that is never PASS: no baseline, another workload, a metric that is missing
on one side, an invalid launch.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import chain
from typing import TYPE_CHECKING, Literal

import numpy as np

from pytest_llmperf.judge import noise
from pytest_llmperf.judge.comparison import Comparison
from pytest_llmperf.judge.gates import fitting, gates, judged
from pytest_llmperf.judge.lacking import applies, unexplained
from pytest_llmperf.judge.maths import stats
from pytest_llmperf.judge.noise import Parts
from pytest_llmperf.judge.provenance import engine_facts, model_facts, unlike
from pytest_llmperf.measure import metrics
from pytest_llmperf.measure.metric import end_name
from pytest_llmperf.plan.capacity import CAPACITIES
from pytest_llmperf.plan.fingerprint import fingerprint_of, is_of
from pytest_llmperf.units import percent

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from pytest_llmperf.judge.baseline import Baseline
    from pytest_llmperf.judge.gates import Tolerance
    from pytest_llmperf.judge.noise import Belief
    from pytest_llmperf.measure.measurement import Launch, Measurement
    from pytest_llmperf.measure.metrics import Metric


_IMPLAUSIBLE = 20
"""Nothing gets so many times better, but a unit that changes does."""
_PROVES_NOTHING = 0.5
"""As a fraction. A baseline that hides so large a slow-down has noise that the t-test's assumptions don't cover: a few quiet
launches of the run are no proof that nothing is slower (docs/statistics.md)."""
RESTORE = "restore the file from version control, or record it anew with --update-baselines"
_TOO_GOOD = "so much better that the unit or what is measured must have changed; if it is real, accept it with --update-baselines"


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

    @property
    def green(self) -> bool:
        """Return whether it was proven to be as good as the baseline."""
        return self in (Status.PASS, Status.IMPROVED)


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
    """None for a metric that is only observed, or that is not in the baseline (`rule` says so)."""
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
    tolerance: float | None = None
    """The change for the worse that must not pass; None for a metric that is only observed."""
    detectable: float | None = None
    """The slow-down that is found 19 times in 20 within the budget of launches; None for counts and exact metrics."""
    noise: Parts | None = None
    """The noise of a baseline that was recorded just now."""
    levels: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    """Levels of the launches of baseline and run in log-percent, + worse; None for counts and exact metrics."""
    better: Literal["", "higher"] = ""
    """`higher` for a counter whose gate says so; else the table knows."""

    @property
    def compared(self) -> tuple[float | None, float | None]:
        """Return what the change is of, baseline and run: means of the deciding launches' levels, medians where there are none.

        They differ from the medians where launches do: a launch far off moves their mean.
        """
        if self.levels is None or self.worse is None:
            return self.baseline, self.measured
        sign = 1 if (self.better or metrics.find(self.metric).better) == "lower" else -1
        before = math.exp(sign * statistics.fmean(self.levels[0]) / 100)
        return before, before * (1 + sign * self.worse)


@dataclass(frozen=True)
class Verdict:
    """The verdict on a case."""

    status: Status
    metrics: tuple[MetricVerdict, ...] = ()
    reasons: tuple[str, ...] = ()
    """Why it was not compared, or what changed since the baseline."""
    launches: int = 0
    baseline_launches: int = 0
    baseline_jobs: tuple[str, ...] = ()
    """The run of pytest that each launch of the baseline was measured in."""


def judge(
    measurement: Measurement,
    stored: Baseline | None,
    *,
    design: stats.Design,
    gated: Mapping[str, Tolerance] | None = None,
    beliefs: Mapping[str, Belief],
) -> Verdict:
    """Return the verdict on a measurement; UNDECIDED asks for one more launch.

    `design` holds tolerance, budget and error rates, fixed before the run; `gated` the gating metrics (by default the table's);
    `beliefs` the noise that is expected of each metric (`noise.beliefs`), where nothing is known that of its class.
    """
    launches = len(measurement.launches)
    if not launches:
        return Verdict(Status.INVALID, reasons=("nothing was measured",))
    if measurement.invalid:
        return Verdict(Status.INVALID, reasons=measurement.invalid, launches=launches)
    if stored is None:
        return Verdict(Status.NO_BASELINE, observed(measurement.launches, None, gated), launches=launches)
    if reasons := not_comparable(measurement, stored):
        reasons += (RESTORE,) if stored.doubts else ()
        rows = observed(measurement.launches, stored.launches, gated)
        return Verdict(Status.NOT_COMPARABLE, rows, reasons, launches, len(stored.launches))
    asked = gates(tolerance=design.tolerance) if gated is None else gated
    wanted = [judged(metric.name, asked.get(metric.name)) for metric in _metrics(measurement.launches, stored.launches, asked)]
    rows = tuple(_judge_metric(metric, measurement, stored, asked.get(metric.name), design, beliefs) for metric in wanted)
    jobs, status = tuple(launch.job for launch in stored.launches), _together(rows)
    reasons = tuple(filter(None, [_cannot_find(rows)])) if status is Status.INCONCLUSIVE else ()
    return Verdict(status, rows, reasons, launches, len(stored.launches), jobs)


def not_comparable(measurement: Measurement, stored: Baseline) -> tuple[str, ...]:
    """Return why the two cannot be held against each other: another model, kind of engine, or workload, or other formulas.

    A baseline with doubts is no evidence either.
    """
    case = measurement.case
    reasons = [*stored.doubts, *unlike(stored.provenance.engine, engine_facts(case) | model_facts(case, measurement.launches))]
    if not _alike(measurement, stored):
        now = case.workload.description
        changed = sorted(name for name in now | stored.workload if now.get(name) != stored.workload.get(name))
        reasons += [f"the workload has changed: {name} {stored.workload.get(name)} -> {now.get(name)}" for name in changed]
        reasons += [] if changed else ["the workload has changed"]
    if stored.formulas != metrics.FORMULAS:
        reasons.append(f"the formulas of metrics have changed: version {stored.formulas} -> {metrics.FORMULAS}")
    return tuple(reasons)


def _alike(measurement: Measurement, stored: Baseline) -> bool:
    """Return whether both sent the same; fingerprints of older baselines hold the names of files, which say nothing."""
    fingerprint = measurement.case.workload.fingerprint
    if fingerprint == stored.workload_fingerprint:
        return True
    return is_of(stored.workload_fingerprint, stored.workload) and fingerprint == fingerprint_of(stored.workload)


def _together(rows: Iterable[MetricVerdict]) -> Status:
    statuses = {row.status for row in rows}
    order = (Status.REGRESSED, Status.NOT_COMPARABLE, Status.UNDECIDED, Status.INCONCLUSIVE, Status.IMPROVED)
    # Without a single comparison nothing has passed.
    return next(
        (status for status in order if status in statuses), Status.PASS if Status.PASS in statuses else Status.NOT_COMPARABLE
    )


def _cannot_find(rows: Iterable[MetricVerdict]) -> str:
    """Return which tolerances the baseline is too noisy for; empty where it is not the noise that leaves a gate undecided."""
    noisy = [row for row in rows if row.status is Status.INCONCLUSIVE and (row.detectable or 0.0) > (row.tolerance or math.inf)]
    if not noisy:
        return ""
    tolerances = " or ".join(dict.fromkeys(percent(row.tolerance or 0.0) for row in noisy))
    found = ", ".join(f"{percent(row.detectable or 0.0, up=True)} of {row.metric}" for row in noisy)
    return f"this baseline cannot find {tolerances}: no less than {found}; extend it with --update-baselines on a quiet host"


def observed(
    now: Sequence[Launch], before: Sequence[Launch] | None, gated: Mapping[str, Tolerance] | None = None
) -> tuple[MetricVerdict, ...]:
    """Return every metric's medians without a verdict; with `gated` also those that only a gate names."""
    asked = gated or {}
    return tuple(
        _observe(judged(each.name, asked.get(each.name)), before or (), now) for each in _metrics(now, before or (), asked)
    )


def _metrics(now: Iterable[Launch], before: Iterable[Launch], asked: Iterable[str] = ()) -> list[Metric]:
    """Return the table's metrics, those of the classes that there are, and whatever is asked for besides."""
    measured = chain.from_iterable(
        figures for launch in (*before, *now) for figures in (launch.metrics, *(each.metrics for each in launch.rounds))
    )
    by_name = (name for name in measured if name not in metrics.BY_NAME and metrics.is_metric(name))
    return [metrics.find(name) for name in dict.fromkeys([*metrics.BY_NAME, *by_name, *asked])]


def _median(values: list[list[float]]) -> float | None:
    flat = [value for launch in values for value in launch]
    return statistics.median(flat) if flat else None


def _observe(metric: Metric, before: Iterable[Launch], now: Iterable[Launch]) -> MetricVerdict:
    old, new = _median(noise.values(metric, before)), _median(noise.values(metric, now))
    worse = None
    if old and new:
        worse = new / old - 1 if metric.better == "lower" else 1 - new / old
    better: Literal["", "higher"] = "higher" if metric.better == "higher" != metrics.find(metric.name).better else ""
    return MetricVerdict(metric.name, None, old, new, worse, better=better)


def _judge_metric(
    metric: Metric,
    measurement: Measurement,
    stored: Baseline,
    gate: Tolerance | None,
    design: stats.Design,
    beliefs: Mapping[str, Belief],
) -> MetricVerdict:
    seen = _observe(metric, stored.launches, measurement.launches)
    if gate is None:
        return seen
    old, new = noise.values(metric, stored.launches), noise.values(metric, measurement.launches)
    spent = len(measurement.launches) >= design.launches
    if not any(old) and not gate.asked:
        if why := unexplained(metric, stored, measured=any(new) or applies(metric, stored.launches)):
            return replace(seen, status=Status.NOT_COMPARABLE, rule=why)
        return _never_had(seen, metric, measurement, new)
    if why := _not_judged(metric, measurement, stored, old, new) or _other_starts(metric, old, new, spent=spent):
        return replace(seen, status=Status.NOT_COMPARABLE, rule=why)
    if not new:
        return replace(seen, status=Status.UNDECIDED, rule=f"no start of this run was {metric.start}")
    metric = fitting(metric, (*old, *new))
    comparison = Comparison(metric, old, gate, design, beliefs.get(metric.name))
    try:
        # Judged as it was after each launch: a decision, once made, stands.
        for look in range(1, len(new) + 1):
            decision = comparison.decide(new[:look])
            if decision.outcome != "more":
                break
        detectable, levels = comparison.detectable, comparison.levels(new)
    except stats.UnusableSampleError as error:
        return replace(seen, status=Status.NOT_COMPARABLE, rule=str(error))
    status, rule = _ruled(comparison, decision, decidable=bool(levels), spent=spent)
    if status.green and _implausible(metric, old, new[:look]):
        status, rule = Status.NOT_COMPARABLE, _TOO_GOOD
    if why := _beyond_bounds(metric, status, stored.launches, measurement.launches):
        status, rule = Status.NOT_COMPARABLE, why
    return replace(
        seen,
        status=status,
        worse=_fraction(decision.estimate, metric),
        worse_low=_fraction(decision.lower, metric),
        worse_high=_fraction(decision.upper, metric),
        rule=rule,
        tolerance=gate.share,
        detectable=detectable,
        levels=levels,
    )


def _ruled(comparison: Comparison, decision: stats.Decision, *, decidable: bool, spent: bool) -> tuple[Status, str]:
    """Return the status that a decision comes to, and the rule: no pass where the baseline could find nothing."""
    status, rule = _OUTCOMES[decision.outcome], decision.rule
    if status is Status.UNDECIDED and spent:
        return Status.INCONCLUSIVE, f"too few starts of this run were {comparison.metric.start}"
    if status is Status.INCONCLUSIVE and decidable and rule != stats.HOPELESS:
        needed = comparison.launches_needed
        rule += f"; {needed} would most likely do" if needed else "; the baseline needs more launches"
    if status.green and (why := _proves_nothing(comparison.detectable, comparison.gate)):
        return Status.INCONCLUSIVE, why
    return status, rule


def _never_had(seen: MetricVerdict, metric: Metric, measurement: Measurement, new: list[list[float]]) -> MetricVerdict:
    """Return that the baseline never had a metric, as was said when it was recorded: there is nothing to lose."""
    return replace(seen, rule="not in the baseline" if any(new) or applies(metric, measurement.launches) else "")


def _proves_nothing(detectable: float | None, gate: Tolerance) -> str | None:
    """Return why that a run seems no slower is no proof: the baseline hides far more than the tolerance; None where it is."""
    if detectable is None or detectable <= max(_PROVES_NOTHING, (1 + gate.share) ** 2 - 1):
        return None
    return f"the baseline's noise hides {percent(detectable)}: that the run seems no slower is no proof"


def _implausible(metric: Metric, before: list[list[float]], now: list[list[float]]) -> bool:
    old, new = _median(before), _median(now)
    if metric.kind == "count" or not old or new is None:
        return False
    return new > _IMPLAUSIBLE * old if metric.better == "higher" else old > _IMPLAUSIBLE * new


def _beyond_bounds(metric: Metric, status: Status, before: Sequence[Launch], now: Sequence[Launch]) -> str | None:
    """Return why the bounds of a search keep a capacity from being compared; None where they do not.

    A value at a bound is only a limit. That at the upper one is the least that the capacity can be, so what is worse than a
    baseline there is worse all the more, and all that reach it are alike; that at the lower one is the most that it can be.
    """
    if metric.name not in CAPACITIES.values() or status in (Status.REGRESSED, Status.UNDECIDED):
        return None
    low, high = end_name(metric.name, "low"), end_name(metric.name, "high")
    if any(launch.metrics.get(low) is None for launch in now):
        return "not even the smallest load holds in this run: the capacity is below the bounds of the search"
    open_before, open_now = ([launch.metrics.get(high) is None for launch in side] for side in (before, now))
    if any(open_before) and not all(open_now):
        return "the baseline is at the upper bound of the search, its capacity is not known; raise the bound and record it anew"
    return None


def _not_judged(
    metric: Metric, measurement: Measurement, stored: Baseline, old: list[list[float]], new: list[list[float]]
) -> str | None:
    """Return why a gating metric cannot be judged: missing on a side, or a percentile of too few values."""
    if not all(new) or not all(old):
        where = "this run" if not all(new) else "some baseline launches" if any(old) else "the baseline"
        return f"not measured in {where}"
    if not all(math.isfinite(value) for launch in (*old, *new) for value in launch):
        return "a value is not a finite number"
    rounds = min(len(launch.rounds) for launch in (*stored.launches, *measurement.launches))
    return metric.too_few(measurement.case.workload, rounds)


def _other_starts(metric: Metric, old: list[list[float]], new: list[list[float]], *, spent: bool) -> str | None:
    """Return why starts of the baseline and the run cannot be compared: none is of the sort that the metric is told of.

    A first start may be cold, and the next one warm; one that is cold after a warm one will not come.
    """
    if not old:
        return f"no start of the baseline was {metric.start}"
    return f"no start of this run was {metric.start}" if not new and (spent or metric.start == "cold") else None


def _fraction(log_percent: float, metric: Metric) -> float | None:
    sign = 1 if metric.better == "lower" else -1
    return sign * float(np.expm1(sign * log_percent / 100)) if abs(log_percent) < 2000 else None
