"""The marker restricts, the option selects; too few GPUs skip, and fail when that was asked for."""

from __future__ import annotations

GRID = """
import pytest

@pytest.mark.llmperf(tp=[1, 2], concurrency=[2, 4])
def test_grid(llmperf):
    llmperf(prompt_tokens=8, output_tokens=2, requests=4)

def test_open(llmperf):
    llmperf(prompt_tokens=8, output_tokens=2, requests=8)
"""


def nodes(result):
    return [line.partition("::")[2] for line in result.stdout.splitlines() if line.startswith("test_it.py::")]


def test_without_options_every_point_of_the_marker_runs(run):
    assert nodes(run(GRID, "--co", "-q")) == [
        "test_grid[tiny-tp1-c2]", "test_grid[tiny-tp1-c4]", "test_open[tiny-tp1-c8]",
        "test_grid[tiny-tp2-c2]", "test_grid[tiny-tp2-c4]",
    ]  # fmt: skip


def test_an_option_selects_from_the_marker_and_deselects_the_rest(run):
    result = run(GRID, "--co", "-q", "--llmperf-tp=2")
    assert nodes(result) == ["test_grid[tiny-tp2-c2]", "test_grid[tiny-tp2-c4]", "test_open[tiny-tp2-c8]"]
    assert "2 deselected" in result.stdout


def test_an_option_with_several_values_runs_an_open_test_at_each(run):
    assert nodes(run(GRID, "--co", "-q", "--llmperf-tp=1,2", "-k", "open")) == [
        "test_open[tiny-tp1-c8]", "test_open[tiny-tp2-c8]",
    ]  # fmt: skip


def test_the_header_says_host_engines_and_baselines(run):
    result = run(GRID, "--co", "--llmperf-tp=2")
    assert "llmperf: 8x Simulated, 18 links each, all to all (simulated); 3 tests on 1 engine" in result.stdout
    assert "; baselines: 0 found, 0 new; 2 deselected" in result.stdout


def test_too_few_gpus_skip_with_the_numbers(run):
    result = run(GRID, "--llmperf-tp=64", "-rs")
    assert result.outcomes == {"skipped": 1, "deselected": 4}
    assert "needs 64 GPUs (TP 64 x PP 1 x DP 1 = 64), this host has 8 (8x Simulated)" in result.stdout
    assert result.engine_starts == 0
    assert "0 compared, 1 not compared (1 SKIPPED)" in result.stdout


def test_too_few_gpus_fail_under_require_gpus(run):
    result = run(GRID, "--llmperf-tp=64", "--llmperf-require-gpus")
    assert result.returncode == 1
    assert "needs 64 GPUs" in result.stdout
    assert "--llmperf-require-gpus turns this skip into a failure" in result.stdout


def test_pp_and_dp_are_axes_too(run):
    result = run(GRID, "--co", "-q", "--llmperf-pp=2", "--llmperf-dp=2", "-k", "open")
    assert nodes(result) == ["test_open[tiny-tp1-pp2-dp2-c8]"]


def test_the_closer_of_class_and_test_markers_wins(run):
    source = """
import pytest

@pytest.mark.llmperf(tp=[1, 2], concurrency=4)
class TestServing:
    @pytest.mark.llmperf(tp=4)
    def test_one(self, llmperf):
        pass
"""
    assert nodes(run(source, "--co", "-q")) == ["TestServing::test_one[tiny-tp4-c4]"]


def test_ini_twins_set_what_options_set_and_the_command_line_wins(run):
    ini = "[pytest]\nllmperf_tp = 2\nllmperf_concurrency = 4\n"
    files = {"test_it.py": GRID, "pytest.ini": ini}
    assert nodes(run(files, "--co", "-q", "-k", "open")) == ["test_open[tiny-tp2-c4]"]
    assert nodes(run(files, "--co", "-q", "-k", "open", "--llmperf-tp=4")) == ["test_open[tiny-tp4-c4]"]
