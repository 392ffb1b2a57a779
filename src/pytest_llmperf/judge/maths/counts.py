"""Judge what is counted or does not vary: preemptions, failed requests, weight memory, KV-cache blocks.

Counts need launches *and* events enough: an exact Poisson test and a t-test between launches must agree.  Values that
repeat exactly need neither, only two launches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from scipy.special import bdtr, bdtrc, stdtr

from pytest_llmperf.judge.maths.stats import Decision, Design, Outcome, Prior, UnusableSampleError, sample, t_critical, undecided

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

COUNT_PRIOR: Final = Prior(2.0, 4.0)
"""Belief on the dispersion of counts, as a multiple of Poisson's variance.  Used only to let counts pass."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Events of the launches of one side: preemptions, failed or truncated requests.  Raises `UnusableSampleError`."""

    events: tuple[int, ...]
    """Per launch, the sum over its rounds."""
    rounds: tuple[int, ...]
    """Per launch, how many rounds that were."""

    def __post_init__(self) -> None:
        """Raise UnusableSampleError where the counts are none."""
        if not self.events or len(self.events) != len(self.rounds):
            raise UnusableSampleError(f"{len(self.events)} launches have counts, {len(self.rounds)} a number of rounds.")
        counted = all(0 <= x < 2**53 and x == int(x) for x in self.events)  # beyond, a float is no count any more
        if not counted or not all(1 <= n < math.inf for n in self.rounds):
            raise UnusableSampleError(f"Counts are whole numbers over one round or more, not {self.events} in {self.rounds}.")

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
        """How probable it is, at most, that random launches repeat so exactly: the peak of Poisson's law for each."""
        per_launch = max(sum(self.events) / len(self.events), 1 / (2 * math.pi))
        return math.pow(2 * math.pi * per_launch, -(len(self.events) - 1) / 2)

    def level(self) -> tuple[float, float]:
        """Return mean and weighted sum of squares of 2·sqrt(rate), of variance 1/rounds if Poisson (Anscombe 1948)."""
        n = np.array(self.rounds, dtype=np.float64)
        y = 2 * np.sqrt((np.array(self.events) + 3 / 8) / n)
        mean = float((n * y).sum() / n.sum())
        return mean, float((n * (y - mean) ** 2).sum())


def decide_count(
    baseline: Counts, candidate: Counts, *, design: Design, tolerance: float = 0.5, absolute: float = 1.0
) -> Decision:
    """Return the verdict on counts; the limit is the baseline's rate x (1 + tolerance) + `absolute` events a round.

    The design's tolerance is for ratios: 5 % of a few random events is beyond any budget, so counts have their own.

    Regressed takes *two* tests at the same level: the exact Poisson test on totals is blind to launches that differ,
    the t-test between launches to how few the events were; either alone alarms for nothing.  Counts that repeat exactly
    on both sides are deterministic and need no t-test: that random launches repeat so is itself improbable, and
    independent of how far apart the sides are, so that probability multiplies the Poisson test's.  One launch never
    fails.  Fewer is improved.  Estimate and bounds are log-percent, finite even from a baseline of none.
    """
    look, limit = len(candidate.events), baseline.rate * (1 + tolerance) + absolute
    repeats = baseline.repeats and (look == 1 or candidate.repeats)
    (base, ss_b), (new, ss_c) = baseline.level(), candidate.level()
    d, df = new - base, len(baseline.events) + look - 2
    scale = math.sqrt(1 / sum(baseline.rounds) + 1 / sum(candidate.rounds))
    # Poisson's variance, 1, is the least that counts which do not repeat can have.
    dispersion = max((COUNT_PRIOR.df * COUNT_PRIOR.variance + ss_b + ss_c) / (COUNT_PRIOR.df + df), 1.0)
    margin = 0.0 if repeats else t_critical(design.beta_at(look), COUNT_PRIOR.df + df) * math.sqrt(dispersion) * scale
    p, p_fewer = (_count_p(baseline, candidate, sign * d / scale, ss_b + ss_c, sign) for sign in (1, -1))
    inside = candidate.rate <= limit if repeats else ((base + d + margin) / 2) ** 2 < limit
    outcome: Outcome
    if inside:
        fewer = p_fewer < design.alpha_at(look)
        outcome, rule = ("improved", "proven fewer") if fewer else ("pass", "upper bound below the limit")
    elif p < design.alpha_at(look) and look >= 2 and candidate.rate - baseline.rate > (limit - baseline.rate) / 2:
        outcome, rule = "regressed", "more events, by totals and by launches"
    else:
        outcome, rule = undecided(look, design)
    low, mid, high = (200 * math.log(max(base + x, 1e-9) / base) for x in (d - margin, d, d + margin))
    return Decision(outcome=outcome, rule=rule, launches=look, estimate=mid, lower=low, upper=high, p=p, df=df)


