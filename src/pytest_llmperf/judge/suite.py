"""The suite as a whole: is everything a little slower, by less than any single comparison can prove?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from scipy.special import stdtr

from pytest_llmperf.judge import noise
from pytest_llmperf.judge.maths.prior import fit_prior
from pytest_llmperf.judge.maths.stats import (
    FLOOR_SD,
    Decision,
    Design,
    Drift,
    Outcome,
    UnusableSampleError,
    sample,
    standard_error,
    t_critical,
    within_jobs,
)
from pytest_llmperf.measure import metrics

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import ArrayLike, NDArray

    from pytest_llmperf.judge.verdict import Verdict

LEAST: Final = 1.0
"""The smallest mean change, in log-percent, that may fail a suite: below it nothing is worth a red build."""


@dataclass(frozen=True)
class EngineLevels:
    """The comparisons of one engine, which share its launches."""

    pairs: tuple[tuple[ArrayLike, ArrayLike], ...]
    """Levels of baseline and run per comparison, in log-percent, + worse."""
    jobs: tuple[str, ...] = ()
    """The job (run of pytest) of each baseline launch; empty: not known."""


def decide_suite(engines: Sequence[EngineLevels], *, design: Design, drift: Drift | None = None) -> Decision:
    """Return the verdict on the mean of all comparisons: it sees a shift of everything that no single one can prove.

    An engine counts with its mean over comparisons as *one* comparison, over the launches that all of them have; only
    engines are taken as independent.  The prior is fitted to the engines' means, so that noise which all comparisons of an
    engine share counts in full.  Regressed takes a change of `LEAST` or more and two launches, significant at
    alpha x suite_share for launches *and* for jobs: a host that is slow today moves everything too, so the run's mean must
    stand out from those of the baseline's jobs (`drift`: what is believed of the host besides, `noise.drift_on`).  With fewer
    than three of these nobody can tell: inconclusive.
    Never "more": call it once, when every comparison has ended.  Raises `UnusableSampleError`.
    """
    if not engines or not all(engine.pairs for engine in engines):
        raise UnusableSampleError("There is no engine, or one without comparisons.")
    sides = [
        tuple(_common(side, what) for side, what in zip(zip(*engine.pairs, strict=True), _SIDES, strict=True))
        for engine in engines
    ]
    several = [b for b, _ in sides if b.size > 1]
    prior = fit_prior([np.var(b, ddof=1) for b in several], [b.size - 1 for b in several])
    total, look = sum(len(engine.pairs) for engine in engines), 0
    d = variance = squares = launch_sd = 0.0
    for engine, (b, c) in zip(engines, sides, strict=True):
        squares_of_b, df_b = within_jobs(b, None)
        ss = squares_of_b + float(((c - c.mean()) ** 2).sum())
        se, df = standard_error(ss, df_b + c.size - 1, prior=prior, sizes=(b.size, c.size))
        weight = len(engine.pairs) / total
        d += weight * float(c.mean() - b.mean())
        variance, squares = variance + (weight * se) ** 2, squares + (weight * se) ** 4 / df
        launch_sd += weight * se / math.sqrt(1 / b.size + 1 / c.size)  # a host's drift moves all engines alike
        look += c.size
    se, df = math.sqrt(variance), variance**2 / squares  # Welch-Satterthwaite
    tail = design.alpha * max(design.suite_share, 1e-12)
    margin, p = t_critical(tail, df) * se, float(stdtr(df, -d / se))
    means = _job_means(engines, [b for b, _ in sides])
    if means.size >= _JOBS_THAT_TELL:
        believed = drift or Drift(0.0, (), 0)
        freedom = means.size - 1 + believed.df
        between = (float(((means - means.mean()) ** 2).sum()) + believed.df * believed.share * launch_sd**2) / freedom
        spread = math.sqrt(max(between, FLOOR_SD**2) * (1 + 1 / means.size))
        margin = max(margin, t_critical(tail, freedom) * spread)
        p = max(p, float(stdtr(freedom, -d / spread)))
    proven = look >= 2 and abs(d) >= max(margin, LEAST)
    outcome: Outcome = "pass" if not proven else "regressed" if d > 0 else "improved"
    rule = "mean of all comparisons"
    if proven and means.size < _JOBS_THAT_TELL:
        outcome = "inconclusive"
        rule += f"; baselines of {_JOBS_THAT_TELL} runs or more would tell whether the host is slow today"
    return Decision(outcome=outcome, rule=rule, launches=look, estimate=d, lower=d - margin, upper=d + margin, p=p, se=se, df=df)


_SIDES = ("baseline", "candidate")
_JOBS_THAT_TELL: Final = 3


def _job_means(engines: Sequence[EngineLevels], baselines: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Return the suite's mean in each job that every engine's baseline has."""
    total = sum(len(engine.pairs) for engine in engines)
    shared = set.intersection(*(set(engine.jobs[: b.size]) for engine, b in zip(engines, baselines, strict=True)))
    return np.array(
        [
            sum(
                len(engine.pairs) / total * b[[each == job for each in engine.jobs[: b.size]]].mean()
                for engine, b in zip(engines, baselines, strict=True)
            )
            for job in sorted(shared)
        ]
    )


def _common(side: Sequence[ArrayLike], what: str) -> NDArray[np.float64]:
    levels = [sample(values, what) for values in side]
    shortest = min(x.size for x in levels)
    mean: NDArray[np.float64] = np.mean([x[:shortest] for x in levels], axis=0)
    return mean


def judge_suite(verdicts: Iterable[tuple[str, Verdict]], host: str = "") -> Decision | None:
    """Return the verdict on all comparisons together, from (engine, verdict) of the compared cases; None where there is none.

    `host` is the host's key, which tells what to believe of jobs.
    """
    pairs: dict[str, list[tuple[tuple[float, ...], tuple[float, ...]]]] = {}
    jobs: dict[str, tuple[str, ...]] = {}
    for engine, verdict in verdicts:
        for row in verdict.metrics:
            metric = metrics.find(row.metric)
            # What is compared of some starts only cannot be matched by its place.
            if row.levels is not None and metric.kind in noise.RATIOS and metric.start is None:
                pairs.setdefault(engine, []).append(row.levels)
                # Launches are matched by their place; so are their jobs, of the case that has fewest.
                known = jobs.setdefault(engine, verdict.baseline_jobs)
                jobs[engine] = min(known, verdict.baseline_jobs, key=len)
    if sum(map(len, pairs.values())) < 2:
        return None  # a single comparison is not made twice
    levels = [EngineLevels(tuple(of_engine), jobs[engine]) for engine, of_engine in pairs.items()]
    return decide_suite(levels, design=Design(), drift=noise.drift_on(host))
