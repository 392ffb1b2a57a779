"""The pytest plugin: hooks of a few lines that read settings, call the core, and store.

It is imported in every pytest run of an environment that has the plugin, so everything else is imported in the hooks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pytest_llmperf.plugin.collector import Collector
from pytest_llmperf.plugin.fixtures import (
    baseline,
    llm_engine,
    llm_engine_args,
    llm_engine_url,
    llm_workload,
    llmperf,
    llmperf_axes,
    llmperf_logs,
    llmperf_sweep,
    simulated_engine,
)
from pytest_llmperf.plugin.guard import advice, fail_item, guarded, note, redden, report_faults, show_late_faults
from pytest_llmperf.plugin.options import add_options, any_given, fill_in_values
from pytest_llmperf.plugin.private import read_again
from pytest_llmperf.plugin.state import AXES_FIXTURE, ITEM, SESSION, SessionState, settings_of
from pytest_llmperf.plugin.workers import is_worker, refuse, tell_controller

if TYPE_CHECKING:
    from collections.abc import Generator

    from pytest_llmperf.plugin.state import Fault

__all__ = [
    "baseline",
    "llm_engine",
    "llm_engine_args",
    "llm_engine_url",
    "llm_workload",
    "llmperf",
    "llmperf_axes",
    "llmperf_logs",
    "llmperf_sweep",
    "simulated_engine",
]


def _used(items: list[pytest.Item]) -> bool:
    """Return whether any test measures; the rest of the plugin is imported only then."""
    return any(AXES_FIXTURE in getattr(item, "fixturenames", ()) for item in items)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options."""
    add_options(parser)


@pytest.hookimpl(tryfirst=True)
@guarded()
def pytest_load_initial_conftests(early_config: pytest.Config, parser: pytest.Parser, args: list[str]) -> None:
    """Give options the value that was left out, so that they take no path for it."""
    if fill_in_values(args):
        read_again(early_config, parser, args)


def pytest_configure(config: pytest.Config) -> None:
    """Check the options, so that a wrong one fails at once, and register the marker."""
    config.addinivalue_line(
        "markers",
        "llmperf(model=..., tp=..., pp=..., dp=..., concurrency=..., rate=..., points=..., engine=..., engine_args=..., env=...,"
        " tolerance=..., gate=..., limits=..., min_gpus=..., min_gpu_memory=..., gpu=..., nvlink=...): the grid that a"
        " performance test allows, or its loads one by one, its kind of engine and its arguments,"
        " which metrics gate it, how much worse may pass and what must not, and what the host must have for it to run",
    )
    config.stash.setdefault(SESSION, SessionState())
    _check_options(config)
    if not is_worker(config):
        config.pluginmanager.register(Collector(config))


@guarded(hook="pytest_configure")
def _check_options(config: pytest.Config) -> None:
    if any_given(config):
        settings = settings_of(config)
        if settings.json_path is not None and not is_worker(config):
            from pytest_llmperf.plugin.settings import check_json

            check_json(config, settings)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Note the session, whose exit code tells of a fault that comes behind the last test."""
    session.config.stash[SESSION].session = session


@pytest.hookimpl(wrapper=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> Generator[None, object, object]:
    """Run a test once for every model, degree and load that its marker allows, that of a `pytest.param` for its own."""
    if AXES_FIXTURE not in metafunc.fixturenames:
        return (yield)
    grids = _parametrize(metafunc)
    result = yield
    _restrict(metafunc, grids)
    return result


def _unplanned(fault: Fault, metafunc: pytest.Metafunc, *_: object) -> list[Any]:
    """Have a test fail whose grid could not be made."""
    note(metafunc.config, fault)
    metafunc.config.stash[SESSION].unplanned.add(metafunc.definition.nodeid)
    return []


@guarded(hook="pytest_generate_tests", otherwise=_unplanned)
def _parametrize(metafunc: pytest.Metafunc) -> list[Any]:
    from pytest_llmperf.plugin.collection import parametrize

    try:
        return parametrize(metafunc, settings_of(metafunc.config))
    except pytest.UsageError as error:  # raised here it would be one file's error, and pytest would go on
        metafunc.config.stash[SESSION].refusal = str(error)
        return []


@guarded(hook="pytest_generate_tests", otherwise=_unplanned)
def _restrict(metafunc: pytest.Metafunc, grids: list[Any]) -> None:
    from pytest_llmperf.plugin.collection import restrict

    restrict(metafunc, grids)


@pytest.hookimpl(tryfirst=True)
@guarded()
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Group the tests by engine, and deselect those that the options exclude."""
    state = config.stash[SESSION]
    if state.refusal:
        refuse(config, state.refusal)
    if _used(items):
        from pytest_llmperf.plugin.collection import plan_items

        state.used = True
        deselected = plan_items(items, settings_of(config))
        state.deselected = len(deselected)
        state.collected = tuple(item.stash[ITEM].planned.case_id for item in (*items, *deselected) if ITEM in item.stash)
        if deselected:
            config.hook.pytest_deselected(items=deselected)


