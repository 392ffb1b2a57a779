"""The verdict: what is red, what is green, and that what cannot be compared is neither."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_llmperf.judge import noise
from pytest_llmperf.judge.baseline import Baseline
from pytest_llmperf.judge.calibration import calibrated, noise_of
from pytest_llmperf.judge.comparison import Comparison, prospects
from pytest_llmperf.judge.gates import Tolerance, gates
from pytest_llmperf.judge.maths import stats
from pytest_llmperf.judge.provenance import Provenance
from pytest_llmperf.judge.verdict import Status, Verdict, judge, not_comparable, observed
from pytest_llmperf.measure.measurement import Launch, Measurement, Round
from pytest_llmperf.measure.metrics import BY_NAME, FORMULAS, GATING, METRICS
from pytest_llmperf.plan.case import Case
from pytest_llmperf.plan.engine import EngineSpec
from pytest_llmperf.plan.gates import parse_gate
from pytest_llmperf.plan.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_llmperf.judge.noise import Belief
    from pytest_llmperf.judge.verdict import MetricVerdict

BY_UNIT = {"s": 0.05, "tokens/s": 1000.0, "requests/s": 10.0, "tokens": 4096.0, "share": 0.5}

USUAL: dict[str, float | None] = {
    **{metric.name: None if metric.start == "cold" else BY_UNIT.get(metric.unit, 8.0) for metric in METRICS},
    "failed_requests": 0.0,
    "preemptions": 29.0,
}
"""A sound engine's value of every metric; its starts are warm."""

OF_ROUND = {metric.name for metric in METRICS if metric.of_round}
DESIGN = stats.Design(comparisons=len(GATING))
JITTER = (0.998, 1.0, 1.002, 0.999, 1.001)
"""Rounds differ by 0.2 %, as on a quiet GPU."""


def launch(values: dict[str, float | None], *, factor: float = 1.0, invalid: tuple[str, ...] = ()) -> Launch:
    """Return a launch of five rounds; `factor` is the launch's own noise, which counts and exact metrics don't have."""

    def noisy(name: str, value: float | None, jitter: float) -> float | None:
        return value * factor * jitter if value is not None and BY_NAME[name].kind in noise.RATIOS else value

    return Launch(
        id="l",
        started="2026-11-21T08:00:00+00:00",
        rounds=tuple(Round({name: noisy(name, values[name], jitter) for name in OF_ROUND & values.keys()}) for jitter in JITTER),
        metrics={name: noisy(name, value, 1.0) for name, value in values.items() if name not in OF_ROUND},
        invalid=invalid,
    )


def stored(values: dict[str, float | None] | None = None, launches: int = 3, workload: Workload | None = None) -> Baseline:
    workload = workload or Workload()
    return Baseline(
        case_id="test_a.py::test_x",
        host="nvidia-h200",
        workload=workload.description,
        workload_fingerprint=workload.fingerprint,
        provenance=Provenance({}),
        launches=tuple(launch(values or USUAL, factor=1 + 0.001 * (n - 1)) for n in range(launches)),
    )


def measurement(*launches: Launch, workload: Workload | None = None) -> Measurement:
    return Measurement(Case("test_a.py::test_x", EngineSpec(), workload or Workload()), launches)


def shuffled(seed: int) -> Baseline:
    """Return a baseline of another engine: as noisy, but its launches are not slow and fast at the same times."""
    baseline = stored(launches=5)
    return replace(baseline, provenance=Provenance({"n": seed}), launches=tuple(random.Random(seed).sample(baseline.launches, 5)))


QUIET = {name: belief for (_, name), belief in noise.beliefs(map(shuffled, range(20))).items()}
"""The noise that a suite of such baselines shows; the shipped belief is of 2 to 3 % and passes nothing in two launches."""


SHIPPED: dict[str, Belief] = {}
"""Nothing is known of any metric but what the package believes of its class."""


