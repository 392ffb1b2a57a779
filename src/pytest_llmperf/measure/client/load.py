"""The load process: sends the requests of a round and stamps every read at its arrival.

No HTTP library is used, because each one that was measured stamps when its loop gets there: the kernel's receive stamp
(SO_TIMESTAMPNS) does not depend on when this process ran, and under TLS it is that of the encrypted bytes. Bytes are kept with
their stamps; a response is parsed when nothing is to be read, and its bytes are dropped then.
It reads plans from stdin and writes logs to stdout, each with its length in front, until stdin or its parent ends.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import sys
import threading
import time
from typing import TYPE_CHECKING

import msgspec

from pytest_llmperf.measure.client.answers import Answers, encode
from pytest_llmperf.measure.client.connect import Connections
from pytest_llmperf.measure.client.messages import RoundLog, RoundPlan
from pytest_llmperf.measure.client.response import RequestRecord
from pytest_llmperf.measure.client.round import Round
from pytest_llmperf.measure.engines import remains

if TYPE_CHECKING:
    from collections.abc import Callable

_SPARE = 32
"""Connections that an open loop has before it begins; more are made when they are needed."""
_MOST_AT_ONCE = 512
"""Connections that it has at most, where requests are due at its beginning: a process may have a thousand open files."""
_CLOCK_SET_NS = 1_000_000
_LOOK_MS: int | None = 250
_LAST_S = 5.0
"""From the end of stdin to that of the parent at most: its pipes are closed before it is seen to have ended."""


def play(plan: RoundPlan, started: Callable[[], int]) -> bytes:
    """Send the requests of a plan and return the encoded RoundLog; whatever goes wrong is an error of its request.

    `started` is called when the connections are open, and returns the instant to begin at, in monotonic nanoseconds.
    """
    links, answers = Connections(plan), Answers(plan)
    try:
        for _ in range(_first_connections(plan)):
            links.connect()
    except OSError as error:
        started()
        links.close()
        return encode(RoundLog(tuple(RequestRecord(None, error=f"cannot connect: {error}") for _ in plan.requests)))
    state = Round(plan, links, answers)
    gc.collect()
    gc.disable()
    try:
        start_ns = started()
        cpu_s = time.process_time()
        stalled = state.run(start_ns)
        busy_s = (time.monotonic_ns() - start_ns) / 1e9
        cpu_s, before_s = time.process_time() - cpu_s, time.process_time()
        records = answers.records()
        parse_s = time.process_time() - before_s
    finally:
        gc.enable()
        links.close()
    log = RoundLog(
        records=(),
        stalled=stalled,
        kernel_stamps=state.kernel_stamps,
        clock_stamps=state.clock_stamps,
        cpu_s=cpu_s,
        busy_s=busy_s,
        parse_s=parse_s,
        clock_set=abs(time.time_ns() - time.monotonic_ns() - state.offset_ns) > _CLOCK_SET_NS,
    )
    return encode(msgspec.to_builtins(log) | {"records": records})


def _first_connections(plan: RoundPlan) -> int:
    """Return how many connections are made before a round begins."""
    talks = plan.conversations()
    if not plan.due_ns:
        return min(plan.concurrency, len(talks))
    at_once = min(_MOST_AT_ONCE, sum(not plan.due_ns[talk[0]] for talk in talks))
    return min(max(_SPARE, at_once), plan.max_concurrency or len(talks), len(talks))


def _go_first() -> None:
    """Take a real-time priority where that is allowed: this process needs little of a core, but that on time.

    On two cores whose threads the ranks of a CPU engine keep spinning it was left waiting for 1.3 of 1.3 s without, and for
    less than a millisecond with it. The kernel keeps a share of each core for all others.
    """
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


def _watch(owner: str) -> threading.Thread:
    """Return a running thread that makes this process leave when its parent has ended, in the middle of a round too.

    Stdin is not looked at there, and whoever the parent has forked keeps it open. A parent-death signal comes too early, when
    the thread ends that started this process. A thread that waits in the kernel costs a round nothing.
    """
    parent = remains.pid_of(owner)
    waiting, look_ms = select.poll(), _LOOK_MS
    # Some builds of Python, kernels and sandboxes have no such descriptors: then it is looked at again and again.
    with contextlib.suppress(AttributeError, OSError):
        waiting.register(os.pidfd_open(parent), select.POLLIN)
        look_ms = None
    if os.getppid() != parent:  # while it is our parent nobody else can have its id
        _leave(owner)

    def leave() -> None:
        while os.getppid() == parent:
            waiting.poll(look_ms)
        _leave(owner)

    watch = threading.Thread(target=leave, name="llmperf-parent", daemon=True)
    watch.start()
    return watch


def _leave(owner: str) -> None:
    """Send nothing more, and see to it that no engine of the parent's is left, nor a temporary folder.

    Supervisors end the engines, but what killed the parent may have killed them too. As another program this process has neither
    connections nor threads of a round any more.
    """
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    try:
        os.execv(sys.executable, [sys.executable, "-I", "-S", remains.__file__, owner])
    finally:
        os._exit(1)


def main() -> None:
    """Play every plan that comes in on stdin, until the parent that the command line names has ended."""
    _go_first()
    watch = _watch(sys.argv[1])
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    decoder = msgspec.msgpack.Decoder(RoundPlan)

    def take() -> bytes:
        return source.read(int.from_bytes(source.read(8), "big"))

    def give(message: bytes) -> None:
        sink.write(len(message).to_bytes(8, "big"))
        sink.write(message)
        sink.flush()

    def started() -> int:
        give(b"connected")
        return int.from_bytes(take(), "big")

    # Nobody waits for the answer of a round when pytest was killed.
    try:
        while message := take():
            give(play(decoder.decode(message), started))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it flushes at its end
    watch.join(_LAST_S)


if __name__ == "__main__":
    main()
