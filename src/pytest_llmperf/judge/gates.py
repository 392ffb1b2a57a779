"""Which metrics can fail a test, and by how much they may get worse: the table's defaults, then the project's entries."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

from pytest_llmperf.measure.metrics import BY_NAME, CLASS_SEPARATOR, METRICS, find, is_counter, is_metric, names_of
from pytest_llmperf.plan.checks import PlanError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pytest_llmperf.measure.metrics import Metric
    from pytest_llmperf.plan.gates import Gate


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


def fitting(metric: Metric, launches: Iterable[Iterable[float]]) -> Metric:
    """Return a metric as its values can be judged: a counter of seconds is no count, and is a ratio too."""
    whole = all(value == int(value) for values in launches for value in values if math.isfinite(value))
    return metric if metric.kind != "count" or whole or not is_counter(metric.name) else replace(metric, kind="ratio")


def _matching(pattern: str) -> list[str]:
    """Return the metrics that a pattern is about; in front of a `/` stands the class of requests that they are of."""
    group, separator, _ = pattern.rpartition(CLASS_SEPARATOR)
    if set(group) & set("*?["):
        return []  # which classes there are is not known when tests are collected
    names = [name for name in names_of([group]) if name.startswith(f"{group}{CLASS_SEPARATOR}")] if separator else list(BY_NAME)
    matching = [name for name in names if fnmatchcase(name, pattern)]
    # Percentiles and counters are as many as there are names: such a gate names one.
    return matching or ([pattern] if is_metric(pattern) else [])


def _default(metric: Metric, tolerance: float) -> float:
    own = metric.tolerance or 0.0
    return own if metric.kind in ("count", "exact") else max(tolerance, own)


def comparisons(gated: Mapping[str, Tolerance]) -> int:
    """Return how many of them share the suite's error rate: all but the exact ones, which spend none of it."""
    return sum(find(name).kind != "exact" for name in gated)
