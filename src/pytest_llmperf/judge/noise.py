"""How noisy is it: what rounds, launches and jobs (pytest runs) each add, and what the suite's baselines lead to expect."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pytest_llmperf.judge.maths import stats
from pytest_llmperf.judge.maths.prior import Trend, fit_trend, independence
from pytest_llmperf.measure import metrics

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from pytest_llmperf.judge.baseline import Baseline
    from pytest_llmperf.measure.measurement import Launch
    from pytest_llmperf.measure.metrics import Metric

RATIOS = ("ratio", "quantile", "tail")
"""The classes of metric whose launches have levels."""
_JOBS_THAT_TELL = 3
"""With fewer jobs than this nothing can be said of how they differ."""
_SHARED_CORES = stats.Drift(1.0, (), 4)
"""On a host without accelerators, whose cores and caches are other people's too, runs are believed to differ as much as
launches, worth 5 jobs: in 11 jobs over 45 minutes on two cores the ratio of the sds was 0.4 to 1.3 (docs/statistics.md)."""


def drift_on(host: str) -> stats.Drift | None:
    """Return what is believed of the drift between jobs on a kind of host before any job has told; None: nothing."""
    return _SHARED_CORES if host.startswith("cpu-") else None


@dataclass(frozen=True)
class Belief:
    """What is believed of a comparison's noise before this run's launches."""

    prior: stats.Prior
    drift: stats.Drift | None = None


@dataclass(frozen=True)
class Parts:
    """The noise of one metric in its parts, as standard deviations in log-percent."""

    rounds: float
    """Between rounds of a launch."""
    launches: float
    """Between launches of a job, beyond what their rounds explain."""
    jobs: float | None
    """Between jobs, beyond what their launches explain; None with fewer than three jobs, or one launch in each."""
    launch_count: int
    job_count: int


def values(metric: Metric, launches: Iterable[Launch]) -> list[list[float]]:
    """Return a metric's values, one list per launch that it is compared of, without those that could not be measured."""
    return [[value for value in launch.values(metric.name) if value is not None] for launch in alike(metric, launches)]


def alike(metric: Metric, launches: Iterable[Launch]) -> list[Launch]:
    """Return the launches that a metric is compared of: cold starts say nothing of warm ones, nor these of those."""
    return [launch for launch in launches if metric.start is None or launch.is_cold is (metric.start == "cold")]


def levels(metric: Metric, rounds: Sequence[Sequence[float]], scatter: float) -> NDArray[np.float64]:
    """Return launch levels; raises UnusableSampleError."""
    return stats.launch_levels(rounds, higher_is_better=metric.better == "higher", scatter=scatter)


@dataclass(frozen=True)
class _Stored:
    """A comparison's baseline, summarized."""

    key: tuple[str, str]
    kind: str
    levels: NDArray[np.float64]
    scatter: float
    round_sd: float
    """Of rounds that are no strays; `scatter`, from few rounds' distances to their own median, is too small by a quarter."""
    jobs: tuple[str, ...]
    rounds: float
    engine: str = ""
    """Comparisons of one engine share its launches."""
    drift: stats.Drift | None = None
    """What is believed of jobs on its host."""

    @property
    def within(self) -> tuple[float, int]:
        """Return sum of squares and degrees of freedom of launches within their jobs."""
        return stats.within_jobs(self.levels, self.jobs if self.tells_jobs else None)

    @property
    def residuals(self) -> NDArray[np.float64]:
        """Return the launches' levels without what their jobs have in common, where that can be told."""
        jobs = np.array(self.jobs)
        means = [self.levels[jobs == job].mean() if self.tells_jobs else self.levels.mean() for job in self.jobs]
        return self.levels - np.array(means, dtype=np.float64)

    @property
    def tells_jobs(self) -> bool:
        jobs = len(set(self.jobs))
        return jobs >= _JOBS_THAT_TELL and self.levels.size > jobs

    def between(self, variance: float) -> float:
        """Return the variance between jobs by the method of moments (below 0 where there is none); `variance`: of launches."""
        sizes = np.array([self.jobs.count(job) for job in dict.fromkeys(self.jobs)], dtype=np.float64)
        means = np.array([self.levels[[each == job for each in self.jobs]].mean() for job in dict.fromkeys(self.jobs)])
        mean_square = float((sizes * (means - self.levels.mean()) ** 2).sum()) / (sizes.size - 1)
        typical = float((sizes.sum() - (sizes**2).sum() / sizes.sum()) / (sizes.size - 1))
        return (mean_square - variance) / typical


def _stored(
    case_id: str, metric: Metric, launches: Sequence[Launch], engine: str = "", drift: stats.Drift | None = None
) -> _Stored | None:
    launches = alike(metric, launches)
    rounds = values(metric, launches)
    try:
        scatter = stats.round_scatter(rounds)
        of_launches = levels(metric, rounds, scatter)
    except stats.UnusableSampleError:
        return None
    near = [x[abs(x - np.median(x)) <= stats.reach(scatter)] for x in (np.log(each) * 100 for each in rounds)]
    squares, freedom = sum(float(((x - x.mean()) ** 2).sum()) for x in near if x.size), sum(max(x.size - 1, 0) for x in near)
    return _Stored(
        key=(case_id, metric.name),
        kind=metric.kind,
        levels=of_launches,
        scatter=scatter,
        round_sd=math.sqrt(squares / freedom) if freedom else 0.0,
        jobs=tuple(launch.job for launch in launches),
        rounds=float(np.mean([*map(len, rounds)])),
        engine=engine,
        drift=drift,
    )


