"""Whether a measurement keeps its limits: a sentence for each that it does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_llmperf.measure import metrics
from pytest_llmperf.plan.checks import PlanError
from pytest_llmperf.units import quantity

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pytest_llmperf.measure.metric import Metric
    from pytest_llmperf.plan.limits import Limit, Limits


def check_metrics(limits: Limits) -> None:
    """Raise PlanError that names a limit's metric where there is none of that name."""
    for name in limits.metrics:
        if not metrics.is_metric(name):
            raise PlanError(f"{limits.origin}: {name!r} is not a metric; known are {', '.join(metrics.BY_NAME)}")


def broken(bounds: Mapping[str, Limit], value_of: Callable[[str], float]) -> tuple[str, ...]:
    """Return a sentence for each limit that is not kept; `value_of` raises KeyError for what was not measured.

    A limit itself is kept. What was not measured keeps none: nobody knows whether it is good.
    """
    return tuple(sentence for name, limit in bounds.items() if (sentence := _sentence(metrics.find(name), limit, value_of)))


def _sentence(metric: Metric, limit: Limit, value_of: Callable[[str], float]) -> str | None:
    at_least = metric.better == "higher" if limit.at_least is None else limit.at_least
    bound = quantity(limit.value, metric.unit)
    try:
        value = value_of(metric.name)
    except KeyError:
        return f"{metric.name} was not measured, and has a limit of {bound}"
    if (value >= limit.value) if at_least else (value <= limit.value):
        return None
    shown = quantity(value, metric.unit)
    if shown == bound:  # they differ in digits that are not shown
        shown, bound = f"{value:.9g} {metric.unit}", f"{limit.value:.9g} {metric.unit}"
    return f"{metric.name} is {shown}, {'below' if at_least else 'above'} the limit of {bound}"
