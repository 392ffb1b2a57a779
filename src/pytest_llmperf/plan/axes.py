"""The grid: its axes, one point of it, and which points marker and options allow."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pytest_llmperf.files import as_shell
from pytest_llmperf.plan.checks import LARGEST, SMALLEST, PlanError, cut, degree, representation, written

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

AXES = ("model", "tp", "pp", "dp", "concurrency", "rate")
DEFAULT_MODEL = "tiny"


def short_model(model: str) -> str:
    """Return a model's last path part, as used in test ids."""
    return re.sub(r"[^\w.]+", "_", model.rstrip("/").rpartition("/")[2]) or "model"


def model_labels(models: Iterable[str]) -> dict[str, str]:
    """Return what test ids call each of these models, whatever their order: the last path part, where that is one model's only.

    Others have as many path parts as tell them apart, e.g. `old_model` and `new_model`; where all parts don't, a short hash too.
    """
    models = tuple(dict.fromkeys(models))
    labels = {model: short_model(model) for model in models}
    unique = {model for model, label in labels.items() if list(labels.values()).count(label) == 1}
    for depth in range(2, 2 + max((model.count("/") for model in models), default=0)):
        taken = list(labels.values())
        clashing = [model for model in models if model not in unique and taken.count(labels[model]) > 1]
        labels |= {model: _last_parts(model, depth) for model in clashing}
    taken = list(labels.values())
    clashing = [model for model in models if model not in unique and taken.count(labels[model]) > 1]
    return labels | {model: f"{labels[model]}_{hashlib.sha256(model.encode()).hexdigest()[:6]}" for model in clashing}


def _last_parts(model: str, count: int) -> str:
    parts = [part for part in model.split("/") if part]
    return re.sub(r"[^\w.]+", "_", "_".join(parts[-count:])) or "model"


@dataclass(frozen=True)
class Load:
    """What a point of the grid says of the load: so many requests at a time, or a rate."""

    concurrency: int = 8
    rate: float | None = None
    """Requests per second; None for so many at a time as `concurrency` says."""
    name: str = ""
    """What tells it apart from others alike; empty where there are none."""

    @property
    def id(self) -> str:
        """Return its part of a test id, e.g. `c8`, `r2.5` or `c8-long`."""
        load = f"c{self.concurrency}" if self.rate is None else f"r{self.rate:g}"
        return f"{load}-{self.name}" if self.name else load


@dataclass(frozen=True)
class Axes:
    """One point of the grid that a test is run on."""

    model: str = DEFAULT_MODEL
    tp: int = 1
    pp: int = 1
    dp: int = 1
    concurrency: int = Load.concurrency
    rate: float | None = None
    """Requests per second, infinite for all at once; None for so many at a time as `concurrency` says."""
    endpoint: str = ""
    """The name of the endpoint that decides model and degrees by itself; empty for engines that are started."""
    sweep: bool = False
    """The test measures at several TP degrees itself; `tp` is the smallest of them."""
    label: str = ""
    """What its id calls the model, where the last path part is that of another one's too."""
    name: str = ""
    """What tells its load apart from others of the same test that are alike."""

    @property
    def load(self) -> Load:
        """Return what it says of the load."""
        return Load(self.concurrency, self.rate, self.name)

    @property
    def id(self) -> str:
        """Return the test id of the point, e.g. `tiny-tp2-c8` or `tiny-sweep-c8`. Options never change it."""
        if self.endpoint:
            return f"{self.endpoint}-{self.load.id}"
        parts = [self.label or short_model(self.model), "sweep" if self.sweep else f"tp{self.tp}"]
        parts += [f"{name}{value}" for name, value in (("pp", self.pp), ("dp", self.dp)) if value != 1]
        return "-".join([*parts, self.load.id])


def axis_value(name: str, value: object, *, origin: str) -> Any:
    """Return one value of an axis, checked; `origin` names the option or argument in the PlanError."""
    if name == "model":
        return as_shell(written(value))
    if name != "rate":
        return degree(origin, value)
    try:
        rate = float(written(value))
    except ValueError:
        rate = 0.0
    if not (SMALLEST <= rate <= LARGEST or rate == math.inf):
        text = value if isinstance(value, str) else representation(value)
        raise PlanError(f"{origin}={cut(text)}: must be requests per second above 0, e.g. 2.5, or inf to send all at once")
    return rate


def grid(
    allowed: Mapping[str, tuple[Any, ...]], selected: Mapping[str, tuple[Any, ...]], loads: Sequence[Load] = ()
) -> list[Axes]:
    """Return every point that a marker allows; an axis that it leaves open has the selected values, else the default.

    `loads` are those that it names one by one; they stand in the place of the axes concurrency and rate.
    Points that the selection excludes are in the list too: the caller deselects them (`is_selected`), as pytest does
    with `-k`, so that the run says how many there were.
    """
    engines = itertools.product(*(_values(name, allowed, selected) for name in AXES[:4]))
    every = loads or _loads_of(allowed, selected)
    return labelled([
        Axes(model, tp, pp, dp, load.concurrency, load.rate, name=load.name)
        for (model, tp, pp, dp), load in itertools.product(engines, every)
    ])  # fmt: skip


def labelled(points: Sequence[Axes]) -> list[Axes]:
    """Return the points with ids that tell their models apart."""
    labels = model_labels(point.model for point in points)
    labels = {model: "" if label == short_model(model) else label for model, label in labels.items()}
    return [replace(point, label=labels[point.model]) for point in points]


def _values(name: str, allowed: Mapping[str, tuple[Any, ...]], selected: Mapping[str, tuple[Any, ...]]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(allowed.get(name) or selected.get(name) or (getattr(Axes, name),)))


def _loads_of(allowed: Mapping[str, tuple[Any, ...]], selected: Mapping[str, tuple[Any, ...]]) -> list[Load]:
    at_rate = "rate" in allowed or ("rate" in selected and "concurrency" not in allowed)
    at_once = "concurrency" in allowed or not at_rate or ("concurrency" in selected and "rate" not in allowed)
    loads = [Load(concurrency=number) for number in _values("concurrency", allowed, selected) if at_once]
    return loads + [Load(rate=rate) for rate in _values("rate", allowed, selected) if at_rate]


def is_selected(axes: Axes, selected: Mapping[str, tuple[Any, ...]]) -> bool:
    """Return whether every axis of a point has one of the selected values; rate and concurrency are two forms of one axis."""
    engine = all(getattr(axes, name) in values for name, values in selected.items() if name in AXES[:4])
    if "rate" not in selected and "concurrency" not in selected:
        return engine
    load = "concurrency" if axes.rate is None else "rate"
    return engine and getattr(axes, load) in selected.get(load, ())
