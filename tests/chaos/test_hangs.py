"""No hang: whatever a server sends, and however slowly, what was asked of it ends in a time that is known before."""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_llmperf.measure.client import connect
from pytest_llmperf.measure.client.endpoint import Endpoint
from pytest_llmperf.measure.client.processes import LoadClient
from pytest_llmperf.measure.client.prompts import prompts
from pytest_llmperf.measure.engines import api, discovery
from pytest_llmperf.measure.engines.engine import EngineError
from pytest_llmperf.plan.workload import Workload
from pytest_llmperf.testing import Example
from tests.hostile_servers import (
    HEAD,
    SOUND,
    STREAM,
    chunks,
    dripping,
    event,
    hostile_server,
    loaded,
    silent,
    tokens,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from pytest_llmperf.measure.client.messages import RoundLog
    from pytest_llmperf.testing import Result
    from tests.faults import Attempts
    from tests.hostile_servers import Answer, Asked

PATIENCE_S = 60.0
"""What ends in a second on an idle machine has ended by then on every machine; what hangs has not."""
LARGE = {"prompt": "x" * (32 << 20)}
SIZED = HEAD + b"content-length: 1000000\r\n\r\n"
PARTS = {
    "head": dripping(HEAD, b"x"),
    "body of a known length": dripping(SIZED, b"x"),
    "body in chunks": dripping(STREAM, b"1\r\nx\r\n"),
    "body until the end": dripping(HEAD + b"\r\n", b"x"),
    "interim answers": dripping(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
}


@pytest.fixture(scope="module")
def client() -> Iterator[LoadClient]:
    with LoadClient() as started:
        yield started


def play(client: LoadClient, url: str, *, stall_s: float = 1.0, request_s: float = 600.0, **other: Any) -> RoundLog:
    workload = replace(Workload(prompt_tokens=3, output_tokens=4, requests=6, concurrency=3), **other)
    drawn = prompts(workload, 0, vocabulary=None, nonce="case")
    how = {"concurrency": workload.concurrency, "request_timeout_s": request_s, "stall_timeout_s": stall_s}
    return client.play(Endpoint(url, "m", gives_ids=False).plan(drawn, **how, stream=workload.stream))


def timed(attempts: Attempts, what: Callable[[], Any]) -> Any:
    begin_s = time.monotonic()
    result = what()
    took_s = time.monotonic() - begin_s
    attempts.took(took_s)
    assert took_s < PATIENCE_S
    return result


# ------------------------------------------------------------------------------------------------ what is asked beside a load


def faults(what: str, names: Iterable[str], *, full: Iterable[str] = ()) -> list[Any]:
    """Return parameters of which each is a row of the table; `full`: those that a quick run leaves out."""
    later = set(full)
    marks = {name: pytest.mark.fault("no hang", what.format(name), full=name in later) for name in names}
    return [pytest.param(name, marks=mark, id=name) for name, mark in marks.items()]


@pytest.mark.parametrize("path", faults("a byte at a time from {}", ["/v1/models", "/metrics", "/health", "/version"]))
def test_what_drips_ends_after_its_time_in_all(attempts: Attempts, path: str) -> None:
    names = list(PARTS)
    for chance in attempts(quick=len(PARTS), full=4 * len(PARTS)):
        name = names.pop(0) if names else chance.choice(list(PARTS))
        with hostile_server({path: PARTS[name]}) as server, pytest.raises(OSError, match=r"within 0\.1 s; [\d,]+ bytes came"):
            timed(attempts, lambda url=server.url: api.ask(Endpoint(url, "m"), path, timeout_s=0.1))


@pytest.mark.fault("no hang", "a byte at a time from /v1/completions")
def test_a_completion_that_drips_ends(attempts: Attempts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_COMPLETION_TIMEOUT_S", 0.1)
    for part in PARTS.values():
        for _ in attempts():
            with (
                hostile_server({"/v1/completions": part}) as server,
                pytest.raises(EngineError, match=r"gave no completion within 0\.1 s"),
            ):
                timed(attempts, lambda url=server.url: api.complete(Endpoint(url, "m"), [1], 1))


@pytest.mark.fault("no hang", "a server that takes nothing of a request")
def test_a_request_that_is_not_taken_ends(attempts: Attempts) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        for _ in attempts():
            with pytest.raises(TimeoutError, match=r"within 0\.5 s"):
                timed(attempts, lambda: api.ask(Endpoint(url, "m"), "/v1/completions", LARGE, timeout_s=0.5))


# ------------------------------------------------------------------------------------------------ the load


def stopping(asked: Asked) -> bool:
    """Send two of four tokens, and nothing more."""
    asked.connection.sendall(STREAM + chunks(tokens(4)[:2]))
    return silent(asked)


WITHOUT_TOKENS: dict[str, Answer] = {
    "pings only": dripping(STREAM, chunks([b": ping\n\n"])),
    "events without a choice": dripping(STREAM, chunks([event()])),
    "events without text": dripping(STREAM, chunks([event("")])),
    "garbage": dripping(STREAM, chunks([b"\x00\xff garbage"])),
    "head that drips": dripping(HEAD, b"x"),
    "body that drips": dripping(SIZED, b"x"),
    "an event that drips": dripping(STREAM, b"1\r\nx\r\n"),
    "a chunk's size that drips": dripping(STREAM, b"0"),
    "a trailer that drips": dripping(STREAM + b"0\r\n", b"a: b\r\n", every_s=0.05),
    "interim answers for ever": dripping(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"),
    "no answer": silent,
    "a stop in mid-stream": stopping,
}


ALIKE = ("events without text", "garbage", "a chunk's size that drips", "a trailer that drips", "body that drips")
"""They are told apart from others only by what a quick run has tried elsewhere."""


@pytest.mark.parametrize("what", faults("a load that meets {}", WITHOUT_TOKENS, full=ALIKE))
def test_bytes_that_bring_no_token_are_a_stall(client: LoadClient, attempts: Attempts, what: str) -> None:
    for _ in attempts(quick=1, full=5):
        with hostile_server({"/v1/completions": WITHOUT_TOKENS[what]}) as server:
            log = timed(attempts, lambda url=server.url: play(client, url, stall_s=0.3))
        assert log.stalled
        assert {record.error for record in log.records} <= {
            "no token on any connection for 0.3 s",
            "never sent: the round had stalled or timed out",
        }


@pytest.mark.fault("no hang", "a load that meets a token a minute")
def test_a_token_now_and_then_ends_with_the_requests_time(client: LoadClient, attempts: Attempts) -> None:
    slowly = dripping(STREAM, chunks([event("w")]), every_s=0.1)
    for _ in attempts(quick=1, full=5):
        with hostile_server({"/v1/completions": slowly}) as server:
            log = timed(attempts, lambda url=server.url: play(client, url, stall_s=30.0, request_s=0.4, requests=3))
        assert not log.stalled
        assert {record.error for record in log.records} == {"not complete after 0.4 s"}


@pytest.mark.fault("no hang", "one stream that drips beside others that work")
def test_a_stream_that_drips_beside_others_ends_with_the_requests_time(client: LoadClient, attempts: Attempts) -> None:
    def answer(asked: Asked) -> bool:
        return (WITHOUT_TOKENS["pings only"] if asked.number == 1 else SOUND["/v1/completions"])(asked)

    for _ in attempts():
        with hostile_server({"/v1/completions": answer}) as server:
            log = timed(attempts, lambda url=server.url: play(client, url, stall_s=30.0, request_s=0.6))
        errors = [record.error for record in log.records if record.error]
        assert errors == ["not complete after 0.6 s"]


def test_an_answer_that_comes_byte_by_byte_is_no_stall(client: LoadClient) -> None:
    def answer(asked: Asked) -> bool:
        for byte in STREAM + chunks(tokens(4)) + b"0\r\n\r\n":
            asked.connection.sendall(bytes([byte]))
            time.sleep(0.001)
        return True

    with hostile_server({"/v1/completions": answer}) as server:
        log = play(client, server.url, stall_s=2.0, requests=3)
    assert [record.error for record in log.records] == [None] * 3


@pytest.mark.fault("no hang", "a TLS handshake of a byte at a time")
def test_a_handshake_that_drips_ends(attempts: Attempts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "_CONNECT_TIMEOUT_S", 0.5)

    def serve(listener: socket.socket) -> None:
        try:
            while True:
                with listener.accept()[0] as connection:
                    while True:
                        connection.sendall(b"\x16\x03\x03\x40\x00" if not connection.recv(1 << 16) else b"\x02")
                        time.sleep(0.05)
                        for _ in range(1000):
                            connection.sendall(b"\x00")
                            time.sleep(0.05)
        except OSError:
            return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        for _ in attempts():
            links = connect.Connections(Endpoint(url, "m").plan([], concurrency=1, request_timeout_s=1, stall_timeout_s=0.5))
            with pytest.raises(OSError, match=r"timed out|TLS|SSL"):
                timed(attempts, links.connect)
            links.close()
            with pytest.raises(OSError, match=r"within 0\.5 s|SSL"):
                timed(attempts, lambda: api.ask(Endpoint(url, "m"), "/v1/models", timeout_s=0.5))
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(PATIENCE_S)


# ------------------------------------------------------------------------------------------------ a run as a whole

TEST = """
def test_serving(llmperf, baseline):
    measured = llmperf(prompt_tokens=16, output_tokens=6, requests=8)
    assert measured == baseline
"""


OPTIONS = (
    "--update-baselines",
    "--llmperf-rounds=1",
    "--llmperf-launches=1",
    "--llmperf-tolerance=60%",
    "-p",
    "no:benchmark",
    "-p",
    "no:hypothesispytest",
    "-p",
    "no:anyio",
)


def run_on(folder: Path, url: str, *options: str) -> Result:
    """Run one test on an endpoint, in this process: what it waits for can then be made shorter."""
    return Example({"test_it.py": TEST}, OPTIONS).run(folder, f"--llmperf-url={url}", *options, in_process=True)


@pytest.mark.parametrize(
    "path", faults("a run whose endpoint drips from {}", ["/v1/models", "/metrics", "/version", "/v1/completions"])
)
def test_a_run_ends_whatever_drips(tmp_path: Path, attempts: Attempts, monkeypatch: Any, path: str) -> None:
    monkeypatch.setitem(api.ask.__kwdefaults__, "timeout_s", 0.3)
    monkeypatch.setattr(discovery, "_PROBE_TIMEOUT_S", 0.3)
    for _ in attempts():
        with hostile_server({path: dripping(SIZED, b"x")}) as server:
            result = timed(attempts, lambda url=server.url: run_on(tmp_path, url))
        if path in ("/metrics", "/version"):
            assert result.outcomes == {"skipped": 1} or result.outcomes == {"passed": 1}
        else:
            assert result.returncode == 1
            assert "within 0.3 s" in result.stdout


@pytest.mark.fault("no hang", "a run whose endpoint sends pings and no token")
def test_a_run_ends_when_no_token_comes(tmp_path: Path, attempts: Attempts) -> None:
    for _ in attempts():
        with hostile_server({"/v1/completions": loaded(WITHOUT_TOKENS["pings only"])}) as server:
            result = timed(attempts, lambda url=server.url: run_on(tmp_path, url, "--llmperf-stall-timeout=1"))
        assert result.returncode == 1
        assert "HANG: no token came on any connection for 1 s" in result.stdout
