"""Traces of arrivals: Mooncake's and Bailian's JSONL, BurstGPT's and Azure's CSV.

Two makers give the same columns other units. So the unit of time and the size of a block are proven by the file, or stated:
nothing is guessed. Read once and checked line by line, so that a bad line is named before an engine is started.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from pytest_llmperf.plan.checks import PlanError
from pytest_llmperf.plan.files import csv_rows, json_rows, read_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pytest_llmperf.plan.files import File, Row

UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
"""Units of time that a trace can be in, in seconds."""
_MOONCAKE, _BAILIAN = 512, 16
"""Tokens of a block in the traces of each maker (the READMEs of Mooncake and of qwen-bailian-usagetraces-anon)."""
_SIZES = tuple(1 << power for power in range(13))
"""Sizes of a block that are looked for: powers of two up to 4,096, as every prefix cache has them."""
_NEEDED = ("timestamp", "input_length", "output_length")
_OF_BAILIAN = frozenset({"chat_id", "parent_chat_id"})
"""Columns that Bailian's traces alone have: their timestamps are seconds."""
KNOWN = (
    "known are JSONL with timestamp, input_length, output_length and hash_ids (Mooncake; with chat_id and parent_chat_id:"
    " Bailian), CSV with Timestamp, Request tokens and Response tokens (BurstGPT), or with TIMESTAMP, ContextTokens and"
    " GeneratedTokens (Azure)"
)


@dataclass(frozen=True)
class Arrival:
    """One line of a trace."""

    at_s: float
    """Seconds since the trace's first arrival."""
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    """Ids of the prompt's blocks; prompts with the same ids in front share that text. Empty: none."""
    block_tokens: int = _MOONCAKE
    """Tokens of a block."""


@dataclass(frozen=True)
class _TraceRow:
    """One row of a JSON trace, its numbers checked."""

    row: Row
    timestamp: float
    before: int
    after: int
    blocks: tuple[int, ...]


@functools.cache
def read_trace(file: File, block_tokens: int | None = None, unit: str | None = None) -> tuple[Arrival, ...]:
    """Return the arrivals of a trace in order of time, those without prompt or answer left out; raises PlanError.

    `block_tokens` and `unit`, a key of UNITS, are what the caller states; None is proven from the file, or refused.
    """
    arrivals = _rows(file, block_tokens, unit)
    sent = sorted((row for row in arrivals if row.prompt_tokens and row.output_tokens), key=lambda arrival: arrival.at_s)
    if not sent:
        raise PlanError(f"{file.path}: no arrivals: {'every request in it has failed' if arrivals else 'it has a header only'}")
    first_s = sent[0].at_s
    return tuple(
        Arrival(each.at_s - first_s, each.prompt_tokens, each.output_tokens, each.blocks, each.block_tokens) for each in sent
    )


def failed_rows(file: File, block_tokens: int | None = None, unit: str | None = None) -> int:
    """Return how many rows `read_trace` leaves out, because they have no prompt or no answer; raises PlanError."""
    return len(_rows(file, block_tokens, unit)) - len(read_trace(file, block_tokens, unit))


@functools.cache
def _rows(file: File, block_tokens: int | None, unit: str | None) -> list[Arrival]:
    is_json = read_text(file).lstrip()[:1] in ("{", "[")
    return _of_json(file, block_tokens, unit) if is_json else _of_csv(file, block_tokens, unit)


@functools.cache
def units_of(file: File, block_tokens: int | None = None, unit: str | None = None) -> tuple[int | None, str | None]:
    """Return the tokens of a block and the unit of time of a trace whose columns leave these open, None for each that they don't.

    Mooncake's and those of CSV are known by the format; what is stated is returned as it is. Raises PlanError.
    """
    if (block_tokens and unit) or read_text(file).lstrip()[:1] not in ("{", "["):
        return block_tokens, unit
    units = _units(file, _trace_rows(file), block_tokens, unit)
    return (block_tokens, unit) if units == (_MOONCAKE, "ms") else units


@functools.cache
def _trace_rows(file: File) -> tuple[_TraceRow, ...]:
    rows = []
    for row in json_rows(file):
        missing = [name for name in _NEEDED if name not in row.values]
        if missing:
            columns = ", ".join(map(str, row.values)) or "none"
            raise row.error(f"{' and '.join(missing)} missing, found are {columns}; {KNOWN}")
        before, after = (row.tokens(name, least=0) for name in _NEEDED[1:])
        rows.append(_TraceRow(row, row.number("timestamp"), before, after, _blocks(row)))
    return tuple(rows)


def _of_json(file: File, block_tokens: int | None, unit: str | None) -> list[Arrival]:
    rows = _trace_rows(file)
    size, unit = _units(file, rows, block_tokens, unit)
    return [Arrival(each.timestamp * UNITS[unit], each.before, each.after, each.blocks, size or _MOONCAKE) for each in rows]


