"""The load process over real sockets: what it sends, how much at once, and that no server can make it fail.

Its own failures are `ClientError`; whatever a server does is an error of the request that met it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import queue
import select
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
import trustme

import pytest_llmperf
from pytest_llmperf.measure.client.endpoint import Endpoint
from pytest_llmperf.measure.client.messages import ClientError, RoundLog
from pytest_llmperf.measure.client.processes import LoadClient
from pytest_llmperf.measure.client.prompts import Prompt, arrivals, prompts
from pytest_llmperf.plan.arguments import workload_from
from pytest_llmperf.plan.axes import Axes
from pytest_llmperf.plan.workload import Workload
from pytest_llmperf.testing import Clock, Options, SimulatedEngine
from tests.processes import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_llmperf.measure.client.response import RequestRecord

FAST = Clock(step_s=1e-3, sequence_s=0.0, prefill_token_s=0.0)
ONE_BLOCK = Workload(prompt_tokens=6, output_tokens=8, requests=64, concurrency=8)
"""Each request occupies one KV block of 16 tokens, so that the engine's peak of blocks is its peak of requests."""


@pytest.fixture(scope="module")
def client() -> Iterator[LoadClient]:
    with LoadClient() as started:
        yield started


def play(
    client: LoadClient,
    url: str,
    workload: Workload = ONE_BLOCK,
    *,
    stall_s: float = 10.0,
    request_s: float = 30.0,
    key: str | None = None,
) -> RoundLog:
    drawn = prompts(workload, 0, vocabulary=None, nonce="case")
    how = {"concurrency": workload.concurrency, "request_timeout_s": request_s, "stall_timeout_s": stall_s}
    return client.play(Endpoint(url, "simulated", key).plan(drawn, **how, stream=workload.stream))


def errors(log: RoundLog) -> list[str]:
    return [record.error for record in log.records if record.error is not None]


# ------------------------------------------------------------------------------------------------ a sound engine


@pytest.mark.parametrize("concurrency", [1, 8, 32])
def test_exactly_the_concurrency_is_in_flight(client: LoadClient, concurrency: int) -> None:
    # Steps of 10 ms: all are in flight at some time, however slowly this machine sends them.
    workload = Workload(prompt_tokens=6, output_tokens=8, requests=4 * concurrency, concurrency=concurrency)
    with SimulatedEngine(Options(clock=replace(FAST, step_s=0.01))) as engine:
        log = play(client, engine.url, workload)
        assert engine.counters.peak_blocks == concurrency
    assert errors(log) == []


def test_every_request_is_answered_once_and_both_sides_count_the_same_tokens(client: LoadClient) -> None:
    with SimulatedEngine(Options(clock=FAST)) as engine:
        log = play(client, engine.url)
        counters = engine.counters
    assert errors(log) == []
    assert len(log.records) == counters.requests_finished == 64
    assert sum(record.prompt_tokens or 0 for record in log.records) == counters.prompt_tokens == 64 * 6
    assert sum(record.output_tokens or 0 for record in log.records) == counters.generation_tokens == 64 * 8


def test_every_token_has_a_time_between_sending_and_end(client: LoadClient) -> None:
    with SimulatedEngine(Options(clock=FAST)) as engine:
        log = play(client, engine.url)
    for record in log.records:
        times = (record.sent_s, *record.token_times_s, record.end_s)
        assert len(times) == 10
        assert list(times) == sorted(times)  # type: ignore[type-var]


@pytest.fixture
def stamping() -> Iterator[None]:
    """Have the kernel stamp already: it begins some time after the first socket asks for it, later where the machine is busy."""
    with contextlib.ExitStack() as stack:
        # Over TCP: of a datagram without a stamp the kernel says when it is read.
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        sender = stack.enter_context(socket.create_connection(listening.getsockname()))
        receiver = stack.enter_context(listening.accept()[0])
        receiver.setsockopt(socket.SOL_SOCKET, 35, 1)  # SO_TIMESTAMPNS
        receiver.settimeout(10)
        deadline_s = time.monotonic() + 10
        while True:
            sender.sendall(b"stamped?")
            if receiver.recvmsg(64, 64)[1]:
                break
            assert time.monotonic() < deadline_s, "this kernel gives no receive stamps"
        yield  # it goes on while a socket that asks for it is open