def judged(
    values: dict[str, float | None],
    launches: int = 2,
    *,
    baseline: Baseline | None = None,
    design: stats.Design = DESIGN,
    beliefs: Mapping[str, Belief] = QUIET,
    gate: str | None = None,
    workload: Workload | None = None,
) -> Verdict:
    """Return the verdict on launches with these values against a baseline, by default of the usual ones."""
    now = measurement(*(launch(values, factor=1 + 0.001 * (n % 2)) for n in range(launches)), workload=workload)
    gated = None if gate is None else gating(gate)
    return judge(now, baseline or stored(workload=workload), design=design, gated=gated, beliefs=beliefs)


def gating(gate: str) -> dict[str, Tolerance]:
    return gates(parse_gate(gate, origin="gate"), tolerance=DESIGN.tolerance)


def row_of(verdict: Verdict, name: str) -> MetricVerdict:
    return next(row for row in verdict.metrics if row.metric == name)


def worse(name: str, share: float) -> dict[str, float | None]:
    """Return the usual values with one metric worse by a share in its own direction, or by as many events for a count."""
    value = USUAL[name]
    assert value is not None
    if BY_NAME[name].kind == "count":
        return {**USUAL, name: value + 60 * share}
    return {**USUAL, name: value * (1 + share) if BY_NAME[name].better == "lower" else value / (1 + share)}


def slower(factor: float) -> dict[str, float | None]:
    """Return the usual values of an engine that is slower by a factor in everything that has to do with time."""
    changed = dict(USUAL)
    for metric in METRICS:
        value = changed[metric.name]
        if metric.unit == "s" and value is not None:
            changed[metric.name] = value * factor
        elif metric.unit.endswith("/s") and value is not None:
            changed[metric.name] = value / factor
    return changed


def statuses(verdict: Verdict, status: Status) -> set[str]:
    return {row.metric for row in verdict.metrics if row.status is status}


# ------------------------------------------------------------------------------------------------ every status


def test_an_engine_like_the_baselines_passes_on_every_gating_metric() -> None:
    verdict = judged(USUAL)
    assert verdict.status is Status.PASS
    assert statuses(verdict, Status.PASS) == set(GATING)
    assert (verdict.launches, verdict.baseline_launches, verdict.reasons) == (2, 3, ())


@pytest.mark.parametrize("beliefs", [QUIET, SHIPPED], ids=["fitted", "shipped"])
def test_an_engine_half_as_fast_is_regressed_by_two_launches_against_three(beliefs: Mapping[str, Belief]) -> None:
    verdict = judged(slower(2.0), beliefs=beliefs)
    assert verdict.status is Status.REGRESSED
    assert statuses(verdict, Status.REGRESSED) == {"output_tokens_per_s", "ttft_p50_s", "tpot_p50_s", "e2e_p50_s"}


def test_an_engine_twice_as_fast_passes_by_its_first_launch() -> None:
    # A pass needs one launch, an improvement two: the first decision stands.
    verdict = judged(slower(0.5))
    assert verdict.status in (Status.PASS, Status.IMPROVED)
    assert not statuses(verdict, Status.REGRESSED)


def test_one_launch_of_an_engine_half_as_fast_is_undecided() -> None:
    assert judged(slower(2.0), launches=1).status is Status.UNDECIDED


def test_one_launch_like_the_baselines_is_enough_to_pass() -> None:
    assert judged(USUAL, 1).status is Status.PASS


def test_a_slow_down_near_the_tolerance_ends_inconclusive() -> None:
    design = replace(DESIGN, launches=3)
    assert judged(slower(1.05), 2, design=design, beliefs=SHIPPED).status is Status.UNDECIDED
    assert judged(slower(1.05), 3, design=design, beliefs=SHIPPED).status is Status.INCONCLUSIVE


def test_without_a_baseline_there_are_numbers_and_no_verdict() -> None:
    verdict = judge(measurement(launch(USUAL)), None, design=DESIGN, beliefs=SHIPPED)
    assert verdict.status is Status.NO_BASELINE
    assert {row.status for row in verdict.metrics} == {None}
    assert {row.metric: row.measured for row in verdict.metrics} == pytest.approx(USUAL)