def _count_p(baseline: Counts, candidate: Counts, contrast: float, ss: float, sign: int) -> float:
    # Sign 1 asks "more?", -1 "fewer?"; `contrast` is the difference over its standard error at unit dispersion.
    total = sum(baseline.events) + sum(candidate.events)
    if not total:
        return 1.0
    share = sum(candidate.rounds) / (sum(baseline.rounds) + sum(candidate.rounds))
    events = sum(candidate.events)
    # The binomial tail directly: scipy.stats.binomtest gives the same, but importing scipy.stats takes a second.
    poisson = bdtrc(events - 1, total, share) if sign > 0 else bdtr(events, total, share)
    if contrast > 0 and baseline.repeats and (candidate.repeats or len(candidate.events) == 1):
        return float(poisson * baseline.coincidence * candidate.coincidence)
    df = len(baseline.events) + len(candidate.events) - 2
    between = float(stdtr(df, -contrast / math.sqrt(max(ss / df, 1.0)))) if df else 1.0
    return max(float(poisson), between)


# --- exact class ---------------------------------------------------------------------------------------------------
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

    The allowance is the largest of `rel` x median, `absolute` and 4 x the range of the baseline.  Pass: the upper
    median of the candidate launches is inside it.  Regressed: two launches or more, and their lower median is outside
    (so both of two, two of three).  Spends no alpha: use it only where `is_exact`.  `lower` and `upper` are the
    extreme launches in log-percent of the baseline's median.  Raises `UnusableSampleError`.
    """
    b, c = sample(baseline, "baseline"), sample(candidate, "candidate")
    sign, centre, look = (-1.0 if higher_is_better else 1.0), float(np.median(b)), c.size
    allowance = max(rel * abs(centre), absolute, 4 * float(np.ptp(b)))
    worse = np.sort(sign * (c - centre))
    low_median, high_median = float(worse[(look - 1) // 2]), float(worse[look // 2])
    outcome: Outcome
    if high_median < -allowance:
        outcome, rule = "improved", "better by more than the allowance of an exact metric"
    elif high_median <= allowance:
        outcome, rule = "pass", "within the allowance of an exact metric"
    elif look >= 2 and low_median > allowance:
        outcome, rule = "regressed", "outside the allowance of an exact metric in two launches"
    else:
        outcome, rule = undecided(look, design)
    low, mid, high = (_log_percent(x, abs(centre)) for x in (float(worse[0]), float(np.median(worse)), float(worse[-1])))
    return Decision(outcome=outcome, rule=rule, launches=look, estimate=mid, lower=low, upper=high)


def _log_percent(worse: float, centre: float) -> float:
    if not worse:
        return 0.0
    if worse <= -centre:
        return -math.inf
    return 100 * math.log1p(worse / centre) if centre else math.inf


def is_exact(baseline: ArrayLike, *, tolerance: float) -> bool:
    """Return whether two launches or more lie within a quarter of the tolerance (a fraction): `decide_exact` fits."""
    b = sample(baseline, "baseline")
    return b.size > 1 and float(np.ptp(b)) <= tolerance / 4 * abs(float(np.median(b)))
