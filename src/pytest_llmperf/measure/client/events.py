"""The events of a completion's stream: what of them is decoded, and what tokens they come to.

Only fields that matter are decoded, and of those that need only be there not even the value: a field that nobody needs must not
break an answer that is sound.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from pytest_llmperf.measure.client.reasons import reason_in, reason_of_body

if TYPE_CHECKING:
    from collections.abc import Sequence

_NOTHING = msgspec.Raw()
"""A field that is not there. Fields of which only that matters are kept as they came: decoding them could fail for no reason."""


class _Message(msgspec.Struct):
    content: Any = None
    reasoning: Any = None
    reasoning_content: Any = None
    refusal: Any = None
    tool_calls: msgspec.Raw = _NOTHING
    function_call: msgspec.Raw = _NOTHING


class _Choice(msgspec.Struct):
    text: Any = None
    delta: _Message | None = None
    message: Any = None
    token_ids: list[int] | None = None
    finish_reason: Any = None
    error: msgspec.Raw = _NOTHING


class _Usage(msgspec.Struct):
    prompt_tokens: int | float | None = None
    completion_tokens: int | float | None = None
    completion_tokens_details: msgspec.Raw = _NOTHING


class _Event(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: msgspec.Raw = _NOTHING
    errors: msgspec.Raw = _NOTHING
    object: msgspec.Raw = _NOTHING
    error_type: msgspec.Raw = _NOTHING
    message: msgspec.Raw = _NOTHING
    detail: msgspec.Raw = _NOTHING


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


@dataclass
class Stream:
    """What a response came to, as far as it could be read."""

    times_s: list[float] = field(default_factory=list)
    """Arrival of each token."""
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    ending: object = None
    """The `finish_reason`."""
    done: bool = False
    """`[DONE]` came, or nothing needs it: the response is no stream."""
    failure: str | None = None
    """Why the server gave up, in its words, or what it sent that is no answer."""
    seen: Seen | None = None
    """What was seen of tokens that only `usage` counts; None where they were counted one by one."""


DECODER = msgspec.json.Decoder(_Event)
_MOST_SHOWN = 2000


def decoded(data: bytes) -> _Event:
    """Return an event; raises DecodeError, with the text, for one that is none."""
    try:
        return DECODER.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as broken:
        shown = reason_of_body(data[:_MOST_SHOWN])
        raise msgspec.DecodeError(f"{broken}: {shown}") from None


def failure_of_text(text: bytes) -> str:
    """Return why a body is no answer that is no stream of events either."""
    try:
        event = DECODER.decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return f"the answer is no stream of events: {reason_of_body(text)}"
    if event.choices and not _error_of(event):
        return "the server answered with one document and not with a stream; add stream=False"
    return f"error in the stream: {reason_of_body(text)}"


class Counter:
    """Counts the tokens of decoded events."""

    def __init__(self, reads: Sequence[tuple[int, bytes]]) -> None:
        """Have counted nothing; `reads` tell when each byte arrived."""
        self.stream = Stream()
        self._read_ends = list(itertools.accumulate(len(piece) for _, piece in reads))
        self._seconds = [stamp / 1e9 for stamp, _ in reads]
        self._read = 0
        self._count = 0
        self._has_ids = False
        self._reported: int | None = None
        self._seen = Seen()

    def take(self, event: _Event, end: int) -> None:
        """Count an event whose last byte is in front of the place `end` on the wire."""
        stream = self.stream
        while self._read_ends[self._read] < end:
            self._read += 1
        if failure := _error_of(event):
            stream.failure = f"error in the stream: {failure}"
            return
        for choice in event.choices or ():
            if choice.token_ids is not None:
                self._has_ids = True
                new = len(choice.token_ids)
            else:
                new = self._see(choice)
            self._count += new
            stream.times_s += [self._seconds[self._read]] * new
            stream.ending = choice.finish_reason or stream.ending
        if event.usage is not None:
            stream.prompt_tokens, self._reported = whole(event.usage.prompt_tokens), whole(event.usage.completion_tokens)
            self._seen.reasoning = _hidden_tokens(event.usage)

    def _see(self, choice: _Choice) -> int:
        """Note what a choice without token ids says; return 1 if that is anything."""
        seen, size = self._seen, _bytes_said(choice)
        if not size:
            seen.silent += 1
            return 0
        seen.pieces += 1
        seen.text_bytes += size
        return 1

    def result(self) -> Stream:
        """Return the stream with its counts."""
        stream, reported = self.stream, self._reported
        if stream.failure:
            return stream
        if self._has_ids and reported is not None and reported != self._count:
            stream.failure = f"usage says {reported} tokens, the stream held {self._count}"
        stream.output_tokens = reported if reported is not None else self._count if self._has_ids else None
        stream.seen = None if self._has_ids else self._seen
        # A proxy may take [DONE] for its own: reason and usage say as much.
        stream.done |= bool(stream.ending) and reported is not None
        return stream


def _error_of(event: _Event) -> str | None:
    """Return the words of an error in an event, None for an event without.

    That a field named `error` is there means nothing: some servers send it in every event, as null, false or empty.
    """
    inside = [choice.error for choice in event.choices or ()]
    for raw in (event.error, event.errors, *inside):
        if _tells(value := _value(raw)):
            return reason_in(value)
    if event.choices or event.usage:
        return None
    flat = [value for raw in (event.message, event.detail) if (value := _value(raw))]
    if flat or _value(event.object) == "error" or _value(event.error_type):
        return reason_in(flat or _value(event.error_type) or "no reason given")
    return None


def _value(raw: msgspec.Raw) -> Any:
    return msgspec.json.decode(raw) if bytes(raw) else None


def _tells(value: Any) -> bool:
    """Return whether a field says anything at all: `{"message": "", "code": null}` says as little as false."""
    if isinstance(value, dict):
        return any(map(_tells, value.values()))
    return any(map(_tells, value)) if isinstance(value, list) else bool(value)


def whole(number: float | None) -> int | None:
    """Return a count; None for what is none."""
    return int(number) if number is not None and number >= 0 and number == int(number) else None


def _bytes_said(choice: _Choice) -> int:
    """Return how many bytes of text a choice brings; of calls and parts their JSON."""
    size = _size_of(choice.text)
    if choice.delta is not None:
        said = choice.delta
        # Some servers have the same reasoning under both names.
        size += _size_of(said.content) + max(_size_of(said.reasoning), _size_of(said.reasoning_content)) + _size_of(said.refusal)
        size += sum(len(bytes(raw)) for raw in (said.tool_calls, said.function_call) if _value(raw))
    if isinstance(choice.message, dict):
        size += sum(_size_of(value) for name, value in choice.message.items() if name != "role")
    return size


def _size_of(said: Any) -> int:
    if isinstance(said, str):
        return len(said) if said.isascii() else len(said.encode(errors="replace"))
    return len(msgspec.json.encode(said)) if said else 0


def _hidden_tokens(usage: _Usage) -> int:
    """Return how many tokens a server says that it has kept to itself."""
    details = _value(usage.completion_tokens_details)
    hidden = details.get("reasoning_tokens") if isinstance(details, dict) else None
    return hidden if isinstance(hidden, int) and hidden > 0 else 0


# What a server claims where its `usage` is all that counts its tokens. With ids they are counted one by one. Without, what can be
# seen is text: a token has at least a byte of it, unless it is one of the few that are never shown, and a piece of text has at
# least one token. Nothing more is certain: speculative decoding, proxies and intervals between events put many tokens into a
# piece, and some tokens decode to nothing.

_SPLIT = 2
"""A token's text may come in two pieces where a parser cuts it (reasoning from answer, a call's name from its arguments), and
what was held back for a stop sequence comes at the end. That pieces are alike says nothing: engines under load often say the
same word for ever."""
_MOST_HIDDEN = 16
"""Tokens that are part of a format, such as those around reasoning and calls, and the end of the text: none of them is shown."""


_PAST_THE_END = 2
"""A model that may not end often says the mark of its end again and again, which is not shown: so many times as many tokens as
the text could have are believed then."""


def doubt_of(claimed: int, seen: Seen, *, stream: bool = True, exact: bool = False) -> str | None:
    """Return why an answer cannot have had as many tokens as its `usage` claims; None where it can.

    `exact`: it may not end by itself, and goes on behind what the model takes for the end.
    """
    if stream and seen.pieces > claimed + _SPLIT + claimed // 32:
        return f"usage says {claimed:,} tokens, the stream held {seen.pieces:,} pieces of text"
    brought = seen.text_bytes + seen.reasoning + (seen.silent if stream else 0)
    if not stream and brought:
        return None  # of a document nothing tells how many tokens have no text
    most = brought * (_PAST_THE_END if exact else 1)
    hidden = min(_MOST_HIDDEN, _SPLIT + claimed // 8) if seen.text_bytes else _SPLIT
    if claimed > most + hidden:
        pieces = f"{seen.pieces:,} pieces of text with " if stream else ""
        return (
            f"usage says {claimed:,} tokens, what came has {pieces}{seen.text_bytes:,} bytes of text: no token has less than one;"
            ' where it has many that are not shown, ask for them: extra_body={"skip_special_tokens": False}'
        )
    return None
