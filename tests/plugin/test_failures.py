"""Fail closed: failing requests, dead, stuck and stubborn engines have names, are never a PASS and never a baseline."""

from __future__ import annotations

import pytest

from tests.conftest import SERVING

CASE = "test_it.py::test_serving[tiny-tp1-c8]"
FILE = "baselines/simulated/test_it/test_serving-tiny-tp1-c8.json"


def with_engine(*words: str) -> str:
    return f"--llmperf-engine-args={' '.join(words)}"


@pytest.mark.parametrize("update", ["--update-baselines", "--llmperf-missing-baseline=record"])
def test_a_failing_request_is_invalid_with_its_reason_and_never_a_baseline(run, tmp_path, update):
    result = run(SERVING, with_engine("--sim-fail-every", "10"), "--llmperf-launches=1", update)
    assert result.outcomes == {"failed": 1}
    assert result.statuses == {CASE: "INVALID"}
    assert "of 8 requests failed: 1x HTTP 500" in result.stdout
    assert "0 compared, 1 not compared (1 INVALID)" in result.stdout
    assert not (tmp_path / FILE).exists()


def test_a_stream_that_is_cut_is_invalid(run):
    result = run(SERVING, with_engine("--sim-cut-every", "10"), "--update-baselines")
    assert result.statuses == {CASE: "INVALID"}
    assert "requests failed: 1x " in result.stdout


def test_an_invalid_launch_fails_a_test_that_never_compares(run):
    result = run("def test_x(llmperf):\n    llmperf(requests=8)\n", with_engine("--sim-fail-every", "10"))
    assert result.outcomes == {"failed": 1}


def test_a_crash_at_start_shows_its_likely_cause_and_log(run):
    result = run(SERVING, with_engine("--sim-crash-at-start"), "--update-baselines")
    assert result.outcomes == {"error": 1}
    assert "Likely cause: the GPU has too little free memory" in result.stdout
    assert "The engine ended with exit code 1 while it was starting." in result.stdout
    assert "torch.OutOfMemoryError: CUDA out of memory" in result.stdout
    assert "Whole log: " in result.stdout
    assert "0 compared, 1 not compared (1 INVALID)" in result.stdout
    assert "During handling of the above exception" not in result.stdout


def test_a_wrong_engine_argument_is_named(run):
    result = run(SERVING, with_engine("--no-such-argument"), "--update-baselines")
    assert "Likely cause: an engine argument is wrong: see --llmperf-engine-args" in result.stdout


def test_after_an_engine_died_the_next_test_gets_a_new_one(run):
    two = SERVING + "\ndef test_short(llmperf):\n    llmperf(requests=1, concurrency=1, output_tokens=1)\n"
    result = run(two, with_engine("--sim-crash-after", "20"), "--update-baselines")
    assert result.outcomes == {"failed": 1, "passed": 1}, result.stdout
    assert "The engine ended with exit code 1 before it was stopped." in result.stdout
    assert result.statuses == {CASE: "INVALID", "test_it.py::test_short[tiny-tp1-c8]": "MEASURED"}
    assert result.engine_starts == 2


def test_a_hanging_engine_is_found_by_its_silence_though_health_is_200(run):
    how = ("--llmperf-stall-timeout=2", "--update-baselines")
    result = run(SERVING, with_engine("--sim-hang-after", "20"), *how, LLMPERF_SIMULATED_CLOCK="real")
    assert result.outcomes == {"failed": 1}
    assert "HANG: no token came on any connection for 2 s" in result.stdout
    assert result.statuses == {CASE: "INVALID"}


def test_an_engine_that_never_gets_ready_ends_at_the_startup_timeout(run):
    result = run(SERVING, with_engine("--sim-startup-s", "60"), "--llmperf-startup-timeout=1", "--update-baselines")
    assert result.outcomes == {"error": 1}
    assert "The engine was not ready after 1 s; see --llmperf-startup-timeout." in result.stdout


def test_an_engine_that_fails_to_start_stops_no_other_tests(run):
    source = """
import pytest

@pytest.mark.llmperf(engine_args={"sim_crash_at_start": "boom"})
def test_bad(llmperf):
    llmperf(requests=8)

def test_good(llmperf):
    llmperf(requests=8, output_tokens=2)
"""
    assert run(source).outcomes == {"error": 1, "passed": 1}


def test_cases_on_one_prefix_cache_do_not_hit_each_others_prompts(run):
    source = """
def test_one(llmperf):
    assert llmperf(prompt_tokens=64, requests=8, output_tokens=2).prefix_cache_hit_tokens == 0

def test_two(llmperf):
    assert llmperf(prompt_tokens=64, requests=8, output_tokens=2).prefix_cache_hit_tokens == 0
"""
    assert run(source, with_engine("--enable-prefix-caching")).outcomes == {"passed": 2}
