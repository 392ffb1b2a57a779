"""Run a test as often as its evidence needs, and report it once; `run.turns` says whose turn it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pytest_llmperf.plugin.guard import fail_item, guarded
from pytest_llmperf.plugin.measuring import Undecided, failing
from pytest_llmperf.plugin.outlet import clean, clean_data, clean_report
from pytest_llmperf.plugin.private import renew
from pytest_llmperf.plugin.progress import clear
from pytest_llmperf.plugin.state import ITEM, SESSION, run_of
from pytest_llmperf.report.outcome import to_data
from pytest_llmperf.report.text import section
from pytest_llmperf.run.outcomes import outcome_of, unmeasured
from pytest_llmperf.run.recording import settle
from pytest_llmperf.run.turns import Result, runs_again

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_llmperf.plan.engine import EngineSpec
    from pytest_llmperf.plugin.state import Fault
    from pytest_llmperf.run.turns import Turns


def run_item(item: pytest.Item, nextitem: pytest.Item | None, turns: Turns[pytest.Item]) -> None:
    """Run an item, and behind the last one of its engine also those that wait."""
    item.stash[ITEM].states.clear()
    item.stash[ITEM].published = False
    turns.offer(item, nextitem)
    while (current := turns.current) is not None:
        if _stops(item.session):
            turns.drop()
            return
        _attempt(current, turns)


def _broken(fault: Fault, item: pytest.Item, turns: Turns[pytest.Item]) -> None:
    """Report an item in whose turn the plugin itself has failed, and take what it has begun back; the others go on.

    Where its engine stands is not known: it is stopped.
    """
    following = turns.give_up(item)
    fail_item(item, fault, following, reported=item.stash[ITEM].published)
    run = run_of(item.config)
    run.pool.discard()
    for state in item.stash[ITEM].states:
        run.states.pop(state.case.id, None)


@guarded(
    hook="pytest_runtest_protocol",
    otherwise=_broken,
    catches=(Exception, pytest.fail.Exception, pytest.skip.Exception, Undecided),  # none of them may leave a test
)
def _attempt(item: pytest.Item, turns: Turns[pytest.Item]) -> None:
    """Run setup, call and teardown, and report them if they are final.

    The engine is stopped in the teardown of the last item that needs it, where trouble has a test to be reported on.
    """
    kept, pool = item.stash[ITEM], run_of(item.config).pool
    item.config.stash[SESSION].current = item
    if kept.states:
        renew(item, kept.properties)
    else:
        kept.properties = list(item.user_properties)
    calls = [_call(item, "setup")]
    if kept.unmeasured and calls[0].excinfo is not None:
        calls[0].when = "call"  # it fails or is skipped as if it had been measured, which is no error of its set-up
        calls.insert(0, pytest.CallInfo.from_call(lambda: None, when="setup"))
    elif calls[0].excinfo is None and not item.config.getoption("setuponly", False):
        calls.append(_call(item, "call"))
    result = _result(calls[-1])
    again = runs_again(result, kept.states)
    if again:
        if result is Result.MISSED:
            for state in kept.states:
                state.decided = False
        # Fixtures such as `tmp_path` look for the report of the call when they are torn down: it is made, and not shown.
        for call in (calls[0], pytest.CallInfo.from_call(lambda: None, when="call")):
            _report(item, call)
    else:
        _publish(item, calls)
    action = turns.next(item, again=again, running=pool.spec, stopping=_stops(item.session))
    # An item that runs next itself: with its parent as the next one, its own fixtures are torn down all the same.
    stand_in: Any = item.parent if action.following is item else action.following
    teardown = _call(item, "teardown", nextitem=stand_in)
    stops = action.stops_engine and teardown.excinfo is None
    if stops:
        teardown = _timed(item, "teardown", pool.close)
    if teardown.excinfo is not None and again:
        following = turns.give_up(item, running=pool.spec)  # its fixtures are broken: a further launch would prove nothing
        _publish(item, calls[:1])
        if action.following is item:
            _call(item, "teardown", nextitem=following)
        again = False
    if not again:
        report = _report(item, teardown)
        if stops and teardown.excinfo is not None:
            _turn_red(item, teardown, report)
        _log(item, teardown, report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)


def _settle(item: pytest.Item, report: pytest.TestReport) -> pytest.CallInfo[Any] | None:
    """Write what a test that passed has recorded; return the failed call where a file cannot be written.

    The report tells whether it passed: a call that raised nothing may have failed, such as one that should have under xfail.
    Its status is asked for first: pytest's subtests turn it into a failure only there.
    """
    if report.when == "call":
        item.config.hook.pytest_report_teststatus(report=report, config=item.config)
    passed = report.when == "call" and report.passed

    def write() -> None:
        with failing():
            settle(item.stash[ITEM].states, passed=passed)

    settled = _timed(item, "call", write)
    return settled if settled.excinfo is not None else None


def _turn_red(item: pytest.Item, failed: pytest.CallInfo[Any], report: pytest.TestReport) -> None:
    """Have the report of a call tell of our own failure in it or behind it.

    It does not go through the hook again: under xfail that would take our failure for the expected one. What other
    plugins have added to the report stays.
    """
    made = pytest.TestReport.from_item_and_call(item, failed)
    report.outcome, report.longrepr = made.outcome, made.longrepr
    vars(report).pop("wasxfail", None)
    clean_report(item.config, report)


def _publish(item: pytest.Item, calls: list[pytest.CallInfo[Any]]) -> None:
    """Report setup and call, with what came of the test's cases on the last of the two."""
    kept = item.stash[ITEM]
    for number, state in enumerate(kept.states, 1):  # every metric's median becomes a JUnit property
        prefix = "llmperf." if number == 1 else f"llmperf.{number}."
        for row in outcome_of(state).verdict.metrics:
            if row.measured is not None:
                item.user_properties.append((clean(item.config, prefix + row.metric), row.measured))
    reports = [_report(item, call) for call in calls]
    if failed := _settle(item, reports[-1]):
        calls[-1] = failed
        _turn_red(item, failed, reports[-1])
    # Ids as collected: xdist may have added a group to the item's own.
    outcomes = [outcome_of(state, kept.planned.case_id) for state in kept.states]
    outcomes = outcomes or list(kept.unmeasured)
    if not outcomes and (excinfo := calls[-1].excinfo) is not None:
        outcomes = [unmeasured(kept.planned, skipped=reports[-1].skipped, why=str(excinfo.value))]
    outcomes += kept.left_out
    reports[-1].llmperf = clean_data(item.config, [to_data(outcome) for outcome in outcomes])  # type: ignore[attr-defined]  # travels with xdist
    shown = [outcome for outcome in outcomes if outcome.verdict.metrics]
    reports[-1].sections += [(f"llmperf {outcome.id}", clean(item.config, section(outcome))) for outcome in shown]
    clear(item.config)
    kept.published = True
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for call, report in zip(calls, reports, strict=True):
        _log(item, call, report)
    for state in kept.states:
        run_of(item.config).states.pop(state.case.id, None)


def _stops(session: pytest.Session) -> bool:
    return bool(session.shouldfail or session.shouldstop)


def spec_of(item: pytest.Item | None) -> EngineSpec | None:
    """Return the engine that an item is planned on; None for one without, and for no item."""
    kept = item.stash.get(ITEM, None) if item is not None else None
    return kept.planned.spec if kept is not None else None


def _result(call: pytest.CallInfo[Any]) -> Result:
    if call.excinfo is None:
        return Result.PASSED
    if call.excinfo.errisinstance(Undecided):
        return Result.UNDECIDED
    return Result.MISSED if call.excinfo.errisinstance(AssertionError) else Result.FAILED


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
    clean_report(item.config, report)
    return report


def _log(item: pytest.Item, call: pytest.CallInfo[Any], report: pytest.TestReport) -> None:
    item.ihook.pytest_runtest_logreport(report=report)
    if call.excinfo is not None and report.failed and not hasattr(report, "wasxfail"):
        item.ihook.pytest_exception_interact(node=item, call=call, report=report)
