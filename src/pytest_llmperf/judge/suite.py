"""The suite as a whole: is everything a little slower, by less than any single comparison can prove?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np
from scipy.special import stdtr

from pytest_llmperf.judge.stats import (
    Decision,
    Design,
    Outcome,
    UnusableSampleError,
    fit_prior,
    sample,
    standard_error,
    t_critical,
    within_jobs,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

LEAST: Final = 1.0
"""The smallest mean change, in log-percent, that may fail a suite: below it nothing is worth a red build."""


def decide_suite(engines: Sequence[Sequence[tuple[ArrayLike, ArrayLike]]], *, design: Design) -> Decision:
    """Return the verdict on the mean of all comparisons: it sees 1.5 % on everything, which no single one can prove.

    Per engine, the comparisons' levels (baseline, candidate).  They share the engine's launches, so an engine counts
    with its mean over comparisons as *one* comparison, over the launches that all of them have; only engines are taken
    as independent.  A host that is slow today looks just like it: read it as "everything", and look at the host first.
    The prior is fitted to the engines' means, so that noise which all comparisons of an engine share counts in full.
    Regressed: significant at alpha x suite_share, at least `LEAST`, two candidate launches or more.  Never "more": call it
    once, when every comparison has ended.
    """
    if not engines or not all(engines):
        raise UnusableSampleError("There is no engine, or one without comparisons.")
    sides = [
        tuple(_common(side, what) for side, what in zip(zip(*engine, strict=True), ("baseline", "candidate"), strict=True))
        for engine in engines
    ]
    several = [b for b, _ in sides if b.size > 1]
    prior = fit_prior([np.var(b, ddof=1) for b in several], [b.size - 1 for b in several])
    total, look = sum(map(len, engines)), 0
    d = variance = squares = 0.0
    for engine, (b, c) in zip(engines, sides, strict=True):
        squares_of_b, df_b = within_jobs(b, None)
        ss = squares_of_b + float(((c - c.mean()) ** 2).sum())
        se, df = standard_error(ss, df_b + c.size - 1, prior=prior, sizes=(b.size, c.size))
        weight = len(engine) / total
        d += weight * float(c.mean() - b.mean())
        variance, squares = variance + (weight * se) ** 2, squares + (weight * se) ** 4 / df
        look += c.size
    se, df = math.sqrt(variance), variance**2 / squares  # Welch-Satterthwaite
    reach = t_critical(design.alpha * max(design.suite_share, 1e-12), df) * se
    proven = look >= 2 and abs(d) >= max(reach, LEAST)
    outcome: Outcome = "pass" if not proven else "regressed" if d > 0 else "improved"
    bounds = {"estimate": d, "lower": d - reach, "upper": d + reach, "p": float(stdtr(df, -d / se)), "se": se, "df": df}
    return Decision(outcome=outcome, rule="mean of all comparisons", launches=look, **bounds)


def _common(side: Sequence[ArrayLike], what: str) -> NDArray[np.float64]:
    levels = [sample(values, what) for values in side]
    shortest = min(x.size for x in levels)
    mean: NDArray[np.float64] = np.mean([x[:shortest] for x in levels], axis=0)
    return mean
