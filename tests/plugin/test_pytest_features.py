"""The plugin beside pytest's own features and xdist."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pytest_llmperf.testing import Example
from tests.conftest import SERVING

RECORD = ("--update-baselines", "--llmperf-launches=2")
PAIR = SERVING.replace("test_serving", "test_a") + SERVING.replace("test_serving", "test_b")
SLOW = "--llmperf-engine-args=--sim-slow-down 4"
HEAVY = ("numpy", "scipy", "msgspec", "pynvml", "aiohttp", "psutil", "tabulate")


@pytest.mark.parametrize("dist", ["loadgroup", "load"])
def test_xdist_gives_the_same_cases_and_one_json_file(run, dist):
    result = run(PAIR, *RECORD, "-n", "2", "--dist", dist)
    assert result.outcomes == {"passed": 2}, result.stdout
    names = {case_id.partition("@")[0]: status for case_id, status in result.statuses.items()}
    assert names == {"test_it.py::test_a[tiny-tp1-c8]": "RECORDED", "test_it.py::test_b[tiny-tp1-c8]": "RECORDED"}
    compared = run(PAIR, "-n", "2", "--dist", dist)
    assert compared.outcomes == {"passed": 2}, compared.stdout
    assert "2 compared (" in compared.stdout
    assert run(PAIR).outcomes == {"passed": 2}  # the files are the same without xdist


def test_it_works_where_xdist_is_switched_off(run):
    assert run(SERVING, *RECORD, "-p", "no:xdist", "--strict-markers").outcomes == {"passed": 1}


def test_x_stops_at_the_first_red_case(run):
    run(PAIR, *RECORD)
    result = run(PAIR, SLOW, "-x")
    assert result.outcomes == {"failed": 1}, result.stdout
    assert "stopping after 1 failures" in result.stdout


def test_lf_runs_only_what_failed(run):
    run(PAIR, *RECORD)
    assert run(PAIR, SLOW).outcomes == {"failed": 2}
    assert run(PAIR, "-k", "test_a").outcomes == {"passed": 1, "deselected": 1}
    assert set(run(PAIR, "--lf").statuses) == {"test_it.py::test_b[tiny-tp1-c8]"}


def test_k_selects_by_degree(run):
    result = run(SERVING, "--llmperf-tp=1,2", "-k", "tp2", *RECORD)
    assert result.statuses == {"test_it.py::test_serving[tiny-tp2-c8]": "RECORDED"}


def test_strict_markers_accept_ours(run):
    assert run("import pytest\n\n@pytest.mark.llmperf(tp=1)\ndef test_x(llmperf):\n    llmperf(requests=8, output_tokens=2)\n",
               "--strict-markers").outcomes == {"passed": 1}  # fmt: skip


def test_the_baseline_fixture_alone_explains_itself(run):
    result = run("def test_x(baseline):\n    pass\n")
    assert result.outcomes == {"error": 1}
    assert "ask for the llmperf fixture too" in result.stdout


def test_setup_only_starts_the_engine_and_measures_nothing(run):
    result = run(SERVING, "--setup-only")
    assert result.cases == []
    assert result.engine_starts == 1


def test_a_suite_without_llmperf_tests_imports_nothing_heavy(tmp_path):
    conftest = f"""
import sys

def pytest_unconfigure():
    print("HEAVY", sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    Example({"test_it.py": "def test_x():\n    pass\n", "conftest.py": conftest}).write(tmp_path)
    for extra in (["--co"], []):
        command = [sys.executable, "-m", "pytest", "-s", *extra]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert "HEAVY []" in done.stdout, done.stdout
