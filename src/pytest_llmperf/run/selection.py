"""Which cases there are: the points of a test's grid, and what is planned of a test at one of them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from pytest_llmperf.judge.gates import gates
from pytest_llmperf.measure.limits import check_metrics
from pytest_llmperf.plan.axes import AXES, Axes, grid, is_selected
from pytest_llmperf.plan.checks import PlanError, brief
from pytest_llmperf.plan.engine import EngineSpec, engine_spec
from pytest_llmperf.plan.kinds import exchangeable, kind_of
from pytest_llmperf.plan.marker import Marker, parse_marker
from pytest_llmperf.run.cases import Planned
from pytest_llmperf.run.sweep import named_degrees

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_llmperf.run.settings import Settings

_LOAD = frozenset({"concurrency", "rate"})
"""The axes that an endpoint leaves open: its model and degrees are what they are."""


class Mark(Protocol):
    """One `@pytest.mark.llmperf(...)`, as pytest has it."""

    @property
    def args(self) -> tuple[Any, ...]:
        """Return the arguments without names."""

    @property
    def kwargs(self) -> Mapping[str, Any]:
        """Return those with names."""


def marker_of(marks: Sequence[Mark], *, verbatim: bool = False) -> Marker:
    """Return the merged arguments of all markers on a test, the closest first in `marks`; it wins. Raises PlanError.

    `verbatim` keeps the spelling of engine arguments.
    """
    arguments: dict[str, object] = {}
    for mark in reversed(marks):
        if mark.args:
            raise PlanError(f"llmperf({brief(mark.args[0])}): arguments are given by name, e.g. llmperf(tp=[1, 2])")
        # Points and axes are two ways to say the load: what a closer marker says stands in the place of the other, too.
        if "points" in mark.kwargs or _LOAD.intersection(mark.kwargs):
            for name in _LOAD if "points" in mark.kwargs else ("points",):
                arguments.pop(name, None)
        arguments |= mark.kwargs
    return parse_marker(arguments, verbatim=verbatim)


def points(marker: Marker, settings: Settings, *, sweep: bool = False) -> list[Axes]:
    """Return the grid of a test; at an endpoint only the load varies.

    All TP degrees of a sweep are one point of it: the test itself goes through them.
    """
    loads = [point.load for point in marker.points]
    if settings.urls:
        points_of_load = grid(_of_load(marker.axes), _of_load(settings.selected), loads)
        return [replace(point, endpoint=name) for name in settings.urls for point in points_of_load]
    if sweep:
        allowed = named_degrees(marker, settings.selected) or marker.axes.get("tp") or (Axes.tp,)
        pinned = marker.axes | {"tp": (min(allowed),)}
        return [replace(point, sweep=True) for point in grid(pinned, settings.selected, loads)]
    return grid(marker.axes, settings.selected, loads)


def _of_load(axes: Mapping[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    return {name: values for name, values in axes.items() if name in _LOAD}


def planned(case_id: str, marks: Sequence[Mark], axes: Axes | None, settings: Settings, *, compares: bool) -> Planned:
    """Return what is known of a test at a point of its grid; one whose markers are unusable says why, and has no point."""
    url = next(iter(settings.urls.values()), "")
    base = EngineSpec(kind=settings.kind, url=url, python=settings.python, command=settings.command)
    try:
        marker = marker_of(marks, verbatim=kind_of(base.kind).commanded)
        gates(marker.gate, tolerance=settings.tolerance)
        for limits in (marker.limits, *(point.limits for point in marker.points)):
            check_metrics(limits)
        assert axes is not None  # `marker_of` has raised where there is none
        _check_point(axes, marker)
        if axes.endpoint:
            spec = replace(base, model=axes.endpoint, url=settings.urls[axes.endpoint])
        else:
            # A simulated engine stands for every kind.
            kind = marker.kind if marker.kind and base.kind in exchangeable() else base.kind
            spec = engine_spec(replace(base, kind=kind, env=marker.env), axes, marker.engine_args, settings.engine_args)
        return Planned(case_id, axes, marker, spec, compares)
    except PlanError as error:
        return Planned(case_id, Axes(), Marker(), base, compares, error=f"{case_id}: {error}")


def _check_point(axes: Axes, marker: Marker) -> None:
    """Raise PlanError where a test's marker doesn't allow the point that it was given: it was not seen when points were made."""
    engine = [] if axes.endpoint else [name for name in AXES[:4] if not (name == "tp" and axes.sweep)]
    wrong = [name for name in engine if getattr(axes, name) not in marker.axes.get(name, (getattr(axes, name),))]
    form = "concurrency" if axes.rate is None else "rate"
    load_axes = _LOAD.intersection(marker.axes)
    if marker.points and axes.load not in [point.load for point in marker.points]:
        wrong.append("points")
    elif not marker.points and load_axes and getattr(axes, form) not in marker.axes.get(form, ()):
        wrong.extend(sorted(load_axes))
    if wrong:
        raise PlanError(
            f"llmperf({wrong[0]}=...): this marker comes with a parameter that is known too late to make the test's points;"
            " put it on the test itself, or on a pytest.param(...) in a list for @pytest.mark.parametrize"
        )


def selected(plan: Planned, settings: Settings) -> bool:
    """Return whether the options select a planned test; an unusable one is, so that it can say what is wrong with it."""
    asked = _of_load(settings.selected) if settings.urls else dict(settings.selected)
    if plan.axes.sweep and named_degrees(plan.marker, asked) != ():
        asked.pop("tp", None)  # the test itself leaves out the degrees that are not selected
    return bool(plan.error) or is_selected(plan.axes, asked)
