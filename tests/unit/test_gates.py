"""Which metrics gate: how the setting is written, what it comes to, and what it says where it is wrong."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_llmperf.judge.gates import Tolerance, comparisons, gates
from pytest_llmperf.measure.metrics import BY_NAME, GATING
from pytest_llmperf.plan.checks import PlanError
from pytest_llmperf.plan.gates import Gate, parse_gate

ORIGIN = "--llmperf-gate"


def entries(source: object) -> tuple[Gate, ...]:
    return parse_gate(source, origin=ORIGIN)


def gated(source: object, tolerance: float = 0.05) -> dict[str, Tolerance]:
    return gates(entries(source), tolerance=tolerance)


# ------------------------------------------------------------------------------------------------ how it is written


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("ttft_p90_s=8%", [("ttft_p90_s", True, 0.08)]),
        ("ttft_p90_s=0.08,preemptions=off", [("ttft_p90_s", True, 0.08), ("preemptions", False, None)]),
        (" *_p90_s = 8 % , startup_s = ON ,", [("*_p90_s", True, 0.08), ("startup_s", True, None)]),
        ("", []),
        ({"ttft_p90_s": "8 %", "preemptions": False}, [("ttft_p90_s", True, 0.08), ("preemptions", False, None)]),
        ({"startup_s": True, "*_p99_s": 0.2}, [("startup_s", True, None), ("*_p99_s", True, 0.2)]),
        ({"startup_s": "on", "preemptions": "Off"}, [("startup_s", True, None), ("preemptions", False, None)]),
        ({}, []),
    ],
)  # fmt: skip
def test_a_gate_setting_is_a_text_or_a_dict(source: object, expected: list[tuple[str, bool, float | None]]) -> None:
    assert entries(source) == tuple(Gate(name, on, tolerance, origin=ORIGIN) for name, on, tolerance in expected)


WORDS = st.text("abcpst_*09", min_size=1, max_size=8)
VALUES = st.sampled_from(["on", "off"]) | st.integers(1, 99).map(lambda percent: f"{percent}%") | st.floats(0.001, 0.999)


@settings(deadline=None)
@given(st.dictionaries(WORDS, VALUES, max_size=5))
def test_text_and_dict_say_the_same(source: dict[str, object]) -> None:
    assert entries(",".join(f"{name}={value}" for name, value in source.items())) == entries(source)


@settings(deadline=None)
@given(st.text(max_size=20) | st.dictionaries(st.text(max_size=4), st.text(max_size=5) | st.floats() | st.none(), max_size=3))
def test_anything_is_a_gate_setting_or_a_named_error(source: object) -> None:
    found, told = (), ORIGIN
    try:
        found = entries(source)
    except PlanError as error:
        told = str(error)
    assert told.startswith(ORIGIN)
    assert all(one.tolerance is None or (one.on and 0 < one.tolerance < 1) for one in found)


@pytest.mark.parametrize(
    ("source", "value", "remedy"),
    [
        ("ttft_p90_s", "'ttft_p90_s'", "write METRIC=TOLERANCE by comma, e.g. ttft_p90_s=8%,preemptions=off"),
        ("preemptions=off,8%", "'preemptions=off,8%'", "write METRIC=TOLERANCE by comma"),
        ("=8%", "", "must be a dict of metrics and tolerances, e.g. {'ttft_p90_s': '8 %'}"),
        (["ttft_p90_s"], "['ttft_p90_s']", "must be a dict of metrics"),
        (True, "True", "must be a dict of metrics"),
        ({1: 0.08}, "{1: 0.08}", "must be a dict of metrics"),
        ("ttft_p90_s=yes", "ttft_p90_s='yes'", "must be a share between 0 and 1, e.g. 0.05 or '5 %'"),
        ("ttft_p90_s=", "ttft_p90_s=''", "must be a share"),
        ("ttft_p90_s=8", "ttft_p90_s='8'", "must be a share"),
        ("ttft_p90_s=-8%", "ttft_p90_s='-8%'", "must be a share"),
        ("ttft_p90_s=nan", "ttft_p90_s='nan'", "must be a share"),
        ("ttft_p90_s=100%", "ttft_p90_s='100%'", "must be a share"),
        ({"ttft_p90_s": 1}, "ttft_p90_s=1", "must be a share"),
        ({"ttft_p90_s": 0}, "ttft_p90_s=0", "must be a share"),
        ({"ttft_p90_s": None}, "ttft_p90_s=None", "must be a share"),
    ],
    ids=repr,
)
def test_an_error_names_the_option_the_value_and_the_remedy(source: object, value: str, remedy: str) -> None:
    with pytest.raises(PlanError) as refused:
        entries(source)
    assert str(refused.value).startswith(ORIGIN)
    assert value in str(refused.value)
    assert remedy in str(refused.value)


# ------------------------------------------------------------------------------------------------ what it comes to


def test_without_a_setting_the_tables_metrics_gate_and_none_was_asked_for() -> None:
    found = gates(tolerance=0.05)
    assert set(found) == set(GATING)
    assert not any(tolerance.asked for tolerance in found.values())


@pytest.mark.parametrize(
    ("name", "tolerance", "expected"),
    [
        ("output_tokens_per_s", 0.05, 0.05),
        ("ttft_p50_s", 0.02, 0.02),
        ("ttft_p90_s", 0.05, 0.08),
        ("e2e_p99_s", 0.05, 0.15),
        ("itl_p90_s", 0.1, 0.1),
        ("itl_p99_s", 0.2, 0.2),
        ("preemptions", 0.05, 0.5),
        ("failed_requests", 0.6, 0.5),
        ("kv_cache_tokens", 0.05, 0.005),
        ("max_concurrency", 0.001, 0.005),
    ],
)
def test_a_metric_gates_with_the_larger_of_two_tolerances(name: str, tolerance: float, expected: float) -> None:
    assert gated({name: True}, tolerance)[name].share == expected


@pytest.mark.parametrize("name", ["ttft_p50_s", "ttft_p99_s", "preemptions", "kv_cache_tokens"])
def test_a_tolerance_that_was_asked_for_stands_whatever_the_default(name: str) -> None:
    assert gated({name: "1%"}, 0.3)[name] == Tolerance(0.01, asked=True)


def test_what_is_off_does_not_gate_and_the_others_do() -> None:
    assert set(gated("preemptions=off")) == set(GATING) - {"preemptions"}
    assert gated("*=off") == {}


def test_a_pattern_is_about_all_metrics_that_it_matches_and_no_other() -> None:
    found = gated("*_p90_s=9%")
    added = {name for name in BY_NAME if name.endswith("_p90_s")}
    assert len(added) == 4
    assert set(found) == set(GATING) | added
    assert {name for name, tolerance in found.items() if tolerance == Tolerance(0.09, asked=True)} == added


def test_a_later_entry_wins() -> None:
    assert set(gated("*=off,ttft_p50_s=3%")) == {"ttft_p50_s"}
    assert gated("ttft_p50_s=3%,*=off") == {}
    several = [*entries("ttft_p50_s=3%,preemptions=off"), *entries({"ttft_p50_s": "4%", "preemptions": True})]
    found = gates(several, tolerance=0.05)
    assert (found["ttft_p50_s"].share, found["preemptions"].share) == (0.04, 0.5)


def test_a_later_entry_wins_also_where_its_name_was_given_before() -> None:
    assert "ttft_p50_s" not in gated("ttft_p50_s=3%,ttft_*=8%,ttft_p50_s=off")


PATTERNS = st.sampled_from([*BY_NAME, "*", "*_s", "*_p9?_s", "ttft_*", "[ei]*_p50_s"])
ENTRIES = st.lists(st.builds(Gate, PATTERNS, st.booleans(), st.none() | st.floats(0.001, 0.999)), max_size=6)


@settings(deadline=None)
@given(ENTRIES, st.floats(0.001, 0.9))
def test_the_last_entry_about_a_metric_decides_on_it_alone(found: list[Gate], tolerance: float) -> None:
    result = gates(found, tolerance=tolerance)
    for name, metric in BY_NAME.items():
        if metric.separate:
            continue  # patterns that begin otherwise do not mean these
        last = next((one for one in reversed(found) if fnmatchcase(name, one.metrics)), None)
        assert (name in result) == (metric.gating if last is None else last.on)
        if name in result:
            assert result[name].asked == (last is not None)
            wanted = last.tolerance if last and last.tolerance else gates([Gate(name, True)], tolerance=tolerance)[name].share
            assert result[name].share == wanted


@pytest.mark.parametrize(
    "source", ["ttft_p95=8%", "tftt*=off", "TTFT_P50_S=on", "ttft_p100_s=on", "ttft_p095_s=on", "preemptions_total=on"]
)
def test_an_entry_about_no_metric_is_refused_with_the_known_ones(source: str) -> None:
    with pytest.raises(PlanError, match="is not a metric; known are output_tokens_per_s, ") as refused:
        gated(source)
    assert str(refused.value).startswith(f"{ORIGIN}: '{source.partition('=')[0]}'")
    assert all(name in str(refused.value) for name in BY_NAME)


# ------------------------------------------------------------------------------------------------ shares of the error rate


@settings(deadline=None)
@given(ENTRIES)
def test_exact_metrics_take_no_share_of_the_error_rate(found: list[Gate]) -> None:
    result = gates(found, tolerance=0.05)
    assert comparisons(result) == len([name for name in result if BY_NAME[name].kind != "exact"])


def test_by_default_six_comparisons_share_the_error_rate() -> None:
    assert comparisons(gates(tolerance=0.05)) == len(GATING) - 3 == 6
    assert comparisons({}) == 0


def test_a_wildcard_for_classes_of_requests_is_refused() -> None:
    with pytest.raises(PlanError, match=r"'\*/ttft_p90_s' is not a metric"):
        gates(parse_gate({"*/ttft_p90_s": "8 %"}, origin="gate"), tolerance=0.05)
