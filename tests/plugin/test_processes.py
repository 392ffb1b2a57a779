"""No process outlives its run: after a normal end, a stubborn engine, Ctrl-C, and SIGKILL of pytest."""

from __future__ import annotations

import json
import signal

import pytest

from tests.conftest import LONG
from tests.processes import marked, wait_until


@pytest.mark.parametrize("stubborn", [(), ("--sim-stop-s", "inf", "--sim-children", "2")])
def test_no_process_is_left_15_s_after_sigkill_of_pytest(start, tmp_path, stubborn):
    child = start(*stubborn)
    assert len(marked(tmp_path)) >= 3  # supervisor, engine, load process
    child.kill()
    child.wait()
    assert wait_until(lambda: not marked(tmp_path), 15), marked(tmp_path)


def test_ctrl_c_stops_the_engine_and_keeps_what_was_measured(start, tmp_path):
    source = "def test_first(llmperf):\n    llmperf(requests=8, output_tokens=2)\n" + LONG
    child = start(source=source)
    assert wait_until(lambda: "PASSED" in (tmp_path / "output").read_text(), 30)
    child.send_signal(signal.SIGINT)
    assert child.wait(30) == 2
    assert wait_until(lambda: not marked(tmp_path), 15), marked(tmp_path)
    assert "KeyboardInterrupt" in (tmp_path / "output").read_text()
    cases = json.loads((tmp_path / "llmperf.json").read_text())["cases"]
    assert [case["nodeid"] for case in cases if case["launches"]] == ["test_it.py::test_first[tiny-tp1-c8]"]


def test_an_engine_that_ignores_sigterm_is_killed_with_its_children(run, tmp_path):
    quick = "def test_x(llmperf):\n    llmperf(requests=8, output_tokens=2)\n"
    result = run(
        quick,
        "--llmperf-engine-args=--sim-stop-s inf --sim-children 2",
        "--llmperf-stop-grace=1",
        LLMPERF_TEST_MARK=str(tmp_path),
    )
    assert result.outcomes == {"passed": 1}, result.stdout
    assert not marked(tmp_path)


def test_a_normal_run_leaves_no_process(run, tmp_path):
    result = run("def test_x(llmperf):\n    llmperf(requests=8, output_tokens=2)\n", LLMPERF_TEST_MARK=str(tmp_path))
    assert result.outcomes == {"passed": 1}
    assert not marked(tmp_path)
