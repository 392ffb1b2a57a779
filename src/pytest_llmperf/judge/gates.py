"""Which metrics can fail a test, and by how much they may get worse: the table's defaults, then the project's entries."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

from pytest_llmperf.measure.metrics import BY_NAME, CLASS_SEPARATOR, METRICS, find, is_counter, is_metric, names_of
from pytest_llmperf.plan.capacity import CAPACITIES, CAPACITY
from pytest_llmperf.plan.checks import PlanError
from pytest_llmperf.plan.gates import Gate

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any

    from pytest_llmperf.measure.metrics import Metric


@dataclass(frozen=True)
class Tolerance:
    """What is asked of a gating metric."""

    share: float
    """The change for the worse that must not pass, as a fraction."""
    asked: bool = False
    """The project named the metric: that it cannot be judged is then no small matter."""
    better: Literal["", "higher"] = ""
    """`higher` where the gate says so of a counter, of which nobody else knows what is good."""


def gates(entries: Iterable[Gate] = (), *, tolerance: float) -> dict[str, Tolerance]:
    """Return the gating metrics; later entries win. Raises PlanError for an entry that is about no metric."""
    gating = {metric.name: Tolerance(_default(metric, tolerance)) for metric in METRICS if metric.gating}
    for entry in entries:
        names = _matching(entry.metrics)
        if not names:
            raise PlanError(f"{entry.origin}: {entry.metrics!r} is not a metric; known are {', '.join(BY_NAME)}")
        for name in names:
            gating.pop(name, None)
            if entry.on:
                gating[name] = _tolerance(entry, name, tolerance)
    return gating


def _tolerance(entry: Gate, name: str, tolerance: float) -> Tolerance:
    metric = find(name)
    if entry.better and entry.better != metric.better and not is_counter(name):
        raise PlanError(f"{entry.origin}: {name}={entry.better}: {metric.better} is better, and only a counter's gate can say it")
    better: Literal["", "higher"] = "higher" if entry.better == "higher" != metric.better else ""
    plain = Tolerance(0.0, asked=True, better=better)
    return replace(plain, share=entry.tolerance or _default(judged(name, plain), tolerance))


def judged(name: str, gate: Tolerance | None) -> Metric:
    """Return a metric as a gate has it judged: a counter of which more is better is a large number, hence a ratio."""
    metric = find(name)
    return replace(metric, better="higher", kind="ratio", tolerance=None) if gate and gate.better == "higher" else metric


def gates_of(entries: Iterable[Gate], description: Mapping[str, Any], *, tolerance: float) -> dict[str, Tolerance]:
    """Return what gates a case, of whose workload this is the description.

    A search for the largest load is gated by what it comes to, and by nothing of the rounds that it took; what it comes to gates
    nothing else: a test may measure both.
    """
    if CAPACITY not in description:
        searched = {each.name for each in METRICS if each.name.startswith("capacity_")}
        return {name: gate for name, gate in gates(entries, tolerance=tolerance).items() if name not in searched}
    name = CAPACITIES[description[CAPACITY]["varied"]]
    gated = gates((Gate(name, on=True, origin="llmperf.capacity"), *entries), tolerance=tolerance)
    return {metric: gate for metric, gate in gated.items() if metric == name}


def fitting(metric: Metric, launches: Iterable[Iterable[float]]) -> Metric:
    """Return a metric as its values can be judged: a counter of seconds is no count, and is a ratio too."""
    whole = all(value == int(value) for values in launches for value in values if math.isfinite(value))
    return metric if metric.kind != "count" or whole or not is_counter(metric.name) else replace(metric, kind="ratio")


def _matching(pattern: str) -> list[str]:
    """Return the metrics that a pattern is about; in front of a `/` stands the class of requests that they are of."""
    group, separator, _ = pattern.rpartition(CLASS_SEPARATOR)
    if set(group) & set("*?[") or (separator and not group):
        return []  # no class is without a name, and which classes there are is not known when tests are collected
    names = [name for name in names_of([group]) if name.startswith(f"{group}{CLASS_SEPARATOR}")] if separator else list(BY_NAME)
    matching = [name for name in names if fnmatchcase(name, pattern) and _is_meant(find(name), pattern)]
    # Percentiles and counters are as many as there are names: such a gate names one.
    return matching or ([pattern] if is_metric(pattern) else [])


def _is_meant(metric: Metric, pattern: str) -> bool:
    """Return whether a pattern may be about a metric: one that is measured only where it is asked for must be named as such."""
    return not metric.separate or pattern.startswith(metric.name.partition("_")[0])


def _default(metric: Metric, tolerance: float) -> float:
    own = metric.tolerance or 0.0
    return own if metric.kind in ("count", "exact") else max(tolerance, own)


def comparisons(gated: Mapping[str, Tolerance]) -> int:
    """Return how many of them share the suite's error rate: all but the exact ones, which spend none of it."""
    return sum(find(name).kind != "exact" for name in gated)