def test_an_invalid_launch_is_invalid_whatever_its_numbers_and_says_why() -> None:
    bad = launch(USUAL, invalid=("1 of 32 requests failed",))
    verdict = judge(measurement(launch(USUAL), bad, bad), stored(), design=DESIGN, beliefs=SHIPPED)
    assert verdict == Verdict(Status.INVALID, reasons=("1 of 32 requests failed",), launches=3)


def test_an_invalid_launch_is_invalid_also_without_a_baseline() -> None:
    bad = launch(USUAL, invalid=("stalled",))
    assert judge(measurement(bad), None, design=DESIGN, beliefs=SHIPPED).status is Status.INVALID


def test_another_workload_is_not_comparable_and_says_what_changed() -> None:
    now = measurement(launch(USUAL), workload=Workload(prompt_tokens=512, requests=64))
    verdict = judge(now, stored(), design=DESIGN, beliefs=SHIPPED)
    assert verdict.status is Status.NOT_COMPARABLE
    assert verdict.reasons == (
        "the workload has changed: prompt_tokens 100 -> 512",
        "the workload has changed: requests 32 -> 64",
    )
    assert {row.status for row in verdict.metrics} == {None}


def test_a_fingerprint_that_no_field_explains_is_not_comparable_either() -> None:
    baseline = replace(stored(), workload_fingerprint="0" * 16)
    assert not_comparable(measurement(launch(USUAL)), baseline) == ("the workload has changed",)


def test_other_formulas_are_not_comparable() -> None:
    verdict = judged(USUAL, baseline=replace(stored(), formulas=FORMULAS + 1))
    assert verdict.status is Status.NOT_COMPARABLE
    assert verdict.reasons == (f"the formulas of metrics have changed: version {FORMULAS + 1} -> {FORMULAS}",)


def test_only_four_statuses_mean_that_numbers_were_compared() -> None:
    compared = {status for status in Status if status.compared}
    assert compared == {Status.PASS, Status.IMPROVED, Status.REGRESSED, Status.INCONCLUSIVE}


# ------------------------------------------------------------------------------------------------ a metric is missing


@pytest.mark.parametrize("name", GATING)
@pytest.mark.parametrize("how", ["None", "absent"])
def test_a_gating_metric_that_this_run_has_not_is_not_comparable(name: str, how: str) -> None:
    values = {**USUAL, name: None} if how == "None" else {other: USUAL[other] for other in USUAL if other != name}
    verdict = judged(values)
    assert verdict.status is Status.NOT_COMPARABLE
    assert statuses(verdict, Status.NOT_COMPARABLE) == {name}
    assert "not measured in this run" in {row.rule for row in verdict.metrics}


@pytest.mark.parametrize("name", GATING)
def test_a_metric_that_one_baseline_launch_lacks_is_not_comparable(name: str) -> None:
    baseline = stored()
    baseline = replace(baseline, launches=(*baseline.launches, launch({**USUAL, name: None})))
    verdict = judged(USUAL, baseline=baseline)
    assert statuses(verdict, Status.NOT_COMPARABLE) == {name}


@pytest.mark.parametrize("name", GATING)
def test_a_metric_that_the_baseline_never_had_is_only_observed(name: str) -> None:
    without = replace(stored({**USUAL, name: None}), lacking={name: "not measured"})
    verdict = judged(USUAL, baseline=without)
    row = next(row for row in verdict.metrics if row.metric == name)
    assert row.status is None
    assert row.measured == pytest.approx(USUAL[name], rel=0.01)
    assert verdict.status is Status.PASS


@pytest.mark.parametrize("name", GATING)
def test_a_gate_that_is_lost_without_a_word_is_not_comparable(name: str) -> None:
    verdict = judged(USUAL, baseline=replace(stored({**USUAL, name: None}), lacking={}))
    assert statuses(verdict, Status.NOT_COMPARABLE) == {name}
    assert verdict.status is Status.NOT_COMPARABLE


