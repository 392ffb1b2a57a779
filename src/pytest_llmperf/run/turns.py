"""Whose turn it is: a test runs as often as its evidence needs, and is reported once.

A test that is undecided waits until all tests of its engine have had their turn; then those that wait run again, all on the
engine's next start. So an engine starts `1 + (extra launches of its most undecided case)` times, and whatever watches reports
sees each test once, when it is final. Where a sweep has left the engine running that the next tests want, they have their turn
first, and whoever waits goes on waiting with those of them that are undecided.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_llmperf.plan.engine import EngineSpec
    from pytest_llmperf.run.cases import CaseState

Item = TypeVar("Item")


class Result(Enum):
    """How the run of a test ended."""

    PASSED = "passed"
    UNDECIDED = "undecided"
    """A comparison asks for another launch."""
    MISSED = "missed"
    """An assertion failed."""
    FAILED = "failed"
    """Anything else."""


@dataclass(frozen=True)
class Action(Generic[Item]):
    """What follows when a test has run."""

    final: bool
    """Its result counts; otherwise it runs again on another start of its engine."""
    following: Item | None
    """What runs next, be it the same test; None at the end."""
    stops_engine: bool
    """Nobody needs the running engine any more."""


def runs_again(result: Result, states: Sequence[CaseState]) -> bool:
    """Return whether a test is to run again: it is undecided, or has missed a limit of its own on the first launch.

    One launch may never fail a test: an absolute limit that was missed is confirmed by a second.
    """
    if result is not Result.MISSED or not states:
        return result is Result.UNDECIDED
    refuted = any(state.verdict and not state.verdict.status.green for state in states)
    return not refuted and min(len(state.launches) for state in states) == 1


class Turns(Generic[Item]):
    """The tests of an engine that run in this turn, and those that wait for its next start."""

    def __init__(self, spec_of: Callable[[Item | None], EngineSpec | None], *, alone: bool = False) -> None:
        """Note how to tell a test's engine; `alone`: a test cannot wait for others, and runs again at once."""
        self._spec_of = spec_of
        self._alone = alone
        self._turn: deque[Item] = deque()
        self._waiting: deque[Item] = deque()
        self._behind: Item | None = None
        self._is_last = True

    @property
    def current(self) -> Item | None:
        """Return the test that runs now; None when all of this turn, and all that need not wait, have run."""
        return self._turn[0] if self._turn else None

    def offer(self, item: Item, behind: Item | None) -> None:
        """Begin the turn of a test; `behind` is the one that comes after it."""
        self._turn, self._behind = deque([item]), behind
        self._is_last = self._spec_of(behind) != self._spec_of(item)

    def next(self, item: Item, *, again: bool, running: EngineSpec | None, stopping: bool = False) -> Action[Item]:
        """Return what follows when the current test has run.

        `again`: it is to run again. `running` is what the engine that is up was started from. `stopping`: the
        session ends, and no other test will run.
        """
        self._turn.popleft()
        if again:
            self._waiting.append(item)
        elif stopping:
            self.drop()
            self._behind, self._is_last = None, True
        ends = self._ends(running)
        stops_engine = ends and not self._waiting
        if self._waiting and (self._alone or ends):
            self._turn, self._waiting = self._waiting, deque()
        return Action(not again, self._following(), stops_engine)

    def give_up(self, item: Item, *, running: EngineSpec | None = None) -> Item | None:
        """Take a test back, whether it was to run again or was in its turn; return what runs next instead.

        Those that wait have their turn where it was the last of its engine. `running` as in `next`.
        """
        for queue in (self._turn, self._waiting):
            if item in queue:
                queue.remove(item)
        if self._waiting and not self._turn and (self._alone or self._ends(running)):
            self._turn, self._waiting = self._waiting, deque()
        return self._following()

    def drop(self) -> None:
        """Forget all that was to run."""
        self._turn.clear()
        self._waiting.clear()

    def _ends(self, running: EngineSpec | None) -> bool:
        """Return whether the turn is over: behind an engine's last test, unless what it leaves running is what the next wants."""
        wanted = running is not None and running == self._spec_of(self._following())
        return self._is_last and not self._turn and not wanted

    def _following(self) -> Item | None:
        return self._turn[0] if self._turn else self._behind
