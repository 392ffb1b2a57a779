"""Lengths of prompts and answers: a number of tokens, or a distribution of them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_llmperf.plan.checks import PlanError, degree
from pytest_llmperf.plan.datasets import File, parse_file, read_lengths

if TYPE_CHECKING:
    from pathlib import Path

_CALL = re.compile(r"(\w+)\(\s*(.*?)\s*\)")
_LENGTHS = (
    "must be a number of tokens, or uniform(LOW, HIGH), lognormal(MEAN, SIGMA[, MAX]) or file(PATH), with lengths of 1 or more"
)


@dataclass(frozen=True)
class Lengths:
    """A distribution of token counts: `uniform(low, high)`, `lognormal(mean, sigma[, max])` or `file(path)`, one per line."""

    kind: str
    numbers: tuple[float, ...] = ()
    file: File | None = None

    @property
    def mean(self) -> float:
        """Return the mean number of tokens, before a lognormal's tail is cut."""
        return self.numbers[0] if self.kind == "lognormal" else sum(self.numbers) / len(self.numbers)

    def __str__(self) -> str:
        """Return it as it is written in a test."""
        shown = [str(self.file)] if self.file else [f"{number:g}" for number in self.numbers]
        return f"{self.kind}({', '.join(shown)})"


def parse_lengths(name: str, value: object, folder: Path) -> int | Lengths:
    """Return a number of tokens, or a distribution of them; raises PlanError naming `name`."""
    if isinstance(value, Lengths):
        return value
    call = _CALL.fullmatch(str(value).strip())
    if not call:
        if isinstance(value, str) and not re.fullmatch(r"\s*[+-]?\d+\s*", value):
            raise PlanError(f"{name}={value!r}: {_LENGTHS}")
        return degree(name, value)
    kind, inside = call.groups()
    if kind == "file":
        file = parse_file(name, inside.strip("'\""), folder)
        return Lengths("file", tuple(map(float, read_lengths(file))), file)
    try:
        numbers = tuple(float(word) for word in inside.split(","))
    except ValueError:
        numbers = ()
    integers = all(number == int(number) for number in numbers if math.isfinite(number))
    uniform = kind == "uniform" and len(numbers) == 2 and integers and 1 <= numbers[0] <= numbers[1]
    lognormal = kind == "lognormal" and len(numbers) in (2, 3) and numbers[0] >= 1 and numbers[1] > 0
    if not all(map(math.isfinite, numbers)) or not (uniform or (lognormal and numbers[2:] >= (1,) * len(numbers[2:]))):
        raise PlanError(f"{name}={value!r}: {_LENGTHS}")
    return Lengths(kind, numbers)


def mean_length(lengths: int | Lengths) -> float:
    """Return the mean number of tokens."""
    return lengths.mean if isinstance(lengths, Lengths) else float(lengths)
