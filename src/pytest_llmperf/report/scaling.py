"""Scaling over the TP degree in words: what `llmperf_sweep` and `scaling_of` return, the advisor, and the summary's tables.

Tests that are parametrized by TP and sweeps inside one test come to the same outcomes, hence to the same table.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_llmperf.judge.diagnosis import scaling_advice
from pytest_llmperf.judge.scaling import THROUGHPUT, TIE, Curve, choose, measured_points, points_of
from pytest_llmperf.judge.verdict import Status
from pytest_llmperf.measure import metrics
from pytest_llmperf.plan.kinds import KINDS
from pytest_llmperf.report.tables import scaling_table
from pytest_llmperf.report.text import metric_line, render
from pytest_llmperf.units import quantity

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from pytest_llmperf.judge.scaling import Choice, Point
    from pytest_llmperf.measure.measurement import Measurement
    from pytest_llmperf.report.outcome import Outcome

_ASSERTION_LINES = 6  # pytest cuts an explanation after 8 lines


@dataclass(frozen=True, eq=False)  # `==` is left to the baseline fixture, which judges every degree
class Scaling(Curve):
    """One workload at several degrees of tensor parallelism, the smallest first. `scaling[4]` is the point of TP 4."""

    def __repr__(self) -> str:
        """Return the figures in one line, short enough that pytest shows it whole in a failed assertion."""
        shown = ", ".join(
            f"TP {point.degree}: {point.output_tokens_per_s:,.0f} tok/s {point.speed_up:.2f}x {point.efficiency:.0%}"
            for point in self.points
        )
        return f"<scaling {shown}>"

    def __str__(self) -> str:
        """Return the table, and what it leaves out."""
        return render(scaling_table(self))

    @property
    def remarks(self) -> tuple[str, ...]:
        """Return what a reader of the figures must know: a reference that is not TP 1, and degrees that were not measured."""
        return scaling_table(self).footnotes

    def broken_limits(self, limits: Mapping[str, object] | None = None) -> tuple[str, ...]:
        """Return a sentence for each limit that a degree does not keep, as `Measurement.broken_limits` does for one."""
        return tuple(
            f"TP {measurement.case.engine.tp}: {sentence}"
            for measurement in self.measurements
            for sentence in measurement.broken_limits(limits)
        )


def scaling_of(measurements: Iterable[Measurement], *, unfit: Mapping[int, str] | None = None) -> Scaling:
    """Return how one workload scales, from its measurements at several degrees, in any order.

    `unfit` names degrees that were not measured, and why. Raises ValueError for measurements that are no such thing: two of
    one degree, or different models, workloads, PP or DP; and for one without throughput.
    """
    given = sorted(measurements, key=lambda measurement: measurement.case.engine.tp)
    return Scaling(measured_points(given), tuple(given), dict(unfit or {}))


@dataclass(frozen=True)
class Advice:
    """Which degree to take, and why."""

    degree: int | None
    """None where no degree that was measured meets every limit."""
    reasons: tuple[str, ...]
    """One sentence for each degree, those that were not measured too; the smallest degree first."""
    summary: str
    """The recommendation in one line."""
    cost_per_million_tokens: Mapping[int, float] = field(default_factory=dict)
    """Cost of a million output tokens by degree, in the currency of `cost_per_gpu_hour`; empty where that was not given."""

    def __str__(self) -> str:
        """Return the recommendation, and the sentences below it."""
        return "\n".join([self.summary, *(f"  {reason}" for reason in self.reasons)])


def advise(scaling: Curve, limits: Mapping[str, float] | None = None, *, cost_per_gpu_hour: float | None = None) -> Advice:
    """Return the degree with the most throughput per GPU among those that fit and meet every limit.

    `limits` has metrics and the values that they must not pass in their unit, e.g. `{"ttft_p50_s": 0.5, "tpot_p50_s": 0.02}`:
    upper limits where lower is better, else lower ones. A metric that was not measured at a degree does not meet its limit.
    Of degrees within 2 % of the best (`TIE`) it is the smallest. Raises KeyError for a limit on an unknown metric.
    """
    limits = limits or {}
    choice = choose(scaling, limits, cost_per_gpu_hour=cost_per_gpu_hour)
    sentences = {degree: f"TP {degree} was not measured: {why}" for degree, why in scaling.unfit.items()}
    for point in scaling.points:
        cost = choice.cost_per_million_tokens.get(point.degree)
        price = "" if cost is None else f"; {cost:.3g} per million output tokens"
        sentences[point.degree] = _sentence(point, choice, limits) + price
    return Advice(
        choice.chosen.degree if choice.chosen else None,
        tuple(sentences[degree] for degree in sorted(sentences)),
        _summary(scaling, choice),
        choice.cost_per_million_tokens,
    )


def _missed(point: Point, name: str, limit: float) -> str:
    value, unit = point.medians.get(name), metrics.find(name).unit
    return (
        f"{name} was not measured" if value is None else f"{name} is {quantity(value, unit)}, the limit {quantity(limit, unit)}"
    )


def _sentence(point: Point, choice: Choice, limits: Mapping[str, float]) -> str:
    name, per_gpu = f"TP {point.degree}", point.output_tokens_per_s_per_gpu
    figures = f"{per_gpu:,.0f} tok/s per GPU"
    if missed := choice.missed[point.degree]:
        return f"{name} misses its limits, with {figures}: {'; '.join(_missed(point, each, limits[each]) for each in missed)}"
    among = " of the degrees that meet every limit" if any(choice.missed.values()) else ""
    if point is choice.chosen:
        why = f"the most{among}" if per_gpu == choice.most else f"within {TIE:.0%} of the most{among}, with the fewest GPUs"
        return f"{name} is recommended: {figures}, {why}"
    if choice.is_tie(point):
        return f"{name} is as good within {TIE:.0%}, but takes more GPUs: {figures}"
    return f"{name} gives {1 - per_gpu / choice.most:.0%} less than the most{among}: {figures}"


def _summary(scaling: Curve, choice: Choice) -> str:
    out = [f"TP {degree}" for degree in scaling.degrees if choice.missed[degree]]
    misses = f"{', '.join(out)} miss{'es' if len(out) == 1 else ''} the limits"
    if choice.chosen is None:
        return f"no degree is recommended: {misses}"
    line = f"recommended: TP {choice.chosen.degree}, with {choice.chosen.output_tokens_per_s_per_gpu:,.0f} output tok/s per GPU"
    behind = [point for point in scaling.points if point is not choice.chosen and not choice.missed[point.degree]]
    if behind:
        line += "; " + ", ".join(f"TP {point.degree}: {point.output_tokens_per_s_per_gpu:,.0f}" for point in behind)
    return f"{line}; {misses}" if out else line


def scalings(outcomes: Iterable[Outcome]) -> list[tuple[str, Scaling]]:
    """Return how each workload scales that was measured at two degrees or more, with its id, which is without the degree.

    What is INVALID has no figures; it is among the degrees that were not measured, with the reason, as is what was skipped.
    Endpoints are left out: which degree they run at is not known.
    """
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        kind = KINDS.get(outcome.engine.get("kind", ""))
        if kind is None or kind.starts:
            groups.setdefault((_without_degree(outcome), _without_tp(outcome.engine)), []).append(outcome)
    return [(name, scaling) for (name, _), group in groups.items() for scaling in _of_group(group)]


def _without_degree(outcome: Outcome) -> str:
    """Return a case's id without its degree, e.g. `test_x[tiny-c8]` of `test_x[tiny-tp2-c8]` and of `test_x[tiny-c8]#tp2`."""
    tp = f"tp{outcome.engine['tp']}"
    return re.sub(rf"#{tp}$|-{tp}(?=[-\]]|$)|(?<=\[){tp}-", "", outcome.id)


