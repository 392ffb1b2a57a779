"""One round on open connections: what is sent when, what is read, and when a response has ended."""

from __future__ import annotations

import select
import struct
import time
from collections import deque
from typing import TYPE_CHECKING

from pytest_llmperf.measure.client.agenda import FOREVER_NS, Agenda
from pytest_llmperf.measure.client.connect import LOOK_S
from pytest_llmperf.measure.client.exchange import MOST_BYTES, MOST_BYTES_OF_TOKEN, Exchange, flood_of, most_bytes
from pytest_llmperf.measure.client.framing import FloodError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_llmperf.measure.client.answers import Answers
    from pytest_llmperf.measure.client.connect import Connections
    from pytest_llmperf.measure.client.exchange import Connection
    from pytest_llmperf.measure.client.messages import RoundPlan

_UNPACK = struct.Struct("qq").unpack  # struct timespec
_READ_BYTES = 1 << 18
_UNPARSED_BYTES = 8 << 20
"""Finished responses of more bytes than this are parsed although there is something to read."""
_PARSED_AT_ONCE = 4
_MOST_UNPARSED_BYTES = 24 << 20
_IDLE_NS = 2_000_000
"""A response is parsed, which takes up to a millisecond, only while nothing is due for that long."""
_CLOSED = "the server closed the connection"
_MIDDLE, _NO_ANSWER = "in the middle of the response", "without an answer"