@pytest.mark.usefixtures("stamping")
def test_arrivals_are_stamped_by_the_kernel(client: LoadClient) -> None:
    with SimulatedEngine(Options(clock=FAST)) as engine:
        log = play(client, engine.url)
    assert log.kernel_stamps > 0
    assert log.clock_stamps == 0


def test_a_process_plays_one_round_after_another(client: LoadClient) -> None:
    with SimulatedEngine(Options(clock=FAST)) as engine:
        assert [errors(play(client, engine.url)) for _ in range(3)] == [[], [], []]
        assert engine.counters.requests_finished == 3 * 64


def test_the_process_reports_the_cpu_time_it_took(client: LoadClient) -> None:
    with SimulatedEngine(Options(clock=FAST)) as engine:
        assert play(client, engine.url).cpu_s > 0


def test_the_prompts_that_arrive_are_those_that_were_drawn(client: LoadClient) -> None:
    # The simulated engine refuses what does not fit: a prompt of another length would be an error.
    workload = Workload(prompt_tokens=90, output_tokens=10, requests=4, concurrency=4)
    with SimulatedEngine(Options(clock=FAST, max_model_len=100)) as engine:
        assert errors(play(client, engine.url, workload)) == []
        assert engine.counters.prompt_tokens == 360


# ------------------------------------------------------------------------------------------------ an engine that fails


@pytest.mark.parametrize("every", [1, 7])
def test_each_request_that_the_server_refuses_is_an_error_with_its_reason(client: LoadClient, every: int) -> None:
    with SimulatedEngine(Options(clock=FAST, fail_every=every)) as engine:
        log = play(client, engine.url)
    assert len(errors(log)) == 64 // every
    assert all(text.startswith("HTTP 500: ") and "EngineCore encountered an issue" in text for text in errors(log))
    assert not log.stalled


@pytest.mark.parametrize("every", [1, 5])
def test_each_answer_that_is_cut_is_an_error_that_keeps_its_tokens(client: LoadClient, every: int) -> None:
    with SimulatedEngine(Options(clock=FAST, cut_every=every)) as engine:
        log = play(client, engine.url)
    cut = [record for record in log.records if record.error is not None]
    assert len(cut) == 64 // every
    assert {(len(record.token_times_s), record.end_s) for record in cut} == {(4, None)}
    assert {record.error for record in cut} == {"the server closed the connection in the middle of the response"}
    assert not log.stalled


def test_a_hanging_engine_is_a_stall_and_all_requests_errors(client: LoadClient) -> None:
    with SimulatedEngine(Options(clock=FAST, hang_after=20)) as engine:
        log = play(client, engine.url, stall_s=0.3)
    counts = Counter(errors(log))
    assert log.stalled
    assert counts["no token on any connection for 0.3 s"] == 8
    assert counts["never sent: the round had stalled or timed out"] > 0
    # What was under way when the engine hung got no further either.
    assert counts.total() >= 64 - 20


def test_a_request_that_takes_too_long_is_an_error(client: LoadClient) -> None:
    slow = Workload(prompt_tokens=6, output_tokens=4000, requests=2, concurrency=2)
    with SimulatedEngine(Options(clock=FAST)) as engine:
        log = play(client, engine.url, slow, request_s=0.2)
    assert errors(log) == ["not complete after 0.2 s"] * 2
    assert not log.stalled


def test_a_crash_is_an_error_of_every_request_it_left_open(client: LoadClient) -> None:
    with SimulatedEngine(Options(clock=FAST, crash_after=20)) as engine:
        log = play(client, engine.url)
        finished = engine.counters.requests_finished
    assert len(log.records) == 64
    # The 21st request was sent after 13 answers; of the last answers some may have been lost with their connections.
    assert 64 - finished <= len(errors(log)) <= 64 - 13


