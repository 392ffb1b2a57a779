"""The load process: sends the requests of a round and stamps every read at its arrival.

No HTTP library is used, because each one that was measured stamps when its loop gets there: the kernel's receive stamp
(SO_TIMESTAMPNS) does not depend on when this process ran. Bytes are kept with their stamps and parsed after the round.
It reads plans from stdin and writes logs to stdout, each with its length in front, until stdin ends.
"""

from __future__ import annotations

import gc
import select
import socket
import ssl
import struct
import sys
import time
from typing import TYPE_CHECKING

import msgspec

from pytest_llmperf.measure.client import RequestRecord, RoundLog, RoundPlan, is_chunked, parse_response

if TYPE_CHECKING:
    from collections.abc import Callable

_SO_TIMESTAMPNS = 35  # asm-generic/socket.h; Python's socket module does not name it
_TIMESPEC = struct.Struct("qq")
_LAST_CHUNK = b"\r\n0\r\n\r\n"
_CONNECT_TIMEOUT_S = 10.0


class _Exchange:
    """One request on its way: what is still to be sent, and the reads of its response."""

    __slots__ = ("chunked", "index", "length", "reads", "received", "retried", "sent_ns", "tail", "unsent")

    def __init__(self, index: int, request: bytes, *, retried: bool = False) -> None:
        self.index = index
        self.unsent = memoryview(request)
        self.sent_ns = 0
        self.reads: list[tuple[int, bytes]] = []
        self.received = 0
        self.tail = b""
        self.chunked: bool | None = None
        self.length: int | None = None
        self.retried = retried

    def take(self, stamp: int, data: bytes) -> bool:
        """Keep a read; return whether the response is complete."""
        self.reads.append((stamp, data))
        self.received += len(data)
        self.tail = (self.tail + data)[-len(_LAST_CHUNK) :] if len(data) < len(_LAST_CHUNK) else data[-len(_LAST_CHUNK) :]
        if self.chunked is None and not self._read_head():
            return False
        if self.chunked:
            return self.tail == _LAST_CHUNK
        return self.length is not None and self.received >= self.length

    def _read_head(self) -> bool:
        head, separator, _ = b"".join(piece for _, piece in self.reads).partition(b"\r\n\r\n")
        if not separator:
            return False
        lines = head.lower().split(b"\r\n")
        self.chunked = is_chunked(head)
        for line in lines:
            if line.startswith(b"content-length:") and line[15:].strip().isdigit():
                self.length = len(head) + 4 + int(line[15:])
        return True


