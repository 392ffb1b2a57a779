"""The session: what is set up when the cases are known, refused before a test runs, and written or stopped at the end."""

from __future__ import annotations

import os
import sys
import uuid
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

from pytest_llmperf.files import is_stream, sweep, unwritable_folder, write_text
from pytest_llmperf.measure.engines.command import find_program
from pytest_llmperf.measure.engines.engine import EngineError, StartSettings
from pytest_llmperf.measure.engines.vllm import find_vllm
from pytest_llmperf.measure.host.machine import describe_host
from pytest_llmperf.measure.host.preflight import device_shortage, shortage
from pytest_llmperf.plan.checks import PlanError
from pytest_llmperf.plan.kinds import kind_of
from pytest_llmperf.plugin.private import overrides
from pytest_llmperf.plugin.progress import show
from pytest_llmperf.plugin.protocol import spec_of
from pytest_llmperf.plugin.settings import check_json
from pytest_llmperf.plugin.state import ITEM, SESSION, run_of, settings_of
from pytest_llmperf.plugin.workers import is_first, is_worker, refuse
from pytest_llmperf.report.outcome import from_data, json_text, to_data
from pytest_llmperf.report.text import assertion, suite_line
from pytest_llmperf.run.judging import known_failure
from pytest_llmperf.run.launches import Run
from pytest_llmperf.run.outcomes import SUITE_ADVICE, is_red_alone, left_out, outcome_of, suite_verdict, without_baseline
from pytest_llmperf.run.pool import EnginePool
from pytest_llmperf.run.recording import to_be_recorded
from pytest_llmperf.run.rules import Rules
from pytest_llmperf.run.sweep import LEAST_DEGREES, degrees_of, refusal
from pytest_llmperf.run.turns import Turns

if TYPE_CHECKING:
    from pytest_llmperf.measure.host.machine import Host
    from pytest_llmperf.plan.engine import EngineSpec
    from pytest_llmperf.run.settings import Settings
    from pytest_llmperf.run.sweep import Degrees

SUITE_ID, JSON_ID = "llmperf::suite", "llmperf::json"
"""The node ids that the suite as a whole, and the JSON file, are reported under."""


def prepare(session: pytest.Session) -> None:
    """Set up the run where there are llmperf tests; raises UsageError where it cannot work at all."""
    config, settings = session.config, settings_of(session.config)
    state = config.stash[SESSION]
    measuring = [item for item in session.items if ITEM in item.stash]
    plans = [item.stash[ITEM].planned for item in measuring]
    if errors := [plan.error for plan in plans if plan.error]:
        refuse(config, "\n".join(errors))
    if not plans:
        return
    try:
        host = describe_host(simulated=kind_of(settings.kind).simulated)
    except PlanError as error:
        refuse(config, str(error))
    compared = {plan.case_id: plan for plan in plans if plan.compares}
    job = getattr(config, "workerinput", {}).get("testrunuid")  # one run, whatever the number of xdist workers
    rules = Rules(settings, host, config.rootpath, compared, state.collected, job or uuid.uuid4().hex[:12])
    state.run = Run(rules, _pool(config, settings, host), lambda text: show(config, text))
    # Under xdist a worker may report only the item that it was told to run, so an item cannot wait for others there.
    state.turns = Turns(spec_of, alone=is_worker(config))
    if config.option.collectonly or settings.selftest:
        return
    rules.read_ahead()
    if not is_first(config):
        return
    _check_targets(config, state.run)
    started = [item for item in measuring if not overrides(item, "llm_engine_url") and not _known_shortage(item, host)]
    if kind_of(settings.kind).vllm and started:
        _require_vllm(config, settings.python)
    if kind_of(settings.kind).commanded and started:
        _require_program(config, settings)


