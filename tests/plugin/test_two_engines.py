"""Two engines in one test: `llmperf(..., engine_args=...)` starts another one in the place of the test's own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

EXAMPLE = (Path(__file__).parents[2] / "examples" / "test_engine_arguments.py").read_text()
LOAD = "prompt_tokens=16, output_tokens=6, requests=16"
TWO = f"""
import pytest

@pytest.mark.llmperf(engine_args="--max-num-seqs 8 --seed 1")
def test_two(llmperf, llm_engine, baseline):
    own = llmperf({LOAD})
    other = llmperf({LOAD}, engine_args="--max-num-seqs 2")
    assert other == baseline
    assert own == baseline
    assert other["output_tokens_per_s"] < own["output_tokens_per_s"]
"""


def engines(result):
    """Return per case the engine arguments that it was measured with, and how many launches it had."""
    return {case["id"].rpartition("]")[2]: (case["engine"]["args"], len(case["launches"])) for case in result.cases}


def test_each_engine_has_a_baseline_of_its_own(run):
    recorded = run(TWO, "--update-baselines", "--llmperf-launches=2")
    assert recorded.outcomes == {"passed": 1}, recorded.stdout
    assert engines(recorded) == {"": ("--max-num-seqs 8 --seed 1", 2), "#2": ("--max-num-seqs 2 --seed 1", 2)}
    assert recorded.engine_starts == 4  # each launch of the test has one of either
    compared = run(TWO)
    assert set(compared.statuses.values()) == {"PASS"}, compared.stdout
    slower = run(TWO.replace("--max-num-seqs 2", "--max-num-seqs 1 --sim-slow-down 5"))
    assert list(slower.statuses.values()) == ["MEASURED", "REGRESSED"], slower.stdout
    assert "changed since the baseline: engine argument --max-num-seqs: 2 -> 1" in slower.stdout


def test_a_decided_case_starts_no_engine_again(run):
    run(TWO, "--update-baselines", "--llmperf-launches=2")
    source = TWO.replace("assert own == baseline", "assert own['failed_requests'] == 0")
    result = run(source, "--llmperf-tolerance=0.01%", "--llmperf-max-launches=3")
    assert {name: count for name, (_, count) in engines(result).items()} == {"": 3, "#2": 3}, result.stdout


@pytest.mark.parametrize("form", ["'--max-num-seqs 2'", "['--max-num-seqs', '2']", "{'max_num_seqs': 2}"])
def test_arguments_have_the_markers_forms(run, form):
    result = run(f"def test_it(llmperf):\n    llmperf({LOAD}, engine_args={form})\n")
    assert engines(result) == {"": ("--max-num-seqs 2", 1)}, result.stdout


def test_the_tests_own_engine_comes_back(run):
    source = f"""
def test_it(llmperf):
    llmperf({LOAD})
    llmperf({LOAD}, engine_args="--seed 2")
    llmperf({LOAD}, engine_args="--seed 2")
    llmperf({LOAD})
"""
    result = run(source, "--llmperf-engine-args=--seed 1", "-s")
    assert [args for args, _ in engines(result).values()] == ["--seed 1", "--seed 2", "--seed 2", "--seed 1"]
    assert result.engine_starts == 3, result.stdout


def test_the_engine_that_is_left_serves_the_next_tests(run):
    source = f"""
import pytest

def test_first(llmperf):
    llmperf({LOAD})
    llmperf({LOAD}, engine_args="--seed 2")

@pytest.mark.llmperf(engine_args="--seed 2")
def test_second(llmperf):
    llmperf({LOAD})
"""
    assert run(source, "-s").engine_starts == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("'--tensor-parallel-size 2'", "llmperf(engine_args=...): --tensor-parallel-size is set by the plugin; use --llmperf-tp"),
        ("'64'", "'64' is not an engine argument; arguments begin with --"),
        ("5", "llmperf(engine_args=...)=5: must be a text, a list of words or a dict"),
    ],
)
def test_bad_arguments_fail_the_test_in_words(run, arguments, message):
    result = run(f"def test_it(llmperf):\n    llmperf({LOAD}, engine_args={arguments})\n")
    assert result.outcomes == {"failed": 1}
    assert message in result.stdout
    assert "Traceback" not in result.stdout


def test_an_engine_that_does_not_start_makes_the_case_invalid(run):
    result = run(f"def test_it(llmperf):\n    llmperf({LOAD}, engine_args='--sim-crash-at-start boom')\n")
    assert result.outcomes == {"failed": 1}
    assert list(result.statuses.values()) == ["INVALID"]


def test_an_endpoint_refuses_arguments_in_words(run, simulated_engine):
    source = f"def test_it(llmperf):\n    llmperf({LOAD}, engine_args='--seed 1')\n"
    result = run(source, f"--llmperf-url={simulated_engine.url}", quick=False)
    assert (
        f"this test's engine is the endpoint {simulated_engine.url}, whose arguments are what it was started with"
        in result.stdout
    )


def test_the_example_records_and_compares(run):
    quick = ("--llmperf-launches=2",)
    assert run(EXAMPLE, "--update-baselines", *quick).outcomes == {"passed": 2}
    compared = run(EXAMPLE)
    assert compared.outcomes == {"passed": 2}, compared.stdout
    assert re.search(r"test_prefix_caching_pays\[tiny-tp1-c8\]#2", compared.stdout)
