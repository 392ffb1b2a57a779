"""What the seed decides of a round: lengths, classes, order, arrivals and pauses. All but the tokens themselves.

Every round of every launch asks for the same work.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pytest_llmperf.plan.lengths import Lengths, read_lengths
from pytest_llmperf.plan.traffic import AT_ONCE, RequestClass, parse_arrivals
from pytest_llmperf.plan.workload import DEFAULTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_llmperf.plan.datasets import Conversation
    from pytest_llmperf.plan.workload import Workload

_WARM_UP_REQUESTS = 32
"""How many requests warm up an open loop, which has no wave."""


@dataclass(frozen=True)
class Wanted:
    """One request as the seed decides it: everything but the token ids."""

    prompt_tokens: int
    output_tokens: int
    kind: RequestClass | None = None
    due_s: float | None = None
    blocks: tuple[int, ...] = ()
    block_tokens: int = 0
    entry: Conversation | None = None
    """What a dataset asks."""
    turn: int = 0
    prefix: int = 0
    think_s: float = 0.0
    """The pause before it, behind the answer to the turn before it."""


@functools.lru_cache(maxsize=8)
def wanted(workload: Workload) -> tuple[Wanted, ...]:
    """Return the requests of a round, in the order in which they are sent."""
    rng = random.Random(f"{workload.seed}/lengths")
    if workload.trace:
        rows = workload.trace_rows[: workload.requests]
        return tuple(
            Wanted(
                row.prompt_tokens,
                row.output_tokens,
                due_s=row.at_s / workload.speed,
                blocks=row.blocks,
                block_tokens=row.block_tokens,
            )
            for row in rows
        )
    requests = _asked(workload, rng) if workload.dataset else _paused(workload, _drawn(workload, rng))
    if not workload.rate:
        return tuple(requests)
    starts = iter(arrivals(workload, workload.requests // workload.turns))
    return tuple(request if request.turn else replace(request, due_s=next(starts)) for request in requests)


def warming(workload: Workload) -> tuple[Wanted, ...]:
    """Return what warms up: one full wave of the real lengths, of each conversation the first turn, or what `warm_up` says.

    Requests of other lengths than the workload's come at its rate, and in place of a trace so many at a time.
    """
    warm_up = workload.warm_up
    count = _WARM_UP_REQUESTS if workload.is_open else workload.concurrency
    firsts = [request for request in wanted(workload) if not request.turn]
    if warm_up is None or (not warm_up.has_lengths and workload.trace):
        return tuple(firsts[: (warm_up and warm_up.requests) or count])
    count = warm_up.requests or count
    changed: dict[str, Any] = {"requests": count, "turns": 1, "think_s": 0.0, "warm_up": None, "duration_s": None}
    if not workload.rate:
        changed["concurrency"] = min(workload.concurrency, count)
    if warm_up.has_lengths:
        changed |= {"trace": None, "speed": 1.0, "block_tokens": None, "trace_unit": None, "classes": (), "pairs": None}
        changed |= {"max_concurrency": None} if workload.trace else {}
        dataset = warm_up.dataset or (workload.dataset if warm_up.prompt_tokens is None else None)
        changed |= {"dataset": dataset, "max_prompt_tokens": workload.max_prompt_tokens if dataset else None}
        changed |= _lengths_of(workload, has_dataset=dataset is not None)
        changed |= {"prefix_tokens": 0, "prefixes": 1} if dataset else {}
    elif workload.classes:
        changed["requests"] = max(count, len(workload.classes))
    return wanted(replace(workload, **changed))[:count]


def _lengths_of(workload: Workload, *, has_dataset: bool) -> dict[str, Any]:
    """Return the lengths of a warm-up that has some of its own; those that it does not name are the workload's."""
    warm_up = workload.warm_up
    assert warm_up is not None
    rows = workload.pairs.rows if workload.pairs else [(row.prompt_tokens, row.output_tokens) for row in workload.trace_rows]
    before: int | Lengths = workload.prompt_tokens
    after = DEFAULTS["output_tokens"] if workload.has_own_answers and not has_dataset else workload.output_tokens
    if rows:  # lengths that come in pairs have no distribution of their own
        before, after = (max(1, round(sum(column) / len(rows))) for column in zip(*rows, strict=True))
    return {
        "prompt_tokens": before if warm_up.prompt_tokens is None else warm_up.prompt_tokens,
        "output_tokens": after if warm_up.output_tokens is None else warm_up.output_tokens,
    }


def _asked(workload: Workload, rng: random.Random) -> list[Wanted]:
    """Return the requests of a dataset's entries, in an order that the seed shuffles; all of them before one comes again."""
    entries = list(workload.entries)
    rng.shuffle(entries)
    asked = itertools.islice(itertools.cycle(entries), workload.requests)
    if workload.has_own_answers:
        return [Wanted(0, entry.answer_tokens or entry.output_tokens or 1, entry=entry) for entry in asked]
    lengths = _lengths(workload.output_tokens, workload.requests, rng)
    return [Wanted(0, entry.output_tokens or length, entry=entry) for entry, length in zip(asked, lengths, strict=True)]


