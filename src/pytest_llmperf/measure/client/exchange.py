"""One request on its way, and the connection that carries it: when a response is complete, and TLS with the kernel's stamps.

Whether a response is complete is seen from how its reads end; only one that ends in unusual places is followed chunk by chunk.
"""

from __future__ import annotations

import re
import ssl
from collections import deque
from typing import TYPE_CHECKING

from pytest_llmperf.measure.client.framing import is_chunked, skip_chunks

if TYPE_CHECKING:
    import socket

_LAST_CHUNK = b"\r\n0\r\n\r\n"
_READ_BYTES = 1 << 16


class Exchange:
    """One request on its way: what is still to be sent, and the reads of its response."""

    __slots__ = (
        "chunked", "closes", "from_ns", "head", "index", "length", "reads", "received", "rest", "retried", "sent_ns", "unsent",
    )  # fmt: skip

    def __init__(self, index: int, request: bytes, from_ns: int, *, retried: bool = False) -> None:
        """Note request `index`, and when it was to be sent."""
        self.index = index
        self.unsent = memoryview(request)
        self.from_ns = from_ns
        """When it was to be sent; 0 if at the round's beginning."""
        self.sent_ns = 0
        self.reads: list[tuple[int, bytes]] = []
        self.received = 0
        self.head = 0
        """Where the body begins; 0 while the head is not complete."""
        self.chunked = False
        self.length: int | None = None
        self.closes = False
        """The server said that it closes the connection behind this response."""
        self.rest: bytes | None = None
        """What of an unusual body has not been followed chunk by chunk yet; None while it is as usual."""
        self.retried = retried

    def is_complete(self, data: bytes) -> bool:
        """Return whether the response is complete with this read."""
        if not self.head and not self._read_head():
            return False
        if not self.chunked:
            return self.length is not None and self.received >= self.length
        if self.rest is None:
            if data.endswith(_LAST_CHUNK):
                return True
            if data.endswith(b"\n\n\r\n") or self.received == self.head:
                return False
            # The last bytes came in several reads, or a trailer follows the last chunk, or events end in another way.
            self.rest = b"".join(piece for _, piece in self.reads)[self.head :]
        else:
            self.rest += data
        self.rest, complete = skip_chunks(self.rest)
        return complete

    def _read_head(self) -> bool:
        wire = b"".join(piece for _, piece in self.reads)
        head, separator, body = wire.partition(b"\r\n\r\n")
        if not separator:
            return False
        if re.match(rb"HTTP/1\.1 1\d\d ", head):  # "100 Continue" and the like come before the response
            self.reads = [(self.reads[-1][0], body)] if body else []
            self.received = len(body)
            return bool(body) and self._read_head()
        self.head = len(head) + 4
        self.chunked = is_chunked(head)
        self.closes = b"\r\nconnection: close" in head.lower()
        if length := re.search(rb"\r\ncontent-length:[ \t]*(\d{1,18})[ \t]*(?:\r\n|$)", head, re.I):
            self.length = self.head + int(length[1])
        return True


class Connection:
    """A socket, what is on its way on it, and the requests of the conversation that follow."""

    __slots__ = ("dialed_s", "exchange", "fd", "queue", "raw", "receive", "rested", "secure", "waits")

    def __init__(self, raw: socket.socket, secure: Tls | None, *, dialed_s: float | None = None) -> None:
        """Take a socket, connected or with `dialed_s` on its way."""
        self.raw = raw
        self.receive = raw.recvmsg_into
        self.fd = raw.fileno()
        self.secure = secure
        self.exchange: Exchange | None = None
        self.queue: deque[int] = deque()
        self.waits = False
        """The kernel takes no more bytes to send for now."""
        self.dialed_s = dialed_s
        """When it began to be made, None once it is usable."""
        self.rested = False
        """It was open before its present request was sent, so that the server may have closed it meanwhile."""


class Tls:
    """TLS over a socket that is read by ourselves, so that the kernel's stamps are there."""

    def __init__(self, context: ssl.SSLContext, host: str) -> None:
        """Be ready to shake hands with a host of this name."""
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_hostname=host)
        self.closed = False
        """The server has said that nothing more comes."""

    def shake_hands(self, data: bytes) -> tuple[bytes, bool]:
        """Take what came, and return what is to be sent and whether that was all; raises OSError where they don't agree."""
        self._in.write(data)
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return self._out.read(), False
        return self._out.read(), True

    def encrypted(self, data: bytes) -> bytes:
        """Return what is to be sent for these bytes."""
        self._tls.write(data)
        return self._out.read()

    def decrypted(self, data: bytes) -> bytes:
        """Return what these bytes bring, which may be nothing yet; raises OSError for a broken stream."""
        self._in.write(data)
        pieces = []
        try:
            while piece := self._tls.read(_READ_BYTES):
                pieces.append(piece)
            self.closed = True
        except ssl.SSLWantReadError:
            pass  # all that has come is read; the rest of a record is still on its way
        except ssl.SSLZeroReturnError:
            self.closed = True
        return b"".join(pieces)
