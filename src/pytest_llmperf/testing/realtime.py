"""The scheduler's steps played in real time, on an event loop with precise timers.

Tokens leave when the clock model says: each step ends at its start plus its duration, whatever the event loop did meanwhile.
So a busy machine delays a token, but never those after it, as a chain of sleeps would.
"""

from __future__ import annotations

import asyncio
import select
import selectors
import sys
from collections import deque
from typing import TYPE_CHECKING

from pytest_llmperf.testing.scheduler import Request, Scheduler, Step

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_llmperf.testing.clock import Clock

if sys.platform == "linux":

    class _PreciseSelector(selectors.EpollSelector):
        """Waits in microseconds; epoll's own time-out is in milliseconds, half a decode step of a small model."""

        def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
            # An epoll descriptor is itself one that select() can wait for; select() takes descriptors below 1024.
            if timeout is not None and timeout > 0 and self.fileno() < 1024:
                select.select([self.fileno()], [], [], timeout)
                timeout = 0
            return super().select(timeout)

    def event_loop() -> asyncio.AbstractEventLoop:
        """Return a new event loop whose timers are good to about 0.1 ms."""
        return asyncio.SelectorEventLoop(_PreciseSelector())

else:

    def event_loop() -> asyncio.AbstractEventLoop:
        """Return a new event loop."""
        return asyncio.new_event_loop()


class Steps:
    """Plays a scheduler: one timer per step, at an absolute deadline; calls the listener of each emitted token."""

    def __init__(self, clock: Clock, *, round_gap_s: float) -> None:
        """Start idle; a pause shorter than `round_gap_s` does not end a round."""
        self.scheduler = Scheduler(clock)
        self.hung = False
        self._round_gap_s = round_gap_s
        self._loop = asyncio.get_running_loop()
        self._arrived: deque[tuple[float, Request]] = deque()
        self._listeners: dict[int, Callable[[], None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._idle_since_s = self._loop.time()

    @property
    def busy(self) -> bool:
        """Return True while a request waits for tokens."""
        return bool(self._listeners)

    def submit(self, request: Request, listener: Callable[[], None]) -> None:
        """Take a request that arrives now; raises ValueError when it can never be served."""
        self.scheduler.check(request)
        self._listeners[request.request_id] = listener
        self._arrived.append((self._loop.time(), request))
        if self._timer is None and not self.hung:
            self._begin(self._arrived[0][0])

    def abort(self, request_id: int) -> None:
        """Drop a request; nothing happens when it is finished."""
        if self._listeners.pop(request_id, None) and not self.scheduler.abort(request_id):
            self._arrived = deque(entry for entry in self._arrived if entry[1].request_id != request_id)

    def hang(self) -> None:
        """Emit no token any more."""
        self.hung = True
        self.stop()

    def stop(self) -> None:
        """End the step under way without its tokens."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _begin(self, start_s: float) -> None:
        if self.scheduler.idle:
            if not self._arrived:
                self._timer = None
                return
            start_s = max(start_s, self._arrived[0][0])
            self.scheduler.idled(start_s - self._idle_since_s)
        # A request that came after this step's start waits for the next step: a late loop would serve it before its arrival.
        while self._arrived and self._arrived[0][0] <= start_s:
            same_round = start_s - self._idle_since_s < self._round_gap_s
            self.scheduler.add(self._arrived.popleft()[1], same_round=same_round)
        step = self.scheduler.step()
        end_s = start_s + step.duration_s
        self._timer = self._loop.call_at(end_s, self._end, end_s, step)

    def _end(self, end_s: float, step: Step) -> None:
        for request_id in step.emitted:
            if listener := self._listeners.get(request_id):
                listener()
        for request_id in step.finished:
            self._listeners.pop(request_id, None)
        if self.scheduler.idle:  # also where the next request has arrived already
            self._idle_since_s = end_s
        if not self.hung:
            self._begin(end_s)
