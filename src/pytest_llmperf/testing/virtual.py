"""A round in virtual time: the engine computes its times, and nobody waits for them.

The client loses no time: it sends each request when it is due, and stamps each byte when that leaves. So the same round has the
same times on every machine, however busy it is.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_llmperf.testing import wire

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_llmperf.testing.realtime import Steps
    from pytest_llmperf.testing.scheduler import Request

VIRTUAL_START_NS = 1_000_000_000
"""The first instant of an engine's life: not 0, which says that a request was not sent."""


@dataclass(frozen=True)
class VirtualPlan:
    """What a client sends in one round."""

    requests: tuple[bytes, ...]
    """HTTP requests, as they would go over the wire."""
    conversations: tuple[tuple[int, ...], ...]
    """Indices of requests, of which each but the first waits for the answer of the one before."""
    concurrency: int
    """Conversations that are under way at once in a closed loop."""
    due_ns: tuple[int, ...] = ()
    """When each request is sent, from the round's beginning; empty in a closed loop."""

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> VirtualPlan:
        """Return the plan in a decoded JSON body; raises KeyError for a missing field."""
        requests = tuple(text.encode("latin-1") for text in data["requests"])
        conversations = tuple(map(tuple, data["conversations"]))
        return cls(requests, conversations, int(data["concurrency"]), tuple(data["due_ns"]))


@dataclass
class VirtualExchange:
    """One request and the bytes of its answer with the instants at which they left, in virtual nanoseconds."""

    sent_ns: int = 0
    """0 while it is not sent."""
    from_ns: int = 0
    """When it could be sent; 0 for the first requests of a closed loop."""
    reads: list[tuple[int, str]] = field(default_factory=list)
    """The bytes as latin-1, so that JSON can carry them."""
    error: str | None = None
    """Why the connection was closed before the answer was complete."""


@dataclass
class Generation:
    """An accepted request: what it asks the scheduler for, and how its tokens look on the wire."""

    request: Request
    reply: wire.Reply
    stream: bool
    cut_at: int | None = None
    """The connection is closed in the place of the token of this index."""
    sent: int = 0
    """Tokens that have left."""


class VirtualRound:
    """Plays one plan on an engine that has nothing else to do."""

    def __init__(self, steps: Steps, accept: Callable[[wire.HttpRequest], Generation | None], plan: VirtualPlan) -> None:
        """Note what to play; `accept` raises RefusedError, and returns None for an engine that has crashed."""
        self.exchanges = [VirtualExchange() for _ in plan.requests]
        self.stalled = False
        self._steps = steps
        self._scheduler = steps.scheduler
        self._accept = accept
        self._plan = plan
        self._conversations = deque(map(deque, plan.conversations))
        self._open: dict[int, tuple[int, Generation, deque[int]]] = {}
        self._added = False

    def play(self, start_ns: int) -> int:
        """Play it from this instant, and return the instant of its end."""
        now_ns = start_ns
        while True:
            now_ns = self._send_due(start_ns, now_ns)
            if self.stalled or (not self._open and not self._conversations):
                return now_ns
            step = self._scheduler.step()
            now_ns += round(step.duration_s * 1e9)
            for request_id in step.emitted:
                if request_id in self._open:
                    self._emit(request_id, now_ns)

    def _send_due(self, start_ns: int, now_ns: int) -> int:
        """Send what is due and return the instant: while no request is under way, that at which the next one is due."""
        plan = self._plan
        while self._conversations and not self.stalled:
            if not plan.due_ns:
                if len(self._open) >= plan.concurrency:
                    break
                # The first requests of a closed loop wait for no other.
                self._send(self._conversations.popleft(), now_ns, now_ns if now_ns > start_ns else 0)
                continue
            due_ns = start_ns + plan.due_ns[self._conversations[0][0]]
            if due_ns > now_ns:
                if self._open:
                    break
                now_ns = due_ns
            self._send(self._conversations.popleft(), due_ns, due_ns)
        return now_ns

    def _send(self, conversation: deque[int], sent_ns: int, from_ns: int) -> None:
        """Send a conversation's next request, and those behind it while the engine refuses them."""
        while conversation and not self.stalled:
            index = conversation.popleft()
            exchange = self.exchanges[index]
            exchange.sent_ns, exchange.from_ns = sent_ns, from_ns
            try:
                request = wire.take_request(bytearray(self._plan.requests[index]))
                if request is None:
                    raise wire.RefusedError("Invalid HTTP request received.")
                generation = self._accept(request)
                if generation is not None:
                    self._scheduler.add(generation.request, same_round=self._added)
            except wire.RefusedError as refused:
                exchange.reads.append((sent_ns, refused.response.decode("latin-1")))
                from_ns = sent_ns
                continue
            if generation is None or self._steps.hung:
                self.stalled = True
                return
            if generation.stream:
                exchange.reads.append((sent_ns, wire.EVENT_STREAM_HEAD.decode("latin-1")))
            self._added = True
            self._open[generation.request.request_id] = index, generation, conversation
            return

    def _emit(self, request_id: int, now_ns: int) -> None:
        index, generation, conversation = self._open[request_id]
        exchange = self.exchanges[index]
        sent = generation.sent
        generation.sent += 1
        last = sent + 1 == generation.request.output_tokens
        if sent == generation.cut_at:
            self._scheduler.abort(request_id)
            exchange.error = "the server closed the connection in the middle of the response"
            last = True
        elif generation.stream:
            exchange.reads.append((now_ns, generation.reply.token(sent).decode("latin-1")))
        elif last:
            exchange.reads.append((now_ns, generation.reply.response().decode("latin-1")))
        if last:
            del self._open[request_id]
            self._send(conversation, now_ns, now_ns)


def to_data(played: VirtualRound, start_ns: int) -> dict[str, Any]:
    """Return a played round as JSON data."""
    return {"start_ns": start_ns, "stalled": played.stalled, "exchanges": [vars(exchange) for exchange in played.exchanges]}
