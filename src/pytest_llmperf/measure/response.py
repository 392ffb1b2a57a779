"""From the bytes of a response, with their arrival stamps, to a `RequestRecord`, whatever the server answered.

Reading is done when a response is complete, never while it arrives. Most responses have vLLM's own framing, one event to an
HTTP chunk: these are cut by `bytes.split` and decoded at once (0.5 us a token); all others byte by byte exactly.
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
_MANY = msgspec.json.Decoder(list[_Event])
_DONE = b"data: [DONE]\n\n"


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
        if not stream:
            body = b"".join(piece for _, piece in _payload(wire, start, chunked=chunked))
            answer = _Answer(events=[(0, _DECODER.decode(body))] if error is None else [])
        else:
            answer = (chunked and _uniform(wire, start)) or _general(wire, start, chunked=chunked)
        times, prompt_tokens, output_tokens, failure = _tokens(answer, reads, timed=stream)
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


@dataclass(frozen=True)
class _Answer:
    """The events of a response, each with the place on the wire behind its last byte."""

    events: list[tuple[int, _Event]]


def _uniform(wire: bytes, start: int) -> _Answer | None:
    """Return the events of a body with one event in every chunk, as vLLM sends it; None for any other framing."""
    parts = wire[start:].split(b"\r\n")
    datas = parts[1::2]
    # size, event, size, event, ..., 0, nothing, nothing
    if len(parts) < 5 or len(parts) % 2 == 0 or datas[-1] or parts[-3] != b"0" or datas[-2] != _DONE:
        return None
    datas = datas[:-2]
    sizes = parts[0 : 2 * len(datas) : 2]
    lengths = list(map(len, datas))
    try:
        if list(map(int, sizes, itertools.repeat(16))) != lengths:
            return None
    except ValueError:
        return None
    if b"".join(datas).count(b"\n") != 2 * len(datas):
        return None
    if not all(data[:6] == b"data: " and data[-2:] == b"\n\n" for data in datas):
        return None
    events = _MANY.decode(b"[" + b",".join([data[6:-2] for data in datas]) + b"]")
    if len(events) != len(datas):
        return None
    size_ends = map(len, sizes)
    steps = (size + length + 4 for size, length in zip(size_ends, lengths, strict=True))
    ends = [start - 2 + end for end in itertools.accumulate(steps)]
    return _Answer(list(zip(ends, events, strict=True)))


def _general(wire: bytes, start: int, *, chunked: bool) -> _Answer:
    """Return the events of a body in whatever framing."""
    pieces = list(_payload(wire, start, chunked=chunked))
    body = b"".join(piece for _, piece in pieces)
    piece_starts = list(itertools.accumulate((len(piece) for _, piece in pieces), initial=0))
    events, begin = [], 0
    for found in _EVENT_END.finditer(body):
        event, begin = body[begin : found.start()].strip(), found.end()
        if not event.startswith(b"data:") or event == b"data: [DONE]":
            continue
        piece = bisect.bisect_right(piece_starts, begin - 1) - 1
        end = pieces[piece][0] + begin - piece_starts[piece]
        events.append((end, _DECODER.decode(event[5:])))
        if events[-1][1].error is not None:
            break
    return _Answer(events)


def _tokens(
    answer: _Answer, reads: Sequence[tuple[int, bytes]], *, timed: bool
) -> tuple[list[float], int | None, int | None, str | None]:
    """Return token arrival times, the server's count of prompt and output tokens, and an error."""
    read_ends = list(itertools.accumulate(len(piece) for _, piece in reads))
    seconds = [stamp / 1e9 for stamp, _ in reads]
    times: list[float] = []
    prompt_tokens = reported = None
    has_ids = False
    count = read = 0
    for end, event in answer.events:
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
                new = 1 if choice.text or (delta is not None and (delta.content or delta.reasoning)) else 0
            count += new
            if timed:
                times += [seconds[read]] * new
        if event.usage is not None:
            prompt_tokens, reported = event.usage.prompt_tokens, event.usage.completion_tokens
    if has_ids and reported is not None and reported != count:
        return times, prompt_tokens, reported, f"usage says {reported} tokens, the stream held {count}"
    return times, prompt_tokens, reported if reported is not None else count if has_ids else None, None


def is_chunked(head: bytes) -> bool:
    """Return whether a response's head says that its body comes in chunks."""
    return re.search(rb"^transfer-encoding:[ \t]*chunked[ \t]*\r?$", head, re.I | re.M) is not None


def ends_chunks(wire: bytes, start: int) -> bool:
    """Return whether a body in chunks is complete, its trailer included."""
    while (line_end := wire.find(b"\r\n", start)) >= 0:
        size = _size(wire[start:line_end])
        if size is None:
            return True  # what follows cannot be read; the parser says so
        if size == 0:
            return wire.startswith(b"\r\n", line_end + 2) or wire.find(b"\r\n\r\n", line_end + 2) >= 0
        start = line_end + 2 + size + 2
    return False


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
