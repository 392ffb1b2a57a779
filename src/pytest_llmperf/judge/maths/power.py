"""Before GPU time is spent: how small a slow-down can be found, and how many launches a smaller one would take."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from pytest_llmperf.judge.maths.stats import sample, standard_error, t_critical, within_jobs

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from pytest_llmperf.judge.maths.stats import Design, Drift, Prior

_MISS: Final = 0.05
_HOPELESS: Final = 10_000.0
"""In log-percent; the exponential of much more is no number."""
_MOST_LAUNCHES: Final = 64
"""More launches than this are no advice."""


def minimum_detectable_effect(baseline: ArrayLike, *, design: Design, prior: Prior, drift: Drift | None = None) -> float:
    """Return the slow-down, as a fraction, that is proven with probability 95 % when all K launches are spent.

    `baseline` holds launch levels in log-percent.  Raises `UnusableSampleError`.
    """
    b, k = sample(baseline, "baseline"), max(design.launches, 2)
    ss, df = within_jobs(b, drift.jobs if drift else None)
    expected = prior.variance if not df else (prior.df * prior.variance + ss) / (prior.df + df)
    # The candidate's launches will add their own evidence on the noise; it is expected to be what is believed now.
    se, freedom = standard_error(ss + (k - 1) * expected, df + k - 1, prior=prior, sizes=(b.size, k), drift=drift)
    effect = (t_critical(design.alpha_at(k), freedom) + t_critical(_MISS, freedom)) * se
    return math.expm1(min(effect, _HOPELESS) / 100)


def launches_needed(baseline: ArrayLike, *, design: Design, prior: Prior, drift: Drift | None = None) -> int | None:
    """Return the fewest candidate launches that find the design's tolerance with probability 95 %; None beyond 64."""
    for k in range(2, _MOST_LAUNCHES + 1):
        if minimum_detectable_effect(baseline, design=replace(design, launches=k), prior=prior, drift=drift) <= design.tolerance:
            return k
    return None