@dataclass(frozen=True)
class Suite:
    """What a suite's baselines tell of noise: of each class of metrics, and of each metric's drift between jobs."""

    trends: dict[str, Trend]
    drifts: dict[str, tuple[float, int]]
    """The variance between jobs as a share of that between launches, and its degrees of freedom."""

    def beliefs(self, stored: Baseline, names: Iterable[str]) -> dict[str, Belief]:
        """Return what is believed of the noise of these metrics of a baseline; nothing of one without levels."""
        return {row.key[1]: self.belief(row) for row in _rows(stored, names)}

    def belief(self, summary: _Stored) -> Belief:
        """Return what is believed of one comparison: what the suite's cases tell, and what is believed of the host.

        One host has them all, so a case that was recorded in a single job is believed to drift like the others.
        """
        ss, df = summary.within
        prior = self.trends[summary.kind].prior(ss / df if df else 0.0, df, summary.scatter)
        measured, freedom = self.drifts.get(summary.key[1], (0.0, 0))
        host = summary.drift or stats.Drift(0.0, (), 0)
        total = freedom + host.df
        share = (freedom * measured + host.df * host.share) / total if total else 0.0
        return Belief(prior, stats.Drift(share, summary.jobs, total) if total else None)


def suite_of(baselines: Iterable[Baseline], gated: Mapping[str, Iterable[str]] | None = None) -> Suite:
    """Return what the noise of these baselines tells; they are read through once, and not kept.

    `gated` holds the gating metrics per case id; without it they are the table's defaults.
    """
    return _suite([row for stored in baselines for row in _rows(stored, _names(stored, gated))])


def beliefs(baselines: Iterable[Baseline], gated: Mapping[str, Iterable[str]] | None = None) -> dict[tuple[str, str], Belief]:
    """Return per case id and metric what the suite's own baselines lead to expect; nothing of this run enters it."""
    summaries = [row for stored in baselines for row in _rows(stored, _names(stored, gated))]
    suite = _suite(summaries)
    return {summary.key: suite.belief(summary) for summary in summaries}


def _names(stored: Baseline, gated: Mapping[str, Iterable[str]] | None) -> Iterable[str]:
    return metrics.GATING if gated is None else gated.get(stored.case_id, ())


def _rows(stored: Baseline, names: Iterable[str]) -> list[_Stored]:
    """Return the summaries of those of the metrics that have levels."""
    engine, drift = json.dumps(stored.provenance.engine, sort_keys=True), drift_on(stored.host)
    wanted = (metric for metric in map(metrics.find, names) if metric.kind in RATIOS)
    return [row for metric in wanted if (row := _stored(stored.case_id, metric, stored.launches, engine, drift))]


def _suite(summaries: Sequence[_Stored]) -> Suite:
    trends = {}
    for kind in RATIOS:
        of_kind = [summary for summary in summaries if summary.kind == kind]
        spread = [(ss / df if df else 0.0, df, summary.scatter) for summary in of_kind for ss, df in [summary.within]]
        columns = zip(*spread, strict=True) if spread else ((), (), ())
        trends[kind] = fit_trend(*columns, default=stats.PRIORS[kind], weights=_weights(of_kind))
    return Suite(trends, _drifts(trends, summaries))


def _weights(summaries: Sequence[_Stored]) -> list[float]:
    shares = dict[str, float]()
    for engine in {summary.engine for summary in summaries}:
        together = [summary for summary in summaries if summary.engine == engine and summary.within[1]]
        shares[engine] = independence(
            [summary.residuals for summary in together], min((summary.within[1] for summary in together), default=0)
        )
    return [shares[summary.engine] for summary in summaries]


def _drifts(trends: Mapping[str, Trend], summaries: Iterable[_Stored]) -> dict[str, tuple[float, int]]:
    """Return each metric's drift between jobs, and how well it is known: by the case of most jobs."""
    shares, freedom = defaultdict[str, list[float]](list), defaultdict[str, int](int)
    for summary in (summary for summary in summaries if summary.tells_jobs):
        ss, df = summary.within
        prior, metric = trends[summary.kind].prior(ss / df if df else 0.0, df, summary.scatter), summary.key[1]
        variance = max((prior.df * prior.variance + ss) / (prior.df + df), stats.FLOOR_SD**2)
        shares[metric].append(summary.between(variance) / variance)
        freedom[metric] = max(freedom[metric], len(set(summary.jobs)) - 1)
    return {metric: (max(float(np.mean(shares[metric])), 0.0), freedom[metric]) for metric in shares}


def parts(metric: Metric, launches: Sequence[Launch]) -> Parts | None:
    """Return the noise of stored launches in its parts; None for fewer than two launches, or where there are no levels."""
    launches = alike(metric, launches)
    summary = _stored("", metric, launches) if metric.kind in (*RATIOS, "exact") and len(launches) > 1 else None
    if summary is None:
        return None
    ss, df = summary.within
    variance = ss / df
    between = summary.between(variance) if summary.tells_jobs else None
    return Parts(
        rounds=summary.round_sd,
        launches=math.sqrt(max(variance - summary.round_sd**2 / summary.rounds, 0.0)),
        jobs=None if between is None else math.sqrt(max(between, 0.0)),
        launch_count=len(launches),
        job_count=len(set(summary.jobs)),
    )