def test_with_nothing_listening_every_request_is_an_error_and_none_was_sent(client: LoadClient) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused, and nobody else takes the port
        log = play(client, f"http://127.0.0.1:{unused.getsockname()[1]}")
    assert len(errors(log)) == 64
    assert all(text.startswith("cannot connect: ") for text in errors(log))
    assert {record.sent_s for record in log.records} == {None}


def test_a_host_that_does_not_exist_is_an_error_of_every_request(client: LoadClient) -> None:
    log = play(client, "http://no-such-host.invalid:80")
    assert len(errors(log)) == 64


@pytest.mark.parametrize("key", [None, "wrong"])
def test_a_wrong_api_key_is_an_error_of_every_request(client: LoadClient, key: str | None) -> None:
    with SimulatedEngine(Options(clock=FAST, api_key="right")) as engine:
        log = play(client, engine.url, key=key)
    assert Counter(errors(log)) == {"HTTP 401: Unauthorized": 64}


def test_the_right_api_key_is_sent(client: LoadClient) -> None:
    with SimulatedEngine(Options(clock=FAST, api_key="right")) as engine:
        assert errors(play(client, engine.url, key="right")) == []


def test_a_model_that_is_not_served_is_an_error_of_every_request(client: LoadClient) -> None:
    with SimulatedEngine(Options(clock=FAST, model="other")) as engine:
        log = play(client, engine.url)
    assert len(errors(log)) == 64
    assert all(text.startswith("HTTP 404: ") for text in errors(log))


def test_fewer_tokens_than_asked_for_are_an_error(client: LoadClient) -> None:
    workload = Workload(prompt_tokens=90, output_tokens=50, requests=2, concurrency=2)
    with SimulatedEngine(Options(clock=FAST, max_model_len=100)) as engine:
        assert errors(play(client, engine.url, workload)) == ["10 of 50 tokens"] * 2


# ------------------------------------------------------------------------------------------------ servers that answer oddly

TOKEN = b'data: {"choices":[{"text":"a","token_ids":[1]}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\n'
LAST = TOKEN.replace(b"[1]}", b'[1],"finish_reason":"length"}')
BODY = TOKEN + LAST + USAGE + b"data: [DONE]\n\n"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
SIZED = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(BODY), BODY)


@contextlib.contextmanager
def server(answer: Callable[[socket.socket], bool]) -> Iterator[str]:
    """Serve on a thread a connection; `answer` writes to one request and returns whether the connection stays open."""
    threads: list[threading.Thread] = []
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:

        def talk(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.settimeout(10)
                while _take_request(connection) and answer(connection):
                    pass

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threads.append(threading.Thread(target=talk, args=(listener.accept()[0],), daemon=True))
                    threads[-1].start()

        accepting = threading.Thread(target=accept, daemon=True)
        accepting.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
    accepting.join(10)
    for thread in threads:
        thread.join(10)


def _take_request(connection: socket.socket) -> bool:
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(65536)
        if not piece:
            return False
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    missing = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]) - len(body)
    while missing > 0:
        missing -= len(connection.recv(missing)) or missing
    return True


def answering(data: bytes, *, keep: bool = True, piece: int | None = None) -> Callable[[socket.socket], bool]:
    def answer(connection: socket.socket) -> bool:
        for start in range(0, len(data), piece or len(data)):
            connection.sendall(data[start : start + (piece or len(data))])
        return keep

    return answer


SMALL = Workload(prompt_tokens=3, output_tokens=2, requests=12, concurrency=3)


@pytest.mark.parametrize("data", [CHUNKED, SIZED], ids=["chunked", "content-length"])
def test_an_answer_that_comes_byte_by_byte_is_read_as_well(client: LoadClient, data: bytes) -> None:
    with server(answering(data, piece=1)) as url:
        log = play(client, url, SMALL)
    assert errors(log) == []
    assert {record.output_tokens for record in log.records} == {2}


