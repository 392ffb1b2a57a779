"""Judge launches against launches: is this metric worse than the baseline, or must another launch tell?

One launch (an engine start) gives one number per metric, its *level*: its rounds in the middle as 100·ln, so that +5
reads "about 5 % worse".  Levels are compared by a moderated t-test (Smyth 2004, limma) that is repeated after each
launch and may stop early.  Rounds, requests and tokens are never the sample: they share their launch, and pooling them
makes nearly every clean suite red.  Pure functions; unusable data raises `UnusableSampleError`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
from scipy.special import digamma, polygamma, stdtr, stdtrit

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
    reach = max(4 * scatter, FLOOR_SD)
    launches = _log_percent(rounds, higher_is_better)
    middles = [median(x.tolist()) for x in launches]
    near = [x[abs(x - middle) <= reach] for x, middle in zip(launches, middles, strict=True)]
    return np.array([x.sum() / x.size if x.size else middle for x, middle in zip(near, middles, strict=True)])


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


# --- the prior -----------------------------------------------------------------------------------------------------
def fit_prior(
    variances: ArrayLike,
    dfs: ArrayLike,
    *,
    default: Prior = PRIORS["ratio"],
    cap: float = 50.0,
    weights: ArrayLike = 1.0,
) -> Prior:
    """Return the noise prior that the suite's own variances support (limma's squeezeVar; Smyth 2004, section 6.2).

    `variances` are the baselines' variances between launches (squared log-percent), `dfs` their degrees of freedom;
    entries with df < 1 or without a finite variance are left out.  Unlike limma the default counts as evidence too, so
    that one or two comparisons move it a little and forty replace it: half of its spread is doubt about the centre,
    half is spread between comparisons, worth four of them.  With nothing usable the default is returned.

    `weights` say how much of an independent witness each comparison is (`independence`): those of one engine share its
    launches, and 36 of them that move together know no more of its noise than one.
    """
    v, df, weight = (np.asarray(x, dtype=np.float64) for x in np.broadcast_arrays(variances, dfs, weights))
    usable = np.isfinite(v) & (v >= 0) & np.isfinite(df) & (df >= 1)
    if not usable.any():
        return default
    return _fit(v[usable], df[usable], weight[usable], np.ones(int(usable.sum())), 0.0, default).prior(1.0, cap)


def fit_priors(
    variances: ArrayLike,
    dfs: ArrayLike,
    scatters: ArrayLike,
    *,
    default: Prior = PRIORS["ratio"],
    cap: float = 50.0,
    weights: ArrayLike = 1.0,
) -> list[Prior]:
    """Return one prior per comparison: `fit_prior` that also knows each comparison's `round_scatter`.

    Noise of a launch level = a part that its rounds show (known well: many rounds) + a part between engine starts
    (borrowed from the suite).  The suite's likelihood chooses how much the rounds explain, none included.  What they
    explain is not in doubt, so comparisons with noisy rounds get a firmer prior: limma's trend, as a variance component
    (simulated: MIX power at 5 % 96.0 to 96.8 %).  Below 10 usable comparisons all get the plain prior.
    """
    rows = np.broadcast_arrays(variances, dfs, scatters, weights)
    v, df, scatter, weight = (np.asarray(x, dtype=np.float64) for x in rows)
    usable = np.isfinite(v) & (v >= 0) & np.isfinite(df) & (df >= 1) & np.isfinite(scatter) & (scatter >= 0)
    plain = fit_prior(v, df, default=default, cap=cap, weights=weight)
    if weight[usable].sum() < _ENOUGH_FOR_TREND:
        return [plain] * v.size
    shown = np.maximum(scatter, FLOOR_SD) ** 2 / (np.maximum(scatter[usable], FLOOR_SD) ** 2).mean()
    fits = [_fit(v[usable], df[usable], weight[usable], shown[usable], tenth / 10, default) for tenth in range(10)]
    best = max(fits, key=lambda fit: fit.likelihood)
    return [best.prior(float(x), cap) if ok else plain for x, ok in zip(shown, usable, strict=True)]


_DEFAULT_WEIGHT: Final = 4.0
_ENOUGH_FOR_TREND: Final = 10


@dataclass(frozen=True, slots=True)
class _Fit:
    """Noise of a suite: variance = (1 - weight + weight * shown) * exp(centre), where the first part varies."""

    weight: float
    centre: float
    spread: float
    """Variance between comparisons of the logarithm of the part that the rounds do not show."""
    doubt: float
    """Variance of the centre's error."""
    likelihood: float

    def prior(self, shown: float, cap: float) -> Prior:
        shape = 1 - self.weight + self.weight * shown
        share = (1 - self.weight) / shape
        d0 = min(2 * _trigamma_inverse(share**2 * self.spread + self.doubt), cap)
        return Prior(variance=shape * math.exp(self.centre + _log_bias(d0)), df=d0)


