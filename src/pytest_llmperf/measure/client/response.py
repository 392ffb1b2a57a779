"""From the stamped bytes of a response to a `RequestRecord`, whatever the server answered.

Parsing is done when a response is complete, never while it arrives. Where every read ended with an event, which is how most
come, and the events are as many as the tokens that the server says it has sent, they are counted and not decoded (0.3 us a
token, against 1.5); all other responses are read byte by byte exactly.
"""

from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from pytest_llmperf.measure.client.events import DECODER, Counter, Stream, decoded, doubt_of, failure_of_text, whole
from pytest_llmperf.measure.client.framing import headers_of, is_chunked, payload
from pytest_llmperf.measure.client.reasons import ending_error, ending_name, http_error, reason_of_body
from pytest_llmperf.measure.client.sse import blocks

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class RequestRecord:
    """What happened to one request. Times are seconds on the monotonic clock (`time.perf_counter` on Linux)."""

    sent_s: float | None
    """When the request's first byte was handed to the kernel; None if it was never sent."""
    token_times_s: tuple[float, ...] = ()
    """Arrival of each output token. Tokens that came in one read share a time: none is invented."""
    end_s: float | None = None
    """When the response was complete; None if it never was."""
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    """As the server counts them (`usage`, token ids), never from text."""
    error: str | None = None
    due_s: float | None = None
    """When it was to be sent in an open loop; None in a closed one. Latencies count from here: a client or a connection that
    is late must not make the engine look faster (coordinated omission)."""
    finish_reason: str | None = None
    """Why the answer ended, in the server's word; None where it told none."""
    delay_s: float | None = None
    """How long after that instant, or in a closed loop after the response that it waited for, it was sent."""

    @property
    def first_token_s(self) -> float | None:
        """Return the arrival of the first token, None without one."""
        return self.token_times_s[0] if self.token_times_s else None

    @property
    def asked_s(self) -> float | None:
        """Return the instant that latencies count from: when it was due, else when it was sent."""
        return self.sent_s if self.due_s is None or self.sent_s is None else self.due_s


def parse_response(
    reads: Sequence[tuple[int, bytes]],
    *,
    sent_ns: int,
    wanted: int,
    error: str | None = None,
    exact: bool = True,
    stream: bool = True,
) -> RequestRecord:
    """Return the record of one response.

    `reads` are (monotonic nanoseconds, bytes) in order of arrival, `wanted` the number of tokens that were asked for (with
    `exact`, else the most that are allowed), and `error` what the transport already knows to be wrong. Odd answers become a
    record with an error, never an exception.
    """
    sent_s, end_s = sent_ns / 1e9, reads[-1][0] / 1e9 if reads and error is None else None
    wire = b"".join([piece for _, piece in reads])
    head, separator, _ = wire.partition(b"\r\n\r\n")
    if not separator:
        return RequestRecord(sent_s, error=error or "the connection closed before any response")
    start, chunked = len(head) + 4, is_chunked(head)
    status = (head.split(b" ", 2)[1:2] or [b""])[0].decode(errors="replace")
    if status not in _SUCCESS:
        body = b"".join(piece for _, piece in payload(wire, start, chunked=chunked))
        return RequestRecord(sent_s, end_s=end_s, error=error or http_error(status, headers_of(head), body))
    read = counted(reads, wire) if stream and error is None else None
    if read is None:
        try:
            pieces = list(payload(wire, start, chunked=chunked))
            read = _streamed(reads, pieces, most=wanted if error else None) if stream else _document(reads, pieces)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as broken:
            return RequestRecord(sent_s, error=error or f"an event is not the JSON of a completion: {broken}")
    # What the server says of itself comes first: a connection that then breaks is only a consequence.
    error = read.failure or error or _incomplete(read, wanted, exact=exact, stream=stream)
    # An answer that has failed may hold a hundred thousand of what looks like tokens, and a round thousands of answers.
    times_s = tuple(read.times_s if error is None else read.times_s[:wanted])
    counts, ending = (read.prompt_tokens, read.output_tokens), ending_name(read.ending)
    return RequestRecord(sent_s, times_s, end_s, *counts, error, finish_reason=ending)


def _incomplete(read: Stream, wanted: int, *, exact: bool, stream: bool) -> str | None:
    """Return why an answer is not whole, None for one that is."""
    tokens = read.output_tokens
    if stream or read.ending:
        wrong = ending_error(read.ending, tokens, wanted, exact=exact)
        if wrong:
            return wrong
    if tokens is None:
        return "the server reports neither usage nor token ids, so its tokens cannot be counted"
    if read.seen and (doubt := doubt_of(tokens, read.seen, stream=stream, exact=exact)):
        return doubt
    if tokens != wanted and (exact or not 0 < tokens < wanted):
        return f"{tokens} of {wanted} tokens"
    return None if read.done else "the stream ended without [DONE] and without usage"


