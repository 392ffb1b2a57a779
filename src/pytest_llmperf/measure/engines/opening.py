"""`open_engine`, which starts the engine that a spec asks for, whatever its kind."""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_llmperf.measure.engines.engine import Engine, StartSettings
from pytest_llmperf.measure.host.machine import Host, describe_host
from pytest_llmperf.plan.kinds import kind_of

if TYPE_CHECKING:
    from collections.abc import Callable
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
    this machine where it is not given, and logs go to a new temporary folder without `settings`.
    """
    kind = kind_of(spec.kind)
    if host is None and kind.starts:
        host = describe_host(simulated=kind.simulated)
    settings = settings or StartSettings(log_folder=Path(tempfile.mkdtemp(prefix="llmperf-")))
    module, _, name = kind.opens.partition(":")
    opened: AbstractContextManager[Engine] = getattr(importlib.import_module(module), name)(spec, host, settings, progress, watch)
    return opened
