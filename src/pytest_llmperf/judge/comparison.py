"""One metric of one case against its baseline: what is known before the first launch, and what the launches then say."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pytest_llmperf.judge import noise
from pytest_llmperf.judge.gates import fitting, judged
from pytest_llmperf.judge.maths import counts, power, stats
from pytest_llmperf.judge.noise import Belief

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from pytest_llmperf.judge.baseline import Baseline
    from pytest_llmperf.judge.gates import Tolerance
    from pytest_llmperf.measure.metrics import Metric


@dataclass(frozen=True)
class Comparison:
    """One metric of one case: everything that is known of it before this run's first launch."""

    metric: Metric
    rounds: list[list[float]]
    """The baseline's values, one list per launch."""
    gate: Tolerance
    design: stats.Design
    belief: Belief | None = None

    @property
    def _design(self) -> stats.Design:
        # An exact metric's tolerance is its allowance; where it varies after all, it is judged as a ratio.
        return self.design if self.metric.kind == "exact" else replace(self.design, tolerance=self.gate.share)

    @cached_property
    def exact(self) -> bool:
        """Whether the metric does not vary, so that two launches tell."""
        if self.metric.kind != "exact":
            return False
        values = [launch[0] for launch in self.rounds]
        return len(values) == 1 or counts.is_exact(values, tolerance=self.design.tolerance)

    @cached_property
    def _baseline(self) -> tuple[NDArray[np.float64], float]:
        scatter = stats.round_scatter(self.rounds)
        return noise.levels(self.metric, self.rounds, scatter), scatter

    @property
    def _noise(self) -> dict[str, Any]:
        default = stats.PRIORS.get(self.metric.kind, stats.PRIORS["ratio"])
        belief = self.belief or Belief(default)
        return {"design": self._design, "prior": belief.prior, "drift": belief.drift}

    @property
    def has_levels(self) -> bool:
        """Whether it is judged by the levels of launches."""
        return self.metric.kind != "count" and not self.exact

    @property
    def unusable(self) -> str | None:
        """Why its baseline cannot be compared with at all; None where it can."""
        try:
            self.decide(self.rounds[:1])
        except stats.UnusableSampleError as error:
            return str(error)
        return None

    @property
    def detectable(self) -> float | None:
        """The slow-down found 19 times in 20 within the budget, as a fraction; None for counts and exact metrics."""
        return power.minimum_detectable_effect(self._baseline[0], **self._noise) if self.has_levels else None

    @property
    def launches_needed(self) -> int | None:
        """How many launches would find the tolerance 19 times in 20; None where it cannot be told, or beyond 64."""
        return power.launches_needed(self._baseline[0], **self._noise) if self.has_levels else None

    def levels(self, now: list[list[float]]) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Return the levels of baseline and run in log-percent, + worse; None for counts and exact metrics."""
        if not self.has_levels:
            return None
        before, scatter = self._baseline
        return tuple(before.tolist()), tuple(noise.levels(self.metric, now, scatter).tolist())

    def decide(self, now: list[list[float]]) -> stats.Decision:
        """Return what these launches say; raises UnusableSampleError."""
        if self.metric.kind == "count":
            return counts.decide_count(_counts(self.rounds), _counts(now), design=self.design, tolerance=self.gate.share)
        if self.exact:
            before, new = ([launch[0] for launch in side] for side in (self.rounds, now))
            higher = self.metric.better == "higher"
            return counts.decide_exact(before, new, design=self.design, higher_is_better=higher, rel=self.gate.share)
        before_levels, scatter = self._baseline
        return stats.decide(before_levels, noise.levels(self.metric, now, scatter), **self._noise)


def _counts(side: list[list[float]]) -> counts.Counts:
    totals = [sum(launch) for launch in side]
    events = tuple(int(total) if math.isfinite(total) and total == int(total) else total for total in totals)
    return counts.Counts(events, tuple(len(launch) for launch in side))  # type: ignore[arg-type]  # it refuses what is no count


def prospects(
    stored: Baseline, gated: Mapping[str, Tolerance], design: stats.Design, beliefs: Mapping[str, Belief]
) -> list[Comparison]:
    """Return the gating comparisons of a stored case, as far as their baselines are usable."""
    usable = []
    for name, gate in gated.items():
        metric = judged(name, gate)
        values = noise.values(metric, stored.launches)
        comparison = Comparison(fitting(metric, values), values, gate, design, beliefs.get(name))
        if all(values) and comparison.unusable is None:
            usable.append(comparison)
    return usable
