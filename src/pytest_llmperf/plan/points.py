"""Points: loads that a test names one by one, each with workload arguments and limits of its own."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from pytest_llmperf.plan.arguments import check_layer
from pytest_llmperf.plan.axes import Load, axis_value
from pytest_llmperf.plan.checks import PlanError, brief
from pytest_llmperf.plan.limits import Limits, parse_limits
from pytest_llmperf.plan.workload import Workload

_ORIGIN = "llmperf(points=...)"
_FORMS = ("concurrency", "rate")
_OWN = ("limits", "id")
_EXAMPLE = "must be a list of dicts, e.g. [{'concurrency': 1, 'requests': 10}, {'rate': 4, 'requests': 200}]"


@dataclass(frozen=True)
class Point:
    """One load with what belongs to it."""

    load: Load
    arguments: dict[str, Any] = field(default_factory=dict)
    """Of the workload, the load's own form among them: over those of `llm_workload`, under those of the call."""
    limits: Limits = field(default_factory=Limits)


def parse_points(source: object) -> tuple[Point, ...]:
    """Return the points of a marker, checked as far as is possible without the call; raises PlanError that names the point."""
    if not isinstance(source, (list, tuple)) or not source or not all(isinstance(point, dict) for point in source):
        raise PlanError(f"llmperf(points={brief(source)}): {_EXAMPLE}")
    points = tuple(_point(place, given) for place, given in enumerate(source))
    first_of: dict[str, int] = {}
    for place, point in enumerate(points):
        first = first_of.setdefault(point.load.id, place)
        if first != place:
            raise PlanError(
                f"{_ORIGIN}: points[{first}] and points[{place}] are both {point.load.id}, and test ids name baselines;"
                f" tell them apart by an id, e.g. points[{place}]: 'id': 'long'"
            )
    return points


def _point(place: int, given: dict[str, Any]) -> Point:
    origin = f"{_ORIGIN}: points[{place}]"
    known = (*Workload.__dataclass_fields__, *_OWN)
    for name in given:
        if name not in known:
            raise PlanError(f"{origin}: {name}={brief(given[name])}: unknown argument of a point; known are {', '.join(known)}")
    forms = [name for name in _FORMS if given.get(name) is not None]
    if len(forms) != 1 or given.get("trace") is not None:
        given_forms = [f"{name}={brief(given[name])}" for name in (*_FORMS, "trace") if given.get(name) is not None]
        wrong = ", ".join(given_forms) or brief(given)
        raise PlanError(
            f"{origin}: {wrong}: a point is so many requests at a time or a rate; give either concurrency or rate"
            " (max_concurrency is the most in flight beside a rate)"
        )
    form = forms[0]
    value = axis_value(form, given[form], origin=f"{origin}: {form}")
    arguments = {name: value for name, value in given.items() if name not in (*_FORMS, *_OWN)}
    check_layer(arguments, origin=origin)
    requests = arguments.get("requests")
    if form == "concurrency" and requests is not None and int(requests) < value:
        raise PlanError(f"{origin}: requests={requests}: fewer than concurrency={value}, which could never be reached; send more")
    load = Load(**{form: value}, name=_name(given.get("id"), origin))
    limits = parse_limits(given.get("limits"), origin=f"{origin}: limits")
    return Point(load, {form: value, **arguments}, limits)


def _name(value: object, origin: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or not re.fullmatch(r"\w[\w.-]*", value):
        raise PlanError(f"{origin}: id={brief(value)}: must be letters, digits, '_', '.' or '-': it becomes part of a file name")
    return value
