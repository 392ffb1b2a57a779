"""Which cases there are, in which order: parametrize, deselect, and group by engine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_llmperf.plan.axes import Axes, grid, is_selected
from pytest_llmperf.plan.checks import PlanError
from pytest_llmperf.plan.engine import EngineSpec, engine_spec
from pytest_llmperf.plan.kinds import exchangeable
from pytest_llmperf.plan.marker import Marker, parse_marker

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_llmperf.plugin.settings import Settings

FIXTURES = frozenset({"llmperf", "llm_engine"})
AXES_FIXTURE = "llmperf_axes"
SWEEP_FIXTURE = "llmperf_sweep"
LOAD = frozenset({"concurrency", "rate"})


@dataclass(frozen=True)
class Planned:
    """What is known of a test when it is collected."""

    case_id: str
    """The node id as collected; xdist may later add a group to the item's own."""
    axes: Axes
    marker: Marker
    spec: EngineSpec
    """The engine as far as marker and options tell; a fixture may add arguments later."""
    compares: bool
    """The test asks for the baseline."""
    error: str | None = None
    """Why the marker is unusable."""


PLANNED = pytest.StashKey[Planned]()


def marker_of(definition: pytest.Item) -> Marker:
    """Return the merged arguments of all llmperf markers on a test; the closest one wins. Raises PlanError."""
    arguments: dict[str, object] = {}
    for mark in reversed(list(definition.iter_markers("llmperf"))):
        if mark.args:
            raise PlanError(f"llmperf({mark.args[0]!r}): arguments are given by name, e.g. llmperf(tp=[1, 2])")
        arguments |= mark.kwargs
    return parse_marker(arguments)


def named_degrees(marker: Marker, selected: Mapping[str, tuple[Any, ...]]) -> tuple[int, ...] | None:
    """Return the TP degrees of a sweep, the smallest first: the marker's that the option selects; None if neither names any."""
    allowed, asked = marker.axes.get("tp"), selected.get("tp")
    if allowed is None and asked is None:
        return None
    return tuple(sorted({degree for degree in allowed or asked or () if asked is None or degree in asked}))


def points(marker: Marker, settings: Settings, *, sweep: bool = False) -> list[Axes]:
    """Return the grid of a test; an endpoint's model and degrees are what they are, so only the load varies.

    All TP degrees of a sweep are one point of it: the test itself goes through them.
    """
    if sweep and not settings.urls:
        allowed = named_degrees(marker, settings.selected) or marker.axes.get("tp") or (Axes.tp,)
        pinned = replace(marker, axes=marker.axes | {"tp": (min(allowed),)})
        return [replace(point, sweep=True) for point in grid(pinned.axes, settings.selected)]
    if not settings.urls:
        return grid(marker.axes, settings.selected)
    only = {name: values for name, values in marker.axes.items() if name in LOAD}
    found = grid(only, {name: values for name, values in settings.selected.items() if name in LOAD})
    return [replace(point, endpoint=name) for name in settings.urls for point in found]


def parametrize(metafunc: pytest.Metafunc, settings: Settings) -> None:
    """Run a test once for every point of its grid."""
    if AXES_FIXTURE not in metafunc.fixturenames:
        return
    try:
        found = points(marker_of(metafunc.definition), settings, sweep=SWEEP_FIXTURE in metafunc.fixturenames)
    except PlanError:
        return  # told by `plan_items`, for all tests at once
    metafunc.parametrize(AXES_FIXTURE, found, ids=[point.id for point in found], indirect=True)


def plan_items(items: list[pytest.Item], settings: Settings) -> list[pytest.Item]:
    """Plan every llmperf test, put them behind the others grouped by engine, and return the deselected ones.

    Raises UsageError for unusable markers, all of them at once.
    """
    base = EngineSpec(kind=settings.kind, url=next(iter(settings.urls.values()), ""), python=settings.python)
    deselected: list[pytest.Item] = []
    planned: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        if AXES_FIXTURE not in getattr(item, "fixturenames", ()):
            others.append(item)
            continue
        item.stash[PLANNED] = plan = _plan(item, base, settings)
        # An endpoint's model and degrees are what they are.
        asked = {name: values for name, values in settings.selected.items() if name in LOAD or not settings.urls}
        if plan.axes.sweep and named_degrees(plan.marker, asked) != ():
            asked.pop("tp", None)  # the test itself leaves out the degrees that are not selected
        selected = plan.error or is_selected(plan.axes, asked)
        (planned if selected else deselected).append(item)
    order: dict[EngineSpec, int] = {}
    for item in planned:
        spec = item.stash[PLANNED].spec
        order.setdefault(spec, len(order))
        if item.config.pluginmanager.hasplugin("xdist"):  # without it the mark is unknown, an error under --strict-markers
            # Keeps one engine's cases on one worker under `--dist loadgroup`.
            item.add_marker(pytest.mark.xdist_group(f"llmperf-{spec.short_model}-tp{spec.tp}-{order[spec]}"))
    # A sweep goes on to other engines: behind the other cases of its first one, it starts that one no second time.
    planned.sort(key=lambda item: (order[item.stash[PLANNED].spec], item.stash[PLANNED].axes.sweep))
    items[:] = others + planned
    return deselected


def _plan(item: pytest.Item, base: EngineSpec, settings: Settings) -> Planned:
    compares = "baseline" in getattr(item, "fixturenames", ())
    try:
        marker = marker_of(item)
        if marker.gate:
            from pytest_llmperf.judge.gates import gates

            gates(marker.gate, tolerance=settings.tolerance)
        axes: Axes = getattr(item, "callspec").params[AXES_FIXTURE]  # noqa: B009  pytest.Item has no callspec, Function has
        if axes.endpoint:
            spec = replace(base, model=axes.endpoint, url=settings.urls[axes.endpoint])
        else:
            kind = marker.kind if marker.kind and base.kind in exchangeable() else base.kind  # a simulated engine stands for both
            spec = engine_spec(replace(base, kind=kind, env=marker.env), axes, marker.engine_args, settings.engine_args)
        return Planned(item.nodeid, axes, marker, spec, compares)
    except PlanError as error:
        return Planned(item.nodeid, Axes(), Marker(), base, compares, error=f"{item.nodeid}: {error}")