@pytest.mark.parametrize("name", GATING)
def test_an_older_file_lacks_what_it_names_with_null_values(name: str) -> None:
    verdict = judged(USUAL, baseline=stored({**USUAL, name: None}))
    lost = {name} & {"output_tokens_per_s", "e2e_p50_s"}
    assert statuses(verdict, Status.NOT_COMPARABLE) == lost
    assert verdict.status is (Status.NOT_COMPARABLE if lost else Status.PASS)


@pytest.mark.parametrize("name", GATING)
def test_an_older_file_that_does_not_even_name_a_gate_was_damaged(name: str) -> None:
    verdict = judged(USUAL, baseline=stored({of: value for of, value in USUAL.items() if of != name}))
    assert statuses(verdict, Status.NOT_COMPARABLE) == {name}


def test_a_baseline_with_doubts_is_no_evidence() -> None:
    verdict = judged(USUAL, baseline=replace(stored(), doubts=("it was edited by hand",)))
    assert verdict.status is Status.NOT_COMPARABLE
    assert verdict.reasons[0] == "it was edited by hand"
    assert "record it anew with --update-baselines" in verdict.reasons[-1]


def test_a_baseline_that_hides_a_slow_down_of_a_half_proves_nothing() -> None:
    wild = replace(stored(), launches=tuple(launch(slower(factor)) for factor in (1.0, 2.7, 2.7, 2.7, 2.7)))
    verdict = judged(slower(1.5), launches=8, baseline=wild, beliefs=SHIPPED)
    assert verdict.status is Status.INCONCLUSIVE
    assert verdict.reasons[0].startswith("this baseline cannot find 5 %: no less than ")


def test_a_regression_elsewhere_is_told_before_a_missing_metric() -> None:
    assert judged({**slower(2.0), "kv_cache_tokens": None}).status is Status.REGRESSED


def test_with_nothing_to_compare_nothing_has_passed() -> None:
    nothing: dict[str, float | None] = dict.fromkeys(USUAL)
    assert judged(nothing, baseline=stored(nothing)).status is Status.NOT_COMPARABLE


def test_a_measurement_without_launches_has_not_passed() -> None:
    verdict = judge(measurement(), stored(), design=DESIGN, beliefs=SHIPPED)
    assert not verdict.status.compared


def test_a_baseline_without_launches_is_passed_by_nothing() -> None:
    assert judged(USUAL, baseline=replace(stored(), launches=())).status is Status.NOT_COMPARABLE


# ------------------------------------------------------------------------------------------------ directions


@pytest.mark.parametrize("name", GATING)
def test_a_metric_that_alone_got_worse_is_the_one_that_is_regressed(name: str) -> None:
    verdict = judged(worse(name, 0.5), launches=4)
    assert verdict.status is Status.REGRESSED
    assert statuses(verdict, Status.REGRESSED) == {name}
    row = next(row for row in verdict.metrics if row.metric == name)
    assert row.worse is not None
    assert row.worse > 0


@pytest.mark.parametrize("name", [name for name in GATING if name != "failed_requests"])
def test_a_metric_that_alone_got_better_is_never_regressed(name: str) -> None:
    value = USUAL[name]
    assert value is not None
    better = value / 1.5 if BY_NAME[name].better == "lower" else value * 1.5
    verdict = judged({**USUAL, name: float(round(better)) if BY_NAME[name].kind == "count" else better}, launches=4)
    assert verdict.status in (Status.PASS, Status.IMPROVED)
    row = next(row for row in verdict.metrics if row.metric == name)
    assert row.worse is not None
    assert row.worse < 0


@pytest.mark.parametrize("metric", [metric for metric in METRICS if not metric.gating], ids=lambda metric: metric.name)
def test_an_observed_metric_decides_nothing(metric: object) -> None:
    name = metric.name  # type: ignore[attr-defined]
    verdict = judged({**USUAL, name: 1e6})
    assert verdict.status is Status.PASS
    assert next(row for row in verdict.metrics if row.metric == name).status is None


