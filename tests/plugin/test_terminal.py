"""What the terminal shows: progress, one changing line that is gone before each result; summaries in full, numbers masked."""

from __future__ import annotations

import os
import pty
import subprocess
import textwrap

from pytest_llmperf.testing import Example
from tests.conftest import QUICK, SERVING

RECORD = ("--update-baselines", "--llmperf-launches=2")
SUMMARY = ("= llmperf =", " compared")
HOST = {"LLMPERF_SIMULATED_GPUS": "4"}
SWEEP = """
import pytest

@pytest.mark.llmperf(tp=[1, 2])
def test_scaling(llmperf_sweep, baseline):
    assert llmperf_sweep(prompt_tokens=16, output_tokens=6, requests=8) == baseline
"""


def expected(text):
    return textwrap.dedent(text).strip("\n")


def test_progress_on_a_terminal_is_one_line_that_goes_away(tmp_path):
    project = Example({"test_it.py": SERVING}, QUICK)
    project.write(tmp_path)
    ours, theirs = pty.openpty()
    command = project.command(tmp_path, "--update-baselines", "--llmperf-launches=1", "--color=no")
    child = subprocess.Popen(command, cwd=tmp_path, stdout=theirs, stderr=theirs, env={**os.environ, "COLUMNS": "100"})
    os.close(theirs)
    written = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # how a pty says that its other end is closed
            break
        written += piece
    os.close(ours)
    assert child.wait(60) == 0
    screen = [line.rpartition("\r")[2] for line in written.decode().replace("\r\n", "\n").split("\n")]
    assert b"\rllmperf: engine 1 (tiny tp1): starting" in written
    assert not [line for line in screen if line.startswith("llmperf: engine")]
    assert any(line.startswith("test_it.py .") for line in screen)


def test_the_header_has_host_cases_and_baselines(run):
    assert run(SERVING, *RECORD, **HOST).masked("llmperf: ", "llmperf: ") == expected("""
        llmperf: Nx Simulated, N links each, all to all (simulated); N test on N engine; baselines: N found, N new
    """)


def test_progress_names_engines_and_rounds(run):
    assert run(SERVING, *RECORD, **HOST).masked("llmperf: engine", "round 2/2") == expected("""
        llmperf: engine N (tiny tp1): starting
        llmperf: engine N: rank N of N is up
        llmperf: engine N: KV cache: N tokens
        llmperf: engine N: server is up
        llmperf: engine N (tiny tp1): ready after N s on GPU N
        llmperf: test_it.py::test_serving[tiny-tp1-c8] launch N, round N/N: N tok/s
        llmperf: test_it.py::test_serving[tiny-tp1-c8] launch N, round N/N: N tok/s
    """)


def test_a_recording_shows_the_file_and_every_metric(run):
    assert run(SERVING, *RECORD).masked("= llmperf =", "requests_per_s") == expected("""
        === llmperf ===
        case  output tok/s  TTFT p50  TPOT p50  preempt.  launches  verdict
        ---  ---  ---  ---  ---  ---  ---
        test_it.py::test_serving[tiny-tp1-c8]  N  N ms  N ms  N  N  RECORDED
        recorded baselines/simulated/test_it/test_serving-tiny-tp1-c8.json: new, N launches
        no steady window: N requests are N wave of N, and throughput is that of filling and emptying the engine too; N requests or more have one
        metric  old  new  change
        ---  ---  ---  ---
        output_tokens_per_s  -  N tokens/s  -
        total_tokens_per_s  -  N tokens/s  -
        requests_per_s  -  N requests/s  -
    """)  # noqa: E501  as it stands on the terminal


def test_a_pass_is_a_line_each_for_case_and_suite(run):
    run(SERVING, *RECORD)
    assert run(SERVING).masked(*SUMMARY) == expected("""
        === llmperf ===
        case  output tok/s  TTFT p50  TPOT p50  preempt.  launches  verdict
        ---  ---  ---  ---  ---  ---  ---
        test_it.py::test_serving[tiny-tp1-c8]  N  N ms  N ms  N  N  PASS
        suite as a whole: N% better [N%, N%] on the mean of all comparisons: PASS
        N compared (N PASS), N not compared
    """)


