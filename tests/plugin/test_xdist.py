"""xdist: its controller has collected nothing, and has the exit code, the terminal and the files all the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv

import pytest

from pytest_llmperf.testing import Example
from tests.conftest import ENVIRONMENT

MEASURING = "def test_x(llmperf):\n    llmperf(prompt_tokens=8, output_tokens=4, requests=8)\n"
MARKED = "import pytest\n\n@pytest.mark.llmperf(tp=0)\n" + MEASURING
OPTIONS = "llmperf_engine = simulated\nllmperf_rounds = 2\n"


def in_workers(folder, source, ini, *args):
    """Return what became of a run in two workers that has no option of ours on its command line."""
    Example({"test_it.py": source, "pytest.ini": f"[pytest]\naddopts = -p no:benchmark\n{ini}"}).write(folder)
    command, env = [sys.executable, "-m", "pytest", "-n", "2", *args], os.environ | ENVIRONMENT
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_options_of_the_ini_file_alone_give_summary_and_json(tmp_path):
    done = in_workers(tmp_path, MEASURING, OPTIONS + "llmperf_json = out.json\n")
    assert done.returncode == 0, done.stdout
    assert "0 compared, 1 not compared (1 MEASURED)" in done.stdout
    assert [case["status"] for case in json.loads((tmp_path / "out.json").read_text())["cases"]] == ["MEASURED"]


def test_a_json_file_is_written_though_no_test_came_to_an_outcome(tmp_path):
    done = in_workers(tmp_path, MEASURING, OPTIONS + "llmperf_json = out.json\n", "--llmperf-selftest")
    assert done.returncode == 0, done.stdout
    assert json.loads((tmp_path / "out.json").read_text())["cases"] == []


def test_a_project_without_our_tests_has_no_word_of_us(tmp_path):
    done = in_workers(tmp_path, "def test_x():\n    pass\n", "llmperf_rounds = many\nllmperf_json = out.json\n")
    assert done.returncode == 0, done.stdout
    assert "llmperf:" not in done.stdout
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("source", "ini", "message"),
    [
        (MEASURING, "llmperf_rounds = many\n", "--llmperf-rounds='many': must be a whole number"),
        (
            "import pytest\n\n@pytest.mark.llmperf(tp=0)\n" + MEASURING,
            OPTIONS,
            "test_it.py::test_x: tp=0: the smallest value is 1",
        ),
        (MEASURING, OPTIONS + "llmperf_json = /proc/no/such\n", "--llmperf-json=/proc/no/such: cannot be written"),
    ],
    ids=["a bad value", "a bad marker", "a target that cannot be written"],
)
def test_what_workers_refuse_is_a_usage_error(tmp_path, source, ini, message):
    done = in_workers(tmp_path, source, ini)
    assert done.returncode == 4, done.stdout
    assert message in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_an_interpreter_without_vllm_is_refused_before_any_turn(tmp_path):
    venv.create(tmp_path / "bare", symlinks=True)
    done = in_workers(tmp_path, MEASURING, f"llmperf_python = {tmp_path}/bare/bin/python\n")
    assert done.returncode == 4, done.stdout
    assert "bare/bin/python has no vLLM. Install vLLM there" in done.stderr
    assert "waiting" not in done.stdout


def test_the_terminal_shows_what_workers_do(run):
    result = run(MEASURING, "-n", "1")
    assert "llmperf: [gw0] engine 1 (tiny tp1): starting" in result.stdout
    assert "llmperf: [gw0] test_it.py::test_x[tiny-tp1-c8] launch 1, round 2/2" in result.stdout
    assert result.outcomes == {"passed": 1}
    assert "llmperf:" not in run(MEASURING, "-n", "1", "-q").stdout


def test_a_junit_file_has_each_test_once(run, tmp_path):
    run(MEASURING, "-n", "1", "--junitxml=junit.xml")
    assert (tmp_path / "junit.xml").read_text().count("<testcase ") == 1