def _check_targets(config: pytest.Config, run: Run) -> None:
    """Raise UsageError where something that is to be written can't be: hours of measuring would be lost."""
    settings = run.rules.settings
    check_json(config, settings)
    folders = sorted({path.parent for path in to_be_recorded(run.rules)})
    if problem := next(filter(None, map(unwritable_folder, folders)), None):
        refuse(config, f"--llmperf-baselines={settings.baselines}: cannot be written ({problem}); name another folder")
    if folders:
        sweep(settings.baselines / run.rules.host.key)


def _pool(config: pytest.Config, settings: Settings, host: Host) -> EnginePool:
    start = StartSettings(
        log_folder=config.rootpath,  # replaced by pytest's temporary folder when the first engine starts
        startup_timeout_s=settings.startup_timeout_s,
        stop_grace_s=settings.stop_grace_s,
        api_key=os.environ.get("LLMPERF_API_KEY"),
        headers=settings.headers,
        served_model=settings.served_model,
    )
    return EnginePool(host, start, lambda text: show(config, text), alone=settings.exclusive)


def _require_program(config: pytest.Config, settings: Settings) -> None:
    try:
        find_program(settings.command, settings.python)
    except EngineError as error:
        refuse(config, f"--llmperf-command={settings.command!r}: {error.what}")


def _require_vllm(config: pytest.Config, python: str) -> None:
    try:
        find_vllm(python)
    except EngineError as error:
        into = "" if python == sys.executable else f" --into {Path(python).parents[1]}"
        refuse(
            config,
            f"--llmperf-python={python}: {error.what} Install vLLM there (python -m pytest_llmperf engine install{into}),"
            " name another interpreter, or use --llmperf-url",
        )


def set_up(item: pytest.Item) -> None:
    """Skip or fail a test that this host cannot run, before any of its fixtures are made."""
    plan, run = item.stash[ITEM].planned, item.config.stash[SESSION].run
    if plan.error or run is None:
        pytest.fail(plan.error or "another test of this run has an unusable llmperf marker", pytrace=False)
    if not overrides(item, "llm_engine_url") and not plan.axes.sweep:  # a sweep itself leaves out the degrees that do not fit
        _refuse(item, _known_shortage(item, run.rules.host))
    if not item.config.getoption("setuponly", False):
        _refuse_without_baseline(item, run.rules)


def _refuse_without_baseline(item: pytest.Item, rules: Rules) -> None:
    """Fail or skip a test that would meet no usable baseline; a launch that is measured first would be for nothing."""
    kept = item.stash[ITEM]
    if (
        kept.planned.axes.sweep
        and len(degrees_of(kept.planned, kept.planned.spec, rules.settings.selected, rules.host).able) < LEAST_DEGREES
    ):
        return  # it has reasons of its own not to run
    answer = known_failure(rules, kept.planned)
    if answer is None:
        return
    kept.unmeasured = without_baseline(rules, kept.planned, answer)
    if answer.skip:
        pytest.skip(answer.skip)
    pytest.fail(answer.failure or "\n".join(assertion(kept.unmeasured[0])), pytrace=False)


def skip_or_fail(item: pytest.Item, spec: EngineSpec) -> None:
    """Skip a test whose engine this host cannot run; fail it under --llmperf-require-gpus."""
    _refuse(item, shortage(spec, run_of(item.config).rules.host, item.stash[ITEM].planned.marker.needs))


def _known_shortage(item: pytest.Item, host: Host) -> str | None:
    """Return what the host lacks as far as it is known before fixtures: `llm_engine_args` may change what the model takes."""
    plan = item.stash[ITEM].planned
    check = device_shortage if overrides(item, "llm_engine_args") else shortage
    return check(plan.spec, host, plan.marker.needs)


def _refuse(item: pytest.Item, reason: str | None) -> None:
    if reason is None:
        return
    if settings_of(item.config).require_gpus:
        pytest.fail(f"{reason}; --llmperf-require-gpus turns this skip into a failure", pytrace=False)
    pytest.skip(reason)