def _units(file: File, rows: Sequence[_TraceRow], block_tokens: int | None, unit: str | None) -> tuple[int | None, str]:
    """Return the tokens of a block, None without blocks, and the unit of time: stated or proven; raises PlanError."""
    filled = [each for each in rows if each.blocks and each.before]
    is_bailian = all(set(each.row.values) >= _OF_BAILIAN for each in rows)
    size = block_tokens or (_proven_block(filled, is_bailian=is_bailian) if filled else None)
    for each in filled:
        if size and len(each.blocks) > math.ceil(each.before / size):
            raise each.row.error(
                f"{len(each.blocks)} blocks of {size} tokens are more than input_length={each.before}; state another block_tokens"
            )
    if unit:
        return size, unit
    if is_bailian:
        return size, "s"
    # Rows of several blocks prove their size; single ones are of any.
    is_proven = not block_tokens and any(len(each.blocks) > 1 for each in filled)
    if is_proven and size == _MOONCAKE:
        return size, "ms"
    raise PlanError(_unproven(file, rows, f"its blocks are of {size} tokens" if is_proven else "nothing proves its blocks"))


def _blocks(row: Row) -> tuple[int, ...]:
    ids = row.values.get("hash_ids") or ()
    if not isinstance(ids, (list, tuple)) or not all(isinstance(item, int) and not isinstance(item, bool) for item in ids):
        raise row.error("hash_ids must be a list of whole numbers")
    return tuple(ids)


def _proven_block(filled: Sequence[_TraceRow], *, is_bailian: bool) -> int:
    """Return the size of a block that every row's length and number of blocks prove; raises PlanError where none is proven."""
    usual = _BAILIAN if is_bailian else _MOONCAKE
    fitting = [size for size in _SIZES if all(len(each.blocks) == math.ceil(each.before / size) for each in filled)]
    if not fitting or (is_bailian and usual not in fitting):
        odd = next((each for each in filled if len(each.blocks) != math.ceil(each.before / usual)), filled[0])
        raise odd.row.error(
            f"{len(odd.blocks)} hash_ids for {odd.before} tokens are no blocks of {usual} tokens, as"
            f" {'Bailian' if is_bailian else 'Mooncake'}'s are, and no other size fits all; state block_tokens and trace_unit"
        )
    # A row of several blocks leaves one power of two. Where each prompt is a single block, all that fit mean the same text.
    return usual if usual in fitting else fitting[0]


def _unproven(file: File, rows: Sequence[_TraceRow], blocks: str) -> str:
    columns = ", ".join(sorted({str(name) for each in rows for name in each.row.values}))
    return (
        f"{file.path}: it is not said whether its timestamps are seconds (as Bailian's, which have chat_id and parent_chat_id) or"
        f" milliseconds (as Mooncake's, whose blocks are of {_MOONCAKE} tokens): the columns are {columns}, and {blocks}; state"
        " trace_unit='ms' or trace_unit='s'"
    )


_CSV = {
    ("timestamp", "request tokens", "response tokens"): "BurstGPT",
    ("timestamp", "contexttokens", "generatedtokens"): "Azure",
}
"""The columns of a CSV trace, in lower case: time, tokens of the prompt, and tokens of the answer."""


def _of_csv(file: File, block_tokens: int | None, unit: str | None) -> list[Arrival]:
    columns, rows = csv_rows(file)
    written = {column.lower(): column for column in columns}
    names = next((names for names in _CSV if all(name in written for name in names)), None)
    if names is None:
        missing = {maker: [name for name in names if name not in written] for names, maker in _CSV.items()}
        lacks = "; ".join(f"for {maker}'s {', '.join(names)} missing" for maker, names in missing.items())
        raise PlanError(f"{file.path}: the columns are {', '.join(columns)}: {lacks}. For a trace {KNOWN}")
    if block_tokens:
        raise PlanError(f"block_tokens={block_tokens}: {file.path} has no blocks (hash_ids); leave block_tokens out")
    at, before, after = (written[name] for name in names)
    if _CSV[names] == "Azure":
        if unit:
            raise PlanError(f"trace_unit={unit!r}: {file.path} has dates as Azure's traces do; leave trace_unit out")
        return _of_azure(rows, at, before, after)
    scale = UNITS[unit or "s"]
    return [Arrival(row.number(at) * scale, row.tokens(before, least=0), row.tokens(after, least=0)) for row in rows]


def _of_azure(rows: Iterable[Row], at: str, before: str, after: str) -> list[Arrival]:
    arrivals: list[Arrival] = []
    first: datetime | None = None
    for row in rows:
        if any(name.lower() == "numimages" and row.number(name) > 0 for name in row.values):
            raise row.error("NumImages is above 0, and no images are sent; leave such rows out")
        instant = _instant(row, at)
        first = first or instant
        if (first.tzinfo is None) != (instant.tzinfo is None):
            raise row.error(f"{at} is {row.values[at]!r}; some rows have a time zone and others none")
        seconds = (instant - first).total_seconds()
        arrivals.append(Arrival(seconds, row.tokens(before, least=0), row.tokens(after, least=0)))
    return arrivals


def _instant(row: Row, name: str) -> datetime:
    text = str(row.values[name]).strip()
    try:
        if not text[:4].isdigit() or text[4:5] != "-":
            raise ValueError
        return datetime.fromisoformat(text)  # of more than six digits of a fraction it takes six
    except (ValueError, OverflowError):
        raise row.error(f"{name} is {text!r}; it must be a date such as 2024-05-10 00:00:00.009930+00:00") from None
