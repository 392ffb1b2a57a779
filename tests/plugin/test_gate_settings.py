"""Which metrics gate: by marker, ini file and command line; and what is told of a gate before anything is measured."""

from __future__ import annotations

import pytest

from tests.baselines import rewrite
from tests.conftest import SERVING

RECORD = ("--update-baselines", "--llmperf-launches=3")
SLOW = "--llmperf-engine-args=--sim-slow-down 4"
CASE = "test_it.py::test_serving[tiny-tp1-c8]"


def gating(result):
    """Return the gating metrics of the one case, and what became of each."""
    return {row["metric"]: row["status"] for row in result.cases[0]["verdict"]["metrics"] if row["status"]}


def marked(gate):
    return f"import pytest\n@pytest.mark.llmperf(gate={gate!r})\n{SERVING.strip()}\n"


def test_a_metric_that_does_not_gate_fails_nothing(run):
    run(SERVING, *RECORD)
    result = run(marked({"*_s": False}), SLOW)
    assert result.statuses == {CASE: "PASS"}, result.stdout
    assert set(gating(result)) == {"failed_requests", "preemptions", "kv_cache_tokens", "gpu_memory_peak_bytes"}


def test_the_marker_adds_to_what_the_suite_says(run):
    run(SERVING, *RECORD)
    ini = "[pytest]\nllmperf_gate = *=off,tpot_p50_s=80%\n"
    result = run({"test_it.py": marked({"e2e_p50_s": "70 %"}), "pytest.ini": ini})
    rows = {row["metric"]: row for row in result.cases[0]["verdict"]["metrics"]}
    assert gating(result).keys() == {"tpot_p50_s", "e2e_p50_s"}
    assert (rows["tpot_p50_s"]["tolerance"], rows["e2e_p50_s"]["tolerance"]) == (0.8, 0.7)


def test_command_line_beats_ini_file_and_marker_beats_both(run):
    run(SERVING, *RECORD)
    project = {"test_it.py": marked({"e2e_p50_s": "70 %"}), "pytest.ini": "[pytest]\nllmperf_gate = *=off\n"}
    result = run(project, "--llmperf-gate=tpot_p50_s=75%,e2e_p50_s=65%,ttft_p50_s=off")
    rows = {row["metric"]: row for row in result.cases[0]["verdict"]["metrics"]}
    assert "ttft_p50_s" not in gating(result)
    assert "output_tokens_per_s" in gating(result)
    assert (rows["tpot_p50_s"]["tolerance"], rows["e2e_p50_s"]["tolerance"]) == (0.75, 0.7)


def test_a_percentile_of_too_few_requests_says_how_many_it_takes(run):
    run(SERVING, *RECORD)
    result = run(marked({"ttft_p99_s": "on"}))
    assert result.statuses == {CASE: "NOT-COMPARABLE"}
    assert "a launch has 0.16 values beyond it, 10 are needed; about 1,000 requests a launch would do" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--llmperf-gate=speed=5%"], "--llmperf-gate: 'speed' is not a metric; known are output_tokens_per_s,"),
        (["--llmperf-gate=ttft_p50_s"], "--llmperf-gate='ttft_p50_s': write METRIC=TOLERANCE by comma"),
        (["--llmperf-gate=ttft_p50_s=500%"], "--llmperf-gate: ttft_p50_s='500%': must be a share between 0 and 1"),
        (["--llmperf-update=maybe"], "--llmperf-update=maybe: must be one of extend, replace"),
        (["--llmperf-calibrate=1"], "--llmperf-calibrate=1: one launch says nothing about noise"),
        (["--llmperf-calibrate=x"], "--llmperf-calibrate='x': must be a whole number"),
        (["--llmperf-selftest", "--update-baselines"], "--update-baselines and --llmperf-selftest: give only one of them"),
    ],
)
def test_a_wrong_option_is_a_usage_error(run, options, message):
    result = run(SERVING, *options)
    assert result.returncode == 4
    assert message in result.stderr


def test_a_marker_that_gates_no_metric_is_a_usage_error(run):
    result = run(marked({"speed": "5 %"}))
    assert result.returncode == 4
    assert f"{CASE}: llmperf(gate=...): 'speed' is not a metric" in result.stdout + result.stderr


# ------------------------------------------------------------------------------------------------ before it measures


def test_with_v_the_header_tells_what_the_baseline_can_find(run):
    run(SERVING, *RECORD)
    result = run(SERVING, "-v", "--co")
    [line] = [line for line in result.stdout.splitlines() if "found 19 times in 20 within 8 launches" in line]
    assert line.startswith(f"llmperf: {CASE}: slow-down found")
    assert all(name in line for name in ("output_tokens_per_s", "ttft_p50_s", "tpot_p50_s", "e2e_p50_s"))


def test_a_tolerance_that_noise_hides_is_announced_with_its_price(run, tmp_path):
    run(SERVING, *RECORD)
    path = next((tmp_path / "baselines").rglob("*.json"))

    def spread(data):
        for number, launch in enumerate(data["launches"]):
            for one in launch["rounds"]:
                one["metrics"]["ttft_p50_s"] = 0.005 * (1 + 0.1 * number)  # measured ones depend on this machine

    rewrite(path, spread)
    quiet = run(SERVING, "--co")
    assert "ttft_p50_s may not be decided" not in quiet.stdout  # 60 % is no small tolerance
    result = run(SERVING, "--co", "--llmperf-tolerance=3%")
    [line] = [line for line in result.stdout.splitlines() if "ttft_p50_s may not be decided" in line]
    assert "its tolerance of 3 % is below the" in line
    assert "--llmperf-max-launches=" in line or "extend it with --update-baselines" in line


# ------------------------------------------------------------------------------------------------ the self-test


def test_the_self_test_measures_nothing_and_lists_gates_that_cannot_fire(run):
    run(SERVING, *RECORD)
    sound = run(SERVING, "--llmperf-selftest")
    assert sound.outcomes == {"passed": 1}, sound.stdout
    assert sound.engine_starts == 0
    assert "changes injected into stored samples; none judged wrongly" in sound.stdout
    result = run(SERVING, "--llmperf-selftest", "--llmperf-gate=ttft_p90_s=15%,startup_s=1%")
    assert result.outcomes == {"failed": 1}
    assert "simulated: ttft_p90_s, 20% worse: does not fire: NOT-COMPARABLE" in result.stdout


def test_the_self_test_skips_what_has_no_baseline_and_works_with_xdist(run):
    run(SERVING, *RECORD)
    project = {
        "test_it.py": SERVING + "\n\ndef test_alone(llmperf):\n    pass\n",
        "test_new.py": SERVING,
    }
    result = run(project, "--llmperf-selftest", "-n", "2", "-rs")
    assert result.outcomes == {"passed": 1, "skipped": 2}, result.stdout
    assert "no baseline is stored for any host; record one with --update-baselines" in result.stdout
    assert "the test compares with no baseline" in result.stdout
    assert "changes injected into stored samples; none judged wrongly" in result.stdout
