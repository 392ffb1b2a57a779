"""One request on its way, and the connection that carries it: when a response is complete, and TLS with the kernel's stamps.

Whether a response is complete is seen from how its reads end; only one that ends in unusual places is followed chunk by chunk.
"""

from __future__ import annotations

import re
import socket
import ssl
import time
from collections import deque
from typing import TYPE_CHECKING

from pytest_llmperf.measure.client.framing import MOST_HEAD_BYTES, Chunks, FloodError, closes_behind, is_chunked, keep_alive_s

if TYPE_CHECKING:
    from pytest_llmperf.measure.client.messages import RoundPlan

_LAST_CHUNK = b"\r\n0\r\n\r\n"
_READ_BYTES = 1 << 16
_MOST_LINE_BYTES = 64 << 10
"""How far back the beginning of a line is looked for."""
_KEEP_S = 4.0
"""How long a connection may rest where the server does not say how long it keeps one: uvicorn, Node and llama-server close it
after 5 s. A request that meets such a close gets no answer, and nobody knows whether it was worked on."""
_TOKEN = re.compile(
    rb'"(?:text|content|reasoning|reasoning_content|refusal|arguments)"\s*:\s*"[^"]|"token_ids"\s*:\s*\[\s*\d'
    rb'|"(?:tool_calls|content)"\s*:\s*\[\s*["{]'
)
"""What an event with a token has, and pings, comments, roles and events without a choice have not."""


MOST_BYTES = 256 << 20
MOST_BYTES_OF_TOKEN = 2 << 10
"""All responses under way together may have so many bytes, and so many more for each token that was asked for."""


def most_bytes(request: bytes, output_tokens: int) -> int:
    """Return the longest response to a request that is taken: several times the longest that is sound.

    1 MiB; 16 KiB for each output token, which takes 300 bytes, and with twenty alternatives each 3 KB; 64 bytes for each of the
    request's, which may be sent back with its log probabilities.
    """
    return (1 << 20) + (output_tokens << 14) + (len(request) << 6)