@pytest.mark.parametrize(
    ("name", "factor", "expected"),
    [("ttft_p50_s", 1.1, 0.1), ("ttft_p50_s", 0.9, -0.1), ("output_tokens_per_s", 0.9, 0.1), ("output_tokens_per_s", 1.1, -0.1)],
)
def test_a_change_is_a_share_of_the_baseline_and_plus_is_worse(name: str, factor: float, expected: float) -> None:
    value = USUAL[name]
    assert value is not None
    changed = {**USUAL, name: value * factor}
    for rows in (judged(changed).metrics, observed([launch(changed)], [launch(USUAL)])):
        assert next(row for row in rows if row.metric == name).worse == pytest.approx(expected, abs=0.002)


@pytest.mark.parametrize("name", ["output_tokens_per_s", "ttft_p50_s"])
def test_the_bounds_lie_around_the_change_in_the_metrics_own_direction(name: str) -> None:
    row = next(row for row in judged(worse(name, 0.5), launches=4).metrics if row.metric == name)
    assert row.worse_low is not None
    assert row.worse is not None
    assert row.worse_high is not None
    assert 0 < row.worse_low < row.worse < row.worse_high


# ------------------------------------------------------------------------------------------------ counts and capacity


def preemptions(before: Sequence[float], now: Sequence[float]) -> Status | None:
    """Return the status of preemptions, with the counts of a launch the same in each of its rounds."""
    baseline = replace(stored(), launches=tuple(launch({**USUAL, "preemptions": count}) for count in before))
    new = measurement(*(launch({**USUAL, "preemptions": count}) for count in now))
    verdict = judge(new, baseline, design=DESIGN, beliefs=SHIPPED)
    return next(row.status for row in verdict.metrics if row.metric == "preemptions")


def test_as_many_preemptions_as_before_pass() -> None:
    assert preemptions([29, 29, 29], [29, 29]) is Status.PASS


def test_twice_as_many_preemptions_are_regressed() -> None:
    assert preemptions([29, 29, 29], [60, 60]) is Status.REGRESSED


def test_preemptions_where_there_were_none_are_regressed() -> None:
    assert preemptions([0, 0, 0], [29, 29]) is Status.REGRESSED


def test_fewer_preemptions_are_no_regression() -> None:
    assert preemptions([60, 60, 60], [29, 29]) in (Status.PASS, Status.IMPROVED)


def test_one_launch_with_more_preemptions_is_undecided() -> None:
    assert preemptions([29, 29, 29], [60]) is Status.UNDECIDED


def test_a_kv_cache_smaller_by_one_block_is_regressed_in_two_launches() -> None:
    assert statuses(judged({**USUAL, "kv_cache_tokens": 3968.0}), Status.REGRESSED) == {"kv_cache_tokens"}


def test_a_smaller_kv_cache_in_one_launch_is_undecided() -> None:
    assert judged({**USUAL, "kv_cache_tokens": 3968.0}, 1).status is Status.UNDECIDED


# ------------------------------------------------------------------------------------------------ which metrics gate

MANY = Workload(requests=2000)
"""Enough for the tails of a launch."""


def test_a_metric_that_is_off_is_observed_and_decides_nothing() -> None:
    verdict = judged(worse("ttft_p50_s", 0.5), gate="ttft_p50_s=off")
    assert verdict.status is Status.PASS
    row = row_of(verdict, "ttft_p50_s")
    assert (row.status, row.tolerance) == (None, None)
    assert row.worse == pytest.approx(0.5, abs=0.01)


def test_without_a_gate_nothing_has_passed() -> None:
    assert judged(USUAL, gate="*=off").status is Status.NOT_COMPARABLE


