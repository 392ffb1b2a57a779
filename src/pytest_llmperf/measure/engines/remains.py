"""What is left of an engine when those that should have ended it were killed: found by a mark, and ended.

Every process of an engine has a mark in its environment, which names the run that started it. Children inherit it, and neither a
dead parent nor a session of their own takes it away. A supervisor ends an engine by its process tree and needs no mark; this is
for when both supervisors are gone. Run as a script, `remains.py OWNER`, it ends all that this owner has started; the load process
becomes that script when pytest ends. It imports no part of the package, and nothing but the standard library.

Other ways that were weighed: a cgroup needs write access to the hierarchy, which containers and users seldom have. A PID
namespace, whose end the kernel makes the end of all that are in it, needs a right that containers don't give, and gives the
engine process ids that NVML doesn't know. A parent-death signal can be set by a process for itself only, and vLLM's workers are
nobody's but vLLM's.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

ENGINE, SUPERVISOR = "LLMPERF_ENGINE", "LLMPERF_SUPERVISOR"
"""The environment variables with the mark, of an engine's processes and of those that supervise it."""
KEEP = "keep"
"""A file of this name keeps its temporary folder."""
_MARKED = re.compile(rb"(?:^|\0)(LLMPERF_ENGINE|LLMPERF_SUPERVISOR)=([^\0]*)")
_OWNER = r"[0-9a-f]+-\d+-\d+-\d+"
_FOLDER = re.compile(rf"llmperf-[a-z]+-({_OWNER})-")
_KILL_S = 10.0
_TRACKER_S = 5.0
"""How long Python's resource trackers may take to remove what the others have shared."""
_NUMBERS = itertools.count()


class Marked(NamedTuple):
    """A process with a mark."""

    pid: int
    variable: str
    mark: str


def owner(pid: int | None = None) -> str:
    """Return what names a living process, by default this one: boot, PID namespace, process id and start in clock ticks.

    No other process ever has the same name, however soon its id is given away again, and on whatever host. Raises OSError where
    there is no such process.
    """
    state = Path(f"/proc/{pid or os.getpid()}/stat").read_bytes().rpartition(b")")[2].split()
    if state[0] in b"ZX" and int(state[17]) <= 1:  # one whose main thread has ended still runs
        raise ProcessLookupError(f"{pid} has ended")
    return f"{_here()}-{pid or os.getpid()}-{int(state[19])}"


def _here() -> str:
    """Return the boot and the PID namespace in which process ids mean something; 0 for what a sandbox does not show."""
    boot = namespace = "0"
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    with contextlib.suppress(OSError):
        namespace = "".join(filter(str.isdigit, str(Path("/proc/self/ns/pid").readlink()))) or "0"
    return f"{boot}-{namespace}"


def new_mark() -> str:
    """Return the mark of one more engine of this process; none is the beginning of another."""
    return f"{owner()}-{next(_NUMBERS)}."


def pid_of(name: str) -> int:
    """Return the process id of an owner, or that of a mark."""
    return int(name.split("-")[2])


def is_gone(name: str) -> bool:
    """Return whether an owner, or that of a mark, has ended; False also where this cannot be known here."""
    name, here = "-".join(name.split("-")[:4]), _here()
    if not name.startswith(f"{here}-") or "0" in here.split("-"):
        return False  # of another container or host, whose process ids are not ours; or that cannot be told
    try:
        return owner(pid_of(name)) != name
    except OSError:
        return True


def marked(prefix: str) -> list[Marked]:
    """Return this user's other processes whose mark begins so."""
    processes = []
    for name in filter(str.isdigit, (path.name for path in Path("/proc").iterdir())):
        match = _MARKED.search(_environment(name)) if int(name) != os.getpid() else None
        if match and os.fsdecode(match[2]).startswith(prefix):
            processes.append(Marked(int(name), os.fsdecode(match[1]), os.fsdecode(match[2])))
    return processes


