"""Workloads as tests write them: which cases they come to, what is stored of them, and what is said when they cannot be."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_llmperf.testing import Result, SimulatedEngine

    Run = Callable[..., Result]

MIXED = """
import pytest

CLASSES = {"short": {"share": 3, "prompt_tokens": 8}, "long": {"share": 1, "prompt_tokens": 200}}

@pytest.mark.llmperf(concurrency=4, gate={"short/ttft_p50_s": "90 %"})
def test_mixed(llmperf, baseline):
    measured = llmperf(classes=CLASSES, output_tokens=6, requests=16)
    assert measured["long/ttft_p50_s"] > 0
    assert measured == baseline
"""

LOADS = """
import pytest

@pytest.mark.llmperf(concurrency=[2, 4], rate=[20, 40])
def test_both(llmperf):
    llmperf(prompt_tokens=8, output_tokens=4, requests=8)

def test_open_to_all(llmperf):
    llmperf(prompt_tokens=8, output_tokens=4, requests=8)
"""


def ids(result: Result) -> list[str]:
    return sorted(case["id"].partition("::")[2] for case in result.cases)


def test_a_rate_is_another_form_of_load_beside_concurrency(run: Run) -> None:
    assert ids(run(LOADS)) == [
        "test_both[tiny-tp1-c2]", "test_both[tiny-tp1-c4]", "test_both[tiny-tp1-r20]", "test_both[tiny-tp1-r40]",
        "test_open_to_all[tiny-tp1-c8]",
    ]  # fmt: skip


def test_the_option_selects_rates(run: Run) -> None:
    result = run(LOADS, "--llmperf-rate=40")
    assert ids(result) == ["test_both[tiny-tp1-r40]", "test_open_to_all[tiny-tp1-r40]"]
    assert result.outcomes == {"passed": 2, "deselected": 3}
    both = run(LOADS, "--llmperf-rate=40", "--llmperf-concurrency=2")
    assert ids(both) == [
        "test_both[tiny-tp1-c2]", "test_both[tiny-tp1-r40]", "test_open_to_all[tiny-tp1-c2]", "test_open_to_all[tiny-tp1-r40]",
    ]  # fmt: skip


def test_at_a_rate_the_case_is_recorded_and_compared_like_any_other(run: Run) -> None:
    source = "def test_it(llmperf, baseline):\n    assert llmperf(prompt_tokens=8, output_tokens=4, requests=8) == baseline"
    assert set(run(source, "--llmperf-rate=50", "--update-baselines", "--llmperf-launches=2").statuses.values()) == {"RECORDED"}
    result = run(source, "--llmperf-rate=50")
    assert result.outcomes == {"passed": 1}, result.stdout
    [case] = result.cases
    assert case["workload"]["rate"] == [50.0]
    assert case["launches"][0]["rounds"][0]["metrics"]["send_delay_p99_s"] >= 0


@pytest.mark.parametrize("value", ["0", "-1", "fast", "nan", ""])
def test_a_rate_that_is_none_is_a_usage_error(run: Run, value: str) -> None:
    result = run(LOADS, f"--llmperf-rate={value},5")
    assert result.returncode == 4
    assert f"--llmperf-rate={value}" in result.stdout + result.stderr


def test_a_class_has_metrics_of_its_own_and_one_that_gates(run: Run, tmp_path: Path) -> None:
    assert set(run(MIXED, "--update-baselines", "--llmperf-launches=2").statuses.values()) == {"RECORDED"}
    [file] = (tmp_path / "baselines").rglob("*.json")
    stored = json.loads(file.read_text())
    assert stored["workload"]["classes"][0]["name"] == "short"
    assert stored["launches"][0]["rounds"][0]["metrics"]["short/itl_p50_s"] > 0
    assert "long/e2e_p99_s" in stored["launches"][0]["metrics"]
    result = run(MIXED)
    rows = {row["metric"]: row["status"] for row in result.cases[0]["verdict"]["metrics"]}
    assert rows["short/ttft_p50_s"] == "PASS", result.stdout
    assert rows["long/ttft_p50_s"] is None


def test_a_gate_of_a_class_that_there_is_not_is_never_green(run: Run) -> None:
    wrong = MIXED.replace("short/ttft_p50_s", "shorter/ttft_p50_s")
    result = run(wrong, "--update-baselines", "--llmperf-launches=2")
    assert set(result.statuses.values()) == {"NOT-COMPARABLE"}, result.stdout
    assert result.outcomes == {"failed": 1}
    run(MIXED, "--update-baselines", "--llmperf-launches=2")
    result = run(wrong)
    assert set(result.statuses.values()) == {"NOT-COMPARABLE"}, result.stdout
    assert result.outcomes == {"failed": 1}


def test_a_gate_of_what_no_class_has_is_a_usage_error(run: Run) -> None:
    result = run(MIXED.replace("short/ttft_p50_s", "short/kv_cache_tokens"))
    assert result.returncode == 4
    assert "'short/kv_cache_tokens' is not a metric" in result.stdout + result.stderr


def test_files_are_looked_for_beside_the_test(run: Run) -> None:
    source = "def test_it(llmperf):\n    assert llmperf(trace='trace.jsonl', trace_unit='ms', speed=10)['requests_per_s'] > 0"
    row = {"timestamp": 0, "input_length": 8, "output_length": 3}
    trace = "\n".join(json.dumps(row | {"timestamp": 100 * n}) for n in range(6))
    files = {"sub/test_it.py": source, "sub/trace.jsonl": trace, "test_top.py": source}
    result = run(files)
    assert result.outcomes == {"passed": 1, "failed": 1}, result.stdout
    assert "trace='trace.jsonl': cannot be read" in result.stdout


def test_hits_of_shared_prefixes_do_not_make_a_run_invalid(run: Run) -> None:
    source = "def test_it(llmperf):\n    assert llmperf({})['prefix_cache_hit_tokens'] >= 0"
    for arguments, outcome in (("prefix_tokens=64, requests=8", "passed"), ("turns=2, requests=16", "passed")):
        assert run(source.replace("{}", arguments)).outcomes == {outcome: 1}


def test_too_few_requests_for_a_steady_window_are_told(run: Run) -> None:
    source = "def test_it(llmperf):\n    llmperf(prompt_tokens=8, output_tokens=4, requests=8)"
    [case] = run(source).cases
    assert any("24 requests or more have one" in note for note in case["notes"])


def test_an_engine_that_has_no_offline_form_is_said_to_have_none(run: Run) -> None:
    result = run("def test_it(llmperf):\n    llmperf(engine='offline')")
    assert "llmperf(engine='offline'): this test's engine is of the kind 'simulated'" in result.stdout
    assert result.outcomes == {"failed": 1}


MARKED = """
import pytest