def test_each_metric_is_held_against_its_own_tolerance() -> None:
    # 12 % is beyond 5 %, and within 30 %.
    values = worse("ttft_p50_s", 0.12)
    assert statuses(judged(values, 4), Status.REGRESSED) == {"ttft_p50_s"}
    lenient = judged(values, 4, gate="ttft_p50_s=30%")
    assert lenient.status is Status.PASS
    assert (row_of(lenient, "ttft_p50_s").tolerance, row_of(lenient, "e2e_p50_s").tolerance) == (0.3, 0.05)
    capacity = {**USUAL, "kv_cache_tokens": 3968.0}
    assert judged(capacity, gate="kv_cache_tokens=5%").status is Status.PASS


@pytest.mark.parametrize("name", [metric.name for metric in METRICS if metric.kind == "tail"])
def test_a_tail_that_was_asked_for_gates_with_its_own_tolerance(name: str) -> None:
    baseline, gate = stored(launches=12, workload=MANY), f"{name}=on"
    verdict = judged({**USUAL, name: 0.05 * 1.5}, 4, gate=gate, workload=MANY, baseline=baseline)
    assert statuses(verdict, Status.REGRESSED) == {name}
    assert row_of(verdict, name).tolerance == {"90": 0.08, "99": 0.15}[name[-4:-2]]
    assert judged(USUAL, 3, gate=gate, workload=MANY, baseline=baseline).status is Status.PASS


def test_a_tail_of_too_few_requests_is_not_comparable() -> None:
    verdict = judged(USUAL, gate="ttft_p99_s=on")
    assert statuses(verdict, Status.NOT_COMPARABLE) == {"ttft_p99_s"}
    assert row_of(verdict, "ttft_p99_s").rule == (
        "a launch has 1.6 values beyond it, 10 are needed; about 1,000 requests a launch would do"
    )
    assert verdict.status is Status.NOT_COMPARABLE


def test_the_launch_of_the_fewest_rounds_decides_whether_a_tail_has_enough() -> None:
    baseline = stored(workload=Workload(requests=50))
    short = replace(baseline.launches[0], rounds=baseline.launches[0].rounds[:1])
    baseline = replace(baseline, launches=(short, *baseline.launches[1:]))
    enough = judged(USUAL, gate="ttft_p90_s=on", workload=Workload(requests=50))
    assert row_of(enough, "ttft_p90_s").status is not Status.NOT_COMPARABLE
    few = judged(USUAL, gate="ttft_p90_s=on", workload=Workload(requests=50), baseline=baseline)
    assert row_of(few, "ttft_p90_s").status is Status.NOT_COMPARABLE


def test_an_asked_metric_that_the_baseline_never_had_is_not_comparable() -> None:
    verdict = judged(USUAL, baseline=stored({**USUAL, "startup_s": None}), gate="startup_s=on")
    assert row_of(verdict, "startup_s").rule == "not measured in the baseline"
    assert verdict.status is Status.NOT_COMPARABLE


# ------------------------------------------------------------------------------------------------ what a row tells


def test_a_row_has_what_can_be_detected_and_its_levels() -> None:
    verdict = judged(USUAL, 2)
    levelled = {row.metric for row in verdict.metrics if row.levels is not None}
    assert levelled == {name for name in GATING if BY_NAME[name].kind in noise.RATIOS}
    assert levelled == {row.metric for row in verdict.metrics if row.detectable is not None}
    row = row_of(verdict, "ttft_p50_s")
    assert row.levels is not None
    assert [len(side) for side in row.levels] == [3, 2]
    assert 0 < (row.detectable or 0) < 0.05


def test_levels_are_in_log_percent_and_plus_is_worse() -> None:
    for name in ("ttft_p50_s", "output_tokens_per_s"):
        levels = row_of(judged(worse(name, 0.5)), name).levels
        assert levels is not None
        before, now = levels
        assert sum(now) / len(now) - sum(before) / len(before) == pytest.approx(100 * math.log(1.5), abs=0.5)


