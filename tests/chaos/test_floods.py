"""Load and size: every read has a limit, the request that meets it says which, and the memory of who reads stays bounded."""

from __future__ import annotations

import contextlib
import os
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from pytest_llmperf.measure.client.endpoint import Endpoint
from pytest_llmperf.measure.client.processes import LoadClient
from pytest_llmperf.measure.client.prompts import prompts
from pytest_llmperf.measure.engines import api
from pytest_llmperf.plan.workload import Workload
from pytest_llmperf.testing import Clock, Options, SimulatedEngine
from tests.hostile_servers import HEAD, STREAM, chunks, event, flooding, hostile_server

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pytest_llmperf.measure.client.messages import RoundLog
    from tests.faults import Attempts
    from tests.hostile_servers import Answer

MB = 1 << 20
_LOOK_S = 0.02

INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"
ASKED: dict[str, tuple[Answer, str]] = {
    "an endless line": (flooding(HEAD, b"x"), "a head of more than 65,536 bytes"),
    "endless headers": (flooding(HEAD, b"a: b\r\n"), "got more than 100 headers"),
    "headers of 60 KB": (flooding(HEAD, b"a: " + b"b" * 60_000 + b"\r\n"), "a head of more than 65,536 bytes"),
    "endless interim answers": (flooding(b"", INTERIM), "a head of more than 65,536 bytes"),
    "an endless body": (flooding(HEAD + b"\r\n", b"x"), "a body of more than 16,777,216 bytes"),
    "an endless body in chunks": (flooding(STREAM, chunks([b"x" * 1000])), "a body of more than 16,777,216 bytes"),
    "an endless chunk": (flooding(STREAM + b"ffffffffffff\r\n", b"x"), "a body of more than 16,777,216 bytes"),
    "an endless line with a chunk's size": (flooding(STREAM, b"0"), "LineTooLong"),
    "a chunk of less than nothing": (flooding(STREAM + b"-5\r\n", b"x"), "Error"),
    "an endless trailer": (flooding(STREAM + b"0\r\n", b"a: b\r\n"), "more than"),
    "a length beyond memory": (
        flooding(HEAD + b"content-length: 999999999999999999\r\n\r\n", b"x"),
        "announced an answer of 999,999,999,999,999,999 bytes, of which at most 16,777,216 are taken",
    ),
}
"""What is asked beside a load meets these, with what is said of them."""

LOADED: dict[str, tuple[Answer, str]] = {
    "an endless line": (flooding(HEAD, b"x"), "the head of the answer is longer than 65,536 bytes"),
    "endless headers": (flooding(HEAD, b"a: b\r\n"), "the head of the answer is longer than 65,536 bytes"),
    "endless interim answers": (flooding(b"", INTERIM), "the head of the answer is longer than 65,536 bytes"),
    "an endless body": (flooding(HEAD + b"\r\n", b"x"), "the answer is longer than"),
    "an endless body of an error": (flooding(b"HTTP/1.1 500 No\r\n\r\n", b"x"), "the answer is longer than"),
    "an endless body of a redirect": (
        flooding(b"HTTP/1.1 307 No\r\nlocation: /x\r\n\r\n", b"x"),
        "the answer is longer than",
    ),
    "a page of endless titles": (flooding(b"HTTP/1.1 500 No\r\n\r\n<html>", b"<title "), "the answer is longer than"),
    "an endless event": (flooding(STREAM + b"ffffffffffff\r\ndata: ", b"x"), "the answer is longer than"),
    "endless events": (flooding(STREAM, chunks([event(" w")])), "the answer is longer than"),
    "endless token ids": (flooding(STREAM, chunks([event("", token_ids=[1] * 4000)])), "the answer is longer than"),
    "endless pings": (flooding(STREAM, chunks([b": ping\n\n"])), "the answer is longer than"),
    "an endless line with a chunk's size": (flooding(STREAM, b"0"), "the line with a chunk's size is longer than 4,096 bytes"),
    "an endless trailer": (flooding(STREAM + b"0\r\n", b"a: b\r\n"), "the trailer of the answer is longer than 65,536 bytes"),
    "a length beyond memory": (
        flooding(HEAD + b"content-length: 999999999999999999\r\n\r\n", b"x"),
        "it announces an answer of 999,999,999,999,999,999 bytes, of which at most",
    ),
    "an event that is nested without end": (
        flooding(STREAM, chunks([b'data: {"error":' * 20_000 + b"\n\n"]), most_bytes=1),
        "",
    ),
}
"""What the load meets."""


