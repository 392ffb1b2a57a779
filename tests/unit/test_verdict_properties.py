"""Properties of the verdict, on whole measurements: units, directions, shifts, and whatever an engine may report."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_llmperf.judge import noise
from pytest_llmperf.judge.baseline import Baseline
from pytest_llmperf.judge.calibration import calibrated
from pytest_llmperf.judge.comparison import Comparison, prospects
from pytest_llmperf.judge.gates import Tolerance, gates
from pytest_llmperf.judge.maths import stats
from pytest_llmperf.judge.noise import Belief
from pytest_llmperf.judge.provenance import Provenance
from pytest_llmperf.judge.verdict import Status, Verdict, judge, observed
from pytest_llmperf.measure.measurement import Launch, Measurement, Round
from pytest_llmperf.measure.metrics import BY_NAME, METRICS
from pytest_llmperf.plan.case import Case
from pytest_llmperf.plan.engine import EngineSpec
from pytest_llmperf.plan.gates import Gate
from pytest_llmperf.plan.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CASE_ID = "test_a.py::test_x"
WORKLOAD = Workload(requests=256)
DESIGN = stats.Design(comparisons=8)
LEVELS = tuple(
    metric.name for metric in METRICS if metric.kind in noise.RATIOS and not metric.separate and metric.start != "cold"
)
"""Capacities have rules of their own at the bounds of a search (test_capacity.py)."""
COUNTS = tuple(metric.name for metric in METRICS if metric.kind == "count")
EXACT = tuple(metric.name for metric in METRICS if metric.kind == "exact")
GATED = gates([Gate("*", True), Gate("startup_cold_*", False)], tolerance=DESIGN.tolerance)
"""Every metric gates, of every class, but those of cold starts: a launch is either cold or warm."""
RANK = {
    Status.IMPROVED: 0,
    Status.PASS: 0,
    Status.UNDECIDED: 1,
    Status.INCONCLUSIVE: 1,
    Status.REGRESSED: 2,
}

Values = dict[str, list[list[float]]]
"""Per metric and launch the values of the rounds; one value for a metric of the launch."""


def drawn(seed: int, launches: int, *, sd: float = 1.0, shift: float = 0.0) -> Values:
    """Return noisy values of every metric; the launches of the `exact` ones agree."""
    rng = np.random.default_rng(seed)
    found: Values = {}
    for metric in (metric for metric in METRICS if metric.start != "cold"):
        sign = 1 if metric.better == "lower" else -1
        if metric.kind == "count":
            found[metric.name] = rng.poisson(20, (launches, 5)).astype(float).tolist()
        elif metric.kind == "exact":
            found[metric.name] = [[4096.0]] * launches
        else:
            levels = shift + rng.normal(0, sd, (launches, 1)) + rng.normal(0, sd, (launches, 5 if metric.of_round else 1))
            found[metric.name] = (50 * np.exp(sign * levels / 100)).tolist()
    return found


def launches(values: Mapping[str, Sequence[Sequence[float | None]]]) -> tuple[Launch, ...]:
    found = []
    for number in range(max(map(len, values.values()), default=0)):
        of = {name: list(sides[number]) for name, sides in values.items() if number < len(sides)}
        rounds = [
            Round({name: of[name][n] for name in of if BY_NAME[name].of_round and n < len(of[name])})
            for n in range(max([len(of[name]) for name in of if BY_NAME[name].of_round], default=0))
        ]
        whole = {name: of[name][0] for name in of if not BY_NAME[name].of_round and of[name]}
        found.append(Launch("l", "", tuple(rounds), whole, job=str(number % 4)))
    return tuple(found)


def stored(values: Mapping[str, Sequence[Sequence[float | None]]]) -> Baseline:
    workload = dict(vars(WORKLOAD))
    return Baseline(CASE_ID, "h", workload, WORKLOAD.fingerprint, Provenance({}), launches(values))


def judged(
    before: Mapping[str, Sequence[Sequence[float | None]]],
    now: Mapping[str, Sequence[Sequence[float | None]]],
    *,
    gated: Mapping[str, Tolerance] = GATED,
) -> Verdict:
    """Return the verdict on a run, with the beliefs that its own baseline leads to."""
    baseline, names = replace(stored(before), lacking=dict.fromkeys(gated, "not measured")), tuple(gated)
    beliefs = {name: belief for (_, name), belief in noise.beliefs([baseline], {CASE_ID: names}).items()}
    measurement = Measurement(Case(CASE_ID, EngineSpec(), WORKLOAD), launches(now))
    return judge(measurement, baseline, design=DESIGN, gated=gated, beliefs=beliefs)


def statuses(verdict: Verdict) -> dict[str, Status | None]:
    return {row.metric: row.status for row in verdict.metrics}


def scaled(values: Values, factors: Mapping[str, float]) -> Values:
    return {name: [[x * factors.get(name, 1.0) for x in one] for one in sides] for name, sides in values.items()}


SEEDS = st.integers(0, 1_000_000)
SHIFTS = st.floats(-15, 15)
SDS = st.floats(0.1, 5)
some = settings(deadline=None, max_examples=25)
many = settings(deadline=None, max_examples=100)

# ------------------------------------------------------------------------------------------------ units and directions


@some
@given(SEEDS, SEEDS, SDS, SHIFTS, st.integers(1, 6), st.lists(st.floats(1e-9, 1e9), min_size=len(METRICS), max_size=len(METRICS)))
def test_the_unit_of_a_metric_changes_no_verdict(
    old: int, new: int, sd: float, shift: float, count: int, units: list[float]
) -> None:
    before, now = drawn(old, 8, sd=sd), drawn(new, count, sd=sd, shift=shift)
    factors = {name: unit for name, unit in zip(BY_NAME, units, strict=True) if name not in COUNTS}
    here, there = judged(before, now), judged(scaled(before, factors), scaled(now, factors))
    assert statuses(there) == statuses(here)
    assert there.status is here.status
    for one, other in zip(here.metrics, there.metrics, strict=True):
        for name in ("worse", "worse_low", "worse_high", "detectable"):
            assert getattr(other, name) == (x if (x := getattr(one, name)) is None else pytest.approx(x, rel=1e-6, abs=1e-9))


def comparison(
    name: str, rounds: list[list[float]], *, better: str | None = None, design: stats.Design = DESIGN, prior: float = 1.0
) -> Comparison:
    metric = BY_NAME[name] if better is None else replace(BY_NAME[name], better=better)
    return Comparison(metric, rounds, GATED[name], design, Belief(stats.Prior(prior, 10.0)))


@many
@given(st.sampled_from(LEVELS), SEEDS, SEEDS, SDS, SHIFTS, st.integers(1, 8))
def test_a_metric_and_its_reciprocal_have_the_same_verdict(
    name: str, old: int, new: int, sd: float, shift: float, count: int
) -> None:
    before, now = drawn(old, 8, sd=sd)[name], drawn(new, count, sd=sd, shift=shift)[name]
    other = "higher" if BY_NAME[name].better == "lower" else "lower"
    here = comparison(name, before)
    there = comparison(name, [[1 / x for x in one] for one in before], better=other)
    one, two = here.decide(now), there.decide([[1 / x for x in launch] for launch in now])
    assert two.outcome == one.outcome
    assert (two.estimate, two.lower, two.upper, two.se) == pytest.approx((one.estimate, one.lower, one.upper, one.se), abs=1e-6)
    assert there.detectable == pytest.approx(here.detectable)
    assert there.launches_needed == here.launches_needed


@many
@given(st.sampled_from(LEVELS), SEEDS, SDS, SHIFTS, st.integers(1, 8))
def test_a_mirrored_run_is_better_where_the_other_is_worse(name: str, seed: int, sd: float, shift: float, count: int) -> None:
    before, now = drawn(seed, 8, sd=sd)[name], drawn(seed + 1, count, sd=sd, shift=shift)[name]
    turned = "higher" if BY_NAME[name].better == "lower" else "lower"
    one, other = comparison(name, before).decide(now), comparison(name, before, better=turned).decide(now)
    assert other.estimate == pytest.approx(-one.estimate, abs=1e-6)
    assert other.se == pytest.approx(one.se)
    assert {one.outcome, other.outcome} != {"regressed"}


# ------------------------------------------------------------------------------------------------ shifts


def outcome_rank(outcome: str) -> int:
    return {"improved": 0, "pass": 1, "more": 2, "inconclusive": 2, "regressed": 3}[outcome]


@many
@given(st.sampled_from(LEVELS), SEEDS, SDS, SHIFTS, st.integers(1, 8), st.lists(st.floats(1.0, 1.3), min_size=1, max_size=5))
def test_at_each_look_a_worse_run_is_never_judged_better(
    name: str, seed: int, sd: float, shift: float, count: int, steps: list[float]
) -> None:
    one, now = comparison(name, drawn(seed, 8, sd=sd)[name]), drawn(seed + 1, count, sd=sd, shift=shift)[name]
    sign = 1 if BY_NAME[name].better == "lower" else -1
    factors = np.cumprod([1.0, *steps]) ** sign
    ranks = [outcome_rank(one.decide([[x * factor for x in launch] for launch in now]).outcome) for factor in factors]
    assert ranks == sorted(ranks)


@many
@given(st.sampled_from(EXACT), st.lists(st.floats(3000, 5000), min_size=1, max_size=8), st.lists(st.floats(0.9, 1.0), max_size=5))
def test_at_each_look_less_capacity_or_more_memory_is_never_judged_better(
    name: str, now: list[float], steps: list[float]
) -> None:
    one = comparison(name, [[4096.0]] * 5)
    factors = np.cumprod([1.0, *steps]) ** (1 if BY_NAME[name].better == "higher" else -1)
    ranks = [outcome_rank(one.decide([[x * factor] for x in now]).outcome) for factor in factors]
    assert ranks == sorted(ranks)


@many
@given(SEEDS, st.integers(0, 300), st.integers(0, 300), st.integers(1, 8), st.lists(st.floats(1.0, 3.0), min_size=1, max_size=5))
def test_at_each_look_more_events_in_proportion_are_never_judged_better(
    seed: int, before: int, now: int, count: int, steps: list[float]
) -> None:
    rng = np.random.default_rng(seed)
    one = comparison("preemptions", rng.poisson(before, (5, 5)).astype(float).tolist())
    drawn_now = rng.poisson(now, (count, 5))
    ranks = [
        outcome_rank(one.decide(np.ceil(drawn_now * factor).tolist()).outcome) for factor in np.cumprod([1.0, *steps])
    ]  # fmt: skip
    assert all(max(later, 1) >= max(earlier, 1) for earlier, later in pairwise(ranks))


@some
@given(SEEDS, SDS, SHIFTS, st.integers(1, 8), st.lists(st.floats(0, 20), min_size=1, max_size=4))
def test_a_run_that_is_worse_never_gets_a_better_verdict(
    seed: int, sd: float, shift: float, count: int, steps: list[float]
) -> None:
    # PASS and IMPROVED are alike here, because the first decision stands: see the next test.
    before = drawn(seed, 8, sd=sd)
    verdicts = [judged(before, drawn(seed + 1, count, sd=sd, shift=worse)) for worse in np.cumsum([shift, *steps])]
    for better, worse in pairwise(verdicts):
        assert RANK[worse.status] >= RANK[better.status]
        for one, other in zip(better.metrics, worse.metrics, strict=True):
            if one.metric not in GATED:
                continue
            assert one.status is not None
            assert other.status is not None
            assert RANK[other.status] >= RANK[one.status]


def test_a_better_run_may_pass_before_its_improvement_shows() -> None:
    # Both are the same launches but for 6 %: the better run's first one already passes, the other needs the second.
    spread = np.random.default_rng(1).normal(0, 1, 20)
    spread = (spread - spread.mean()) / spread.std(ddof=1) * 3
    before = [[float(x)] for x in np.exp(spread / 100)]
    one = Comparison(BY_NAME["startup_s"], before, Tolerance(0.05), stats.Design(comparisons=6), Belief(stats.Prior(9.0, 50.0)))
    now = [[math.exp(-0.09)], [math.exp(-0.36)]]
    slower = [[x * math.exp(0.06)] for (x,) in now]
    assert [one.decide(now[:look]).outcome for look in (1, 2)] == ["pass", "improved"]
    assert [one.decide(slower[:look]).outcome for look in (1, 2)] == ["more", "improved"]


# ------------------------------------------------------------------------------------------------ whatever is reported

ODD = [None, math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0, 1e-15, 0.5, 29.0, 4096.0, 1e15]
odd_values = st.sampled_from(ODD) | st.floats(1e-15, 1e15) | st.integers(0, 1000).map(float)
odd_launches = st.lists(st.lists(odd_values, max_size=5), max_size=4)
odd_measurements = st.dictionaries(st.sampled_from([*BY_NAME]), odd_launches, max_size=len(BY_NAME))


@settings(deadline=None, max_examples=150, report_multiple_bugs=False)
@given(odd_measurements, odd_measurements, st.booleans())
def test_whatever_is_reported_there_is_a_verdict(
    before: dict[str, list[list[float | None]]], now: dict[str, list[list[float | None]]], by_default: bool
) -> None:
    gated = gates(tolerance=0.05) if by_default else GATED
    verdict = judged(before, now, gated=gated)
    if not launches(now):
        assert verdict.status is Status.INVALID
        return
    assert len(verdict.metrics) == len(METRICS)
    found = statuses(verdict)
    assert not any(found[name] for name in BY_NAME if name not in gated)
    for name in gated:
        sides = [noise.values(BY_NAME[name], launches(side)) for side in (before, now)]
        if not all(all(side) for side in sides):
            # A metric that is missing in a launch of either side is never green; it is observed where nobody asked for it.
            assert found[name] is (Status.NOT_COMPARABLE if gated[name].asked or any(sides[0]) else None)
    if not any(found.values()) or Status.NOT_COMPARABLE in found.values():
        assert not verdict.status.green


@settings(deadline=None, max_examples=60, report_multiple_bugs=False)
@given(odd_measurements)
def test_whatever_was_recorded_it_can_be_calibrated_and_looked_ahead(before: dict[str, list[list[float | None]]]) -> None:
    baseline = stored(before)
    for one in prospects(baseline, GATED, DESIGN, {}):
        assert one.detectable is None or one.detectable > 0
        assert one.launches_needed is None or one.launches_needed >= 2
    rows = calibrated(observed(baseline.launches, None), baseline, GATED, DESIGN)
    assert [row.metric for row in rows] == [*BY_NAME]


def test_launches_400_orders_of_magnitude_apart_have_a_verdict() -> None:
    judged({"ttft_p50_s": [[1e-200], [1e200]]}, {"ttft_p50_s": [[1.0]]})


def test_a_value_that_is_nought_against_the_baseline_has_a_verdict() -> None:
    judged({"ttft_p50_s": [[3.0]]}, {"ttft_p50_s": [[5e-324]]})


def test_a_count_beyond_64_bits_has_a_verdict() -> None:
    judged({"preemptions": [[1.0], [1.0]]}, {"preemptions": [[1e19]]})


bad = st.sampled_from([math.nan, math.inf, -math.inf])


@some
@given(st.sampled_from([*GATED]), bad, st.booleans(), SEEDS)
def test_what_is_no_number_is_never_green(name: str, value: float, in_the_run: bool, seed: int) -> None:
    sound, odd = drawn(seed, 5), drawn(seed, 5)
    odd[name] = [[value] * len(one) for one in odd[name]]
    verdict = judged(sound, odd) if in_the_run else judged(odd, sound)
    assert statuses(verdict)[name] is Status.NOT_COMPARABLE
    assert not verdict.status.green


@some
@given(st.sampled_from([*LEVELS, *EXACT]), st.floats(20.5, 1e6), st.integers(1, 5), SEEDS)
def test_what_got_more_than_20_times_better_has_another_unit(name: str, factor: float, count: int, seed: int) -> None:
    before, now = drawn(seed, 8, sd=0.2), drawn(seed + 1, count, sd=0.2)
    better = scaled(now, {name: 1 / factor if BY_NAME[name].better == "lower" else factor})
    verdict = judged(before, better)
    assert statuses(verdict)[name] is Status.NOT_COMPARABLE
    assert "unit" in next(row.rule for row in verdict.metrics if row.metric == name)
    assert not verdict.status.green


@some
@given(st.sampled_from([*LEVELS, *EXACT]), st.floats(1.1, 19.0), st.integers(1, 5), SEEDS)
def test_what_got_up_to_19_times_better_is_green(name: str, factor: float, count: int, seed: int) -> None:
    before, now = drawn(seed, 8, sd=0.2), drawn(seed + 1, count, sd=0.2)
    verdict = judged(before, scaled(now, {name: 1 / factor if BY_NAME[name].better == "lower" else factor}))
    status = statuses(verdict)[name]
    assert status is not None
    assert status.green


@some
@given(st.sampled_from([*LEVELS, *EXACT]), st.floats(20.5, 1e6), SEEDS)
def test_what_got_many_times_worse_is_regressed_and_not_another_unit(name: str, factor: float, seed: int) -> None:
    before, now = drawn(seed, 8, sd=0.2), drawn(seed + 1, 2, sd=0.2)
    verdict = judged(before, scaled(now, {name: factor if BY_NAME[name].better == "lower" else 1 / factor}))
    assert statuses(verdict)[name] is Status.REGRESSED
    assert verdict.status is Status.REGRESSED


def test_counts_of_none_after_many_are_an_improvement_and_no_other_unit() -> None:
    before, now = drawn(1, 8), drawn(2, 3)
    now["preemptions"] = [[0.0] * 5] * 3
    assert statuses(judged(before, now))["preemptions"] in (Status.PASS, Status.IMPROVED)