@pytest.hookimpl(tryfirst=True)  # the terminal asks for the line below in its own pytest_collection_finish
@guarded()
def pytest_collection_finish(session: pytest.Session) -> None:
    """Set up the run when the cases are known."""
    if _used(session.items):
        from pytest_llmperf.plugin.session import prepare

        prepare(session)


def _without_header(fault: Fault, config: pytest.Config, _: object) -> list[str]:
    note(config, fault)
    return ["llmperf: what is planned cannot be shown (see llmperf::faults)"]


@guarded(otherwise=_without_header)
def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    """Show the host, and how many cases have a baseline."""
    if _used(items):
        from pytest_llmperf.plugin.summary import header

        return header(config, items)
    return []


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    """Judge the suite as a whole when its last test is over, and see whether what was asked for could be written."""
    result = yield
    _judge(session)
    _check_comparisons(session)
    report_faults(session.config)
    return result


@guarded(hook="pytest_runtestloop")
def _judge(session: pytest.Session) -> None:
    if session.config.stash[SESSION].outcomes:
        from pytest_llmperf.plugin.session import check_results, judge_suite

        judge_suite(session.config)
        check_results(session.config)


@guarded(hook="pytest_runtestloop")
def _check_comparisons(session: pytest.Session) -> None:
    if any_given(session.config) or session.config.stash[SESSION].used:
        from pytest_llmperf.plugin.comparisons import check_comparisons

        check_comparisons(session.config)


def _failed(fault: Fault, item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    """Report a test as failed that the plugin could not even begin."""
    fail_item(item, fault, nextitem)
    return True


@pytest.hookimpl(tryfirst=True)
@guarded(otherwise=_failed)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> object:
    """Run an llmperf test as often as its evidence needs."""
    turns = item.config.stash[SESSION].turns
    if turns is None or ITEM not in item.stash:
        return None
    if settings_of(item.config).selftest:
        from pytest_llmperf.plugin.selftest import report

        report(item)
    else:
        from pytest_llmperf.plugin.protocol import run_item

        run_item(item, nextitem, turns)
    return True


def _fail(fault: Fault, item: pytest.Item) -> None:
    pytest.fail(f"{fault.text}\n{advice(item.config, fault)}", pytrace=False)


@guarded(otherwise=_fail)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this host cannot run, and fail what has no baseline: behind pytest's own marks, in front of fixtures."""
    if _used([item]):
        from pytest_llmperf.plugin.session import set_up

        set_up(item)


def _unexplained(fault: Fault, config: pytest.Config, *_: object) -> list[str]:
    return ["the measurement is not as good as the baseline", *f"{fault.text}\n{advice(config, fault)}".splitlines()]


@pytest.hookimpl(tryfirst=True)
@guarded(otherwise=_unexplained)
def pytest_assertrepr_compare(config: pytest.Config, op: str, left: object, right: object) -> list[str] | None:
    """Explain `measured == baseline`, one line per metric."""
    if op == "==" and "BaselineView" in (type(left).__name__, type(right).__name__):
        from pytest_llmperf.plugin.measuring import explain

        return explain(left, right)
    return None


def _without_summary(fault: Fault, reporter: Any, config: pytest.Config) -> None:
    note(config, fault)
    show_late_faults(reporter, config)


@guarded(otherwise=_without_summary)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Show what came of every case."""
    if config.stash[SESSION].outcomes or config.stash[SESSION].selftests:
        from pytest_llmperf.plugin.summary import summarize

        summarize(terminalreporter, config)
    show_late_faults(terminalreporter, config)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Stop what still runs, and write the files that were asked for."""
    state = session.config.stash[SESSION]
    tell_controller(session.config, used=state.used)
    # A run that was refused has begun nothing. Under xdist this process may not have asked for the settings yet.
    if exitstatus != pytest.ExitCode.USAGE_ERROR and (state.settings is not None or state.used or state.outcomes):
        _stop(session)
        _end(session)
    if len(state.faults) > state.faults_reported:
        redden(session.config)


@guarded(hook="pytest_sessionfinish")
def _stop(session: pytest.Session) -> None:
    from pytest_llmperf.plugin.session import stop

    stop(session.config)


@guarded(hook="pytest_sessionfinish")
def _end(session: pytest.Session) -> None:
    from pytest_llmperf.plugin.session import end

    end(session.config)
