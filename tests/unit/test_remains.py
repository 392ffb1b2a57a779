"""What is left of an engine is found by its mark, whatever its processes have made of themselves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_llmperf.measure.engines import remains
from tests.processes import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

SLEEP = "import time; time.sleep(600)"
# It leaves its session and its parent, and only a thread of it goes on.
ELUSIVE = """
import ctypes, os, threading, time

if os.fork():
    os._exit(0)
os.setsid()
threading.Thread(target=time.sleep, args=(600,)).start()
ctypes.CDLL(None).pthread_exit(None)
"""


def start(code: str, mark: str, variable: str = remains.ENGINE) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-I", "-S", "-c", code], env={**os.environ, variable: mark})


@pytest.fixture
def mark() -> Iterator[str]:
    made = remains.new_mark()
    yield made
    for process in remains.marked(made):
        os.kill(process.pid, signal.SIGKILL)


def test_no_mark_is_the_beginning_of_another() -> None:
    marks = [remains.new_mark() for _ in range(12)]
    assert not [(one, other) for one in marks for other in marks if one != other and other.startswith(one)]
    assert all(one.startswith(f"{remains.owner()}-") for one in marks)


def test_only_processes_with_the_mark_are_ended(mark: str) -> None:
    other = remains.new_mark()
    ours, others = start(SLEEP, mark), start(SLEEP, other)
    try:
        assert wait_until(lambda: len(remains.marked(mark)) == 1, 30)
        assert remains.end(mark) == [ours.pid]
        assert ours.wait(30) == -signal.SIGKILL
        assert others.poll() is None
    finally:
        others.kill()
        others.wait()


def test_a_process_is_found_that_has_left_parent_session_and_main_thread(mark: str) -> None:
    start(ELUSIVE, mark).wait()

    def is_headless() -> bool:
        left = remains.marked(mark)
        return len(left) == 1 and b"\nState:\tZ" in Path(f"/proc/{left[0].pid}/status").read_bytes()

    assert wait_until(is_headless, 30)
    assert len(remains.end(mark)) == 1
    assert not remains.marked(mark)


def test_a_supervisor_that_lives_is_waited_for(mark: str) -> None:
    supervisor, engine = start("import time; time.sleep(1)", mark, remains.SUPERVISOR), start(SLEEP, mark)
    assert wait_until(lambda: len(remains.marked(mark)) == 2, 30)
    assert remains.end(mark) == [engine.pid]
    assert supervisor.wait(0) == 0
    engine.wait()


def test_an_owner_is_gone_when_its_process_is_another_or_dead() -> None:
    child = subprocess.Popen([sys.executable, "-I", "-S", "-c", "input()"], stdin=subprocess.PIPE)
    owner = remains.owner(child.pid)
    assert not remains.is_gone(owner)
    assert not remains.is_gone(f"{owner}-7.")
    assert remains.is_gone(f"{owner}0")  # its process id was given away again
    child.kill()
    assert wait_until(lambda: remains.is_gone(owner), 30)  # though nobody has waited for it yet
    child.communicate()
    assert remains.is_gone(owner)


def test_owners_of_other_hosts_and_containers_are_never_gone() -> None:
    boot, namespace, _, start_ticks = remains.owner().split("-")
    assert not remains.is_gone(f"ffffffff-{namespace}-999999999-{start_ticks}")
    assert not remains.is_gone(f"{boot}-1-999999999-{start_ticks}")


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_folders_of_those_who_are_gone_are_removed_and_no_others(temporary: Path) -> None:
    gone = f"{remains.owner()}0"
    names = [f"llmperf-{name}" for name in (f"logs-{gone}-a", f"logs-{gone}-kept", f"logs-{remains.owner()}-a", "logs-a", "own")]
    for name in names:
        (temporary / name).mkdir()
    (temporary / names[1] / remains.KEEP).touch()
    (temporary / f"llmperf-logs-{gone}-link").symlink_to(temporary / "llmperf-own")
    remains.sweep()
    left = {path.name for path in temporary.iterdir()}
    assert left == {*names[1:], f"llmperf-logs-{gone}-link"}


def test_an_engine_whose_run_is_gone_is_ended_by_the_next_one(temporary: Path) -> None:
    mark = f"{remains.owner()}0-0."
    engine, supervised = start(SLEEP, mark), start(SLEEP, f"{remains.owner()}0-1.")
    supervisor = start(SLEEP, f"{remains.owner()}0-1.", remains.SUPERVISOR)
    try:
        assert wait_until(lambda: len(remains.marked(f"{remains.owner()}0-")) == 3, 30)
        remains.sweep()
        assert engine.wait(30) == -signal.SIGKILL
        assert supervised.poll() is None  # who supervises it sees to it
    finally:
        for process in (engine, supervised, supervisor):
            process.kill()
            process.wait()


def test_a_sweep_that_hangs_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    let_go, swept = threading.Event(), threading.Event()
    monkeypatch.setattr(remains, "sweep", lambda: let_go.wait(30) and swept.set())
    remains.sweep_within(0.05)
    assert not swept.is_set()
    let_go.set()
    assert swept.wait(30)
