"""The noise of baselines: known parts are found again, and what a suite's baselines lead to expect."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_llmperf.judge import noise
from pytest_llmperf.judge.baseline import Baseline
from pytest_llmperf.judge.maths import stats
from pytest_llmperf.judge.noise import Belief
from pytest_llmperf.judge.provenance import Provenance
from pytest_llmperf.measure.measurement import Launch, Round
from pytest_llmperf.measure.metrics import BY_NAME, GATING
from pytest_llmperf.plan.workload import Workload

TTFT, TAIL, KV = "ttft_p50_s", "ttft_p90_s", "kv_cache_tokens"
ROUNDS = 5


def launch(logs: np.ndarray | list[float], job: str = "", *, metric: str = TTFT) -> Launch:
    """Return a launch whose rounds have these logarithms in percent; the one value of a metric of launches."""
    values = [1000 * math.exp(log / 100) for log in logs]
    if BY_NAME[metric].of_launch:
        return Launch("l", "", (Round({}),) * ROUNDS, {metric: values[0]}, job=job)
    return Launch("l", "", tuple(Round({metric: value}) for value in values), {}, job=job)


def drawn(
    jobs: int,
    each: int,
    *,
    job: float = 0.0,
    between: float = 0.0,
    within: float = 0.0,
    seed: int = 1,
    metric: str = TTFT,
) -> tuple[Launch, ...]:
    """Return launches of several jobs with noise of known standard deviations, in log-percent."""
    rng = np.random.default_rng(seed)
    return tuple(
        launch(level + rng.normal(0, within, ROUNDS), f"job {number}", metric=metric)
        for number, effect in enumerate(rng.normal(0, job, jobs))
        for level in effect + rng.normal(0, between, each)
    )


def stored(
    launches: tuple[Launch, ...], case_id: str = "test_a.py::test_x", engine: str = "one", host: str = "nvidia-h200"
) -> Baseline:
    workload, provenance = Workload(), Provenance({"model": engine})
    return Baseline(case_id, host, dict(vars(workload)), workload.fingerprint, provenance, launches)


def believed(
    *baselines: tuple[Launch, ...],
    metrics: tuple[str, ...] = (TTFT,),
    one_engine: bool = False,
    host: str = "nvidia-h200",
) -> list[Belief | None]:
    """Return the belief of each baseline, as far as its first metric has one; by default each has an engine of its own."""
    suite = [
        stored(launches, f"test_a.py::test_{n}", engine="one" if one_engine else str(n), host=host)
        for n, launches in enumerate(baselines)
    ]
    found = noise.beliefs(suite, {one.case_id: metrics for one in suite})
    return [found.get((one.case_id, metrics[0])) for one in suite]


# ------------------------------------------------------------------------------------------------ the parts


@pytest.mark.parametrize(
    ("job", "between", "within"), [(0.0, 1.0, 0.5), (2.0, 1.0, 1.0), (1.0, 3.0, 0.2), (0.0, 0.0, 2.0), (1.0, 1.0, 4.0)]
)
def test_the_parts_of_the_noise_are_found_again(job: float, between: float, within: float) -> None:
    parts = noise.parts(BY_NAME[TTFT], drawn(300, 4, job=job, between=between, within=within))
    assert parts is not None
    assert parts.jobs is not None
    # Of 300 jobs with 4 launches of 5 rounds: 6000 rounds, 900 degrees of freedom between launches, 299 between jobs.
    level = between**2 + within**2 / ROUNDS
    # Rounds that are far from their launch's median are left out as strays: a few per cent of the sd.
    assert parts.rounds == pytest.approx(within, rel=0.05)
    assert parts.launches**2 == pytest.approx(between**2, abs=4 * level * math.sqrt(2 / 900) + 0.1 * within**2 / ROUNDS)
    assert parts.jobs**2 == pytest.approx(job**2, abs=4 * (job**2 + level / 4) * math.sqrt(2 / 299))
    assert (parts.launch_count, parts.job_count) == (1200, 300)


@pytest.mark.parametrize("jobs", [1, 2])
def test_fewer_than_three_jobs_tell_nothing_about_jobs(jobs: int) -> None:
    parts = noise.parts(BY_NAME[TTFT], drawn(jobs, 6, job=5.0, between=1.0))
    assert parts is not None
    assert (parts.jobs, parts.job_count, parts.launch_count) == (None, jobs, 6 * jobs)


def test_jobs_of_one_launch_each_tell_nothing_about_jobs() -> None:
    parts = noise.parts(BY_NAME[TTFT], drawn(20, 1, job=5.0, between=1.0))
    assert parts is not None
    assert parts.jobs is None
    assert parts.launches == pytest.approx(math.hypot(5, 1), rel=0.5)  # one cannot be told from the other


def test_jobs_that_agree_better_than_their_launches_differ_by_nothing() -> None:
    alike = tuple(launch([level], f"job {job}") for job in range(3) for level in (-1.0, 1.0))
    parts = noise.parts(BY_NAME[TTFT], alike)
    assert parts is not None
    assert parts.jobs == 0


@pytest.mark.parametrize(
    "launches",
    [(), drawn(1, 1), (launch([0.0]), Launch("l", "", (Round({TTFT: None}),), {})), (launch([0.0]), launch([-math.inf]))],
    ids=["none", "one", "not measured", "nought"],
)
def test_what_has_no_two_levels_has_no_parts(launches: tuple[Launch, ...]) -> None:
    assert noise.parts(BY_NAME[TTFT], launches) is None


def test_counts_have_no_parts() -> None:
    launches = tuple(Launch("l", "", (Round({"preemptions": 29.0}),), {}) for _ in range(5))
    assert noise.parts(BY_NAME["preemptions"], launches) is None


def test_a_metric_of_the_launch_has_no_part_of_rounds() -> None:
    parts = noise.parts(BY_NAME[TAIL], drawn(200, 3, between=2.0, metric=TAIL))
    assert parts is not None
    assert parts.rounds == 0
    assert parts.launches == pytest.approx(2.0, rel=0.15)  # 400 degrees of freedom: 3.5 % each way


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.floats(1e-9, 1e9), st.integers(1, 4))
def test_a_change_of_unit_changes_no_part(seed: int, unit: float, jobs: int) -> None:
    launches = drawn(jobs, 3, job=1.0, between=1.0, within=1.0, seed=seed)
    scaled = tuple(
        replace(one, rounds=tuple(Round({TTFT: (each.metrics[TTFT] or 0.0) * unit}) for each in one.rounds)) for one in launches
    )
    before, after = (noise.parts(BY_NAME[TTFT], side) for side in (launches, scaled))
    assert before is not None
    assert after is not None
    assert asdict(after) == pytest.approx(asdict(before), abs=1e-6)


# ------------------------------------------------------------------------------------------------ what is expected


def test_a_belief_is_held_of_each_case_and_gating_metric_with_levels() -> None:
    value = {TTFT: 0.05, "output_tokens_per_s": 900.0, "preemptions": 29.0, "e2e_mean_s": 0.8}
    launches = (Launch("l", "", (Round(value),), {TAIL: 0.1}),) * 5
    suite = [stored(launches, "test_a.py::test_x"), stored(launches, "test_a.py::test_y")]
    both = {TTFT, "output_tokens_per_s"}
    assert noise.beliefs(suite).keys() == {(one.case_id, name) for one in suite for name in both}
    assert both < set(GATING)


def test_only_the_metrics_that_gate_a_case_have_a_belief() -> None:
    launches = drawn(1, 5, between=0.5)
    suite = [stored(launches, "a"), stored(launches, "b"), stored(launches, "c")]
    assert noise.beliefs(suite, {"a": (TTFT,), "b": ()}).keys() == {("a", TTFT)}


@pytest.mark.parametrize("launches", [(), (launch([0.0]), launch([math.inf]))], ids=["none", "not finite"])
def test_a_baseline_that_cannot_be_used_is_left_to_the_shipped_belief(launches: tuple[Launch, ...]) -> None:
    assert believed(launches) == [None]
    quiet = drawn(1, 5, between=0.2)
    assert believed(launches, quiet) == [None, *believed(quiet)]


def test_a_single_launch_is_believed_as_noisy_as_its_suite() -> None:
    single, quiet = drawn(1, 1), drawn(1, 5, between=0.2)
    assert believed(single) == [Belief(stats.PRIORS["quantile"])]
    first, second = believed(single, quiet)
    assert first == second == believed(quiet)[0]
    assert first is not None
    assert first.prior.variance < stats.PRIORS["quantile"].variance


@pytest.mark.parametrize(("metric", "kind"), [(TTFT, "quantile"), (TAIL, "tail"), ("output_tokens_per_s", "ratio")])
def test_a_shipped_belief_is_replaced_by_many_cases(metric: str, kind: str) -> None:
    def variance(cases: int) -> float:
        suite = [drawn(1, 5, between=0.5, metric=metric, seed=seed) for seed in range(cases)]
        (belief, *_) = believed(*suite, metrics=(metric,))
        assert belief is not None
        return belief.prior.variance

    shipped = stats.PRIORS[kind].variance
    assert 0.25 < variance(1) < shipped
    assert variance(40) == pytest.approx(0.25, rel=0.4)


def test_a_suites_noise_is_that_between_launches_of_a_job() -> None:
    (belief, *_) = believed(*(drawn(4, 5, job=5.0, between=0.5, seed=seed) for seed in range(40)))
    assert belief is not None
    assert belief.prior.variance == pytest.approx(0.25, rel=0.3)


def test_a_varying_exact_metric_is_believed_like_any_ratio() -> None:
    suite = [drawn(1, 5, between=3.0, metric=KV, seed=seed) for seed in range(40)]
    assert believed(*suite, metrics=(KV,)) == [None] * 40


def test_an_exact_metric_that_never_varies_says_nothing_about_ratios() -> None:
    rate = "output_tokens_per_s"
    suite = [drawn(1, 10, between=2.0, metric=rate, seed=seed) for seed in range(8)]
    capacity = [tuple(replace(one, metrics={KV: 4096.0}) for one in launches) for launches in suite]
    assert believed(*capacity, metrics=(rate, KV)) == believed(*suite, metrics=(rate,))


def together(cases: int, *, shared: float, own: float, each: int = 20) -> list[tuple[Launch, ...]]:
    """Return baselines of cases that were measured on the same engine starts."""
    rng = np.random.default_rng(3)
    starts = rng.normal(0, shared, each)
    return [tuple(launch([level]) for level in starts + rng.normal(0, own, each)) for _ in range(cases)]


def firmness(baselines: list[tuple[Launch, ...]], *, one_engine: bool) -> float:
    (belief, *_) = believed(*baselines, one_engine=one_engine)
    assert belief is not None
    return belief.prior.df


def test_cases_that_move_together_know_no_more_than_one() -> None:
    alike = together(20, shared=1.0, own=0.05)
    assert firmness(alike, one_engine=True) == pytest.approx(firmness(alike[:1], one_engine=True), rel=0.1)


def test_engines_are_several_witnesses_even_where_they_move_alike() -> None:
    alike = together(20, shared=1.0, own=0.05)
    assert firmness(alike, one_engine=False) > 2 * firmness(alike, one_engine=True)


def test_cases_that_do_not_move_together_are_as_good_as_engines() -> None:
    apart = together(20, shared=0.0, own=1.0)
    assert firmness(apart, one_engine=True) == pytest.approx(firmness(apart, one_engine=False), rel=0.25)


def test_a_hosts_days_do_not_make_cases_one_witness() -> None:
    rng = np.random.default_rng(4)
    days, own = np.repeat(rng.normal(0, 5, 5), 4), rng.normal(0, 1, (20, 20))

    def suite(effects: np.ndarray) -> list[tuple[Launch, ...]]:
        return [tuple(launch([level], f"job {n // 4}") for n, level in enumerate(effects + one)) for one in own]

    assert firmness(suite(days), one_engine=True) == pytest.approx(firmness(suite(0 * days), one_engine=True), rel=0.25)


# ------------------------------------------------------------------------------------------------ drift


def shares(job: float, *, cases: int = 40, jobs: int = 8, each: int = 5) -> list[float]:
    suite = [drawn(jobs, each, job=job, between=1.0, seed=seed) for seed in range(cases)]
    drifts = [one.drift for one in believed(*suite) if one is not None]
    return [drift.share for drift in drifts if drift is not None]


@pytest.mark.parametrize("job", [0.0, 0.5, 1.0, 3.0])
def test_the_drift_is_the_jobs_variance_over_that_of_launches(job: float) -> None:
    found = shares(job)
    assert len(found) == 40
    assert len(set(found)) == 1  # one host has them all
    # A case's share has a standard error of (share + 1/5) * sqrt(2/7); there are 40 of them.
    assert found[0] == pytest.approx(job**2, abs=4 * (job**2 + 0.2) * math.sqrt(2 / 7 / 40))


@pytest.mark.parametrize(("jobs", "each"), [(1, 20), (2, 10), (20, 1)])
def test_jobs_that_tell_nothing_make_no_drift(jobs: int, each: int) -> None:
    assert shares(3.0, cases=3, jobs=jobs, each=each) == []


def test_a_drift_knows_the_job_of_every_launch() -> None:
    launches = drawn(3, 4, job=1.0, between=1.0)
    (belief,) = believed(launches)
    assert belief is not None
    assert belief.drift is not None
    assert belief.drift.jobs == tuple(one.job for one in launches)


def test_jobs_that_agree_better_than_their_launches_make_a_drift_of_nought() -> None:
    (belief,) = believed(tuple(launch([level], f"job {job}") for job in range(3) for level in (-1.0, 1.0)))
    assert belief is not None
    assert belief.drift is not None
    assert belief.drift.share == 0


def test_metrics_drift_each_by_their_own_share() -> None:
    steady, drifting = drawn(8, 5, between=1.0), drawn(8, 5, job=4.0, between=1.0, metric="e2e_p50_s")
    both = tuple(
        replace(one, rounds=tuple(Round(a.metrics | b.metrics) for a, b in zip(one.rounds, other.rounds, strict=True)))
        for one, other in zip(steady, drifting, strict=True)
    )
    found = noise.beliefs([stored(both)], {"test_a.py::test_x": (TTFT, "e2e_p50_s")})
    drifts = [belief.drift for belief in found.values()]
    assert [drift.share > 2 for drift in drifts if drift] == [False, True]


# ------------------------------------------------------------------------------------------------ hosts whose cores are shared


@pytest.mark.parametrize("launches", [drawn(1, 1), drawn(1, 5, between=4.0), drawn(2, 5, between=4.0)], ids=["1", "5", "2 x 5"])
def test_cores_that_others_share_are_believed_to_drift_though_no_jobs_tell(launches: tuple[Launch, ...]) -> None:
    (belief,) = believed(launches, host="cpu-amd-epyc-2c")
    assert belief == Belief(belief.prior, stats.Drift(1.0, tuple(one.job for one in launches), 4))
    assert believed(launches)[0] == Belief(belief.prior)


def test_jobs_outweigh_the_belief_in_a_drift() -> None:
    def share(jobs: int) -> float:
        (belief,) = believed(drawn(jobs, 4, between=1.0, job=0.0), host="cpu-amd-epyc-2c")
        assert belief is not None
        assert belief.drift is not None
        assert belief.drift.df == jobs - 1 + 4
        return belief.drift.share

    assert 1 > share(3) > share(9) > share(40)
    assert share(40) < 0.2


def test_a_shared_hosts_slow_day_fails_no_one_day_baseline() -> None:
    before, today = np.array([0.0, 2.0, -2.0, 1.0, -1.0]), np.array([11.0, 13.0, 9.5, 12.5])
    design = stats.Design(tolerance=0.10, comparisons=6)

    def outcome(host: str) -> str:
        launches = tuple(launch([level] * ROUNDS, "a") for level in before)
        (belief,) = believed(launches, host=host)
        assert belief is not None
        return stats.decide(before, today, design=design, prior=belief.prior, drift=belief.drift).outcome

    assert outcome("nvidia-h200") == "regressed"
    assert outcome("cpu-amd-epyc-2c") == "inconclusive"
