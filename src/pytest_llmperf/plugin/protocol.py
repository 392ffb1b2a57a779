"""Run a test as often as its evidence needs, and report it once.

A test that is undecided raises `Undecided`. Its item waits until all items of its engine have had their turn; then those
that wait run again, all on the engine's next start. So an engine starts `1 + (extra launches of its most undecided case)`
times, and whatever watches reports sees each test once, when it is final.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pytest_llmperf.plugin.collection import PLANNED
from pytest_llmperf.plugin.run import RUN, CaseState, Undecided
from pytest_llmperf.report import to_data

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_llmperf.plugin.pool import EnginePool

STATES: pytest.StashKey[list[CaseState]] = pytest.StashKey()
"""The cases that an item has measured, in the order of its `llmperf()` calls."""


class Protocol:
    """Decides for each llmperf item when it runs, and whether its reports are final."""

    def __init__(self, pool: EnginePool) -> None:
        """Note the pool, whose engine is stopped when no item needs it any more."""
        self._pool = pool
        self._waiting: list[pytest.Item] = []

    def run(self, item: pytest.Item, nextitem: pytest.Item | None) -> None:
        """Run an item, and behind the last one of its engine also those that wait."""
        spec = item.stash[PLANNED].spec
        item.stash[STATES] = []
        # Under xdist a worker may report only the item that it was told to run, so an item cannot wait there.
        shares = not hasattr(item.config, "workerinput")
        last = nextitem is None or PLANNED not in nextitem.stash or nextitem.stash[PLANNED].spec != spec
        self._attempt(item, nextitem, last=last)
        while self._waiting and (last or not shares):
            turn, self._waiting = self._waiting, []
            for position, one in enumerate(turn, 1):
                if item.session.shouldfail or item.session.shouldstop:
                    self._waiting = []
                    break
                following = turn[position] if position < len(turn) else nextitem
                self._attempt(one, following, last=last and position == len(turn))

    def _attempt(self, item: pytest.Item, nextitem: pytest.Item | None, *, last: bool) -> None:
        """Run setup, call and teardown, and report them if they are final; otherwise the item waits for another start.

        The `last` item of an engine stops it in its teardown, where trouble has a test to be reported on.
        """
        _renew(item)
        calls = [_call(item, "setup")]
        if calls[0].excinfo is None and not item.config.getoption("setuponly", False):
            calls.append(_call(item, "call"))
        reports: list[tuple[pytest.CallInfo[Any], pytest.TestReport]] = []
        final = not self._must_wait(item, calls[-1])
        if final:
            _attach_properties(item)
            reports = [(call, _report(item, call)) for call in calls]
        else:
            self._waiting.append(item)
        # An undecided item may run next itself: with its parent as the next one its own fixtures are torn down all the same.
        following: Any = nextitem if final else item.parent
        teardown = _call(item, "teardown", nextitem=following)
        if last and not self._waiting and teardown.excinfo is None:
            teardown = pytest.CallInfo.from_call(self._pool.close, when="teardown")
        if teardown.excinfo is not None and not final:
            self._waiting.remove(item)  # its fixtures are broken: a further launch would prove nothing
            reports = [(calls[0], _report(item, calls[0]))]
        if reports:
            reports.append((teardown, _report(item, teardown)))
            _publish(item, reports)

    def _must_wait(self, item: pytest.Item, call: pytest.CallInfo[Any]) -> bool:
        if call.excinfo is None:
            return False
        if call.excinfo.errisinstance(Undecided):
            return True
        # An absolute limit that one launch has missed is confirmed by a second: one launch may never fail a test.
        states: list[CaseState] = item.stash[STATES]
        missed = call.excinfo.errisinstance(AssertionError) and bool(states)
        refuted = any(state.verdict and state.verdict.status.value not in ("PASS", "IMPROVED") for state in states)
        if not missed or refuted or min(len(state.launches) for state in states) > 1:
            return False
        for state in states:
            state.decided = False
        return True


def _renew(item: pytest.Item) -> None:
    """Give an item that has run before a fresh request, as `pytest-rerunfailures` does: there is no public way."""
    if item.stash[STATES] and hasattr(item, "_initrequest"):
        item._initrequest()


def _call(item: pytest.Item, when: Any, **arguments: Any) -> pytest.CallInfo[Any]:
    hook = getattr(item.ihook, f"pytest_runtest_{when}")
    stop: tuple[type[BaseException], ...] = (pytest.exit.Exception,)
    if not item.config.getoption("usepdb", False):
        stop += (KeyboardInterrupt,)
    run: Callable[[], Any] = lambda: hook(item=item, **arguments)  # noqa: E731  CallInfo takes a callable
    return pytest.CallInfo.from_call(run, when=when, reraise=stop)


def _report(item: pytest.Item, call: pytest.CallInfo[Any]) -> pytest.TestReport:
    report: pytest.TestReport = item.ihook.pytest_runtest_makereport(item=item, call=call)
    return report


def _attach_properties(item: pytest.Item) -> None:
    """Put every metric's median into the JUnit properties of the test."""
    states: list[CaseState] = item.stash[STATES]
    for number, state in enumerate(states, 1):
        prefix = "llmperf." if number == 1 else f"llmperf.{number}."
        for row in item.config.stash[RUN].outcome(state, item.nodeid).verdict.metrics:
            if row.measured is not None:
                item.user_properties.append((prefix + row.metric, row.measured))


def _publish(item: pytest.Item, reports: list[tuple[pytest.CallInfo[Any], pytest.TestReport]]) -> None:
    from pytest_llmperf.plugin.output import clear
    from pytest_llmperf.report.text import section

    run = item.config.stash[RUN]
    nodeid = item.stash[PLANNED].case_id  # as collected: xdist may have added a group to the item's own
    outcomes = [run.outcome(state, nodeid) for state in item.stash[STATES]]
    clear(item.config)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for call, report in reports:
        if report.when == "call" or (report.when == "setup" and report.failed):
            report.llmperf = [to_data(outcome) for outcome in outcomes]  # type: ignore[attr-defined]  # travels with xdist
            report.sections += [(f"llmperf {outcome.id}", section(outcome)) for outcome in outcomes]
        item.ihook.pytest_runtest_logreport(report=report)
        if call.excinfo is not None and report.failed and not hasattr(report, "wasxfail"):
            item.ihook.pytest_exception_interact(node=item, call=call, report=report)
    for outcome in outcomes:
        run.states.pop(outcome.id, None)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
