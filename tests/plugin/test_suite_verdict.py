"""The suite as a whole: how a red one is told. Whether it is red is tested without pytest, and in tests/simulated_suites.py."""

from __future__ import annotations

import pytest

from tests.conftest import SERVING

RECORD = ("--update-baselines", "--llmperf-launches=2")
CASE = "test_it.py::test_serving[tiny-tp1-c8]"
# Everything 2 % slower cannot be arranged in real time; what is told of it can.
RED = """
from pytest_llmperf.judge import suite
from pytest_llmperf.judge.maths import stats

def judge_suite(cases, host):
    assert list(cases) and host == "simulated"
    return stats.Decision(outcome="regressed", rule="mean", launches=4, estimate=2.0, lower=1.2, upper=2.8, p=1e-5, se=.2, df=30)

suite.judge_suite = judge_suite
"""


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "xdist"])
def test_a_red_suite_fails_the_run_as_one_more_test(run, tmp_path, workers):
    run(SERVING, *RECORD)
    result = run({"test_it.py": SERVING, "conftest.py": RED}, "--junitxml=junit.xml", *workers)
    assert result.returncode == 1
    assert result.outcomes == {"failed": 1, "passed": 1}, result.stdout
    assert result.statuses == {CASE: "PASS"}
    assert "FAILED llmperf::suite" in result.stdout
    assert "suite as a whole: 2.0% worse [+1.2%, +2.8%]" in result.stdout
    assert "Look at the host first" in result.stdout
    assert 'tests="2"' in (tmp_path / "junit.xml").read_text()


def test_a_suite_that_is_red_anyway_has_no_second_failure(run):
    run(SERVING, *RECORD)
    result = run({"test_it.py": SERVING, "conftest.py": RED}, "--llmperf-engine-args=--sim-slow-down 4")
    assert result.outcomes == {"failed": 1}
    assert result.statuses == {CASE: "REGRESSED"}
    assert "suite as a whole: 2.0% worse" in result.stdout


def test_a_red_suite_leaves_the_last_failures_when_it_passes(run):
    run(SERVING, *RECORD)
    run({"test_it.py": SERVING, "conftest.py": RED})
    again = run({"test_it.py": SERVING, "conftest.py": ""}, "--lf")
    assert again.returncode == 0
    assert again.outcomes == {"passed": 2}, again.stdout  # the suite that failed is one of them
    assert "suite as a whole: " in again.stdout
    assert "no previously failed tests" in run({"test_it.py": SERVING, "conftest.py": ""}, "--lf").stdout


def test_a_single_comparison_is_no_suite_and_neither_is_an_interrupted_run(run):
    run(SERVING, *RECORD)
    assert "suite as a whole" not in run(SERVING, "--llmperf-gate=*=off,tpot_p50_s=60%").stdout
    stopped = run({"test_it.py": SERVING + "    import pytest; pytest.exit('enough')\n", "conftest.py": RED})
    assert "suite as a whole" not in stopped.stdout


def test_a_gpu_lost_at_the_end_does_not_take_the_summary(run):
    lost = """
from pytest_llmperf.plan.checks import PlanError
from pytest_llmperf.plugin import session

def describe_host(**_):
    raise PlanError("GPU 7 does not answer")

def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # the processes that measure have described their host before
        session.describe_host = describe_host
"""
    run(SERVING, *RECORD)
    result = run({"test_it.py": SERVING, "conftest.py": lost}, "-n", "2")
    assert result.returncode == 0, result.stdout
    assert result.statuses == {CASE: "PASS"}
    assert "llmperf: the suite as a whole is not judged: GPU 7 does not answer" in result.stdout