class _Round:
    """The state of one round: which connection carries which exchange, and what is left to send."""

    def __init__(self, plan: RoundPlan) -> None:
        self.plan = plan
        self.poll = select.epoll()
        self.carried: dict[int, tuple[socket.socket, _Exchange]] = {}
        self.finished: list[tuple[_Exchange, str | None]] = []
        self.next = 0
        self.kernel_stamps = self.clock_stamps = 0
        self.tls = ssl.create_default_context() if plan.tls else None
        self.realtime_offset_ns = time.time_ns() - time.monotonic_ns()

    def connect(self) -> socket.socket:
        raw = socket.create_connection((self.plan.host, self.plan.port), timeout=_CONNECT_TIMEOUT_S)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.tls is None:
            raw.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        connection = self.tls.wrap_socket(raw, server_hostname=self.plan.host) if self.tls else raw
        connection.setblocking(False)
        return connection

    def start(self, connection: socket.socket, exchange: _Exchange) -> None:
        self.carried[connection.fileno()] = (connection, exchange)
        self.poll.register(connection.fileno(), select.EPOLLIN)
        self.send(connection, exchange)

    def send(self, connection: socket.socket, exchange: _Exchange) -> None:
        exchange.sent_ns = exchange.sent_ns or time.monotonic_ns()
        try:
            while exchange.unsent:
                exchange.unsent = exchange.unsent[connection.send(exchange.unsent) :]
        except (BlockingIOError, ssl.SSLWantWriteError):
            self.poll.modify(connection.fileno(), select.EPOLLIN | select.EPOLLOUT)
            return
        except OSError:
            return  # the read that follows finds the connection closed and says so
        self.poll.modify(connection.fileno(), select.EPOLLIN)

    def receive(self, connection: socket.socket) -> tuple[int, bytes]:
        """Return (stamp, bytes); no bytes mean that the server closed the connection."""
        if self.tls is not None:
            data = connection.recv(65536)
            self.clock_stamps += 1
            return time.monotonic_ns(), data
        data, ancillary, _, _ = connection.recvmsg(65536, 64)
        now = time.monotonic_ns()
        for level, kind, value in ancillary:
            if level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPNS:
                seconds, nanoseconds = _TIMESPEC.unpack(value)
                stamp = seconds * 1_000_000_000 + nanoseconds - self.realtime_offset_ns
                # A wall clock that was set in the meantime would put the stamp into the future or far into the past.
                if now - 60_000_000_000 < stamp <= now:
                    self.kernel_stamps += 1
                    return stamp, data
        self.clock_stamps += 1
        return now, data

    def run(self, connections: list[socket.socket]) -> bool:
        """Play the round on open connections; return whether it stalled."""
        for connection in connections:
            self.advance(connection)
        last_byte_s = time.monotonic()
        while self.carried:
            for fd, _ in self.poll.poll(0.25):
                connection, exchange = self.carried[fd]
                if exchange.unsent:
                    self.send(connection, exchange)
                self.read(connection, exchange)
                last_byte_s = time.monotonic()
            now_s = time.monotonic()
            if now_s - last_byte_s > self.plan.stall_timeout_s:
                self.abandon(f"no token on any connection for {self.plan.stall_timeout_s:g} s", lambda _: True)
                return True
            self.abandon(f"not complete after {self.plan.request_timeout_s:g} s", self.is_overdue)
        return False

    def is_overdue(self, exchange: _Exchange) -> bool:
        return time.monotonic_ns() - exchange.sent_ns > self.plan.request_timeout_s * 1e9

    def advance(self, connection: socket.socket) -> None:
        """Send the next request on a free connection, or close it when none is left."""
        if self.next >= len(self.plan.requests):
            connection.close()
            return
        index, self.next = self.next, self.next + 1
        self.start(connection, _Exchange(index, self.plan.requests[index]))

    def read(self, connection: socket.socket, exchange: _Exchange) -> None:
        try:
            stamp, data = self.receive(connection)
        except (BlockingIOError, ssl.SSLWantReadError):
            return
        except OSError as error:
            self.closed(connection, exchange, str(error))
            return
        if not data:
            self.closed(connection, exchange, "the server closed the connection")
        elif exchange.take(stamp, data):
            self.finish(connection, exchange, None)
            if b"connection: close" in exchange.reads[0][1].lower():
                self.replace(connection)
            else:
                self.advance(connection)

    def closed(self, connection: socket.socket, exchange: _Exchange, why: str) -> None:
        complete = exchange.chunked is False and exchange.length is None and bool(exchange.reads)
        if not exchange.reads and not exchange.retried and self.finished:
            # A kept-alive connection that the server had closed meanwhile: the request was never looked at.
            self.release(connection)
            self.reopen(_Exchange(exchange.index, self.plan.requests[exchange.index], retried=True))
            return
        self.finish(connection, exchange, None if complete else f"{why} in the middle of the response")
        self.replace(connection)

    def replace(self, connection: socket.socket) -> None:
        connection.close()
        if self.next < len(self.plan.requests):
            index, self.next = self.next, self.next + 1
            self.reopen(_Exchange(index, self.plan.requests[index]))

    def reopen(self, exchange: _Exchange) -> None:
        """Carry an exchange on a new connection; where none can be made, it and all that were to follow have failed."""
        try:
            self.start(self.connect(), exchange)
        except OSError as error:
            self.finished.append((exchange, f"cannot connect: {error}"))
            while self.next < len(self.plan.requests):
                self.finished.append((_Exchange(self.next, b""), f"cannot connect: {error}"))
                self.next += 1

    def release(self, connection: socket.socket) -> None:
        self.poll.unregister(connection.fileno())
        del self.carried[connection.fileno()]

    def finish(self, connection: socket.socket, exchange: _Exchange, error: str | None) -> None:
        self.release(connection)
        self.finished.append((exchange, error))

    def abandon(self, error: str, hopeless: Callable[[_Exchange], bool]) -> None:
        for connection, exchange in [pair for pair in self.carried.values() if hopeless(pair[1])]:
            self.finish(connection, exchange, error)
            connection.close()


def play(plan: RoundPlan) -> RoundLog:
    """Send the requests of a plan and return the log; whatever goes wrong is an error of its request."""
    state = _Round(plan)
    connections: list[socket.socket] = []
    try:
        for _ in range(min(plan.concurrency, len(plan.requests))):
            connections.append(state.connect())
    except OSError as error:
        for connection in connections:
            connection.close()
        return RoundLog(tuple(RequestRecord(None, error=f"cannot connect: {error}") for _ in plan.requests))
    gc.collect()
    gc.disable()
    try:
        cpu_s = time.process_time()
        stalled = state.run(connections)
        cpu_s = time.process_time() - cpu_s
    finally:
        gc.enable()
        state.poll.close()
    records = {exchange.index: _record(exchange, error, plan) for exchange, error in state.finished}
    missing = RequestRecord(None, error="never sent: the round had stalled or timed out")
    return RoundLog(
        records=tuple(records.get(index, missing) for index in range(len(plan.requests))),
        stalled=stalled,
        kernel_stamps=state.kernel_stamps,
        clock_stamps=state.clock_stamps,
        cpu_s=cpu_s,
    )


def _record(exchange: _Exchange, error: str | None, plan: RoundPlan) -> RequestRecord:
    if not exchange.sent_ns:
        return RequestRecord(None, error=error)
    return parse_response(exchange.reads, sent_ns=exchange.sent_ns, wanted=plan.output_tokens[exchange.index], error=error)


def main() -> None:
    """Play every plan that comes in on stdin."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    decoder = msgspec.msgpack.Decoder(RoundPlan)
    while head := source.read(8):
        answer = msgspec.msgpack.encode(play(decoder.decode(source.read(int.from_bytes(head, "big")))))
        sink.write(len(answer).to_bytes(8, "big") + answer)
        sink.flush()


if __name__ == "__main__":
    main()
