"""A child process with a log, under a supervisor (`supervisor.py`).

The supervisor watches its stdin: whatever happens to pytest, the child and all that it has started end with it.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from pytest_llmperf.measure.engines.engine import EngineError
from pytest_llmperf.measure.engines.logs import named_errors, without_colours

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_SUPERVISOR = Path(__file__).with_name("supervisor.py")
_KILL_S = 20.0
"""How long the supervisor may take to kill what is left after the grace time."""
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
        with log_path.open("wb") as log:
            self._supervisor = subprocess.Popen(
                [sys.executable, "-P", str(_SUPERVISOR), str(grace_s), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=dict(environment),
                text=True,
                start_new_session=True,  # a kill of pytest's process group must not take the supervisor with it
            )

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
        assert self._supervisor.stdout is not None
        messages = [json.loads(line) for line in self._supervisor.stdout if line.startswith("{")]
        code = next((message["exit"] for message in messages if "exit" in message), None)
        how = f"with signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit code {code}"
        raise failure(f"The engine ended {how} {when}.", self.log_path)

    def stop(self) -> None:
        """Close the supervisor's stdin and wait until it has ended everything; raises EngineError where it does not."""
        supervisor = self._supervisor
        assert supervisor.stdin is not None
        assert supervisor.stdout is not None
        try:
            supervisor.stdin.close()
            supervisor.wait(self._grace_s + _KILL_S)
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
