"""Lengths of prompts and answers, alone or in pairs, and pauses: a number, or a distribution of them."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_llmperf.plan.checks import LARGEST, PlanError, brief, degree, written
from pytest_llmperf.plan.files import MOST_TOKENS, File, parse_file, read_numbers

if TYPE_CHECKING:
    from pathlib import Path

_CALL = re.compile(r"(\w+)\(\s*(.*?)\s*\)")
_LENGTHS = (
    "must be a number of tokens, or uniform(LOW, HIGH), normal(MEAN, SD[, MAX]), lognormal(MEAN, SIGMA[, MAX]) or file(PATH),"
    " with lengths of 1 or more"
)
_SECONDS = (
    "must be a number of seconds, 0 or more, or uniform(LOW, HIGH), normal(MEAN, SD[, MAX]) or lognormal(MEAN, SIGMA[, MAX])"
)
OWN = "dataset"
"""The lengths of a dataset's own answers, as `output_tokens`."""


@dataclass(frozen=True)
class Lengths:
    """A distribution: `uniform(low, high)`, `normal(mean, sd[, max])`, `lognormal(mean, sigma[, max])` or `file(path)`.

    Of token counts, where a file has one per line; or of seconds. `dataset` are the lengths of a dataset's own answers.
    """

    kind: str
    numbers: tuple[float, ...] = ()
    file: File | None = None

    @property
    def mean(self) -> float:
        """Return the mean, before a tail is cut; of a dataset's own lengths, which stand elsewhere, 1."""
        if self.kind == OWN:
            return 1.0
        return self.numbers[0] if self.kind in ("lognormal", "normal") else sum(self.numbers) / len(self.numbers)

    def __str__(self) -> str:
        """Return it as it is written in a test."""
        if self.kind == OWN:
            return OWN
        shown = [str(self.file)] if self.file else [f"{number:g}" for number in self.numbers]
        return f"{self.kind}({', '.join(shown)})"


@dataclass(frozen=True)
class Pairs:
    """Lengths of prompt and answer together, so that their correlation is kept."""

    rows: tuple[tuple[int, int], ...]
    file: File | None = None

    @property
    def mean_output(self) -> float:
        """Return the mean number of output tokens."""
        return sum(after for _, after in self.rows) / len(self.rows)


def parse_lengths(name: str, value: object, folder: Path) -> int | Lengths:
    """Return a number of tokens, or a distribution of them; raises PlanError naming `name`."""
    if isinstance(value, Lengths):
        return value
    call = _CALL.fullmatch(written(value))
    if not call:
        if name == "output_tokens" and isinstance(value, str) and value == OWN:
            return Lengths(OWN)
        if isinstance(value, str) and not re.fullmatch(r"\s*[+-]?[0-9]+\s*", value):
            raise PlanError(f"{name}={brief(value)}: {_LENGTHS}")
        tokens = degree(name, value)
        if tokens > MOST_TOKENS:
            raise PlanError(f"{name}={brief(value)}: more than {MOST_TOKENS:,} tokens; no model takes so many")
        return tokens
    kind, inside = call.groups()
    if kind == "file":
        file = parse_file(name, inside.strip("'\""), folder)
        return Lengths("file", tuple(map(float, read_lengths(file))), file)
    numbers = _numbers(kind, inside)
    integers = all(number == int(number) for number in numbers or () if kind == "uniform")
    if numbers is None or not integers or min((numbers[0], *numbers[2:])) < 1 or max(numbers) > MOST_TOKENS:
        raise PlanError(f"{name}={brief(value)}: {_LENGTHS}")
    return Lengths(kind, numbers)


def parse_seconds(name: str, value: object) -> float | Lengths:
    """Return a number of seconds, 0 or more, or a distribution of them; raises PlanError naming `name`."""
    if isinstance(value, Lengths):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= LARGEST:
        return float(value)
    call = _CALL.fullmatch(value.strip()) if isinstance(value, str) else None
    numbers = _numbers(*call.groups()) if call else None
    if call is None or numbers is None or min((numbers[0], *numbers[2:])) < 0 or max(numbers) > LARGEST:
        raise PlanError(f"{name}={brief(value)}: {_SECONDS}")
    return Lengths(call[1], numbers)


def _numbers(kind: str, inside: str) -> tuple[float, ...] | None:
    """Return the numbers of a distribution, None where its name, their count or their order is none of one."""
    try:
        numbers = tuple(float(word) for word in inside.split(","))
    except ValueError:
        return None
    if not all(map(math.isfinite, numbers)):
        return None
    if kind == "uniform":
        return numbers if len(numbers) == 2 and numbers[0] <= numbers[1] else None
    if kind not in ("normal", "lognormal") or len(numbers) not in (2, 3) or numbers[1] <= 0:
        return None
    # A logarithm needs a mean above 0.
    return numbers if kind == "normal" or numbers[0] > 0 else None


def parse_pairs(value: object, folder: Path) -> Pairs:
    """Return pairs of lengths from a list, or a file of two columns; raises PlanError."""
    if isinstance(value, Pairs):
        return value
    if isinstance(value, str):
        call = _CALL.fullmatch(value.strip())
        path = call[2].strip("'\"") if call and call[1] == "file" else value
        file = parse_file("pairs", path, folder)
        return Pairs(read_pairs(file), file)
    rows = value if isinstance(value, (list, tuple)) else ()
    if not rows or not all(isinstance(row, (list, tuple)) and len(row) == 2 for row in rows):
        raise PlanError(f"pairs={brief(value)}: must be (prompt, output) tokens, e.g. [(512, 128), (64, 256)], or file(PATH)")
    before = [degree(f"pairs: prompt_tokens of {brief(row)}", row[0]) for row in rows]
    after = [degree(f"pairs: output_tokens of {brief(row)}", row[1]) for row in rows]
    if max(*before, *after) > MOST_TOKENS:
        raise PlanError(f"pairs={brief(value)}: more than {MOST_TOKENS:,} tokens; no model takes so many")
    return Pairs(tuple(zip(before, after, strict=True)))


@functools.cache
def read_lengths(file: File) -> tuple[int, ...]:
    """Return the lengths in a file, one per line; raises PlanError."""
    return tuple(row[0] for row in read_numbers(file, 1))


@functools.cache
def read_pairs(file: File) -> tuple[tuple[int, int], ...]:
    """Return the pairs of lengths in a file, two in each line; raises PlanError."""
    return tuple((row[0], row[1]) for row in read_numbers(file, 2))


def mean_length(lengths: int | Lengths) -> float:
    """Return the mean number of tokens."""
    return lengths.mean if isinstance(lengths, Lengths) else float(lengths)
