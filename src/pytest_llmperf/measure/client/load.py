"""The load process: sends the requests of a round and stamps every read at its arrival.

No HTTP library is used, because each one that was measured stamps when its loop gets there: the kernel's receive stamp
(SO_TIMESTAMPNS) does not depend on when this process ran, and under TLS it is that of the encrypted bytes. Bytes are kept with
their stamps; a response is parsed when nothing is to be read, and its bytes are dropped then.
It reads plans from stdin and writes logs to stdout, each with its length in front, until stdin ends.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import select
import socket
import ssl
import struct
import sys
import time
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec

from pytest_llmperf.measure.client.exchange import Connection, Exchange, Tls
from pytest_llmperf.measure.client.messages import RoundLog, RoundPlan
from pytest_llmperf.measure.client.response import RequestRecord, parse_response

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_SO_TIMESTAMPNS = 35  # asm-generic/socket.h; Python's socket module does not name it
_UNPACK = struct.Struct("qq").unpack  # struct timespec
_CONNECT_TIMEOUT_S = 10.0
_READ_BYTES = 1 << 18
_UNPARSED_BYTES = 8 << 20
"""Finished responses of more bytes than this are parsed although there is something to read."""
_PARSED_AT_ONCE = 4
_MOST_UNPARSED_BYTES = 24 << 20
_IDLE_NS = 2_000_000
"""A response is parsed, which takes up to a millisecond, only while nothing is due for that long."""
_NAP_S = 200e-6
"""Where reads come in quicker succession than this, they are let gather for as long: a wake costs more than a read, and the
kernel has stamped each arrival by then. The shortest gaps between an engine's tokens are ten times as long."""
_SPARE = 32
"""Connections that an open loop has before it begins; more are made when they are needed."""
_LOOK_S = 0.25
"""How often time-outs are looked at."""
_CLOCK_SET_NS = 1_000_000
_AT_ONCE_NS = 1_000_000_000
"""A server that closes a connection within this time has not worked on the request."""
_encode = msgspec.msgpack.Encoder().encode


