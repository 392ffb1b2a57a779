"""Traces of arrivals: Mooncake's and Bailian's JSONL, BurstGPT's and Azure's CSV.

Two makers give the same columns other units. So the unit of time and the size of a block are proven by the file, or stated:
nothing is guessed. Read once and checked line by line, so that a bad line is named before an engine is started.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from datetime import UTC, datetime
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
_SIZES = tuple(2**power for power in range(13))
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


@functools.cache
def read_trace(file: File, block_tokens: int | None = None, unit: str | None = None) -> tuple[Arrival, ...]:
    """Return the arrivals of a trace in order of time, those without prompt or answer left out; raises PlanError.

    `block_tokens` and `unit`, a key of UNITS, are what the caller states; None is proven from the file, or refused.
    """
    is_json = read_text(file).lstrip()[:1] in ("{", "[")
    arrivals = _of_json(file, block_tokens, unit) if is_json else _of_csv(file, block_tokens, unit)
    sent = sorted((row for row in arrivals if row.prompt_tokens and row.output_tokens), key=lambda arrival: arrival.at_s)
    if not sent:
        raise PlanError(f"{file.path}: no arrivals: {'every request in it has failed' if arrivals else 'it has a header only'}")
    first_s = sent[0].at_s
    return tuple(replace(arrival, at_s=arrival.at_s - first_s) for arrival in sent)


def _of_json(file: File, block_tokens: int | None, unit: str | None) -> list[Arrival]:
    rows = list(json_rows(file))
    for row in rows:
        _need(row, _NEEDED)
    counts = [(row.tokens("input_length", least=0), row.tokens("output_length", least=0)) for row in rows]
    blocks = [_blocks(row) for row in rows]
    filled = [(row, before, ids) for row, (before, _), ids in zip(rows, counts, blocks, strict=True) if ids and before]
    is_bailian = all(set(row.values) >= _OF_BAILIAN for row in rows)
    size = block_tokens or _proven_block(file, filled, is_bailian=is_bailian)
    for row, before, ids in filled:
        if len(ids) > max(1, math.ceil(before / size)):
            raise row.error(f"{len(ids)} blocks of {size} tokens are more than input_length={before}; state block_tokens")
    proven = "s" if is_bailian else "ms" if filled and size == _MOONCAKE and _is_exact(filled) and not block_tokens else None
    if not (unit or proven):
        raise PlanError(_unproven(file, rows, filled, size, block_tokens))
    scale = UNITS[unit or proven or ""]
    return [
        Arrival(row.number("timestamp") * scale, before, after, ids, size)
        for row, (before, after), ids in zip(rows, counts, blocks, strict=True)
    ]


def _blocks(row: Row) -> tuple[int, ...]:
    ids = row.values.get("hash_ids") or ()
    if not isinstance(ids, (list, tuple)) or not all(isinstance(item, int) and not isinstance(item, bool) for item in ids):
        raise row.error("hash_ids must be a list of whole numbers")
    return tuple(ids)


def _proven_block(file: File, filled: Sequence[tuple[Row, int, tuple[int, ...]]], *, is_bailian: bool) -> int:
    """Return the size of a block that every row's length and number of blocks prove; raises PlanError where none is proven."""
    usual = _BAILIAN if is_bailian else _MOONCAKE
    if not filled:
        return usual
    fitting = [size for size in _SIZES if all(len(ids) == math.ceil(before / size) for _, before, ids in filled)]
    if not fitting or (is_bailian and usual not in fitting):
        row, before, ids = next(
            ((row, before, ids) for row, before, ids in filled if len(ids) != math.ceil(before / usual)), filled[0]
        )
        raise row.error(
            f"{len(ids)} hash_ids for {before} tokens prove no size of a block that all rows have (Mooncake's are {_MOONCAKE},"
            f" Bailian's {_BAILIAN} tokens); state block_tokens and trace_unit, or mend the row"
        )
    # Where each prompt is a single block, all sizes that are long enough mean the same text.
    if usual in fitting and (is_bailian or len(fitting) == 1 or all(len(ids) == 1 for _, _, ids in filled)):
        return usual
    if len(fitting) == 1 or all(len(ids) == 1 for _, _, ids in filled):
        return fitting[0]
    sizes = " or ".join(map(str, fitting))
    raise PlanError(f"{file.path}: its blocks could be of {sizes} tokens; state block_tokens={fitting[0]} or another of them")


def _is_exact(filled: Sequence[tuple[Row, int, tuple[int, ...]]]) -> bool:
    """Return whether rows of several blocks prove the size: single blocks are of any."""
    return any(len(ids) > 1 for _, _, ids in filled)


def _unproven(
    file: File, rows: Sequence[Row], filled: Sequence[tuple[Row, int, tuple[int, ...]]], size: int, stated: int | None
) -> str:
    columns = ", ".join(sorted(set().union(*(row.values for row in rows))))
    if stated:
        blocks = f"block_tokens={stated} is stated, which says nothing of the time"
    elif filled and _is_exact(filled):
        blocks = f"its blocks are of {size} tokens (Mooncake's, in milliseconds, of {_MOONCAKE})"
    else:
        blocks = "nothing proves the size of its blocks"
    return (
        f"{file.path}: it is not said whether its timestamps are seconds (as Bailian's) or milliseconds (as Mooncake's): the"
        f" columns are {columns}, and {blocks}; state trace_unit='ms' or trace_unit='s'"
    )


def _need(row: Row, names: Iterable[str]) -> None:
    missing = [name for name in names if name not in row.values]
    if missing:
        columns = ", ".join(map(str, row.values)) or "none"
        raise row.error(f"{' and '.join(missing)} missing, found are {columns}; {KNOWN}")


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
    arrivals, zoned = [], None
    for row in rows:
        if any(name.lower() == "numimages" and row.number(name) > 0 for name in row.values):
            raise row.error("NumImages is above 0, and no images are sent; leave such rows out")
        instant = _instant(row, at)
        has_zone = instant.tzinfo is not None
        if zoned is not None and has_zone != zoned:
            raise row.error(f"{at} is {row.values[at]!r}; some rows have a time zone and others none")
        zoned = has_zone
        seconds = (instant if has_zone else instant.replace(tzinfo=UTC)).timestamp()
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
