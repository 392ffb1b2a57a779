"""How throughput grows with the degree of tensor parallelism, and which degree to take.

Pure arithmetic on medians. Speed-up and efficiency are relative to the smallest degree that was measured; a smaller one is never
extrapolated.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

from tabulate import tabulate

from pytest_llmperf.measure import metrics

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pytest_llmperf.measure.measurement import Measurement

THROUGHPUT = "output_tokens_per_s"
TIE = 0.02
"""Degrees whose throughput per GPU differs by no more than this share are as good as each other."""


@dataclass(frozen=True)
class Point:
    """What one degree of tensor parallelism came to."""

    degree: int
    gpus: int
    """GPUs that the engine takes: TP x PP x DP; cores on a CPU."""
    speed_up: float
    """Throughput / that of the smallest degree."""
    efficiency: float
    """Speed-up / (GPUs / those of the smallest degree); 1 is perfect scaling."""
    medians: Mapping[str, float]
    """Every metric that was measured, in the metric's unit: medians over all rounds."""

    @property
    def output_tokens_per_s(self) -> float:
        """Return output tokens per second of the engine."""
        return self.medians[THROUGHPUT]

    @property
    def output_tokens_per_s_per_gpu(self) -> float:
        """Return output tokens per second of one GPU."""
        return self.output_tokens_per_s / self.gpus

    @property
    def ttft_p50_s(self) -> float | None:
        """Return the median time to first token in seconds, None where it was not measured."""
        return self.medians.get("ttft_p50_s")

    @property
    def tpot_p50_s(self) -> float | None:
        """Return the median time per output token in seconds, None where it was not measured."""
        return self.medians.get("tpot_p50_s")

    @property
    def not_scaling(self) -> float:
        """Return 1 - efficiency: the share of the GPUs' time that did not become throughput.

        It is an upper bound of the share that communication takes, because it holds all else that does not scale too: the
        scheduler and the front end, which no degree divides, kernels that are slower on narrower shards, a batch or a client
        that fills no more GPUs. It bounds nothing where a larger degree makes something else better: with more memory for the
        KV cache preemptions end, and the share may be negative.
        """
        return 1 - self.efficiency


@dataclass(frozen=True, eq=False)  # `==` is left to the baseline fixture, which judges every degree
class Scaling:
    """One workload at several degrees of tensor parallelism, the smallest first. `scaling[4]` is the point of TP 4."""

    points: tuple[Point, ...]
    measurements: tuple[Measurement, ...] = ()
    """What the points were made from, if anything but figures; in the points' order."""
    unfit: Mapping[int, str] = field(default_factory=dict)
    """Degrees that were not measured, and why."""

    @property
    def degrees(self) -> tuple[int, ...]:
        """Return the degrees that were measured, the smallest first."""
        return tuple(point.degree for point in self.points)

    @property
    def reference(self) -> Point:
        """Return the point that speed-up and efficiency are relative to: that of the smallest degree."""
        return self.points[0]

    def __getitem__(self, degree: int) -> Point:
        """Return the point of a degree; raises KeyError for one that was not measured."""
        found = next((point for point in self.points if point.degree == degree), None)
        if found is None:
            why = f" ({self.unfit[degree]})" if degree in self.unfit else ""
            known = ", ".join(map(str, self.degrees))
            raise KeyError(
                f"TP {degree} was not measured{why}; measured are {known}: add it to the marker's tp and to --llmperf-tp"
            )
        return found

    def speed_up(self, degree: int) -> float:
        """Return throughput / that of the smallest degree; raises KeyError for a degree that was not measured."""
        return self[degree].speed_up

    def efficiency(self, degree: int) -> float:
        """Return speed-up / ratio of GPUs, 1 being perfect; raises KeyError for a degree that was not measured."""
        return self[degree].efficiency

    def throughput(self, degree: int) -> float:
        """Return output tokens per second; raises KeyError for a degree that was not measured."""
        return self[degree].output_tokens_per_s

    def __repr__(self) -> str:
        """Return the figures in one line, short enough that pytest shows it whole in a failed assertion."""
        shown = ", ".join(
            f"TP {point.degree}: {point.output_tokens_per_s:,.0f} tok/s {point.speed_up:.2f}x {point.efficiency:.0%}"
            for point in self.points
        )
        return f"<scaling {shown}>"

    def __str__(self) -> str:
        """Return the table, and what it leaves out."""
        with_degree = any(point.gpus != point.degree for point in self.points)
        rows = [([str(point.degree)] if with_degree else []) + _cells(point) for point in self.points]
        headers = ["GPUs", "output tok/s", "speed-up", "efficiency", "tok/s per GPU", "TTFT p50", "TPOT p50"]
        table = tabulate(rows, headers=(["TP"] if with_degree else []) + headers, disable_numparse=True)
        return "\n".join([table, *self.remarks])

    @property
    def remarks(self) -> tuple[str, ...]:
        """Return what a reader of the figures must know: a reference that is not TP 1, and degrees that were not measured."""
        first = self.reference.degree
        relative = f"speed-up and efficiency are relative to TP {first}, the smallest degree that was measured"
        return (*([relative] if first != 1 else []), *(_left_out(*one) for one in sorted(self.unfit.items())))


