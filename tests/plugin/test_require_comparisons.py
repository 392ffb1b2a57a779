"""`--llmperf-require-comparisons`: a run that compares nothing, or too little, is red."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import QUICK, SERVING

REQUIRED = "--llmperf-require-comparisons"
RECORD = ("--update-baselines", "--llmperf-launches=2")
CASE = "test_it.py::test_serving[tiny-tp1-c8]"
SKIPPED = SERVING + "\n\nimport pytest\n\npytestmark = pytest.mark.skip('not today')\n"
BROKEN_OFF = """    try:
        measured == baseline
    finally:
        pytest.fail("behind the comparison")
"""
OBSERVED = "def test_x(llmperf):\n    llmperf(prompt_tokens=8, output_tokens=4, requests=8)\n"


@pytest.mark.fault("no false green", "every test is skipped, deselected or absent")
@pytest.mark.parametrize(
    ("source", "options", "why"),
    [
        (SKIPPED, ("-n", "1"), f"  {CASE}: SKIPPED: not today"),
        (SKIPPED, (), f"  {CASE}: SKIPPED: not today"),
        (OBSERVED, (), "0 compared, 1 not compared (1 MEASURED)"),
        ("def test_plain():\n    pass\n", (), "no test that measures has run"),
        (OBSERVED + "\n\ndef test_plain():\n    pass\n", ("-k", "plain"), "no test that measures has run"),
        (SERVING, ("--llmperf-missing-baseline=skip",), "1 not compared (1 NO-BASELINE)"),
        (SERVING, ("--llmperf-missing-baseline=record", "--llmperf-launches=2"), "1 not compared (1 RECORDED)"),
    ],
    ids=["skipped by a worker", "skipped", "not asked", "no test of ours", "deselected", "no baseline", "recorded"],
)
def test_a_run_that_compares_nothing_is_red(run, source, options, why):
    result = run(source, REQUIRED, *options)
    assert result.returncode == 1, result.stdout
    assert f"FAILED {'llmperf::comparisons'}" in result.stdout
    assert f"0 comparisons of at least 1 ({REQUIRED}=1): 0 compared" in result.stdout
    assert why in result.stdout


def test_enough_comparisons_take_the_failure_off_the_list(run):
    run(SERVING, *RECORD)
    too_few = run(SERVING, f"{REQUIRED}=2")
    assert too_few.returncode == 1
    assert f"1 comparison of at least 2 ({REQUIRED}=2): 1 compared (1 PASS), 0 not compared" in too_few.stdout
    again = run(SERVING, REQUIRED, "--lf")
    assert again.returncode == 0, again.stdout
    assert again.outcomes == {"passed": 2}
    assert run(SERVING, REQUIRED).outcomes == {"passed": 1}


def test_a_comparison_that_was_never_decided_is_none(run):
    run(SERVING, *RECORD)
    undecided = "import pytest\n" + SERVING.replace("    assert measured == baseline", BROKEN_OFF)
    result = run(undecided, REQUIRED, "--llmperf-tolerance=0.01%")
    assert result.statuses == {CASE: "INCONCLUSIVE"}, result.stdout
    assert f"0 comparisons of at least 1 ({REQUIRED}=1): 0 compared, 1 not compared (1 INCONCLUSIVE)" in result.stdout
    assert f"  {CASE}: INCONCLUSIVE: the run ended before it was decided" in result.stdout


def test_a_run_that_skips_all_is_green_without_it(run):
    assert run(SKIPPED).returncode == 0


def test_the_command_line_takes_back_what_the_ini_file_asks(run):
    files = {"test_it.py": "def test_plain():\n    pass\n", "pytest.ini": "[pytest]\nllmperf_require_comparisons = 3\n"}
    asked = run(files, quick=False)
    assert asked.returncode == 1
    assert "0 comparisons of at least 3" in asked.stdout
    assert run(files, f"{REQUIRED}=0", quick=False).returncode == 0


def test_a_run_without_any_test_is_red_too(run):
    assert run("", "--llmperf-rounds=2").returncode == 5
    assert run("", REQUIRED).returncode == 1


def test_collecting_compares_nothing_and_is_no_failure(run):
    assert run(SERVING, REQUIRED, "--co").returncode == 0


@pytest.mark.parametrize("other", ["--update-baselines", "--llmperf-calibrate=2", "--llmperf-selftest"])
def test_what_compares_nothing_cannot_be_asked_to(run, other):
    result = run(SERVING, REQUIRED, other)
    assert result.returncode == 4
    assert f"{other.partition('=')[0]} and {REQUIRED}=1: the first compares nothing" in result.stderr


@pytest.mark.parametrize("value", ["many", "-1", "1.5", ""])
def test_a_number_that_is_none_is_a_usage_error(run, value):
    result = run(SERVING, f"{REQUIRED}={value}")
    assert result.returncode == 4
    assert f"{REQUIRED}='{value}': must be a whole number" in result.stderr


def test_a_path_behind_it_stays_a_path(tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_other.py").write_text("def test_other():\n    assert False\n")
    (inner / "conftest.py").write_text("def pytest_addoption(parser):\n    parser.addoption('--theirs')\n")
    (inner / "test_plain.py").write_text("def test_plain():\n    pass\n")
    command = [sys.executable, "-m", "pytest", *QUICK, REQUIRED, "inner", "--theirs=x", "-v"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert "test_plain.py::test_plain PASSED" in done.stdout.replace("inner/", ""), done.stdout + done.stderr
    assert "test_other" not in done.stdout
    assert f"({REQUIRED}=1)" in done.stdout
    assert done.returncode == 1