def _without_tp(engine: dict[str, Any]) -> str:
    return json.dumps({name: value for name, value in engine.items() if name != "tp"}, sort_keys=True)


def _of_group(group: list[Outcome]) -> list[Scaling]:
    """Return the scaling of each workload of a group; a test may send another one at each degree."""
    loads: dict[str, dict[int, dict[str, float]]] = {}
    unfit: dict[int, str] = {}
    for outcome in group:
        degree = int(outcome.engine["tp"])
        medians = {row.metric: row.measured for row in outcome.verdict.metrics if row.measured is not None}
        if outcome.status in (Status.SKIPPED, Status.INVALID):
            unfit[degree] = outcome.verdict.reasons[0] if outcome.verdict.reasons else outcome.status.value
        elif medians.get(THROUGHPUT, 0) > 0:
            loads.setdefault(json.dumps(outcome.workload, sort_keys=True), {})[degree] = medians
    engine = group[0].engine
    return [
        Scaling(points_of(figures, gpus_per_degree=int(engine["pp"]) * int(engine["dp"])), unfit=unfit)
        for figures in loads.values()
        if len(figures) > 1
    ]


def scaling_lines(outcomes: Iterable[Outcome], *, direct_links: bool | None = None) -> list[str]:
    """Return for each workload at several degrees the table, the recommended degree, and why a larger one is slower."""
    lines = []
    for name, scaling in scalings(outcomes):
        lines += ["", f"scaling of {name}", *str(scaling).splitlines(), advise(scaling).summary]
        lines += scaling_advice(scaling, direct_links=direct_links)
    return lines


def scaling_assertion(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the explanation of `scaling == baseline`: which degrees are worse, and what decided it."""
    bad = [outcome for outcome in outcomes if not outcome.status.green]
    rest = [f"TP {outcome.engine['tp']} {outcome.status}" for outcome in outcomes if outcome.status.green]
    lines = []
    for outcome in bad:
        decisive = [metric_line(row) for row in outcome.verdict.metrics if row.status is outcome.status]
        reasons = outcome.notes if outcome.status is Status.NO_BASELINE else outcome.verdict.reasons
        lines += [f"  TP {outcome.engine['tp']} {outcome.status}: {line}" for line in (*reasons, *decisive) or ("",)]
    shown, more = lines[:_ASSERTION_LINES], len(lines) - _ASSERTION_LINES
    verdicts = ", ".join([*(f"TP {outcome.engine['tp']} {outcome.status}" for outcome in bad), *rest])
    return [f"{_without_degree(outcomes[0])}: {verdicts}", *shown, *([f"  and {more} more"] if more > 0 else [])]
