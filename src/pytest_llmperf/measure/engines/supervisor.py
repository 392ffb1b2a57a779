"""Stand between pytest and an engine, so that the engine ends when pytest does, however pytest ends.

Run as a script: `supervisor.py PYTEST_PID GRACE_S COMMAND ...`. There are two of it: the inner one starts the command in a
session of its own, and the outer one, its parent, watches the inner one. When pytest ends, or asks for it on stdin, the engine
gets SIGTERM, GRACE_S seconds (at most 5 where pytest has not asked), and then SIGKILL for everything it has started; when one of
the two is killed, SIGKILL at once.
Both are subreapers: what an engine leaves without a parent comes to the inner one, and without that to the outer one, not to
init, whatever session it has made for itself. It imports no part of the package.
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
_TRACKER_S = 5.0
"""How long a resource tracker may take to remove what the other processes have left."""
_SHARED = Path("/dev/shm")
_MAPPED = re.compile(rb" rw-s .* /dev/shm/([^/\n]+)$", re.MULTILINE)
"""Files right in that folder that a process can write for others to read, as /proc/PID/maps has them."""
_OURS = ("psm_", "vllm_")
"""How the names of Python's and of vLLM's shared memory begin."""
_KILLED = 128
_LOOK_S, _POLL_S = 1.0, 0.02
_END_S = 15.0
"""How long the inner supervisor may take when the grace time is over."""
_ORPHANED_S = 5.0
"""The grace time at most when nobody waits for the engine's end: its GPUs are wanted by others."""
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The terminal's Ctrl-C is pytest's business; the end of a supervisor is the end of pytest."""
_SUPERVISOR, _ENGINE = "LLMPERF_SUPERVISOR", "LLMPERF_ENGINE"
"""The environment variables with the mark by which a supervisor and an engine's process are known; see `remains.py`."""
_LIBC = ctypes.CDLL(None, use_errno=True)


def main() -> int:
    """Run the command until it or pytest ends, or stdin does; return 0.

    Where the inner supervisor was killed, what a shell would return: 128 and the signal.
    """
    pytest, grace_s, command = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    _become_subreaper()
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    leash = _parent(pytest)
    if leash is None:
        return 0  # it has ended already
    shared, outer = _Shared(), os.getpid()
    inner = os.fork()
    if inner:
        return _guard(inner, leash, grace_s, shared)
    guard = _parent(outer)
    if guard is not None:
        _become_subreaper()  # which a fork does not inherit
        _supervise(command, leash, guard, grace_s, shared)
    return 0


def _become_subreaper() -> None:
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _parent(pid: int) -> int | None:
    """Return a descriptor of this process's parent, which can be read when it has ended; None where it has ended already.

    A pipe's end would not do: whoever the parent forks inherits it, and keeps it open. Nor a parent-death signal: it is sent when
    the thread ends that started this process.
    """
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    # While it is our parent nobody else can have its id: the descriptor is of the right process.
    return descriptor if os.getppid() == pid else None


def _wait_for(*descriptors: int, timeout_s: float | None = None) -> list[int]:
    """Return which of the descriptors can be read, when one can."""
    ready, _, _ = select.select(descriptors, [], [], timeout_s)
    return ready


def _guard(inner: int, leash: int, grace_s: float, shared: _Shared) -> int:
    """Wait for the end of the inner supervisor; see to what it leaves where it was killed, or does not end with pytest."""
    ended = os.pidfd_open(inner)
    if ended not in _wait_for(ended, leash) and not _wait_for(ended, timeout_s=grace_s + _END_S):
        os.kill(inner, signal.SIGKILL)
    os.close(ended)
    _, status = os.waitpid(inner, 0)
    shared.look(_descendants())
    _kill_all()
    shared.remove()
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else _KILLED - code


def _supervise(command: Sequence[str], leash: int, guard: int, grace_s: float, shared: _Shared) -> None:
    """Start the engine and tell its process id; end it when pytest, its guard or it itself has ended, and tell how."""
    environment = {name: value for name, value in os.environ.items() if name != _SUPERVISOR}
    if _SUPERVISOR in os.environ:
        environment[_ENGINE] = os.environ[_SUPERVISOR]
    supervisor = os.getpid()
    engine = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: _die_with(supervisor),
    )
    _tell({"pid": engine.pid})
    ended = os.pidfd_open(engine.pid)
    ready = _wait_for(sys.stdin.fileno(), ended, leash, guard)
    os.close(ended)
    asked = ended not in ready
    shared.look(_descendants(engine.pid))
    if asked and guard not in ready:  # without a guard there is nobody who would see to it if this process were killed too
        # A pytest that was killed asks with no word.
        in_words = sys.stdin.fileno() in ready and os.read(sys.stdin.fileno(), 1)
        engine.terminate()
        _wait(engine, grace_s if in_words else min(grace_s, _ORPHANED_S))
    killed = _kill_all(engine.pid)
    shared.remove()
    _tell({"exit": engine.wait(), "asked": asked, "killed": killed})


def _tell(message: dict[str, object]) -> None:
    with contextlib.suppress(BrokenPipeError):  # pytest has ended
        print(json.dumps(message), flush=True)


def _die_with(supervisor: int) -> None:
    for number in _IGNORED:
        signal.signal(number, signal.SIG_DFL)  # ignored signals would be inherited
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != supervisor:
        os._exit(1)  # it had ended before the kernel was asked


def _wait(engine: subprocess.Popen[bytes], grace_s: float) -> None:
    """Wait until the engine and all it has started are gone, at most the grace time."""
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline and (engine.poll() is None or _descendants(engine.pid)):
        time.sleep(_POLL_S)  # with a deadline: there is no event for "the last descendant is gone"


def _descendants(engine: int | None = None) -> list[psutil.Process]:
    """Return every living descendant; zombies that came to this process are reaped, but for the engine's own."""
    living = []
    for process in psutil.Process().children(recursive=True):
        try:
            # A process whose main thread has ended looks like a zombie while its other threads run, as CUDA's do at the end.
            if process.status() != psutil.STATUS_ZOMBIE or process.num_threads() > 1:
                living.append(process)
            elif process.pid != engine and process.ppid() == os.getpid():  # the engine's own exit code is Popen's
                os.waitpid(process.pid, os.WNOHANG)
        except (psutil.NoSuchProcess, ChildProcessError):
            continue
    return living


def _kill_all(engine: int | None = None) -> list[int]:
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
        time.sleep(_POLL_S)  # psutil's own waiting would take the engine's exit code from `Popen`
    for process in _descendants(engine):
        _kill(process, killed)
    return list(killed)


def _kill(process: psutil.Process, killed: dict[int, None]) -> None:
    killed[process.pid] = None
    with contextlib.suppress(psutil.Error):
        process.kill()


def _is_tracker(process: psutil.Process) -> bool:
    """Return whether a process is a resource tracker, or about to be gone: then nothing tells any more what it was."""
    try:
        command = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        return b"multiprocessing.resource_tracker" in command if command else process.num_threads() <= 1
    except (OSError, psutil.Error):
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