def sweep_degrees(item: pytest.Item, spec: EngineSpec) -> Degrees:
    """Return the TP degrees of a sweep on this host; skips or fails the test where they are too few."""
    kept, settings = item.stash[ITEM], settings_of(item.config)
    if not kind_of(spec.kind).starts:
        pytest.skip("llmperf_sweep starts engines at several TP degrees, and an endpoint has the one that it was started with")
    degrees = degrees_of(kept.planned, spec, settings.selected, run_of(item.config).rules.host)
    failure, skip = refusal(kept.planned.marker, degrees, require_gpus=settings.require_gpus)
    if failure:
        pytest.fail(failure, pytrace=False)
    if skip:
        pytest.skip(skip)
    kept.left_out = [left_out(kept.planned, replace(spec, tp=degree), why) for degree, why in degrees.unfit.items()]
    return degrees


def judge_suite(config: pytest.Config) -> None:
    """Judge all comparisons together when the last test is over; where that alone is red, report it as a test that failed.

    The run's exit code is then 1, and JUnit files have the failure too.
    """
    state, settings = config.stash[SESSION], settings_of(config)
    outcomes = [from_data(data) for data in state.outcomes]
    try:  # under xdist this process has measured nothing, and has no run
        simulated = kind_of(settings.kind).simulated
        key = state.run.rules.host.key if state.run else describe_host(simulated=simulated).key
    except PlanError as error:
        show(config, f"the suite as a whole is not judged: {error}")
        return
    state.suite = suite_verdict(outcomes, key)
    if state.suite is None:
        return
    red = is_red_alone(state.suite, outcomes)
    cache = getattr(config, "cache", None)  # absent with -p no:cacheprovider
    was_red = cache is not None and SUITE_ID in cache.get("cache/lastfailed", {})
    if red or was_red:
        _report(config, SUITE_ID, suite_line(state.suite) + SUITE_ADVICE if red else "")


def _report(config: pytest.Config, name: str, failure: str) -> None:
    """Report something that is no test as one: failed with this text, or passed, which takes it off the list of `--lf`."""
    location = (name.partition("::")[0], None, name)
    phases: tuple[Literal["setup", "call", "teardown"], ...] = ("setup", "call", "teardown")
    config.hook.pytest_runtest_logstart(nodeid=name, location=location)
    for when in phases[bool(failure) :]:
        is_red = when == "call" and bool(failure)
        made: Any = {"outcome": "failed" if is_red else "passed", "longrepr": failure if is_red else None}
        report = pytest.TestReport(nodeid=name, location=location, keywords={}, when=when, **made)
        config.hook.pytest_runtest_logreport(report=report)
    config.hook.pytest_runtest_logfinish(nodeid=name, location=location)


def end(config: pytest.Config) -> None:
    """Stop what still runs, and write the JSON file; the cases that were never finished are in it and in the summary too."""
    state = config.stash[SESSION]
    if state.run is not None:
        state.outcomes += [to_data(outcome_of(case)) for case in state.run.states.values() if case.launches]
        state.run.states.clear()
        try:
            state.run.pool.shutdown()
        except EngineError as error:
            show(config, str(error))
    if problem := write_results(config, final=True):
        show(config, problem)


def write_results(config: pytest.Config, *, final: bool = False) -> str | None:
    """Write the JSON file with all outcomes so far; return why it could not be.

    What is measured later may crash this process, and must not take along what there is. `final`: nothing will follow, so that
    it can be written into a device or a pipe too.
    """
    state, settings = config.stash[SESSION], settings_of(config)
    path = settings.json_path
    if path is None or is_worker(config) or config.option.collectonly:
        return None
    if is_stream(path):
        if state.streamed or not final:
            return None
        state.streamed = True
    try:
        write_text(path, json_text(state.outcomes))
    except OSError as error:
        return f"--llmperf-json={path}: could not be written ({error.strerror or error}); its figures are lost"
    return None


def check_results(config: pytest.Config) -> None:
    """Report a test that failed where the JSON file cannot be written any more, so that the run is not green."""
    path = settings_of(config).json_path
    if problem := write_results(config, final=path is not None and is_stream(path)):
        _report(config, JSON_ID, problem)
