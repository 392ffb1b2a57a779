"""The capacity under limits: a workload whose load is searched for, between two bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from pytest_llmperf.plan.arguments import workload_from
from pytest_llmperf.plan.checks import LARGEST, SMALLEST, PlanError, brief, degree, parse_fraction, written
from pytest_llmperf.plan.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pytest_llmperf.plan.axes import Axes

CAPACITIES: dict[str, str] = {"rate": "capacity_requests_per_s", "concurrency": "capacity_concurrency"}
"""The metric that a search comes to, by the load that is varied."""
CAPACITY = "capacity"
"""The field of a workload's description that a search is known by."""
_OF_A_LOAD = ("rate", "concurrency", "requests")


@dataclass(frozen=True)
class CapacityWorkload(Workload):
    """What is sent while the largest load is searched for at which the share of good requests holds."""

    varied: str = "rate"
    """`rate` or `concurrency`."""
    low: float = 1.0
    high: float = 64.0
    """The smallest and the largest load that may be tried."""
    share: float = 0.99
    """The share of requests within every limit of `slo` that a load must hold."""
    resolution: float = 0.05
    """How far apart the largest load that holds and the smallest that does not may be at the end, as a fraction."""
    repeats: int = 3
    """Rounds at one load at most."""
    judged: int | None = None
    """Requests of a round, where the test says how many; None for as many as prove the share."""

    @property
    def metric(self) -> str:
        """Return the metric that the search comes to."""
        return CAPACITIES[self.varied]

    @property
    def description(self) -> dict[str, Any]:
        """Return what is stored and shown of it: what is sent at any load, and between which loads."""
        plain = {name: value for name, value in self.at(self.low, self.requests).description.items() if name not in _OF_A_LOAD}
        names = ("varied", "low", "high", "share", "resolution", "repeats", "judged")
        search = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {**plain, CAPACITY: search}

    def at(self, load: float, requests: int) -> Workload:
        """Return the workload of one round, at one load; conversations are whole."""
        values = {field.name: getattr(self, field.name) for field in fields(Workload)}
        values["requests"] = math.ceil(requests / self.turns) * self.turns
        if self.varied == "rate":
            return Workload(**{**values, "rate": (load,)})
        return Workload(**{**values, "rate": (), "concurrency": round(load)})


def capacity_from(
    axes: Axes, defaults: Mapping[str, Any], arguments: Mapping[str, Any], *, folder: Path | None = None
) -> CapacityWorkload:
    """Return what `llmperf.capacity(...)` is to search; raises PlanError naming the argument."""
    given = dict(arguments)
    share = parse_fraction("share", given.pop("share", CapacityWorkload.share))
    resolution = parse_fraction("resolution", given.pop("resolution", CapacityWorkload.resolution))
    repeats = degree("repeats", given.pop("repeats", CapacityWorkload.repeats))
    named = [name for name in CAPACITIES if given.get(name) is not None]
    if len(named) != 1:
        raise PlanError("capacity(rate=(1, 64)) or capacity(concurrency=(1, 256)): name the bounds of one load, and only one")
    [varied] = named
    low, high = _bounds(varied, given.pop(varied))
    given.pop("rate", None), given.pop("concurrency", None)
    layers = {name: value for name, value in defaults.items() if name not in _OF_A_LOAD[:2]}
    merged = layers | given
    if merged.get("slo") is None:
        raise PlanError("capacity(slo=...): name the limits that a good request keeps, e.g. slo={'ttft_s': 0.5, 'tpot_s': 0.05}")
    if merged.get("trace") is not None:
        raise PlanError("capacity(trace=...): a trace has its own arrivals, and no load that could be varied; leave trace out")
    if merged.get("duration_s") is not None:
        raise PlanError("capacity(duration_s=...): how long a round is follows from its load and requests; leave duration_s out")
    judged = degree("requests", merged["requests"]) if merged.get("requests") is not None else None
    plain = workload_from(axes, layers, given | {varied: int(low) if varied == "concurrency" else low}, folder=folder)
    values = {field.name: getattr(plain, field.name) for field in fields(Workload)}
    return CapacityWorkload(
        **values, varied=varied, low=low, high=high, share=share, resolution=resolution, repeats=repeats, judged=judged
    )


def _bounds(name: str, value: object) -> tuple[float, float]:
    """Return the smallest and the largest load, from `(1, 64)` or `"1..64"`."""
    ends = value if isinstance(value, (list, tuple)) else written(value).split("..")
    wrong = PlanError(f"capacity({name}={brief(value)}): must be the smallest and the largest load to try, e.g. {name}=(1, 64)")
    if len(ends) != 2:
        raise wrong
    if name == "concurrency":
        low, high = (float(degree(f"capacity: {name}", end)) for end in ends)
    else:
        try:
            low, high = (float(written(end)) for end in ends)
        except ValueError:
            raise wrong from None
    if not SMALLEST <= low < high <= LARGEST:
        raise wrong
    return low, high
