"""The metrics, from hand-made records whose answers can be told without them."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_llmperf.measure.client.response import RequestRecord
from pytest_llmperf.measure.formulas import LaunchSample, RoundSample
from pytest_llmperf.measure.kv_cache import Capacity
from pytest_llmperf.measure.metric import MIN_EXCEEDANCES, Metric
from pytest_llmperf.measure.metrics import (
    BY_NAME,
    GATING,
    METRICS,
    documentation,
    find,
    launch_metrics,
    round_metrics,
)
from pytest_llmperf.measure.telemetry import Telemetry
from pytest_llmperf.plan.arguments import workload_from
from pytest_llmperf.plan.axes import Axes
from pytest_llmperf.plan.workload import Workload

LATENCIES = ("ttft", "itl", "tpot", "e2e")
STATISTICS = ("mean", "p50", "p90", "p99")

A = RequestRecord(10.0, (10.1, 10.2, 10.4), 10.5, prompt_tokens=7, output_tokens=3)
B = RequestRecord(10.2, (10.5, 10.7, 10.9), 12.0, prompt_tokens=7, output_tokens=3)
FAILED = RequestRecord(9.0, (9.9,), None, prompt_tokens=7, output_tokens=1, error="HTTP 500: no")


def measured(*records: RequestRecord, telemetry: Telemetry | None = None) -> dict[str, float | None]:
    return round_metrics(RoundSample(records, telemetry or Telemetry()))


def of_launch(*records: RequestRecord) -> dict[str, float | None]:
    """Return the metrics of a launch in whose rounds these requests were answered."""
    return launch_metrics(LaunchSample(None, Capacity(), records))


# ------------------------------------------------------------------------------------------------ known answers


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("output_tokens_per_s", 6 / 2.0),
        ("total_tokens_per_s", 20 / 2.0),
        ("requests_per_s", 2 / 2.0),
        ("ttft_mean_s", 0.2),
        ("ttft_p50_s", 0.2),
        ("itl_mean_s", 0.175),
        ("itl_p50_s", 0.2),
        ("tpot_mean_s", (0.15 + 0.2) / 2),
        ("e2e_mean_s", (0.5 + 1.8) / 2),
        ("e2e_p50_s", (0.5 + 1.8) / 2),
        ("failed_requests", 0.0),
    ],
)
def test_two_answers_give_the_metrics_that_a_pencil_gives(name: str, expected: float) -> None:
    assert measured(A, B)[name] == pytest.approx(expected)


def of_first_token(*seconds: float) -> list[RequestRecord]:
    return [RequestRecord(0.0, (at_s,), 2.0, 1, 1) for at_s in seconds]


def test_percentiles_are_those_of_all_requests_together() -> None:
    records = of_first_token(*(0.01 * n for n in range(1, 102)))
    assert measured(*records)["ttft_p50_s"] == pytest.approx(0.51)
    values = of_launch(*records)
    assert [values["ttft_p90_s"], values["ttft_p99_s"]] == pytest.approx([0.91, 1.0])


def test_a_tail_is_that_of_all_requests_of_a_launch() -> None:
    quiet, slow = of_first_token(*[0.1] * 50), of_first_token(*[0.1] * 40, *[1.0] * 10)
    assert of_launch(*quiet)["ttft_p90_s"] == pytest.approx(0.1)
    assert of_launch(*slow)["ttft_p90_s"] == pytest.approx(1.0)
    assert of_launch(*quiet, *quiet, *slow)["ttft_p90_s"] == pytest.approx(0.1)
    assert of_launch(*quiet, *slow, *slow)["ttft_p90_s"] == pytest.approx(1.0)


def test_a_failed_request_is_counted_and_measured_nowhere_else() -> None:
    values = measured(A, B, FAILED)
    assert values["failed_requests"] == 1
    assert {name: value for name, value in values.items() if name != "failed_requests"} == {
        name: value for name, value in measured(A, B).items() if name != "failed_requests"
    }


def test_tokens_that_came_in_one_read_are_one_arrival() -> None:
    record = RequestRecord(0.0, (1.0, 1.0, 1.0, 3.0, 3.0), 3.0, 4, 5)
    assert measured(record)["itl_mean_s"] == of_launch(record)["itl_p99_s"] == pytest.approx(2.0)


def test_time_per_output_token_divides_by_the_servers_count_of_tokens() -> None:
    # An engine that tells usage only, with three of five tokens visible as text: what the formula of the table says.
    values = measured(RequestRecord(0.0, (1.0, 2.0, 3.0), 3.0, 4, output_tokens=5))
    assert values["tpot_mean_s"] == pytest.approx(2.0 / 4)


def test_an_answer_of_one_token_has_a_first_token_but_no_gap() -> None:
    values = measured(RequestRecord(0.0, (1.0,), 1.5, 4, 1))
    assert values["ttft_p50_s"] == 1.0
    assert (values["itl_p50_s"], values["tpot_mean_s"]) == (None, None)


def test_what_the_engine_tells_becomes_its_metrics() -> None:
    telemetry = Telemetry(preemptions=29, prompt_tokens=100, output_tokens=50, prefix_hit_tokens=16, kv_cache_peak=0.9)
    values = measured(A, telemetry=telemetry)
    assert (values["preemptions"], values["prefix_cache_hit_tokens"], values["kv_cache_peak_ratio"]) == (29, 16, 0.9)


def test_what_belongs_to_the_launch_becomes_its_metrics() -> None:
    values = launch_metrics(LaunchSample(12.5, Capacity(262_144.0, 128.0)))
    assert {name: value for name, value in values.items() if value is not None} == {
        "kv_cache_tokens": 262_144.0,
        "max_concurrency": 128.0,
        "startup_s": 12.5,
    }


# ------------------------------------------------------------------------------------------------ missing is None


def test_a_round_without_requests_has_no_number_but_that_none_failed() -> None:
    values = measured()
    assert values.pop("failed_requests") == 0
    assert set(values.values()) == {None}


def test_a_round_in_which_all_failed_has_no_number_but_how_many() -> None:
    values = measured(FAILED, FAILED)
    assert values.pop("failed_requests") == 2
    assert set(values.values()) == {None}


def test_an_engine_that_tells_nothing_has_no_such_metrics_rather_than_nought() -> None:
    values = measured(A, B)
    assert [values[name] for name in ("preemptions", "kv_cache_peak_ratio", "prefix_cache_hit_tokens")] == [None] * 3


def test_a_launch_of_which_nothing_is_known_has_no_number() -> None:
    assert set(launch_metrics(LaunchSample(None, Capacity())).values()) == {None}


def test_no_time_between_sending_and_end_is_no_division_by_nought() -> None:
    values = measured(RequestRecord(1.0, (1.0, 1.0), 1.0, 4, 2))
    assert (values["output_tokens_per_s"], values["requests_per_s"]) == (None, None)
    assert (values["ttft_p50_s"], values["e2e_p50_s"], values["itl_p50_s"]) == (0.0, 0.0, None)


def test_every_metric_is_computed_of_a_round_or_of_a_launch() -> None:
    assert set(measured()) | set(launch_metrics(LaunchSample(None, Capacity()))) == {
        metric.name for metric in METRICS if not metric.separate
    }
    assert all((metric.of_round, metric.of_launch, metric.separate or None).count(None) == 2 for metric in METRICS)


gaps = st.lists(st.floats(0.02, 10.0), min_size=1, max_size=8)
"""Longer than what is taken for tokens that were held back, also where an engine is ten times faster."""


@st.composite
def records(draw: st.DrawFn) -> RequestRecord:
    sent_s = draw(st.floats(0, 100))
    times: list[float] = []
    for gap in draw(gaps):
        times.append((times[-1] if times else sent_s) + gap)
    failed = draw(st.booleans())
    return RequestRecord(
        sent_s, tuple(times), times[-1], draw(st.integers(1, 50)), len(times), error="no" if failed else None
    )  # fmt: skip


def slowed(record: RequestRecord, factor: float) -> RequestRecord:
    assert record.sent_s is not None
    assert record.end_s is not None
    times = tuple(time * factor for time in record.token_times_s)
    return replace(record, sent_s=record.sent_s * factor, token_times_s=times, end_s=record.end_s * factor)


@settings(deadline=None, max_examples=60)
@given(st.lists(records(), max_size=8), st.floats(0.1, 10))
def test_a_slower_engine_has_proportionally_longer_latencies_and_less_throughput(
    sample: list[RequestRecord], factor: float
) -> None:
    later = [slowed(record, factor) for record in sample]
    before, after = measured(*sample) | of_launch(*sample), measured(*later) | of_launch(*later)
    for metric in METRICS:
        old, new = before.get(metric.name), after.get(metric.name)
        if metric.unit == "s" and old is not None:
            assert new == pytest.approx(old * factor, rel=1e-6, abs=1e-9)
        elif metric.unit.endswith("/s") and old is not None:
            assert new == pytest.approx(old / factor, rel=1e-6)
        else:
            assert new == (None if old is None else pytest.approx(old, rel=1e-6))


@settings(deadline=None, max_examples=60)
@given(st.lists(records(), max_size=8), st.randoms())
def test_the_order_of_requests_changes_nothing(sample: list[RequestRecord], random: object) -> None:
    shuffled = sorted(sample, key=lambda _: random.random())  # type: ignore[attr-defined]
    after = measured(*shuffled) | of_launch(*shuffled)
    for name, value in (measured(*sample) | of_launch(*sample)).items():
        assert after[name] == (value if value is None else pytest.approx(value, rel=1e-9))


@settings(deadline=None, max_examples=60)
@given(st.lists(records(), min_size=1, max_size=8))
def test_percentiles_are_ordered_and_finite(sample: list[RequestRecord]) -> None:
    metrics = {**measured(*sample), **of_launch(*(record for record in sample if record.error is None))}
    for latency in LATENCIES:
        values = [metrics[f"{latency}_p{percent}_s"] for percent in (50, 90, 99)]
        if values[0] is not None:
            assert values == sorted(values)  # type: ignore[type-var]
            assert all(value is not None and math.isfinite(value) and value >= 0 for value in values)


@settings(deadline=None, max_examples=60)
@given(st.lists(records(), max_size=8))
def test_no_metric_is_nought_where_nothing_was_measured(sample: list[RequestRecord]) -> None:
    values = measured(*sample)
    complete = [record for record in sample if record.error is None]
    assert (values["requests_per_s"] is None) == (values["ttft_p50_s"] is None) == (not complete)


# ------------------------------------------------------------------------------------------------ the table


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_every_row_has_a_unit_a_direction_a_class_and_a_formula(metric: Metric) -> None:
    assert metric.unit
    assert metric.better in ("lower", "higher")
    assert metric.kind in ("ratio", "quantile", "tail", "count", "exact")
    assert len(metric.formula) > 10
    assert "|" not in metric.formula  # it would break the table of the documentation


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_name_tells_the_base_unit(metric: Metric) -> None:
    endings = {
        "s": "_s",
        "tokens/s": "_tokens_per_s",
        "requests/s": "requests_per_s",
        "share": "_ratio",
        "tokens": "_tokens",
        "cores": "_cores",
        "bytes": "_bytes",
        "W": "_w",
        "J": "_j",
        "MHz": "_mhz",
    }
    assert metric.name.endswith(endings.get(metric.unit, ""))


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_times_and_failures_are_better_lower_and_rates_and_capacity_higher(metric: Metric) -> None:
    lower = (
        metric.unit in ("s", "preemptions", "share", "cores", "bytes", "W", "J", "degrees") or metric.name == "failed_requests"
    )
    good = metric.name in ("goodput_ratio", "gpu_utilization_ratio", "gpu_memory_balance_ratio", "idle_output_tokens_ratio")
    assert metric.better == ("lower" if lower and not good else "higher")


def test_names_are_unique() -> None:
    assert len(BY_NAME) == len(METRICS)


def test_every_latency_has_a_mean_and_three_percentiles() -> None:
    assert {f"{latency}_{statistic}_s" for latency in LATENCIES for statistic in STATISTICS} <= set(BY_NAME)


def test_these_metrics_can_fail_a_test() -> None:
    # Each gate splits the error rate of the whole suite: a new one is a decision.
    assert set(GATING) == {
        "output_tokens_per_s", "ttft_p50_s", "tpot_p50_s", "e2e_p50_s", "failed_requests", "preemptions", "kv_cache_tokens",
        "gpu_memory_peak_bytes", "gpu_memory_balance_ratio",
    }  # fmt: skip


def test_no_quantile_gates_that_a_short_run_cannot_know() -> None:
    assert not [name for name in GATING if "p90" in name or "p99" in name]


def test_the_tails_are_those_percentiles_that_a_launch_as_a_whole_has() -> None:
    tails = {metric.name for metric in METRICS if metric.kind == "tail"}
    assert tails == {f"{latency}_p{percent}_s" for latency in LATENCIES for percent in (90, 99)}
    assert all(BY_NAME[name].of_launch and BY_NAME[name].beyond for name in tails)


# ------------------------------------------------------------------------------------------------ too few for a tail


@pytest.mark.parametrize(
    ("name", "requests", "rounds", "enough"),
    [
        ("ttft_p90_s", 100, 1, True),
        ("ttft_p90_s", 99, 1, False),
        ("ttft_p90_s", 20, 5, True),
        ("ttft_p90_s", 19, 5, False),
        ("e2e_p99_s", 200, 5, True),
        ("e2e_p99_s", 199, 5, False),
        # 32 requests of 50 tokens have 49 gaps each.
        ("itl_p99_s", 32, 1, True),
        ("itl_p99_s", 20, 1, False),
        ("ttft_p50_s", 1, 1, True),
        ("output_tokens_per_s", 1, 1, True),
    ],
)
def test_a_tail_needs_ten_values_beyond_it_and_a_median_none(name: str, requests: int, rounds: int, enough: bool) -> None:
    workload = Workload(requests=requests, concurrency=1)
    assert (BY_NAME[name].too_few(workload, rounds) is None) == enough


@settings(deadline=None)
@given(
    st.sampled_from([metric for metric in METRICS if metric.kind == "tail"]),
    st.integers(1, 400),
    st.integers(2, 50),
    st.integers(1, 5),
)
def test_as_many_requests_as_a_refused_tail_asks_for_are_enough(
    metric: Metric, requests: int, output_tokens: int, rounds: int
) -> None:
    refused = metric.too_few(Workload(requests=requests, output_tokens=output_tokens, concurrency=1), rounds)
    if refused is not None:
        wanted = re.search(r"about ([\d,]+) requests a launch", refused)
        assert wanted
        per_launch = int(wanted[1].replace(",", ""))
        assert per_launch > requests * rounds
        enough = Workload(requests=math.ceil(per_launch / rounds), output_tokens=output_tokens, concurrency=1)
        assert metric.too_few(enough, rounds) is None


def test_the_reason_of_a_refused_tail_has_its_numbers() -> None:
    reason = BY_NAME["ttft_p99_s"].too_few(Workload(requests=32), 5)
    assert reason == f"a launch has 1.6 values beyond it, {MIN_EXCEEDANCES} are needed; about 1,000 requests a launch would do"


def test_no_number_of_answers_of_one_token_has_a_gap() -> None:
    reason = BY_NAME["itl_p90_s"].too_few(Workload(output_tokens=1), 5)
    assert reason == f"a launch has 0 values beyond it, {MIN_EXCEEDANCES} are needed"


def test_the_documentation_has_a_line_for_every_metric() -> None:
    rows = [line for line in documentation().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [metric.name for metric in METRICS]


def test_the_page_in_docs_is_the_generated_one() -> None:
    page = Path(__file__).parents[2] / "docs" / "metrics.md"
    if not page.is_file():
        pytest.skip("docs/metrics.md is not written yet")
    assert page.read_text() == documentation(), "write it anew from pytest_llmperf.measure.metrics.documentation()"


# ------------------------------------------------------------------------------------------------ load and classes


def wave(start_s: float, *, tokens: int = 10, e2e_s: float = 1.0) -> RequestRecord:
    times = tuple(start_s + e2e_s * (n + 1) / tokens for n in range(tokens))
    return RequestRecord(start_s, times, start_s + e2e_s, 4, tokens)


def sample(*records: RequestRecord, **more: object) -> dict[str, float | None]:
    return round_metrics(RoundSample(records, Telemetry(), **more))  # type: ignore[arg-type]


def test_steady_throughput_leaves_out_the_first_wave_and_the_end() -> None:
    # Two at a time: the first wave takes 5 s, the others 1 s, and the last request runs on alone for 10 s.
    records = [wave(0, e2e_s=5), wave(0, e2e_s=5), *(wave(at) for at in (5, 5, 6, 6, 7)), wave(8, e2e_s=10)]
    values = sample(*records, concurrency=2)
    assert values["steady_output_tokens_per_s"] == pytest.approx(50 / 3)
    assert values["output_tokens_per_s"] == pytest.approx(80 / 18)
    assert values["in_flight_mean"] == pytest.approx(5 / 3)


def test_without_a_steady_window_there_is_no_steady_throughput() -> None:
    values = sample(wave(0), wave(0), concurrency=2)
    assert (values["steady_output_tokens_per_s"], values["in_flight_mean"]) == (None, None)


@pytest.mark.parametrize(
    ("seconds", "expected"), [([1, 1, 1], 1.0), ([1, 1, 1e9, 1e9], 0.5), ([1, 2], (1 + 0.5) ** 2 / (2 * 1.25))]
)
def test_jains_index_is_the_share_of_requests_that_are_served(seconds: list[float], expected: float) -> None:
    assert sample(*(wave(0, e2e_s=e2e) for e2e in seconds))["jain_fairness"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        ((("ttft_s", 0.15),), 1),
        ((("ttft_s", 0.25),), 2),
        ((("itl_s", 0.15),), 1),
        ((("tpot_s", 0.15), ("e2e_s", 0.9)), 0),
        ((("e2e_s", 2.0),), 2),
    ],
)
def test_goodput_counts_requests_that_kept_to_every_limit(slo: tuple[tuple[str, float], ...], good: int) -> None:
    values = sample(wave(0), wave(0, e2e_s=2), FAILED, slo=slo)
    assert values["goodput_ratio"] == pytest.approx(good / 3)
    assert values["goodput_requests_per_s"] == pytest.approx(good / 2)
    assert sample(wave(0))["goodput_ratio"] is None


def test_at_a_rate_latencies_count_from_the_instant_that_was_due() -> None:
    late = replace(wave(1.0), due_s=0.4, delay_s=0.6)
    values = sample(late)
    assert (values["ttft_p50_s"], values["e2e_p50_s"]) == pytest.approx((0.7, 1.6))
    assert (values["ttft_from_send_p50_s"], values["e2e_from_send_p50_s"]) == pytest.approx((0.1, 1.0))
    assert values["send_delay_p99_s"] == pytest.approx(0.6)
    assert sample(wave(1.0))["ttft_from_send_p50_s"] is None


def test_each_class_has_latencies_of_its_own() -> None:
    values = sample(wave(0), wave(0, e2e_s=4), wave(0, e2e_s=4), classes=("short", "long", "long"))
    assert (values["short/e2e_p50_s"], values["long/e2e_p50_s"], values["e2e_p50_s"]) == pytest.approx((1, 4, 4))
    assert values["long/requests_per_s"] == pytest.approx(2 / 4)
    tails = launch_metrics(LaunchSample(None, Capacity(), (wave(0), wave(0, e2e_s=4)), ("short", "long")))
    assert (tails["short/e2e_p99_s"], tails["long/e2e_p99_s"]) == pytest.approx((1, 4))


def test_a_metric_of_a_class_gates_only_when_asked() -> None:
    metric = find("short/ttft_p50_s")
    assert (metric.name, metric.unit, metric.gating, metric.kind) == ("short/ttft_p50_s", "s", False, "quantile")
    for name in ("short/kv_cache_tokens", "/ttft_p50_s", "short/nothing", "nothing"):
        with pytest.raises(KeyError):
            find(name)
    classes = {"short": {"share": 1}, "long": {"share": 9}}
    workload = workload_from(Axes(), {"classes": classes, "requests": 100})
    assert find("short/ttft_p90_s").too_few(workload, 5)
    assert find("long/ttft_p90_s").too_few(workload, 5) is None


def test_tokens_of_one_read_are_shared_arrivals() -> None:
    assert sample(RequestRecord(0.0, (1.0, 1.0, 1.0, 3.0), 3.0, 4, 4))["shared_arrivals_ratio"] == pytest.approx(0.5)
