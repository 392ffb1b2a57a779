"""The frame around a response's body: its head, and HTTP chunks (RFC 9112)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def headers_of(head: bytes) -> dict[str, str]:
    """Return the headers of a response's head, their names in lower case."""
    pairs = (line.partition(b":") for line in head.split(b"\r\n")[1:])
    return {name.strip().lower().decode("latin-1"): value.strip().decode("latin-1") for name, _, value in pairs}


def is_chunked(head: bytes) -> bool:
    """Return whether a response's head says that its body comes in chunks."""
    return re.search(rb"^transfer-encoding:[ \t]*chunked[ \t]*\r?$", head, re.I | re.M) is not None


def skip_chunks(body: bytes) -> tuple[bytes, bool]:
    """Return what is left of a body behind its whole chunks, and whether the last one was among them, with its trailer."""
    start = 0
    while (line_end := body.find(b"\r\n", start)) >= 0:
        size = _size(body[start:line_end])
        if size is None:
            return b"", True  # what follows cannot be read; the parser says so
        if size == 0:
            ended = body.startswith(b"\r\n", line_end + 2) or body.find(b"\r\n\r\n", line_end + 2) >= 0
            return body[start:], ended
        if len(body) < line_end + 2 + size + 2:
            break
        start = line_end + 2 + size + 2
    return body[start:], False


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