class _Round:
    """The state of one round: which connection carries which exchange, and what is left to send."""

    def __init__(self, plan: RoundPlan) -> None:
        self.plan = plan
        self.epoll = select.epoll()
        self.connections: dict[int, Connection] = {}
        self.idle: list[Connection] = []
        self.talks = deque(plan.conversations())
        self.in_flight = 0
        self.finished: deque[tuple[Exchange, str | None]] = deque()
        self.unparsed = 0
        self.records: dict[int, bytes] = {}
        """Encoded at once: as objects the times of a million tokens would take four times the memory."""
        self.kernel_stamps = self.clock_stamps = 0
        self.tls = ssl.create_default_context() if plan.tls else None
        self.address: tuple[socket.AddressFamily, Any] | None = None
        self.offset_ns = time.time_ns() - time.monotonic_ns()
        self.start_ns = 0
        self.waited_s = 1.0
        self.buffer = memoryview(bytearray(_READ_BYTES))
        self.buffers = [self.buffer]

    # -- connections

    def connect(self) -> Connection:
        """Return a connection that is made now, before the round begins, or raise OSError."""
        raw = socket.create_connection((self.plan.host, self.plan.port), timeout=_CONNECT_TIMEOUT_S)
        try:
            self.address = raw.family, raw.getpeername()
            secure = self.secured()
            if secure:
                out, done = secure.shake_hands(b"")
                while not done:
                    raw.sendall(out)
                    data = raw.recv(_READ_BYTES)
                    if not data:
                        raise ConnectionError("the server closed the connection during the TLS handshake")
                    out, done = secure.shake_hands(data)
                raw.sendall(out)
        except BaseException:
            raw.close()
            raise
        return self.added(Connection(raw, secure), select.EPOLLIN)

    def dial(self) -> Connection:
        """Return a connection that is being made, while others are served; it sends when it is usable."""
        assert self.address is not None  # the round began with a connection
        family, address = self.address
        raw = socket.socket(family, socket.SOCK_STREAM)
        raw.setblocking(False)
        code = raw.connect_ex(address)
        if code not in (0, errno.EINPROGRESS):
            raw.close()
            raise OSError(code, os.strerror(code))
        connection = Connection(raw, self.secured(), dialed_s=time.monotonic())
        return self.added(connection, select.EPOLLIN | select.EPOLLOUT)

    def secured(self) -> Tls | None:
        return Tls(self.tls, self.plan.host) if self.tls else None

    def added(self, connection: Connection, mask: int) -> Connection:
        connection.raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.raw.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        connection.raw.setblocking(False)
        self.epoll.register(connection.fd, mask)
        self.connections[connection.fd] = connection
        return connection

    def establish(self, connection: Connection) -> None:
        """Go on with making a connection, and send what waits for it."""
        data = b""
        try:
            if code := connection.raw.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(code, os.strerror(code))
            if connection.secure:
                with contextlib.suppress(BlockingIOError):
                    data = connection.raw.recv(_READ_BYTES)
                    if not data:
                        raise ConnectionError("the server closed the connection during the TLS handshake")
                out, done = connection.secure.shake_hands(data)
                # A few hundred bytes on a connection that has carried nothing yet: the kernel takes them.
                if out:
                    connection.raw.send(out)
                if not done:
                    self.epoll.modify(connection.fd, select.EPOLLIN)
                    return
        except OSError as error:
            self.unreachable(connection, error)
            return
        connection.dialed_s = None
        self.epoll.modify(connection.fd, select.EPOLLIN)
        exchange = connection.exchange
        assert exchange is not None
        self.in_flight -= 1  # `start` counts it again
        self.start(connection, exchange)

    def unreachable(self, connection: Connection, error: OSError) -> None:
        """Lose what a connection was made for, and all that was to follow: the others would only wait as long."""
        assert connection.exchange is not None
        self.in_flight -= 1
        lost = deque([connection.exchange.index, *connection.queue])
        while self.talks:
            lost.extend(self.talks.popleft())
        self.lose(lost, f"cannot connect: {error}")
        self.drop(connection)

    def drop(self, connection: Connection) -> None:
        del self.connections[connection.fd]
        connection.raw.close()

    # -- sending

    def start(self, connection: Connection, exchange: Exchange) -> None:
        connection.exchange = exchange
        self.in_flight += 1
        if connection.dialed_s is not None:
            return  # it is sent as soon as there is somebody to send it to
        # One that is sent again counts from the first time: whoever closed the connection, it is the user who waits.
        exchange.sent_ns = exchange.sent_ns or time.monotonic_ns()
        if connection.secure:
            exchange.unsent = memoryview(connection.secure.encrypted(bytes(exchange.unsent)))
        self.send(connection, exchange)

    def send(self, connection: Connection, exchange: Exchange) -> None:
        waits = False
        try:
            while exchange.unsent:
                exchange.unsent = exchange.unsent[connection.raw.send(exchange.unsent) :]
        except BlockingIOError:
            waits = True
        except OSError:
            exchange.unsent = memoryview(b"")  # the read that follows finds the connection closed and says so
        if waits != connection.waits:
            connection.waits = waits
            self.epoll.modify(connection.fd, select.EPOLLIN | select.EPOLLOUT if waits else select.EPOLLIN)

    def advance(self, connection: Connection, from_ns: int) -> None:
        """Send what follows on a free connection: the conversation's next request, or in a closed loop another one's first."""
        if not connection.queue and not self.plan.due_ns and self.talks:
            connection.queue.extend(self.talks.popleft())
        if not connection.queue:
            if self.plan.due_ns:
                connection.rested = True
                self.idle.append(connection)
            return
        index = connection.queue.popleft()
        self.start(connection, Exchange(index, self.plan.requests[index], from_ns))

    def send_due(self) -> int:
        """Send what is due and return the nanoseconds until something is; a long time where nothing is to come."""
        while self.talks:
            now = time.monotonic_ns()
            due = self.start_ns + self.plan.due_ns[self.talks[0][0]]
            if due > now:
                return due - now
            talk = deque(self.talks.popleft())
            try:
                connection = self.idle.pop() if self.idle else self.dial()
            except OSError as error:
                self.lose(talk, f"cannot connect: {error}")
                continue
            connection.queue = talk
            self.advance(connection, due)
        return 1 << 62

    def lose(self, indices: deque[int], error: str) -> None:
        """Note requests that can no longer be sent."""
        for index in indices:
            self.records[index] = _encode(RequestRecord(None, error=error))
        indices.clear()

    # -- receiving

    def run(self, start_ns: int) -> bool:
        """Play the round on open connections; return whether it stalled."""
        self.start_ns = start_ns
        while (now := time.monotonic_ns()) < start_ns:
            time.sleep((start_ns - now) / 1e9)
        if not self.plan.due_ns:
            for connection in list(self.connections.values()):
                self.advance(connection, 0)
        else:
            self.idle = list(self.connections.values())
            for connection in self.idle:
                connection.rested = True
        last_read_s = look_s = time.monotonic()
        while True:
            until_ns = self.send_due() if self.plan.due_ns else 1 << 62
            if not self.in_flight and not self.talks:
                return False
            came = self.receive(until_ns)
            now_s = time.monotonic()
            if came or not self.in_flight:
                last_read_s = now_s  # between two arrivals nobody owes us a token
            elif now_s - last_read_s > self.plan.stall_timeout_s:
                self.talks.clear()
                self.abandon(f"no token on any connection for {self.plan.stall_timeout_s:g} s", lambda _: True)
                return True
            if now_s - look_s > _LOOK_S:
                look_s = now_s
                self.abandon(f"not complete after {self.plan.request_timeout_s:g} s", self.is_overdue)
                for connection in list(self.connections.values()):
                    if connection.dialed_s is not None and now_s - connection.dialed_s > _CONNECT_TIMEOUT_S:
                        self.unreachable(connection, TimeoutError("timed out"))

    def receive(self, until_ns: int) -> bool:
        """Read what has arrived; else parse, or wait until something arrives, at most `until_ns`. Return whether bytes came."""
        # A few at a time: while one parses, what arrives is not read, and tokens that gather there share a stamp.
        for _ in range(_PARSED_AT_ONCE):
            if self.unparsed > _UNPARSED_BYTES:
                self.parse()
        while self.unparsed > _MOST_UNPARSED_BYTES:
            self.parse()
        if self.finished and until_ns > _IDLE_NS:
            events = self.epoll.poll(0)
            if not events:
                self.parse()
        else:
            events = self.wait(until_ns)
        came = False
        for fd, mask in events:
            connection = self.connections.get(fd)
            if connection is None:
                continue
            if connection.dialed_s is not None:
                self.establish(connection)
                continue
            if mask & select.EPOLLOUT and connection.exchange is not None and connection.exchange.unsent:
                self.send(connection, connection.exchange)
            came |= self.read(connection)
        return came

    def wait(self, until_ns: int) -> list[tuple[int, int]]:
        if self.waited_s < _NAP_S < until_ns / 1e9:
            time.sleep(_NAP_S)
        began_s = time.monotonic()
        wait_s = min(until_ns / 1e9, _LOOK_S)
        if wait_s < _LOOK_S:
            # epoll's time-out is whole milliseconds, and rounds up; an epoll can itself be waited for, to the microsecond.
            select.select([self.epoll.fileno()], [], [], wait_s)
            wait_s = 0
        events = self.epoll.poll(wait_s)
        self.waited_s = time.monotonic() - began_s
        return events

    def read(self, connection: Connection) -> bool:
        try:
            # Into one buffer, and out of it what came: a new buffer for each read would leave holes in memory.
            size, ancillary, _, _ = connection.receive(self.buffers, 64)
        except BlockingIOError:
            return False
        except OSError as error:
            self.closed(connection, str(error))
            return False
        if ancillary:  # nothing else has been asked of the kernel
            seconds, nanoseconds = _UNPACK(ancillary[0][2])
            stamp = seconds * 1_000_000_000 + nanoseconds - self.offset_ns
            self.kernel_stamps += 1
        else:
            stamp = time.monotonic_ns()
            self.clock_stamps += 1
        if not size:
            self.closed(connection, "the server closed the connection")
            return False
        data = bytes(self.buffer[:size])
        if connection.secure:
            try:
                data = connection.secure.decrypted(data)
            except OSError as error:
                self.closed(connection, f"TLS: {error}")
                return False
        exchange = connection.exchange
        if exchange is None:
            if data or not connection.secure or connection.secure.closed:
                self.drop_idle(connection)  # bytes that nobody asked for, or an end
            return True
        if data:
            self.take(connection, exchange, stamp, data)
        if connection.secure and connection.secure.closed and self.connections.get(connection.fd) is connection:
            self.closed(connection, "the server closed the connection")
        return True

    def take(self, connection: Connection, exchange: Exchange, stamp: int, data: bytes) -> None:
        exchange.reads.append((stamp, data))
        exchange.received += len(data)
        if exchange.chunked and exchange.rest is None and data.endswith(b"}\n\n\r\n"):
            return  # an event of a stream: most reads end here
        if exchange.is_complete(data):
            self.finish(connection, None)
            # What was not even taken whole leaves a connection of which nobody knows where it stands.
            if exchange.closes or exchange.unsent:
                self.replace(connection, stamp)
            else:
                connection.rested = True
                self.advance(connection, stamp)

    def closed(self, connection: Connection, why: str) -> None:
        exchange = connection.exchange
        if exchange is None:
            self.drop_idle(connection)
            return
        complete = exchange.head and not exchange.chunked and exchange.length is None
        at_once = time.monotonic_ns() - exchange.sent_ns < _AT_ONCE_NS
        if not exchange.reads and not exchange.retried and connection.rested and at_once:
            # A kept-alive connection that the server had closed meanwhile: the request was never looked at.
            self.in_flight -= 1
            again = Exchange(exchange.index, self.plan.requests[exchange.index], exchange.from_ns, retried=True)
            again.sent_ns = exchange.sent_ns
            self.replace(connection, 0, again)
            return
        self.finish(connection, None if complete else f"{why} in the middle of the response")
        self.replace(connection, time.monotonic_ns())

    def drop_idle(self, connection: Connection) -> None:
        if connection in self.idle:
            self.idle.remove(connection)
        self.drop(connection)

    def replace(self, connection: Connection, from_ns: int, exchange: Exchange | None = None) -> None:
        """Go on with a connection's work on a new one; where none can be made, that work and all that was to follow is lost."""
        queue = connection.queue
        self.drop(connection)
        if not exchange and not queue and (self.plan.due_ns or not self.talks):
            return
        try:
            fresh = self.dial()
        except OSError as error:
            lost = deque([exchange.index] if exchange else ())
            lost.extend(queue)
            while self.talks and not self.plan.due_ns:
                lost.extend(self.talks.popleft())
            self.lose(lost, f"cannot connect: {error}")
            return
        fresh.queue = queue
        if exchange:
            self.start(fresh, exchange)
        else:
            self.advance(fresh, from_ns)

    def finish(self, connection: Connection, error: str | None) -> None:
        exchange = connection.exchange
        assert exchange is not None
        connection.exchange = None
        self.in_flight -= 1
        self.finished.append((exchange, error))
        self.unparsed += exchange.received

    def abandon(self, error: str, hopeless: Callable[[Exchange], bool]) -> None:
        for connection in list(self.connections.values()):
            if connection.exchange is not None and hopeless(connection.exchange):
                self.finish(connection, error)
                self.lose(connection.queue, "never sent: the request before it in its conversation failed")
                self.replace(connection, time.monotonic_ns())

    def is_overdue(self, exchange: Exchange) -> bool:
        return bool(exchange.sent_ns) and time.monotonic_ns() - exchange.sent_ns > self.plan.request_timeout_s * 1e9

    # -- parsing

    def parse(self) -> None:
        """Turn the oldest finished response into its record, and forget its bytes."""
        exchange, error = self.finished.popleft()
        self.unparsed -= exchange.received
        plan, index = self.plan, exchange.index
        if not exchange.sent_ns:
            self.records[index] = _encode(RequestRecord(None, error=error))
            return
        record = to_record(
            plan, index, exchange.reads, sent_ns=exchange.sent_ns, from_ns=exchange.from_ns, start_ns=self.start_ns, error=error
        )
        try:
            self.records[index] = _encode(record)
        except OverflowError:
            wrong = f"usage says {record.prompt_tokens} prompt tokens and {record.output_tokens} tokens"
            self.records[index] = _encode(replace(record, prompt_tokens=None, output_tokens=None, error=wrong))