def test_a_regression_explains_itself_and_stands_in_the_summary(run):
    run(SERVING, *RECORD)
    result = run(SERVING, "--llmperf-engine-args=--sim-slow-down 2.5")
    assert result.masked("E  ", "e2e_p50_s") == expected("""
        E  assert REGRESSED test_it.py::test_serving[tiny-tp1-c8] (N launches against N of the baseline)
        E  output_tokens_per_s: N tokens/s -> N tokens/s, N% worse
        E  ttft_p50_s: N ms -> N ms, N% worse
        E  tpot_p50_s: N ms -> N ms, N% worse
        E  e2e_p50_s: N ms -> N ms, N% worse
    """)
    assert result.masked("changed since", "output_tokens_per_s") == expected("""
        changed since the baseline: engine argument --sim-slow-down: not set -> N
        no steady window: N requests are N wave of N, and throughput is that of filling and emptying the engine too; N requests or more have one
        metric  baseline  now  change  bounds  tolerance  detectable  verdict  rule
        ---  ---  ---  ---  ---  ---  ---  ---  ---
        output_tokens_per_s  N tokens/s  N tokens/s  N% worse  [N%, N%]  N %  N %  REGRESSED  proven slower, by half the tolerance or more
    """)  # noqa: E501  as it stands on the terminal
    assert result.masked(*SUMMARY) == expected("""
        === llmperf ===
        case  output tok/s  TTFT p50  TPOT p50  preempt.  launches  verdict
        ---  ---  ---  ---  ---  ---  ---
        test_it.py::test_serving[tiny-tp1-c8]  N (N% worse)  N ms (N% worse)  N ms (N% worse)  N  N  REGRESSED
        suite as a whole: N% worse [N%, N%] on the mean of all comparisons; baselines of N runs or more would tell whether the host is slow today: INCONCLUSIVE
        N compared (N REGRESSED), N not compared
    """)  # noqa: E501  as it stands on the terminal


def test_a_missing_baseline_says_how_to_record_it(run):
    result = run(SERVING)
    assert result.masked("NO-BASELINE test_it", "record it with").splitlines() == [
        "NO-BASELINE test_it.py::test_serving[tiny-tp1-c8] (N launches)",
        "  no baseline is stored for simulated: baselines/simulated/test_it/test_serving-tiny-tp1-c8.json does not exist",
        "  record it with: pytest --update-baselines 'test_it.py::test_serving[tiny-tp1-c8]'",
    ]
    assert result.masked(*SUMMARY).splitlines()[3:] == [
        "test_it.py::test_serving[tiny-tp1-c8]  -  -  -  -  N  NO-BASELINE",
        "N compared, N not compared (N NO-BASELINE)",
    ]


def test_a_sweep_has_a_table_of_its_degrees(run):
    assert run(SWEEP, *RECORD, **HOST).masked("scaling of", " compared") == expected("""
        scaling of test_it.py::test_scaling[tiny-sweep-c8]
        GPUs  output tok/s  speed-up  efficiency  tok/s per GPU  TTFT p50  TPOT p50
        ---  ---  ---  ---  ---  ---  ---
        N  N  Nx  N%  N  N ms  N ms
        N  N  Nx  N%  N  N ms  N ms
        recommended: TP N, with N output tok/s per GPU; TP N: N
        N compared, N not compared (N RECORDED)
    """)


def test_a_calibration_shows_the_parts_of_the_noise(run):
    run(SERVING, *RECORD)
    assert run(SERVING, "--llmperf-calibrate=2").masked("recorded baselines", "total_tokens_per_s") == expected("""
        recorded baselines/simulated/test_it/test_serving-tiny-tp1-c8.json: extended by N launches of the same version to N, from N runs
        no steady window: N requests are N wave of N, and throughput is that of filling and emptying the engine too; N requests or more have one
        metric  old  new  change  rounds sd  launches sd  jobs sd  detectable  tolerance to propose
        ---  ---  ---  ---  ---  ---  ---  ---  ---
        output_tokens_per_s  N tokens/s  N tokens/s  same  N%  N%  ?  N %  N %
        total_tokens_per_s  N tokens/s  N tokens/s  same
    """)  # noqa: E501  as it stands on the terminal


def test_a_self_test_counts_what_it_injected(run):
    run(SERVING, *RECORD)
    assert run(SERVING, "--llmperf-selftest").masked("llmperf self-test", "injected") == expected("""
        === llmperf self-test ===
        N changes injected into stored samples; none judged wrongly
    """)
