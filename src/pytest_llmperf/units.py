"""Quantities as people write them: read and written here, and nowhere else."""

from __future__ import annotations

import math

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
        return f"{value / GIB:.2f} GiB"
    if unit == "share":
        return f"{value:.1%}"
    return f"{value:,.0f} {unit}" if abs(value) >= 100 or value == int(value) else f"{value:.3g} {unit}"


def percent(share: float, *, up: bool = False) -> str:
    """Return a fraction in percent with the digits that matter, e.g. `5 %`, `7.4 %`; whole and rounded up if `up`."""
    return f"{math.ceil(100 * share - 1e-9)} %" if up else f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def gib(size: float, digits: int = 1) -> str:
    """Return bytes in GiB, e.g. `79.6 GiB`."""
    return f"{size / GIB:.{digits}f} GiB"
