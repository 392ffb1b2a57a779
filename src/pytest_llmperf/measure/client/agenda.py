"""What is left to send in a round, and when: conversations that begin, and those whose user thinks about an answer."""

from __future__ import annotations

import heapq
import time
from collections import deque
from itertools import chain
from typing import TYPE_CHECKING

from pytest_llmperf.measure.client.messages import OVER

if TYPE_CHECKING:
    from pytest_llmperf.measure.client.answers import Answers
    from pytest_llmperf.measure.client.messages import RoundPlan

FOREVER_NS = 1 << 62


class Agenda:
    """The conversations of a plan that are not under way, and those that pause."""

    def __init__(self, plan: RoundPlan, answers: Answers) -> None:
        """Have all of them before us; what is never sent is lost to `answers`."""
        self.plan = plan
        self.answers = answers
        self.talks = deque(plan.conversations())
        self.paused: list[tuple[int, int, deque[int]]] = []
        """When the next request of a conversation is due, its index, and it with those behind it."""
        self.timed = bool(plan.due_ns or plan.think_ns)
        """Something is due at an instant of its own."""

    def follow(self, queue: deque[int], from_ns: int) -> bool:
        """Fill the queue of a free connection with what comes next, and return whether it is to be sent at once.

        In a closed loop another conversation begins when one is over. Where the user thinks first, what follows is put off; what
        would come after the round's time is lost.
        """
        plan = self.plan
        if queue and plan.think_ns and plan.think_ns[queue[0]]:
            self.put_off(queue, from_ns)
            return False
        if not queue and self.talks and not plan.due_ns:
            queue.extend(self.talks.popleft())
        if queue and plan.stop_ns is not None and time.monotonic_ns() >= self.answers.start_ns + plan.stop_ns:
            self.lose(queue, OVER)
        return bool(queue)

    def put_off(self, queue: deque[int], from_ns: int) -> None:
        """Have the rest of a conversation wait for its user, from the answer on."""
        plan, index = self.plan, queue[0]
        due_ns = from_ns + plan.think_ns[index]
        if plan.stop_ns is not None and due_ns >= self.answers.start_ns + plan.stop_ns:
            self.answers.lose(queue, OVER)
            return
        self.answers.due_ns[index] = due_ns
        heapq.heappush(self.paused, (due_ns, index, deque(queue)))
        queue.clear()

    def next_due_ns(self) -> int:
        """Return when something is due next; a long time from now where nothing is."""
        resumes = self.paused[0][0] if self.paused else FOREVER_NS
        if not self.talks or not self.plan.due_ns:
            return resumes
        return min(resumes, self.answers.start_ns + self.plan.due_ns[self.talks[0][0]])

    def take_due(self, due_ns: int) -> deque[int]:
        """Return the conversation that is due at this instant."""
        if self.paused and self.paused[0][0] == due_ns:
            return heapq.heappop(self.paused)[2]
        return deque(self.talks.popleft())

    def lose(self, lost: deque[int], error: str) -> None:
        """Lose these requests, and in a closed loop all that no connection is left for."""
        while self.talks and not self.plan.due_ns:
            lost.extend(self.talks.popleft())
        self.answers.lose(lost, error)

    def rest(self) -> list[int]:
        """Return the requests that are left, and have none left."""
        left = [*chain.from_iterable(self.talks), *chain.from_iterable(queue for _, _, queue in self.paused)]
        self.talks.clear()
        self.paused.clear()
        return left

    def end(self) -> None:
        """Lose what a closed loop has left though nobody is under way who could send it: all think until its time is over."""
        if self.plan.stop_ns is not None:
            self.lose(deque(), OVER)
