"""Limits: how they are written, which hold on an accelerator, and what a measurement says of those that it does not keep."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_llmperf.measure.limits import check_metrics
from pytest_llmperf.measure.measurement import Launch, Measurement, Round
from pytest_llmperf.measure.metrics import METRICS
from pytest_llmperf.plan.case import Case
from pytest_llmperf.plan.checks import PlanError
from pytest_llmperf.plan.engine import EngineSpec
from pytest_llmperf.plan.limits import NO_LIMITS, LocalLimits, is_named, named_accelerators, parse_limits
from pytest_llmperf.plan.workload import Workload

ORIGIN = "llmperf(limits=...)"
H200 = "NVIDIA H200"


def local(*sources: object, on: str = H200) -> LocalLimits:
    return LocalLimits(tuple(parse_limits(source, origin=ORIGIN) for source in sources), (on,))


def numbers(limits: LocalLimits) -> dict[str, float]:
    return {name: limit.value for name, limit in limits.bounds().items()}


def measured(limits: LocalLimits = NO_LIMITS, **values: float | None) -> Measurement:
    return Measurement(Case("a", EngineSpec(), Workload()), (Launch("1", "", (Round(values),), {}),), limits)


# ------------------------------------------------------------------------------------------------ which hold


@pytest.mark.parametrize(
    ("accelerator", "part", "named"),
    [
        ("NVIDIA H200", "H200", True),
        ("NVIDIA H200", "h200", True),
        ("NVIDIA H200", "nvidia", True),
        ("NVIDIA H200 NVL", "H200 NVL", True),
        ("NVIDIA A100-SXM4-80GB", "A100", True),
        ("AMD Instinct MI300X", "MI300", True),
        ("NVIDIA H200", "H20", False),
        ("NVIDIA GH200 480GB", "H200", False),
        ("NVIDIA A100-SXM4-80GB", "A10", False),
        ("NVIDIA L40S", "L4", False),
        ("NVIDIA H200", "H100", False),
        ("NVIDIA H200", "cpu", False),
        ("cpu", "cpu", True),
    ],
)
def test_a_part_of_a_name_ends_where_its_number_ends(accelerator: str, part: str, named: bool) -> None:
    assert is_named(accelerator, part) is named


def test_limits_for_all_accelerators_hold_on_each() -> None:
    assert numbers(local({"ttft_p50_s": 0.2, "output_tokens_per_s": 900})) == {"ttft_p50_s": 0.2, "output_tokens_per_s": 900.0}


def test_limits_by_accelerator_hold_where_the_name_fits() -> None:
    by_name = {"H100": {"ttft_p50_s": 0.3}, "H200": {"ttft_p50_s": 0.2}, "cpu": {"ttft_p50_s": 5}}
    assert [numbers(local(by_name, on=name)) for name in ("NVIDIA H100 80GB HBM3", H200, "cpu", "AMD Instinct MI300X")] == [
        {"ttft_p50_s": 0.3}, {"ttft_p50_s": 0.2}, {"ttft_p50_s": 5.0}, {},
    ]  # fmt: skip


def test_an_accelerators_limits_win_over_those_of_all_whatever_the_order() -> None:
    general, own = {"ttft_p50_s": 1, "e2e_p50_s": 2}, {"H200": {"ttft_p50_s": 0.2}}
    assert numbers(local(general | own)) == numbers(local(own | general)) == {"ttft_p50_s": 0.2, "e2e_p50_s": 2.0}


def test_of_two_names_that_fit_the_longer_wins() -> None:
    names = {"H200 NVL": {"ttft_p50_s": 0.3}, "H200": {"ttft_p50_s": 0.2, "e2e_p50_s": 4}}
    assert numbers(local(names, on="NVIDIA H200 NVL")) == {"ttft_p50_s": 0.3, "e2e_p50_s": 4.0}


def test_a_points_limits_win_over_its_markers_and_none_lifts() -> None:
    marker, point = {"ttft_p50_s": 0.2, "e2e_p50_s": 2, "preemptions": 0}, {"ttft_p50_s": 0.5, "preemptions": None}
    assert numbers(local(marker, point)) == {"ttft_p50_s": 0.5, "e2e_p50_s": 2.0}


def test_of_different_gpus_only_what_fits_all_holds() -> None:
    mixed = LocalLimits(
        (parse_limits({"H200": {"ttft_p50_s": 1}, "NVIDIA": {"e2e_p50_s": 2}}, origin=ORIGIN),), (H200, "NVIDIA H100")
    )
    assert numbers(mixed) == {"e2e_p50_s": 2.0}


def test_a_host_without_gpus_is_a_cpu_and_an_endpoint_unknown() -> None:
    assert named_accelerators((), started_here=True) == ("cpu",)
    assert named_accelerators((), started_here=False) == ()
    assert named_accelerators((H200, H200), started_here=False) == (H200,)


def test_none_for_this_accelerator_is_told() -> None:
    assert local({"H100": {"ttft_p50_s": 1}, "cpu": {"ttft_p50_s": 9}}).notes == (
        "llmperf(limits=...): none for NVIDIA H200; given for H100, cpu",
    )
    assert local({"H200": {"ttft_p50_s": 1}}).notes == local({"ttft_p50_s": 1}).notes == ()


def test_limits_by_accelerator_do_not_hold_where_none_is_known() -> None:
    unknown = LocalLimits((parse_limits({"cpu": {"ttft_p50_s": 1}, "e2e_p50_s": 3}, origin=ORIGIN),), ())
    assert numbers(unknown) == {"e2e_p50_s": 3.0}
    assert "an accelerator that is not known" in unknown.notes[0]


# ------------------------------------------------------------------------------------------------ how they are written


@pytest.mark.parametrize("value", [True, False, "0.2", "200 ms", "> 5", ">= five", ">=-1", -1, math.nan, math.inf, [1], {"x": 1}])
def test_what_is_no_limit_is_refused_by_metric_and_value(value: object) -> None:
    with pytest.raises(PlanError) as refused:
        parse_limits({"H200": {"ttft_p50_s": value}}, origin=ORIGIN)
    assert f"llmperf(limits=...): H200: ttft_p50_s={value!r}: must be a number from 0" in str(refused.value)


@pytest.mark.parametrize("source", [[], (), "ttft_p50_s=1", 5, False, {"": 1}, {" ": {}}, {3: 4}])
def test_what_is_no_dict_of_names_is_refused_with_an_example(source: object) -> None:
    with pytest.raises(PlanError, match=r"^llmperf\(limits=\.\.\.\).*'ttft_p50_s': 0\.2"):
        parse_limits(source, origin=ORIGIN)


@settings(deadline=None)
@given(st.recursive(st.none() | st.integers() | st.floats() | st.text(max_size=3), lambda inner: st.dictionaries(
    st.text(max_size=3) | st.integers(), inner, max_size=3) | st.lists(inner, max_size=2), max_leaves=6))  # fmt: skip
def test_anything_is_limits_or_a_named_error(source: object) -> None:
    told, limits = ORIGIN, None
    try:
        limits = parse_limits(source, origin=ORIGIN)
    except PlanError as error:
        told = str(error)
    assert told.startswith(ORIGIN)
    if limits is not None:
        assert all(bound >= 0 for bound in numbers(LocalLimits((limits,), (H200,))).values())


@pytest.mark.parametrize("name", ["ttft_p50_ms", "mean_ttft_s", "H200", "short/kv_cache_tokens"])
def test_a_limit_of_what_is_no_metric_is_refused(name: str) -> None:
    with pytest.raises(PlanError, match=rf"^llmperf\(limits=\.\.\.\): '{name}' is not a metric; known are output_tokens_per_s"):
        check_metrics(parse_limits({name: 1}, origin=ORIGIN))


def test_a_limit_of_a_class_of_requests_is_one() -> None:
    check_metrics(parse_limits({"short/ttft_p50_s": 1}, origin=ORIGIN))


# ------------------------------------------------------------------------------------------------ what is not kept


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_each_metric_is_limited_in_its_own_direction(metric) -> None:
    worse, better = (3.0, 1.0) if metric.better == "lower" else (1.0, 3.0)
    limits = local({metric.name: 2})
    assert measured(limits, **{metric.name: better}).broken_limits() == ()
    assert measured(limits, **{metric.name: 2.0}).broken_limits() == ()  # the limit itself is kept
    [sentence] = measured(limits, **{metric.name: worse}).broken_limits()
    assert sentence.startswith(f"{metric.name} is ")
    assert (" above " if metric.better == "lower" else " below ") in sentence


def test_a_limit_that_is_not_kept_is_told_with_both_quantities() -> None:
    limits = local({"ttft_p50_s": 0.2, "output_tokens_per_s": 900, "tpot_p50_s": 1})
    assert measured(limits, ttft_p50_s=0.31, output_tokens_per_s=450.0, tpot_p50_s=0.5).broken_limits() == (
        "ttft_p50_s is 310 ms, above the limit of 200 ms",
        "output_tokens_per_s is 450 tokens/s, below the limit of 900 tokens/s",
    )


def test_a_limit_may_say_its_direction_itself() -> None:
    case = measured(output_tokens_per_s=450.0, ttft_p50_s=0.3)
    assert case.broken_limits({"output_tokens_per_s": "<= 500", "ttft_p50_s": ">=0.2"}) == ()
    assert case.broken_limits({"output_tokens_per_s": "<= 400", "ttft_p50_s": ">= 0.4"}) == (
        "output_tokens_per_s is 450 tokens/s, above the limit of 400 tokens/s",
        "ttft_p50_s is 300 ms, below the limit of 400 ms",
    )


def test_two_quantities_that_look_alike_are_shown_with_more_digits() -> None:
    assert measured(local({"ttft_p50_s": 0.2}), ttft_p50_s=0.20004).broken_limits() == (
        "ttft_p50_s is 0.20004 s, above the limit of 0.2 s",
    )


@pytest.mark.parametrize("name", ["ttft_p50_s", "output_tokens_per_s", "short/ttft_p50_s"])
def test_what_was_not_measured_keeps_no_limit(name: str) -> None:
    [sentence] = measured(local({name: 1}), **{name: None}).broken_limits()
    assert sentence.startswith(f"{name} was not measured, and has a limit of 1")
    assert measured(local({name: 1})).broken_limits() == (sentence,)


def test_nought_is_a_number_and_kept_or_not_like_any_other() -> None:
    assert measured(local({"preemptions": 0}), preemptions=0.0).broken_limits() == ()
    assert measured(local({"preemptions": 0}), preemptions=1.0).broken_limits() == (
        "preemptions is 1 preemption, above the limit of 0 preemptions",
    )


def test_a_call_may_bring_limits_over_those_of_the_test() -> None:
    case = measured(local({"ttft_p50_s": 0.2}), ttft_p50_s=0.3, e2e_p50_s=2.0)
    assert len(case.broken_limits({"e2e_p50_s": 1})) == 2
    assert case.broken_limits({"ttft_p50_s": 0.4}) == case.broken_limits({"ttft_p50_s": None}) == ()
    assert case.broken_limits({"H200": {"ttft_p50_s": 0.4}, "H100": {"ttft_p50_s": 0.1}}) == ()


def test_a_call_with_an_unknown_metric_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^broken_limits\(\.\.\.\): 'ttft' is not a metric"):
        measured(ttft_p50_s=0.1).broken_limits({"ttft": 1})
