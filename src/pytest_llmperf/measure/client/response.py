"""From the stamped bytes of a response to a `RequestRecord`, whatever the server answered.

Parsing is done when a response is complete, never while it arrives. Where every read ended with an event, which is how most
come, and the events are as many as the tokens that the server says it has sent, they are counted and not decoded (0.3 us a
token, against 1.5); all other responses are read byte by byte exactly.
"""

from __future__ import annotations

import bisect
import itertools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


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


class _Message(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: Any = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Message | None = None
    token_ids: list[int] | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_EVENT_END = re.compile(rb"\r?\n\r?\n")
_DECODER = msgspec.json.Decoder(_Event)


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
    status = head.split(b" ", 2)[1:2]
    start, chunked = len(head) + 4, is_chunked(head)
    if status != [b"200"]:
        body = b"".join(piece for _, piece in _payload(wire, start, chunked=chunked))
        text = body[:300].decode(errors="replace").strip()
        return RequestRecord(sent_s, end_s=end_s, error=error or f"HTTP {b''.join(status).decode(errors='replace')}: {text}")
    try:
        if stream:
            quick = counted(reads, wire) if error is None else None
            times, prompt_tokens, output_tokens, failure = quick or _tokens(_events(wire, start, chunked=chunked), reads)
        else:
            body = b"".join(piece for _, piece in _payload(wire, start, chunked=chunked))
            events = [(0, _DECODER.decode(body))] if error is None else []
            times, prompt_tokens, output_tokens, failure = [], *_tokens(events, reads)[1:]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as broken:
        return RequestRecord(sent_s, error=error or f"an event is not the JSON of a completion: {broken}")
    error = error or failure or _count_error(output_tokens, wanted, exact=exact)
    return RequestRecord(sent_s, tuple(times), end_s, prompt_tokens, output_tokens, error)


def _count_error(output_tokens: int | None, wanted: int, *, exact: bool) -> str | None:
    if output_tokens is None:
        return "the server reports neither usage nor token ids, so its tokens cannot be counted"
    if output_tokens == wanted or (not exact and 0 < output_tokens < wanted):
        return None
    return f"{output_tokens} of {wanted} tokens"


_Counts = tuple[list[float], "int | None", "int | None", "str | None"]
"""Token arrival times, the server's count of prompt and output tokens, and an error."""


def counted(reads: Sequence[tuple[int, bytes]], wire: bytes) -> _Counts | None:
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
        event = _DECODER.decode(wire[last + 6 : wire.find(b"\n", last)])
    except msgspec.MsgspecError:
        return None  # cut into several chunks, perhaps
    usage = event.usage
    if usage is None or not usage.completion_tokens or event.choices:
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
    return times, usage.prompt_tokens, usage.completion_tokens, None


_END = b"data: [DONE]\n\n\r\n0\r\n\r\n"
_MARKS = (
    (b'"token_ids":[', b'"token_ids":[]'),
    (b'"content":"', b'"content":""'),
    (b'"text":"', b'"text":""'),
)
"""What each event with one token has once, and how that looks in an event without: token ids, a chat, a completion."""


def _events(wire: bytes, start: int, *, chunked: bool) -> list[tuple[int, _Event]]:
    """Return the events of a body, each with the place on the wire behind its last byte; ends at one that is an error."""
    pieces = list(_payload(wire, start, chunked=chunked))
    body = b"".join(piece for _, piece in pieces)
    piece_starts = list(itertools.accumulate((len(piece) for _, piece in pieces), initial=0))
    events, begin = [], 0
    for match in _EVENT_END.finditer(body):
        lines, begin = body[begin : match.start()].splitlines(), match.end()
        event = b"\n".join(line[5:].strip() for line in lines if line.startswith(b"data:"))
        if event == b"[DONE]" or not any(line.startswith(b"data:") for line in lines):
            continue
        piece = bisect.bisect_right(piece_starts, begin - 1) - 1
        end = pieces[piece][0] + begin - piece_starts[piece]
        events.append((end, _DECODER.decode(event)))
        if events[-1][1].error is not None:
            break
    return events


def _tokens(events: Sequence[tuple[int, _Event]], reads: Sequence[tuple[int, bytes]]) -> _Counts:
    """Return what decoded events come to."""
    read_ends = list(itertools.accumulate(len(piece) for _, piece in reads))
    seconds = [stamp / 1e9 for stamp, _ in reads]
    times: list[float] = []
    prompt_tokens = reported = None
    has_ids = False
    count = read = 0
    for end, event in events:
        while read_ends[read] < end:
            read += 1
        if event.error is not None:
            return times, prompt_tokens, None, f"error in the stream: {event.error}"
        for choice in event.choices:
            if choice.token_ids is not None:
                has_ids = True
                new = len(choice.token_ids)
            else:
                delta = choice.delta
                new = 1 if choice.text or (delta is not None and _says(delta)) else 0
            count += new
            times += [seconds[read]] * new
        if event.usage is not None:
            prompt_tokens, reported = event.usage.prompt_tokens, event.usage.completion_tokens
    if has_ids and reported is not None and reported != count:
        return times, prompt_tokens, reported, f"usage says {reported} tokens, the stream held {count}"
    return times, prompt_tokens, reported if reported is not None else count if has_ids else None, None


def _says(delta: _Message) -> bool:
    return bool(delta.content or delta.reasoning or delta.reasoning_content or delta.tool_calls)


def is_chunked(head: bytes) -> bool:
    """Return whether a response's head says that its body comes in chunks."""
    return re.search(rb"^transfer-encoding:[ \t]*chunked[ \t]*\r?$", head, re.I | re.M) is not None


def skip_chunks(body: bytes) -> tuple[bytes, bool]:
    """Return what is left of a body behind its whole chunks, and whether the last one was among them, with its trailer."""
    start = 0
    while (line_end := body.find(b"\r\n", start)) >= 0:
        size = _size(body[start:line_end])
        if size is None:
            return b"", True  # what follows cannot be read; the parser says so
        if size == 0:
            ended = body.startswith(b"\r\n", line_end + 2) or body.find(b"\r\n\r\n", line_end + 2) >= 0
            return body[start:], ended
        if len(body) < line_end + 2 + size + 2:
            break
        start = line_end + 2 + size + 2
    return body[start:], False


def _size(line: bytes) -> int | None:
    try:
        size = int(line.split(b";")[0], 16)
    except ValueError:
        return None
    return size if size >= 0 else None


def _payload(wire: bytes, start: int, *, chunked: bool) -> Iterator[tuple[int, bytes]]:
    """Yield (offset on the wire, bytes) of the response's body, with the chunk framing taken off."""
    if not chunked:
        yield start, wire[start:]
        return
    while (line_end := wire.find(b"\r\n", start)) >= 0:
        size = _size(wire[start:line_end])
        start = line_end + 2
        if not size:
            return
        yield start, wire[start : start + size]
        start += size + 2