@pytest.mark.llmperf(engine="offline")
def test_alone(llmperf):
    llmperf(prompt_tokens=8, output_tokens=4, requests=8)

@pytest.mark.llmperf(engine="server")
def test_served(llmperf):
    llmperf(prompt_tokens=8, output_tokens=4, requests=8)
"""


def test_a_simulated_engine_stands_for_whichever_kind_a_marker_asks_for(run: Run) -> None:
    result = run(MARKED)
    assert result.outcomes == {"passed": 2}, result.stdout
    assert [case["engine"]["kind"] for case in result.cases] == ["simulated"] * 2


def test_an_endpoint_is_no_engine_without_a_server(run: Run, simulated_engine: SimulatedEngine) -> None:
    result = run(MARKED, "-rs", f"--llmperf-url={simulated_engine.url}", quick=False)
    assert result.outcomes == {"passed": 1, "skipped": 1}, result.stdout
    assert "its marker says engine='offline', an engine without a server, and" in result.stdout
    assert f"{simulated_engine.url} is a server" in result.stdout


def test_at_an_endpoint_the_option_selects_loads_too(run: Run, simulated_engine: SimulatedEngine) -> None:
    result = run(LOADS, "-p", "no:benchmark", f"--llmperf-url=x={simulated_engine.url}", "--llmperf-rate=40", quick=False)
    assert ids(result) == ["test_both[x-r40]", "test_open_to_all[x-r40]"]
    assert result.outcomes == {"passed": 2, "deselected": 3}


def test_the_self_test_can_ask_a_gate_of_a_class(run: Run) -> None:
    gated = MIXED.replace('"short/ttft_p50_s": "90 %"', '"short/ttft_p90_s": "90 %"').replace("requests=16", "requests=200")
    run(gated, "--update-baselines", "--llmperf-launches=2")
    result = run(gated, "--llmperf-selftest")
    assert "none judged wrongly" in result.stdout, result.stdout
