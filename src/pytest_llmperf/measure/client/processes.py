"""The load processes. They send and stamp, so that nothing that the test does delays a request or a stamp.

Where one does not keep up there can be several: each then has its share of the conversations.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from pytest_llmperf.measure.client.messages import ClientError, RoundLog
from pytest_llmperf.measure.engines.remains import owner

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Self

    from pytest_llmperf.measure.client.messages import RoundPlan

_START_DELAY_NS = 2_000_000
"""From the last process's readiness to the first request, so that all processes begin together."""


class LoadClient:
    """One load process or more. Start it before the engine is ready: a round then begins at once."""

    def __init__(self, processes: int = 1) -> None:
        """Start the processes."""
        self._processes = [_Process() for _ in range(processes)]

    def __enter__(self) -> Self:
        """Return the client."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes."""
        self.close()

    @property
    def processes(self) -> int:
        """Return how many load processes there are."""
        return len(self._processes)

    @property
    def pids(self) -> list[int]:
        """Return the ids of the load processes."""
        return [process.pid for process in self._processes]

    def grow(self) -> None:
        """Add one more load process."""
        self._processes.append(_Process())

    def close(self) -> None:
        """End the processes, also in the middle of a round."""
        for process in self._processes:
            process.close()

    def play(self, plan: RoundPlan) -> RoundLog:
        """Send the requests of one round and return what happened, or raise ClientError."""
        shares = plan.split(len(self._processes))
        active = list(zip(self._processes, shares, strict=False))
        for process, (part, _) in active:
            process.write(msgspec.msgpack.encode(part))
        for process, _ in active:
            process.read()  # it has connected
        start_ns = time.monotonic_ns() + (_START_DELAY_NS if len(active) > 1 else 0)
        for process, _ in active:
            process.write(start_ns.to_bytes(8, "big"))
        logs = [msgspec.msgpack.decode(process.read(), type=RoundLog) for process, _ in active]
        joined = _joined(logs, [indices for _, indices in shares])
        if len(joined.records) != len(plan.requests):
            raise ClientError(f"the load processes answered for {len(joined.records)} requests, not {len(plan.requests)}")
        return joined


def _joined(logs: Sequence[RoundLog], places: Sequence[Sequence[int]]) -> RoundLog:
    """Return the logs of several processes as one, its records in the order of the plan."""
    if len(logs) == 1:
        return logs[0]
    records = {
        place: record
        for log, indices in zip(logs, places, strict=True)
        for place, record in zip(indices, log.records, strict=True)
    }
    busiest = max(logs, key=lambda log: log.cpu_share or 0.0)
    return RoundLog(
        records=tuple(records[place] for place in sorted(records)),
        stalled=any(log.stalled for log in logs),
        kernel_stamps=sum(log.kernel_stamps for log in logs),
        clock_stamps=sum(log.clock_stamps for log in logs),
        cpu_s=busiest.cpu_s,
        busy_s=busiest.busy_s,
        parse_s=busiest.parse_s,
        clock_set=any(log.clock_set for log in logs),
        processes=len(logs),
    )


def python_path(environment: Mapping[str, str]) -> str:
    """Return a PYTHONPATH with which an interpreter finds this package, and none of its entries is the current folder unnamed."""
    given = environment.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([str(Path(__file__).parents[3]), *filter(None, given)])


class _Process:
    """A load process and its two pipes; messages have their length in front."""

    def __init__(self) -> None:
        # -P: modules of the current folder are none of its business, whatever they are called.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pytest_llmperf.measure.client.load", owner()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C reaches pytest, which ends the round; the process ends with pytest
            env={**os.environ, "PYTHONPATH": python_path(os.environ)},
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def write(self, message: bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(len(message).to_bytes(8, "big") + message)
            self._process.stdin.flush()
        except OSError as error:
            raise self._ended(f" ({error})") from error

    def read(self) -> bytes:
        assert self._process.stdout is not None
        try:
            size = int.from_bytes(self._process.stdout.read(8), "big")
            message = self._process.stdout.read(size)
        except OSError as error:
            raise self._ended(f" ({error})") from error
        if not message or len(message) < size:
            raise self._ended("")
        return message

    def _ended(self, why: str) -> ClientError:
        return ClientError(f"the load process ended with exit code {self._process.wait()}{why}")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with contextlib.suppress(OSError):  # what was not written any more can never be
                    pipe.close()
