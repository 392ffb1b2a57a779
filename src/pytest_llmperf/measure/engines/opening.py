"""`open_engine`, which starts the engine that a spec asks for, whatever its kind."""

from __future__ import annotations

import contextlib
import importlib
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_llmperf.measure.engines import remains
from pytest_llmperf.measure.engines.engine import Engine, EngineError, StartSettings
from pytest_llmperf.measure.host.machine import Host, describe_host
from pytest_llmperf.plan.kinds import kind_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from pytest_llmperf.measure.gpus.watch import GpuWatch
    from pytest_llmperf.plan.engine import EngineSpec


def open_engine(
    spec: EngineSpec,
    host: Host | None = None,
    settings: StartSettings | None = None,
    progress: Callable[[str], None] = lambda _: None,
    watch: GpuWatch | None = None,
) -> AbstractContextManager[Engine]:
    """Return the engine of a spec as a context manager that starts it on entry and stops it on exit.

    Entering raises EngineError when it does not come up within the start-up time-out. A `url` engine is only checked, and
    never stopped, and this machine not looked at. The engine uses the GPUs of `watch`; without it, it may use all. `host` is
    this machine where it is not given. Without `settings` logs go to a temporary folder that is removed on exit, but for an exit
    by an EngineError, which names the log.
    """
    kind = kind_of(spec.kind)
    if host is None and kind.starts:
        host = describe_host(simulated=kind.simulated)
    module, _, name = kind.opens.partition(":")
    opens: Callable[..., AbstractContextManager[Engine]] = getattr(importlib.import_module(module), name)
    if settings is None and kind.starts:
        return _with_own_logs(lambda own: opens(spec, host, own, progress, watch))
    return opens(spec, host, settings or StartSettings(log_folder=Path(tempfile.gettempdir())), progress, watch)


@contextlib.contextmanager
def _with_own_logs(opens: Callable[[StartSettings], AbstractContextManager[Engine]]) -> Iterator[Engine]:
    """Open an engine whose logs have a temporary folder, for as long as it runs."""
    remains.sweep()  # a folder of a process that was killed, and its engine
    folder = Path(tempfile.mkdtemp(prefix=remains.folder_prefix("logs")))
    try:
        with opens(StartSettings(log_folder=folder)) as engine:
            yield engine
    except EngineError:
        (folder / remains.KEEP).touch()
        raise
    finally:
        if not (folder / remains.KEEP).exists():
            shutil.rmtree(folder, ignore_errors=True)