def _environment(pid: str) -> bytes:
    """Return the environment of a process of this user, empty for one of another."""
    process = Path("/proc", pid)
    try:
        if process.stat().st_uid != os.geteuid():
            return b""
        with contextlib.suppress(ProcessLookupError):
            if environment := (process / "environ").read_bytes():
                return environment
        # Of a process whose main thread has ended, as CUDA's do in their last seconds, the other threads have it; some kernels
        # say that there is no such process, others that its environment is empty.
        threads = list((process / "task").iterdir())
    except OSError:
        return b""
    for thread in threads if len(threads) > 1 else ():
        with contextlib.suppress(OSError):
            if environment := (thread / "environ").read_bytes():
                return environment
    return b""


def end(prefix: str) -> list[int]:
    """Kill the engines whose marks begin so until none of their processes is left; return the ids of those killed.

    Supervisors that live end theirs in their own time and better than this, and are waited for. Resource trackers end by
    themselves when the others are gone, and clean up.
    """
    killed: dict[int, None] = {}
    deadline_s, alone_s = 0.0, 0.0
    while left := marked(prefix):
        now_s = time.monotonic()
        supervised = {process.mark for process in left if process.variable == SUPERVISOR}
        orphans = [process.pid for process in left if process.mark not in supervised]
        if orphans:
            deadline_s = deadline_s or now_s + _KILL_S
            if now_s > deadline_s:
                break  # the kernel does not let go of them, as in a driver that hangs
            others = [pid for pid in orphans if not _is_tracker(pid)]
            alone_s = 0.0 if others else alone_s or now_s
            for pid in others or (orphans if now_s > alone_s + _TRACKER_S else ()):
                _kill(pid, prefix, killed)
        time.sleep(0.02 if orphans else 0.1)  # a poll: nobody but init hears of the end of an orphan
    return list(killed)


def _kill(pid: int, prefix: str, killed: dict[int, None]) -> None:
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        process = None
        with contextlib.suppress(AttributeError):  # of some builds of Python
            process = os.pidfd_open(pid)
            stack.callback(os.close, process)
        # The id may have gone to somebody else since it was looked at; the descriptor stays with one process.
        match = _MARKED.search(_environment(str(pid)))
        if match and os.fsdecode(match[2]).startswith(prefix):
            if process is None:
                os.kill(pid, signal.SIGKILL)
            else:
                signal.pidfd_send_signal(process, signal.SIGKILL)
            killed[pid] = None


def _is_tracker(pid: int) -> bool:
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


# ------------------------------------------------------------------------------------------------ of runs that are gone


def folder_prefix(what: str) -> str:
    """Return how the name of a temporary folder begins that `sweep` removes when this process is gone."""
    return f"llmperf-{what}-{owner()}-"


def sweep_within(seconds: float) -> None:
    """Sweep, and go on without when it takes longer: to look at a process may block where that one hangs in a driver."""
    sweeping = threading.Thread(target=sweep, name="llmperf-sweep", daemon=True)
    sweeping.start()
    sweeping.join(seconds)


def sweep() -> None:
    """End the engines, and remove the temporary folders, of runs that are gone: whoever should have done it was killed too."""
    ownerless = {process.mark for process in marked("") if _has_owner(process.mark) and is_gone(process.mark)}
    for mark in ownerless:
        if not any(process.variable == SUPERVISOR for process in marked(mark)):
            end(mark)
    for path in Path(tempfile.gettempdir()).glob("llmperf-*"):
        match = _FOLDER.match(path.name)
        with contextlib.suppress(OSError):
            ours = not path.is_symlink() and path.is_dir() and path.stat().st_uid == os.geteuid()
            if match and ours and is_gone(match[1]) and not (path / KEEP).exists():
                shutil.rmtree(path, ignore_errors=True)


def _has_owner(mark: str) -> bool:
    return re.match(_OWNER, mark) is not None


if __name__ == "__main__":
    end(f"{sys.argv[1]}-")
    sweep()
