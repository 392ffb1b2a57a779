"""The main job on the simulated engine: record, compare, fail, and everything that is neither."""

from __future__ import annotations

import json

import pytest

from tests.conftest import SERVING

RECORD = ("--update-baselines", "--llmperf-launches=3")
SLOW = "--llmperf-engine-args=--sim-slow-down 4"
FILE = "baselines/simulated/test_it/test_serving-tiny-tp1-c8.json"
CASE = "test_it.py::test_serving[tiny-tp1-c8]"


@pytest.fixture
def recorded(run):
    result = run(SERVING, *RECORD)
    assert result.outcomes == {"passed": 1}, result.stdout
    assert result.statuses == {CASE: "RECORDED"}
    return result


def test_recording_stores_every_launch_with_its_rounds_and_its_origin(recorded, tmp_path):
    stored = json.loads((tmp_path / FILE).read_text())
    assert stored["version"] == 3
    assert [len(launch["rounds"]) for launch in stored["launches"]] == [2, 2, 2]
    assert len({launch["id"] for launch in stored["launches"]}) == 3
    assert stored["provenance"]["engine"]["kind"] == "simulated"
    assert stored["provenance"]["versions"]["pytest-llmperf"]
    assert f"recorded {FILE}" in recorded.stdout


def test_an_unchanged_engine_passes_and_leaves_the_baseline_alone(recorded, run, tmp_path):
    before = (tmp_path / FILE).read_bytes()
    result = run(SERVING)
    assert result.outcomes == {"passed": 1}, result.stdout
    assert result.statuses == {CASE: "PASS"}
    assert "1 compared (1 PASS), 0 not compared" in result.stdout
    assert (tmp_path / FILE).read_bytes() == before


def test_a_slower_engine_fails_after_two_launches_and_says_what_changed(recorded, run):
    result = run(SERVING, SLOW)
    assert result.returncode == 1
    assert result.statuses == {CASE: "REGRESSED"}
    assert len(result.cases[0]["launches"]) == 2
    assert "assert REGRESSED test_it.py::test_serving[tiny-tp1-c8] (2 launches against 3 of the baseline)" in result.stdout
    assert "changed since the baseline: engine argument --sim-slow-down: not set -> 4" in result.stdout
    assert "Full output truncated" not in result.stdout


def test_a_faster_engine_is_improved_and_passes(recorded, run):
    result = run(SERVING, "--llmperf-engine-args=--sim-slow-down 0.3", "--llmperf-max-launches=3")
    assert result.outcomes == {"passed": 1}, result.stdout
    assert result.statuses[CASE] in ("PASS", "IMPROVED")


def test_without_a_baseline_the_test_fails_with_the_command_that_records_it(run):
    result = run(SERVING)
    assert result.statuses == {CASE: "NO-BASELINE"}
    assert f"record it with: pytest --update-baselines '{CASE}'" in result.stdout
    assert "0 compared, 1 not compared (1 NO-BASELINE)" in result.stdout


def test_a_missing_baseline_can_be_skipped_or_recorded(run, tmp_path):
    assert run(SERVING, "--llmperf-missing-baseline=skip").outcomes == {"skipped": 1}
    assert not (tmp_path / FILE).exists()
    assert run(SERVING, "--llmperf-missing-baseline=record", "--llmperf-launches=1").statuses == {CASE: "RECORDED"}
    assert (tmp_path / FILE).exists()


def test_new_only_records_what_is_missing_and_compares_the_rest(recorded, run, tmp_path):
    before = (tmp_path / FILE).read_bytes()
    both = SERVING + SERVING.replace("test_serving", "test_other")
    result = run(both, "--update-baselines-new-only", "--llmperf-launches=1")
    assert result.statuses == {CASE: "PASS", CASE.replace("test_serving", "test_other"): "RECORDED"}
    assert (tmp_path / FILE).read_bytes() == before


