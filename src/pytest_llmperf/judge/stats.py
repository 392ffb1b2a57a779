"""Judge launches against launches: is this metric worse than the baseline, or must another launch tell?

One launch (an engine start) gives one number per metric, its *level*: the median of its rounds as 100·ln, so that +5 reads
"about 5 % worse".  Levels are compared by a moderated t-test (Smyth 2004, limma) that is repeated after each launch and may
stop early.  Rounds, requests and tokens are never the sample: they share their launch, and pooling them makes nearly every
clean suite red.  Pure functions; undecidable data is "inconclusive", unusable data raises `UnusableSample`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
from scipy.special import digamma, polygamma, stdtr, stdtrit
from scipy.stats import binomtest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

Outcome = Literal["pass", "improved", "regressed", "inconclusive", "more"]

FLOOR_SD: Final = 0.1
"""Smallest believable sd of a launch level, in log-percent: no clock or GPU repeats an engine start better than 0.1 %.
It keeps a baseline of equal values (a simulated engine, a coarse clock) from turning any difference into certainty."""


class UnusableSample(ValueError):
    """A sample holds nothing that can be compared: empty, not finite, or not positive where a logarithm is needed."""


@dataclass(frozen=True, slots=True)
class Prior:
    """What is believed of a launch level's noise before its own launches are seen (Smyth's s0² and d0)."""

    variance: float
    """s0², squared log-percent."""
    df: float
    """d0: how many degrees of freedom the belief is worth."""


PRIORS: Final = {"ratio": Prior(4.0, 4.0), "quantile": Prior(9.0, 4.0)}
"""Shipped beliefs by metric class, for suites too small to tell: sd 2 % and 3 %, worth 4 launches.  Real launches have
0.2 % (a 7B model on an H200) to 4 % (a tiny model on shared CPUs); 4 degrees of freedom spread the sd over about that range."""

COUNT_PRIOR: Final = Prior(2.0, 4.0)
"""Belief on the dispersion of counts, as a multiple of Poisson's variance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """What was fixed before the first launch.  The error promises hold only if none of it depends on what was measured."""

    tolerance: float = 0.05
    """The slow-down that must not pass, as a fraction."""
    alpha: float = 0.01
    """Probability that a suite run with nothing slower has any false regression."""
    beta: float = 0.05
    """Probability that a comparison slower by exactly the tolerance passes."""
    comparisons: int = 1
    """Gating comparisons in the suite run, over which alpha is split."""
    launches: int = 8
    """Most candidate launches that may be asked for."""
    suite_share: float = 0.1
    """Part of alpha kept for the one comparison of the whole suite (`decide_suite`)."""

    def __post_init__(self) -> None:
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

        The looks k = 2..K share alpha/m by weights 3^k: most is kept for the last look, where the estimate is best.  The sum
        over looks and comparisons bounds the suite's error under any dependence between metrics and any stopping.
        """
        last = max(self.launches, 2)
        look = min(max(look, 2), last)
        weight = 3.0**look / sum(3.0**k for k in range(2, last + 1))
        return self.alpha * (1 - self.suite_share) / self.comparisons * weight

    def beta_at(self, look: int) -> float:
        """Return the error allowed to a pass after `look` candidate launches: equal shares."""
        return self.beta / self.launches


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What the launches so far say about one comparison.  Differences are in log-percent, + is worse."""

    outcome: Outcome
    """"more" asks for one more launch of both the same kind; "inconclusive" is the same with the budget spent."""
    rule: str
    """Why, in a few words."""
    launches: int
    """Candidate launches used."""
    estimate: float
    lower: float
    """One-sided lower bound at the level a regression needs at this look; -inf where none can be given."""
    upper: float
    """One-sided upper bound at the level a pass needs at this look; inf where none can be given."""
    p: float | None = None
    """One-sided p-value of "not slower"; None where no test was made (exact class)."""
    se: float | None = None
    df: float | None = None


