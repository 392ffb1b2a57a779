"""The noise to expect of a comparison, from all baselines of its suite: an empirical-Bayes fit (Smyth 2004, limma)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from scipy.special import digamma, polygamma

from pytest_llmperf.judge.maths.stats import FLOOR_SD, PRIORS, Prior

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray


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


@dataclass(frozen=True, slots=True)
class Trend:
    """What a suite tells of the noise of any comparison, be it one of those that it was fitted to or not."""

    plain: Prior
    fit: _Fit | None = None
    mean_square: float = 1.0
    """Mean square of the fitted comparisons' scatter."""
    cap: float = 50.0

    def prior(self, variance: float, df: float, scatter: float) -> Prior:
        """Return the prior of a comparison with this variance between its launches, and this scatter of their rounds."""
        usable = np.isfinite(variance) and variance >= 0 and np.isfinite(df) and df >= 1 and np.isfinite(scatter) and scatter >= 0
        if self.fit is None or not usable:
            return self.plain
        return self.fit.prior(max(scatter, FLOOR_SD) ** 2 / self.mean_square, self.cap)


def fit_priors(
    variances: ArrayLike,
    dfs: ArrayLike,
    scatters: ArrayLike,
    *,
    default: Prior = PRIORS["ratio"],
    cap: float = 50.0,
    weights: ArrayLike = 1.0,
) -> list[Prior]:
    """Return one prior per comparison: `fit_trend` at its own place."""
    trend = fit_trend(variances, dfs, scatters, default=default, cap=cap, weights=weights)
    rows = np.broadcast_arrays(variances, dfs, scatters)
    return [trend.prior(*map(float, row)) for row in zip(*(x.ravel() for x in rows), strict=True)]


def fit_trend(
    variances: ArrayLike,
    dfs: ArrayLike,
    scatters: ArrayLike,
    *,
    default: Prior = PRIORS["ratio"],
    cap: float = 50.0,
    weights: ArrayLike = 1.0,
) -> Trend:
    """Return the noise that a suite leads to expect: `fit_prior` that also knows each comparison's `round_scatter`.

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
        return Trend(plain)
    mean_square = float((np.maximum(scatter[usable], FLOOR_SD) ** 2).mean())
    shown = np.maximum(scatter, FLOOR_SD) ** 2 / mean_square
    fits = [_fit(v[usable], df[usable], weight[usable], shown[usable], tenth / 10, default) for tenth in range(10)]
    return Trend(plain, max(fits, key=lambda fit: fit.likelihood), mean_square, cap)


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


def independence(levels: Sequence[NDArray[np.float64]], df: int) -> float:
    """Return how much of an independent witness each of the comparisons of one engine is, by how they move together.

    `levels` holds the launch levels of each, launch by launch, `df` their degrees of freedom.  Logarithms of two sample
    variances correlate by the square of the samples' correlation, so n comparisons know as much as n / (1 + (n-1)·r²)
    independent ones; r² is the mean over pairs, less what independent samples of so few launches show by chance.
    """
    shortest = min((x.size for x in levels), default=0)
    varying = [x[-shortest:] for x in levels if shortest > 2 and np.ptp(x[-shortest:]) > 1e-9]
    n = len(levels)
    if n < 2 or len(varying) < 2 or df < 2:
        return 1.0 if n < 2 else 1 / n
    squares = np.corrcoef(varying) ** 2
    pairs = len(varying) * (len(varying) - 1)
    mean = float(squares.sum() - len(varying)) / pairs
    by_chance = 1 / df
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
