"""A child process with a log, under supervisors (`supervisor.py`).

They watch this process: whatever happens to it, the child and all that it has started end with it. And this process watches
them: where they are killed, it ends what is left of the child, and with that whatever waits for an answer of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from pytest_llmperf.measure.engines import remains
from pytest_llmperf.measure.engines.engine import EngineError
from pytest_llmperf.measure.engines.logs import named_errors, without_colours

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_SUPERVISOR = Path(__file__).with_name("supervisor.py")
_KILL_S = 20.0
"""How long the supervisor may take to kill what is left after the grace time."""
_KILLED = 128
"""Exit codes of the supervisor beyond it, and those below 0, say that it was killed by a signal."""
_TAIL_LINES = 25
_MOST_CAUSES = 4


def read_log(path: Path) -> str:
    """Return a log so far; empty where there is none yet."""
    return path.read_bytes().decode(errors="replace") if path.is_file() else ""  # its carriage returns are kept


def failure(what: str, log_path: Path) -> EngineError:
    """Return an error that says what happened, with the last lines of a log and the exceptions that it names."""
    # Of a progress bar the last state counts: the others would push the reason out of the last lines.
    drawn = (line.rstrip("\r").rpartition("\r")[2] for line in without_colours(read_log(log_path)).split("\n"))
    lines = [line for line in drawn if line.strip() and "nanobind" not in line]
    tail = "\n".join(lines[-_TAIL_LINES:])
    causes = [cause for cause in named_errors(lines) if cause not in tail]
    return EngineError(what, tail=tail, log_path=log_path, causes=causes[:_MOST_CAUSES])


class Child:
    """A supervised process. It runs from here until `stop`."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log_path: Path, *, grace_s: float) -> None:
        """Start the command, its output going to the log; `grace_s` is the time from SIGTERM to SIGKILL when it is stopped."""
        self.log_path = log_path
        self._grace_s = grace_s
        self._read_bytes = 0
        self._mark = remains.new_mark()
        # vLLM's processes give themselves a title, which without that switch is written over their environment too.
        marked = {"SPT_NOENV": "1", **environment, remains.SUPERVISOR: self._mark}
        with log_path.open("wb") as log:
            self._supervisor = subprocess.Popen(
                [sys.executable, "-P", str(_SUPERVISOR), str(os.getpid()), str(grace_s), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=marked,
                text=True,
                start_new_session=True,  # a kill of pytest's process group must not take the supervisor with it
            )
        ended = os.pidfd_open(self._supervisor.pid)
        self._clearing = threading.Thread(target=_clear, args=(ended, self._mark), name="llmperf-child", daemon=True)
        self._clearing.start()

    @property
    def pid(self) -> int:
        """Return the id of the process whose descendants the child and all that it starts are."""
        return self._supervisor.pid

    def listening(self) -> set[int]:
        """Return the ports on which the child and what it has started listen."""
        ports = set[int]()
        for process in psutil.Process(self.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                # `net_connections` since psutil 6.
                sockets = getattr(process, "net_connections", None) or process.connections
                ports |= {each.laddr.port for each in sockets("tcp") if each.status == psutil.CONN_LISTEN}
        return ports

    def new_lines(self) -> list[str]:
        """Return the complete lines that the log has got since the last call."""
        with self.log_path.open("rb") as log:
            log.seek(self._read_bytes)
            fresh = log.read()
        complete = fresh[: fresh.rfind(b"\n") + 1]
        self._read_bytes += len(complete)
        return complete.decode(errors="replace").splitlines()

    def check_alive(self, when: str, *, patience_s: float = 0.0) -> None:
        """Raise EngineError where the child has ended, or ends within `patience_s`; the message says `when`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._supervisor.wait(patience_s)
        if self._supervisor.poll() is None:
            return
        self._clearing.join(_KILL_S)
        if not 0 <= self._supervisor.returncode <= _KILLED:
            raise failure(f"The engine was ended {when}, because its supervisor was killed.", self.log_path)
        code = next((message["exit"] for message in self._messages() if "exit" in message), None)
        how = f"with signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit code {code}"
        raise failure(f"The engine ended {how} {when}.", self.log_path)

    def _messages(self) -> list[dict[str, Any]]:
        """Return what the supervisors have said so far; whoever still has the pipe open is not waited for."""
        assert self._supervisor.stdout is not None
        pipe, text = self._supervisor.stdout.fileno(), b""
        os.set_blocking(pipe, False)
        with contextlib.suppress(BlockingIOError):
            while part := os.read(pipe, 1 << 16):
                text += part
        return [json.loads(line) for line in text.splitlines() if line.startswith(b"{")]

    def stop(self) -> None:
        """Tell the supervisor to end everything, and wait until it has; raises EngineError where it does not."""
        supervisor = self._supervisor
        assert supervisor.stdin is not None
        assert supervisor.stdout is not None
        try:
            # Words, because the end of the pipe comes late where a test has forked a process: that has it open too.
            with contextlib.suppress(OSError):  # it has ended
                supervisor.stdin.write("stop\n")
                supervisor.stdin.close()
            supervisor.wait(self._grace_s + _KILL_S)
            self._clearing.join(_KILL_S)
        except subprocess.TimeoutExpired:
            left = psutil.Process(supervisor.pid).children(recursive=True)
            supervisor.kill()
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            supervisor.wait()
            what = "The engine could not be stopped; its processes may still hold memory."
            raise failure(what, self.log_path) from None
        finally:
            supervisor.stdout.close()


def _clear(supervisor: int, mark: str) -> None:
    """Wait for the end of a supervisor, then end what is left of its engine: nothing, unless it was killed.

    Calls that wait for an answer of that engine, and its rounds, then end too, as their connections do. Without it some would
    not: a forked engine core inherits the server's listening socket, on which connections are still made when the server is dead.
    """
    waiting = select.poll()  # `select` takes no descriptor beyond 1023
    waiting.register(supervisor, select.POLLIN)
    waiting.poll()
    os.close(supervisor)
    remains.end(mark)
