"""Collection: parametrize the tests, deselect what options exclude, and group the others by engine."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest

from pytest_llmperf.files import storable
from pytest_llmperf.plan.axes import labelled
from pytest_llmperf.plan.checks import PlanError
from pytest_llmperf.plan.kinds import kind_of
from pytest_llmperf.plugin.guard import guarded
from pytest_llmperf.plugin.private import calls, parameter
from pytest_llmperf.plugin.state import AXES_FIXTURE, ITEM, SESSION, ItemState
from pytest_llmperf.run.selection import marker_of, planned, points, selected

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_llmperf.plan.axes import Axes
    from pytest_llmperf.plan.engine import EngineSpec
    from pytest_llmperf.run.settings import Settings

SWEEP_FIXTURE = "llmperf_sweep"


Marks = list[pytest.Mark]


def parametrize(metafunc: pytest.Metafunc, settings: Settings) -> list[tuple[Marks, list[Axes]]]:
    """Run a test once for every point of its grid; return the grid for each choice of its parameters' marks, none among them.

    A parameter may have a marker of its own: `pytest.param(..., marks=pytest.mark.llmperf(tp=2))`. pytest knows products
    only, so the test is run at the points of all its parameters, and `restrict` takes away what is none of the own.
    """
    own = list(metafunc.definition.iter_markers("llmperf"))
    closest = sum(mark.name == "llmperf" for mark in metafunc.definition.own_markers)
    is_sweep = SWEEP_FIXTURE in metafunc.fixturenames
    try:  # in the order in which an item has them: the test's own, its parameters', those of class and module
        grids = [
            (
                marks,
                points(
                    marker_of([*own[:closest], *marks, *own[closest:]], verbatim=kind_of(settings.kind).commanded),
                    settings,
                    sweep=is_sweep,
                ),
            )
            for marks in _choices(metafunc)
        ]
    except PlanError:
        return []  # `plan_items` says so, for all tests at once
    every = [point for _, allowed in grids for point in allowed]
    known = dict(zip(every, labelled(every), strict=True))  # parameters may name models of the same last path part
    grid = list(dict.fromkeys(known.values()))
    metafunc.parametrize(AXES_FIXTURE, grid, ids=[point.id for point in grid], indirect=True)
    return [(marks, [known[point] for point in allowed]) for marks, allowed in grids]


def _choices(metafunc: pytest.Metafunc) -> list[Marks]:
    """Return which llmperf marks the parameters of `@pytest.mark.parametrize` bring, in every combination."""
    choices = []
    for mark in metafunc.definition.iter_markers("parametrize"):  # in the order in which pytest takes them
        values = mark.args[1] if len(mark.args) > 1 else mark.kwargs.get("argvalues")
        # What can be read only once is pytest's to read.
        brought = [_of_llmperf(getattr(value, "marks", ())) for value in values] if isinstance(values, (list, tuple)) else []
        choices.append(_without_repetition(brought) or [[]])
    return _without_repetition([list(itertools.chain(*chosen)) for chosen in itertools.product(*choices)])


def _without_repetition(lists: list[Marks]) -> list[Marks]:
    return [marks for place, marks in enumerate(lists) if marks not in lists[:place]]  # marks have no hash


def _of_llmperf(marks: Iterable[pytest.Mark | pytest.MarkDecorator]) -> Marks:
    plain = (mark.mark if isinstance(mark, pytest.MarkDecorator) else mark for mark in marks)
    return [mark for mark in plain if mark.name == "llmperf"]


def restrict(metafunc: pytest.Metafunc, grids: list[tuple[Marks, list[Axes]]]) -> None:
    """Take away the points that the marks of a test's own parameters do not allow."""
    generated = calls(metafunc)
    kept = []
    for call in generated:
        marks = _of_llmperf(call.marks)
        allowed = next((grid for choice, grid in grids if choice == marks), None)
        if allowed is None or call.params.get(AXES_FIXTURE) in allowed:
            kept.append(call)
    generated[:] = kept


@guarded(hook="pytest_collection_modifyitems")
def _group(item: pytest.Item, settings: Settings, *groups: list[pytest.Item]) -> list[pytest.Item] | None:
    """Plan a test; return whether it is to be measured or is deselected, of these groups, and None where it cannot be planned."""
    if item.nodeid.partition("[")[0] in item.config.stash[SESSION].unplanned:
        return None
    marks, axes = list(item.iter_markers("llmperf")), parameter(item, AXES_FIXTURE)
    plan = planned(storable(item.nodeid), marks, axes, settings, compares="baseline" in getattr(item, "fixturenames", ()))
    measuring, deselected = groups
    group = measuring if selected(plan, settings) else deselected
    item.stash[ITEM] = ItemState(plan)
    return group


def plan_items(items: list[pytest.Item], settings: Settings) -> list[pytest.Item]:
    """Plan every llmperf test, put them behind the others grouped by engine, and return the deselected ones."""
    others, measuring, deselected = list[pytest.Item](), list[pytest.Item](), list[pytest.Item]()
    for item in items:
        group = others if AXES_FIXTURE not in getattr(item, "fixturenames", ()) else _group(item, settings, measuring, deselected)
        (others if group is None else group).append(item)
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
