"""Metrics that are no rows of the table: any percentile of a latency, and any counter of the engine."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_llmperf.judge import baseline as store
from pytest_llmperf.judge.gates import Tolerance, gates, judged
from pytest_llmperf.judge.maths.stats import Design
from pytest_llmperf.judge.provenance import Provenance
from pytest_llmperf.judge.scaling import Curve, choose, measured_points
from pytest_llmperf.judge.selftest import self_test
from pytest_llmperf.judge.verdict import Status, Verdict, judge, observed
from pytest_llmperf.measure import samples
from pytest_llmperf.measure.client.response import RequestRecord
from pytest_llmperf.measure.formulas import LaunchSample
from pytest_llmperf.measure.kv_cache import Capacity
from pytest_llmperf.measure.measurement import Launch, Measurement, Round
from pytest_llmperf.measure.metric import SAMPLED
from pytest_llmperf.measure.metrics import BY_NAME, find, is_metric, launch_metrics
from pytest_llmperf.plan.case import Case
from pytest_llmperf.plan.checks import PlanError
from pytest_llmperf.plan.engine import EngineSpec
from pytest_llmperf.plan.gates import parse_gate
from pytest_llmperf.plan.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Sequence

ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"
PREEMPTED = "vllm:num_preemptions_total"


def answered(ttft_s: float) -> RequestRecord:
    return RequestRecord(1.0, (1.0 + ttft_s, 2.0 + ttft_s), 3.0 + ttft_s, 4, 2)


def launch(ttfts: Sequence[float] = (), counters: Sequence[dict[str, float]] = ({},), classes: Sequence[str] = ()) -> Launch:
    """Return a launch of requests with these TTFTs, and of rounds with these counters."""
    sample = LaunchSample(None, Capacity(), tuple(map(answered, ttfts)), tuple(classes))
    rounds = tuple(Round({"output_tokens_per_s": 100.0}, dict(each)) for each in counters)
    return Launch("l", "", rounds, launch_metrics(sample), samples=samples.kept_samples(sample))


def measured(*launches: Launch) -> Measurement:
    return Measurement(Case("test_x.py::test_x", EngineSpec(), Workload()), launches)


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    "name",
    ["ttft_p95_s", "itl_p99.9_s", "e2e_max_s", "tpot_min_s", "ttft_std_s", "send_delay_p50_s", "ttft_from_send_p95_s",
     "e2e_p1_s", "itl_p0.1_s", "short/ttft_p95_s", "ttft_p99.999_s"],
)  # fmt: skip
def test_every_latency_has_any_percentile_by_its_name(name: str) -> None:
    metric = find(name)
    assert (metric.name, metric.unit, metric.better, metric.kind, metric.gating) == (name, "s", "lower", "tail", False)


@pytest.mark.parametrize(
    "name",
    ["ttft_p0_s", "ttft_p100_s", "ttft_p095_s", "ttft_p95.0_s", "ttft_p_s", "ttft_p95", "p95_s", "ttft_p-5_s", "ttft_p1e1_s",
     "ttft_median_s", "gpu_power_p95_w", "speed_p95_s", "send_delay_p95_ms", "/ttft_p95_s", "short/send_delay_p95_s",
     "short/vllm:x_total", "vllm:", ":", "a b:c", "preemptions_total", "speed", "", "tgi"],
)  # fmt: skip
def test_what_is_no_percentile_and_no_counter_is_no_metric(name: str) -> None:
    assert not is_metric(name)
    assert not hasattr(measured(launch([0.1])), name)


@pytest.mark.parametrize(
    "name",
    [
        ACCEPTED,
        "sglang:num_retracted_requests_total",
        "tgi_request_count",
        "trtllm_request_success_total",
        "ray_vllm_num_preemptions_total",
        "vllm:iteration_tokens_total_sum",
        "process_cpu_seconds_total",
        "other:requests",
    ],
)
def test_a_name_that_only_a_server_has_is_a_counter(name: str) -> None:
    metric = find(name)
    assert (metric.better, metric.kind, metric.gating, metric.tolerance) == ("lower", "count", False, 0.5)


@pytest.mark.parametrize(
    ("name", "tolerance"), [("ttft_p75_s", 0.08), ("ttft_p90_s", 0.08), ("ttft_p95_s", 0.1), ("ttft_p99.9_s", 0.15)]
)
def test_a_tail_further_out_gates_with_a_larger_tolerance(name: str, tolerance: float) -> None:
    assert find(name).tolerance == tolerance


# ------------------------------------------------------------------------------------------------ values

TTFTS = st.lists(st.floats(1e-4, 100), min_size=1, max_size=50)


@settings(deadline=None)
@given(TTFTS, st.floats(0.1, 99.9).map(lambda percent: float(f"{percent:.3g}")))
def test_a_percentile_is_that_of_all_requests_of_a_launch(ttfts: list[float], percent: float) -> None:
    name = f"ttft_p{percent:.8g}_s"
    wanted = np.percentile([record.token_times_s[0] - 1.0 for record in map(answered, ttfts)], percent)
    assert measured(launch(ttfts))[name] == pytest.approx(wanted, rel=1e-5, abs=1e-9)


@settings(deadline=None)
@given(TTFTS)
def test_a_percentile_by_name_agrees_with_that_of_the_table(ttfts: list[float]) -> None:
    one = launch(ttfts)
    for name in ("ttft_p90_s", "ttft_p99_s"):
        assert samples.of_samples(one.samples, name) == pytest.approx(one.metrics[name], rel=1e-5, abs=1e-9)


@settings(deadline=None)
@given(TTFTS)
def test_percentiles_are_between_the_least_and_the_largest(ttfts: list[float]) -> None:
    one = measured(launch(ttfts))
    assert one["ttft_min_s"] <= one["ttft_p5_s"] <= one["ttft_p95_s"] <= one["ttft_p99.9_s"] <= one["ttft_max_s"]


def test_extremes_and_deviation_have_names_too() -> None:
    one = measured(launch([0.1, 0.2, 0.3]))
    assert (one["ttft_min_s"], one.ttft_max_s, one["ttft_std_s"]) == pytest.approx((0.1, 0.3, np.std([0.1, 0.2, 0.3])), rel=1e-5)


def test_of_several_launches_it_is_the_median() -> None:
    assert measured(launch([0.1] * 9), launch([0.3] * 9), launch([0.2] * 9)).ttft_p95_s == pytest.approx(0.2)


def test_a_class_has_percentiles_of_its_own() -> None:
    one = measured(launch([0.1, 0.5, 0.5], classes=["short", "long", "long"]))
    assert (one["short/ttft_p95_s"], one["long/ttft_p95_s"]) == pytest.approx((0.1, 0.5))
    with pytest.raises(KeyError, match="'other/ttft_p95_s' was not measured"):
        one["other/ttft_p95_s"]


def test_a_latency_that_nobody_had_has_no_percentile() -> None:
    assert not hasattr(measured(launch()), "ttft_p95_s")
    assert not hasattr(measured(launch([0.1])), "ttft_from_send_p95_s")  # in a closed loop


def test_very_many_samples_are_kept_as_quantiles(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(7).lognormal(size=5000)
    monkeypatch.setattr(samples, "MOST_SAMPLES", 1001)
    one = launch(values)
    assert len(one.samples["ttft"]) == 4 * 1001
    for percent in (5, 50, 95, 99):
        assert measured(one)[f"ttft_p{percent}_s"] == pytest.approx(float(np.percentile(values, percent)), rel=0.01)
    assert measured(one)["ttft_max_s"] == pytest.approx(values.max(), rel=1e-5)


def test_a_median_by_rounds_is_not_taken_from_the_samples() -> None:
    one = replace(launch([0.1, 0.9]), rounds=(Round({"ttft_p50_s": 0.25}),))
    assert measured(one)["ttft_p50_s"] == 0.25


# ------------------------------------------------------------------------------------------------ counters


def test_a_counter_by_name_is_the_median_of_its_growth_in_rounds() -> None:
    one = measured(launch(counters=[{ACCEPTED: 100.0}, {ACCEPTED: 120.0}, {ACCEPTED: 110.0}]))
    assert one[ACCEPTED] == one[ACCEPTED.removesuffix("_total")] == 110


def test_a_counter_of_any_name_that_was_scraped_can_be_read() -> None:
    assert measured(launch(counters=[{"my_requests_total": 8.0}]))["my_requests_total"] == 8


@pytest.mark.parametrize(
    ("name", "counters", "message"),
    [
        ("vllm:num_requests_running", {"vllm:num_requests_total": 1.0}, "no counter that this engine tells; .* vllm:num_req"),
        (ACCEPTED, {}, "this engine tells no counters, or they are not believed"),
        ("speed", {ACCEPTED: 1.0}, "'speed' is not a metric; known are output_tokens_per_s"),
        ("preemptions", {ACCEPTED: 1.0}, "'preemptions' was not measured by this engine"),
    ],
)  # fmt: skip
def test_a_missing_counter_says_what_is_there(name: str, counters: dict[str, float], message: str) -> None:
    with pytest.raises(KeyError, match=message):
        measured(launch(counters=[counters]))[name]


def test_a_metric_that_was_not_measured_is_no_attribute_and_no_key() -> None:
    one = measured(launch([0.1]))
    assert not hasattr(one, "preemptions")
    assert getattr(one, "preemptions", None) is None
    with pytest.raises(AttributeError, match="'preemptions' was not measured by this engine"):
        _ = one.preemptions
    with pytest.raises(KeyError, match="'preemptions' was not measured by this engine"):
        one["preemptions"]


# ------------------------------------------------------------------------------------------------ gates


def gated(source: object) -> dict[str, Tolerance]:
    return gates(parse_gate(source, origin="gate"), tolerance=0.05)


@pytest.mark.parametrize(
    ("source", "name", "tolerance"),
    [
        ({"ttft_p95_s": "12 %"}, "ttft_p95_s", Tolerance(0.12, asked=True)),
        ("ttft_p95_s=on", "ttft_p95_s", Tolerance(0.1, asked=True)),
        ("short/itl_p99.9_s=on", "short/itl_p99.9_s", Tolerance(0.15, asked=True)),
        ({PREEMPTED: "30 %"}, PREEMPTED, Tolerance(0.3, asked=True)),
        ({PREEMPTED: True}, PREEMPTED, Tolerance(0.5, asked=True)),
        ({PREEMPTED: "lower"}, PREEMPTED, Tolerance(0.5, asked=True)),
        ({PREEMPTED: "lower 20%"}, PREEMPTED, Tolerance(0.2, asked=True)),
        ({ACCEPTED: "higher 10 %"}, ACCEPTED, Tolerance(0.1, asked=True, better="higher")),
        (f"{ACCEPTED}=Higher 10%", ACCEPTED, Tolerance(0.1, asked=True, better="higher")),
        ({ACCEPTED: "higher"}, ACCEPTED, Tolerance(0.05, asked=True, better="higher")),
        ({"ttft_p50_s": "lower 3 %"}, "ttft_p50_s", Tolerance(0.03, asked=True)),
    ],
)
def test_a_gate_names_a_percentile_or_a_counter_and_its_direction(source: object, name: str, tolerance: Tolerance) -> None:
    assert gated(source)[name] == tolerance


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"ttft_p50_s": "higher 5 %"}, "gate: ttft_p50_s=higher: lower is better, and only a counter's gate can say it"),
        ({"output_tokens_per_s": "lower"}, "output_tokens_per_s=lower: higher is better"),
        ({ACCEPTED: "higher 500 %"}, "must be a share between 0 and 1"),
        ({ACCEPTED: "highest 5 %"}, "must be a share between 0 and 1"),
        ({"ttft_p100_s": "5 %"}, "'ttft_p100_s' is not a metric"),
    ],
)
def test_a_gate_that_cannot_be_meant_is_refused(source: object, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        gated(source)


def test_a_gate_on_a_counter_can_be_switched_off_again() -> None:
    assert PREEMPTED not in gated(f"{PREEMPTED}=30%,{PREEMPTED}=off")


def test_a_counter_of_which_more_is_better_is_a_ratio() -> None:
    metric = judged(ACCEPTED, Tolerance(0.1, asked=True, better="higher"))
    assert (metric.better, metric.kind) == ("higher", "ratio")
    assert judged(ACCEPTED, Tolerance(0.1, asked=True)).kind == judged(ACCEPTED, None).kind == "count"


# ------------------------------------------------------------------------------------------------ verdicts

DESIGN = Design(tolerance=0.05, comparisons=1, launches=6)


def stored(*launches: Launch, names: Sequence[str] = ()) -> store.Baseline:
    case = measured().case
    kept = tuple(each.keeping(names) for each in launches)
    return store.Baseline(
        case.id, "host", case.workload.description, case.workload.fingerprint, Provenance({}, {}, {}, None), kept
    )


def verdict(before: list[Launch], now: list[Launch], gate: object) -> Verdict:
    asked = gates(parse_gate({"*": False, **gate}, origin="gate"), tolerance=0.05)  # type: ignore[dict-item]
    return judge(measured(*now), stored(*before, names=tuple(asked)), design=DESIGN, gated=asked, beliefs={})


def counting(name: str, *launches: Sequence[float]) -> list[Launch]:
    return [launch(counters=[{name: float(value)} for value in rounds]) for rounds in launches]


CALM = ((1000, 1003), (1002, 998), (997, 1001), (1001, 1000))


@pytest.mark.parametrize(
    ("factor", "gate", "status"),
    [
        (1.0, "higher 10 %", Status.PASS),
        (0.7, "higher 10 %", Status.REGRESSED),
        (1.3, "higher 10 %", Status.IMPROVED),
        (1.0, "10 %", Status.PASS),
        (1.3, "10 %", Status.REGRESSED),
        (0.7, "10 %", Status.PASS),
    ],
)
def test_a_counter_is_judged_in_the_direction_that_its_gate_says(factor: float, gate: str, status: Status) -> None:
    before = counting(ACCEPTED, *CALM)
    now = counting(ACCEPTED, *([round(factor * value) for value in rounds] for rounds in CALM))
    result = verdict(before, now, {ACCEPTED: gate})
    [row] = [row for row in result.metrics if row.status]
    assert (row.metric, row.status, result.status) == (ACCEPTED, status, status)
    old, new = row.compared
    assert old is not None
    assert new is not None
    assert (new / old) == pytest.approx(factor, rel=0.01)


def test_preemptions_by_their_exported_name_are_judged_like_preemptions() -> None:
    before, now = ((20, 21), (22, 20), (19, 20), (20, 20)), ((40, 41), (39, 44), (42, 40), (41, 41))
    assert verdict(counting(PREEMPTED, *before), counting(PREEMPTED, *before), {PREEMPTED: "50 %"}).status is Status.PASS
    assert verdict(counting(PREEMPTED, *before), counting(PREEMPTED, *now), {PREEMPTED: "50 %"}).status is Status.REGRESSED


@pytest.mark.parametrize(("factor", "status"), [(1.0, Status.PASS), (1.5, Status.REGRESSED), (0.5, Status.IMPROVED)])
def test_a_counter_of_seconds_is_judged_as_a_ratio(factor: float, status: Status) -> None:
    name, calm = "vllm:request_queue_time_seconds_sum", [[value / 700 for value in rounds] for rounds in CALM]
    now = counting(name, *([factor * value for value in rounds] for rounds in calm))
    assert verdict(counting(name, *calm), now, {name: "20 %"}).status is status


def test_a_counter_that_the_baseline_lacks_is_not_comparable() -> None:
    result = verdict([launch()] * 3, counting(ACCEPTED, *CALM), {ACCEPTED: "10 %"})
    [row] = [row for row in result.metrics if row.status]
    assert (row.status, row.rule) == (Status.NOT_COMPARABLE, "not measured in the baseline")


def slow(factor: float, count: int = 400) -> list[Launch]:
    drawn = np.random.default_rng(3).lognormal(-2, 0.1, (4, count)) * factor
    return [launch([float(value) for value in rounds]) for rounds in drawn]


@pytest.mark.parametrize(("factor", "status"), [(1.0, Status.PASS), (1.5, Status.REGRESSED), (0.5, Status.IMPROVED)])
def test_a_percentile_by_name_is_judged_as_a_tail(factor: float, status: Status) -> None:
    now = [replace(each, rounds=each.rounds * 20) for each in slow(factor)]
    before = [replace(each, rounds=each.rounds * 20) for each in slow(1.0)]
    assert verdict(before, now, {"ttft_p95_s": "20 %"}).status is status


def test_a_percentile_of_too_few_requests_is_not_comparable() -> None:
    result = verdict(slow(1.0), slow(1.0), {"ttft_p95_s": "20 %"})
    assert "a launch has 1.6 values beyond it, 10 are needed" in next(row.rule for row in result.metrics if row.status)


@pytest.mark.parametrize("name", ["ttft_max_s", "ttft_min_s"])
def test_no_value_is_beyond_an_extreme_so_it_cannot_gate(name: str) -> None:
    result = verdict(slow(1.0), slow(1.0), {name: "20 %"})
    assert "a launch has 0 values beyond it" in next(row.rule for row in result.metrics if row.status)


@pytest.mark.parametrize("better", ["higher 10 %", "10 %"])
def test_the_self_test_finds_no_fault_in_a_gate_on_a_counter(better: str) -> None:
    asked = gates(parse_gate({"*": False, ACCEPTED: better}, origin="gate"), tolerance=0.05)
    checks = self_test(stored(*counting(ACCEPTED, *CALM), names=[ACCEPTED]), asked, DESIGN, {})
    assert [check for check in checks if check.fault] == []
    assert any(check.status is Status.REGRESSED for check in checks)


# ------------------------------------------------------------------------------------------------ what is stored


def test_a_baseline_has_only_the_percentiles_and_counters_that_gate() -> None:
    one = launch([0.1, 0.2], counters=[{ACCEPTED: 5.0, PREEMPTED: 1.0}, {ACCEPTED: 6.0, PREEMPTED: 2.0}])
    text = store.dump(stored(one, names=["ttft_p95_s", ACCEPTED, "ttft_p90_s"]))
    data = json.loads(text)["launches"][0]
    assert data["metrics"]["ttft_p95_s"] == pytest.approx(0.195)
    assert [each["metrics"].get(ACCEPTED) for each in data["rounds"]] == [5, 6]
    assert PREEMPTED not in text
    assert "samples" not in text
    assert "counters" not in text


def test_a_stored_launch_answers_as_it_was_measured(tmp_path_factory: pytest.TempPathFactory) -> None:
    one = launch([0.1, 0.2], counters=[{ACCEPTED: 5.0}])
    path = tmp_path_factory.mktemp("stored") / "x.json"
    store.save(path, stored(one, names=["ttft_p95_s", ACCEPTED]))
    again = store.load(path)
    assert again is not None
    for name in ("ttft_p95_s", ACCEPTED, "ttft_p90_s", "output_tokens_per_s"):
        assert again.launches[0].values(name) == one.values(name)
    assert again.launches[0].values(PREEMPTED) == [None]


def test_what_gates_by_name_is_a_row_also_where_nothing_is_judged() -> None:
    one = launch([0.1, 0.2], counters=[{ACCEPTED: 5.0}])
    rows = {row.metric: row.measured for row in observed([one], None, gated({"ttft_p95_s": "9 %", ACCEPTED: "higher"}))}
    assert (rows["ttft_p95_s"], rows[ACCEPTED]) == (pytest.approx(0.195), 5)
    assert rows.keys() == BY_NAME.keys() | {"ttft_p95_s", ACCEPTED}


def test_a_limit_on_a_percentile_by_name_chooses_a_degree() -> None:
    def at(tp: int, ttft_s: float, speed: float) -> Measurement:
        one = replace(launch([ttft_s] * 4), rounds=(Round({"output_tokens_per_s": speed}),))
        return Measurement(Case("x", EngineSpec(tp=tp), Workload()), (one,))

    points = Curve(measured_points([at(1, 0.4, 100.0), at(2, 0.1, 150.0)]))
    choice = choose(points, {"ttft_p95_s": 0.2})
    assert choice.chosen is not None
    assert choice.chosen.degree == 2


def test_all_latencies_with_samples_have_a_row_or_a_name() -> None:
    assert {name.split("_p")[0] for name in BY_NAME if "_p50_s" in name} | {"send_delay"} == set(SAMPLED)
