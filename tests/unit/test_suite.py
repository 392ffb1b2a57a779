"""The suite as a whole: it sees what no comparison can prove, and does not take noise that engines share for it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_llmperf.judge.maths.stats import Decision, Design, Drift, Prior, UnusableSampleError, decide
from pytest_llmperf.judge.suite import LEAST, EngineLevels, decide_suite, judge_suite
from pytest_llmperf.judge.verdict import MetricVerdict, Status, Verdict

DESIGN = Design(comparisons=40)
Engine = list[tuple[np.ndarray, np.ndarray]]
quick = settings(max_examples=60, deadline=None)


def suite(
    shift: float, *, engines: int = 5, comparisons: int = 8, own: float = 1.0, shared: float = 0.0, seed: int = 3
) -> list[Engine]:
    """Return levels of 20 baseline launches and two or three of the run; `shared` noise moves all of an engine alike."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(engines):
        before, now = rng.normal(0, shared, 20), rng.normal(shift, shared, 3)
        found.append([
            (before + rng.normal(0, own, 20), now[: 2 + n % 2] + rng.normal(0, own, 2 + n % 2)) for n in range(comparisons)
        ])  # fmt: skip
    return found


def whole(engines: list[Engine], launches_per_job: int = 2, drift: Drift | None = None) -> Decision:
    """Return the verdict on engines whose baselines were recorded a few launches a job."""
    return decide_suite(
        [
            EngineLevels(tuple(pairs), tuple(str(n // launches_per_job) for n in range(len(pairs[0][0]) if pairs else 0)))
            for pairs in engines
        ],
        design=DESIGN,
        drift=drift,
    )


# --- the mean of all -----------------------------------------------------------------------------------------------
def test_a_shift_of_everything_is_seen_that_no_comparison_can_prove() -> None:
    engines = suite(1.5)
    assert whole(engines).outcome == "regressed"
    assert whole(suite(-1.5)).outcome == "improved"
    assert whole(suite(0)).outcome == "pass"
    singles = [decide(b, c, design=DESIGN, prior=Prior(1.0, 20)).outcome for engine in engines for b, c in engine]
    assert "regressed" not in singles


def test_the_estimate_is_the_mean_over_comparisons_and_not_over_engines() -> None:
    one, three = (np.zeros(5), np.full(2, 4.0)), (np.zeros(5), np.zeros(2))
    decision = whole([[one], [three] * 3])
    assert decision.estimate == pytest.approx(1.0)
    assert decision.launches == 4


def test_a_change_below_1_percent_is_not_worth_a_red_build() -> None:
    for shift, outcome in ((0.9 * LEAST, "pass"), (1.1 * LEAST, "regressed"), (-0.9 * LEAST, "pass")):
        exact = [[(np.zeros(20), np.full(8, shift))] * 5] * 8
        assert whole(exact).outcome == outcome


@pytest.mark.parametrize("jobs", [1, 2])
def test_one_or_two_jobs_cannot_tell_host_from_suite(jobs: int) -> None:
    decision = whole(suite(3.0), launches_per_job=20 // jobs)
    assert decision.outcome == "inconclusive"
    assert "baselines of 3 runs or more would tell whether the host is slow today" in decision.rule


def test_a_host_with_such_days_is_no_slower_suite() -> None:
    days = np.repeat([-3.0, 0.0, 3.0, 1.0, -1.0], 4)
    engines = [[(before + days, now) for before, now in engine] for engine in suite(3.0)]
    assert whole(engines, launches_per_job=4).outcome == "pass"
    assert whole(suite(3.0), launches_per_job=4).outcome == "regressed"


def test_one_launch_never_fails_the_suite() -> None:
    assert whole([[([0.0] * 9, [50.0])]]).outcome == "pass"


def test_baselines_of_one_launch_leave_the_noise_to_the_shipped_belief() -> None:
    engines = [[([0.0], [shift, shift])] for shift in (20.0, 30.0)]
    assert whole(engines).se == pytest.approx(2 * math.sqrt((1 + 1 / 2) / 2), rel=0.2)
    assert whole(engines).outcome == "inconclusive"  # and of one job, so that it stays open whose the shift is


def test_comparisons_that_move_together_are_one_witness_and_engines_are_several() -> None:
    rng = np.random.default_rng(1)
    pair = rng.normal(0, 1, 20), rng.normal(1, 1, 4)
    alone, together = whole([[pair]]), whole([[pair] * 8])
    assert (together.estimate, together.se, together.df) == pytest.approx((alone.estimate, alone.se, alone.df))
    apart = whole([[pair]] * 8)
    assert apart.se is not None
    assert alone.se is not None
    assert apart.se < alone.se / 2


@pytest.mark.parametrize("engines", [[], [[]], [[([0.0], [0.0])], []]], ids=repr)
def test_a_suite_of_nothing_is_unusable(engines: list[list[tuple[list[float], list[float]]]]) -> None:
    with pytest.raises(UnusableSampleError):
        whole(engines)


@pytest.mark.parametrize("bad", [[], [math.nan], [1.0, math.inf], [[1.0]]], ids=repr)
def test_unusable_levels_raise_the_named_error(bad: list[float]) -> None:
    for pair in ((bad, [1.0]), ([1.0], bad)):
        with pytest.raises(UnusableSampleError):
            whole([[([0.0], [0.0]), pair]])


def test_a_believed_drift_holds_back_what_few_jobs_seem_to_prove() -> None:
    engines = suite(4.0, own=0.5)
    assert whole(engines).outcome == "regressed"
    assert whole(engines, drift=Drift(1000.0, (), 3)).outcome == "pass"
    assert whole(suite(40.0, own=0.5), drift=Drift(1000.0, (), 3)).outcome == "regressed"


LEVELS = st.lists(st.floats(-30, 30), min_size=1, max_size=6)
ENGINES = st.lists(st.lists(st.tuples(LEVELS, LEVELS), min_size=1, max_size=4), min_size=1, max_size=4)


@quick
@given(ENGINES, st.floats(-1e3, 1e3), st.randoms(use_true_random=False))
def test_neither_units_nor_the_order_change_the_verdict(engines: list[Engine], shift: float, random: object) -> None:
    moved = [[(np.array(b) + shift, np.array(c) + shift) for b, c in engine] for engine in engines]
    for engine in moved:
        random.shuffle(engine)  # type: ignore[attr-defined]
    random.shuffle(moved)  # type: ignore[attr-defined]
    one, other = whole(engines), whole(moved)
    assert other.estimate == pytest.approx(one.estimate, abs=1e-6)
    assert other.se == pytest.approx(one.se, abs=1e-6)


@quick
@given(ENGINES, st.floats(0, 50))
def test_slower_everywhere_is_never_judged_better_and_faster_is_its_mirror_image(engines: list[Engine], shift: float) -> None:
    order = ["improved", "pass", "regressed"]
    slower = [[(b, np.array(c) + shift) for b, c in engine] for engine in engines]
    mirrored = [[(-np.array(b), -np.array(c)) for b, c in engine] for engine in slower]
    one, more, mirror = (whole(x, launches_per_job=1) for x in (engines, slower, mirrored))
    if min(len(before) for engine in engines for before, _ in engine) >= 3:  # with fewer jobs what is proven stays open
        assert order.index(more.outcome) >= order.index(one.outcome)
        assert order.index(mirror.outcome) == 2 - order.index(more.outcome)
    else:
        assert {one.outcome, more.outcome, mirror.outcome} <= {"pass", "inconclusive"}
    assert more.lower <= more.estimate <= more.upper


# --- error rates ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("own", "shared"), [(3.0, 0.0), (1.0, 2.0), (0.2, 3.0)])
def test_clean_suites_are_seldom_red_whether_their_noise_is_shared_or_not(own: float, shared: float) -> None:
    clean = (suite(0, engines=8, comparisons=5, own=own, shared=shared, seed=seed) for seed in range(700))
    red = sum(whole(engines).outcome == "regressed" for engines in clean)
    assert red <= 5  # at most 0.1 % of 700 is promised; more than 5 then has probability 0.01 %


@pytest.mark.parametrize(("own", "shared"), [(1.0, 0.0), (1.0, 0.5)])
def test_suites_slower_by_one_and_a_half_percent_are_nearly_always_red(own: float, shared: float) -> None:
    slower = (suite(1.5, engines=8, comparisons=5, own=own, shared=shared, seed=seed) for seed in range(100))
    assert sum(whole(engines).outcome == "regressed" for engines in slower) >= 95


# --- from verdicts -------------------------------------------------------------------------------------------------
RATE, TTFT, KV = "output_tokens_per_s", "ttft_p50_s", "kv_cache_tokens"


def row(metric: str, shift: float | None, seed: int = 1) -> MetricVerdict:
    """Return a judged metric with levels that differ by a shift, or without levels."""
    rng = np.random.default_rng(seed)
    pair = None if shift is None else (tuple(rng.normal(0, 0.3, 10)), tuple(rng.normal(shift, 0.3, 2)))
    return MetricVerdict(metric, Status.PASS, 1.0, 1.0, levels=pair)


def verdict(*rows: MetricVerdict) -> Verdict:
    return Verdict(Status.PASS, rows, baseline_jobs=tuple("aabbccddee"))


def test_fewer_than_two_comparisons_have_no_verdict_of_the_suite() -> None:
    assert judge_suite([]) is None
    assert judge_suite([("a", Verdict(Status.NO_BASELINE))]) is None
    assert judge_suite([("a", verdict(row(RATE, 5.0), row(TTFT, None)))]) is None
    assert judge_suite([("a", verdict(row(RATE, 5.0), row(TTFT, 5.0)))]) is not None
    assert judge_suite([("a", verdict(row(RATE, 5.0))), ("b", verdict(row(RATE, 5.0)))]) is not None


def test_all_comparisons_slower_by_2_percent_make_a_red_suite() -> None:
    suite = [(engine, verdict(row(RATE, 2.0, n), row(TTFT, 2.0, n + 9))) for n, engine in enumerate("abcabc")]
    decision = judge_suite(suite)
    assert decision is not None
    assert decision.outcome == "regressed"
    assert decision.estimate == pytest.approx(2.0, abs=0.3)


def test_cases_on_one_engine_are_one_witness_and_on_several_engines_several() -> None:
    cases = [verdict(row(RATE, 1.0)) for _ in range(6)]
    together, apart = judge_suite(("a", case) for case in cases), judge_suite(zip("abcdef", cases, strict=True))
    assert together is not None
    assert apart is not None
    assert together.estimate == pytest.approx(apart.estimate)
    assert together.se is not None
    assert apart.se is not None
    assert apart.se < together.se / 2


def test_counts_and_capacities_do_not_enter_nor_what_has_no_levels() -> None:
    rows = row(RATE, 0.0), row(TTFT, 0.0)
    more = row("preemptions", None), row(KV, None), row(KV, 50.0), row("e2e_p50_s", None)
    assert judge_suite([("a", verdict(*rows, *more))]) == judge_suite([("a", verdict(*rows))])
    assert judge_suite([("a", verdict(row(RATE, 0.0), *more))]) is None
