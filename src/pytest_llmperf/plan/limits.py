"""Limits: what a metric must not pass, on every accelerator or by its name, as marker, point and call write it.

Metrics are only names here: whether there are such is known where they are measured.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pytest_llmperf.plan.checks import PlanError, brief, cut

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

CPU = "cpu"
"""The accelerator's name on a host that has none."""


@dataclass(frozen=True)
class Limit:
    """One number that a metric must not pass, in the metric's base unit."""

    value: float
    at_least: bool | None = None
    """Whether less of it is too little; None: as the metric's own direction says."""


Bounds = tuple[tuple[str, Limit | None], ...]
"""Metric and limit; None lifts a limit that another layer gives."""


@dataclass(frozen=True)
class Limits:
    """What one marker, point or call says."""

    everywhere: Bounds = ()
    by_accelerator: tuple[tuple[str, Bounds], ...] = ()
    """A part of the accelerator's name, and the limits there, over those of everywhere."""
    origin: str = field(default="limits", compare=False)
    """The argument that they came from, for messages."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Return the names of all metrics that are limited anywhere."""
        groups = (self.everywhere, *(bounds for _, bounds in self.by_accelerator))
        return tuple(dict.fromkeys(name for bounds in groups for name, _ in bounds))


@dataclass(frozen=True)
class LocalLimits:
    """The limits of a case, the layers that say more closely what holds last, and the accelerators that it is measured on."""

    layers: tuple[Limits, ...] = ()
    accelerators: tuple[str, ...] = ()
    """The different names of the engine's accelerators, `cpu` where there is none; empty where they are not known."""

    def bounds(self, *more: Limits) -> dict[str, Limit]:
        """Return the limits that hold here, by metric; of each layer the accelerator's win, of these the longest name's."""
        merged: dict[str, Limit | None] = {}
        for layer in (*self.layers, *more):
            merged |= layer.everywhere
            fitting = [entry for entry in layer.by_accelerator if self._fits(entry[0])]
            for _, bounds in sorted(fitting, key=lambda entry: len(entry[0])):
                merged |= bounds
        return {name: bound for name, bound in merged.items() if bound is not None}

    @property
    def notes(self) -> tuple[str, ...]:
        """Return, for each layer that gives limits by accelerator and none for this one, a sentence that says so."""
        here = ", ".join(self.accelerators) or "an accelerator that is not known, because the engine was not started here"
        return tuple(
            f"{layer.origin}: none for {here}; given for {', '.join(name for name, _ in layer.by_accelerator)}"
            for layer in self.layers
            if layer.by_accelerator and not any(self._fits(name) for name, _ in layer.by_accelerator)
        )

    def _fits(self, part: str) -> bool:
        return bool(self.accelerators) and all(is_named(name, part) for name in self.accelerators)


NO_LIMITS = LocalLimits()


def is_named(accelerator: str, part: str) -> bool:
    """Return whether a part of an accelerator's name means it, in either case.

    The part begins a word, and a number in it is complete: H20 is no H200, L4 no L40S, and H200 no GH200.
    """
    end = r"(?!\d)" if part[-1:].isdigit() else ""
    return re.search(rf"(?<![a-z0-9]){re.escape(part.lower())}{end}", accelerator.lower()) is not None


def parse_limits(source: object, *, origin: str) -> Limits:
    """Return limits from a dict of metrics and numbers, or of accelerators and such dicts; None is none.

    Raises PlanError naming `origin`.
    """
    if source is None:
        return Limits(origin=origin)
    if not isinstance(source, dict):
        raise PlanError(f"{origin}={brief(source)}: {_EXAMPLE}")
    everywhere, by_accelerator = dict[object, object](), list[tuple[str, Bounds]]()
    for name, value in source.items():
        if not isinstance(name, str) or not name.strip():
            raise PlanError(f"{origin}={brief(source)}: {_EXAMPLE}")
        if isinstance(value, dict):
            by_accelerator.append((name.strip(), _bounds(value.items(), f"{origin}: {cut(name)}")))
        else:
            everywhere[name] = value
    return Limits(_bounds(everywhere.items(), origin), tuple(by_accelerator), origin)


_EXAMPLE = (
    "must be a dict of metrics and limits, e.g. {'ttft_p50_s': 0.2},"
    " or of accelerators and such dicts: {'H200': {...}, 'cpu': {...}}"
)


def _bounds(pairs: Iterable[tuple[object, object]], origin: str) -> Bounds:
    bounds = []
    for name, value in pairs:
        if not isinstance(name, str) or not name:
            raise PlanError(f"{origin}: {brief(name)}: {_EXAMPLE}")
        bounds.append((name, None if value is None else _limit(value, f"{origin}: {cut(name)}")))
    return tuple(bounds)


def _limit(value: object, origin: str) -> Limit:
    stated = re.fullmatch(r"\s*(>=|<=)\s*(\S+)\s*", value) if isinstance(value, str) else None
    try:
        number = float(stated[2] if stated else value)  # type: ignore[arg-type]  # whatever is no number raises
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or (isinstance(value, str) and not stated) or not 0 <= number < math.inf:
        raise PlanError(
            f"{origin}={brief(value)}: must be a number from 0 in the metric's own unit (seconds, not milliseconds), '>= 5' or"
            " '<= 5' where its own direction is not what is meant, or None to lift a limit"
        )
    return Limit(number, None if stated is None else stated[1] == ">=")


def named_accelerators(names: Sequence[str], *, started_here: bool) -> tuple[str, ...]:
    """Return the different names among these accelerators; `cpu` for none, unless the engine may have some elsewhere."""
    return tuple(dict.fromkeys(names)) or ((CPU,) if started_here else ())
