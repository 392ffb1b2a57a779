"""The session: what is set up when the cases are known, and written or stopped when it ends."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from pytest_llmperf.measure.engines import EngineError, StartSettings
from pytest_llmperf.measure.host import describe_host, shortage
from pytest_llmperf.plan import PlanError
from pytest_llmperf.plugin.collection import PLANNED
from pytest_llmperf.plugin.options import OUTCOMES
from pytest_llmperf.plugin.output import COLLECTED, tell
from pytest_llmperf.plugin.pool import EnginePool
from pytest_llmperf.plugin.protocol import Protocol
from pytest_llmperf.plugin.run import RUN, Run
from pytest_llmperf.report import from_data, json_document

if TYPE_CHECKING:
    from pytest_llmperf.plan import EngineSpec
    from pytest_llmperf.plugin.settings import Settings

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
        host = describe_host(settings.kind)
    except PlanError as error:
        raise pytest.UsageError(str(error)) from None
    config.stash[RUN] = Run(session.items, settings, host, config.rootpath, config.stash[COLLECTED])
    start = StartSettings(
        log_folder=config.rootpath,  # replaced by pytest's temporary folder when the first engine starts
        startup_timeout_s=settings.startup_timeout_s,
        stop_grace_s=settings.stop_grace_s,
        api_key=os.environ.get("LLMPERF_API_KEY"),
        served_model=settings.served_model,
    )
    config.stash[POOL] = EnginePool(host, start, lambda text: tell(config, text))
    config.stash[PROTOCOL] = Protocol(config.stash[POOL])
    if config.option.collectonly or hasattr(config, "workerinput"):
        return
    started = [item for item in planned if not _brings_url(item) and not shortage(item.stash[PLANNED].spec, host)]
    if settings.kind == "server" and started:
        _require_vllm(settings.python)


def _require_vllm(python: str) -> None:
    from pytest_llmperf.measure.engines.server import find_vllm

    try:
        find_vllm(python)
    except EngineError as error:
        raise pytest.UsageError(
            f"--llmperf-python={python}: {error.what} Install vLLM there (pip install 'pytest-llmperf[cpu]' or"
            " 'pytest-llmperf[cuda]'), name another interpreter, or use --llmperf-url"
        ) from None


def set_up(item: pytest.Item) -> None:
    """Skip or fail a test that this host cannot run, before any of its fixtures are made."""
    plan = item.stash[PLANNED]
    if plan.error or RUN not in item.config.stash:
        pytest.fail(plan.error or "another test of this run has an unusable llmperf marker", pytrace=False)
    if not _brings_url(item):
        skip_or_fail(item, plan.spec)


def skip_or_fail(item: pytest.Item, spec: EngineSpec) -> None:
    """Skip a test whose engine this host cannot run; fail it under --llmperf-require-gpus."""
    run = item.config.stash[RUN]
    if reason := shortage(spec, run.host):
        if run.settings.require_gpus:
            pytest.fail(f"{reason}; --llmperf-require-gpus turns this skip into a failure", pytrace=False)
        pytest.skip(reason)


def _brings_url(item: pytest.Item) -> bool:
    """Return whether a project's own `llm_engine_url` replaces ours: then only running it tells what is started.

    Which fixtures a test will use is known to pytest when it is collected, but there is no public way to ask.
    """
    info = getattr(item, "_fixtureinfo", None)
    return info is not None and len(info.name2fixturedefs.get("llm_engine_url", ())) > 1


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