def to_record(
    plan: RoundPlan,
    index: int,
    reads: Sequence[tuple[int, bytes]],
    *,
    sent_ns: int,
    from_ns: int,
    start_ns: int,
    error: str | None,
) -> RequestRecord:
    """Return the record of a plan's request from the reads of its response.

    `from_ns` is when it could be sent, 0 at a closed loop's beginning; `start_ns` is when the round began.
    """
    record = parse_response(
        reads,
        sent_ns=sent_ns,
        wanted=plan.output_tokens[index],
        error=error,
        exact=plan.exact[index] if plan.exact else True,
        stream=plan.stream,
    )
    is_first = not (plan.follows and plan.follows[index])
    due_s = (start_ns + plan.due_ns[index]) / 1e9 if plan.due_ns and is_first else None
    return replace(record, due_s=due_s, delay_s=(sent_ns - from_ns) / 1e9 if from_ns else None)


def play(plan: RoundPlan, started: Callable[[], int]) -> bytes:
    """Send the requests of a plan and return the encoded RoundLog; whatever goes wrong is an error of its request.

    `started` is called when the connections are open, and returns the instant to begin at, in monotonic nanoseconds.
    """
    state = _Round(plan)
    wanted = _SPARE if plan.due_ns else plan.concurrency
    try:
        for _ in range(min(wanted, len(state.talks))):
            state.connect()
    except OSError as error:
        started()
        for connection in list(state.connections.values()):
            state.drop(connection)
        state.epoll.close()
        return _encode(RoundLog(tuple(RequestRecord(None, error=f"cannot connect: {error}") for _ in plan.requests)))
    gc.collect()
    gc.disable()
    try:
        start_ns = started()
        cpu_s = time.process_time()
        stalled = state.run(start_ns)
        busy_s = (time.monotonic_ns() - start_ns) / 1e9
        cpu_s, before_s = time.process_time() - cpu_s, time.process_time()
        while state.finished:
            state.parse()
        parse_s = time.process_time() - before_s
    finally:
        gc.enable()
        for connection in list(state.connections.values()):
            state.drop(connection)
        state.epoll.close()
    missing = _encode(RequestRecord(None, error="never sent: the round had stalled or timed out"))
    log = RoundLog(
        records=(),
        stalled=stalled,
        kernel_stamps=state.kernel_stamps,
        clock_stamps=state.clock_stamps,
        cpu_s=cpu_s,
        busy_s=busy_s,
        parse_s=parse_s,
        clock_set=abs(time.time_ns() - time.monotonic_ns() - state.offset_ns) > _CLOCK_SET_NS,
    )
    records = [msgspec.Raw(state.records.get(index, missing)) for index in range(len(plan.requests))]
    return _encode(msgspec.to_builtins(log) | {"records": records})


def _go_first() -> None:
    """Take a real-time priority where that is allowed: this process needs little of a core, but that on time.

    On two cores whose threads the ranks of a CPU engine keep spinning it was left waiting for 1.3 of 1.3 s without, and for
    less than a millisecond with it. The kernel keeps a share of each core for all others.
    """
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


def main() -> None:
    """Play every plan that comes in on stdin."""
    _go_first()
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    decoder = msgspec.msgpack.Decoder(RoundPlan)

    def take() -> bytes:
        return source.read(int.from_bytes(source.read(8), "big"))

    def give(message: bytes) -> None:
        sink.write(len(message).to_bytes(8, "big"))
        sink.write(message)
        sink.flush()

    def started() -> int:
        give(b"connected")
        return int.from_bytes(take(), "big")

    # Nobody waits for the answer of a round when pytest was killed.
    try:
        while message := take():
            give(play(decoder.decode(message), started))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it flushes at its end


if __name__ == "__main__":
    main()
