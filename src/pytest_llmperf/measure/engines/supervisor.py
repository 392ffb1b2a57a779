"""Stand between pytest and an engine, so that the engine ends when pytest does, however pytest ends.

Run as a script: `supervisor.py GRACE_S COMMAND ...`. It starts the command in a session of its own and watches stdin: when
that closes - because pytest asked for a stop, or because the kernel closed it for a pytest that was killed - the engine
gets SIGTERM, GRACE_S seconds, and then SIGKILL for everything it has started. It imports no part of the package.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time

import psutil

_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


def main() -> int:
    """Run the command until it ends or stdin does; return its exit code."""
    grace_s, command = float(sys.argv[1]), sys.argv[2:]
    # Orphans of the engine (vLLM's workers, whose parent was killed) come to this process, not to init: none is lost.
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the terminal's Ctrl-C is pytest's business; our end is the end of stdin
    engine = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True, preexec_fn=_die_with_supervisor
    )
    print(json.dumps({"pid": engine.pid}), flush=True)
    asked = _wait_for_end(engine)
    if asked:
        engine.terminate()
        _wait(engine, grace_s)
    killed = _kill_all(engine)
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
            if process.status() != psutil.STATUS_ZOMBIE:
                living.append(process)
            elif process.pid != engine.pid and process.ppid() == os.getpid():  # the engine's own exit code is Popen's
                os.waitpid(process.pid, os.WNOHANG)
        except (psutil.NoSuchProcess, ChildProcessError):
            continue
    return living


def _kill_all(engine: subprocess.Popen[bytes]) -> list[int]:
    """Kill every descendant until none is left, also those that left the session; return their process ids."""
    killed: list[int] = []
    deadline = time.monotonic() + 10
    while (living := _descendants(engine)) and time.monotonic() < deadline:
        for process in living:
            if process.pid not in killed:
                killed.append(process.pid)
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(living, timeout=1)
    return killed


if __name__ == "__main__":
    sys.exit(main())
