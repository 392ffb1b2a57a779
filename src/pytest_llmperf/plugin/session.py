"""The session: what is set up when the cases are known, and written or stopped when it ends."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Literal

import pytest

from pytest_llmperf.measure.engines.engine import EngineError, StartSettings
from pytest_llmperf.measure.host.machine import describe_host
from pytest_llmperf.measure.host.preflight import device_shortage, shortage
from pytest_llmperf.plan.checks import PlanError
from pytest_llmperf.plan.kinds import kind_of
from pytest_llmperf.plugin.collection import PLANNED
from pytest_llmperf.plugin.options import OUTCOMES
from pytest_llmperf.plugin.output import COLLECTED, SUITE, tell
from pytest_llmperf.plugin.protocol import Protocol
from pytest_llmperf.plugin.run import RUN, Run
from pytest_llmperf.report.outcome import from_data, json_document
from pytest_llmperf.report.text import suite_line
from pytest_llmperf.run.pool import EnginePool

if TYPE_CHECKING:
    from pytest_llmperf.measure.host.machine import Host
    from pytest_llmperf.plan.engine import EngineSpec
    from pytest_llmperf.plugin.settings import Settings

SUITE_ID = "llmperf::suite"
"""The node id that the suite as a whole is reported under."""
SUITE_ADVICE = """
No single comparison proves it, but all of them together do. Look at the host first: one that is slow today looks just like it.
Then look for what all tests share: the engine's version, its start-up arguments, the driver."""

POOL = pytest.StashKey[EnginePool]()
PROTOCOL = pytest.StashKey[Protocol]()


def prepare(session: pytest.Session, settings: Settings) -> None:
    """Set up the run where there are llmperf tests; raises UsageError where it cannot work at all."""
    config = session.config
    planned = [item for item in session.items if PLANNED in item.stash]
    errors = [item.stash[PLANNED].error for item in planned]
    if any(errors) and not hasattr(config, "workerinput"):
        raise pytest.UsageError("\n".join(error for error in errors if error))
    if not planned or any(errors):
        return
    try:
        host = describe_host(simulated=kind_of(settings.kind).simulated)
    except PlanError as error:
        raise pytest.UsageError(str(error)) from None
    job = getattr(config, "workerinput", {}).get("testrunuid")  # one run, whatever the number of xdist workers
    config.stash[RUN] = Run(session.items, settings, host, config.rootpath, config.stash[COLLECTED], job)
    start = StartSettings(
        log_folder=config.rootpath,  # replaced by pytest's temporary folder when the first engine starts
        startup_timeout_s=settings.startup_timeout_s,
        stop_grace_s=settings.stop_grace_s,
        api_key=os.environ.get("LLMPERF_API_KEY"),
        served_model=settings.served_model,
    )
    config.stash[POOL] = EnginePool(host, start, lambda text: tell(config, text), alone=settings.exclusive)
    config.stash[PROTOCOL] = Protocol(config.stash[POOL])
    if config.option.collectonly or hasattr(config, "workerinput"):
        return
    started = [item for item in planned if not _brings(item, "llm_engine_url") and not _known_shortage(item, host)]
    if settings.kind in ("server", "offline") and started and not settings.selftest:
        _require_vllm(settings.python)


def _require_vllm(python: str) -> None:
    import sys
    from pathlib import Path

    from pytest_llmperf.measure.engines.vllm import find_vllm

    try:
        find_vllm(python)
    except EngineError as error:
        into = "" if python == sys.executable else f" --into {Path(python).parents[1]}"
        raise pytest.UsageError(
            f"--llmperf-python={python}: {error.what} Install vLLM there (python -m pytest_llmperf engine install{into}),"
            " name another interpreter, or use --llmperf-url"
        ) from None


