"""Streamed requests, timed: every request becomes a `RequestRecord`, whatever the server answered.

A process of its own (`load.py`) sends and stamps; it reads bytes with their arrival stamps and looks into them only when
the round is over, so that no parsing delays a stamp. This module is the parent's end of it, and the parser.
"""

from __future__ import annotations

import bisect
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Self

    from pytest_llmperf.measure.workload import Prompt


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

    @property
    def first_token_s(self) -> float | None:
        """Return the arrival of the first token, None without one."""
        return self.token_times_s[0] if self.token_times_s else None


@dataclass(frozen=True)
class RoundPlan:
    """What the load process is told to do: complete HTTP requests, kept at `concurrency` in flight."""

    host: str
    port: int
    tls: bool
    requests: tuple[bytes, ...]
    output_tokens: tuple[int, ...]
    concurrency: int
    request_timeout_s: float
    stall_timeout_s: float


@dataclass(frozen=True)
class RoundLog:
    """What the load process saw in one round."""

    records: tuple[RequestRecord, ...]
    stalled: bool = False
    """No byte came on any connection for the stall time-out."""
    kernel_stamps: int = 0
    """Reads whose arrival the kernel stamped."""
    clock_stamps: int = 0
    """Reads stamped by the process's own clock: TLS, or a kernel that gave no stamp."""
    cpu_s: float = 0.0
    """CPU time of the load process during the round."""


class ClientError(RuntimeError):
    """The load process itself failed; nothing was measured."""


class LoadClient:
    """A load process. Start it before the engine is ready: a round then begins at once."""

    def __init__(self) -> None:
        """Start the process."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pytest_llmperf.measure.load"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C reaches pytest, which ends the round; the process ends with its stdin
            env=_environment(),
        )

    def __enter__(self) -> Self:
        """Return the client."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self.close()

    def close(self) -> None:
        """End the process, also in the middle of a round."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()

    def play(self, plan: RoundPlan) -> RoundLog:
        """Send the requests of one round and return what happened, or raise ClientError."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        body = msgspec.msgpack.encode(plan)
        try:
            self._process.stdin.write(len(body).to_bytes(8, "big") + body)
            self._process.stdin.flush()
            answer = self._process.stdout.read(int.from_bytes(self._process.stdout.read(8), "big"))
        except OSError as error:
            raise ClientError(f"the load process ended with exit code {self._process.wait()} ({error})") from error
        if not answer:
            raise ClientError(f"the load process ended with exit code {self._process.wait()}")
        log = msgspec.msgpack.decode(answer, type=RoundLog)
        if len(log.records) != len(plan.requests):
            raise ClientError(f"the load process answered for {len(log.records)} requests, not {len(plan.requests)}")
        return log


def _environment() -> dict[str, str]:
    import os

    source = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))}


@dataclass(frozen=True)
class Endpoint:
    """Where requests go, and what must be written on them."""

    url: str
    """The server's root, without `/v1`."""
    model: str
    """The name under which the server serves the model."""
    api_key: str | None = None

    def plan(self, prompts: Sequence[Prompt], *, concurrency: int, request_timeout_s: float, stall_timeout_s: float) -> RoundPlan:
        """Return the round as complete HTTP requests, built before any clock starts."""
        parts = urlsplit(self.url)
        host = parts.hostname or ""
        tls = parts.scheme == "https"
        port = parts.port or (443 if tls else 80)
        key = f"Authorization: Bearer {self.api_key}\r\n" if self.api_key else ""
        shown = f"[{host}]" if ":" in host else host
        head = (
            f"POST {parts.path}/v1/completions HTTP/1.1\r\nHost: {shown}:{port}\r\nContent-Type: application/json\r\n"
            f"Accept: text/event-stream\r\n{key}Content-Length: "
        )
        bodies = [_body(self.model, prompt) for prompt in prompts]
        return RoundPlan(
            host=host,
            port=port,
            tls=tls,
            requests=tuple(f"{head}{len(body)}\r\n\r\n".encode() + body for body in bodies),
            output_tokens=tuple(prompt.output_tokens for prompt in prompts),
            concurrency=concurrency,
            request_timeout_s=request_timeout_s,
            stall_timeout_s=stall_timeout_s,
        )


def _body(model: str, prompt: Prompt) -> bytes:
    return json.dumps(
        {
            "model": model,
            "prompt": prompt.token_ids,
            "max_tokens": prompt.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        },
        separators=(",", ":"),
    ).encode()


class _Choice(msgspec.Struct):
    text: str | None = None
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


