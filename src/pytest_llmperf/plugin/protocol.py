"""Run a test as often as its evidence needs, and report it once.

A test that is undecided raises `Undecided`. Its item waits until all items of its engine have had their turn; then those
that wait run again, all on the engine's next start. So an engine starts `1 + (extra launches of its most undecided case)`
times, and whatever watches reports sees each test once, when it is final. Where a sweep has left the engine running that the
next items want, they have their turn first, and whoever waits goes on waiting with those of them that are undecided.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pytest_llmperf.plugin.collection import PLANNED
from pytest_llmperf.plugin.run import RUN, CaseState, Undecided
from pytest_llmperf.report.outcome import to_data

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_llmperf.plan.engine import EngineSpec
    from pytest_llmperf.report.outcome import Outcome
    from pytest_llmperf.run.pool import EnginePool

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
        item.stash[STATES] = []
        last = _spec_of(nextitem) != item.stash[PLANNED].spec
        ends = self._attempt(item, nextitem, last=last)
        while self._waiting and ends:
            turn, self._waiting = self._waiting, []
            for position, one in enumerate(turn, 1):
                if item.session.shouldfail or item.session.shouldstop:
                    self._waiting = []
                    return
                final_turn = position == len(turn)
                following = nextitem if final_turn else turn[position]
                ends = self._attempt(one, following, last=last and final_turn)

    def _attempt(self, item: pytest.Item, nextitem: pytest.Item | None, *, last: bool) -> bool:
        """Run setup, call and teardown, and report them if they are final; otherwise the item waits for another start.

        The `last` item of an engine ends the turn, so that the first item that waits runs next, and stops the engine in its
        teardown, where trouble has a test to be reported on; unless it has started the very engine that the next item wants:
        then the turn goes on with that one. Returns whether the turn has ended.
        """
        _renew(item)
        calls = [_call(item, "setup")]
        if calls[0].excinfo is None and not item.config.getoption("setuponly", False):
            calls.append(_call(item, "call"))
        final = not self._must_wait(item, calls[-1])
        if final:
            _settle(item, calls)
            _publish(item, calls)
        else:
            self._waiting.append(item)
            # Fixtures such as `tmp_path` look for the report of the call when they are torn down: it is made, and not told.
            for call in (calls[0], pytest.CallInfo.from_call(lambda: None, when="call")):
                _report(item, call)
        if final and (item.session.shouldfail or item.session.shouldstop):  # no other item will run: what is up is stopped here
            nextitem, last, self._waiting = None, True, []
        wanted = self._pool.spec is not None and self._pool.spec == _spec_of(nextitem)
        # Under xdist a worker may report only the item that it was told to run, so an item cannot wait for others there.
        ends = hasattr(item.config, "workerinput") or (last and not wanted)
        coming = self._waiting[0] if ends and self._waiting else nextitem
        # An item that runs next itself: with its parent as the next one, its own fixtures are torn down all the same.
        stand_in: Any = item.parent if coming is item else coming
        teardown = _call(item, "teardown", nextitem=stand_in)
        if last and not wanted and not self._waiting and teardown.excinfo is None:
            teardown = _timed(item, "teardown", self._pool.close)
        if teardown.excinfo is not None and not final:
            self._waiting.remove(item)  # its fixtures are broken: a further launch would prove nothing
            _publish(item, calls[:1])
            if coming is item:
                _call(item, "teardown", nextitem=self._waiting[0] if self._waiting else nextitem)
            final = True
        if final:
            _log(item, teardown, _report(item, teardown))
            item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return ends

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


def _spec_of(item: pytest.Item | None) -> EngineSpec | None:
    """Return the engine that an item is planned on; None for one without, and for no item."""
    plan = item.stash.get(PLANNED, None) if item is not None else None
    return plan.spec if plan is not None else None


def _renew(item: pytest.Item) -> None:
    """Give an item that has run before a fresh request, as `pytest-rerunfailures` does: there is no public way."""
    if item.stash[STATES] and hasattr(item, "_initrequest"):
        item._initrequest()


def _call(item: pytest.Item, when: Any, **arguments: Any) -> pytest.CallInfo[Any]:
    hook = getattr(item.ihook, f"pytest_runtest_{when}")
    return _timed(item, when, lambda: hook(item=item, **arguments))


def _timed(item: pytest.Item, when: Any, run: Callable[[], Any]) -> pytest.CallInfo[Any]:
    stop: tuple[type[BaseException], ...] = (pytest.exit.Exception,)
    if not item.config.getoption("usepdb", False):
        stop += (KeyboardInterrupt,)
    return pytest.CallInfo.from_call(run, when=when, reraise=stop)


def _report(item: pytest.Item, call: pytest.CallInfo[Any]) -> pytest.TestReport:
    report: pytest.TestReport = item.ihook.pytest_runtest_makereport(item=item, call=call)
    return report


def _settle(item: pytest.Item, calls: list[pytest.CallInfo[Any]]) -> None:
    """Write what a test that passed has recorded; a file that cannot be written makes it fail."""
    run, states = item.config.stash[RUN], item.stash[STATES]
    passed = calls[-1].when == "call" and calls[-1].excinfo is None
    settled = _timed(item, "call", lambda: run.settle(states, passed=passed))
    if settled.excinfo is not None:
        calls[-1] = settled
    for number, state in enumerate(states, 1):  # every metric's median becomes a JUnit property
        prefix = "llmperf." if number == 1 else f"llmperf.{number}."
        for row in run.outcome(state, state.case.id).verdict.metrics:
            if row.measured is not None:
                item.user_properties.append((prefix + row.metric, row.measured))


def _publish(item: pytest.Item, calls: list[pytest.CallInfo[Any]]) -> None:
    """Report setup and call, with what came of the test's cases on the last of the two."""
    from pytest_llmperf.plugin.output import clear
    from pytest_llmperf.plugin.sweep import LEFT_OUT
    from pytest_llmperf.report.text import section

    reports = [_report(item, call) for call in calls]
    run, plan = item.config.stash.get(RUN, None), item.stash[PLANNED]
    # Ids as collected: xdist may have added a group to the item's own.
    outcomes = [run.outcome(state, plan.case_id) for state in item.stash[STATES]] if run else []
    if run and not outcomes and calls[-1].excinfo is not None:
        outcomes = [run.unmeasured(plan, skipped=reports[-1].skipped, why=str(calls[-1].excinfo.value))]
    left_out: list[Outcome] = item.stash.get(LEFT_OUT, [])
    outcomes += left_out
    reports[-1].llmperf = [to_data(outcome) for outcome in outcomes]  # type: ignore[attr-defined]  # travels with xdist
    shown = [outcome for outcome in outcomes if outcome.verdict.metrics]
    reports[-1].sections += [(f"llmperf {outcome.id}", section(outcome)) for outcome in shown]
    clear(item.config)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for call, report in zip(calls, reports, strict=True):
        _log(item, call, report)
    for state in item.stash[STATES]:
        item.config.stash[RUN].states.pop(state.case.id, None)


def _log(item: pytest.Item, call: pytest.CallInfo[Any], report: pytest.TestReport) -> None:
    item.ihook.pytest_runtest_logreport(report=report)
    if call.excinfo is not None and report.failed and not hasattr(report, "wasxfail"):
        item.ihook.pytest_exception_interact(node=item, call=call, report=report)