@pytest.mark.parametrize("piece", [1, None], ids=["byte by byte", "at once"])
def test_a_server_that_closes_after_each_answer_is_served_on_new_connections(client: LoadClient, piece: int | None) -> None:
    data = CHUNKED.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
    with server(answering(data, keep=False, piece=piece)) as url:
        log = play(client, url, SMALL)
    assert errors(log) == []


def test_an_answer_that_ends_with_the_connection_is_complete(client: LoadClient) -> None:
    with server(answering(b"HTTP/1.0 200 OK\r\n\r\n" + BODY, keep=False)) as url:
        log = play(client, url, SMALL)
    assert errors(log) == []


@pytest.mark.parametrize(
    "say", [b"HTTP/1.1 200 OK\r\nConnection: x, Close", b"HTTP/1.0 200 OK", b"HTTP/1.0 200 OK\r\nconnection: x"]
)
def test_a_close_that_is_announced_fails_no_request(client: LoadClient, say: bytes) -> None:
    with server(answering(SIZED.replace(b"HTTP/1.1 200 OK", say), keep=False)) as url:
        log = play(client, url, SMALL)
    assert errors(log) == []


def test_a_close_that_nobody_announces_loses_at_most_what_it_meets(client: LoadClient) -> None:
    # Whether the client sees the end before it sends is a matter of microseconds; what it has sent is then not sent again.
    with server(answering(CHUNKED, keep=False)) as url:
        log = play(client, url, SMALL)
    assert {error.partition("] ")[2] or error for error in errors(log)} <= {
        "the server closed the connection without an answer",
        "Connection reset by peer without an answer",
    }


def test_a_server_that_closes_unasked_fails_every_request(client: LoadClient) -> None:
    with server(lambda _: False) as url:
        log = play(client, url, SMALL)
    assert len(errors(log)) == 12


@pytest.mark.parametrize(
    "data",
    [
        b"garbage\r\n\r\n",
        b"\xff\xfe \xff\xfe\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n" + BODY,
        b"HTTP/1.1 200 OK\r\ncontent-length: 20\r\n\r\ndata: {\"choices\": 1}",
        b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
    ids=["no HTTP", "no text", "wrong chunk", "wrong event", "empty", "no chunk"],
)  # fmt: skip
def test_an_answer_that_is_no_completion_fails_its_request_only(data: bytes) -> None:
    with LoadClient() as fresh:
        with server(answering(data, keep=False)) as url:
            log = play(fresh, url, SMALL, stall_s=2.0)
        assert len(errors(log)) == 12
        with SimulatedEngine(Options(clock=FAST)) as engine:
            assert errors(play(fresh, engine.url, SMALL)) == []


@pytest.mark.parametrize("length", [b"many", b"-5", b"", b"1e3"])
def test_a_content_length_that_is_none_does_not_end_the_process(length: bytes) -> None:
    with LoadClient() as fresh, server(answering(SIZED.replace(b"%d" % len(BODY), length), keep=False)) as url:
        log = play(fresh, url, SMALL)
    assert len(log.records) == 12
    assert not log.stalled


# ------------------------------------------------------------------------------------------------ the process itself


def ended(pid: int) -> bool:
    """Return whether a process ends in time; one that its parent has not asked about yet has ended too."""
    return wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, 10)


def test_a_process_that_has_ended_is_a_client_error() -> None:
    client = LoadClient()
    os.kill(client.pids[0], signal.SIGKILL)
    assert ended(client.pids[0])
    with contextlib.closing(client), pytest.raises(ClientError, match="the load process ended with exit code -9"):
        play(client, "http://127.0.0.1:1")


def test_closing_ends_the_process() -> None:
    with LoadClient() as client:
        assert psutil.pid_exists(client.pids[0])
    assert not psutil.pid_exists(client.pids[0])


def test_the_process_ends_when_its_parent_is_killed() -> None:
    source = "from pytest_llmperf.measure.client.processes import LoadClient; print(LoadClient().pids[0], flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert psutil.pid_exists(pid)
        parent.kill()
    assert ended(pid)


