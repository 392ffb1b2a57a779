"""What ends an engine with everything that it has started, whatever these processes have made of themselves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from multiprocessing import shared_memory
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from pytest_llmperf.measure.engines import supervisor
from tests.processes import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

# As a CUDA worker in its last seconds: the main thread has ended, others have not. The kernel then shows a zombie.
HEADLESS = """
import ctypes, os, pathlib, sys, threading, time

def work():
    pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
    time.sleep(600)

threading.Thread(target=work, daemon=True).start()
ctypes.CDLL(None).pthread_exit(None)
"""
ENGINE = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', *sys.argv[1:]]).wait()"


def ended(command: list[str], note: Path, ready: Callable[[str], bool] = bool) -> dict[str, Any]:
    """Run a command under the supervisor until its note says that it is ready; return what the supervisor prints last."""
    child = subprocess.Popen(
        [sys.executable, supervisor.__file__, str(os.getpid()), "0.2", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert wait_until(lambda: note.is_file() and note.read_text() and ready(note.read_text()), 30)
        printed, _ = child.communicate(timeout=30)
    finally:
        child.kill()
    last: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return last


def looks_dead(pid: str) -> bool:
    """Return whether the kernel shows a zombie."""
    return psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE


def test_a_process_whose_main_thread_has_ended_still_runs_and_is_killed(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    result = ended([sys.executable, "-c", ENGINE, HEADLESS, str(note)], note, looks_dead)
    assert result["killed"] == [int(note.read_text())]
    assert not psutil.pid_exists(int(note.read_text()))


# vLLM's processes share memory in files, which Python's resource tracker removes when all who use them are gone.
SHARING = """
import pathlib, signal, sys, time
from multiprocessing import shared_memory

signal.signal(signal.SIGTERM, signal.SIG_IGN)
memory = shared_memory.SharedMemory(create=True, size=4096)
pathlib.Path(sys.argv[1]).write_text(memory.name)
time.sleep(600)
"""


def test_memory_that_a_killed_engine_shared_is_given_back(tmp_path: Path) -> None:
    note = tmp_path / "name"
    result = ended([sys.executable, "-c", SHARING, str(note)], note)
    assert len(result["killed"]) == 1  # the engine; the tracker has ended by itself
    assert not Path("/dev/shm", note.read_text().lstrip("/")).exists()


# What vLLM leaves: files that nobody will remove. The first one was there before; the last one is a compile cache.
LEAVING = """
import mmap, os, pathlib, sys, time
from multiprocessing import resource_tracker, shared_memory

resource_tracker.register = lambda *_: None
kept = [shared_memory.SharedMemory(name=sys.argv[2])]
kept += [shared_memory.SharedMemory(create=True, size=4096) for _ in range(2)]
pathlib.Path(sys.argv[3]).write_bytes(bytes(4096))
cache = mmap.mmap(os.open(sys.argv[3], os.O_RDONLY), 4096, mmap.MAP_PRIVATE, mmap.PROT_READ)
pathlib.Path(sys.argv[1]).write_text(" ".join(memory.name for memory in kept))
time.sleep(600)
"""


def test_shared_memory_that_an_engine_leaves_is_removed_but_nothing_else(tmp_path: Path) -> None:
    note = tmp_path / "names"
    before = shared_memory.SharedMemory(create=True, size=4096)
    cache = Path("/dev/shm", f"{before.name.lstrip('/')}-compiled.so")  # with the beginning of what may be removed
    try:
        ended([sys.executable, "-c", LEAVING, str(note), before.name, str(cache)], note)
        older, *own = note.read_text().split()
        assert Path("/dev/shm", older.lstrip("/")).exists()
        assert [Path("/dev/shm", name.lstrip("/")).exists() for name in own] == [False, False]
        assert cache.exists()
    finally:
        before.close()
        before.unlink()
        cache.unlink(missing_ok=True)


STUBBORN = """
import os, pathlib, signal, sys, time

signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = os.fork()
if not child:
    os.setsid()
    time.sleep(600)
pathlib.Path(sys.argv[1]).write_text(f"{os.getpid()} {child} {os.getppid()}")
time.sleep(600)
"""


def stubborn(note: Path, grace_s: float) -> tuple[subprocess.Popen[bytes], list[int]]:
    """Return the outer supervisor of an engine that ignores SIGTERM, and the ids of engine, its child, inner supervisor."""
    command = [sys.executable, "-c", STUBBORN, str(note)]
    outer = subprocess.Popen(
        [sys.executable, "-P", supervisor.__file__, str(os.getpid()), str(grace_s), *command], stdin=subprocess.PIPE
    )
    assert wait_until(lambda: note.is_file() and len(note.read_text().split()) == 3, 30)
    return outer, [int(word) for word in note.read_text().split()]


def test_when_one_supervisor_is_killed_the_other_ends_the_engine(tmp_path: Path) -> None:
    for victim in ("outer", "inner"):
        outer, pids = stubborn(tmp_path / victim, grace_s=600)
        os.kill(outer.pid if victim == "outer" else pids[2], signal.SIGKILL)
        assert wait_until(lambda pids=pids: not any(map(psutil.pid_exists, pids)), 30)
        assert outer.stdin is not None
        outer.stdin.close()
        assert outer.wait(30) == (-signal.SIGKILL if victim == "outer" else 128 + signal.SIGKILL)


def test_a_word_stops_it_though_another_process_has_the_pipe(tmp_path: Path) -> None:
    outer, pids = stubborn(tmp_path / "note", grace_s=0.2)
    assert outer.stdin is not None
    other = os.dup(outer.stdin.fileno())
    try:
        outer.stdin.write(b"stop\n")
        outer.stdin.close()
        assert outer.wait(30) == 0
        assert not any(map(psutil.pid_exists, pids))
    finally:
        os.close(other)


def test_a_supervisor_whose_parent_has_ended_already_starts_nothing(tmp_path: Path) -> None:
    other = psutil.Process().ppid()  # not the parent of what is started here
    done = subprocess.run(
        [sys.executable, supervisor.__file__, str(other), "1", sys.executable, "-c", "print('started')"],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
        check=True,
    )
    assert done.stdout == done.stderr == b""
