"""The guard where pytest's hooks meet the core: what the core raises unforeseen is told in a few lines, and the run goes on, red.

Without it pytest ends the whole run as an INTERNALERROR, and its summary is lost with the results of all other tests.
"""

from __future__ import annotations

import bdb
import functools
import inspect
import os
import sys
import traceback
import unittest
from collections import Counter
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy
import pytest

from pytest_llmperf.plugin.private import terminal
from pytest_llmperf.plugin.reported import FAULTS_ID, report_as_test, was_red
from pytest_llmperf.plugin.state import SESSION, Fault, SessionState
from pytest_llmperf.plugin.workers import is_worker, send_fault

if TYPE_CHECKING:
    from collections.abc import Callable

PASSED_ON = (
    pytest.UsageError,
    pytest.exit.Exception,
    pytest.Session.Failed,
    pytest.Collector.CollectError,
    unittest.SkipTest,
    bdb.BdbQuit,
)
"""Exceptions that are pytest's to handle. Its outcomes, and Ctrl-C, are none (`BaseException`), and pass anyway."""
_PACKAGE = f"{Path(__file__).parents[1]}{os.sep}"
_CALLER, _PYTEST = (f"{Path(inspect.getfile(kind)).parent}{os.sep}" for kind in (pluggy.PluginManager, pytest.Item))
_MOST_SHOWN, _MOST_KEPT, _LONGEST = 5, 100, 300
_CACHE_KEY = "llmperf/faults"


def fault_of(hook: str, about: str, error: BaseException) -> Fault:
    """Return what an exception that was raised in a hook comes to."""
    try:
        words = "".join(traceback.format_exception_only(error)).strip()
        trace = "".join(traceback.format_exception(error))
    except Exception as broken:  # an exception whose own text raises
        words = trace = f"{type(error).__name__}, which cannot be shown ({type(broken).__name__})"
    words = words if len(words) <= _LONGEST else f"{words[: _LONGEST - 3]}..."
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{frames[-1].filename.removeprefix(_PACKAGE)}:{frames[-1].lineno}" if frames else "an unknown place"
    return Fault(hook, about, words, place, trace, _is_foreign([frame.filename for frame in frames]))


def _is_foreign(files: list[str]) -> bool:
    """Return whether a traceback through these files ends in a hook that is neither the package's nor pytest's own."""
    calls = [number for number, file in enumerate(files) if file.startswith(_CALLER)]
    within = files[calls[-1] + 1 :] if calls else []
    return bool(within) and not within[0].startswith(_PYTEST) and not any(file.startswith(_PACKAGE) for file in within)


def _cleaned(config: pytest.Config, fault: Fault) -> Fault:
    """Return a fault as it may be shown: exceptions quote what was being read, which others may have written."""
    from pytest_llmperf.plugin.outlet import clean

    return replace(fault, error=clean(config, fault.error), trace=clean(config, fault.trace))


def advice(config: pytest.Config, *faults: Fault) -> str:
    """Return whose fault it is and where the traceback is; with -vv the tracebacks themselves."""
    text = (
        f"This is a fault of pytest-llmperf {version('pytest-llmperf')}, not of your tests: please report it with the traceback"
    )
    if all(fault.foreign for fault in faults):
        text = "This is a fault of that hook, neither of your tests nor of pytest-llmperf: see the traceback"
    if config.get_verbosity() > 1:
        return "\n".join([f"{text}:", *(fault.trace for fault in faults)])
    stored = f" and {config.getini('cache_dir')}/v/{_CACHE_KEY} has" if _keep(config, faults) else ""
    return f"{text}, which -vv shows{stored}. The other tests go on."


def _keep(config: pytest.Config, faults: tuple[Fault, ...]) -> bool:
    """Keep the tracebacks in pytest's cache, with those of this run that it has already; return whether it has one."""
    cache = getattr(config, "cache", None)
    if cache is None or is_worker(config):
        return False
    kept = _state(config).traces
    for lines in (fault.trace.splitlines() for fault in faults):
        if lines not in kept and len(kept) < _MOST_KEPT:
            kept.append(lines)
    cache.set(_CACHE_KEY, kept)  # where it cannot be written it warns
    return True