# ------------------------------------------------------------------------------------------------ from rounds to levels
def launch_medians(rounds: Sequence[Sequence[float]], *, higher_is_better: bool) -> NDArray[np.float64]:
    """Return one level per launch: the median of 100·ln of its rounds, negated when higher is better, so + is worse.

    `rounds` holds one sequence of rounds per launch; lengths may differ.  Medians are taken after the logarithm, so that a
    metric and its reciprocal agree for even numbers of rounds too.  Raises `UnusableSample` for no launch, an empty launch
    or a value that is not positive and finite.
    """
    sign = -1.0 if higher_is_better else 1.0
    if not len(rounds):
        raise UnusableSample("There is no launch to compare.")
    return np.array([sign * float(np.median(_log_percent(values, launch))) for launch, values in enumerate(rounds, 1)])


def _log_percent(values: Sequence[float], launch: int) -> NDArray[np.float64]:
    x = np.asarray(values, dtype=np.float64)
    if not x.size:
        raise UnusableSample(f"Launch {launch} has no rounds.")
    bad = ~(np.isfinite(x) & (x > 0))
    if bad.any():
        first = int(np.argmax(bad))
        raise UnusableSample(f"Launch {launch}, round {first + 1} is {x[first]!r}; a ratio needs positive, finite values.")
    return 100 * np.log(x)


def _sample(values: ArrayLike, what: str) -> NDArray[np.float64]:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not x.size:
        raise UnusableSample(f"The {what} has no launches.")
    if not np.isfinite(x).all():
        raise UnusableSample(f"The {what} holds a value that is not finite: {x[~np.isfinite(x)][0]!r}.")
    return x


def _ss(x: NDArray[np.float64]) -> float:
    return float(((x - x.mean()) ** 2).sum())


# ------------------------------------------------------------------------------------------------------------ the prior
def fit_prior(variances: ArrayLike, dfs: ArrayLike, *, default: Prior = PRIORS["ratio"], cap: float = 50.0) -> Prior:
    """Return the noise prior that the suite's own variances support (limma's squeezeVar; Smyth 2004, section 6.2).

    `variances` are the baselines' variances between launches (squared log-percent), `dfs` their degrees of freedom; entries
    with df < 1 or without a finite variance are left out.  Unlike limma the default counts as evidence too, so that one or
    two comparisons move it a little and forty replace it: half of its spread is taken as doubt about the centre, half as the
    spread between comparisons (worth `_DEFAULT_WEIGHT` comparisons).  With nothing usable the default is returned.
    """
    v, df = np.broadcast_arrays(np.asarray(variances, dtype=np.float64), np.asarray(dfs, dtype=np.float64))
    usable = np.isfinite(v) & (v >= 0) & np.isfinite(df) & (df >= 1)
    v, df = np.maximum(v[usable], FLOOR_SD**2), df[usable]
    if not v.size:
        return default
    log_v = np.log(v) - digamma(df / 2) + np.log(df / 2)
    doubt = float(polygamma(1, default.df / 2)) / 2
    sampling = polygamma(1, df / 2)
    excess = float(((log_v - log_v.mean()) ** 2).sum() - (v.size - 1) * sampling.mean())
    spread = max((excess + _DEFAULT_WEIGHT * doubt) / (v.size - 1 + _DEFAULT_WEIGHT), 0.0)
    weights = 1 / (spread + sampling)
    precision = 1 / doubt + float(weights.sum())
    centre = (_centre(default) / doubt + float((weights * log_v).sum())) / precision
    d0 = min(2 * _trigamma_inverse(spread + 1 / precision), cap)
    return Prior(variance=math.exp(centre + float(digamma(d0 / 2)) - math.log(d0 / 2)), df=d0)


_DEFAULT_WEIGHT: Final = 4.0


def _centre(prior: Prior) -> float:
    return math.log(prior.variance) - float(digamma(prior.df / 2)) + math.log(prior.df / 2)


def _trigamma_inverse(x: float) -> float:
    y = 0.5 + 1 / x
    for _ in range(50):  # Newton on 1/trigamma, which is convex and nearly linear: always converges (limma's trigammaInverse)
        tri = float(polygamma(1, y))
        step = tri * (1 - tri / x) / float(polygamma(2, y))
        y += step
        if -step / y < 1e-8:
            break
    return y