def _cells(point: Point) -> list[str]:
    return [
        str(point.gpus),
        f"{point.output_tokens_per_s:,.0f}",
        f"{point.speed_up:.2f}x",
        f"{point.efficiency:.0%}",
        f"{point.output_tokens_per_s_per_gpu:,.0f}",
        *("-" if value is None else _quantity(value, "s") for value in (point.ttft_p50_s, point.tpot_p50_s)),
    ]


def _quantity(value: float, unit: str) -> str:
    if unit == "s":
        return f"{value * 1e3:.3g} ms" if abs(value) < 1 else f"{value:.3g} s"
    if unit == "bytes":
        return f"{value / (1 << 30):.2f} GiB"
    return f"{value:,.0f} {unit}" if abs(value) >= 100 else f"{value:.3g} {unit}"


def _left_out(degree: int, why: str) -> str:
    return f"TP {degree} was not measured: {why}"


def scaling_from(
    figures: Mapping[int, Mapping[str, float]],
    *,
    gpus_per_degree: int = 1,
    measurements: tuple[Measurement, ...] = (),
    unfit: Mapping[int, str] | None = None,
) -> Scaling:
    """Return the scaling of medians by degree; `gpus_per_degree` is PP x DP, the same for all.

    Raises ValueError where there is no degree, or one whose throughput is missing or not above 0.
    """
    if not figures:
        raise ValueError("scaling needs a measurement at one degree of tensor parallelism or more, and there is none")
    for degree, medians in figures.items():
        if not medians.get(THROUGHPUT, 0) > 0:
            raise ValueError(f"TP {degree} has no {THROUGHPUT}: its requests must complete before it can be compared")
    first = min(figures)
    points = []
    for degree in sorted(figures):
        speed_up = figures[degree][THROUGHPUT] / figures[first][THROUGHPUT]
        points.append(Point(degree, degree * gpus_per_degree, speed_up, speed_up * first / degree, figures[degree]))
    return Scaling(tuple(points), measurements, dict(unfit or {}))


def scaling_of(measurements: Iterable[Measurement], *, unfit: Mapping[int, str] | None = None) -> Scaling:
    """Return how one workload scales, from its measurements at several degrees, in any order.

    `unfit` names degrees that were not measured, and why. Raises ValueError for measurements that are no such thing: two of
    one degree, or different models, workloads, PP or DP; and for one without throughput.
    """
    given = list(measurements)
    found = {one.case.engine.tp: one for one in given}
    if len(found) < len(given):
        raise ValueError("two of the measurements are of the same degree of tensor parallelism; give one for each")
    alike = {(one.case.engine.model, one.case.engine.pp, one.case.engine.dp, one.case.workload.fingerprint) for one in given}
    if len(alike) > 1:
        raise ValueError("the measurements differ in more than TP: give those of one model, workload, PP and DP")
    return scaling_from(
        {degree: _medians(one) for degree, one in found.items()},
        gpus_per_degree=given[0].case.engine.pp * given[0].case.engine.dp if given else 1,
        measurements=tuple(found[degree] for degree in sorted(found)),
        unfit=unfit,
    )


def _medians(measurement: Measurement) -> dict[str, float]:
    parts = chain.from_iterable((launch.metrics, *(one.metrics for one in launch.rounds)) for launch in measurement.launches)
    medians = {}
    for name in dict.fromkeys(chain.from_iterable(parts)):
        try:
            medians[name] = measurement[name]
        except KeyError:  # not measured, at this degree or at all
            continue
    return medians


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