def guarded(
    *, hook: str = "", otherwise: Callable[..., Any] | None = None, catches: tuple[type[BaseException], ...] = (Exception,)
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Guard a hook, or a part of the hook that is named: what it raises is noted, and its answer is None.

    `otherwise` gets the fault and the hook's arguments: it answers in its place, and has the fault told itself.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        names = tuple(inspect.signature(function).parameters)
        name = hook or function.__name__

        @functools.wraps(function)
        def guarded_hook(*args: Any) -> Any:
            try:
                return function(*args)
            except PASSED_ON:
                raise
            except catches as error:
                given = dict(zip(names, args, strict=False))
                fault = _cleaned(_config_of(given), fault_of(name, _about(given), error))
            if otherwise is not None:
                return otherwise(fault, *args)
            note(_config_of(given), fault)
            return None

        return guarded_hook

    return decorate


def note(config: pytest.Config, fault: Fault) -> None:
    """Keep a fault for the end of the run, which it makes red."""
    if is_worker(config):
        send_fault(config, asdict(fault))
        return
    _state(config).faults.append(fault)
    if terminal(config) is None:
        print(f"{fault.text}\n{advice(config, fault)}", file=sys.stderr)


def hear(config: pytest.Config, faults: list[dict[str, Any]]) -> None:
    """Note what a worker of xdist has sent."""
    for data in faults:
        note(config, Fault(**data))


def faults_text(config: pytest.Config, faults: list[Fault]) -> str:
    """Return all faults of a run, those that came often once."""
    often = Counter(fault.text for fault in faults)
    lines = [text if times == 1 else f"{text} ({times} times)" for text, times in often.most_common(_MOST_SHOWN)]
    more = [f"and {len(often) - _MOST_SHOWN} more"] if len(often) > _MOST_SHOWN else []
    return "\n".join([*lines, *more, advice(config, *{fault.text: fault for fault in faults}.values())])


def report_faults(config: pytest.Config) -> None:
    """Report a test that failed where the plugin itself has failed so far, so that the run is not green."""
    if is_worker(config):
        return
    state = _state(config)
    if state.faults:
        report_as_test(config, FAULTS_ID, faults_text(config, state.faults))
        state.faults_reported = len(state.faults)
    elif not config.option.collectonly and was_red(config, FAULTS_ID):
        report_as_test(config, FAULTS_ID, "")


def show_late_faults(reporter: Any, config: pytest.Config) -> None:
    """Show what has failed since the last test was over."""
    state = _state(config)
    late = state.faults[state.faults_reported :]
    if late:
        reporter.section("llmperf faults", red=True)
        reporter.write_line(faults_text(config, late), red=True)
        state.faults_reported = len(state.faults)
        redden(config)


def redden(config: pytest.Config) -> None:
    """Let pytest exit with 1 where it has decided on a green end already: no test can fail for it any more."""
    session = _state(config).session
    if session is not None and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def fail_item(item: pytest.Item, fault: Fault, nextitem: pytest.Item | None, *, reported: bool = False) -> None:
    """Report a test that failed because the plugin did, and tear down what the next one does not need.

    One that was reported already has failed in its teardown.
    """
    when: Any = "teardown" if reported else "call"
    text = f"{fault.text}\n{advice(item.config, fault)}"
    report = pytest.TestReport(item.nodeid, item.location, dict.fromkeys(item.keywords, 1), "failed", text, when)
    if not reported:
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    # It is red already: what else fails in its teardown is of no interest, but the next test's set-up needs it done.
    stop = (pytest.exit.Exception, KeyboardInterrupt)
    pytest.CallInfo.from_call(lambda: item.ihook.pytest_runtest_teardown(item=item, nextitem=nextitem), "teardown", reraise=stop)


def _about(given: dict[str, Any]) -> str:
    """Return the node id of the test that a hook was called for, empty where it was for none."""
    for value in given.values():
        definition = getattr(value, "definition", value)
        if isinstance(name := getattr(definition, "nodeid", None), str) and not isinstance(value, pytest.Session):
            return name
    return ""


def _config_of(given: dict[str, Any]) -> pytest.Config:
    """Return the configuration that a hook's arguments lead to."""
    for value in given.values():
        config = value if isinstance(value, pytest.Config) else getattr(value, "config", None)
        if isinstance(config, pytest.Config):
            return config
    raise LookupError("no argument of the hook has a configuration")


def _state(config: pytest.Config) -> SessionState:
    # Options are read before the plugin is configured.
    return config.stash.setdefault(SESSION, SessionState())