# ------------------------------------------------------------------------------------------------- ratios and quantiles
def decide(baseline: ArrayLike, candidate: ArrayLike, *, design: Design, prior: Prior) -> Decision:
    """Return the verdict on launch levels (log-percent, + worse) of a ratio or quantile metric.

    Pass: the upper bound of the slow-down is below the tolerance (possible after one launch).  Regressed: the slow-down is
    significant, the estimate and the lower median of the candidate launches are at least half the tolerance, and there are
    two launches or more.  Pass is asked first, so a proven small slow-down passes.  Raises `UnusableSample`.
    """
    b, c = _sample(baseline, "baseline"), _sample(candidate, "candidate")
    df = b.size + c.size - 2 + prior.df
    variance = max((prior.df * prior.variance + _ss(b) + _ss(c)) / df, FLOOR_SD**2)
    se = math.sqrt(variance * (1 / b.size + 1 / c.size))
    ordered = np.sort(c) - b.mean()
    typical = float(ordered[(c.size - 1) // 2]), float(ordered[c.size // 2])
    return _verdict(float(c.mean() - b.mean()), se, df, typical, look=c.size, design=design)


def _verdict(d: float, se: float, df: float, typical: tuple[float, float], *, look: int, design: Design) -> Decision:
    """`typical` are the lower and upper median of the candidate launches: one bad launch of two must not fail a build."""
    half = design.margin / 2
    lower = d - _t(design.alpha_at(look), df) * se
    upper = d + _t(design.beta_at(look), df) * se
    better = d + _t(design.alpha_at(look), df) * se < 0 and max(d, typical[1]) <= -half
    outcome: Outcome
    if upper < design.margin:
        outcome, rule = ("improved", "proven faster") if better else ("pass", "upper bound below the tolerance")
    elif lower > 0 and min(d, typical[0]) >= half and look >= 2:
        outcome, rule = "regressed", "proven slower, by half the tolerance or more"
    else:
        outcome, rule = _undecided(look, design)
    p = float(stdtr(df, -d / se))
    return Decision(outcome=outcome, rule=rule, launches=look, estimate=d, lower=lower, upper=upper, p=p, se=se, df=df)


def _undecided(look: int, design: Design) -> tuple[Outcome, str]:
    if look < design.launches:
        return "more", "neither bound decides yet"
    return "inconclusive", f"neither bound decides after {look} launches"


def _t(tail: float, df: float) -> float:
    """Return the one-sided critical value of Student's t."""
    return -float(stdtrit(df, tail))


def minimum_detectable_effect(sd: float, baseline_launches: int, *, design: Design, df: float | None = None) -> float:
    """Return the slow-down in percent that is found with probability 95 % when all K launches are spent.

    `sd` is that of a launch level in log-percent; `df` its degrees of freedom (default: those of both samples alone).
    Print it before spending GPU time: a tolerance below it will mostly end inconclusive.
    """
    k = max(design.launches, 2)
    freedom = max(baseline_launches + k - 2 if df is None else df, 1)
    quantiles = _t(design.alpha_at(k), freedom) + _t(0.05, freedom)
    return 100 * math.expm1(quantiles * sd * math.sqrt(1 / baseline_launches + 1 / k) / 100)


# --------------------------------------------------------------------------------------------------------------- counts
@dataclass(frozen=True, slots=True)
class Counts:
    """Events of the launches of one side: preemptions, failed or truncated requests.  Raises `UnusableSample`."""

    events: tuple[int, ...]
    """Per launch, the sum over its rounds."""
    rounds: tuple[int, ...]
    """Per launch, how many rounds that were."""

    def __post_init__(self) -> None:
        if not self.events or len(self.events) != len(self.rounds):
            raise UnusableSample(f"{len(self.events)} launches have counts, {len(self.rounds)} a number of rounds.")
        if any(not math.isfinite(x) or x < 0 or x != int(x) for x in self.events) or any(not n >= 1 for n in self.rounds):
            raise UnusableSample(f"Counts are whole numbers from 0 over one round or more, not {self.events} in {self.rounds}.")

    @property
    def rate(self) -> float:
        """Events per round."""
        return sum(self.events) / sum(self.rounds)

    @property
    def repeats(self) -> bool:
        """Whether each of at least two launches had exactly the same rate."""
        x, n = self.events, self.rounds
        return len(x) > 1 and all(x[0] * n[i] == x[i] * n[0] for i in range(len(x)))

    @property
    def coincidence(self) -> float:
        """How probable it is, at most, that random launches repeat so exactly: the peak of Poisson's density, per repetition."""
        per_launch = max(sum(self.events) / len(self.events), 1 / (2 * math.pi))
        return (2 * math.pi * per_launch) ** (-(len(self.events) - 1) / 2)

    def level(self) -> tuple[float, float]:
        """Return mean and weighted sum of squares of 2·sqrt(rate), of variance 1/rounds if Poisson (Anscombe 1948)."""
        n = np.array(self.rounds, dtype=np.float64)
        y = 2 * np.sqrt((np.array(self.events) + 3 / 8) / n)
        mean = float((n * y).sum() / n.sum())
        return mean, float((n * (y - mean) ** 2).sum())


def decide_count(baseline: Counts, candidate: Counts, *, design: Design, absolute: float = 1.0) -> Decision:
    """Return the verdict on counts; the limit is `design.tolerance` above the baseline's rate plus `absolute` events a round.

    Regressed takes *two* tests at the same level: the exact Poisson test on totals is blind to launches that differ, the
    t-test between launches to how few the events were; either alone alarms for nothing.  Counts that repeat exactly on both
    sides are deterministic and need no t-test: that random launches repeat so is itself improbable, and independent of how
    far apart the sides are, so that probability multiplies the Poisson test's.  Estimate and bounds are log-percent.
    """
    look, limit = len(candidate.events), baseline.rate * (1 + design.tolerance) + absolute
    repeats = baseline.repeats and (look == 1 or candidate.repeats)
    (base, ss_b), (new, ss_c) = baseline.level(), candidate.level()
    d, df = new - base, len(baseline.events) + look - 2
    scale = math.sqrt(1 / sum(baseline.rounds) + 1 / sum(candidate.rounds))
    # Poisson's variance, 1, is the least that counts which do not repeat can have.
    dispersion = max((COUNT_PRIOR.df * COUNT_PRIOR.variance + ss_b + ss_c) / (COUNT_PRIOR.df + df), 1.0)
    reach = 0.0 if repeats else _t(design.beta_at(look), COUNT_PRIOR.df + df) * math.sqrt(dispersion) * scale
    p, p_fewer = (_count_p(baseline, candidate, sign * d / scale, ss_b + ss_c, sign) for sign in (1, -1))
    inside = candidate.rate <= limit if repeats else ((base + d + reach) / 2) ** 2 < limit
    outcome: Outcome
    if inside:
        fewer = p_fewer < design.alpha_at(look) and look >= 2
        outcome, rule = ("improved", "proven fewer") if fewer else ("pass", "upper bound below the limit")
    elif p < design.alpha_at(look) and look >= 2 and candidate.rate - baseline.rate > (limit - baseline.rate) / 2:
        outcome, rule = "regressed", "more events, by totals and by launches"
    else:
        outcome, rule = _undecided(look, design)
    low, mid, high = (200 * math.log(max(base + x, 1e-9) / base) for x in (d - reach, d, d + reach))
    return Decision(outcome=outcome, rule=rule, launches=look, estimate=mid, lower=low, upper=high, p=p, df=df)


def _count_p(baseline: Counts, candidate: Counts, contrast: float, ss: float, sign: int) -> float:
    """Return the p-value of "not more" (sign 1) or "not fewer" (-1); `contrast` is the difference at unit dispersion."""
    total = sum(baseline.events) + sum(candidate.events)
    if not total:
        return 1.0
    share = sum(candidate.rounds) / (sum(baseline.rounds) + sum(candidate.rounds))
    poisson = binomtest(sum(candidate.events), total, share, alternative="greater" if sign > 0 else "less").pvalue
    if contrast > 0 and baseline.repeats and candidate.repeats:
        return float(poisson * baseline.coincidence * candidate.coincidence)
    df = len(baseline.events) + len(candidate.events) - 2
    between = float(stdtr(df, -contrast / math.sqrt(max(ss / df, 1.0)))) if df else 1.0
    return max(float(poisson), between)


# ---------------------------------------------------------------------------------------------------------- exact class
def decide_exact(
    baseline: ArrayLike,
    candidate: ArrayLike,
    *,
    design: Design,
    higher_is_better: bool = False,
    rel: float = 0.005,
    absolute: float = 0.0,
) -> Decision:
    """Return the verdict on values (natural units, one per launch) that hardly vary: weight memory, KV-cache blocks.

    The allowance is the largest of `rel` x median, `absolute` and 4 x the range of the baseline.  Pass: the worse half of
    the candidate launches is inside it.  Regressed: two launches or more, and the better half is outside on the worse side.
    Spends no alpha: use it only where the range between baseline launches is below a quarter of the tolerance
    (`is_exact`).  `lower` and `upper` are the extreme launches.  Raises `UnusableSample`.
    """
    b, c = _sample(baseline, "baseline"), _sample(candidate, "candidate")
    sign, centre, look = (-1.0 if higher_is_better else 1.0), float(np.median(b)), c.size
    allowance = max(rel * abs(centre), absolute, 4 * float(np.ptp(b)))
    worse = np.sort(sign * (c - centre))
    best_half, worst_half = float(worse[(look - 1) // 2]), float(worse[look // 2])
    outcome: Outcome
    if worst_half <= allowance:
        fewer = look >= 2 and worst_half < -allowance
        outcome, rule = ("improved", "better in two launches") if fewer else ("pass", "within the allowance of an exact metric")
    elif look >= 2 and best_half > allowance:
        outcome, rule = "regressed", "outside the allowance of an exact metric in two launches"
    else:
        outcome, rule = _undecided(look, design)
    scale = 100 / abs(centre) if centre else math.inf
    low, mid, high = (_log_of(x * scale if x else 0.0) for x in (float(worse[0]), float(np.median(worse)), float(worse[-1])))
    return Decision(outcome=outcome, rule=rule, launches=look, estimate=mid, lower=low, upper=high)


def _log_of(percent: float) -> float:
    return 100 * math.log1p(percent / 100) if percent > -100 else -math.inf


def is_exact(baseline: ArrayLike, *, tolerance: float) -> bool:
    """Return whether values repeat well enough for `decide_exact`: two launches or more within a quarter of the tolerance."""
    b = _sample(baseline, "baseline")
    return b.size > 1 and float(np.ptp(b)) <= tolerance / 4 * abs(float(np.median(b)))


# ------------------------------------------------------------------------------------------------------ the whole suite
def decide_suite(engines: Sequence[tuple[ArrayLike, ArrayLike]], *, design: Design, prior: Prior, least: float = 1.0) -> Decision:
    """Return the verdict on the mean of all comparisons: it sees 1.5 % on everything, which no single comparison can prove.

    Each engine gives the levels of its comparisons as (comparisons, B) and (comparisons, k) arrays.  Comparisons of one
    engine share its launches, so an engine counts with the mean over its comparisons as *one* comparison of levels; only
    engines are taken as independent (a host that is slow today is not seen).  Regressed: significant at alpha x suite_share,
    at least `least` log-percent, two candidate launches or more.  Never "more": call it once, when every comparison ended.
    """
    if not engines:
        raise UnusableSample("There is no engine to compare.")
    d = variance = squares = 0.0
    pairs = [(np.atleast_2d(np.asarray(b, np.float64)), np.atleast_2d(np.asarray(c, np.float64))) for b, c in engines]
    total, look = sum(len(b) for b, _ in pairs), sum(c.shape[1] for _, c in pairs)
    for rows_b, rows_c in pairs:
        b, c = _sample(rows_b.mean(axis=0), "baseline"), _sample(rows_c.mean(axis=0), "candidate")
        df = b.size + c.size - 2 + prior.df
        s2 = max((prior.df * prior.variance + _ss(b) + _ss(c)) / df, FLOOR_SD**2)
        part = (len(rows_b) / total) ** 2 * s2 * (1 / b.size + 1 / c.size)
        d += len(rows_b) / total * float(c.mean() - b.mean())
        variance, squares = variance + part, squares + part**2 / df
    se, df = math.sqrt(variance), variance**2 / squares  # Welch-Satterthwaite
    reach = _t(design.alpha * max(design.suite_share, 1e-12), df) * se
    outcome: Outcome = "pass"
    if d - reach > 0 and d >= least and look >= 2:
        outcome = "regressed"
    elif d + reach < 0 and d <= -least and look >= 2:
        outcome = "improved"
    rule = "mean of all comparisons"
    p = float(stdtr(df, -d / se))
    return Decision(outcome=outcome, rule=rule, launches=look, estimate=d, lower=d - reach, upper=d + reach, p=p, se=se, df=df)
