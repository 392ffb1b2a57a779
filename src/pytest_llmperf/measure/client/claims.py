"""Can the tokens that a server claims be those that came? Asked where its `usage` is all that counts them.

With token ids they are counted one by one. Without, what can be seen is text: a token has at least a byte of it, unless it is
one of the few that are never shown, and a piece of text has at least one token. Nothing more is certain: speculative decoding,
proxies and intervals between events put many tokens into a piece, and some tokens decode to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

_SPLIT = 2
"""A token's text may come in two pieces where a parser cuts it (reasoning from answer, a call's name from its arguments), and
what was held back for a stop sequence comes at the end. That pieces are alike says nothing: engines under load often say the
same word for ever."""
_MOST_HIDDEN = 16
"""Tokens that are part of a format, such as those around reasoning and calls, and the end of the text: none of them is shown."""


@dataclass(slots=True)
class Seen:
    """What an answer without token ids has shown."""

    pieces: int = 0
    """Events with text."""
    silent: int = 0
    """Events with a choice that says nothing: a token may decode to no text, or to a part of a character."""
    text_bytes: int = 0
    """In UTF-8, of which a token has at least one."""
    reasoning: int = 0
    """Tokens of which the server says that it has kept them to itself (`reasoning_tokens`)."""


def doubt_of(claimed: int, seen: Seen, *, stream: bool = True) -> str | None:
    """Return why an answer cannot have had as many tokens as its `usage` claims; None where it can."""
    if stream and seen.pieces > claimed + _SPLIT + claimed // 32:
        return f"usage says {claimed:,} tokens, the stream held {seen.pieces:,} pieces of text"
    most = seen.text_bytes + seen.silent + seen.reasoning
    hidden = min(_MOST_HIDDEN, _SPLIT + claimed // 8) if seen.text_bytes else _SPLIT
    if claimed > most + hidden:
        pieces = f"{seen.pieces:,} pieces of text with " if stream else ""
        return (
            f"usage says {claimed:,} tokens, what came has {pieces}{seen.text_bytes:,} bytes of text: no token has less than one"
        )
    return None
