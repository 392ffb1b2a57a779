"""Servers that do to a client what no server should: they drip, flood, close, redirect and lie, each on a thread of the test.

Over plain sockets, because an HTTP library would refuse to send most of this.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

HEAD = b"HTTP/1.1 200 OK\r\n"
STREAM = HEAD + b"content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


@dataclass(frozen=True)
class Asked:
    """One request as the server got it, and the socket to answer on."""

    connection: socket.socket
    path: str
    headers: Mapping[str, str]
    """Names in lower case."""
    body: dict[str, Any]
    number: int
    """How many POSTs came before it, on all connections."""


if TYPE_CHECKING:
    Answer = Callable[[Asked], bool]
    """Writes an answer, and returns whether the connection stays open."""


@dataclass
class Hostile:
    """A running server, and what it has seen."""

    url: str
    heads: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    posts: int = 0
    ended: threading.Event = field(default_factory=threading.Event)


@contextlib.contextmanager
def hostile_server(answers: Mapping[str, Answer]) -> Iterator[Hostile]:
    """Serve with these answers by path, and with sound ones elsewhere, until the block ends."""
    threads: list[threading.Thread] = []
    sockets: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        seen = Hostile(f"http://127.0.0.1:{listener.getsockname()[1]}")

        def talk(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while asked := _take(connection, seen):
                    answer = answers.get(asked.path, SOUND.get(asked.path, not_found))
                    if not answer(asked):
                        return

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    sockets.append(listener.accept()[0])
                    threads.append(threading.Thread(target=talk, args=(sockets[-1],), daemon=True))
                    threads[-1].start()

        accepting = threading.Thread(target=accept, daemon=True)
        accepting.start()
        try:
            yield seen
        finally:
            seen.ended.set()
            for each in (listener, *sockets):
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
    for thread in (accepting, *threads):
        thread.join(10)


def _take(connection: socket.socket, seen: Hostile) -> Asked | None:
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(1 << 16)
        if not piece:
            return None
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    while len(body) < int(headers.get("content-length", 0)):
        body += connection.recv(1 << 16)
    method, path, _ = first.split(" ")
    seen.heads.append(headers)
    seen.paths.append(path)
    number, seen.posts = seen.posts, seen.posts + (method == "POST")
    return Asked(connection, path.partition("?")[0], headers, json.loads(body) if body else {}, number)


# ------------------------------------------------------------------------------------------------ sound answers


def document(value: object, *, text: str | None = None) -> Answer:
    """Return an answer with a body of JSON, or of text."""

    def answer(asked: Asked) -> bool:
        body = json.dumps(value).encode() if text is None else text.encode()
        asked.connection.sendall(HEAD + b"content-length: %d\r\n\r\n%b" % (len(body), body))
        return True

    return answer


def not_found(asked: Asked) -> bool:
    asked.connection.sendall(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")
    return True


def event(text: str | None = None, *, ending: str | None = None, usage: Any = None, **choice: Any) -> bytes:
    """Return an event of a completion, of text where there is one, else with no choice."""
    value: dict[str, Any] = {"choices": [] if text is None else [{"index": 0, "text": text, "finish_reason": ending, **choice}]}
    return b"data: " + json.dumps(value if usage is None else {**value, "usage": usage}).encode() + b"\n\n"


def usage_of(count: int, prompt: int = 3) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": count, "total_tokens": prompt + count}


DONE = b"data: [DONE]\n\n"


def tokens(count: int) -> list[bytes]:
    """Return the events of a sound answer without token ids."""
    events = [event(f" w{number}", ending="length" if number == count - 1 else None) for number in range(count)]
    return [*events, event(usage=usage_of(count)), DONE]


def chunks(events: Iterable[bytes]) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(each), each) for each in events)


def streaming(make: Callable[[int], list[bytes]] = tokens) -> Answer:
    """Return an answer to completions: a stream of the events that `make` has for so many tokens, or a document."""

    def answer(asked: Asked) -> bool:
        count = asked.body["max_tokens"]
        if not asked.body.get("stream"):
            said = {"index": 0, "text": " word" * count, "finish_reason": "length"}
            return document({"choices": [said], "usage": usage_of(count)})(asked)
        asked.connection.sendall(STREAM + chunks(make(count)) + b"0\r\n\r\n")
        return True

    return answer


SOUND: dict[str, Answer] = {
    "/v1/models": document({"object": "list", "data": [{"id": "m", "object": "model"}]}),
    "/v1/completions": streaming(),
    "/health": document({}),
    "/version": document({"version": "1"}),
}


# ------------------------------------------------------------------------------------------------ hostile ones


def after(number: int, answer: Answer, before: Answer | None = None) -> Answer:
    """Return an answer that is sound for the first POSTs: those that a run begins with are no load."""
    return lambda asked: (before or SOUND[asked.path])(asked) if asked.number < number else answer(asked)


def loaded(answer: Answer) -> Answer:
    """Return an answer for the load, which streams; what is asked beside it is answered as it should be."""
    return lambda asked: answer(asked) if asked.body.get("stream") else SOUND[asked.path](asked)


def dripping(start: bytes, drip: bytes = b"x", *, every_s: float = 0.05, most_s: float = 120.0) -> Answer:
    """Return an answer that begins at once, and goes on with a few bytes now and then until the client leaves."""

    def answer(asked: Asked) -> bool:
        end_s = time.monotonic() + most_s
        asked.connection.sendall(start)
        while time.monotonic() < end_s:
            asked.connection.sendall(drip)
            time.sleep(every_s)
        return False

    return answer


def flooding(start: bytes, piece: bytes, *, most_bytes: int = 1 << 30, end: bytes = b"") -> Answer:
    """Return an answer that goes on as fast as it can until the client leaves, or so much was sent."""

    def answer(asked: Asked) -> bool:
        asked.connection.sendall(start)
        block = piece * max(1, (1 << 18) // len(piece))
        sent = 0
        while sent < most_bytes:
            asked.connection.sendall(block)
            sent += len(block)
        asked.connection.sendall(end)
        return False

    return answer


def silent(asked: Asked) -> bool:
    """Answer nothing until the client leaves."""
    return bool(asked.connection.recv(1))


def closing(_: Asked) -> bool:
    """Close without a byte."""
    return False
