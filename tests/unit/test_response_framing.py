"""The frame around a response, read piece by piece: where it ends, whether the connection lives on, and what is too long."""

from __future__ import annotations

import itertools
import socket
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.measure.client import exchange
from pytest_llmperf.measure.client.exchange import Connection, Exchange, most_bytes
from pytest_llmperf.measure.client.framing import Chunks, FloodError, closes_behind, keep_alive_s
from pytest_llmperf.measure.client.reasons import reason_of_body
from pytest_llmperf.measure.engines.plain_http import exchange as ask
from tests.hostile_servers import HEAD, STREAM, Asked, chunks, hostile_server


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


@given(
    st.lists(st.binary(min_size=1, max_size=300), max_size=5),
    st.lists(st.sampled_from([b"a: b", b"c:"]), max_size=3),
    st.lists(st.integers(0, 900), max_size=30),
)
def test_a_chunked_body_ends_with_its_last_byte_however_it_comes(
    bodies: list[bytes], trailer: list[bytes], cuts: list[int]
) -> None:
    wire = chunks(bodies) + b"0\r\n" + b"".join(line + b"\r\n" for line in trailer) + b"\r\n"
    follower, pieces = Chunks(), [piece for piece in split(wire, cuts) if piece]
    assert [follower.take(piece) for piece in pieces] == [False] * (len(pieces) - 1) + [True]


@pytest.mark.parametrize("size", [b"zz\r\n", b"-5\r\n", b"5\n", b"\r\n"])
def test_a_size_that_is_none_ends_a_body(size: bytes) -> None:
    assert Chunks().take(size)


@pytest.mark.parametrize(("start", "piece"), [(b"", b"0"), (b"0\r\n", b"x"), (b"0\r\n", b"a: b\r\n")])
def test_a_line_and_a_trailer_have_a_limit(start: bytes, piece: bytes) -> None:
    follower = Chunks()
    follower.take(start)
    with pytest.raises(FloodError, match="longer than"):
        sum(follower.take(piece) for _ in range(70_000))


@pytest.mark.parametrize(
    ("head", "closes"),
    [
        (b"HTTP/1.1 200 OK\r\nServer: x", False),
        (b"HTTP/1.1 200 OK\r\nConnection: close", True),
        (b"HTTP/1.1 200 OK\r\nCONNECTION:  upgrade , Close ", True),
        (b"HTTP/1.1 200 OK\r\nX-Connection: close", False),
        (b"HTTP/1.0 200 OK\r\nServer: x", True),
        (b"HTTP/1.0 200 OK\r\nConnection: keep-alive", False),
    ],
)
def test_a_head_says_whether_the_connection_lives_on(head: bytes, closes: bool) -> None:
    assert closes_behind(head) is closes


@pytest.mark.parametrize(
    ("line", "seconds"),
    [(b"Keep-Alive: timeout=5, max=9", 5.0), (b"keep-alive: max=9, timeout=75", 75.0), (b"Keep-Alive: x", None)],
)
def test_a_head_says_for_how_long(line: bytes, seconds: float | None) -> None:
    assert keep_alive_s(b"HTTP/1.1 200 OK\r\n" + line) == seconds


def connection() -> tuple[Connection, socket.socket]:
    ours, theirs = socket.socketpair()
    return Connection(ours, None), theirs


def test_a_connection_is_stale_when_the_server_has_closed_it_or_may() -> None:
    ours, theirs = connection()
    with ours.raw, theirs:
        assert not ours.is_stale()
        ours.rest()
        assert not ours.is_stale()
        ours.rest(2.0)
        assert ours.keep_s == 1.0
        ours.rest(0.5)
        assert ours.keep_s == 0.25
        ours.rests_since_s = time.monotonic() - 0.3
        assert ours.is_stale()
        ours.rest(75.0)
        assert not ours.is_stale()
        theirs.close()
        assert ours.is_stale()