def counted(reads: Sequence[tuple[int, bytes]], wire: bytes) -> Stream | None:
    """Return what the events of a sound stream come to without decoding them; None where that could be wrong.

    A mark that stands once in every event with a token (inside a JSON string its quotes would be escaped) must be found as
    often as the server says that it has sent tokens, and no event must be without one: then each has exactly one. The rest of
    such an event is not looked at, so a server that sent two tokens in an event and reported one would be believed; its own
    counters, which the audit compares, would have to be wrong in the same way.
    """
    if not wire.endswith(_END) or b'"error"' in wire:
        return None
    last = wire.rfind(b"data: {")
    try:
        event = DECODER.decode(wire[last + 6 : wire.find(b"\n", last)])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None  # cut into several chunks, perhaps
    usage = event.usage
    ending = _quick_ending(wire)
    if usage is None or not usage.completion_tokens or event.choices or not ending:
        return None
    mark, empty = next((pair for pair in _MARKS if pair[0] in wire), (b"", b""))
    # The first event of a chat has a role and no content, which is no token. Reasoning is one without a mark: it is decoded.
    roles = wire.count(b'"role":') if b'"delta":' in wire else 0
    silent = roles if mark == _MARKS[1][0] else 0
    # Besides the events with a token: the roles, the one with the usage, and [DONE]. Each begins its chunk, or follows another.
    events = wire.count(b"\r\ndata:") + wire.count(b"\n\ndata:")
    if not mark or not events == wire.count(b"\ndata:") == usage.completion_tokens + roles + 2 or wire.count(empty) != silent:
        return None
    pieces = [piece for _, piece in reads]
    counts = list(map(bytes.count, pieces, itertools.repeat(mark)))
    aligned = all(map(bytes.endswith, pieces, itertools.repeat((b"\n\n\r\n", b"\r\n\r\n"))))
    if not aligned or sum(counts) - silent != usage.completion_tokens:
        return None
    if silent:
        counts = [count - piece.count(empty) for count, piece in zip(counts, pieces, strict=True)]
    times = [stamp / 1e9 for (stamp, _), count in zip(reads, counts, strict=True) for _ in range(count)]
    return Stream(times, whole(usage.prompt_tokens), whole(usage.completion_tokens), ending, done=True)


def _quick_ending(wire: bytes) -> str | None:
    """Return the last `finish_reason` of a stream that is not decoded; inside a JSON string its quotes would be escaped."""
    at = wire.rfind(_REASON)
    return wire[at + len(_REASON) : wire.find(b'"', at + len(_REASON))].decode(errors="replace") if at >= 0 else None


_SUCCESS = ("200", "201", "202", "203", "206")
_REASON = b'"finish_reason":"'
_END = b"data: [DONE]\n\n\r\n0\r\n\r\n"
_MARKS = (
    (b'"token_ids":[', b'"token_ids":[]'),
    (b'"content":"', b'"content":""'),
    (b'"text":"', b'"text":""'),
)
"""What each event with one token has once, and how that looks in an event without: token ids, a chat, a completion."""


def _streamed(reads: Sequence[tuple[int, bytes]], pieces: Sequence[tuple[int, bytes]], *, most: int | None) -> Stream:
    """Return what a body's events come to, each of them decoded; raises MsgspecError for one that is no completion.

    `pieces` are those of the body, each with its place on the wire. `most` is how many tokens matter of a body that was cut,
    None for one that is complete: what a flood holds beyond them is not decoded.
    """
    body = b"".join(piece for _, piece in pieces)
    starts = list(itertools.accumulate((len(piece) for _, piece in pieces), initial=0))
    counter, stray = Counter(reads), list[bytes]()
    for block in blocks(body, flush=most is None):
        stray += [block.stray] if block.stray else []
        if block.data and block.data.strip() == b"[DONE]":
            counter.stream.done = True
        elif block.data and block.kind == b"error":
            counter.stream.failure = f"error in the stream: {reason_of_body(block.data)}"
        elif block.data:
            piece = bisect.bisect_right(starts, block.end - 1) - 1
            counter.take(decoded(block.data), pieces[piece][0] + block.end - starts[piece])
        if counter.stream.failure or (most is not None and len(counter.stream.times_s) > most):
            break
    if stray and not counter.stream.failure and not counter.stream.ending:
        counter.stream.failure = failure_of_text(b"\n".join(stray))
    return counter.result()


def _document(reads: Sequence[tuple[int, bytes]], pieces: Sequence[tuple[int, bytes]]) -> Stream:
    """Return what an answer comes to that is no stream: it has no times, and its JSON proves that it is whole."""
    counter = Counter(reads)
    counter.take(decoded(b"".join(piece for _, piece in pieces)), 0)
    counter.stream.times_s.clear()
    counter.stream.done = True
    return counter.result()
