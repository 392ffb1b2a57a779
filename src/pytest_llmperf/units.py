"""Quantities as people write them: read and written here, and nowhere else."""

from __future__ import annotations

import math
import re

GIB = 1 << 30


def quantity(value: float | None, unit: str) -> str:
    """Return a value with its unit, e.g. `8,242 tokens/s`, `12.3 ms`; `-` where there is none."""
    if value is None:
        return "-"
    if unit == "s":
        return f"{value * 1e3:.3g} ms" if abs(value) < 1 else f"{value:.3g} s"
    if unit == "index":
        return f"{value:.3f}"
    if unit == "bytes":
        return gib(value, 2)
    if unit == "share":
        return f"{value:.1%}"
    if value == 1:
        return f"1 {_SINGULAR.sub('', unit)}"
    return f"{value:,.0f} {unit}" if abs(value) >= 100 or float(value).is_integer() else f"{value:.3g} {unit}"


_SINGULAR = re.compile(r"(?<=[a-z]{3})s(?=/|$)")
"""The s of a plural that is a unit, e.g. `requests` and `tokens/s`."""


def counted(number: int, noun: str) -> str:
    """Return a number with what it counts, e.g. `1 launch`, `2 launches`, `1,024 requests`."""
    plural = "" if number == 1 else "es" if noun.endswith(("ch", "sh", "s", "x")) else "s"
    return f"{number:,} {noun}{plural}"


def percent(share: float, *, up: bool = False) -> str:
    """Return a fraction in percent with the digits that matter, e.g. `5 %`, `7.4 %`; whole and rounded up if `up`."""
    return f"{math.ceil(100 * share - 1e-9)} %" if up else f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def signed_percent(share: float) -> str:
    """Return a fraction in percent with its sign, e.g. `+4.1%`."""
    return f"{share:+.1%}"


def parse_share(text: str) -> float:
    """Return a share such as `0.05` or `5 %` as a fraction; raises ValueError for what is no number."""
    return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)


_SIZES = {"": GIB, "gib": GIB, "mib": 1 << 20, "tib": 1 << 40, "gb": 10**9, "mb": 10**6, "tb": 10**12}


def parse_size(value: object) -> int | None:
    """Return a size such as `80` (GiB), `80 GiB` or `80GB` in bytes; None for what is no size above 0.

    Sizes as sold are in GB (10^9 bytes), and a little below that in what the driver tells: an "80 GB" H100 has 79.6 GiB.
    """
    written = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,12})?)\s*([a-z]*)", str(value).strip().lower())
    if written is None or written[2] not in _SIZES or isinstance(value, bool):
        return None
    return round(float(written[1]) * _SIZES[written[2]]) or None


_SECONDS = {"": 1, "s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600}


def parse_duration(text: str) -> float:
    """Return a time such as `90`, `90s`, `30m` or `1.5 h` in seconds; raises ValueError for what is no time above 0."""
    written = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*([a-z]*)", text.strip().lower())
    if written is None or written[2] not in _SECONDS or not float(written[1]):
        raise ValueError(f"{text!r} is no time")
    return float(written[1]) * _SECONDS[written[2]]


def duration(seconds: float) -> str:
    """Return a time as people say it, e.g. `90 s`, `30 min`, `1.5 h`."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size or seconds == size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def gib(size: float, digits: int = 1) -> str:
    """Return bytes in GiB, e.g. `79.6 GiB`."""
    return f"{size / GIB:.{digits}f} GiB"


_UNPRINTABLE = re.compile(
    "[^\\t\\n -~\u00a0-\U0010ffff]"  # orders to a terminal
    "|[\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"  # turn or hide what is beside them
    "|[\ud800-\udfff\ufffe\uffff]"  # forbidden in XML
)


def printable(text: str) -> str:
    """Return text of others as it may be shown: what is no character to be seen is written as in Python, e.g. `\\x1b`."""
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)
