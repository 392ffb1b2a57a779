"""Progress on a real terminal: one changing line, gone before each result."""

from __future__ import annotations

import os
import pty
import subprocess

from pytest_llmperf.testing import Example
from tests.conftest import QUICK, SERVING


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