def advise(scaling: Scaling, limits: Mapping[str, float] | None = None, *, cost_per_gpu_hour: float | None = None) -> Advice:
    """Return the degree with the most throughput per GPU among those that fit and meet every limit.

    `limits` has metrics and the values that they must not pass in their unit, e.g. `{"ttft_p50_s": 0.5, "tpot_p50_s": 0.02}`:
    upper limits where lower is better, else lower ones. A metric that was not measured at a degree does not meet its limit.
    Of degrees within 2 % of the best (`TIE`) it is the smallest. Raises KeyError for a limit on an unknown metric.
    """
    limits = limits or {}
    for name in limits:
        if not metrics.is_metric(name):
            raise KeyError(f"limits={{{name!r}: ...}}: not a metric; known are {', '.join(metrics.BY_NAME)}")
    missed = {point.degree: _missed(point, limits) for point in scaling.points}
    able = [point for point in scaling.points if not missed[point.degree]]
    most = max((point.output_tokens_per_s_per_gpu for point in able), default=0.0)
    chosen = next((point for point in able if point.output_tokens_per_s_per_gpu >= most * (1 - TIE)), None)
    cost = {
        point.degree: cost_per_gpu_hour / (point.output_tokens_per_s_per_gpu * 3600) * 1e6
        for point in scaling.points
        if cost_per_gpu_hour is not None
    }
    sentences = {degree: _left_out(degree, why) for degree, why in scaling.unfit.items()}
    for point in scaling.points:
        price = f"; {cost[point.degree]:.3g} per million output tokens" if cost else ""
        sentences[point.degree] = _sentence(point, chosen, most, missed) + price
    return Advice(
        chosen.degree if chosen else None,
        tuple(sentences[degree] for degree in sorted(sentences)),
        _summary(scaling, chosen, missed),
        cost,
    )


def _missed(point: Point, limits: Mapping[str, float]) -> list[str]:
    """Return the limits that a degree does not meet, each with the figures."""
    found = []
    for name, limit in limits.items():
        metric, value = metrics.find(name), point.medians.get(name)
        if value is None:
            found.append(f"{name} was not measured")
        elif not (value <= limit if metric.better == "lower" else value >= limit):  # NaN meets no limit
            found.append(f"{name} is {_quantity(value, metric.unit)}, the limit {_quantity(limit, metric.unit)}")
    return found


def _sentence(point: Point, chosen: Point | None, most: float, missed: Mapping[int, list[str]]) -> str:
    name, per_gpu = f"TP {point.degree}", point.output_tokens_per_s_per_gpu
    figures = f"{per_gpu:,.0f} tok/s per GPU"
    if missed[point.degree]:
        return f"{name} misses its limits, with {figures}: {'; '.join(missed[point.degree])}"
    among = " of the degrees that meet every limit" if any(missed.values()) else ""
    if point is chosen:
        why = f"the most{among}" if per_gpu == most else f"within {TIE:.0%} of the most{among}, with the fewest GPUs"
        return f"{name} is recommended: {figures}, {why}"
    if per_gpu >= most * (1 - TIE):
        return f"{name} is as good within {TIE:.0%}, but takes more GPUs: {figures}"
    return f"{name} gives {1 - per_gpu / most:.0%} less than the most{among}: {figures}"


def _summary(scaling: Scaling, chosen: Point | None, missed: Mapping[int, list[str]]) -> str:
    out = [f"TP {degree}" for degree in scaling.degrees if missed[degree]]
    if chosen is None:
        return f"no degree is recommended: {', '.join(out)} miss{'es' if len(out) == 1 else ''} the limits"
    line = f"recommended: TP {chosen.degree}, with {chosen.output_tokens_per_s_per_gpu:,.0f} output tok/s per GPU"
    behind = [point for point in scaling.points if point is not chosen and not missed[point.degree]]
    if behind:
        line += "; " + ", ".join(f"TP {point.degree}: {point.output_tokens_per_s_per_gpu:,.0f}" for point in behind)
    if out:
        line += f"; {', '.join(out)} miss{'es' if len(out) == 1 else ''} the limits"
    return line