def _fit(
    v: NDArray[np.float64],
    df: NDArray[np.float64],
    independent: NDArray[np.float64],
    shown: NDArray[np.float64],
    weight: float,
    default: Prior,
) -> _Fit:
    shape = 1 - weight + weight * shown
    share = (1 - weight) / shape
    log_v = np.log(np.maximum(v, FLOOR_SD**2)) - (digamma(df / 2) - np.log(df / 2)) - np.log(shape)
    sampling = polygamma(1, df / 2)
    doubt = float(polygamma(1, default.df / 2)) / 2
    spread, n = doubt, float(independent.sum())
    for _ in range(4):  # centre and spread need each other; four rounds settle both to less than their error
        weights = independent / (share**2 * spread + sampling)
        precision = 1 / doubt + float(weights.sum())
        shipped = math.log(default.variance) - _log_bias(default.df) - float(np.log(shape).mean())
        centre = (shipped / doubt + float((weights * log_v).sum())) / precision
        own = float((weights * log_v).sum() / weights.sum())
        freedom = max(n - 1, 0.0) / n
        excess = float((independent * share**2 * ((log_v - own) ** 2 - freedom * sampling)).sum())
        information = float((independent * share**4).sum()) * freedom
        spread = max((excess + _DEFAULT_WEIGHT * doubt) / (information + _DEFAULT_WEIGHT), 0.0)
    total = share**2 * spread + sampling
    likelihood = -0.5 * float((independent * ((log_v - own) ** 2 / total + np.log(total))).sum())
    return _Fit(weight=weight, centre=centre, spread=spread, doubt=1 / precision, likelihood=likelihood)


def independence(levels: Sequence[NDArray[np.float64]]) -> float:
    """Return how much of an independent witness each of the comparisons of one engine is, by how they move together.

    `levels` holds the launch levels of each, launch by launch.  Logarithms of two sample variances correlate by the square
    of the samples' correlation, so n comparisons know as much as n / (1 + (n-1)·r²) independent ones; r² is the mean over
    pairs, less what independent samples of so few launches would show.  1 for fewer than two comparisons.
    """
    shortest = min((x.size for x in levels), default=0)
    varying = [x[-shortest:] for x in levels if shortest > 2 and np.ptp(x[-shortest:]) > 0]
    n = len(levels)
    if n < 2 or len(varying) < 2:
        return 1.0 if n < 2 else 1 / n
    squares = np.corrcoef(varying) ** 2
    pairs = len(varying) * (len(varying) - 1)
    mean = float(squares.sum() - len(varying)) / pairs
    by_chance = 1 / (shortest - 1)
    return 1 / (1 + (n - 1) * max((mean - by_chance) / (1 - by_chance), 0.0))


def _log_bias(df: float) -> float:
    """Return E[ln(chi2/df)]: the log of a sample variance is too low by this on average."""
    return float(digamma(df / 2)) - math.log(df / 2)


def _trigamma_inverse(x: float) -> float:
    y = 0.5 + 1 / x
    for _ in range(50):  # Newton on 1/trigamma, convex and nearly linear: always converges (limma's trigammaInverse)
        tri = float(polygamma(1, y))
        step = tri * (1 - tri / x) / float(polygamma(2, y))
        y += step
        if -step / y < 1e-8:
            break
    return y


# --- ratios and quantiles ------------------------------------------------------------------------------------------
def decide(baseline: ArrayLike, candidate: ArrayLike, *, design: Design, prior: Prior, drift: Drift | None = None) -> Decision:
    """Return the verdict on launch levels (log-percent, + worse) of a ratio or quantile metric.

    Pass: the upper bound of the slow-down is below the tolerance (possible after one launch).  Regressed: the slow-down
    is significant, the estimate and the lower median of the candidate launches are at least half the tolerance, and
    there are two launches or more.  Pass is asked first, so a proven small slow-down passes.  Improved is a pass with
    the mirror image of a regression; it fails nothing, so one launch may show it.  `drift`, where it is known, widens the
    bounds by what one job says less than several.  Raises `UnusableSampleError`.
    """
    b, c = sample(baseline, "baseline"), sample(candidate, "candidate")
    ss_b, df_b = within_jobs(b, drift.jobs if drift else None)
    ss = ss_b + float(((c - c.mean()) ** 2).sum())
    se, df = standard_error(ss, df_b + c.size - 1, prior=prior, sizes=(b.size, c.size), drift=drift)
    ordered = np.sort(c) - b.mean()
    typical = float(ordered[(c.size - 1) // 2]), float(ordered[c.size // 2])
    return _verdict(float(c.mean() - b.mean()), se, df, typical, look=c.size, design=design)


def within_jobs(levels: NDArray[np.float64], jobs: Sequence[str] | None) -> tuple[float, int]:
    """Return sum of squares and degrees of freedom of launch levels around their job's mean; None takes all as one job."""
    groups = [levels] if jobs is None else [levels[[one == job for one in jobs]] for job in dict.fromkeys(jobs)]
    return sum(float(((x - x.mean()) ** 2).sum()) for x in groups), levels.size - len(groups)


def standard_error(
    ss: float, df: int, *, prior: Prior, sizes: tuple[int, int], drift: Drift | None = None
) -> tuple[float, float]:
    """Return se and degrees of freedom of mean(candidate) - mean(baseline), for `sizes` = (baseline, candidate) launches.

    `ss` and `df` are those of launches within their jobs; the prior is worth `prior.df` more.  A drift adds the variance
    of one job against the baseline's, known to the baseline's number of jobs less one (Satterthwaite 1946).
    """
    freedom = df + prior.df
    launch = max((prior.df * prior.variance + ss) / freedom, FLOOR_SD**2)
    b, c = sizes
    variance = launch * (1 / b + 1 / c)
    if drift is None or not drift.share:
        return math.sqrt(variance), freedom
    repeated = sum(drift.jobs.count(job) ** 2 for job in set(drift.jobs)) / b**2
    between, jobs = launch * drift.share * (1 + repeated), len(set(drift.jobs))
    total = variance + between
    return math.sqrt(total), total**2 / (variance**2 / freedom + between**2 / max(jobs - 1, 1))


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
    return "inconclusive", f"neither bound decides after {look} launches"


def t_critical(tail: float, df: float) -> float:
    """Return the one-sided critical value of Student's t."""
    return -float(stdtrit(df, tail))