def judge_suite(session: pytest.Session, settings: Settings) -> None:
    """Judge all comparisons together when the last test is over; where that alone is red, report it as a test that failed.

    The run's exit code is then 1, and JUnit files have the failure too. A run that is red already needs no second failure.
    """
    from pytest_llmperf.judge.suite import judge_suite
    from pytest_llmperf.judge.verdict import Status

    config = session.config
    outcomes = [from_data(data) for data in config.stash[OUTCOMES]]
    compared = ((json.dumps(one.engine, sort_keys=True), one.verdict) for one in outcomes if one.status.compared)
    run = config.stash.get(RUN, None)
    try:  # under xdist this process has measured nothing, and has no run
        key = run.host.key if run else describe_host(simulated=kind_of(settings.kind).simulated).key
    except PlanError as error:
        tell(config, f"the suite as a whole is not judged: {error}")
        return
    verdict = judge_suite(compared, key)
    if verdict is None:
        return
    config.stash[SUITE] = verdict
    red = verdict.outcome == "regressed" and not any(one.status is Status.REGRESSED for one in outcomes)
    cache = getattr(config, "cache", None)  # absent with -p no:cacheprovider
    was_red = cache is not None and SUITE_ID in cache.get("cache/lastfailed", {})
    if red or was_red:
        _report_suite(config, suite_line(verdict) + SUITE_ADVICE if red else "")


def _report_suite(config: pytest.Config, failure: str) -> None:
    """Report the suite as a test: failed with this text, or passed, which takes it off the list of `--lf`."""
    location = (SUITE_ID.partition("::")[0], None, SUITE_ID)
    outcome: Literal["passed", "failed"] = "failed" if failure else "passed"
    config.hook.pytest_runtest_logstart(nodeid=SUITE_ID, location=location)
    for when in ("setup", "call", "teardown") if not failure else ("call", "teardown"):
        one = when == "call"
        report = pytest.TestReport(
            nodeid=SUITE_ID,
            location=location,
            keywords={},
            outcome=outcome if one else "passed",
            longrepr=failure or None if one else None,
            when=when,
        )
        config.hook.pytest_runtest_logreport(report=report)
    config.hook.pytest_runtest_logfinish(nodeid=SUITE_ID, location=location)


def set_up(item: pytest.Item) -> None:
    """Skip or fail a test that this host cannot run, before any of its fixtures are made."""
    plan = item.stash[PLANNED]
    if plan.error or RUN not in item.config.stash:
        pytest.fail(plan.error or "another test of this run has an unusable llmperf marker", pytrace=False)
    if not _brings(item, "llm_engine_url") and not plan.axes.sweep:  # a sweep itself leaves out the degrees that do not fit
        _refuse(item, _known_shortage(item, item.config.stash[RUN].host))


def skip_or_fail(item: pytest.Item, spec: EngineSpec) -> None:
    """Skip a test whose engine this host cannot run; fail it under --llmperf-require-gpus."""
    _refuse(item, shortage(spec, item.config.stash[RUN].host, item.stash[PLANNED].marker.needs))


def _known_shortage(item: pytest.Item, host: Host) -> str | None:
    """Return what the host lacks as far as it is known before fixtures: `llm_engine_args` may change what the model takes."""
    plan = item.stash[PLANNED]
    check = device_shortage if _brings(item, "llm_engine_args") else shortage
    return check(plan.spec, host, plan.marker.needs)


def _refuse(item: pytest.Item, reason: str | None) -> None:
    if reason is None:
        return
    if item.config.stash[RUN].settings.require_gpus:
        pytest.fail(f"{reason}; --llmperf-require-gpus turns this skip into a failure", pytrace=False)
    pytest.skip(reason)


def _brings(item: pytest.Item, fixture: str) -> bool:
    """Return whether a project's own fixture replaces ours: then only running it tells what is started.

    Which fixtures a test will use is known to pytest when it is collected, but there is no public way to ask.
    """
    info = getattr(item, "_fixtureinfo", None)
    return info is not None and len(info.name2fixturedefs.get(fixture, ())) > 1


def end(session: pytest.Session, settings: Settings) -> None:
    """Stop what still runs, and write the JSON file; the cases that were never finished are in it too."""
    config = session.config
    if POOL in config.stash:
        try:
            config.stash[POOL].shutdown()
        except EngineError as error:
            tell(config, str(error))
    if settings.json_path is None or hasattr(config, "workerinput") or config.option.collectonly:
        return
    outcomes = [from_data(data) for data in config.stash.get(OUTCOMES, [])]
    run = config.stash.get(RUN, None)
    if run is not None:
        outcomes += [run.outcome(state, state.case.id) for state in run.states.values() if state.launches]
    settings.json_path.write_text(json_document(outcomes))
