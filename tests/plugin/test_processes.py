"""No process outlives its run: after a normal end, a stubborn engine, Ctrl-C, and SIGKILL of pytest."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import psutil
import pytest

from pytest_llmperf.testing import Example

if TYPE_CHECKING:
    from pathlib import Path

LONG = """
def test_long(llmperf):
    llmperf(prompt_tokens=8, output_tokens=2000, requests=8)
"""


def wait_until(condition, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)  # a poll with a deadline
    return False


def marked(folder: Path) -> list[psutil.Process]:
    """Return every process that this test's run has started: they carry the folder in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("LLMPERF_TEST_MARK") == str(folder):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture
def start(tmp_path):
    """Start a run in the background and wait until its engine is measured."""

    def start_run(*engine_args: str, kind: str = "simulated", source: str = LONG, timeout_s: float = 60.0):
        project = Example({"test_it.py": source}, (f"--llmperf-engine={kind}",))
        project.write(tmp_path)
        command = project.command(tmp_path, "-v", f"--llmperf-engine-args={' '.join(engine_args)}")
        environment = {**os.environ, "LLMPERF_TEST_MARK": str(tmp_path), "PYTHONUNBUFFERED": "1"}
        with (tmp_path / "output").open("w") as output:
            child = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=output, stderr=subprocess.STDOUT)
        ready = re.compile(r"engine 1 \(.*\): ready")
        assert wait_until(lambda: ready.search((tmp_path / "output").read_text()), timeout_s), (tmp_path / "output").read_text()
        return child

    yield start_run
    for process in marked(tmp_path):
        process.kill()


@pytest.mark.parametrize("stubborn", [(), ("--sim-stop-s", "inf", "--sim-children", "2")])
def test_no_process_is_left_15_s_after_sigkill_of_pytest(start, tmp_path, stubborn):
    child = start(*stubborn)
    assert len(marked(tmp_path)) >= 3  # supervisor, engine, load process
    child.kill()
    child.wait()
    assert wait_until(lambda: not marked(tmp_path), 15 + (5 if stubborn else 0)), marked(tmp_path)


def test_ctrl_c_stops_the_engine_and_keeps_what_was_measured(start, tmp_path):
    source = LONG + "\ndef test_first(llmperf):\n    llmperf(requests=8, output_tokens=2)\n"
    child = start(source=source.replace("test_long", "test_z_long"))
    child.send_signal(signal.SIGINT)
    assert child.wait(30) == 2
    assert wait_until(lambda: not marked(tmp_path), 15), marked(tmp_path)
    assert "KeyboardInterrupt" in (tmp_path / "output").read_text()


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
