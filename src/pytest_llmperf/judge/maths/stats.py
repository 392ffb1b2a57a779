"""Judge launches against launches: is this metric worse than the baseline, or must another launch tell?

One launch (an engine start) gives one number per metric, its *level*: its rounds in the middle as 100·ln, so that +5
reads "about 5 % worse".  Levels are compared by a moderated t-test (Smyth 2004, limma) that is repeated after each
launch and may stop early.  Rounds, requests and tokens are never the sample: they share their launch, and pooling them
makes nearly every clean suite red.  Pure functions; unusable data raises `UnusableSampleError`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
from scipy.special import stdtr, stdtrit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

Outcome = Literal["pass", "improved", "regressed", "inconclusive", "more"]

FLOOR_SD: Final = 0.1
"""Smallest believable sd of a launch level, in log-percent: no clock or GPU repeats an engine start better than 0.1 %.
It keeps a baseline of equal values (a simulated engine, a coarse clock) from turning any difference into certainty."""


class UnusableSampleError(ValueError):
    """A sample holds nothing that can be compared: empty, not finite, or not positive where a logarithm is needed."""


@dataclass(frozen=True, slots=True)
class Prior:
    """What is believed of a launch level's noise before its own launches are seen (Smyth's s0² and d0)."""

    variance: float
    """s0², squared log-percent."""
    df: float
    """d0: how many degrees of freedom the belief is worth."""


PRIORS: Final = {"ratio": Prior(4.0, 4.0), "quantile": Prior(9.0, 4.0), "tail": Prior(25.0, 4.0)}
"""Shipped beliefs by metric class, for suites too small to tell: sd 2 %, 3 % and 5 %, worth 4 launches.  Real launches have
0.2 % (a 7B model on an H200) to 4 % (a tiny model on shared CPUs); with 4 degrees of freedom an sd of 1.2 % to 4 % is
likely, and quieter metrics earn their precision by their own launches."""


@dataclass(frozen=True, slots=True)
class Drift:
    """How much jobs (pytest runs) differ beyond their launches: a host's good and bad days, which no launch averages out."""

    share: float
    """Variance between jobs, as a multiple of the variance between launches of one job; 0 or more."""
    jobs: tuple[str, ...]
    """The job of each baseline launch.  All candidate launches are one job."""
    df: float = 1
    """How well the share is known: jobs that it was estimated from, less one, and what a belief is worth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """What was fixed before the first launch.  The error promises hold only if nothing follows the measurement."""

    tolerance: float = 0.05
    """The slow-down that must not pass, as a fraction."""
    alpha: float = 0.01
    """Probability that a suite run with nothing slower has any false regression."""
    beta: float = 0.03
    """Probability that a comparison slower by exactly the tolerance passes."""
    comparisons: int = 1
    """Gating comparisons in the suite run, over which alpha is split."""
    launches: int = 8
    """Most candidate launches that may be asked for."""
    suite_share: float = 0.1
    """Part of alpha that single comparisons do not spend: reserved for one comparison of the suite as a whole."""

    def __post_init__(self) -> None:
        """Raise ValueError for a value outside its range."""
        for name in ("tolerance", "alpha", "beta"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must lie between 0 and 1 (0.05 means 5 %).")
        if not 0 <= self.suite_share < 1:
            raise ValueError(f"suite_share is {self.suite_share!r}; it must be at least 0 and less than 1.")
        if self.comparisons < 1 or self.launches < 1:
            raise ValueError(f"comparisons ({self.comparisons}) and launches ({self.launches}) must be at least 1.")

    @property
    def margin(self) -> float:
        """The tolerance in log-percent."""
        return 100 * math.log1p(self.tolerance)

    def alpha_at(self, look: int) -> float:
        """Return the one-sided error allowed to a regression of one comparison after `look` candidate launches.

        The looks k = 2..K share alpha/m by weights 3^k: most is kept for the last, where the estimate is best.  The sum
        over looks and comparisons bounds the suite's error under any dependence between metrics and any stopping.
        Two launches get weight 1, not 9: two bad engine starts in a row happen more often than the normal law believes,
        and flatter weights made half of the simulated false alarms there (2 % bad launches: 0.7 % of suites, now 0.5).
        """
        last = max(self.launches, 2)
        look = min(max(look, 2), last)
        weights = [1.0 if k == 2 else 3.0**k for k in range(2, last + 1)]
        return self.alpha * (1 - self.suite_share) / self.comparisons * weights[look - 2] / sum(weights)

    def beta_at(self, look: int) -> float:
        """Return the error allowed to a pass after `look` candidate launches: equal shares."""
        return self.beta / self.launches


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What the launches so far say about one comparison.  Differences are in log-percent, + is worse."""

    outcome: Outcome
    """"more" asks for one more candidate launch; "inconclusive" is the same with the budget spent."""
    rule: str
    """Why, in a few words."""
    launches: int
    """Candidate launches used."""
    estimate: float
    lower: float
    """One-sided lower bound at the level that a regression needs at this look; -inf where none can be given."""
    upper: float
    """One-sided upper bound at the level that a pass needs at this look; inf where none can be given."""
    p: float | None = None
    """One-sided p-value of "not worse", of this look alone; None where no test was made (exact class)."""
    se: float | None = None
    df: float | None = None