def test_a_round_is_whole_requests_with_their_lengths() -> None:
    endpoint = Endpoint("http://h:81/proxy", "m", "secret")
    plan = endpoint.plan([Prompt((1, 2), 5)], concurrency=1, request_timeout_s=1, stall_timeout_s=1)
    head, _, body = plan.requests[0].partition(b"\r\n\r\n")
    assert head.decode().split("\r\n") == [
        "POST /proxy/v1/completions HTTP/1.1",
        "Host: h:81",
        "Content-Type: application/json",
        "Accept: text/event-stream",
        "Authorization: Bearer secret",
        f"Content-Length: {len(body)}",
    ]
    assert body == (
        b'{"model":"m","prompt":[1,2],"max_tokens":5,"temperature":0,"ignore_eos":true,"stream":true,'
        b'"stream_options":{"include_usage":true},"return_token_ids":true}'
    )
    assert (plan.host, plan.port, plan.tls, plan.output_tokens) == ("h", 81, False, (5,))


@pytest.mark.parametrize(
    ("url", "host", "port", "tls"),
    [("http://h", "h", 80, False), ("https://h", "h", 443, True), ("http://[::1]:8000", "::1", 8000, False)],
)
def test_a_url_says_where_to_connect(url: str, host: str, port: int, tls: bool) -> None:
    plan = Endpoint(url, "m").plan([], concurrency=1, request_timeout_s=1, stall_timeout_s=1)
    assert (plan.host, plan.port, plan.tls) == (host, port, tls)


def test_an_ipv6_address_keeps_its_brackets_in_the_host_header() -> None:
    plan = Endpoint("http://[::1]:8000", "m").plan([Prompt((1,), 1)], concurrency=1, request_timeout_s=1, stall_timeout_s=1)
    assert b"\r\nHost: [::1]:8000\r\n" in plan.requests[0]


# ------------------------------------------------------------------------------------------------ open loops


def wanted(**arguments: object) -> Workload:
    return workload_from(Axes(), {"prompt_tokens": 6, "output_tokens": 8, **arguments})


def test_at_a_rate_each_request_is_sent_when_due(client: LoadClient) -> None:
    workload = wanted(rate=200, requests=100)
    with SimulatedEngine(Options(clock=replace(FAST, step_s=0.02))) as engine:
        log = play(client, engine.url, workload)
        assert engine.counters.peak_blocks > 8  # many at once: nobody waited for an answer
    assert errors(log) == []
    due = [record.due_s for record in log.records]
    expected = arrivals(workload, 100)
    assert [at - due[0] for at in due if at and due[0]] == pytest.approx([at - expected[0] for at in expected], abs=1e-6)
    for record in log.records:
        assert record.sent_s is not None
        assert record.due_s is not None
        assert record.delay_s == pytest.approx(record.sent_s - record.due_s)
        assert record.delay_s >= 0
        assert record.asked_s == record.due_s


def test_a_pause_between_two_arrivals_is_no_stall(client: LoadClient) -> None:
    with SimulatedEngine(Options(clock=FAST)) as engine:
        log = play(client, engine.url, wanted(rate=1.5, requests=3, arrivals="constant"), stall_s=0.3)
    assert (errors(log), log.stalled) == ([], False)


def test_connections_that_the_server_closes_between_arrivals_are_made_anew(client: LoadClient) -> None:
    with server(answering(CHUNKED, keep=False)) as url:
        log = play(client, url, wanted(rate=10, requests=10, output_tokens=2, arrivals="constant"))
    assert errors(log) == []


def test_a_connection_is_not_used_when_the_server_may_just_close_it(client: LoadClient) -> None:
    on: dict[socket.socket, int] = {}

    def answer(connection: socket.socket) -> bool:
        on[connection] = on.get(connection, 0) + 1
        connection.sendall(CHUNKED.replace(b"\r\n", b"\r\nKeep-Alive: timeout=1, max=9\r\n", 1))
        return True

    with server(answer) as url:
        log = play(client, url, wanted(rate=1.25, requests=3, output_tokens=2, arrivals="constant"))
    assert errors(log) == []
    assert sorted(on.values()) == [1, 1, 1], "each rested for 0.8 s, and is kept for 1 s"


