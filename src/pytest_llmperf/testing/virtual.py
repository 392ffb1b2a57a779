"""A round in virtual time: the engine computes its times, and nobody waits for them.

The client loses no time: it sends each request when it is due, and stamps each byte when that leaves. So the same round has the
same times on every machine, however busy it is.
"""

from __future__ import annotations

import heapq
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
    max_concurrency: int | None = None
    """The most requests under way where they are sent when due; None: as many as are due."""
    think_ns: tuple[int, ...] = ()
    """The pause before each request that follows another; empty: none."""
    stop_ns: int | None = None
    """From when on, since the round's beginning, a closed loop sends nothing more; None: all is sent."""

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> VirtualPlan:
        """Return the plan in a decoded JSON body; raises KeyError for a missing field."""
        requests = tuple(text.encode("latin-1") for text in data["requests"])
        conversations = tuple(map(tuple, data["conversations"]))
        return cls(
            requests,
            conversations,
            int(data["concurrency"]),
            tuple(data["due_ns"]),
            data.get("max_concurrency"),
            tuple(data.get("think_ns", ())),
            data.get("stop_ns"),
        )


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
    due_ns: int = 0
    """When it was due behind a pause; 0 without one."""
    over: bool = False
    """It was not sent, because the round's time was over."""


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
        self._paused: list[tuple[int, int, deque[int]]] = []
        self._freed_ns = self._start_ns = 0
        self._open: dict[int, tuple[int, Generation, deque[int]]] = {}
        self._added = False

    def play(self, start_ns: int) -> int:
        """Play it from this instant, and return the instant of its end."""
        now_ns = self._start_ns = start_ns
        while True:
            now_ns = self._send_due(now_ns)
            if self.stalled or (not self._open and not self._conversations and not self._paused):
                return now_ns
            step = self._scheduler.step()
            now_ns += round(step.duration_s * 1e9)
            for request_id in step.emitted:
                if request_id in self._open:
                    self._emit(request_id, now_ns)

    def _send_due(self, now_ns: int) -> int:
        """Send what is due and return the instant: while no request is under way, that at which the next one is due."""
        while not self.stalled:
            if not self._plan.due_ns:
                self._fill(now_ns)
            due_ns = self._next_due_ns()
            if due_ns is None or self.stalled or len(self._open) >= (self._plan.max_concurrency or len(self._plan.requests)):
                return now_ns
            if due_ns > now_ns:
                if self._open:
                    return now_ns
                now_ns = due_ns
            # One that the cap held back is sent when there is room, all others when they are due.
            sent_ns = max(due_ns, self._freed_ns)
            if self._paused and self._paused[0][0] == due_ns:
                self._send(heapq.heappop(self._paused)[2], sent_ns, sent_ns)
            else:
                self._send(self._conversations.popleft(), sent_ns, sent_ns)
        return now_ns

    def _fill(self, now_ns: int) -> None:
        """Begin conversations up to the concurrency of a closed loop, or lose them when its time is over."""
        while self._conversations and not self.stalled:
            if self._is_over(now_ns):
                for conversation in self._conversations:
                    self._leave_out(conversation)
                self._conversations.clear()
            elif len(self._open) + len(self._paused) >= self._plan.concurrency:
                return
            else:
                # The first requests of a closed loop wait for no other.
                self._send(self._conversations.popleft(), now_ns, now_ns if now_ns > self._start_ns else 0)

    def _next_due_ns(self) -> int | None:
        due = [self._paused[0][0]] if self._paused else []
        if self._conversations and self._plan.due_ns:
            due.append(self._start_ns + self._plan.due_ns[self._conversations[0][0]])
        return min(due, default=None)

    def _is_over(self, now_ns: int) -> bool:
        return self._plan.stop_ns is not None and now_ns >= self._start_ns + self._plan.stop_ns

    def _leave_out(self, conversation: deque[int]) -> None:
        for index in conversation:
            self.exchanges[index].over = True

    def _follow(self, conversation: deque[int], now_ns: int) -> None:
        """Go on with a conversation: at once, when its user has thought, or not at all where the round's time is over."""
        if not conversation:
            return
        index = conversation[0]
        due_ns = now_ns + (self._plan.think_ns[index] if self._plan.think_ns else 0)
        if self._is_over(due_ns):
            self._leave_out(conversation)
        elif due_ns > now_ns:
            self.exchanges[index].due_ns = due_ns
            heapq.heappush(self._paused, (due_ns, index, conversation))
        else:
            self._send(conversation, now_ns, now_ns)

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
                if conversation and self._plan.think_ns and self._plan.think_ns[conversation[0]]:
                    self._follow(conversation, sent_ns)
                    return
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
            if self._plan.max_concurrency and len(self._open) >= self._plan.max_concurrency:
                self._freed_ns = now_ns
            del self._open[request_id]
            self._follow(conversation, now_ns)


def to_data(played: VirtualRound, start_ns: int) -> dict[str, Any]:
    """Return a played round as JSON data."""
    return {"start_ns": start_ns, "stalled": played.stalled, "exchanges": [vars(exchange) for exchange in played.exchanges]}
