"""Whether a measurement keeps its limits: a sentence for each that it does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_llmperf.measure import metrics
from pytest_llmperf.plan.checks import PlanError
from pytest_llmperf.units import quantity

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pytest_llmperf.measure.metric import Metric
    from pytest_llmperf.plan.limits import Limits


def check_metrics(limits: Limits) -> None:
    """Raise PlanError that names a limit's metric where there is none of that name."""
    for name in limits.metrics:
        if not metrics.is_metric(name):
            raise PlanError(f"{limits.origin}: {name!r} is not a metric; known are {', '.join(metrics.BY_NAME)}")


def broken(bounds: Mapping[str, float], value_of: Callable[[str], float]) -> tuple[str, ...]:
    """Return a sentence for each limit that is not kept; `value_of` raises KeyError for what was not measured.

    A limit itself is kept. What was not measured keeps none: nobody knows whether it is good.
    """
    return tuple(sentence for name, bound in bounds.items() if (sentence := _sentence(metrics.find(name), bound, value_of)))


def _sentence(metric: Metric, bound: float, value_of: Callable[[str], float]) -> str | None:
    lower = metric.better == "lower"
    try:
        value = value_of(metric.name)
    except KeyError:
        return f"{metric.name} was not measured, and has a limit of {quantity(bound, metric.unit)}"
    if (value <= bound) if lower else (value >= bound):
        return None
    shown, limit = quantity(value, metric.unit), quantity(bound, metric.unit)
    if shown == limit:  # they differ in digits that are not shown
        shown, limit = f"{value:.9g} {metric.unit}", f"{bound:.9g} {metric.unit}"
    return f"{metric.name} is {shown}, {'above' if lower else 'below'} the limit of {limit}"