@contextlib.contextmanager
def memory(pid: int) -> Iterator[list[int]]:
    """Yield a list that holds how many bytes of memory a process had more than at the beginning, at most."""
    process, ended = psutil.Process(pid), threading.Event()
    begin, peak = process.memory_info().rss, [0]

    def look() -> None:
        while not ended.wait(_LOOK_S):
            with contextlib.suppress(psutil.Error):
                peak[0] = max(peak[0], process.memory_info().rss - begin)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


SLOW = ("an endless trailer", "endless pings")
"""A second each: a quick run leaves them out, where it has others like them."""


def faults(what: str, names: Iterable[str]) -> list[Any]:
    """Return parameters of which each is a row of the table."""
    marks = {name: pytest.mark.fault("load and size", what.format(name), full=name in SLOW) for name in names}
    return [pytest.param(name, marks=mark, id=name) for name, mark in marks.items()]


def play(client: LoadClient, url: str, **other: Any) -> RoundLog:
    workload = replace(Workload(prompt_tokens=3, output_tokens=8, requests=4, concurrency=4), **other)
    drawn = prompts(workload, 0, vocabulary=None, nonce="case")
    how = {"concurrency": workload.concurrency, "request_timeout_s": 60.0, "stall_timeout_s": 60.0}
    return client.play(Endpoint(url, "m", gives_ids=False).plan(drawn, **how, stream=workload.stream))


@pytest.mark.parametrize("what", faults("/metrics that sends {}", ASKED))
def test_what_is_asked_beside_a_load_is_bounded(attempts: Attempts, what: str) -> None:
    answer, said = ASKED[what]
    for _ in attempts(quick=1, full=4):
        with (
            hostile_server({"/metrics": answer}) as server,
            memory(os.getpid()) as peak,
            pytest.raises(OSError, match=said),
        ):
            api.ask(Endpoint(server.url, "m"), "/metrics", timeout_s=60.0)
        assert peak[0] < 100 * MB


@pytest.mark.parametrize("what", faults("an answer to the load that is {}", LOADED))
def test_what_the_load_receives_is_bounded(attempts: Attempts, what: str) -> None:
    answer, said = LOADED[what]
    for _ in attempts(quick=1, full=4):
        with LoadClient() as client, hostile_server({"/v1/completions": answer}) as server:
            with memory(client.pids[0]) as peak:
                log = play(client, server.url)
            assert [record.error is not None and said in record.error for record in log.records] == [True] * 4, log.records[
                0
            ].error
            assert sum(len(record.token_times_s) for record in log.records) <= 4 * 8
        assert peak[0] < 100 * MB


@pytest.mark.fault("load and size", "256 streams that flood at once", full=True)
def test_streams_that_flood_together_share_a_bound(attempts: Attempts) -> None:
    flood = flooding(STREAM, chunks([event(" w")]))
    for _ in attempts(full=1):
        with LoadClient() as client, hostile_server({"/v1/completions": flood}) as server:
            with memory(client.pids[0]) as peak:
                log = play(client, server.url, requests=256, concurrency=256, output_tokens=64)
            assert all("longer than" in (record.error or "") for record in log.records)
        # 256 MiB, and 2 KiB for each of 256 * 64 tokens; a read or two beyond it, and the lists that hold them.
        assert peak[0] < 600 * MB


def streams(client: LoadClient, count: int, *, requests: int, output_tokens: int) -> tuple[RoundLog, int]:
    """Return the log of a round with so many streams, and the memory that it took."""
    clock = Clock(
        step_s=0.1,
        sequence_s=0.0,
        prefill_token_s=0.0,
        max_num_seqs=4096,
        max_num_batched_tokens=1 << 20,
        num_gpu_blocks=1 << 16,
    )
    with SimulatedEngine(Options(clock=clock)) as engine, memory(client.pids[0]) as peak:
        workload = Workload(prompt_tokens=6, output_tokens=output_tokens, requests=requests, concurrency=count)
        drawn = prompts(workload, 0, vocabulary=None, nonce="case")
        plan = Endpoint(engine.url, "simulated").plan(drawn, concurrency=count, request_timeout_s=600.0, stall_timeout_s=120.0)
        log = client.play(plan)
    return log, peak[0]


@pytest.mark.fault("load and size", "256 streams")
def test_hundreds_of_streams_are_answered_in_bounded_memory(attempts: Attempts) -> None:
    for _ in attempts():
        with LoadClient() as client:
            log, peak = streams(client, 256, requests=512, output_tokens=4)
        assert [record.error for record in log.records if record.error] == []
        assert peak < 100 * MB


@pytest.mark.fault("load and size", "2,048 streams", full=True)
def test_thousands_of_streams_are_answered_in_bounded_memory(attempts: Attempts) -> None:
    for _ in attempts():
        with LoadClient() as client:
            log, peak = streams(client, 2048, requests=4096, output_tokens=24)
        assert [record.error for record in log.records if record.error] == []
        assert peak < 300 * MB
