"""Can one engine have told all this, and can the client have caused it?

Behind a balancer each answer may be another replica's, an engine may be restarted, and others may send requests. The differences
of counters are then numbers of nothing: what is said is why, and no number.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pytest_llmperf.measure.dialects import value_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pytest_llmperf.measure.client.response import RequestRecord
    from pytest_llmperf.measure.dialects import Feature
    from pytest_llmperf.measure.exposition import Scrape

_SLACK, _SLACK_OF_REQUEST = 1.1, 16
"""Engines may count a little more than was asked for: stop tokens, a health check of the orchestrator's."""
_SLACK_OF_PROMPT = 256
"""A chat template in front of each prompt, and prompts that are computed anew after a preemption."""
_SEEN = 0.95
"""Tokens count as seen where at least so many of them came as pieces of their own: some decode to no text."""
_OTHER_ENGINES = "its counters come from more than one engine (a balancer in front?)"


@dataclass(frozen=True)
class Caused:
    """What the client can have caused in a round."""

    requests: int = 0
    asked_tokens: int = 0
    """Output tokens that were asked for, at most."""
    counted_tokens: int = 0
    """Output tokens of the requests that were answered in full."""
    prompt_tokens: int | None = None
    """As the server's usage says; None where it doesn't, or where a request has failed."""

    def most(self, feature: Literal["output_tokens", "prompt_tokens"]) -> float:
        """Return the largest number of such tokens that an engine can have counted for it."""
        if feature == "output_tokens":
            return self.asked_tokens * _SLACK + self.requests * _SLACK_OF_REQUEST
        return math.inf if self.prompt_tokens is None else 2 * self.prompt_tokens + self.requests * _SLACK_OF_PROMPT


def caused_by(asked_tokens: int, records: Sequence[RequestRecord]) -> Caused:
    """Return what requests can have caused that asked for so many output tokens at most."""
    answered = [record for record in records if record.error is None]
    prompts = [record.prompt_tokens for record in answered if record.prompt_tokens is not None]
    return Caused(
        requests=len(records),
        asked_tokens=asked_tokens,
        counted_tokens=sum(record.output_tokens or 0 for record in answered),
        prompt_tokens=sum(prompts) if len(prompts) == len(records) else None,
    )


def counted_by_usage(records: Sequence[RequestRecord]) -> str | None:
    """Return that nothing but `usage` tells how many tokens these streams had; None where as many were seen.

    Several tokens may come in one piece of text, and one that claims more of them than it has is found only where its text is
    too short for them.
    """
    streams = [record for record in records if record.error is None and record.output_tokens is not None]
    tokens, pieces = sum(record.output_tokens or 0 for record in streams), sum(len(record.token_times_s) for record in streams)
    if pieces >= _SEEN * tokens:
        return None
    return (
        f"output tokens are known from usage alone: it counts {tokens:,}, which came in {pieces:,} pieces of text; this engine"
        " gives neither token ids nor counters that would prove them"
    )


def moved(answers: Sequence[Scrape], caused: Caused | None) -> str | None:
    """Return that one engine cannot have given these answers, None where it can.

    An engine that was restarted counts from 0, and since then only what the client has sent; another engine has a past.
    """
    for earlier, later in _pairs(answers):
        if not _goes_back(earlier, later):
            continue
        since = value_of(later, "output_tokens")
        if _is_older(earlier, later):
            return f"the engine's counters began at another instant: {_OTHER_ENGINES}"
        if since is None:
            return f"the engine's counters went down: it was restarted during the round, or {_OTHER_ENGINES}"
        most = math.inf if caused is None else caused.most("output_tokens")
        if since <= most and not _leaps(answers, most):
            return "the engine's counters went down: it was restarted during the round"
        return f"the engine's counters went back, though not to 0: {_OTHER_ENGINES}"
    return None


def _leaps(answers: Sequence[Scrape], most: float) -> bool:
    """Return whether output tokens grew from one answer to a later one by more than the client can have caused.

    An engine that was restarted has no such past; a young replica beside an old one looks like that.
    """
    counted = [value for answer in answers if (value := value_of(answer, "output_tokens")) is not None]
    return any(later - earlier > most for earlier, later in itertools.combinations(counted, 2))


def _pairs(answers: Sequence[Scrape]) -> Iterator[tuple[Scrape, Scrape]]:
    """Yield each answer with the one before it; the last also with the first, because samples have not everything."""
    known = [answer for answer in answers if answer.series]
    yield from itertools.pairwise(known)
    if len(known) > 2:
        yield known[0], known[-1]


def _values(answer: Scrape) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {(each.name, each.labels): each.value for each in answer.series}


def _beginnings(earlier: Scrape, later: Scrape) -> list[tuple[float, float]]:
    """Return when processes and counters began, as both answers say it."""
    old, new = _values(earlier), _values(later)
    named = (key for key in old if key[0] == "process_start_time_seconds" or key[0].endswith("_created"))
    return [(old[key], new[key]) for key in named if key in new]


def _is_older(earlier: Scrape, later: Scrape) -> bool:
    """Return whether the later answer is of a process that began before the earlier one's: no restart does that."""
    return any(now < before for before, now in _beginnings(earlier, later))


def _goes_back(earlier: Scrape, later: Scrape) -> bool:
    """Return whether a counter went down or is gone, or began at another instant."""
    if any(now != before for before, now in _beginnings(earlier, later)):
        return True
    old, new, names = _values(earlier), _values(later), {each.name for each in later.series}
    for (name, labels), value in old.items():
        # By name, too: llama.cpp has averages of the type counter, and the sum of what may be below 0 may go down.
        if not name.endswith(("_total", "_count")) or not earlier.is_cumulative(name):
            continue
        now = new.get((name, labels))
        # Another replica has other labels; and while a process lives no series goes away.
        if (now is None and value > 0 and (name in names or not later.is_partial)) or (now is not None and now < value):
            return True
    return False


def implausible(deltas: Mapping[Feature, float | None], caused: Caused | None) -> str | None:
    """Return that the client cannot have caused what the engine has counted, None where it can."""
    if caused is None:
        return None
    output, prompt = deltas["output_tokens"], deltas["prompt_tokens"]
    if output is not None and output < caused.counted_tokens:
        return (
            f"the client counted {caused.counted_tokens:,} output tokens, the engine only {output:,.0f}:"
            f" it counts too few, or {_OTHER_ENGINES}"
        )
    others = f"others send requests too, or {_OTHER_ENGINES}"
    if output is not None and output > caused.most("output_tokens"):
        return f"the engine counted {output:,.0f} output tokens, though only {caused.asked_tokens:,} were asked for: {others}"
    if prompt is not None and prompt > caused.most("prompt_tokens"):
        return f"the engine counted {prompt:,.0f} prompt tokens, though only {caused.prompt_tokens:,} were sent: {others}"
    return None
