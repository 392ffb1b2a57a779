"""The ground of a plan: its error, and the checks of numbers that every field shares."""

from __future__ import annotations

import math
import numbers
import re

from pytest_llmperf.units import parse_share

MOST_SHOWN = 160
"""Characters of a value that an error shows."""
MOST = 10**9
"""No count is larger: requests, tokens, devices."""
SMALLEST, LARGEST = 1e-9, 1e9
"""No time, rate or weight is beyond: what is reckoned with them would be infinite, or nothing."""


class PlanError(ValueError):
    """A value in a plan is unusable. The message names the field, the value and the remedy."""


def representation(value: object) -> str:
    """Return a value's `repr`, or what it is where that raises: an integer of 5,000 digits, lists in lists, a broken class."""
    try:
        return repr(value)
    except Exception:
        return f"<{type(value).__name__} that cannot be shown>"


def brief(value: object, most: int = MOST_SHOWN) -> str:
    """Return a value as an error shows it: short, and marked as text where it is."""
    return cut(representation(value), most)


def cut(text: str, most: int = MOST_SHOWN) -> str:
    """Return the beginning of a text that is too long."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def written(value: object) -> str:
    """Return a text without the blanks around it, or a number as it is written; empty for everything else."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool) or not isinstance(value, numbers.Number):
        return ""
    try:
        return str(value)
    except ValueError:  # an integer of more digits than Python writes
        return ""


def degree(name: str, value: object) -> int:
    """Return a parallel degree, concurrency or count as an int >= 1, or raise PlanError naming `name`."""
    text = written(value)
    if not re.fullmatch(r"[+-]?[0-9]+", text):
        raise PlanError(f"{name}={brief(value)}: must be a whole number such as 1, 2 or 4")
    digits = text.lstrip("+-0") or "0"
    if len(digits) > len(str(MOST)) or int(digits) > MOST:
        raise PlanError(f"{name}={cut(text)}: must be a whole number of {MOST:,} at most")
    number = -int(digits) if text.startswith("-") else int(digits)
    if number < 1:
        hint = "; 1 means no parallelism" if name.rpartition("-")[2] in ("tp", "pp", "dp") else ""
        raise PlanError(f"{name}={text}: the smallest value is 1{hint}")
    return number


def parse_fraction(name: str, value: object) -> float:
    """Return a share such as `0.05` or `"5 %"` as a fraction above 0 and below 1, or raise PlanError naming `name`."""
    try:
        number = parse_share(written(value))
    except ValueError:
        number = -1.0
    if not 0 < number < 1:
        raise PlanError(f"{name}={brief(value)}: must be a share between 0 and 1, e.g. 0.05 or '5 %'")
    return number


def parse_positive(name: str, value: object) -> float:
    """Return a number above 0, neither too small nor too large to reckon with, or raise PlanError naming `name`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise PlanError(f"{name}={brief(value)}: must be a number above 0")
    if not SMALLEST <= value <= LARGEST:
        raise PlanError(f"{name}={brief(value)}: must be a number from {SMALLEST:g} to {LARGEST:g}")
    return float(value)


def parse_switch(name: str, value: object) -> bool:
    """Return True or False, and raise PlanError naming `name` for what only looks like it."""
    if not isinstance(value, bool):
        raise PlanError(f"{name}={brief(value)}: must be True or False")
    return value


def parse_whole(name: str, value: object) -> int:
    """Return a whole number, 0 or more, or raise PlanError naming `name`."""
    text = written(value)
    if not re.fullmatch(r"[+]?[0-9]{1,20}", text):  # seeds have 64 bits
        raise PlanError(f"{name}={brief(value)}: must be a whole number, 0 or more, of 20 digits at most")
    return int(text)