# --- from rounds to levels -----------------------------------------------------------------------------------------


def launch_levels(rounds: Sequence[Sequence[float]], *, higher_is_better: bool, scatter: float) -> NDArray[np.float64]:
    """Return per launch the mean of the rounds within 4 x `scatter` of the launch's median, in log-percent, + is worse.

    As immune to stray rounds as the median, and 3 % less noisy, as all good rounds count (simulated: MIX power 95.0 to
    95.6 %).  `scatter` is the *baseline's* `round_scatter` for both sides, or the two would be summarized differently.
    """
    launches = _log_percent(rounds, higher_is_better)
    middles = [median(x.tolist()) for x in launches]
    near = [x[abs(x - middle) <= reach(scatter)] for x, middle in zip(launches, middles, strict=True)]
    return np.array([x.sum() / x.size if x.size else middle for x, middle in zip(near, middles, strict=True)])


def reach(scatter: float) -> float:
    """Return how far from its launch's median a round may be and still count, in log-percent."""
    return max(4 * scatter, FLOOR_SD)


def round_scatter(rounds: Sequence[Sequence[float]]) -> float:
    """Return the sd of rounds inside their launch, in log-percent, from the median distance to the launch's median.

    Pooled over launches, so a few launches of 5 rounds measure it well; nearly half of the rounds may be stray.
    Raises `UnusableSampleError` for no launch, an empty one, or a value that is not positive and finite.
    """
    launches = _log_percent(rounds, higher_is_better=False)
    distances = np.concatenate([abs(x - median(x.tolist())) for x in launches])
    return _MAD_TO_SD * float(np.median(distances))


_MAD_TO_SD: Final = 1.4826


def _log_percent(rounds: Sequence[Sequence[float]], higher_is_better: bool) -> list[NDArray[np.float64]]:
    if not len(rounds):
        raise UnusableSampleError("There is no launch to compare.")
    sign = -100.0 if higher_is_better else 100.0
    sizes = [len(values) for values in rounds]
    if not all(sizes):
        raise UnusableSampleError(f"Launch {sizes.index(0) + 1} has no rounds.")
    x = np.concatenate([np.asarray(values, dtype=np.float64) for values in rounds])
    usable = np.isfinite(x) & (x > 0)
    if not usable.all():
        raise UnusableSampleError(f"A round is {x[~usable][0]}; a ratio needs positive, finite values.")
    return np.split(sign * np.log(x), np.cumsum(sizes)[:-1])


def sample(values: ArrayLike, what: str) -> NDArray[np.float64]:
    """Return the values, one per launch, as an array; raise `UnusableSampleError` if none or not all are finite."""
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not x.size:
        raise UnusableSampleError(f"The {what} has no launches.")
    if not np.isfinite(x).all():
        raise UnusableSampleError(f"The {what} holds a value that is not finite: {x[~np.isfinite(x)][0]!r}.")
    return x


