"""The ground of a plan: its error, and the checks of numbers that every field shares."""

from __future__ import annotations

import math
import re

from pytest_llmperf.units import parse_share


class PlanError(ValueError):
    """A value in a plan is unusable. The message names the field, the value and the remedy."""


def degree(name: str, value: object) -> int:
    """Return a parallel degree, concurrency or count as an int >= 1, or raise PlanError naming `name`."""
    text = str(value).strip()
    if isinstance(value, bool) or not re.fullmatch(r"[+-]?\d+", text):
        raise PlanError(f"{name}={value!r}: must be a whole number such as 1, 2 or 4")
    number = int(text)
    if number < 1:
        hint = "; 1 means no parallelism" if name.rpartition("-")[2] in ("tp", "pp", "dp") else ""
        raise PlanError(f"{name}={value}: the smallest value is 1{hint}")
    return number


def parse_fraction(name: str, value: object) -> float:
    """Return a share such as `0.05` or `"5 %"` as a fraction above 0 and below 1, or raise PlanError naming `name`."""
    try:
        number = parse_share(str(value).strip())
    except ValueError:
        number = -1.0
    if not 0 < number < 1:
        raise PlanError(f"{name}={value!r}: must be a share between 0 and 1, e.g. 0.05 or '5 %'")
    return number


def parse_positive(name: str, value: object) -> float:
    """Return a finite number above 0, or raise PlanError naming `name`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise PlanError(f"{name}={value!r}: must be a number above 0")
    return float(value)


def parse_switch(name: str, value: object) -> bool:
    """Return True or False, and raise PlanError naming `name` for what only looks like it."""
    if not isinstance(value, bool):
        raise PlanError(f"{name}={value!r}: must be True or False")
    return value


def parse_whole(name: str, value: object) -> int:
    """Return a whole number, 0 or more, or raise PlanError naming `name`."""
    text = str(value).strip()
    if isinstance(value, bool) or not re.fullmatch(r"[+]?[0-9]+", text):
        raise PlanError(f"{name}={value!r}: must be a whole number, 0 or more")
    return int(text)