def parse_response(reads: Sequence[tuple[int, bytes]], *, sent_ns: int, wanted: int, error: str | None = None) -> RequestRecord:
    """Return the record of one response.

    `reads` are (monotonic nanoseconds, bytes) in order of arrival, `wanted` the number of tokens that were asked for, and
    `error` what the transport already knows to be wrong. Odd answers become a record with an error, never an exception.
    """
    seconds = [stamp / 1e9 for stamp, _ in reads]
    sent_s, end_s = sent_ns / 1e9, seconds[-1] if seconds and error is None else None
    wire = b"".join(piece for _, piece in reads)
    head, separator, _ = wire.partition(b"\r\n\r\n")
    if not separator:
        return RequestRecord(sent_s, error=error or "the connection closed before any response")
    status = head.split(b" ", 2)[1:2]
    pieces = list(_payload(wire, len(head) + 4, chunked=is_chunked(head)))
    body = b"".join(piece for _, piece in pieces)
    if status != [b"200"]:
        text = body[:300].decode(errors="replace").strip()
        return RequestRecord(sent_s, end_s=end_s, error=error or f"HTTP {b''.join(status).decode(errors='replace')}: {text}")
    events = _Events(pieces, reads, seconds)
    try:
        times, prompt_tokens, output_tokens, failure = _read_events(events, body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as broken:
        return RequestRecord(sent_s, error=error or f"an event is not the JSON of a completion: {broken}")
    error = error or failure or _count_error(output_tokens, wanted)
    return RequestRecord(sent_s, tuple(times), end_s, prompt_tokens, output_tokens, error)


def _count_error(output_tokens: int | None, wanted: int) -> str | None:
    if output_tokens is None:
        return "the server reports neither usage nor token ids, so its tokens cannot be counted"
    return None if output_tokens == wanted else f"{output_tokens} of {wanted} tokens"


def _read_events(events: _Events, body: bytes) -> tuple[list[float], int | None, int | None, str | None]:
    """Return token arrival times, the server's count of prompt and output tokens, and an error."""
    times: list[float] = []
    prompt_tokens = reported = None
    has_ids = False
    start = 0
    for end in _EVENT_END.finditer(body):
        event, start = body[start : end.start()].strip(), end.end()
        if not event.startswith(b"data:") or event == b"data: [DONE]":
            continue
        data = _DECODER.decode(event[5:])
        if data.error is not None:
            return times, prompt_tokens, None, f"error in the stream: {data.error}"
        for choice in data.choices:
            has_ids = has_ids or choice.token_ids is not None
            new = len(choice.token_ids) if choice.token_ids is not None else int(bool(choice.text))
            times += [events.arrival_s(start)] * new
        if data.usage is not None:
            prompt_tokens, reported = data.usage.prompt_tokens, data.usage.completion_tokens
    if has_ids and reported is not None and reported != len(times):
        return times, prompt_tokens, reported, f"usage says {reported} tokens, the stream held {len(times)}"
    return times, prompt_tokens, reported if reported is not None else len(times) if has_ids else None, None


def is_chunked(head: bytes) -> bool:
    """Return whether a response's head says that its body comes in chunks."""
    return re.search(rb"^transfer-encoding:[ \t]*chunked[ \t]*\r?$", head, re.I | re.M) is not None


def _payload(wire: bytes, start: int, *, chunked: bool) -> Iterator[tuple[int, bytes]]:
    """Yield (offset on the wire, bytes) of the response's body, with the chunk framing taken off."""
    if not chunked:
        yield start, wire[start:]
        return
    while (line_end := wire.find(b"\r\n", start)) >= 0:
        try:
            size = int(wire[start:line_end].split(b";")[0], 16)
        except ValueError:
            return
        start = line_end + 2
        if size <= 0:
            return
        yield start, wire[start : start + size]
        start += size + 2


class _Events:
    """Where in the body, hence when, each event was complete."""

    def __init__(self, pieces: list[tuple[int, bytes]], reads: Sequence[tuple[int, bytes]], seconds: list[float]) -> None:
        self._seconds = seconds
        self._piece_starts: list[int] = []
        self._wire_offsets = [offset for offset, _ in pieces]
        total = 0
        for _, piece in pieces:
            self._piece_starts.append(total)
            total += len(piece)
        self._read_ends: list[int] = []
        total = 0
        for _, read in reads:
            total += len(read)
            self._read_ends.append(total)

    def arrival_s(self, body_end: int) -> float:
        """Return when the byte before `body_end` arrived."""
        piece = bisect.bisect_right(self._piece_starts, body_end - 1) - 1
        wire = self._wire_offsets[piece] + body_end - 1 - self._piece_starts[piece]
        return self._seconds[bisect.bisect_right(self._read_ends, wire)]