def test_a_varying_exact_metric_is_judged_as_a_ratio() -> None:
    varying = tuple(launch({**USUAL, "kv_cache_tokens": tokens}) for tokens in (4096.0, 4000.0, 4200.0, 4150.0, 4050.0))
    row = row_of(judged(USUAL, baseline=replace(stored(), launches=varying)), "kv_cache_tokens")
    assert row.levels is not None
    assert row.status in (Status.UNDECIDED, Status.PASS)


def test_an_inconclusive_metric_says_how_many_launches_would_do() -> None:
    design = replace(DESIGN, launches=3)
    small = row_of(judged(slower(1.05), 3, design=design, beliefs=SHIPPED), "ttft_p50_s")
    assert small.status is Status.INCONCLUSIVE
    assert small.rule == "neither bound decides after 3 launches; the baseline needs more launches"
    large = row_of(
        judged(slower(1.04), 3, design=design, beliefs=SHIPPED, baseline=stored(launches=40), gate="ttft_p50_s=4%"), "ttft_p50_s"
    )
    assert large.status is Status.INCONCLUSIVE
    assert large.rule.startswith("neither bound decides after 3 launches; ")
    assert large.rule.endswith(" would most likely do")


# ------------------------------------------------------------------------------------------------ before and after


def test_the_prospects_are_the_gates_with_a_usable_baseline() -> None:
    found = prospects(stored({**USUAL, "preemptions": None, "ttft_p50_s": 0.0}), gating(""), DESIGN, QUIET)
    assert {one.metric.name for one in found} == set(GATING) - {"preemptions", "ttft_p50_s"}
    assert {one.metric.name for one in found if one.detectable is None} == {
        "failed_requests", "kv_cache_tokens", "gpu_memory_peak_bytes", "gpu_memory_balance_ratio",
    }  # fmt: skip


def test_a_prospect_is_what_the_verdict_then_tells() -> None:
    verdict = judged(USUAL, 2)
    for one in prospects(stored(), gating(""), DESIGN, QUIET):
        assert one.detectable == row_of(verdict, one.metric.name).detectable


def test_a_calibration_proposes_whole_percents_that_can_be_detected() -> None:
    recorded = stored(launches=10)
    rows = calibrated(observed(recorded.launches, None), recorded, gating("preemptions=on,startup_s=on"), DESIGN)
    told = noise_of(rows)
    assert set(told) == {*(name for name in GATING if BY_NAME[name].kind != "count"), "startup_s"}
    for row in rows:
        if row.detectable is None:
            assert row.tolerance is None
        else:
            assert row.tolerance is not None
            assert 100 * row.tolerance == pytest.approx(math.ceil(100 * row.detectable))
            assert told[row.metric]["proposed_tolerance"] == row.tolerance
    assert told["kv_cache_tokens"]["detectable"] is None
    assert told["ttft_p50_s"]["launches"] == 10


def test_without_gates_a_calibration_says_nothing() -> None:
    recorded = stored(launches=10)
    rows = observed(recorded.launches, None)
    assert calibrated(rows, recorded, {}, DESIGN) == rows
    assert noise_of(rows) == {}


def test_a_comparison_without_a_belief_has_the_shipped_one_of_its_class() -> None:
    levels = noise.values(BY_NAME["ttft_p50_s"], stored().launches)
    without = Comparison(BY_NAME["ttft_p50_s"], levels, Tolerance(0.05), DESIGN)
    shipped = replace(without, belief=noise.Belief(stats.PRIORS["quantile"]))
    assert without.detectable == shipped.detectable
    assert without.decide(levels[:2]) == shipped.decide(levels[:2])


# ------------------------------------------------------------------------------------------------ properties

kinds_of_values = st.sampled_from([None, 0.0, 29.0, -1.0, 1e-300, 0.5, math.nan, math.inf, -math.inf]) | st.floats(-1e12, 1e12)
any_values = st.fixed_dictionaries(dict.fromkeys(GATING, kinds_of_values)).map(lambda found: {**USUAL, **found})


