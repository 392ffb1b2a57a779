"""A baseline that is missing is known when tests are collected: no engine is started for it."""

from __future__ import annotations

import json

import pytest

from tests.conftest import SERVING

CASE = "test_it.py::test_serving[tiny-tp1-c8]"
TWO = """
def test_serving(llmperf, baseline):
    first = llmperf(prompt_tokens=16, output_tokens=6, requests=8)
    second = llmperf(prompt_tokens=16, output_tokens=3, requests=8)
    assert second == baseline
"""


def test_a_missing_baseline_fails_before_the_engine(run):
    result = run(SERVING)
    assert result.outcomes == {"failed": 1}
    assert result.statuses == {CASE: "NO-BASELINE"}
    assert result.engine_starts == 0
    assert f"record it with: pytest --update-baselines '{CASE}'" in result.stdout
    assert "0 compared, 1 not compared (1 NO-BASELINE)" in result.stdout


def test_a_missing_baseline_skips_before_the_engine(run):
    result = run(SERVING, "--llmperf-missing-baseline=skip", "-rs")
    assert result.outcomes == {"skipped": 1}
    assert result.statuses == {CASE: "NO-BASELINE"}
    assert result.engine_starts == 0
    assert "no baseline is stored for simulated" in result.stdout


@pytest.mark.parametrize("how", ["--update-baselines", "--update-baselines-new-only", "--llmperf-missing-baseline=record"])
def test_what_is_recorded_needs_no_baseline(run, how):
    assert run(SERVING, how, "--llmperf-launches=1").statuses == {CASE: "RECORDED"}


def test_a_test_runs_where_any_of_its_baselines_is_stored(run):
    run(TWO, "--update-baselines", "--llmperf-launches=2")
    result = run(TWO)
    assert result.statuses == {CASE: "MEASURED", f"{CASE}#2": "PASS"}


def test_a_sweep_without_baselines_says_so_of_each_degree(run):
    source = "def test_x(llmperf_sweep, baseline):\n    assert llmperf_sweep(requests=8, output_tokens=4) == baseline\n"
    result = run(source, LLMPERF_SIMULATED_GPUS="2")
    assert result.engine_starts == 0
    assert result.statuses == {f"test_it.py::test_x[tiny-sweep-c8]#tp{degree}": "NO-BASELINE" for degree in (1, 2)}


@pytest.mark.parametrize(("mark", "outcomes"), [("skip", {"skipped": 1}), ("xfail", {})])
def test_marks_of_pytest_come_first(run, mark, outcomes):
    result = run(f"import pytest\n\n@pytest.mark.{mark}" + SERVING)
    assert result.outcomes == outcomes
    assert result.returncode == 0


def test_a_test_that_never_compares_is_measured(run):
    assert run("def test_x(llmperf):\n    llmperf(requests=8, output_tokens=2)\n").outcomes == {"passed": 1}


@pytest.mark.parametrize("how", [(), ("--update-baselines", "--llmperf-launches=1")], ids=["compared", "recorded"])
def test_an_unusable_file_fails_before_the_engine(run, tmp_path, how):
    run(SERVING, "--update-baselines", "--llmperf-launches=1")
    path = tmp_path / "baselines/simulated/test_it/test_serving-tiny-tp1-c8.json"
    path.write_text(json.dumps({"version": 2}))
    result = run(SERVING, *how)
    assert result.outcomes == {"failed": 1}
    assert result.engine_starts == 0
    assert "not a baseline" in result.stdout


def test_what_earlier_launches_printed_is_not_shown_again(run):
    source = """
import logging

def test_x(llmperf, baseline, record_property):
    measured = llmperf(requests=8, output_tokens=4)
    print(f"PRINTED after {len(measured.launches)}")
    logging.getLogger().warning(f"LOGGED after {len(measured.launches)}")
    record_property("own", len(measured.launches))
    assert measured == baseline
    assert False
"""
    result = run(source, "--update-baselines", "--llmperf-launches=3", "--junitxml=junit.xml", "-o", "junit_family=xunit1")
    assert result.outcomes == {"failed": 1}
    assert [line for line in result.stdout.splitlines() if line.startswith("PRINTED")] == ["PRINTED after 3"]
    assert "LOGGED after 3" in result.stdout
    assert "LOGGED after 2" not in result.stdout
