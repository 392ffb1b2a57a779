"""`parse_response`, against a reference encoder of vLLM's stream: what arrives in whatever pieces, and when, is read right.

The encoder's framing is that of a real vLLM 0.32 (one HTTP chunk per event), see
`test_the_encoder_writes_what_vllm_was_seen_to_send`.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_llmperf.measure.client import response
from pytest_llmperf.measure.client.response import RequestRecord, counted, parse_response

PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

SENT_NS = 1_000_000_000
HEAD = (
    b"HTTP/1.1 200 OK\r\ndate: Fri, 21 Nov 2026 07:49:02 GMT\r\nserver: uvicorn\r\n"
    b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
DONE = b"data: [DONE]\n\n"
CUT = "the server closed the connection in the middle of the response"


# ------------------------------------------------------------------------------------------------ the reference encoder


def event(ids: list[int] | None = None, *, text: str = " w", usage: tuple[int, int] | None = None, last: bool = False) -> bytes:
    """Return the event of a generated token, or of several; without usage it has none."""
    choice = {
        "index": 0, "text": text, "logprobs": None, "finish_reason": "length" if last else None, "stop_reason": None,
        "prompt_token_ids": None, "token_ids": ids,
    }  # fmt: skip
    return _data([choice], usage)


def usage_event(prompt_tokens: int, output_tokens: int) -> bytes:
    return _data([], (prompt_tokens, output_tokens))


def _data(choices: list[dict[str, Any]], usage: tuple[int, int] | None) -> bytes:
    body: dict[str, Any] = {"id": "cmpl-1", "object": "text_completion", "created": 1795247342, "model": "m", "choices": choices}
    if usage is not None:
        body["usage"] = {"prompt_tokens": usage[0], "total_tokens": sum(usage), "completion_tokens": usage[1]}
    return b"data: " + json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


@dataclass
class Wire:
    """A response as bytes, and where each event of its body ends on the wire."""

    data: bytes
    ends: list[int] = field(default_factory=list)


def encode(events: list[bytes], *, head: bytes = HEAD, cuts: list[int] | None = None) -> Wire:
    """Return the response in HTTP chunks: one per event, or cut at the given offsets of the body, as a proxy may."""
    body = b"".join(events)
    event_ends = list(itertools.accumulate(len(piece) for piece in events))
    edges = [0, *(event_ends if cuts is None else sorted({*cuts, len(body)} - {0}))]
    data = head
    position: dict[int, int] = {}
    for start, end in itertools.pairwise(edges):
        data += b"%x\r\n" % (end - start)
        position |= {offset + 1: len(data) + offset + 1 - start for offset in range(start, end)}
        data += body[start:end] + b"\r\n"
    return Wire(data + b"0\r\n\r\n", [position[end] for end in event_ends])


def stream(count: int, *, prompt_tokens: int = 4) -> list[bytes]:
    """Return the events of a whole answer of `count` tokens, one each."""
    tokens = [event([7 + n], text=f" w{n}", last=n == count - 1) for n in range(count)]
    return [*tokens, usage_event(prompt_tokens, count), DONE]


def split(data: bytes, at: list[int]) -> list[tuple[int, bytes]]:
    """Return reads cut at the offsets, a millisecond apart, the first a millisecond after the request was sent."""
    edges = [0, *sorted(at), len(data)]
    pieces = [data[start:end] for start, end in itertools.pairwise(edges)]
    return [(SENT_NS + (n + 1) * 1_000_000, piece) for n, piece in enumerate(pieces)]


def stamp_of(reads: list[tuple[int, bytes]], wire_end: int) -> float:
    """Return when the byte before `wire_end` arrived, found the slow way."""
    total = 0
    for stamp, piece in reads:
        total += len(piece)
        if total >= wire_end:
            return stamp / 1e9
    raise AssertionError("the byte never arrived")


def parse(data: bytes, wanted: int = 1, *, error: str | None = None, at: list[int] | None = None) -> RequestRecord:
    return parse_response(split(data, at or []), sent_ns=SENT_NS, wanted=wanted, error=error)


def fixed(body: bytes, status: str = "200 OK") -> bytes:
    return b"HTTP/1.1 %b\r\ncontent-length: %d\r\n\r\n%b" % (status.encode(), len(body), body)


def test_the_encoder_writes_what_vllm_was_seen_to_send() -> None:
    seen = (
        b'138\r\ndata: {"id":"cmpl-ae7a87072531104f","object":"text_completion","created":1795247342,"model":"models/facts/tiny",'
        b'"choices":[{"index":0,"text":"%","logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,'
        b'"token_ids":[7]}],"usage":{"prompt_tokens":4,"total_tokens":6,"completion_tokens":2}}\n\n\r\n'
    )
    ours = encode([event([7], text="%", usage=(4, 2))], head=b"").data.removesuffix(b"0\r\n\r\n").partition(b"\r\n")[2]
    expected = seen.partition(b"\r\n")[2].replace(b"cmpl-ae7a87072531104f", b"cmpl-1").replace(b"models/facts/tiny", b"m")
    assert ours == expected


# ------------------------------------------------------------------------------------------------ tokens and times

groups = st.lists(st.lists(st.integers(0, 200_000), max_size=4), min_size=1, max_size=8)
texts = st.text(max_size=6)


@settings(PATIENT, max_examples=200)
@given(groups=groups, text=texts, data=st.data())
def test_any_split_into_reads_gives_the_same_tokens_and_stamps(groups: list[list[int]], text: str, data: st.DataObject) -> None:
    count = sum(map(len, groups))
    events = [*(event(ids, text=text, last=n == len(groups)) for n, ids in enumerate(groups, 1)), usage_event(4, count), DONE]
    size = sum(map(len, events))
    cuts = data.draw(st.none() | st.lists(st.integers(1, size), max_size=12))
    wire = encode(events, cuts=cuts)
    reads = split(wire.data, data.draw(st.lists(st.integers(0, len(wire.data)), max_size=20)))

    record = parse_response(reads, sent_ns=SENT_NS, wanted=count)

    expected = [stamp_of(reads, end) for ids, end in zip(groups, wire.ends, strict=False) for _ in ids]
    assert record.error is None
    assert (record.prompt_tokens, record.output_tokens) == (4, count)
    assert list(record.token_times_s) == expected
    assert (record.sent_s, record.end_s) == (1.0, reads[-1][0] / 1e9)


@PATIENT
@given(st.lists(st.integers(0, 2000), max_size=20))
def test_token_times_never_go_back_and_lie_between_sending_and_end(at: list[int]) -> None:
    wire = encode(stream(5)).data
    record = parse_response(split(wire, [min(offset, len(wire)) for offset in at]), sent_ns=SENT_NS, wanted=5)
    times = [record.sent_s, *record.token_times_s, record.end_s]
    assert times == sorted(times)  # type: ignore[type-var]


def test_one_byte_a_read_gives_every_token_its_own_time() -> None:
    wire = encode(stream(3))
    reads = split(wire.data, list(range(1, len(wire.data))))
    record = parse_response(reads, sent_ns=SENT_NS, wanted=3)
    assert record.token_times_s == tuple(reads[end - 1][0] / 1e9 for end in wire.ends[:3])


def test_a_whole_answer_in_one_read_gives_all_tokens_one_time() -> None:
    record = parse(encode(stream(3)).data, 3)
    assert record.token_times_s == (1.001, 1.001, 1.001)
    assert record.first_token_s == record.end_s == 1.001


def test_several_tokens_of_one_event_share_its_time() -> None:
    wire = encode([event([1, 2, 3]), event([4, 5], last=True), usage_event(4, 5), DONE])
    record = parse_response(split(wire.data, [wire.ends[0]]), sent_ns=SENT_NS, wanted=5)
    assert record.token_times_s == (1.001, 1.001, 1.001, 1.002, 1.002)
    assert record.error is None


def test_an_event_without_tokens_is_no_arrival() -> None:
    wire = encode([event([]), event([1], last=True), usage_event(4, 1), DONE])
    assert parse_response(split(wire.data, [wire.ends[0]]), sent_ns=SENT_NS, wanted=1).token_times_s == (1.002,)


def test_a_token_with_empty_text_counts_by_its_id() -> None:
    record = parse(encode([event([1], text=""), event([2], text="", last=True), DONE]).data, 2)
    assert (record.output_tokens, record.error) == (2, None)


# ------------------------------------------------------------------------------------------------ what the server counts


def test_usage_alone_is_enough_to_count() -> None:
    record = parse(encode([event(None), event(None, last=True), usage_event(4, 2), DONE]).data, 2)
    assert (record.prompt_tokens, record.output_tokens, record.error) == (4, 2, None)
    assert len(record.token_times_s) == 2


def test_usage_counts_where_text_was_empty_or_held_several_tokens() -> None:
    record = parse(encode([event(None, text=""), event(None, text="a b c", last=True), usage_event(4, 5), DONE]).data, 5)
    assert (record.output_tokens, record.error) == (5, None)
    assert record.token_times_s == (1.001,)


def test_ids_alone_are_enough_to_count() -> None:
    record = parse(encode([event([1]), event([2], last=True), DONE]).data, 2)
    assert (record.prompt_tokens, record.output_tokens, record.error) == (None, 2, None)


def test_usage_in_every_event_counts_once() -> None:
    record = parse(encode([event([1], usage=(4, 1)), event([2], usage=(4, 2), last=True), usage_event(4, 2), DONE]).data, 2)
    assert (record.output_tokens, record.error) == (2, None)


def test_usage_that_contradicts_the_ids_is_an_error() -> None:
    record = parse(encode([event([1]), event([2], last=True), usage_event(4, 3), DONE]).data, 3)
    assert record.error == "usage says 3 tokens, the stream held 2"


def test_neither_usage_nor_ids_is_an_error_because_text_is_no_count() -> None:
    record = parse(encode([event(None, text="a", last=True), DONE]).data, 1)
    assert record.output_tokens is None
    assert record.error == "the server reports neither usage nor token ids, so its tokens cannot be counted"


@pytest.mark.parametrize("count", [1, 4, 6])
def test_another_number_of_tokens_than_asked_for_is_an_error(count: int) -> None:
    assert parse(encode(stream(count)).data, 5).error == f"{count} of 5 tokens"


def test_an_answer_with_no_event_at_all_is_an_error() -> None:
    assert parse(encode([DONE]).data).error is not None


# ------------------------------------------------------------------------------------------------ failures


def test_http_500_is_an_error_with_the_body() -> None:
    record = parse(fixed(b'{"error":{"message":"EngineCore died"}}', "500 Internal Server Error"))
    assert record.error == "HTTP 500: EngineCore died"
    assert record.token_times_s == ()


def test_http_500_in_chunks_is_an_error_with_the_body() -> None:
    head = HEAD.replace(b"200 OK", b"500 Internal Server Error")
    assert parse(encode([b"oh", b" no"], head=head).data).error == "HTTP 500: oh no"


def test_a_long_error_body_is_cut() -> None:
    assert len(parse(fixed(b"x" * 100_000, "400 Bad Request")).error or "") < 400


def test_an_error_event_in_a_200_is_an_error() -> None:
    failure = b'data: {"error":{"message":"EngineCore encountered an issue.","type":"InternalServerError","code":500}}\n\n'
    record = parse(encode([event([1]), failure, DONE]).data, 2)
    assert record.error is not None
    assert "EngineCore encountered an issue." in record.error
    assert len(record.token_times_s) == 1


def test_an_error_event_is_an_error_also_when_all_tokens_had_come() -> None:
    assert parse(encode([event([1]), b'data: {"error": "late"}\n\n', DONE]).data, 1).error == "error in the stream: late"


@pytest.mark.parametrize(
    "broken",
    [
        b"data: {not json}\n\n",
        b"data: [1, 2]\n\n",
        b'data: "text"\n\n',
        b'data: {"choices": {}}\n\n',
        b'data: {"choices": [{"token_ids": ["a"]}]}\n\n',
        b'data: {"choices": [{"token_ids": [1e400]}]}\n\n',
        b'data: {"usage": {"completion_tokens": "5"}}\n\n',
        b'data: {"choices": [{"text": "\xff\xfe"}]}\n\n',
        b"data: " + b"[" * 100_000 + b"\n\n",
        b'data: {"x": ' + b"[" * 100_000 + b"\n\n",
    ],
    ids=lambda broken: broken[:24].decode(errors="replace").strip(),
)
def test_an_event_that_is_no_completion_is_an_error_and_no_exception(broken: bytes) -> None:
    assert parse(encode([event([1]), broken, event([], last=True), usage_event(4, 1), DONE]).data, 1).error is not None


def test_what_the_transport_knows_to_be_wrong_comes_first() -> None:
    record = parse(encode(stream(2)).data[:-5], 2, error=CUT)
    assert (record.error, record.end_s) == (CUT, None)


def test_a_cut_stream_keeps_the_tokens_that_came() -> None:
    wire = encode(stream(4))
    record = parse(wire.data[: wire.ends[1] + 10], 4, error=CUT)
    assert (len(record.token_times_s), record.error, record.end_s) == (2, CUT, None)


def test_a_stream_cut_at_any_byte_is_an_error_and_no_exception() -> None:
    wire = encode(stream(3)).data
    for length in range(len(wire)):
        assert parse(wire[:length], 3, error=CUT).error == CUT


def test_a_stream_cut_before_its_last_token_is_an_error() -> None:
    wire = encode(stream(3))
    for length in range(wire.ends[2]):
        assert parse(wire.data[:length], 3).error is not None, length


def test_no_byte_at_all_is_an_error() -> None:
    record = parse_response([], sent_ns=SENT_NS, wanted=1)
    assert record == RequestRecord(1.0, error="the connection closed before any response")


# ------------------------------------------------------------------------------------------------ framings


def test_a_response_with_a_content_length_is_read_as_well() -> None:
    wire = fixed(b"".join(stream(2)))
    record = parse(wire, 2, at=[len(wire) - 30])
    assert (record.output_tokens, record.error) == (2, None)
    assert record.token_times_s == (1.001, 1.001)


def test_a_response_that_ends_with_the_connection_is_read_as_well() -> None:
    record = parse(b"HTTP/1.0 200 OK\r\n\r\n" + b"".join(stream(2)), 2)
    assert (record.output_tokens, record.error) == (2, None)


@pytest.mark.parametrize(
    "line",
    [b"Transfer-Encoding: chunked", b"TRANSFER-ENCODING: Chunked", b"transfer-encoding:chunked", b"transfer-encoding:  chunked "],
)
def test_chunks_are_known_by_their_header_in_every_spelling_that_http_allows(line: bytes) -> None:
    head = b"HTTP/1.1 200 OK\r\n" + line + b"\r\n\r\n"
    assert parse(encode(stream(2), head=head).data, 2).error is None


def test_a_chunk_extension_is_passed_over() -> None:
    body = stream(1)
    wire = HEAD + b"".join(b"%x;name=value\r\n%b\r\n" % (len(chunk), chunk) for chunk in body) + b"0\r\n\r\n"
    assert parse(wire, 1).error is None


def test_comments_and_other_fields_of_an_event_stream_are_passed_over() -> None:
    assert parse(encode([b": ping\n\n", *stream(2)]).data, 2).error is None


@pytest.mark.parametrize("size", [b"-6", b"-1", b"-10", b"zz", b"", b"+5", b"ffffffffffffffffffff"])
def test_a_wrong_chunk_size_ends_the_body(size: bytes) -> None:
    # A size that leads back to itself would never end.
    wire = HEAD + size + b"\r\n" + DONE + b"\r\n0\r\n\r\n"
    assert parse_response([(SENT_NS + 1, wire)], sent_ns=SENT_NS, wanted=1).error is not None


# ------------------------------------------------------------------------------------------------ arbitrary bytes


@pytest.mark.parametrize("head", [b"\r\n\r\n", b"\xff\xfe \xff\xfe\r\n\r\n", b"HTTP/1.1 2\xff0 OK\r\n\r\n", b"HTTP/1.1\r\n\r\n"])
def test_a_head_that_is_no_http_is_an_error_and_no_exception(head: bytes) -> None:
    assert parse(head + b"x").error is not None


@settings(PATIENT, max_examples=200)
@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=3))
def test_arbitrary_bytes_are_an_error_and_no_exception(data: bytes, at: list[int]) -> None:
    assert parse(data, at=[min(offset, len(data)) for offset in at]).error is not None


@settings(PATIENT, max_examples=200)
@given(st.binary(max_size=120), st.booleans())
def test_an_arbitrary_body_is_an_error_and_no_exception(data: bytes, chunked: bool) -> None:
    assert parse((HEAD if chunked else b"HTTP/1.1 200 OK\r\n\r\n") + data).error is not None


@settings(PATIENT, max_examples=300)
@given(st.data())
def test_a_stream_with_damaged_bytes_never_raises(data: st.DataObject) -> None:
    wire = bytearray(encode(stream(3)).data)
    for _ in range(data.draw(st.integers(1, 4))):
        wire[data.draw(st.integers(0, len(wire) - 1))] = data.draw(st.integers(0, 255))
    parse(bytes(wire), 3)


def test_events_that_end_with_carriage_returns_are_read_too() -> None:
    choice = b'{"text":"a","token_ids":[1],"finish_reason":"length"}'
    event = b'data: {"choices":[' + choice + b'],"usage":{"prompt_tokens":3,"completion_tokens":1}}'
    body = event + b"\r\n\r\ndata: [DONE]\r\n\r\n"
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    wire = head + f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
    record = parse_response([(7_000_000_000, wire)], sent_ns=1, wanted=1)
    assert (record.error, record.output_tokens, record.token_times_s) == (None, 1, (7.0,))


# ------------------------------------------------------------------------------------------------ counted, not decoded


@settings(PATIENT, max_examples=300)
@given(data=st.data(), chat=st.booleans(), has_ids=st.booleans())
def test_counting_events_comes_to_what_decoding_them_does(data: st.DataObject, chat: bool, has_ids: bool) -> None:
    texts = data.draw(st.lists(st.sampled_from(["a", " b", "", 'q"uote', "data: x", '"text":"', "\n\n"]), max_size=6))
    events = [b": ping\n\n"] if data.draw(st.booleans()) else []
    if chat:
        events.append(b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n')
    tokens = 0
    several = False
    for text in texts:
        ids = data.draw(st.lists(st.integers(0, 9), max_size=2)) if has_ids else None
        said = {"delta": {"content": text}} if chat else {"text": text}
        ending = data.draw(st.sampled_from([None, "length", "stop", "error", "abort", ""]))
        events.append(_data([{"index": 0, **said, "token_ids": ids, "finish_reason": ending}], None))
        tokens, several = tokens + len(ids or ()), several or len(ids or ()) > 1
    extra = st.sampled_from([b'data: {"error":{"message":"late"}}\n\n', b"event: x\n" + EVENT_LINE, b'data: {"choices":[]}\n\n'])
    events += data.draw(st.lists(extra, max_size=1))
    # A server that sends two tokens in an event and reports one for each event is believed: `_counted` says so.
    count = tokens if several else data.draw(st.integers(0, 8))
    wire = encode([*events, usage_event(4, count), DONE], cuts=data.draw(st.none() | st.just([30])))
    reads = split(wire.data, data.draw(st.lists(st.sampled_from([0, *wire.ends, len(wire.data)]), max_size=6)))
    exact = parse_slowly(reads, count)
    assert parse_response(reads, sent_ns=SENT_NS, wanted=count) == exact


EVENT_LINE = b'data: {"choices":[{"text":"z","token_ids":[3]}]}\n\n'


def parse_slowly(reads: list[tuple[int, bytes]], wanted: int) -> RequestRecord:
    with mock.patch.object(response, "counted", return_value=None):
        return parse_response(reads, sent_ns=SENT_NS, wanted=wanted)


def test_what_vllm_sends_is_counted() -> None:
    wire = encode(stream(5))
    reads = split(wire.data, [len(HEAD), *(end + 2 for end in wire.ends)])
    assert counted(reads, wire.data) is not None
    assert parse_response(reads, sent_ns=SENT_NS, wanted=5) == parse_slowly(reads, 5)
