"""One HTTP exchange that ends: a time for all of it together, and a limit for each part of what is read.

The time-outs of `urllib` and `http.client` are those of a single read, so that a byte a second holds them for ever, and they
read a body of whatever length. Here every read has what is left of the total, and no more bytes are taken than a limit allows.
Engines are reached directly, without the environment's proxies, and no redirect is followed: a POST would become a GET, and a
key would be sent to whoever is named. Nothing is decompressed, because nothing is asked for compressed.
"""

from __future__ import annotations

import http.client
import io
import socket
import ssl
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit

if TYPE_CHECKING:
    from collections.abc import Mapping

MOST_BYTES = 16 << 20
"""The longest body that is taken: a hundred thousand series of `/metrics`, fifty times what a large deployment shows."""
_MOST_HEAD_BYTES = 64 << 10
"""The longest head, interim answers (1xx) included; servers and proxies allow 8 to 32 KiB."""
_PIECE_BYTES = 1 << 16


@dataclass(frozen=True)
class Response:
    """What a server answered, whatever its status."""

    status: int
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes


def exchange(
    url: str, body: bytes | None, headers: Mapping[str, str], *, timeout_s: float, most_bytes: int = MOST_BYTES
) -> Response:
    """Return the answer to a GET, or with a body to a POST.

    Raises OSError where none comes, where it is not whole after `timeout_s` in all, and where it is longer than `most_bytes`.
    What is asked of a name server is not part of that time: the system's resolver has time-outs of its own.
    """
    try:
        return _exchange(urlsplit(url), body, headers, _Clock(timeout_s), most_bytes)
    except (http.client.HTTPException, ValueError, OverflowError) as error:
        # ValueError: a URL, a name or a chunk's size that is none.
        raise OSError(f"{type(error).__name__}: {error}") from error


class _Clock:
    """What is left of the total time."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._end_s = time.monotonic() + timeout_s

    def left_s(self) -> float:
        """Return the seconds that are left; raises TimeoutError where none are."""
        if (left_s := self._end_s - time.monotonic()) <= 0:
            raise TimeoutError
        return left_s


class _Wire(io.RawIOBase):
    """A connected socket as `http.client` uses one, each of whose operations takes no longer than what is left."""

    def __init__(self, raw: socket.socket, clock: _Clock) -> None:
        self._raw = raw
        self._clock = clock
        self.received = 0
        self.has_ended = False
        self._part, self._most_bytes, self._stop = "a head", _MOST_HEAD_BYTES, _MOST_HEAD_BYTES

    def begin_body(self, most_bytes: int) -> None:
        """Take so many more bytes, chunk sizes and trailers included."""
        self._part, self._most_bytes, self._stop = "a body", most_bytes, self.received + most_bytes

    def readable(self) -> bool:
        return True

    def too_long(self) -> OSError:
        """Return the error that says which part of the answer has no end."""
        return OSError(f"it sent {self._part} of more than {self._most_bytes:,} bytes")

    def readinto(self, buffer: Any) -> int:
        if self.received >= self._stop:
            raise self.too_long()
        self._raw.settimeout(self._clock.left_s())
        count = self._raw.recv_into(buffer)
        self.received += count
        self.has_ended |= not count
        return count

    def sendall(self, data: bytes) -> None:
        unsent = memoryview(data)
        while unsent:
            self._raw.settimeout(self._clock.left_s())
            unsent = unsent[self._raw.send(unsent[:_PIECE_BYTES]) :]

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(self, _PIECE_BYTES)

    def close(self) -> None:
        """Leave the socket to whoever has opened it: a connection is closed before its answer is read."""


def _exchange(parts: SplitResult, body: bytes | None, headers: Mapping[str, str], clock: _Clock, most_bytes: int) -> Response:
    host, secure = parts.hostname or "", parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    wire = None
    try:
        with _connected(host, port, clock, secure=secure) as raw:
            wire = _Wire(raw, clock)
            connection = http.client.HTTPConnection(host, port)
            connection.sock = wire
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET" if body is None else "POST", target, body, _completed(headers, host, port, body))
            try:
                answer = connection.getresponse()
            except http.client.LineTooLong:  # its limit is the same, and reads decide which one is met first
                raise wire.too_long() from None
            if wire.has_ended:  # which `http.client` takes for the blank line behind the head
                raise OSError("the connection closed in the middle of the answer's head")
            wire.begin_body(most_bytes)
            names = {name.lower(): value for name, value in answer.headers.items()}
            return Response(answer.status, names, _body(answer, most_bytes))
    except TimeoutError as error:
        came = f"; {wire.received:,} bytes came" if wire and wire.received else ""
        raise TimeoutError(f"no whole answer within {clock.timeout_s:g} s{came}") from error


def _completed(headers: Mapping[str, str], host: str, port: int, body: bytes | None) -> dict[str, str]:
    """Return the headers with those that a request needs; the given ones win."""
    usual = {"Host": f"{f'[{host}]' if ':' in host else host}:{port}", "Connection": "close"}
    usual |= {} if body is None else {"Content-Type": "application/json"}
    given = {name.lower() for name in headers}
    return {name: value for name, value in usual.items() if name.lower() not in given} | dict(headers)


def _connected(host: str, port: int, clock: _Clock, *, secure: bool) -> socket.socket:
    """Return a socket that is connected to the first of a host's addresses that answers, under TLS with its hands shaken."""
    failure: OSError = OSError(f"{host!r} has no address")
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        raw = socket.socket(family, kind, protocol)
        try:
            raw.settimeout(clock.left_s())
            raw.connect(address)
            if not secure:
                return raw
            context = ssl.create_default_context()
            context.set_alpn_protocols(["http/1.1"])
            raw.settimeout(clock.left_s())  # for all of the handshake together
            return context.wrap_socket(raw, server_hostname=host)
        except OSError as error:
            raw.close()
            failure = error
        except BaseException:
            raw.close()
            raise
    raise failure


def _body(answer: http.client.HTTPResponse, most_bytes: int) -> bytes:
    if answer.length is not None and answer.length > most_bytes:
        raise OSError(f"it announced an answer of {answer.length:,} bytes, of which at most {most_bytes:,} are taken")
    pieces = []
    # In pieces: asked for all at once, `http.client` makes room for as much as the server says that it will send.
    while piece := answer.read(_PIECE_BYTES):
        pieces.append(piece)
    if answer.length:
        raise OSError(f"the connection closed {answer.length:,} bytes before the end of the answer")
    return b"".join(pieces)
