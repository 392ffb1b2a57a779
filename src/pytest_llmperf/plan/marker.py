"""The arguments of `@pytest.mark.llmperf(...)`, checked."""

from __future__ import annotations

import numbers
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_llmperf.plan.axes import AXES, axis_value
from pytest_llmperf.plan.checks import PlanError, brief, parse_fraction
from pytest_llmperf.plan.engine import EngineArgs, parse_engine_args
from pytest_llmperf.plan.gates import Gate, parse_gate
from pytest_llmperf.plan.kinds import exchangeable
from pytest_llmperf.plan.limits import Limits, parse_limits
from pytest_llmperf.plan.needs import NEEDS, NO_NEEDS, Needs, parse_needs
from pytest_llmperf.plan.points import Point, parse_points
from pytest_llmperf.plan.secrets import discreet, guarded

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Marker:
    """The arguments of `@pytest.mark.llmperf(...)`: the grid that a test allows, its engine, its tolerance, its host."""

    axes: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """Per axis the values that the test allows; an axis that is missing allows every value."""
    engine_args: EngineArgs = ()
    kind: str | None = None
    """`server` or `offline` for a test that measures on that kind of engine, whatever the run's is."""
    env: tuple[tuple[str, str], ...] = ()
    """Environment variables of the engine, over those of the run."""
    tolerance: float | None = None
    """The slow-down that must not pass, as a fraction; None for the run's default."""
    gate: tuple[Gate, ...] = ()
    """Which metrics gate, over what the run says."""
    needs: Needs = NO_NEEDS
    """What the host must have."""
    points: tuple[Point, ...] = ()
    """Loads with what belongs to each, in the place of the axes concurrency and rate."""
    limits: Limits = field(default_factory=Limits)
    """What metrics must not pass, at every point."""


def parse_marker(arguments: Mapping[str, object], *, verbatim: bool = False) -> Marker:
    """Return the marker's arguments, checked; unknown names and bad values raise PlanError.

    `verbatim` keeps the spelling of engine arguments, as `parse_engine_args` does.
    """
    known = (*AXES, "engine", "engine_args", "env", "tolerance", "gate", "points", "limits", *NEEDS)
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        raise PlanError(f"llmperf({unknown[0]}=...): unknown marker argument; known are {', '.join(known)}")
    axes = {name: _axis_values(name, arguments[name]) for name in AXES if arguments.get(name) is not None}
    given = arguments.get("points")
    points = () if given is None else parse_points(given)
    if points and (twice := [name for name in ("concurrency", "rate") if name in axes]):
        raise PlanError(
            f"llmperf(points=..., {twice[0]}={brief(arguments[twice[0]])}): points say the load themselves; leave {twice[0]} out"
        )
    kind: Any = arguments.get("engine")
    if kind is not None and not (isinstance(kind, str) and kind in exchangeable()):
        raise PlanError(f"llmperf(engine={brief(kind)}): must be one of {', '.join(exchangeable())}")
    source: Any = "" if arguments.get("engine_args") is None else arguments["engine_args"]
    tolerance = arguments.get("tolerance")
    try:
        needs = parse_needs(arguments)
    except ValueError as error:
        raise PlanError(str(error)) from None
    return Marker(
        axes=axes,
        kind=kind,
        engine_args=parse_engine_args(source, origin="llmperf(engine_args=...)", verbatim=verbatim),
        env=_environment({} if arguments.get("env") is None else arguments["env"]),
        tolerance=None if tolerance is None else parse_fraction("llmperf(tolerance=...)", tolerance),
        gate=parse_gate({} if arguments.get("gate") is None else arguments["gate"], origin="llmperf(gate=...)"),
        needs=needs,
        points=points,
        limits=parse_limits(arguments.get("limits"), origin="llmperf(limits=...)"),
    )


_LEASED = frozenset({
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "NEURON_RT_VISIBLE_CORES",
})  # fmt: skip
"""What says which accelerators a process may use."""


def _environment(source: object) -> tuple[tuple[str, str], ...]:
    # What stands in an environment may be a secret: names are shown, and no values.
    if not isinstance(source, dict) or not all(isinstance(name, str) and name for name in source):
        what = "..." if isinstance(source, dict) else discreet(source)
        raise PlanError(f"llmperf(env={what}): must be a dict of environment variables, e.g. {{'OMP_NUM_THREADS': 4}}")
    for name, value in source.items():
        if "=" in name or not _fits_environment(name) or not _fits_environment(value):
            raise PlanError(
                f"llmperf(env={{{brief(name)}: ...}}): must be a name and a text or a number that an environment can hold"
            )
    for name in sorted(_LEASED.intersection(source)):
        raise PlanError(
            f"llmperf(env={{{name!r}: ...}}): {name} is not the test's to set, because each engine is given GPUs that nobody else"
            " has; set it for the whole run, which then takes GPUs from among those"
        )
    return tuple(sorted(guarded({name: str(value) for name, value in source.items()}).items()))


def _fits_environment(value: object) -> bool:
    """Return whether a text, a number or a path can stand in an environment: without NUL, and as bytes.

    A number of 5,000 digits has no text, and a lone surrogate no bytes.
    """
    if not isinstance(value, (str, numbers.Number, Path)):
        return False
    try:
        return b"\0" not in os.fsencode(str(value))
    except Exception:  # a foreign number may raise anything
        return False


def _axis_values(name: str, value: object) -> tuple[Any, ...]:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not values:
        raise PlanError(f"llmperf({name}=...): an empty list allows nothing; leave the argument out to allow everything")
    if name == "model" and not all(isinstance(item, str) for item in values):
        raise PlanError(f"llmperf(model={brief(value)}): must be the name or the folder of a model")
    return tuple(axis_value(name, item, origin=name) for item in values)
