"""The grid: its axes, one point of it, and which points marker and options allow."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_llmperf.plan.checks import PlanError, degree

if TYPE_CHECKING:
    from collections.abc import Mapping

AXES = ("model", "tp", "pp", "dp", "concurrency", "rate")
DEFAULT_MODEL = "tiny"


def short_model(model: str) -> str:
    """Return a model's last path part, as used in test ids."""
    return re.sub(r"[^\w.]+", "_", model.rstrip("/").rpartition("/")[2]) or "model"


@dataclass(frozen=True)
class Axes:
    """One point of the grid that a test is run on."""

    model: str = DEFAULT_MODEL
    tp: int = 1
    pp: int = 1
    dp: int = 1
    concurrency: int = 8
    rate: float | None = None
    """Requests per second, infinite for all at once; None for so many at a time as `concurrency` says."""
    endpoint: str = ""
    """The name of the endpoint that decides model and degrees by itself; empty for engines that are started."""
    sweep: bool = False
    """The test measures at several TP degrees itself; `tp` is the smallest of them."""

    @property
    def id(self) -> str:
        """Return the test id of the point, e.g. `tiny-tp2-c8` or `tiny-sweep-c8`. Options never change it."""
        load = f"c{self.concurrency}" if self.rate is None else f"r{self.rate:g}"
        if self.endpoint:
            return f"{self.endpoint}-{load}"
        parts = [short_model(self.model), "sweep" if self.sweep else f"tp{self.tp}"]
        parts += [f"{name}{value}" for name, value in (("pp", self.pp), ("dp", self.dp)) if value != 1]
        return "-".join([*parts, load])


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
    if isinstance(value, bool) or not 0 < rate <= math.inf:
        raise PlanError(f"{origin}={value}: must be requests per second above 0, e.g. 2.5, or inf to send all at once")
    return rate


def grid(allowed: Mapping[str, tuple[Any, ...]], selected: Mapping[str, tuple[Any, ...]]) -> list[Axes]:
    """Return every point that a marker allows; an axis that it leaves open has the selected values, else the default.

    Points that the selection excludes are in the list too: the caller deselects them (`is_selected`), as pytest does
    with `-k`, so that the run says how many there were.
    """

    def values(name: str) -> tuple[Any, ...]:
        return allowed.get(name) or selected.get(name) or (getattr(Axes, name),)

    at_rate = "rate" in allowed or ("rate" in selected and "concurrency" not in allowed)
    at_once = "concurrency" in allowed or not at_rate or ("concurrency" in selected and "rate" not in allowed)
    loads = [(number, None) for number in values("concurrency") if at_once]
    loads += [(Axes.concurrency, rate) for rate in values("rate") if at_rate]
    engines = itertools.product(*(values(name) for name in AXES[:4]))
    return [Axes(*engine, *load) for engine, load in itertools.product(engines, loads)]


def is_selected(axes: Axes, selected: Mapping[str, tuple[Any, ...]]) -> bool:
    """Return whether every axis of a point has one of the selected values; rate and concurrency are two forms of one axis."""
    engine = all(getattr(axes, name) in values for name, values in selected.items() if name in AXES[:4])
    if "rate" not in selected and "concurrency" not in selected:
        return engine
    load = "concurrency" if axes.rate is None else "rate"
    return engine and getattr(axes, load) in selected.get(load, ())