def test_bytes_that_nobody_asked_for_make_a_connection_stale() -> None:
    ours, theirs = connection()
    with ours.raw, theirs:
        ours.rest()
        theirs.sendall(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
        assert ours.is_stale()


def answered(*pieces: bytes) -> Exchange:
    under_way = Exchange(0, b"", 0, most_bytes(b"", 8))
    for piece in pieces:
        under_way.reads.append((1, piece))
        under_way.received += len(piece)
        under_way.is_complete(piece)
    return under_way


EVENT = b'data: {"choices":[{"text":"a"}]}\n\n'


@pytest.mark.parametrize(
    ("piece", "is_token"),
    [
        (EVENT, True),
        (EVENT.replace(b":[", b" : [ "), True),
        (EVENT.replace(b'"text":"a"', b'"delta":{"reasoning_content":"a"}'), True),
        (EVENT.replace(b'"text":"a"', b'"text":"","token_ids":[5]'), True),
        (EVENT.replace(b'"text":"a"', b'"delta":{"tool_calls":[{"index":0}]}'), True),
        (EVENT.replace(b'"text":"a"', b'"text":""'), False),
        (EVENT.replace(b'"text":"a"', b'"prompt_token_ids":[5],"token_ids":[]'), False),
        (b": ping\n\n", False),
        (b'data: {"choices":[]}\n\n', False),
        (EVENT[:-9], False),
    ],
)
def test_only_an_event_with_a_token_is_progress(piece: bytes, is_token: bool) -> None:
    under_way = answered(STREAM)
    assert not under_way.brought_token()
    under_way.reads.append((2, b"%x\r\n%b\r\n" % (len(piece), piece)))
    assert under_way.brought_token() is is_token
    assert not under_way.brought_token(), "the same bytes are no progress twice"


def test_a_token_that_comes_byte_by_byte_is_progress_once() -> None:
    under_way, moments = answered(STREAM), []
    for byte in EVENT + b": ping\n\n" * 3:
        under_way.reads.append((2, bytes([byte])))
        moments.append(under_way.brought_token())
    assert moments == [False] * (len(EVENT) - 2) + [True] + [False] * (1 + 24)


def test_interim_responses_are_passed_over_and_counted() -> None:
    under_way = answered(
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early", b" Hints\r\na: b\r\n\r\n" + HEAD, b"content-length: 2\r\n\r\n"
    )
    assert under_way.length == under_way.received + 2
    assert b"".join(piece for _, piece in under_way.reads) == HEAD + b"content-length: 2\r\n\r\n"


def test_a_head_that_drips_has_a_limit() -> None:
    assert exchange.MOST_HEAD_BYTES == 65_536
    with pytest.raises(FloodError, match="the head of the answer is longer than 65,536 bytes"):
        answered(HEAD, *[b"x"] * 70_000)


def test_a_page_that_is_nothing_but_titles_has_words_at_once() -> None:
    assert len(reason_of_body(b"<html>" + b"<title " * 200_000)) <= 303
    assert reason_of_body(b"<html><TITLE>502\n</title>") == "502"


def test_reasons_that_are_wrapped_without_end_are_text() -> None:
    body = b'{"error":' * 900 + b'"gone"' + b"}" * 900
    assert reason_of_body(body).startswith('{"error":')


# ------------------------------------------------------------------------------------------------ what is asked beside a load


@pytest.mark.parametrize(
    ("wire", "body"),
    [
        (HEAD + b"content-length: 2\r\n\r\nok", b"ok"),
        (STREAM + chunks([b"o", b"k"]) + b"0\r\n\r\n", b"ok"),
        (HEAD + b"\r\nok", b"ok"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + b"content-length: 2\r\n\r\nok", b"ok"),
        (b"HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n", b""),
    ],
)
def test_an_answer_is_read_whole(wire: bytes, body: bytes) -> None:
    def answer(asked: Asked) -> bool:
        asked.connection.sendall(wire)
        return False

    with hostile_server({"/x": answer}) as server:
        assert ask(f"{server.url}/x?y=1#z", None, {"host": "named"}, timeout_s=30.0).body == body
        assert server.paths == ["/x?y=1"]
        assert server.heads[0]["host"] == "named"


@pytest.mark.parametrize("wire", [HEAD + b"content-length: 9\r\n\r\nok", STREAM + b"9\r\nok", b"", b"SSH-2.0\r\n", HEAD[:-3]])
def test_an_answer_that_is_cut_is_an_error(wire: bytes) -> None:
    def answer(asked: Asked) -> bool:
        asked.connection.sendall(wire)
        return False

    with hostile_server({"/x": answer}) as server, pytest.raises(OSError, match=r"."):
        ask(f"{server.url}/x", None, {}, timeout_s=30.0)


@pytest.mark.parametrize(
    "url", ["http://", "http://[::1", "http://h:99999/", "http://127.0.0.1:1/\u4e16", f"http://{'a' * 70}.b/"]
)
def test_a_url_that_is_none_is_an_error(url: str) -> None:
    with pytest.raises(OSError, match=r"."):
        ask(url, None, {}, timeout_s=30.0)