class Exchange:
    """One request on its way: what is still to be sent, and the reads of its response."""

    __slots__ = (
        "chunked", "chunks", "closes", "from_ns", "head", "index", "keep_s", "length", "looked", "most", "reads",
        "received", "sent_ns", "start", "unsent",
    )  # fmt: skip

    def __init__(self, index: int, request: bytes, from_ns: int, most: int) -> None:
        """Note request `index`, when it was to be sent, and how many bytes of a response are taken."""
        self.index = index
        self.unsent = memoryview(request)
        self.from_ns = from_ns
        """When it was to be sent; 0 if at the round's beginning."""
        self.sent_ns = 0
        self.reads: list[tuple[int, bytes]] = []
        self.received = 0
        """Bytes of the response, and of interim ones before it."""
        self.most = most
        self.start = b""
        """What came while the head is not complete."""
        self.head = 0
        """Where the body begins, interim responses counted; 0 while the head is not complete."""
        self.chunked = False
        self.length: int | None = None
        """How many bytes are received when all have come; None where that is not told."""
        self.closes = False
        """The server said that it closes the connection behind this response."""
        self.keep_s: float | None = None
        """For how long it said that it keeps a connection that rests."""
        self.chunks: Chunks | None = None
        """Follows an unusual body chunk by chunk; None while it is as usual."""
        self.looked = 0
        """Reads that were looked at for tokens."""

    def is_complete(self, data: bytes) -> bool:
        """Return whether the response is complete with this read; raises FloodError where a part of it is too long."""
        if not self.head and not self._read_head(data):
            return False
        if not self.chunked:
            return self.length is not None and self.received >= self.length
        if self.chunks is None:
            if data.endswith(_LAST_CHUNK):
                return True
            if data.endswith(b"\n\n\r\n") or self.received == self.head:
                return False
            # The last bytes came in several reads, or a trailer follows the last chunk, or events end in another way.
            self.chunks = Chunks()
            data = b"".join(piece for _, piece in self.reads).partition(b"\r\n\r\n")[2]
        return self.chunks.take(data)

    def _read_head(self, data: bytes) -> bool:
        self.start += data
        head, separator, body = self.start.partition(b"\r\n\r\n")
        while separator and re.match(rb"HTTP/1\.1 1\d\d ", head):  # "100 Continue" and the like come before the response
            self._check_head(self.received - len(body))
            self.start, self.looked = body, 0
            self.reads = [(self.reads[-1][0], body)] if body else []
            head, separator, body = self.start.partition(b"\r\n\r\n")
        before = self.received - len(body)
        self._check_head(before)
        if not separator:
            return False
        self.start = b""
        self.head = before
        self.chunked = is_chunked(head)
        self.closes = closes_behind(head)
        self.keep_s = keep_alive_s(head)
        if length := re.search(rb"\r\ncontent-length:[ \t]*(\d{1,18})[ \t]*(?:\r\n|$)", head, re.I):
            self.length = before + int(length[1])
            if self.length > self.most and not self.chunked:
                raise FloodError(f"it announces an answer of {int(length[1]):,} bytes, of which at most {self.most:,} are taken")
        return True

    def _check_head(self, size: int) -> None:
        if size > MOST_HEAD_BYTES:
            raise FloodError(f"the head of the answer is longer than {MOST_HEAD_BYTES:,} bytes")

    def brought_token(self, *, known: bool = False) -> bool:
        """Return whether an event with a token has ended since this was asked last: bytes alone are no progress.

        `known`: it need not be looked for, another exchange has brought one.
        """
        before, self.looked = self.looked, len(self.reads)
        if known or before == self.looked:
            return known
        fresh = [piece for _, piece in self.reads[before:]]
        if fresh[-1].endswith(b"\n") and _TOKEN.search(fresh[-1]):
            return True  # so it is with a stream that works
        begun, size = before, 0
        while begun and not self.reads[begun - 1][1].endswith(b"\n") and size < _MOST_LINE_BYTES:
            begun -= 1
            size += len(self.reads[begun][1])
        line = b"".join(piece for _, piece in self.reads[begun:before])
        data = line[line.rfind(b"\n") + 1 :] + b"".join(fresh)
        return _TOKEN.search(data, 0, max(data.rfind(b"\n"), data.rfind(b"\r")) + 1) is not None


def flood_of(exchange: Exchange, plan: RoundPlan, *, together: int, most: int, count: int) -> str | None:
    """Return why no more of a response is taken; None where it is not too long yet, nor are all `count` of them `together`."""
    if exchange.received > exchange.most:
        asked = plan.output_tokens[exchange.index]
        return f"the answer is longer than {exchange.most:,} bytes, for {asked:,} tokens that were asked for"
    # The longest give way: those that have more than an equal share.
    if together > most and exchange.received > most / count:
        return f"the answers under way are longer than {most:,} bytes together, and this one than its share of them"
    return None


class Connection:
    """A socket, what is on its way on it, and the requests of the conversation that follow."""

    __slots__ = ("dialed_s", "exchange", "fd", "keep_s", "queue", "raw", "receive", "rests_since_s", "secure", "waits")

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
        self.rests_since_s: float | None = None
        """Since when nothing is on its way on it, None while something is."""
        self.keep_s = _KEEP_S
        """For how long it is used again after it has rested."""

    def rest(self, keep_s: float | None = None) -> None:
        """Have nothing on its way from now on; `keep_s` is how long the server said that it keeps such a connection."""
        self.rests_since_s = time.monotonic()
        if keep_s is not None:
            self.keep_s = keep_s - min(1.0, keep_s / 2)

    def is_stale(self) -> bool:
        """Return whether the server has closed it while it rested, or may just do so: a request on it would get no answer."""
        if self.rests_since_s is None:
            return False
        if time.monotonic() - self.rests_since_s > self.keep_s:
            return True
        try:
            came = self.raw.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True
        # Under TLS tickets for another session may come at any time; otherwise nobody has asked for anything.
        return not came or self.secure is None


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
