"""How throughput grows with the degree of tensor parallelism, and which degree to take: arithmetic on medians.

Speed-up and efficiency are relative to the smallest degree that was measured; a smaller one is never
extrapolated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

from pytest_llmperf.measure import metrics

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

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
class Curve:
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
        point = next((point for point in self.points if point.degree == degree), None)
        if point is None:
            why = f" ({self.unfit[degree]})" if degree in self.unfit else ""
            known = ", ".join(map(str, self.degrees))
            raise KeyError(
                f"TP {degree} was not measured{why}; measured are {known}: add it to the marker's tp and to --llmperf-tp"
            )
        return point

    def speed_up(self, degree: int) -> float:
        """Return throughput / that of the smallest degree; raises KeyError for a degree that was not measured."""
        return self[degree].speed_up

    def efficiency(self, degree: int) -> float:
        """Return speed-up / ratio of GPUs, 1 being perfect; raises KeyError for a degree that was not measured."""
        return self[degree].efficiency

    def throughput(self, degree: int) -> float:
        """Return output tokens per second; raises KeyError for a degree that was not measured."""
        return self[degree].output_tokens_per_s


def points_of(figures: Mapping[int, Mapping[str, float]], *, gpus_per_degree: int = 1) -> tuple[Point, ...]:
    """Return the points of medians by degree, the smallest first; `gpus_per_degree` is PP x DP, the same for all.

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
    return tuple(points)


def measured_points(measurements: Sequence[Measurement]) -> tuple[Point, ...]:
    """Return the points of one workload, from its measurements at several degrees, in any order.

    Raises ValueError for measurements that are no such thing: two of one degree, or different models, workloads, PP or DP; and
    for one without throughput.
    """
    by_degree = {each.case.engine.tp: each for each in measurements}
    if len(by_degree) < len(measurements):
        raise ValueError("two of the measurements are of the same degree of tensor parallelism; give one for each")
    engines = [(each.case.engine, each.case.workload.fingerprint) for each in measurements]
    if len({(engine.model, engine.pp, engine.dp, workload) for engine, workload in engines}) > 1:
        raise ValueError("the measurements differ in more than TP: give those of one model, workload, PP and DP")
    groups = engines[0][0].pp * engines[0][0].dp if engines else 1
    return points_of({degree: _Medians(each) for degree, each in by_degree.items()}, gpus_per_degree=groups)


class _Medians(Mapping[str, float]):
    """The medians of one measurement: of every metric that it has, and of whatever else is asked for by its name."""

    def __init__(self, measurement: Measurement) -> None:
        launches = measurement.launches
        parts = chain.from_iterable((launch.metrics, *(each.metrics for each in launch.rounds)) for launch in launches)
        self._measurement = measurement
        # Some were not measured, at this degree or at all.
        self._names = [name for name in dict.fromkeys(chain.from_iterable(parts)) if name in self]

    def __getitem__(self, name: str) -> float:
        return self._measurement[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class Choice:
    """Which degree to take: figures, without a word."""

    chosen: Point | None
    """None where no degree that was measured meets every limit."""
    most: float
    """The most output tokens per second of one GPU, among the degrees that meet every limit."""
    missed: Mapping[int, Sequence[str]]
    """By degree the metrics whose limits it does not meet."""
    cost_per_million_tokens: Mapping[int, float]
    """Cost of a million output tokens by degree; empty where no price was given."""

    def is_tie(self, point: Point) -> bool:
        """Return whether a degree is as good as the best, within `TIE`."""
        return point.output_tokens_per_s_per_gpu >= self.most * (1 - TIE)


def choose(curve: Curve, limits: Mapping[str, float], *, cost_per_gpu_hour: float | None = None) -> Choice:
    """Return the degree with the most throughput per GPU among those that meet every limit; of ties the smallest.

    Raises KeyError for a limit on an unknown metric.
    """
    for name in limits:
        if not metrics.is_metric(name):
            raise KeyError(f"limits={{{name!r}: ...}}: not a metric; known are {', '.join(metrics.BY_NAME)}")
    missed = {point.degree: [name for name in limits if not _meets(point, name, limits[name])] for point in curve.points}
    able = [point for point in curve.points if not missed[point.degree]]
    most = max((point.output_tokens_per_s_per_gpu for point in able), default=0.0)
    chosen = next((point for point in able if point.output_tokens_per_s_per_gpu >= most * (1 - TIE)), None)
    cost = {
        point.degree: cost_per_gpu_hour / (point.output_tokens_per_s_per_gpu * 3600) * 1e6
        for point in curve.points
        if cost_per_gpu_hour is not None
    }
    return Choice(chosen, most, missed, cost)


def _meets(point: Point, name: str, limit: float) -> bool:
    """Return whether a degree meets a limit; a metric that was not measured, or is not a number, meets none."""
    value = point.medians.get(name)
    if value is None:
        return False
    return value <= limit if metrics.find(name).better == "lower" else value >= limit
