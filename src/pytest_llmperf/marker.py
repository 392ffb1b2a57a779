"""What the marker and the options allow: the marker's arguments, gate settings, and the grid of points that they span."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_llmperf.plan import AXES, STARTED_KINDS, Axes, EngineArgs, PlanError, degree, parse_engine_args
from pytest_llmperf.requirements import NEEDS, NO_NEEDS, Needs, parse_needs

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


@dataclass(frozen=True)
class Gate:
    """One entry of a gate setting: which metrics it is about, and what becomes of them."""

    metrics: str
    """A metric's name, or a pattern such as `*_p90_s`."""
    on: bool
    tolerance: float | None = None
    """The change for the worse that must not pass, as a fraction; None for the metric's default."""
    origin: str = "gate"
    """The option or marker argument it came from, for messages."""


def parse_gate(source: object, *, origin: str) -> tuple[Gate, ...]:
    """Return gate entries from `"ttft_p90_s=8%,preemptions=off"`, or from a dict of the same; a later entry wins.

    A value is a tolerance, `on` (True) for the metric's default tolerance, or `off` (False) for a metric that is only observed.
    """
    pairs: list[tuple[object, object]]
    if isinstance(source, str):
        words = [word.strip() for word in source.split(",") if word.strip()]
        if any("=" not in word for word in words):
            raise PlanError(f"{origin}={source!r}: write METRIC=TOLERANCE by comma, e.g. ttft_p90_s=8%,preemptions=off")
        pairs = [(name.strip(), value.strip()) for name, _, value in (word.partition("=") for word in words)]
    else:
        pairs = list(source.items()) if isinstance(source, dict) else [(None, None)]
    found = []
    for name, value in pairs:
        if not isinstance(name, str) or not name:
            raise PlanError(f"{origin}={source!r}: must be a dict of metrics and tolerances, e.g. {{'ttft_p90_s': '8 %'}}")
        if value is True or value is False or str(value).lower() in ("on", "off"):
            found.append(Gate(name, on=value is True or str(value).lower() == "on", origin=origin))
        else:
            found.append(Gate(name, True, parse_fraction(f"{origin}: {name}", value), origin))
    return tuple(found)


def parse_marker(arguments: Mapping[str, object]) -> Marker:
    """Return the marker's arguments, checked; unknown names and bad values raise PlanError."""
    known = (*AXES, "engine", "engine_args", "env", "tolerance", "gate", *NEEDS)
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        raise PlanError(f"llmperf({unknown[0]}=...): unknown marker argument; known are {', '.join(known)}")
    axes = {name: _axis_values(name, arguments[name]) for name in AXES if arguments.get(name) is not None}
    kind: Any = arguments.get("engine")
    if kind is not None and kind not in STARTED_KINDS:
        raise PlanError(f"llmperf(engine={kind!r}): must be one of {', '.join(STARTED_KINDS)}")
    source: Any = arguments.get("engine_args") or ""
    tolerance = arguments.get("tolerance")
    try:
        needs = parse_needs(arguments)
    except ValueError as error:
        raise PlanError(str(error)) from None
    return Marker(
        axes=axes,
        kind=kind,
        engine_args=parse_engine_args(source, origin="llmperf(engine_args=...)"),
        env=_environment(arguments.get("env") or {}),
        tolerance=None if tolerance is None else parse_fraction("llmperf(tolerance=...)", tolerance),
        gate=parse_gate(arguments.get("gate") or {}, origin="llmperf(gate=...)"),
        needs=needs,
    )


_LEASED = frozenset({
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "NEURON_RT_VISIBLE_CORES",
})  # fmt: skip
"""What says which accelerators a process may use."""


def _environment(source: object) -> tuple[tuple[str, str], ...]:
    if not isinstance(source, dict) or not all(isinstance(name, str) and name for name in source):
        raise PlanError(f"llmperf(env={source!r}): must be a dict of environment variables, e.g. {{'OMP_NUM_THREADS': 4}}")
    for name in sorted(_LEASED.intersection(source)):
        raise PlanError(
            f"llmperf(env={source!r}): {name} is not the test's to set, because each engine is given GPUs that nobody else has;"
            " set it for the whole run, which then takes GPUs from among those"
        )
    return tuple(sorted((name, str(value)) for name, value in source.items()))


def parse_fraction(name: str, value: object) -> float:
    """Return a share such as `0.05` or `"5 %"` as a fraction above 0 and below 1, or raise PlanError naming `name`."""
    text = str(value).strip()
    try:
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        number = -1.0
    if not 0 < number < 1:
        raise PlanError(f"{name}={value!r}: must be a share between 0 and 1, e.g. 0.05 or '5 %'")
    return number


def _axis_values(name: str, value: object) -> tuple[Any, ...]:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not values:
        raise PlanError(f"llmperf({name}=...): an empty list allows nothing; leave the argument out to allow everything")
    if name == "model" and not all(isinstance(one, str) for one in values):
        raise PlanError(f"llmperf(model={value!r}): must be the name or the folder of a model")
    return tuple(axis_value(name, one, origin=name) for one in values)


def axis_value(name: str, value: object, *, origin: str) -> Any:
    """Return one value of an axis, checked; `origin` names the option or argument in the PlanError."""
    if name == "model":
        return value
    if name != "rate":
        return degree(origin, value)
    try:
        rate = float(str(value))
    except ValueError:
        rate = 0.0
    if isinstance(value, bool) or not 0 < rate < math.inf:
        raise PlanError(f"{origin}={value}: must be requests per second above 0, e.g. 2.5")
    return rate


def grid(marker: Marker, selected: Mapping[str, tuple[Any, ...]]) -> list[Axes]:
    """Return every point that the marker allows; an axis that it leaves open has the selected values, else the default.

    Points that the selection excludes are in the list too: the caller deselects them (`is_selected`), as pytest does
    with `-k`, so that the run says how many there were.
    """

    def allowed(name: str) -> tuple[Any, ...]:
        return marker.axes.get(name) or selected.get(name) or (getattr(Axes, name),)

    at_rate = "rate" in marker.axes or ("rate" in selected and "concurrency" not in marker.axes)
    at_once = "concurrency" in marker.axes or not at_rate or ("concurrency" in selected and "rate" not in marker.axes)
    loads = [(number, None) for number in allowed("concurrency") if at_once]
    loads += [(Axes.concurrency, rate) for rate in allowed("rate") if at_rate]
    engines = itertools.product(*(allowed(name) for name in AXES[:4]))
    return [Axes(*engine, *load) for engine, load in itertools.product(engines, loads)]


def is_selected(axes: Axes, selected: Mapping[str, tuple[Any, ...]]) -> bool:
    """Return whether every axis of a point has one of the selected values; rate and concurrency are two forms of one axis."""
    engine = all(getattr(axes, name) in values for name, values in selected.items() if name in AXES[:4])
    if "rate" not in selected and "concurrency" not in selected:
        return engine
    load = "concurrency" if axes.rate is None else "rate"
    return engine and getattr(axes, load) in selected.get(load, ())
