"""Stand between pytest and an engine, so that the engine ends when pytest does, however pytest ends.

Run as a script: `supervisor.py GRACE_S COMMAND ...`. It starts the command in a session of its own and watches stdin: when
that closes - because pytest asked for a stop, or because the kernel closed it for a pytest that was killed - the engine
gets SIGTERM, GRACE_S seconds, and then SIGKILL for everything it has started. It imports no part of the package.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterable

_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_PDEATHSIG = 1
_TRACKER_S = 3.0
"""How long a resource tracker has to remove what the others have left."""
_LIBC = ctypes.CDLL(None, use_errno=True)


def main() -> int:
    """Run the command until it ends or stdin does; return its exit code."""
    grace_s, command = float(sys.argv[1]), sys.argv[2:]
    # Orphans of the engine (vLLM's workers, whose parent was killed) come to this process, not to init: none is lost.
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the terminal's Ctrl-C is pytest's business; our end is the end of stdin
    began_s = time.time()  # files have wall-clock times
    engine = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True, preexec_fn=_die_with_supervisor
    )
    print(json.dumps({"pid": engine.pid}), flush=True)
    asked = _wait_for_end(engine)
    shared = _mapped(_descendants(engine))
    if asked:
        engine.terminate()
        _wait(engine, grace_s)
    killed = _kill_all(engine)
    _remove(shared, since_s=began_s)
    print(json.dumps({"exit": engine.wait(), "asked": asked, "killed": killed}), flush=True)
    return 0


def _die_with_supervisor() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)  # ignored signals would be inherited
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _wait_for_end(engine: subprocess.Popen[bytes]) -> bool:
    """Return True when stdin has ended, False when the engine has."""
    ended = os.pidfd_open(engine.pid)
    ready, _, _ = select.select([sys.stdin, ended], [], [])
    os.close(ended)
    return sys.stdin in ready


def _wait(engine: subprocess.Popen[bytes], grace_s: float) -> None:
    """Wait until the engine and all it has started are gone, at most the grace time."""
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline and (engine.poll() is None or _descendants(engine)):
        time.sleep(0.02)  # a poll with a deadline: there is no event for "the last descendant is gone"


def _descendants(engine: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return every living descendant; zombies that came to this process are reaped."""
    living = []
    for process in psutil.Process().children(recursive=True):
        try:
            # A process whose main thread has ended looks like a zombie while its other threads run, as CUDA's do at the end.
            if process.status() != psutil.STATUS_ZOMBIE or process.num_threads() > 1:
                living.append(process)
            elif process.pid != engine.pid and process.ppid() == os.getpid():  # the engine's own exit code is Popen's
                os.waitpid(process.pid, os.WNOHANG)
        except (psutil.NoSuchProcess, ChildProcessError):
            continue
    return living


def _kill_all(engine: subprocess.Popen[bytes]) -> list[int]:
    """Kill every descendant until none is left, also those that left the session; return their process ids.

    Python's resource trackers, which remove what the others have shared in /dev/shm, end by themselves when these are gone.
    """
    killed: list[int] = []
    deadline = time.monotonic() + 10
    patience = time.monotonic() + _TRACKER_S
    while (living := _descendants(engine)) and time.monotonic() < deadline:
        others = [process for process in living if not _is_tracker(process)]
        if others:
            patience = time.monotonic() + _TRACKER_S
        for process in others or (living if time.monotonic() > patience else ()):
            if process.pid not in killed:
                killed.append(process.pid)
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(others or living, timeout=1 if others else 0.05)
    return killed


def _is_tracker(process: psutil.Process) -> bool:
    try:
        return "multiprocessing.resource_tracker" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def _mapped(processes: Iterable[psutil.Process]) -> set[Path]:
    """Return the files of shared memory that processes have mapped."""
    found: set[Path] = set()
    for process in processes:
        with contextlib.suppress(OSError), Path(f"/proc/{process.pid}/maps").open() as file:
            found.update(Path(line.split(maxsplit=5)[-1].strip()) for line in file if " /dev/shm/" in line)
    return found


def _remove(shared: set[Path], *, since_s: float) -> None:
    """Remove what the engine shared and has left: vLLM kills its processes, with those that would have cleaned up.

    What was there before the engine, or is used by another process too, is not the engine's.
    """
    left = {path for path in shared if path.exists()}
    for path in left - (_mapped(psutil.process_iter()) if left else set()):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime >= since_s:
                path.unlink()


if __name__ == "__main__":
    sys.exit(main())