def _drawn(workload: Workload, rng: random.Random) -> list[Wanted]:
    """Return the requests of a workload that is made up: each class its share of them, in an order that the seed shuffles."""
    conversations = workload.requests // workload.turns
    kinds: Sequence[RequestClass | None] = workload.classes or (None,)
    counts = _apportioned(conversations, [1.0 if kind is None else kind.share for kind in kinds])
    each: list[list[Wanted]] = []
    for kind, count in zip(kinds, counts, strict=True):
        pairs = iter(_pairs(workload, kind, count * workload.turns, rng))
        each += [[Wanted(*next(pairs), kind=kind, turn=turn) for turn in range(workload.turns)] for _ in range(count)]
    if len(kinds) > 1:
        rng.shuffle(each)
    return [replace(request, prefix=number % workload.prefixes) for number, turns in enumerate(each) for request in turns]


def _pairs(workload: Workload, kind: RequestClass | None, count: int, rng: random.Random) -> list[tuple[int, int]]:
    """Return the lengths of so many prompts and answers; of given pairs each comes before one comes again."""
    if workload.pairs:
        rows = list(workload.pairs.rows)
        rng.shuffle(rows)
        return list(itertools.islice(itertools.cycle(rows), count))
    source: Any = workload if kind is None else kind
    before = _lengths(source.prompt_tokens, count, rng)
    after = _lengths(source.output_tokens, count, rng)
    return list(zip(before, after, strict=True))


def _paused(workload: Workload, requests: list[Wanted]) -> list[Wanted]:
    """Return the requests with the pause before each that follows another."""
    if not workload.think_s:
        return requests
    rng = random.Random(f"{workload.seed}/think")
    pauses = (
        _values(workload.think_s, len(requests), rng)
        if isinstance(workload.think_s, Lengths)
        else [workload.think_s] * len(requests)
    )
    return [
        replace(request, think_s=max(0.0, pause)) if request.turn else request
        for request, pause in zip(requests, pauses, strict=True)
    ]


def _apportioned(total: int, shares: Sequence[float]) -> list[int]:
    """Return whole numbers in these shares that sum to `total`, each at least 1 (largest remainders)."""
    exact = [total * share / sum(shares) for share in shares]
    counts = [max(1, math.floor(share)) for share in exact]
    by_need = sorted(range(len(shares)), key=lambda index: counts[index] - exact[index])
    while sum(counts) != total:
        step = 1 if sum(counts) < total else -1
        order = by_need if step > 0 else [index for index in reversed(by_need) if counts[index] > 1]
        for index in order[: abs(total - sum(counts))]:
            counts[index] += step
    return counts


def _lengths(lengths: int | Lengths, count: int, rng: random.Random) -> list[int]:
    if not isinstance(lengths, Lengths):
        return [lengths] * count
    if lengths.file:
        return rng.choices(read_lengths(lengths.file), k=count)
    if lengths.kind == "uniform":
        low, high = map(int, lengths.numbers)
        return [rng.randint(low, high) for _ in range(count)]
    return [max(1, round(length)) for length in _values(lengths, count, rng)]


def _values(lengths: Lengths, count: int, rng: random.Random) -> list[float]:
    """Return so many numbers of a distribution, those above its largest cut to it."""
    first, second, *most = lengths.numbers
    if lengths.kind == "uniform":
        return [rng.uniform(first, second) for _ in range(count)]
    if lengths.kind == "normal":
        drawn = (rng.normalvariate(first, second) for _ in range(count))
    else:
        drawn = (rng.lognormvariate(math.log(first) - second**2 / 2, second) for _ in range(count))
    return [min([value, *most]) for value in drawn]


def arrivals(workload: Workload, count: int) -> list[float]:
    """Return the instants at which `count` conversations begin, in seconds since the round's beginning, at the workload's rate.

    Gaps are drawn from the gamma distribution of the wanted burstiness, and stretched so that the rate is met exactly: Poisson
    arrivals given their number. A ramp has the same order of gaps, at a rate that grows from its first to its second number.
    """
    if workload.rate == (AT_ONCE,):
        return [0.0] * count
    shape = parse_arrivals(workload.arrivals) or 1.0
    rng = random.Random(f"{workload.seed}/arrivals")
    gaps = [1.0 if math.isinf(shape) else rng.gammavariate(shape, 1 / shape) for _ in range(count + 1)]
    total = sum(gaps)
    # Between beginning and end lie count + 1 gaps; constant arrivals begin at once.
    spread = [sum_ / total * count for sum_ in itertools.accumulate(gaps[:-1])]
    if math.isinf(shape):
        spread = [float(index) for index in range(count)]
    # A rate is of requests; what arrives is conversations.
    first, last = workload.rate[0] / workload.turns, workload.rate[-1] / workload.turns
    duration_s = count / ((first + last) / 2)
    slope = (last - first) / duration_s
    # n(t) = first t + slope t^2 / 2, solved for t without cancellation.
    return [2 * place / (first + math.sqrt(first**2 + 2 * slope * place)) for place in spread]
