"""One HTTP/1.1 connection of the simulated engine: which bytes are a request, and whose turn it is.

asyncio.Protocol rather than streams, and one write per token: the test double must not be the bottleneck of the client
that it tests.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from pytest_llmperf.testing import wire

if TYPE_CHECKING:
    from collections.abc import Callable


class Connection(asyncio.Protocol):
    """One client connection: requests in, one after another, and the bytes of their answers out."""

    def __init__(self, answer: Callable[[Connection, wire.HttpRequest], None], others: set[Connection]) -> None:
        """Give each request to `answer`; `others` holds this connection while it is open."""
        self._answer = answer
        self._others = others
        self._buffer = bytearray()
        self._request: wire.HttpRequest | None = None
        self._cancel: Callable[[], None] | None = None
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._others.add(self)

    def data_received(self, data: bytes) -> None:
        """Answer the next request, once it is complete."""
        self._buffer += data
        self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the generation under way: its client has left."""
        self._others.discard(self)
        if self._cancel:
            self._cancel()

    def write(self, data: bytes) -> None:
        """Write a part of the answer."""
        self._transport.write(data)

    def close(self, *, abort: bool = False) -> None:
        """Close the connection, after what was written has left; with `abort` at once."""
        (self._transport.abort if abort else self._transport.close)()

    def began(self, cancel: Callable[[], None]) -> None:
        """Keep what stops the answer under way when the client leaves."""
        self._cancel = cancel

    def finish(self, data: bytes) -> None:
        """Write the end of the answer and go on with what the client sent meanwhile."""
        self._transport.write(data)
        request, self._request, self._cancel = self._request, None, None
        if request is not None and not request.keep_alive:
            self._transport.close()
        else:
            # Not directly: a client that pipelines a thousand requests must not nest a thousand calls.
            asyncio.get_running_loop().call_soon(self._next)

    def _next(self) -> None:
        if self._request is not None or self._transport.is_closing():
            return
        try:
            self._request = wire.take_request(self._buffer)
        except wire.RefusedError as refused:
            self._transport.write(refused.response)
            self._transport.close()
            return
        if self._request is not None:
            self._answer(self, self._request)