class Round:
    """The state of one round: which connection carries which exchange, and what is left to send."""

    def __init__(self, plan: RoundPlan, links: Connections, answers: Answers) -> None:
        """Be ready to play the plan on these connections."""
        self.plan = plan
        self.links = links
        self.answers = answers
        self.epoll = links.epoll
        self.connections = links.open
        self.idle: list[Connection] = []
        self.agenda = Agenda(plan, answers)
        self.in_flight = 0
        # A cap that is never met costs nothing to look at.
        self.cap = plan.max_concurrency if plan.max_concurrency and plan.due_ns else len(plan.requests) + 1
        self.freed_ns = 0
        """When an answer made room under the cap last."""
        self.longest_bytes = max(plan.output_tokens, default=0) * MOST_BYTES_OF_TOKEN
        self.bytes_under_way = 0
        """Of the responses that have not ended."""
        self.progressed = False
        """A response has ended since time-outs were looked at last."""
        self.kernel_stamps = self.clock_stamps = 0
        self.offset_ns = time.time_ns() - time.monotonic_ns()
        self.buffer = memoryview(bytearray(_READ_BYTES))
        self.buffers = [self.buffer]

    # -- sending

    def _start(self, connection: Connection, exchange: Exchange) -> None:
        connection.exchange = exchange
        self.in_flight += 1
        if connection.dialed_s is not None:
            return  # it is sent as soon as there is somebody to send it to
        exchange.sent_ns = time.monotonic_ns()
        if connection.secure:
            exchange.unsent = memoryview(connection.secure.encrypted(bytes(exchange.unsent)))
        self._send(connection, exchange)

    def _send(self, connection: Connection, exchange: Exchange) -> None:
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

    def _advance(self, connection: Connection, from_ns: int) -> None:
        """Send what follows on a free connection: the conversation's next request, or in a closed loop another one's first."""
        if self.agenda.follow(connection.queue, from_ns):
            self._begin(connection, from_ns)
        elif self.agenda.timed:
            self.idle.append(connection)

    def _begin(self, connection: Connection, from_ns: int) -> None:
        """Send the next request of a connection's conversation."""
        index, plan = connection.queue.popleft(), self.plan
        connection.rests_since_s = None
        most = most_bytes(plan.requests[index], plan.output_tokens[index])
        self._start(connection, Exchange(index, plan.requests[index], from_ns, most))

    def _free_connection(self) -> Connection:
        """Return the connection that rested last, a new one where the server may have closed it; raises OSError."""
        while self.idle:
            connection = self.idle.pop()
            if not connection.is_stale():
                return connection
            self.links.drop(connection)
        return self.links.dial()

    def _send_due(self) -> int:
        """Send what is due and return the nanoseconds until something is; a long time where nothing is to come."""
        while self.in_flight < self.cap:
            due, now = self.agenda.next_due_ns(), time.monotonic_ns()
            if due > now:
                return due - now
            talk = self.agenda.take_due(due)
            try:
                connection = self._free_connection()
            except OSError as error:
                self.agenda.lose(talk, f"cannot connect: {error}")
                continue
            connection.queue = talk
            # One that the cap held back could be sent when there was room: waiting for that is no lateness of the client.
            self._begin(connection, max(due, self.freed_ns))
        return FOREVER_NS

    def _establish(self, connection: Connection) -> None:
        """Go on with making a connection, and send what waits for it."""
        try:
            usable = self.links.establish(connection)
        except OSError as error:
            self._unreachable(connection, error)
            return
        if usable and connection.exchange is not None:
            self.in_flight -= 1  # `start` counts it again
            self._start(connection, connection.exchange)

    def _unreachable(self, connection: Connection, error: OSError) -> None:
        """Lose what a connection was made for, and all that was to follow: the others would only wait as long."""
        assert connection.exchange is not None
        self.in_flight -= 1
        lost = deque([connection.exchange.index, *connection.queue, *self.agenda.rest()])
        self.answers.lose(lost, f"cannot connect: {error}")
        self.links.drop(connection)

    # -- receiving

    def run(self, start_ns: int) -> bool:
        """Play the round on open connections; return whether it stalled."""
        self.answers.start_ns = start_ns
        while (now := time.monotonic_ns()) < start_ns:
            time.sleep((start_ns - now) / 1e9)
        if not self.plan.due_ns:
            for connection in list(self.connections.values()):
                self._advance(connection, 0)
        else:
            self.idle = list(self.connections.values())
            for connection in self.idle:
                connection.rest()
        token_s = look_s = time.monotonic()
        while True:
            until_ns = self._send_due() if self.agenda.timed else FOREVER_NS
            if not self.in_flight and not self.agenda.paused and not (self.plan.due_ns and self.agenda.talks):
                self.agenda.end()
                return False
            self._receive(until_ns)
            now_s = time.monotonic()
            if now_s - look_s <= LOOK_S:
                continue
            look_s = now_s
            if self._moves():
                token_s = now_s
            elif now_s - token_s > self.plan.stall_timeout_s:
                self.agenda.rest()
                self._abandon(f"no token on any connection for {self.plan.stall_timeout_s:g} s", lambda _: True)
                return True
            self._abandon(f"not complete after {self.plan.request_timeout_s:g} s", self._is_overdue)
            for connection in self.links.overdue(now_s):
                self._unreachable(connection, TimeoutError("timed out"))

    def _moves(self) -> bool:
        """Return whether a token has come, or a response has ended, since this was asked last, or nobody owes us any.

        Bytes that bring no token are no progress: pings, a head that drips, a body that never ends.
        """
        moves, self.progressed = self.progressed or not self.in_flight, False
        for connection in self.connections.values():
            if connection.exchange is not None:
                moves |= connection.exchange.brought_token(known=moves)
        return moves

    def _receive(self, until_ns: int) -> None:
        """Read what has arrived; else parse, or wait until something arrives, at most `until_ns`."""
        # A few at a time: while one parses, what arrives is not read, and tokens that gather there share a stamp.
        answers = self.answers
        for _ in range(_PARSED_AT_ONCE):
            if answers.unparsed_bytes > _UNPARSED_BYTES:
                answers.parse()
        while answers.unparsed_bytes > _MOST_UNPARSED_BYTES:
            answers.parse()
        if answers.finished and until_ns > _IDLE_NS:
            events = self.epoll.poll(0)
            if not events:
                answers.parse()
        else:
            events = self.links.wait(until_ns)
        for fd, mask in events:
            connection = self.connections.get(fd)
            if connection is None:
                continue
            if connection.dialed_s is not None:
                self._establish(connection)
                continue
            if mask & select.EPOLLOUT and connection.exchange is not None and connection.exchange.unsent:
                self._send(connection, connection.exchange)
            self._read(connection)

    def _read(self, connection: Connection) -> None:
        try:
            # Into one buffer, and out of it what came: a new buffer for each read would leave holes in memory.
            size, ancillary, _, _ = connection.receive(self.buffers, 64)
        except BlockingIOError:
            return
        except OSError as error:
            self._closed(connection, str(error))
            return
        if ancillary:  # nothing else has been asked of the kernel
            seconds, nanoseconds = _UNPACK(ancillary[0][2])
            stamp = seconds * 1_000_000_000 + nanoseconds - self.offset_ns
            self.kernel_stamps += 1
        else:
            stamp = time.monotonic_ns()
            self.clock_stamps += 1
        if not size:
            self._closed(connection, _CLOSED)
            return
        data = bytes(self.buffer[:size])
        if connection.secure:
            try:
                data = connection.secure.decrypted(data)
            except OSError as error:
                self._closed(connection, f"TLS: {error}")
                return
        exchange = connection.exchange
        if exchange is None:
            if data or not connection.secure or connection.secure.closed:
                self._drop_idle(connection)  # bytes that nobody asked for, or an end
            return
        if data:
            self._take(connection, exchange, stamp, data)
        if connection.secure and connection.secure.closed and self.connections.get(connection.fd) is connection:
            self._closed(connection, _CLOSED)

    def _take(self, connection: Connection, exchange: Exchange, stamp: int, data: bytes) -> None:
        exchange.reads.append((stamp, data))
        exchange.received += len(data)
        self.bytes_under_way += len(data)
        if exchange.received > exchange.most or self.bytes_under_way > MOST_BYTES:
            most = MOST_BYTES + self.in_flight * self.longest_bytes
            flood = flood_of(exchange, self.plan, together=self.bytes_under_way, most=most, count=self.in_flight)
            if flood:
                self._lose(connection, flood)
                return
        if exchange.chunked and exchange.chunks is None and data.endswith(b"}\n\n\r\n"):
            return  # an event of a stream: most reads end here
        try:
            complete = exchange.is_complete(data)
        except FloodError as error:
            self._lose(connection, str(error))
            return
        if complete:
            self.progressed = True
            self._finish(connection, None)
            connection.rest(exchange.keep_s)
            # What was not even taken whole leaves a connection of which nobody knows where it stands.
            if exchange.closes or exchange.unsent or connection.is_stale():
                self._replace(connection, stamp)
            else:
                self._advance(connection, stamp)

    def _closed(self, connection: Connection, why: str) -> None:
        exchange = connection.exchange
        if exchange is None:
            self._drop_idle(connection)
            return
        complete = exchange.head and not exchange.chunked and exchange.length is None
        self._lose(connection, None if complete else f"{why} {_MIDDLE if exchange.reads else _NO_ANSWER}")

    def _lose(self, connection: Connection, error: str | None) -> None:
        """End a response that no more comes of, well or not, and go on on another connection."""
        self.progressed = True
        self._finish(connection, error)
        self._replace(connection, time.monotonic_ns())

    def _drop_idle(self, connection: Connection) -> None:
        if connection in self.idle:
            self.idle.remove(connection)
        self.links.drop(connection)

    def _replace(self, connection: Connection, from_ns: int) -> None:
        """Go on with a connection's work on a new one; where none can be made, that work and all that was to follow is lost."""
        queue = connection.queue
        self.links.drop(connection)
        if not self.agenda.follow(queue, from_ns):
            return
        try:
            fresh = self.links.dial()
        except OSError as error:
            self.agenda.lose(deque(queue), f"cannot connect: {error}")
            return
        fresh.queue = queue
        self._begin(fresh, from_ns)

    def _finish(self, connection: Connection, error: str | None) -> None:
        exchange = connection.exchange
        assert exchange is not None
        connection.exchange = None
        if self.in_flight >= self.cap:
            self.freed_ns = exchange.reads[-1][0] if exchange.reads else time.monotonic_ns()
        self.in_flight -= 1
        self.bytes_under_way -= exchange.received
        self.answers.add(exchange, error)

    def _abandon(self, error: str, hopeless: Callable[[Exchange], bool]) -> None:
        for connection in list(self.connections.values()):
            if connection.exchange is not None and hopeless(connection.exchange):
                self._finish(connection, error)
                self.answers.lose(connection.queue, "never sent: the request before it in its conversation failed")
                self._replace(connection, time.monotonic_ns())

    def _is_overdue(self, exchange: Exchange) -> bool:
        return bool(exchange.sent_ns) and time.monotonic_ns() - exchange.sent_ns > self.plan.request_timeout_s * 1e9
