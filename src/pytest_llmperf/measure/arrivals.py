"""How the tokens of an answer came: one by one, in clumps, or all at once.

A proxy that holds a stream back leaves no time between tokens, and one that passes it on in pieces leaves some that say nothing.
What cannot be measured then is missing, and a warning says why.
"""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pytest_llmperf.measure.client.response import RequestRecord

FASTEST_TOKEN_S = 5e-5
"""No engine makes the tokens of one stream faster: 20,000 a second. What follows faster was held back and sent at once; a body
that fills several packets takes a microsecond a token."""
_FIRST_READ = 0.5
"""An answer of which the first read brought more than this share has no time per token: it is that of the little that is left."""
_TINY, _TINY_S = 0.05, 1e-3
"""A gap is tiny below this share of the mean gap and this many seconds. The second keeps an engine that stalls now and then,
whose other gaps are small beside the mean too, from being taken for a stream in clumps."""
_CLUMPED = 0.25
"""Share of tiny gaps from which on a stream comes in clumps. Of random (exponential) gaps 5 % are tiny, of pairs half."""
_FEWEST_GAPS = 20
_PIECE = 8
"""Tokens a read from which on a stream is said to come in pieces: speculative decoding brings fewer in a step."""
_SOME = 0.05
"""A smaller share of answers that came at once is not worth a word."""


def gaps(record: RequestRecord) -> list[float]:
    """Return the seconds between arrivals; tokens of one read are one arrival. Empty where all of an answer came at once."""
    times = sorted(set(record.token_times_s))
    tokens = max(record.output_tokens or 0, len(record.token_times_s))
    if len(times) < 2 or times[-1] - times[0] < FASTEST_TOKEN_S * (tokens - 1):
        return []
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def time_per_token(record: RequestRecord) -> float | None:
    """Return the seconds per token behind the first.

    None for fewer than two tokens, and where most of the answer came in its first read or all of it at once.
    """
    times = record.token_times_s
    count = record.output_tokens or len(times)
    if count < 2 or not gaps(record) or times.count(times[0]) > _FIRST_READ * len(times):
        return None
    return (times[-1] - times[0]) / (count - 1)


@dataclass(frozen=True)
class Clumps:
    """Tokens that come in clumps."""

    tiny_share: float
    """Share of the gaps that are tiny beside the mean."""
    largest_tiny_s: float
    """The largest of these."""
    mean_s: float
    """Mean of all gaps."""


def clumps(values: Sequence[float]) -> Clumps | None:
    """Return how gaps between arrivals fall into tiny and long ones; None where they don't, or are too few to tell."""
    if len(values) < _FEWEST_GAPS:
        return None
    each = np.asarray(values)
    mean_s = float(each.mean())
    tiny = each[each < min(_TINY * mean_s, _TINY_S)]
    share = tiny.size / each.size
    return Clumps(share, float(tiny.max()), mean_s) if share >= _CLUMPED else None


def warnings(records: Sequence[RequestRecord]) -> Iterator[str]:
    """Yield what a reader should know of how the answers of a launch came, and what is missing for it."""
    several = [record for record in records if (record.output_tokens or 0) > 1 and record.token_times_s]
    lacking = [record for record in several if time_per_token(record) is None]
    if several and len(lacking) == len(several):
        pieces = any(map(gaps, lacking))
        came, part = ("most of every answer came in its", "most of") if pieces else ("every answer came in one", "all of")
        yield (
            f"no TPOT: {came}{' first' if pieces else ''} read; is a proxy buffering the stream?"
            f" TTFT is then the time to {part} the answer: what a reader waits for, but not the engine's time to a first token"
        )
    elif len(lacking) > _SOME * len(several):
        yield (
            f"{len(lacking)} of {len(several)} answers came in one read, or most of them in their first; they have no TPOT,"
            " and their TTFT is the time to the whole answer"
        )
    every_gap = [gap for record in records for gap in gaps(record)]
    if clumped := clumps(every_gap):
        yield (
            f"tokens come in clumps: {clumped.tiny_share:.0%} of the gaps are below {_milliseconds(clumped.largest_tiny_s)}"
            f" and the mean is {_milliseconds(clumped.mean_s)};"
            " percentiles of ITL say nothing of what a reader sees, and are missing"
        )
    if len(lacking) < len(several):
        yield from _pieces(records, every_gap)


def _pieces(records: Sequence[RequestRecord], every_gap: Sequence[float]) -> Iterator[str]:
    """Yield that a stream is sent in pieces of many tokens, each in one read."""
    timed = [record.token_times_s for record in records if gaps(record)]
    reads, tokens = sum(len(set(times)) for times in timed), sum(map(len, timed))
    if reads and tokens >= _PIECE * reads:
        apart = _milliseconds(statistics.median(every_gap))
        pieces = f"tokens come in pieces of {tokens / reads:.0f}, {apart} apart"
        yield f"{pieces}: ITL is the time between pieces, TTFT that to the first"


def _milliseconds(seconds: float) -> str:
    return f"{float(f'{seconds * 1e3:.2g}'):g} ms"
