"""The frame around a response's body: its head, and HTTP chunks (RFC 9112), with limits for what may be endless."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

MOST_HEAD_BYTES = 64 << 10
"""The longest head, interim responses (1xx) included, and the longest trailer; servers and proxies allow 8 to 32 KiB."""
_MOST_SIZE_BYTES = 4 << 10
"""The longest line with a chunk's size: a few digits, and extensions that hardly anybody sends."""


def headers_of(head: bytes) -> dict[str, str]:
    """Return the headers of a response's head, their names in lower case."""
    pairs = (line.partition(b":") for line in head.split(b"\r\n")[1:])
    return {name.strip().lower().decode("latin-1"): value.strip().decode("latin-1") for name, _, value in pairs}


def is_chunked(head: bytes) -> bool:
    """Return whether a response's head says that its body comes in chunks."""
    return re.search(rb"^transfer-encoding:[ \t]*chunked[ \t]*\r?$", head, re.I | re.M) is not None


def closes_behind(head: bytes) -> bool:
    """Return whether a response's head says that the server closes the connection behind it, which HTTP/1.0 does unasked."""
    said = re.search(rb"^connection:([^\r\n]*)", head, re.I | re.M)
    options = [option.strip() for option in said[1].lower().split(b",")] if said else []
    return b"close" in options or (head.startswith(b"HTTP/1.0 ") and b"keep-alive" not in options)


def keep_alive_s(head: bytes) -> float | None:
    """Return for how long a server keeps a connection that rests, where it tells (`Keep-Alive: timeout=5`)."""
    said = re.search(rb"^keep-alive:[^\r\n]*?\btimeout=(\d{1,9})", head, re.I | re.M)
    return float(said[1]) if said else None


class FloodError(Exception):
    """A part of a response is longer than any that is sound."""


class Chunks:
    """Follows a chunked body to its end, and keeps nothing of it but a line that has not ended."""

    __slots__ = ("_in_trailer", "_line", "_missing", "_trailer_bytes")

    def __init__(self) -> None:
        """Stand in front of the first chunk."""
        self._line = b""
        self._missing = 0
        """Bytes of the present chunk, and of the end of line behind it, that have not come."""
        self._in_trailer = False
        self._trailer_bytes = 0

    def take(self, data: bytes) -> bool:
        """Return whether the last chunk, and the trailer behind it, have ended with these bytes.

        A size that is none ends the body too: what follows cannot be read, and the parser says so. Raises FloodError.
        """
        start = min(self._missing, len(data))
        self._missing -= start
        while start < len(data):
            end = data.find(b"\n", start)
            if end < 0:
                self._line += data[start:]
                self._check_line()
                return False
            line, start, self._line = self._line + data[start : end + 1], end + 1, b""
            if self._in_trailer:
                self._trailer_bytes += len(line)
                self._check_line()
                if not line.strip(b"\r\n"):
                    return True
                continue
            size = _size(line) if line.endswith(b"\r\n") else None
            if size is None:
                return True
            self._in_trailer = not size
            self._missing = size + 2 if size else 0
            skipped = min(self._missing, len(data) - start)
            self._missing -= skipped
            start += skipped
        return False

    def _check_line(self) -> None:
        if self._in_trailer and self._trailer_bytes + len(self._line) > MOST_HEAD_BYTES:
            raise FloodError(f"the trailer of the answer is longer than {MOST_HEAD_BYTES:,} bytes")
        if not self._in_trailer and len(self._line) > _MOST_SIZE_BYTES:
            raise FloodError(f"the line with a chunk's size is longer than {_MOST_SIZE_BYTES:,} bytes")


def _size(line: bytes) -> int | None:
    try:
        size = int(line.split(b";")[0], 16)
    except ValueError:
        return None
    return size if size >= 0 else None


def payload(wire: bytes, start: int, *, chunked: bool) -> Iterator[tuple[int, bytes]]:
    """Yield (offset on the wire, bytes) of the response's body, with the chunk framing taken off."""
    if not chunked:
        yield start, wire[start:]
        return
    while (line_end := wire.find(b"\r\n", start)) >= 0:
        size = _size(wire[start:line_end])
        start = line_end + 2
        if not size:
            return
        yield start, wire[start : start + size]
        start += size + 2
