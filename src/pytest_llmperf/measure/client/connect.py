"""The connections of a round: made before it begins, or while others are served, and read through one epoll.

The kernel is asked to stamp what arrives (SO_TIMESTAMPNS): its stamp does not depend on when this process ran.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import ssl
import time
from typing import TYPE_CHECKING, Any

from pytest_llmperf.measure.client.exchange import Connection, Tls

if TYPE_CHECKING:
    from pytest_llmperf.measure.client.messages import RoundPlan

_SO_TIMESTAMPNS = 35  # asm-generic/socket.h; Python's socket module does not name it
_CONNECT_TIMEOUT_S = 10.0
_READ_BYTES = 1 << 16
_NAP_S = 200e-6
"""Where reads come in quicker succession than this, they are let gather for as long: a wake costs more than a read, and the
kernel has stamped each arrival by then. The shortest gaps between an engine's tokens are ten times as long."""
LOOK_S = 0.25
"""The longest wait for anything to arrive; time-outs are looked at as often."""
_CLOSED = "the server closed the connection during the TLS handshake"


class Connections:
    """What is connected to one server, or on its way to be."""

    def __init__(self, plan: RoundPlan) -> None:
        """Note the server; nothing is connected yet."""
        self.epoll = select.epoll()
        self.open: dict[int, Connection] = {}
        """By file descriptor, those that are being made too."""
        self._server = plan.host, plan.port
        self.waited_s = 1.0
        self._tls = ssl.create_default_context() if plan.tls else None
        self._address: tuple[socket.AddressFamily, Any] | None = None
        self._most_s = max(_CONNECT_TIMEOUT_S, plan.stall_timeout_s)
        self._until_s: float | None = None
        """When all connections that are made before a round must be there, from the first of them on."""

    def connect(self) -> Connection:
        """Return a connection that is made now, before the round begins, or raise OSError."""
        begun_s = time.monotonic()
        self._until_s = self._until_s or begun_s + self._most_s
        until_s = min(begun_s + _CONNECT_TIMEOUT_S, self._until_s)
        raw = socket.create_connection(self._server, timeout=_left_s(until_s))
        try:
            self._address = raw.family, raw.getpeername()
            secure = self._secured()
            if secure:
                out, done = secure.shake_hands(b"")
                while not done:
                    raw.sendall(out)
                    raw.settimeout(_left_s(until_s))
                    data = raw.recv(_READ_BYTES)
                    if not data:
                        raise ConnectionError(_CLOSED)
                    out, done = secure.shake_hands(data)
                raw.sendall(out)
        except BaseException:
            raw.close()
            raise
        return self._added(Connection(raw, secure), select.EPOLLIN)

    def dial(self) -> Connection:
        """Return a connection that is being made, while others are served; it sends when it is usable."""
        assert self._address is not None  # the round began with a connection
        family, address = self._address
        raw = socket.socket(family, socket.SOCK_STREAM)
        raw.setblocking(False)
        code = raw.connect_ex(address)
        if code not in (0, errno.EINPROGRESS):
            raw.close()
            raise OSError(code, os.strerror(code))
        connection = Connection(raw, self._secured(), dialed_s=time.monotonic())
        return self._added(connection, select.EPOLLIN | select.EPOLLOUT)

    def establish(self, connection: Connection) -> bool:
        """Go on with making a connection; return whether it is usable now, or raise OSError."""
        if code := connection.raw.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(code, os.strerror(code))
        if connection.secure:
            data = b""
            with contextlib.suppress(BlockingIOError):
                data = connection.raw.recv(_READ_BYTES)
                if not data:
                    raise ConnectionError(_CLOSED)
            out, done = connection.secure.shake_hands(data)
            # A few hundred bytes on a connection that has carried nothing yet: the kernel takes them.
            if out:
                connection.raw.send(out)
            if not done:
                self.epoll.modify(connection.fd, select.EPOLLIN)
                return False
        connection.dialed_s = None
        self.epoll.modify(connection.fd, select.EPOLLIN)
        return True

    def wait(self, until_ns: int) -> list[tuple[int, int]]:
        """Return (file descriptor, events) of what has happened, at the latest after so long."""
        if self.waited_s < _NAP_S < until_ns / 1e9:
            time.sleep(_NAP_S)
        began_s = time.monotonic()
        wait_s = min(until_ns / 1e9, LOOK_S)
        if wait_s < LOOK_S:
            # epoll's time-out is whole milliseconds, and rounds up; an epoll can itself be waited for, to the microsecond.
            select.select([self.epoll.fileno()], [], [], wait_s)
            wait_s = 0
        events = self.epoll.poll(wait_s)
        self.waited_s = time.monotonic() - began_s
        return events

    def overdue(self, now_s: float) -> list[Connection]:
        """Return those that are being made for too long."""
        return [each for each in self.open.values() if each.dialed_s and now_s - each.dialed_s > _CONNECT_TIMEOUT_S]

    def drop(self, connection: Connection) -> None:
        """Close a connection, in whatever state it is."""
        del self.open[connection.fd]
        connection.raw.close()

    def close(self) -> None:
        """Close all of them."""
        for connection in list(self.open.values()):
            self.drop(connection)
        self.epoll.close()

    def _secured(self) -> Tls | None:
        return Tls(self._tls, self._server[0]) if self._tls else None

    def _added(self, connection: Connection, mask: int) -> Connection:
        connection.raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.raw.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        connection.raw.setblocking(False)
        self.epoll.register(connection.fd, mask)
        self.open[connection.fd] = connection
        return connection


def _left_s(until_s: float) -> float:
    """Return the seconds until then; raises TimeoutError where it has passed."""
    if (left_s := until_s - time.monotonic()) <= 0:
        raise TimeoutError("timed out")
    return left_s
