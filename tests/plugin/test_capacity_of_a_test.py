"""`llmperf.capacity(...)`: recorded and judged by launches, like any other measurement."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_llmperf.testing import Result

    Run = Callable[..., Result]

RATE = """
import pytest

@pytest.mark.llmperf(engine_args={"max_num_seqs": 2})
def test_it(llmperf, baseline):
    measured = llmperf.capacity(slo={"ttft_s": 0.05}, rate=(20, 640), share=0.95, prompt_tokens=8, output_tokens=4)
    assert measured["capacity_low_requests_per_s"] <= measured["capacity_requests_per_s"]
    assert measured == baseline
"""
USERS = """
def test_it(llmperf, baseline):
    assert llmperf.capacity(
        slo={"tpot_s": 0.0025}, concurrency=(1, 64), share=0.9, prompt_tokens=8, output_tokens=6
    ) == baseline
"""
ALONE = RATE.replace(", baseline", "").replace("assert measured == baseline", "pass")
RECORD = ("--update-baselines", "--llmperf-launches=2", "--llmperf-tolerance=5%")
SLOWER = "--llmperf-engine-args=--sim-slow-down 1.25"


def capacities(result: Result, name: str = "capacity_requests_per_s") -> list[float]:
    return [launch["metrics"][name] for launch in result.cases[0]["launches"]]


@pytest.mark.parametrize(("source", "name"), [(RATE, "capacity_requests_per_s"), (USERS, "capacity_concurrency")])
def test_an_equal_engine_passes_and_a_slower_one_is_found(run: Run, source: str, name: str) -> None:
    assert set(run(source, *RECORD).statuses.values()) == {"RECORDED"}
    equal = run(source, "--llmperf-tolerance=5%")
    assert set(equal.statuses.values()) == {"PASS"}, equal.stdout
    slower = run(source, SLOWER, "--llmperf-tolerance=5%")
    assert set(slower.statuses.values()) == {"REGRESSED"}, slower.stdout
    assert f"{name}: " in slower.stdout


def test_the_capacity_is_what_the_engine_can_serve(run: Run) -> None:
    # Two requests at a time, four steps of 2 ms and 0.05 ms for each sequence, and the prompt.
    result = run(ALONE)
    [value] = capacities(result)
    assert 2 / (4 * 0.0021 + 0.0002) * 0.85 < value < 2 / (4 * 0.0021), result.stdout


def test_its_column_has_the_unit_and_no_other_change_is_shown(run: Run) -> None:
    run(RATE, *RECORD)
    lines = run(RATE, SLOWER, "--llmperf-tolerance=5%").stdout.splitlines()
    header = max(number for number, line in enumerate(lines) if line.startswith("case ") and "capacity" in line)
    assert "requests/s" in lines[header + 2]
    assert lines[header + 2].count(" worse)") == 1
    assert "better" not in lines[header + 2]


def test_later_launches_need_fewer_rounds_and_other_loads(run: Run) -> None:
    result = run(RATE, "--update-baselines", "--llmperf-launches=3")
    rounds = [sum(f"launch {number}, probe" in line for line in result.stdout.splitlines()) for number in (1, 2, 3)]
    assert rounds[0] > rounds[1] >= 2, result.stdout
    assert len(set(capacities(result))) == 3


def test_a_largest_load_that_holds_is_said_to_be_a_limit(run: Run) -> None:
    source = RATE.replace("(20, 640)", "(20, 40)")
    [case] = run(source, *RECORD).cases
    assert "the largest load asked for holds: the capacity is at least 40 requests/s; raise the bound to find it" in case["notes"]
    assert case["launches"][0]["metrics"]["capacity_high_requests_per_s"] is None
    assert set(run(source).statuses.values()) == {"PASS"}


def test_a_smallest_load_that_fails_is_no_baseline(run: Run, tmp_path: Path) -> None:
    source = RATE.replace('"ttft_s": 0.05', '"ttft_s": 0.0005').replace('measured["capacity_low_requests_per_s"]', "0")
    result = run(source, *RECORD)
    assert result.outcomes == {"failed": 1}
    assert "not even 20 requests/s holds: 0.0% of requests are within the limits, 95.0% are wanted" in result.stdout
    assert not list(tmp_path.rglob("baselines/**/*.json"))


def test_too_few_requests_are_said_to_prove_little(run: Run) -> None:
    [case] = run(ALONE.replace("share=0.95", "share=0.99, requests=40")).cases
    assert any(
        note == "a round of 40 requests, all of them good, proves a share of 92.8% only; 299 would prove 99.0%"
        for note in case["notes"]
    ), case["notes"]


def test_a_second_search_of_a_test_is_a_case_of_its_own(run: Run, tmp_path: Path) -> None:
    source = RATE.replace(
        "assert measured == baseline", "assert llmperf(requests=8) == baseline\n    assert measured == baseline"
    )
    assert set(run(source, *RECORD).statuses) == {"test_it.py::test_it[tiny-tp1-c8]", "test_it.py::test_it[tiny-tp1-c8]#2"}
    files = sorted(path for path in tmp_path.rglob("baselines/**/*.json"))
    assert len(files) == 2
    searches = ["capacity" in json.loads(path.read_text())["workload"] for path in files]
    assert sorted(searches) == [False, True]
    assert run(source).outcomes == {"passed": 1}


def test_the_self_test_finds_its_gate(run: Run) -> None:
    run(RATE, *RECORD)
    result = run(RATE, "--llmperf-selftest", "--llmperf-tolerance=5%")
    assert "none judged wrongly" in result.stdout
    assert result.outcomes == {"passed": 1}


def test_other_bounds_are_not_comparable(run: Run) -> None:
    run(RATE, *RECORD)
    result = run(RATE.replace("640", "320"))
    assert set(result.statuses.values()) == {"NOT-COMPARABLE"}
    assert "the workload has changed: capacity" in result.stdout


@pytest.mark.parametrize("every", [3, 50])
def test_failed_requests_at_a_load_that_is_served_are_invalid(run: Run, every: int) -> None:
    result = run(ALONE, f"--llmperf-engine-args=--sim-fail-every {every}")
    assert set(result.statuses.values()) == {"INVALID"}, result.stdout
    assert "requests failed: " in result.stdout


def test_a_gate_on_the_capacity_is_none_of_the_other_measurements(run: Run) -> None:
    both = "assert llmperf(requests=24) == baseline\n    assert measured == baseline"
    source = RATE.replace("assert measured == baseline", both)
    gate = "--llmperf-gate=capacity_requests_per_s=20%"
    assert set(run(source, *RECORD, gate).statuses.values()) == {"RECORDED"}
    result = run(source, gate)
    rows = [row for case in result.cases for row in case["verdict"]["metrics"] if row["metric"] == "capacity_requests_per_s"]
    assert [(row["status"], row["tolerance"]) for row in rows if row["measured"]] == [("PASS", 0.2)]
    assert set(result.statuses.values()) == {"PASS"}, result.stdout


def test_an_engine_without_a_server_has_no_load_to_search(tmp_path: Path) -> None:
    from pytest_llmperf.plan.axes import Axes
    from pytest_llmperf.plan.engine import EngineSpec
    from pytest_llmperf.plugin.measuring import LLMPerf

    bench = SimpleNamespace(plan=SimpleNamespace(axes=Axes(), arguments={}))
    engine = SimpleNamespace(spec=EngineSpec(kind="offline"))
    llmperf = LLMPerf(bench, engine, {"slo": {"ttft_s": 1}}, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(pytest.fail.Exception, match="an engine of the kind 'offline' has no server to send a load to"):
        llmperf.capacity(rate=(1, 2))
