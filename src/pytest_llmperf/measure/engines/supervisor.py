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
import re
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Sequence

_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_PDEATHSIG = 1
_TRACKER_S = 3.0
"""How long a resource tracker may take to remove what the other processes have left."""
_SHARED = Path("/dev/shm")
_MAPPED = re.compile(rb" rw-s .* /dev/shm/([^/\n]+)$", re.MULTILINE)
"""Files right in that folder that a process can write for others to read, as /proc/PID/maps has them."""
_OURS = ("psm_", "vllm_")
"""How the names of Python's and of vLLM's shared memory begin."""
_LOOK_S = 1.0
_LIBC = ctypes.CDLL(None, use_errno=True)


def main() -> int:
    """Run the command until it ends or stdin does; return its exit code."""
    grace_s, command = float(sys.argv[1]), sys.argv[2:]
    # Orphans of the engine (vLLM's workers, whose parent was killed) come to this process, not to init: none is lost.
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the terminal's Ctrl-C is pytest's business; our end is the end of stdin
    shared = _Shared()
    engine = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True, preexec_fn=_die_with_supervisor
    )
    print(json.dumps({"pid": engine.pid}), flush=True)
    asked = _wait_for_end(engine)
    shared.look(_descendants(engine))
    if asked:
        engine.terminate()
        _wait(engine, grace_s)
    killed = _kill_all(engine)
    shared.remove()
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
    killed: dict[int, None] = {}
    deadline, alone_s = time.monotonic() + 10, 0.0
    while (living := _descendants(engine)) and (now_s := time.monotonic()) < deadline:
        others = [process for process in living if not _is_tracker(process)]
        alone_s = 0.0 if others else alone_s or now_s
        for process in others or (living if now_s > alone_s + _TRACKER_S else ()):
            _kill(process, killed)
        psutil.wait_procs(others or living, timeout=1 if others else 0.05)
    for process in _descendants(engine):
        _kill(process, killed)
    return list(killed)


def _kill(process: psutil.Process, killed: dict[int, None]) -> None:
    killed[process.pid] = None
    with contextlib.suppress(psutil.Error):
        process.kill()


def _is_tracker(process: psutil.Process) -> bool:
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{process.pid}/cmdline").read_bytes()
    except OSError:
        return False


# ------------------------------------------------------------------------------------------------ shared memory


class _Shared:
    """The shared memory of an engine: what of it is left behind when vLLM kills those that would have cleaned up.

    Only files that were not there before the engine, that its processes have mapped to write, that are this user's, and whose
    names are those of Python's or vLLM's shared memory. To remove one takes its name away and nothing else: whoever uses it
    goes on.
    """

    def __init__(self) -> None:
        """Note what is there before the engine."""
        self._before = {_identity(path) for path in _SHARED.glob("*")}
        self._found: dict[Path, tuple[int, int] | None] = {}

    def look(self, processes: Sequence[psutil.Process]) -> None:
        """Note what these processes have mapped. Reading may block where a process hangs in a driver, hence in a thread."""
        looking = threading.Thread(target=self._look, args=(processes,), daemon=True)
        looking.start()
        looking.join(_LOOK_S)

    def _look(self, processes: Sequence[psutil.Process]) -> None:
        for process in processes:
            try:
                maps = Path(f"/proc/{process.pid}/maps").read_bytes()
            except OSError:
                continue
            for name in _MAPPED.findall(maps):
                path = _SHARED / os.fsdecode(name)
                if path.name.startswith(_OURS):
                    self._found[path] = _identity(path)

    def remove(self) -> None:
        """Remove what is left of it."""
        for path, identity in list(self._found.items()):
            with contextlib.suppress(OSError):
                if identity is not None and identity not in self._before and identity == _identity(path):
                    path.unlink()


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what tells a file of this user from one that takes its name later; None for no file, or somebody else's."""
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if status.st_uid == os.geteuid() else None


if __name__ == "__main__":
    sys.exit(main())
