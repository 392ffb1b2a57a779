"""What can be found before it is looked for: against simulation, the procedure's table, and by properties."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_llmperf.judge.maths.power import launches_needed, minimum_detectable_effect
from pytest_llmperf.judge.maths.stats import PRIORS, Design, Drift, Prior, UnusableSampleError, decide

PRIOR = PRIORS["ratio"]
LEVELS = st.lists(st.floats(-30, 30), min_size=1, max_size=20)
MOST = 64
quick = settings(max_examples=60, deadline=None)


def of_sd(sd: float, launches: int) -> np.ndarray:
    """Return levels whose sample standard deviation is exactly this."""
    x = np.random.default_rng(launches).normal(0, 1, launches)
    return (x - x.mean()) / x.std(ddof=1) * sd


# --- what it promises ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("sd", "b", "k", "comparisons"), [(1.0, 20, 8, 1), (1.0, 20, 8, 40), (0.3, 10, 3, 6), (2.0, 10, 5, 12), (4.0, 5, 2, 1)]
)
def test_the_detectable_slow_down_is_proven_19_times_in_20(sd: float, b: int, k: int, comparisons: int) -> None:
    design, prior, times = Design(comparisons=comparisons, launches=k), Prior(sd**2, 50), 3000
    effect = minimum_detectable_effect(of_sd(sd, b), design=design, prior=prior)
    # A tolerance of half of it: then neither a pass nor the rule of half the tolerance has a say.
    design = replace(design, tolerance=effect / 2)
    rng = np.random.default_rng(11)
    baselines = rng.normal(0, sd, (times, b))
    candidates = rng.normal(100 * math.log1p(effect), sd, (times, k))
    last = sum(
        decide(x, y, design=design, prior=prior).outcome == "regressed" for x, y in zip(baselines, candidates, strict=True)
    )
    # The share of 3000 is known to 0.4 %; the formula's two quantiles are exact for a known variance only.
    assert last / times == pytest.approx(0.95, abs=0.015)


def test_looking_after_each_launch_finds_as_often_as_at_the_end() -> None:
    design, prior, times = Design(launches=5), Prior(1.0, 50), 1000
    effect = minimum_detectable_effect(of_sd(1.0, 10), design=design, prior=prior)
    design = replace(design, tolerance=effect / 2)
    rng, found = np.random.default_rng(12), 0
    for _ in range(times):
        baseline, candidate = rng.normal(0, 1, 10), rng.normal(100 * math.log1p(effect), 1, 5)
        outcomes = (decide(baseline, candidate[:k], design=design, prior=prior).outcome for k in range(1, 6))
        found += next(outcome for outcome in outcomes if outcome != "more") == "regressed"
    assert 0.93 <= found / times <= 0.99  # some more are found early; a share of 1000 is known to 0.7 %


def test_in_spite_of_drift_the_detectable_is_found_19_times_in_20() -> None:
    jobs = tuple(str(n // 2) for n in range(40))
    design, prior, drift, times = Design(launches=4), Prior(1.0, 50), Drift(1.0, jobs, 19), 2000
    rng = np.random.default_rng(13)
    effects = rng.normal(0, 1, (times, 21))
    baselines = rng.normal(0, 1, (times, 40)) + np.repeat(effects[:, :20], 2, axis=1)
    alike = np.tile([-1.0, 1.0], 20) * math.sqrt(0.5)  # the variance in a job, of one degree of freedom, is 1
    effect = minimum_detectable_effect(alike, design=design, prior=prior, drift=drift)
    candidates = rng.normal(0, 1, (times, 4)) + effects[:, 20:] + 100 * math.log1p(effect)
    design = replace(design, tolerance=effect / 2)
    found = sum(
        decide(x, y, design=design, prior=prior, drift=drift).outcome == "regressed"
        for x, y in zip(baselines, candidates, strict=True)
    )
    assert found / times == pytest.approx(0.95, abs=0.02)
    assert effect > minimum_detectable_effect(alike, design=design, prior=prior)


TABLE = {
    0.5: (2.0, 1.6, 1.4, 1.2, 0.9),
    1: (3.9, 3.2, 2.8, 2.4, 1.9),
    1.5: (5.9, 4.9, 4.3, 3.5, 2.8),
    2: (7.8, 6.5, 5.7, 4.7, 3.8),
    3: (12, 9.7, 8.5, 7.1, 5.7),
    5: (20, 16, 14, 12, 9.4),
}
"""Smallest regression found 19 times in 20, in percent, of 40 comparisons at 1 %: by sd, and by the launches below."""
SIZES = ((10, 3), (10, 5), (20, 5), (20, 8), (30, 12))


@pytest.mark.parametrize(("sd", "column"), [(sd, column) for sd in TABLE for column in range(len(SIZES))])
def test_the_detectable_effect_is_that_of_the_table_that_was_simulated(sd: float, column: int) -> None:
    b, k = SIZES[column]
    effect = minimum_detectable_effect(of_sd(sd, b), design=Design(comparisons=40, launches=k), prior=Prior(sd**2, 20))
    # The table is rounded to two digits, which is up to 5 % of its smallest numbers.
    assert 100 * effect == pytest.approx(TABLE[sd][column], rel=0.1)


# --- properties ----------------------------------------------------------------------------------------------------
@quick
@given(LEVELS, st.integers(2, 40), st.integers(1, 100))
def test_more_launches_detect_less(baseline: list[float], k: int, comparisons: int) -> None:
    few, many = (
        minimum_detectable_effect(baseline, design=Design(launches=n, comparisons=comparisons), prior=PRIOR) for n in (k, k + 1)
    )
    assert 0 < many < few


@quick
@given(LEVELS, st.integers(1, 12), st.floats(1.01, 10))
def test_noisier_launches_hide_more(baseline: list[float], k: int, factor: float) -> None:
    design = Design(launches=k)
    noisier = (np.array(baseline) * factor, Prior(PRIOR.variance * factor**2, PRIOR.df))
    effect = minimum_detectable_effect(noisier[0], design=design, prior=noisier[1])
    assert effect > minimum_detectable_effect(baseline, design=design, prior=PRIOR)


@quick
@given(LEVELS, st.floats(-1e3, 1e3))
def test_the_unit_of_a_baseline_changes_nothing(baseline: list[float], shift: float) -> None:
    one, other = (minimum_detectable_effect(x, design=Design(), prior=PRIOR) for x in (baseline, np.array(baseline) + shift))
    assert other == pytest.approx(one, rel=1e-6)


@quick
@given(LEVELS, st.floats(0.001, 0.5), st.floats(0.001, 0.5))
def test_neither_tolerance_nor_a_single_launch_changes_what_is_detectable(baseline: list[float], one: float, two: float) -> None:
    effects = {minimum_detectable_effect(baseline, design=Design(tolerance=x, launches=2), prior=PRIOR) for x in (one, two)}
    # One launch can prove nothing: the budget is then taken for two.
    effects.add(minimum_detectable_effect(baseline, design=Design(launches=1), prior=PRIOR))
    assert len(effects) == 1


def test_a_drift_hides_more_and_one_of_nought_nothing() -> None:
    baseline, jobs = of_sd(1.0, 20), tuple(str(n // 4) for n in range(20))
    effects = [
        minimum_detectable_effect(baseline, design=Design(), prior=Prior(1.0, 50), drift=Drift(share, jobs))
        for share in (0.0, 0.5, 1.0, 4.0)
    ]
    assert effects == sorted(effects)
    assert effects[3] > 2 * effects[0]
    one_job = Drift(0.0, ("",) * 20)
    without = minimum_detectable_effect(baseline, design=Design(), prior=PRIOR)
    assert minimum_detectable_effect(baseline, design=Design(), prior=PRIOR, drift=one_job) == without


# --- how many launches it takes ------------------------------------------------------------------------------------
@quick
@given(LEVELS, st.floats(0.01, 0.4), st.integers(1, 60))
def test_the_launches_needed_find_the_tolerance_and_one_less_does_not(
    baseline: list[float], tolerance: float, comparisons: int
) -> None:
    design = Design(tolerance=tolerance, comparisons=comparisons)
    needed = launches_needed(baseline, design=design, prior=PRIOR)

    def detectable(k: int) -> float:
        return minimum_detectable_effect(baseline, design=replace(design, launches=k), prior=PRIOR)

    if needed is None:
        assert detectable(MOST) > tolerance
    else:
        assert detectable(needed) <= tolerance
        assert needed == 2 or detectable(needed - 1) > tolerance


def test_two_launches_are_the_fewest_that_find_anything() -> None:
    assert launches_needed(of_sd(0.1, 20), design=Design(launches=1), prior=Prior(0.01, 50)) == 2


def test_noise_beyond_any_number_of_launches_has_no_number() -> None:
    assert launches_needed(of_sd(30.0, 10), design=Design(tolerance=0.01), prior=PRIOR) is None
    # Two launches of baseline: their own mean is not known to 5 %.
    assert launches_needed([-5.0, 5.0], design=Design(), prior=PRIOR) is None


def test_drift_beyond_the_tolerance_has_no_number_of_launches() -> None:
    drift = Drift(9.0, tuple(str(n // 4) for n in range(20)))
    assert launches_needed(of_sd(1.0, 20), design=Design(), prior=Prior(1.0, 50), drift=drift) is None
    assert launches_needed(of_sd(1.0, 20), design=Design(), prior=Prior(1.0, 50)) is not None


@pytest.mark.parametrize("bad", [[], [math.nan], [1.0, math.inf], [[1.0]]], ids=repr)
def test_an_unusable_baseline_raises_the_named_error(bad: list[float]) -> None:
    for ask in (minimum_detectable_effect, launches_needed):
        with pytest.raises(UnusableSampleError):
            ask(bad, design=Design(), prior=PRIOR)
