"""Collection: parametrize the tests, deselect what options exclude, and group the others by engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_llmperf.plan.checks import PlanError
from pytest_llmperf.plan.kinds import kind_of
from pytest_llmperf.plugin.private import parameter
from pytest_llmperf.plugin.state import AXES_FIXTURE, ITEM, ItemState
from pytest_llmperf.run.selection import marker_of, planned, points, selected

if TYPE_CHECKING:
    from pytest_llmperf.plan.engine import EngineSpec
    from pytest_llmperf.run.settings import Settings

SWEEP_FIXTURE = "llmperf_sweep"


def parametrize(metafunc: pytest.Metafunc, settings: Settings) -> None:
    """Run a test once for every point of its grid."""
    try:
        marks = list(metafunc.definition.iter_markers("llmperf"))
        marker = marker_of(marks, verbatim=kind_of(settings.kind).commanded)
        grid = points(marker, settings, sweep=SWEEP_FIXTURE in metafunc.fixturenames)
    except PlanError:
        return  # `plan_items` says so, for all tests at once
    metafunc.parametrize(AXES_FIXTURE, grid, ids=[point.id for point in grid], indirect=True)


def plan_items(items: list[pytest.Item], settings: Settings) -> list[pytest.Item]:
    """Plan every llmperf test, put them behind the others grouped by engine, and return the deselected ones."""
    others, measuring, deselected = list[pytest.Item](), list[pytest.Item](), list[pytest.Item]()
    for item in items:
        names = getattr(item, "fixturenames", ())
        if AXES_FIXTURE not in names:
            others.append(item)
            continue
        marks, axes = list(item.iter_markers("llmperf")), parameter(item, AXES_FIXTURE)
        plan = planned(item.nodeid, marks, axes, settings, compares="baseline" in names)
        item.stash[ITEM] = ItemState(plan)
        (measuring if selected(plan, settings) else deselected).append(item)
    order: dict[EngineSpec, int] = {}
    for item in measuring:
        spec = item.stash[ITEM].planned.spec
        order.setdefault(spec, len(order))
        if item.config.pluginmanager.hasplugin("xdist"):  # without it the mark is unknown, an error under --strict-markers
            # Keeps one engine's cases on one worker under `--dist loadgroup`.
            item.add_marker(pytest.mark.xdist_group(f"llmperf-{spec.short_model}-tp{spec.tp}-{order[spec]}"))
    # A sweep goes on to other engines: behind the other cases of its first one, it starts that one no second time.
    measuring.sort(key=lambda item: (order[item.stash[ITEM].planned.spec], item.stash[ITEM].planned.axes.sweep))
    items[:] = others + measuring
    return deselected
