"""The answers of a round: responses that have ended, parsed when there is nothing to read; their bytes are dropped then."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from pytest_llmperf.measure.client.response import RequestRecord, parse_response

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_llmperf.measure.client.exchange import Exchange
    from pytest_llmperf.measure.client.messages import RoundPlan

encode = msgspec.msgpack.Encoder().encode
_MISSING = encode(RequestRecord(None, error="never sent: the round had stalled or timed out"))


class Answers:
    """What has come of each request of a plan."""

    def __init__(self, plan: RoundPlan) -> None:
        """Have no answer yet."""
        self.plan = plan
        self.start_ns = 0
        """When the round began."""
        self.finished: deque[tuple[Exchange, str | None]] = deque()
        """Responses that are not parsed yet, with what went wrong."""
        self.unparsed_bytes = 0
        self._records: dict[int, bytes] = {}
        """Encoded at once: as objects the times of a million tokens would take four times the memory."""
        self.due_ns: dict[int, int] = {}
        """When requests behind a pause were due."""

    def add(self, exchange: Exchange, error: str | None) -> None:
        """Note a response that has ended, well or not."""
        self.finished.append((exchange, error))
        self.unparsed_bytes += exchange.received

    def lose(self, indices: deque[int], error: str) -> None:
        """Note requests that can no longer be sent."""
        for index in indices:
            self._records[index] = encode(RequestRecord(None, error=error))
        indices.clear()

    def parse(self) -> None:
        """Turn the oldest finished response into its record, and forget its bytes."""
        exchange, error = self.finished.popleft()
        self.unparsed_bytes -= exchange.received
        plan, index = self.plan, exchange.index
        if not exchange.sent_ns:
            self._records[index] = encode(RequestRecord(None, error=error))
            return
        record = to_record(
            plan,
            index,
            exchange.reads,
            sent_ns=exchange.sent_ns,
            from_ns=exchange.from_ns,
            start_ns=self.start_ns,
            error=error,
            due_ns=self.due_ns.get(index),
        )
        try:
            self._records[index] = encode(record)
        except OverflowError:
            wrong = f"usage says {record.prompt_tokens} prompt tokens and {record.output_tokens} tokens"
            self._records[index] = encode(replace(record, prompt_tokens=None, output_tokens=None, error=wrong))

    def records(self) -> list[msgspec.Raw]:
        """Return the encoded record of every request, in the plan's order; parses what is left."""
        while self.finished:
            self.parse()
        return [msgspec.Raw(self._records.get(index, _MISSING)) for index in range(len(self.plan.requests))]


def to_record(
    plan: RoundPlan,
    index: int,
    reads: Sequence[tuple[int, bytes]],
    *,
    sent_ns: int,
    from_ns: int,
    start_ns: int,
    error: str | None,
    due_ns: int | None = None,
) -> RequestRecord:
    """Return the record of a plan's request from the reads of its response.

    `from_ns` is when it could be sent, 0 at a closed loop's beginning; `start_ns` is when the round began, and `due_ns` when a
    request behind a pause was due.
    """
    record = parse_response(
        reads,
        sent_ns=sent_ns,
        wanted=plan.output_tokens[index],
        error=error,
        exact=plan.exact[index] if plan.exact else True,
        stream=plan.stream,
    )
    is_first = not (plan.follows and plan.follows[index])
    due_s = None
    if plan.due_ns and (is_first or due_ns is not None):
        due_s = (start_ns + plan.due_ns[index] if due_ns is None else due_ns) / 1e9
    return replace(record, due_s=due_s, delay_s=(sent_ns - from_ns) / 1e9 if from_ns else None)
