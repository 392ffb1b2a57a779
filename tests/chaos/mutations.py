"""Mutations of real inputs: bytes, words, numbers, and the values of JSON."""

from __future__ import annotations

import contextlib
import json
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

_NUMBERS = (
    b"-1", b"0", b"-0.0", b"1", b"0.5", b"1e308", b"-1e308", b"1e400", b"1e-320", b"NaN", b"nan", b"+Inf", b"-Inf", b"inf",
    b"Infinity", b"9" * 16, b"9" * 30, b"9" * 400, b"9" * 5000, b"0x10", b"1_000", b"1,5", "\u0663".encode(), b"true", b"null",
    b"",
)  # fmt: skip
_ODD = (
    *_NUMBERS, b"\0", b"\n", b"\r", b"\r\n", b"\n\n", b"\r\n\r\n", b"\xff\xfe", b"\xef\xbb\xbf", b"\x1b[31m", b"\xed\xa0\x80",
    b"-", b"{}", b"[]", b"[[", b"[" * 3000, b'{"a":' * 300, b'""', b'"', b"'", b"\\", b"\\u0000", b"\\ud800", b"#", b"=", b":",
    b",", b"%", b"{", b"}", b"data: ", b"event: error", b"HTTP/1.1 100 \r\n\r\n", b"transfer-encoding: chunked\r\n",
    b"content-length: 5", b"0\r\n\r\n", b"ffffffff\r\n", b"..", b"/", b"~", b"~nobody/x", b"file(", b"\xc2\xa0", b"\xc2\xb2",
    "\u017f".encode(),
)  # fmt: skip
"""What readers have stumbled over: ends of lines, numbers that are none, digits of other scripts, depths, half characters."""
_KEYS = (
    "a/b/ttft_p50_s", "/ttft_p50_s", "short/ttft_p50_s", "short/nothing", "vllm:x_total", "ttft_p99.999_s", "", "timestamp",
    "version",
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 0.5, -0.0, 5e-324, 1e308, -1e308, math.inf, math.nan, 10**30, 10**400, "", "x", "1",
    "a/b/ttft_p50_s", "\x1b[31m", "\0", "\ud800", [], {}, [None], [[]], {"a": {}}, [1, "a"], {"": 0},
)  # fmt: skip


def mutated(data: bytes, other: bytes, chance: random.Random, *, most: int = 4) -> bytes:
    """Return data with a few changes: bits flipped, pieces cut out, doubled, put in, or taken from another input.

    Of JSON it is most often the values that change, because what is no JSON is refused before anything else is looked at.
    """
    for _ in range(chance.randint(1, most)):
        if chance.random() < 0.6 and (changed := _other_json(data, chance)) is not None:
            data = changed
        else:
            data = _other_bytes(data, other, chance)
    return data


def _other_bytes(data: bytes, other: bytes, chance: random.Random) -> bytes:
    start, end = sorted(chance.choices(range(len(data) + 1), k=2))
    end = min(end, start + chance.choice((1, 2, 8, 64)))
    match chance.randrange(8):
        case 0 if data:
            place = min(start, len(data) - 1)
            return data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]
        case 1:
            return data[:start] + data[end:]
        case 2:
            return data[:end] + data[start:end] * chance.choice((1, 1, 2, 50)) + data[end:]
        case 3:
            return data[:start] + chance.choice(_ODD) + data[end:]
        case 4:
            begin = chance.randrange(len(other) + 1)
            return data[:start] + other[begin : begin + chance.choice((8, 64, 4096))] + data[end:]
        case 5:
            return _other_word(data, b' \n",:={}[]()', chance.choice(_ODD), chance)
        case 6:
            return _other_word(data, b" \n", chance.choice(_NUMBERS), chance)
    return data[:start] + chance.choice(_ODD) + data[start:]


def _other_word(data: bytes, ends: bytes, word: bytes, chance: random.Random) -> bytes:
    """Return data in which a word between two such ends is another one."""
    places = [place for place, byte in enumerate(data) if byte in ends]
    if len(places) < 2:
        return data
    number = chance.randrange(len(places) - 1)
    return data[: places[number] + 1] + word + data[places[number + 1] :]


def _other_json(data: bytes, chance: random.Random) -> bytes | None:
    """Return a JSON document, or lines of which one is JSON, with another value, key or entry; None for what is none."""
    whole = data.strip().startswith((b"{\n", b"["))
    lines = [data] if whole else data.split(b"\n")
    number = chance.randrange(len(lines))
    try:
        value = json.loads(lines[number])
    except (ValueError, RecursionError):
        return None
    places = list(_places(value))
    if not places:
        return None
    holder, key = chance.choice(places)
    match chance.randrange(5):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, list):
            holder[key:key] = [holder[key]] * chance.choice((1, 1, 50))
        case 1:
            holder[chance.choice((f"{key}x", *_KEYS))] = holder.pop(key)
        case 2:
            other, name = chance.choice(places)
            with contextlib.suppress(IndexError, KeyError):
                holder[key] = json.loads(json.dumps(other[name]))
        case _:
            holder[key] = chance.choice(_VALUES)
    try:
        lines[number] = json.dumps(value, indent=1 if whole else None).encode()
    except (ValueError, RecursionError):  # it holds itself, or a number of too many digits
        return None
    return b"\n".join(lines)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield value, key
        yield from _places(inner)
