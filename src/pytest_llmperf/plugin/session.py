"""The session: what is set up when the cases are known, and written or stopped when it ends."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from pytest_llmperf.measure.engines import EngineError, StartSettings
from pytest_llmperf.measure.host import describe_host, shortage
from pytest_llmperf.plugin.collection import PLANNED
from pytest_llmperf.plugin.options import OUTCOMES
from pytest_llmperf.plugin.output import COLLECTED, tell
from pytest_llmperf.plugin.pool import EnginePool
from pytest_llmperf.plugin.protocol import Protocol
from pytest_llmperf.plugin.run import RUN, Run
from pytest_llmperf.report import from_data, json_document

if TYPE_CHECKING:
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
    host = describe_host(settings.kind)
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
    if settings.kind == "server" and any(not shortage(item.stash[PLANNED].spec, host) for item in planned):
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
    """Open the session's pool before its first llmperf test; skip or fail a test that this host cannot run."""
    plan, run = item.stash[PLANNED], item.config.stash.get(RUN, None)
    if plan.error or run is None:
        pytest.fail(plan.error or "another test of this run has an unusable llmperf marker", pytrace=False)
    if reason := shortage(plan.spec, run.host):
        if run.settings.require_gpus:
            pytest.fail(f"{reason}; --llmperf-require-gpus turns this skip into a failure", pytrace=False)
        pytest.skip(reason)


def end(session: pytest.Session, settings: Settings) -> None:
    """Stop what still runs, and write the JSON file; the cases that were never finished are in it too."""
    config = session.config
    if POOL in config.stash:
        try:
            config.stash[POOL].shutdown()
        except EngineError as error:
            tell(config, str(error))
    if settings.json_path is None or hasattr(config, "workerinput"):
        return
    outcomes = [from_data(data) for data in config.stash.get(OUTCOMES, [])]
    run = config.stash.get(RUN, None)
    if run is not None:
        outcomes += [run.outcome(state, state.case.id) for state in run.states.values() if state.launches]
    settings.json_path.write_text(json_document(outcomes))