def test_another_workload_is_not_comparable_and_says_what_changed(recorded, run):
    result = run(SERVING.replace("output_tokens=6", "output_tokens=7"))
    assert result.statuses == {CASE: "NOT-COMPARABLE"}
    assert "the workload has changed: output_tokens 6 -> 7" in result.stdout
    assert result.returncode == 1


def test_changed_engine_arguments_are_judged_not_refused(recorded, run):
    assert run(SERVING, "--llmperf-engine-args=--max-num-seqs 128").statuses == {CASE: "PASS"}


@pytest.mark.parametrize("text", ["{", '{"version": 99}', "[]", ""])
def test_a_broken_baseline_is_named_and_stays_as_it_is(recorded, run, tmp_path, text):
    (tmp_path / FILE).write_text(text)
    result = run(SERVING)
    assert result.returncode == 1
    assert f"{FILE}: " in result.stdout
    assert "--update-baselines" in result.stdout
    assert (tmp_path / FILE).read_text() == text
    other = run(SERVING.replace("test_serving", "test_other"), *RECORD)
    assert list(other.statuses.values()) == ["RECORDED"]  # somebody else's broken file is no reason to stop


def test_a_baseline_whose_test_is_gone_is_reported_when_baselines_are_updated(recorded, run, tmp_path):
    other = SERVING.replace("test_serving", "test_other")
    result = run(other, *RECORD)
    assert f"unused baseline: {FILE}" in result.stdout
    assert (tmp_path / FILE).exists()
    assert "unused baseline" not in run(SERVING + other, *RECORD, "-k", "other").stdout


def test_inconclusive_warns_by_default_and_fails_when_asked(recorded, run):
    impossible = ("--llmperf-tolerance=0.01%", "--llmperf-max-launches=2")
    result = run(SERVING, *impossible)
    assert result.outcomes == {"passed": 1}
    assert result.statuses == {CASE: "INCONCLUSIVE"}
    assert "INCONCLUSIVE test_it.py::test_serving" in result.stdout
    assert run(SERVING, *impossible, "--llmperf-inconclusive=fail").outcomes == {"failed": 1}


def test_an_absolute_limit_that_one_launch_misses_is_confirmed_by_a_second(recorded, run):
    limited = SERVING + "    assert measured['ttft_p50_s'] < 1e-6\n"
    result = run(limited)
    assert result.outcomes == {"failed": 1}
    assert result.engine_starts == len(result.cases[0]["launches"]) >= 2


def test_a_test_that_fails_moves_no_baseline(run, tmp_path):
    failing = SERVING + "    assert measured['ttft_p50_s'] < 1e-6\n"
    result = run(failing, *RECORD)
    assert result.outcomes == {"failed": 1}
    assert result.statuses == {CASE: "MEASURED"}
    assert "not recorded, because the test failed" in result.stdout
    assert not (tmp_path / FILE).exists()


def test_a_test_that_never_compares_is_measured_once(run):
    result = run("def test_only(llmperf):\n    assert llmperf(requests=8, output_tokens=4).preemptions == 0\n")
    assert result.outcomes == {"passed": 1}
    assert "0 compared, 1 not compared (1 MEASURED)" in result.stdout


def test_two_measurements_of_a_test_are_two_cases(run, tmp_path):
    two = """
def test_two(llmperf, baseline):
    alone, crowd = llmperf(requests=4, concurrency=1, output_tokens=4), llmperf(requests=8, output_tokens=4)
    assert crowd["output_tokens_per_s"] > alone["output_tokens_per_s"]
    assert alone == baseline
    assert crowd == baseline
"""
    result = run(two, "--update-baselines", "--llmperf-launches=2")
    case = "test_it.py::test_two[tiny-tp1-c8]"
    assert result.statuses == {case: "RECORDED", f"{case}#2": "RECORDED"}
    assert result.engine_starts == 2
    assert run(two).statuses == {case: "PASS", f"{case}#2": "PASS"}