# --- ratios and quantiles ------------------------------------------------------------------------------------------
def decide(baseline: ArrayLike, candidate: ArrayLike, *, design: Design, prior: Prior, drift: Drift | None = None) -> Decision:
    """Return the verdict on launch levels (log-percent, + worse) of a ratio or quantile metric.

    Pass: the upper bound of the slow-down is below the tolerance (possible after one launch).  Regressed: the slow-down
    is significant, the estimate and the lower median of the candidate launches are at least half the tolerance, and
    there are two launches or more.  Pass is asked first, so a proven small slow-down passes.  Improved is a pass with
    the mirror image of a regression; it fails nothing, so one launch may show it.  `drift`, where it is known, widens the
    bounds by what one job says less than several; where it alone keeps the bounds apart no further launch is asked for.
    Raises `UnusableSampleError`.
    """
    b, c = sample(baseline, "baseline"), sample(candidate, "candidate")
    ss_b, df_b = within_jobs(b, drift.jobs if drift else None)
    ss = ss_b + float(((c - c.mean()) ** 2).sum())
    se, df = standard_error(ss, df_b + c.size - 1, prior=prior, sizes=(b.size, c.size), drift=drift)
    ordered = np.sort(c) - b.mean()
    typical = float(ordered[(c.size - 1) // 2]), float(ordered[c.size // 2])
    decision = _verdict(float(c.mean() - b.mean()), se, df, typical, look=c.size, design=design)
    if decision.outcome == "more" and drift is not None and drift.share:
        launch, more = (prior.df * prior.variance + ss) / (prior.df + df_b + c.size - 1), design.launches - c.size
        last = standard_error(
            ss + more * launch, df_b + design.launches - 1, prior=prior, sizes=(b.size, design.launches), drift=drift
        )
        if _hopeless(decision, *last, design=design):
            return replace(decision, outcome="inconclusive", rule=HOPELESS)
    return decision


HOPELESS: Final = "runs differ too much for more launches to tell: record the baseline in more runs, or on a quieter host"


def _hopeless(decision: Decision, se: float, df: float, *, design: Design) -> bool:
    """Return whether not even the whole budget of launches could decide, with `se` and `df` as they will be then.

    The estimate may still move, by as much as the launches that it lacks would make it more certain.
    """
    moves = 2 * math.sqrt(max((decision.se or 0.0) ** 2 - se**2, 0.0))
    passes = decision.estimate - moves + t_critical(design.beta_at(design.launches), df) * se < design.margin
    highest = decision.estimate + moves
    fails = highest - t_critical(design.alpha_at(design.launches), df) * se > 0 and highest >= design.margin / 2
    return not passes and not fails


def within_jobs(levels: NDArray[np.float64], jobs: Sequence[str] | None) -> tuple[float, int]:
    """Return sum of squares and degrees of freedom of launch levels around their job's mean; None takes all as one job."""
    groups = [levels] if jobs is None else [levels[[each == job for each in jobs]] for job in dict.fromkeys(jobs)]
    return sum(float(((x - x.mean()) ** 2).sum()) for x in groups), levels.size - len(groups)


def standard_error(
    ss: float, df: int, *, prior: Prior, sizes: tuple[int, int], drift: Drift | None = None
) -> tuple[float, float]:
    """Return se and degrees of freedom of mean(candidate) - mean(baseline), for `sizes` = (baseline, candidate) launches.

    `ss` and `df` are those of launches within their jobs; the prior is worth `prior.df` more.  A drift adds the variance
    of one job against the baseline's (Satterthwaite 1946), and never makes the test believe that it knows more.
    """
    freedom = df + prior.df
    launch = max((prior.df * prior.variance + ss) / freedom, FLOOR_SD**2)
    b, c = sizes
    variance = launch * (1 / b + 1 / c)
    if drift is None or not drift.share:
        return math.sqrt(variance), freedom
    repeated = sum(drift.jobs.count(job) ** 2 for job in set(drift.jobs)) / b**2
    between = launch * drift.share * (1 + repeated)
    total = variance + between
    return math.sqrt(total), min(total**2 / (variance**2 / freedom + between**2 / drift.df), freedom)


def _verdict(d: float, se: float, df: float, typical: tuple[float, float], *, look: int, design: Design) -> Decision:
    # `typical` are the lower and upper median of the candidate launches: one bad launch of two must not fail a build.
    half = design.margin / 2
    lower = d - t_critical(design.alpha_at(look), df) * se
    upper = d + t_critical(design.beta_at(look), df) * se
    better = d + t_critical(design.alpha_at(look), df) * se < 0 and max(d, typical[1]) <= -half
    outcome: Outcome
    if upper < design.margin:
        outcome, rule = ("improved", "proven faster") if better else ("pass", "upper bound below the tolerance")
    elif lower > 0 and min(d, typical[0]) >= half and look >= 2:
        outcome, rule = "regressed", "proven slower, by half the tolerance or more"
    else:
        outcome, rule = undecided(look, design)
    p = float(stdtr(df, -d / se))
    return Decision(outcome=outcome, rule=rule, launches=look, estimate=d, lower=lower, upper=upper, p=p, se=se, df=df)


def undecided(look: int, design: Design) -> tuple[Outcome, str]:
    """Return "more", or "inconclusive" once the budget is spent, and why."""
    if look < design.launches:
        return "more", "neither bound decides yet"
    return "inconclusive", f"neither bound decides after {look} launch{'es' if look != 1 else ''}"


def t_critical(tail: float, df: float) -> float:
    """Return the one-sided critical value of Student's t."""
    return -float(stdtrit(df, tail))
