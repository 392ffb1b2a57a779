"""Finding every process that a run has started."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def wait_until(condition: Callable[[], object], timeout_s: float) -> bool:
    """Return whether the condition came true in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)  # a poll with a deadline
    return False


def marked(folder: Path) -> list[psutil.Process]:
    """Return every process that this test's run has started: they carry the folder in their environment."""
    processes = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("LLMPERF_TEST_MARK") == str(folder):
                processes.append(process)
        except psutil.Error:
            continue
    return processes