def test_a_crash_in_an_open_loop_fails_every_open_request(client: LoadClient) -> None:
    with SimulatedEngine(Options(clock=FAST, crash_after=20)) as engine:
        log = play(client, engine.url, wanted(rate=500, requests=80))
    assert len(log.records) == 80
    assert len(errors(log)) >= 60


# ------------------------------------------------------------------------------------------------ other forms of requests


def test_a_chat_is_counted_like_a_completion(client: LoadClient) -> None:
    with SimulatedEngine(Options(clock=FAST)) as engine:
        log = play(client, engine.url, wanted(api="chat"))
        assert engine.counters.generation_tokens == 32 * 8
    assert errors(log) == []
    assert {len(record.token_times_s) for record in log.records} == {8}


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_an_answer_without_a_stream_has_no_first_token(client: LoadClient, api: str) -> None:
    with SimulatedEngine(Options(clock=FAST)) as engine:
        log = play(client, engine.url, wanted(api=api, stream=False))
    assert errors(log) == []
    assert {(record.output_tokens, record.first_token_s) for record in log.records} == {(8, None)}
    assert all(record.end_s and record.sent_s and record.end_s > record.sent_s for record in log.records)


def test_each_turn_is_sent_when_the_one_before_is_answered(client: LoadClient) -> None:
    workload = wanted(turns=4, requests=32, concurrency=4)
    with SimulatedEngine(Options(clock=FAST)) as engine:
        log = play(client, engine.url, workload)
        assert engine.counters.prefix_hits > 0
    assert errors(log) == []
    for first in range(0, 32, 4):
        for before, after in itertools.pairwise(log.records[first : first + 4]):
            assert before.end_s is not None
            assert after.sent_s is not None
            assert after.sent_s >= before.end_s


def test_a_shared_prefix_is_found_as_often_as_it_is_shared(client: LoadClient) -> None:
    workload = wanted(prefix_tokens=32, prefixes=2, prompt_tokens=16, requests=20, concurrency=1)
    with SimulatedEngine(Options(clock=FAST)) as engine:
        assert errors(play(client, engine.url, workload)) == []
        assert engine.counters.prefix_hits == (20 - 2) * 32


def test_what_may_end_early_is_no_error_when_it_does(client: LoadClient) -> None:
    workload = wanted(output_tokens=5, extra_body={"ignore_eos": False}, requests=12, concurrency=3)
    with server(answering(CHUNKED.replace(b'"length"', b'"stop"  '))) as url:
        log = play(client, url, workload)
    assert errors(log) == []
    assert {record.output_tokens for record in log.records} == {2}
    with server(answering(CHUNKED)) as url:
        assert set(errors(play(client, url, replace(workload, extra_body="{}")))) == {"2 of 5 tokens"}


def test_a_chunked_answer_may_have_a_trailer(client: LoadClient) -> None:
    with server(answering(CHUNKED.removesuffix(b"\r\n") + b"X-Checksum: 5\r\n\r\n")) as url:
        log = play(client, url, SMALL, stall_s=3)
    assert (errors(log), log.stalled) == ([], False)