@settings(deadline=None, max_examples=60, report_multiple_bugs=False)
@given(any_values, any_values, st.integers(1, 3), st.integers(1, 3))
def test_no_value_makes_the_judgement_fail(
    before: dict[str, float | None], now: dict[str, float | None], old: int, new: int
) -> None:
    verdict = judged(now, new, baseline=stored(before, old))
    noise.beliefs([stored(before, old)])
    assert len(verdict.metrics) == len(METRICS)


@pytest.mark.parametrize("name", GATING)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["baseline", "run"])
def test_a_value_that_is_no_measurement_never_passes(name: str, value: float, side: str) -> None:
    odd = {**USUAL, name: value}
    verdict = judged(odd if side == "run" else USUAL, baseline=stored(odd if side == "baseline" else USUAL))
    assert name not in statuses(verdict, Status.PASS) | statuses(verdict, Status.IMPROVED)
    assert verdict.status in (Status.NOT_COMPARABLE, Status.REGRESSED)


@pytest.mark.parametrize("name", [name for name in GATING if BY_NAME[name].kind in ("ratio", "quantile")])
def test_a_time_or_rate_of_nought_is_not_comparable(name: str) -> None:
    assert statuses(judged({**USUAL, name: 0.0}), Status.NOT_COMPARABLE) == {name}


counts = st.integers(0, 10_000).map(float)


@settings(deadline=None, max_examples=100)
@given(
    st.fixed_dictionaries({name: counts if BY_NAME[name].kind == "count" else st.floats(0, 1e6) for name in GATING}),
    st.integers(1, 6),
)
def test_one_launch_alone_is_never_regressed(found: dict[str, float], old: int) -> None:
    verdict = judged({**USUAL, **found}, 1, baseline=stored(launches=old))
    assert verdict.status is not Status.REGRESSED
    assert not statuses(verdict, Status.REGRESSED)


@settings(deadline=None, max_examples=60)
@given(st.floats(0.2, 5.0), st.integers(2, 4))
def test_a_verdict_once_made_stands_whatever_the_next_launches_bring(factor: float, more: int) -> None:
    first = judged(slower(factor), 2)
    if first.status is not Status.UNDECIDED:
        launches = [launch(slower(factor), factor=1 + 0.001 * (n % 2)) for n in range(2)]
        now = measurement(*launches, *(launch(slower(3.0)) for _ in range(more)))
        later = judge(now, stored(), design=DESIGN, beliefs=QUIET)
        assert {row.metric: row.status for row in later.metrics} == {row.metric: row.status for row in first.metrics}


@settings(deadline=None, max_examples=40)
@given(st.floats(1.0, 3.0), st.floats(1.0, 1.5))
def test_a_slower_engine_is_never_judged_better(factor: float, more: float) -> None:
    rank = [Status.IMPROVED, Status.PASS, Status.UNDECIDED, Status.INCONCLUSIVE, Status.REGRESSED]
    assert rank.index(judged(slower(factor * more)).status) >= rank.index(judged(slower(factor)).status)


def test_a_row_shows_the_values_that_its_change_is_of() -> None:
    decided_by_one, came_later = launch(USUAL), launch(slower(1.2))
    verdict = judge(measurement(decided_by_one, came_later), stored(), design=DESIGN, beliefs=QUIET)
    judged_by_levels = [row for row in verdict.metrics if row.levels]
    assert judged_by_levels
    for row in judged_by_levels:
        assert row.status is Status.PASS
        assert row.compared == pytest.approx((USUAL[row.metric], USUAL[row.metric]), rel=0.01)
        assert row.measured != pytest.approx(USUAL[row.metric], rel=0.05)


@settings(deadline=None, max_examples=60)
@given(st.floats(0.3, 3.0), st.integers(1, 3))
def test_the_change_of_a_row_is_that_between_the_values_it_shows(factor: float, launches: int) -> None:
    for row in judged(slower(factor), launches).metrics:
        before, now = row.compared
        if row.worse is not None and before and now:
            worse = now / before - 1 if BY_NAME[row.metric].better == "lower" else 1 - now / before
            assert row.worse == pytest.approx(worse, abs=1e-9)
