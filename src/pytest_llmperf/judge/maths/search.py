"""Find the largest load at which a share of requests is good: which load to try next, and what the tries come to.

A bisection in the logarithm of the load. Each probe is a round at one load, a count of good requests of a total. A load holds, or
it does not, when a one-sided Clopper-Pearson bound (1934) says so; between the two it is tried again, and after the last try the
pooled share decides, which is then called uncertain. Where loads are tried is moved a little by the seed, so that no two launches
stand on the same grid and a mean over launches is finer than the resolution. Pure functions of what was tried.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from scipy.special import betaincinv

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CONFIDENCE: Final = 0.95
"""Of each bound, as if requests were independent: those of one round share its queue, so the bounds are a guide. What is judged
are launches."""
_DITHER: Final = 0.3
"""An interval is cut in the middle, give or take half of this share of its (logarithmic) length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What is searched for, fixed before the first round."""

    low: float
    high: float
    """The smallest and the largest load that may be tried."""
    share: float = 0.99
    """The share of good requests that a load must hold."""
    resolution: float = 0.05
    """It ends when the smallest load that fails is no more than this fraction above the largest that holds."""
    repeats: int = 3
    """Rounds at one load at most."""
    whole: bool = False
    """Loads are whole numbers."""
    seed: str = ""


@dataclass(frozen=True, slots=True)
class Probe:
    """A round at one load."""

    load: float
    good: int
    total: int
    grows: bool = False
    """The queue grew throughout: the load is beyond what is served, however good the answers still were."""


@dataclass(frozen=True, slots=True)
class Decided:
    """Whether a load holds."""

    holds: bool
    certain: bool
    """The bound at `CONFIDENCE` says so, and not only the share itself."""


@dataclass(frozen=True, slots=True)
class Edge:
    """The largest load that holds."""

    value: float
    """The geometric mean of the largest load that held and the smallest that did not; the bound where all held, or none."""
    low: float | None
    """The largest load that certainly holds; None where not even the smallest does."""
    high: float | None
    """The smallest load that certainly fails; None where even the largest holds."""


def bounds(good: int, total: int) -> tuple[float, float]:
    """Return the one-sided lower and upper bounds of a share at `CONFIDENCE` (Clopper and Pearson 1934)."""
    low = float(betaincinv(good, total - good + 1, 1 - CONFIDENCE)) if good else 0.0
    high = float(betaincinv(good + 1, total - good, CONFIDENCE)) if good < total else 1.0
    return low, high


def requests_for(share: float) -> int:
    """Return how many requests, all of them good, prove a share at `CONFIDENCE`: 299 for 99 %."""
    return math.ceil(math.log(1 - CONFIDENCE) / math.log(share))


def provable(total: int) -> float:
    """Return the largest share that so many requests can prove, all of them good."""
    return float((1 - CONFIDENCE) ** (1 / total))


def decide(search: Search, probes: Sequence[Probe]) -> Decided | None:
    """Return whether a load holds, from all its rounds; None where another round must tell."""
    if any(probe.grows for probe in probes):
        return Decided(holds=False, certain=True)
    good, total = sum(probe.good for probe in probes), sum(probe.total for probe in probes)
    low, high = bounds(good, total)
    if low >= search.share or high < search.share:
        return Decided(holds=low >= search.share, certain=True)
    return Decided(good >= search.share * total, certain=False) if len(probes) >= search.repeats else None


def next_load(search: Search, probes: Sequence[Probe], start: float | None = None) -> float | None:
    """Return the load to try next; None when the search is over.

    `start` is a load near which the answer is expected: the first tries are just below and above it, then twice as far each time.
    It saves rounds and decides nothing, because both ends are tried anew.
    """
    decided = _decided(search, probes)
    if probes and decided.get(probes[-1].load) is None:
        return probes[-1].load
    held, failed = _ends(decided)
    shift = float(np.random.default_rng([*search.seed.encode(), len(probes)]).uniform(-0.5, 0.5))
    if held is None and failed is None:
        middle = math.sqrt(search.low * search.high) if start is None else start / (1 + search.resolution)
        reach = _DITHER * math.log(search.high / search.low) if start is None else math.log1p(search.resolution)
        return _fit(search, middle * math.exp(shift * reach), search.low, search.high)
    if held is not None and failed is not None:
        return (
            _uncertain(search, probes, decided, shift) if _closed(search, held, failed) else _between(search, held, failed, shift)
        )
    if held is not None:
        return _beyond(search, held, search.high, shift, len(decided) if start else None)
    assert failed is not None
    return _beyond(search, failed, search.low, shift, len(decided) if start else None)


def conclude(search: Search, probes: Sequence[Probe]) -> Edge:
    """Return what a search that is over came to."""
    decided = {load: each for load, each in _decided(search, probes).items() if each}
    held, failed = _ends(dict(decided))
    if held is None:
        return Edge(search.low, None, _end(decided, min, holds=False))
    low = _end(decided, max, holds=True)
    if failed is None:
        return Edge(search.high, low, None)
    near = search.whole and failed - held <= 1
    return Edge(held if near else math.sqrt(held * failed), low, _end(decided, min, holds=False))


def _decided(search: Search, probes: Sequence[Probe]) -> dict[float, Decided | None]:
    """Return what each load came to, in their order."""
    loads = sorted({probe.load for probe in probes})
    return {load: decide(search, [probe for probe in probes if probe.load == load]) for load in loads}


def _ends(decided: dict[float, Decided | None]) -> tuple[float | None, float | None]:
    """Return the largest load that holds, and the smallest that fails."""
    held = [load for load, each in decided.items() if each and each.holds]
    failed = [load for load, each in decided.items() if each and not each.holds]
    return max(held, default=None), min(failed, default=None)


def _end(decided: dict[float, Decided], nearest: Callable[..., float], *, holds: bool) -> float:
    """Return the nearest load that certainly holds (or fails), of those that were tried; the farthest where none is certain."""
    loads = [load for load, each in decided.items() if each.holds is holds]
    certain = [load for load in loads if decided[load].certain]
    return nearest(certain) if certain else (min(loads) if holds else max(loads))


def _closed(search: Search, held: float, failed: float) -> bool:
    return failed <= held * (1 + search.resolution) or (search.whole and failed - held <= 1)


def _between(search: Search, low: float, high: float, shift: float) -> float:
    inside = math.sqrt(low * high) * math.exp(_DITHER * shift * math.log(high / low))
    return min(max(float(round(inside)), low + 1), high - 1) if search.whole else inside


def _beyond(search: Search, tried: float, bound: float, shift: float, strides: int | None) -> float | None:
    """Return a load between the farthest that was tried on one side and a bound, and the bound itself where they are close.

    `strides` is how many loads were tried already, where an answer is expected near the first: each stride is twice the last.
    """
    if tried == bound:
        return None
    up = bound > tried
    if strides is not None:
        stride = (1 + search.resolution) ** (2.0**strides + shift)
        return _fit(search, tried * stride if up else tried / stride, *sorted((_next_to(search, tried, up=up), bound)))
    near, far = sorted((tried, bound))
    return bound if _closed(search, near, far) else _between(search, near, far, shift)


def _uncertain(search: Search, probes: Sequence[Probe], decided: dict[float, Decided | None], shift: float) -> float | None:
    """Return a load farther out where no load that was tried is certain on one side, so that the interval has an end there."""
    can_prove = provable(search.repeats * max(probe.total for probe in probes)) >= search.share
    for holds, bound in ((True, search.low), (False, search.high)):
        loads = {load: each for load, each in decided.items() if each and each.holds is holds}
        if any(each.certain for each in loads.values()) or (holds and not can_prove):
            continue
        farthest = max(loads) if bound == search.high else min(loads)
        if farthest != bound:
            return _beyond(search, farthest, bound, shift, 1)
    return None


def _next_to(search: Search, load: float, *, up: bool) -> float:
    return load + (1 if up else -1) if search.whole else load


def _fit(search: Search, load: float, low: float, high: float) -> float:
    """Return a load within bounds, whole where it must be."""
    return min(max(float(round(load)) if search.whole else load, low), high)