# ------------------------------------------------------------------------------------------------ TLS


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@contextlib.contextmanager
def tls_server(authority: trustme.CA, target: str) -> Iterator[str]:
    """Yield the URL of a server that speaks TLS and passes everything on to `target`, byte for byte."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    host, _, port = target.removeprefix("http://").partition(":")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, forth = await asyncio.open_connection(host, int(port))

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(65536):
                    sink.write(data)
            sink.close()

        await asyncio.gather(pump(reader, forth), pump(back, writer))

    started: queue.SimpleQueue[tuple[asyncio.AbstractEventLoop, asyncio.Event, int]] = queue.SimpleQueue()

    async def main() -> None:
        ended = asyncio.Event()
        listening = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
        started.put((asyncio.get_running_loop(), ended, listening.sockets[0].getsockname()[1]))
        await ended.wait()
        listening.close()

    thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
    thread.start()
    loop, ended, tls_port = started.get(timeout=10)
    yield f"https://localhost:{tls_port}"
    loop.call_soon_threadsafe(ended.set)
    thread.join(10)


@pytest.mark.usefixtures("stamping")
def test_tls_is_spoken_and_still_stamped_by_the_kernel(
    authority: trustme.CA, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    with SimulatedEngine(Options(clock=FAST)) as engine, tls_server(authority, engine.url) as url, LoadClient() as client:
        log = play(client, url)
    assert errors(log) == []
    assert log.kernel_stamps > 0
    assert log.clock_stamps == 0
    for record in log.records:
        times = (record.sent_s, *record.token_times_s, record.end_s)
        assert list(times) == sorted(times)  # type: ignore[type-var]


def test_a_certificate_that_nobody_trusts_is_an_error_of_every_request(authority: trustme.CA, client: LoadClient) -> None:
    with SimulatedEngine(Options(clock=FAST)) as engine, tls_server(authority, engine.url) as url:
        log = play(client, url)
    assert len(errors(log)) == 64
    assert "CERTIFICATE_VERIFY_FAILED" in errors(log)[0]


# ------------------------------------------------------------------------------------------------ several processes


@pytest.mark.parametrize("workload", [ONE_BLOCK, wanted(rate=300, requests=50), wanted(turns=2, requests=30, concurrency=5)])
def test_several_processes_send_what_one_would(workload: Workload) -> None:
    with SimulatedEngine(Options(clock=replace(FAST, step_s=0.01))) as engine, LoadClient(3) as client:
        log = play(client, engine.url, workload)
        counters = engine.counters
    assert errors(log) == []
    assert (log.processes, len(log.records)) == (3, workload.requests)
    assert counters.requests_finished == workload.requests
    if not workload.is_open:
        assert counters.peak_blocks <= workload.concurrency * 3  # blocks of 16 tokens: a prompt of two turns has 2
    if workload == ONE_BLOCK:
        assert counters.peak_blocks == workload.concurrency


def test_more_processes_than_requests_in_flight_do_no_harm() -> None:
    with SimulatedEngine(Options(clock=FAST)) as engine, LoadClient(3) as client:
        log = play(client, engine.url, wanted(concurrency=2))
    assert (errors(log), log.processes, len(log.records)) == ([], 2, 32)


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("workload", [wanted(concurrency=1), wanted(rate=500), wanted(turns=4, concurrency=2)])
def test_no_request_is_lost_between_processes(processes: int, workload: Workload) -> None:
    drawn = prompts(workload, 0, vocabulary=None, nonce="case")
    how = {"concurrency": workload.concurrency, "request_timeout_s": 1, "stall_timeout_s": 1}
    parts = Endpoint("http://h", "m").plan(drawn, **how).split(processes)
    assert sorted(itertools.chain.from_iterable(indices for _, indices in parts)) == list(range(32))
    if not workload.is_open:
        assert sum(part.concurrency for part, _ in parts) == workload.concurrency


def test_records_come_back_in_the_order_of_the_requests() -> None:
    workload = wanted(prompt_tokens="uniform(4, 60)", concurrency=6)
    expected = [len(prompt.token_ids) for prompt in prompts(workload, 0, vocabulary=None, nonce="case")]
    with SimulatedEngine(Options(clock=FAST)) as engine, LoadClient(2) as client:
        log = play(client, engine.url, workload)
    assert [record.prompt_tokens for record in log.records] == expected


# ------------------------------------------------------------------------------------------------ odder servers

EVENT = b'data: {"choices":[{"text":"a","token_ids":[1]}]}'
CRLF_EVENTS = b"".join(
    b"%x\r\n%b\r\n" % (len(data), data)
    for data in (EVENT + b"\r\n\r\n", LAST.strip() + b"\r\n\r\n", USAGE.strip() + b"\r\n\r\n", b"data: [DONE]\r\n\r\n", b"")
)


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 100 Continue\r\n\r\n" + CHUNKED,
        b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + SIZED,
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + CRLF_EVENTS,
        SIZED.replace(b"\n\n", b"\r\r").replace(b"200 OK", b"201 Created"),
        SIZED.replace(b"%d" % len(BODY), b"%d" % (len(BODY) - 2)).removesuffix(b"\n\n"),
    ],
    ids=["100", "103", "events that end with CRLF", "events that end with CR", "no end of the last line"],
)
@pytest.mark.parametrize("piece", [None, 1, 7])
def test_what_http_allows_is_read_too(client: LoadClient, data: bytes, piece: int | None) -> None:
    with server(answering(data, piece=piece)) as url:
        log = play(client, url, SMALL, stall_s=3)
    assert (errors(log), log.stalled) == ([], False)


@pytest.mark.parametrize(
    "data",
    [
        SIZED.replace(b"content-length: ", b"content-length: " + b"9" * 5000),
        CHUNKED.replace(b'"prompt_tokens":3', b'"prompt_tokens":99999999999999999999999'),
    ],
    ids=["length", "usage"],
)
def test_numbers_beyond_all_bounds_are_an_error_of_their_request(client: LoadClient, data: bytes) -> None:
    with server(answering(data, keep=False)) as url:
        log = play(client, url, SMALL, stall_s=3)
    assert len(log.records) == 12
    assert [record.error for record in play_again(client)] == [None] * 4


def play_again(client: LoadClient) -> tuple[RequestRecord, ...]:
    """Return what a sound server brings: the process is alive."""
    with server(answering(CHUNKED)) as url:
        return play(client, url, wanted(output_tokens=2, requests=4, concurrency=2)).records


@pytest.mark.parametrize("after_s", [0.0, 1.2])
def test_a_request_that_gets_no_answer_is_not_sent_again(client: LoadClient, after_s: float) -> None:
    count = itertools.count()

    def answer(connection: socket.socket) -> bool:
        if next(count) % 2 == 0:
            connection.sendall(CHUNKED)
            return True
        select.select([], [], [], after_s)
        return False

    with server(answer) as url:
        log = play(client, url, wanted(output_tokens=2, requests=4, concurrency=1))
    assert errors(log) == ["the server closed the connection without an answer"] * 2
    assert next(count) == 4


def test_a_server_that_goes_away_fails_what_follows(client: LoadClient) -> None:
    with server(answering(CHUNKED, keep=False)) as url:
        pass
    with contextlib.ExitStack() as stack:
        port = int(url.rpartition(":")[2])
        listener = stack.enter_context(socket.create_server(("127.0.0.1", port), backlog=64))
        thread = threading.Thread(target=lambda: [listener.accept()[0].close() for _ in range(32)], daemon=True)
        thread.start()
        plan = Endpoint(url, "m").plan(
            prompts(wanted(rate=200, requests=60, output_tokens=2), 0, vocabulary=None, nonce="x"),
            concurrency=1, request_timeout_s=5, stall_timeout_s=5,
        )  # fmt: skip
        closing = threading.Thread(target=lambda: (thread.join(10), listener.close()), daemon=True)
        closing.start()
        log = client.play(plan)
    assert len(log.records) == 60
    assert len(errors(log)) == 60


WATCHED = """
import os, subprocess, sys
child = '''
import os, sys
{missing}
from pytest_llmperf.measure.client.load import _watch
_watch(sys.argv[1])
print(os.getpid(), flush=True)
sys.stdin.read()
'''
from pytest_llmperf.measure.engines import remains
subprocess.Popen([sys.executable, "-c", child, remains.owner()], stdin=sys.stdin)
sys.stdin.read()
"""


@pytest.mark.parametrize("missing", ["", "del os.pidfd_open"], ids=["by its descriptor", "by looking"])
def test_a_load_process_ends_with_its_parent(missing: str) -> None:
    source = str(Path(pytest_llmperf.__file__).parents[1])
    parent = subprocess.Popen(
        [sys.executable, "-c", WATCHED.format(missing=missing)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": source},
    )  # fmt: skip
    with parent:  # which keeps the pipe open that the child reads, too
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        assert wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, 15)
