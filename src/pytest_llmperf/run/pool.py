"""The engine that runs now. There is one at a time; tests take it in turn, and it is started anew when it must be."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_llmperf.measure.client.processes import LoadClient
from pytest_llmperf.measure.engines import remains
from pytest_llmperf.measure.engines.engine import Engine, EngineError, StartSettings
from pytest_llmperf.measure.engines.opening import open_engine
from pytest_llmperf.measure.engines.vllm import find_vllm
from pytest_llmperf.measure.gpus.tenancy import Tenancy
from pytest_llmperf.measure.host.preflight import suited
from pytest_llmperf.plan.kinds import kind_of
from pytest_llmperf.plan.needs import NO_NEEDS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_llmperf.measure.host.machine import Host
    from pytest_llmperf.plan.engine import EngineSpec
    from pytest_llmperf.plan.needs import Needs

PATIENCE_S = 60.0
"""How long a GPU that somebody else uses is waited for."""
_SWEEP_S = 10.0
"""How long what runs before this one have left may hold up the first engine."""


class EnginePool:
    """Holds at most one running engine, and the load process that all engines share."""

    def __init__(self, host: Host, settings: StartSettings, progress: Callable[[str], None], *, alone: bool = True) -> None:
        """Note how to start engines; none is started yet. `alone` keeps the engines of other runs off the host meanwhile."""
        self.secrets = set[str]()
        """What the engines so far were given, and must stand nowhere."""
        self.starts = 0
        """Engines started so far; the number of the running one."""
        self._host = host
        self._settings = settings
        self._progress = progress
        self._engine: Engine | None = None
        self._stack = contextlib.ExitStack()
        self._client: LoadClient | None = None
        self._with_vllm = set[str]()
        """The interpreters that were seen to have vLLM."""
        self._tenancy = Tenancy(host, alone=alone, patience_s=min(PATIENCE_S, settings.startup_timeout_s), waiting=progress)

    @property
    def client(self) -> LoadClient:
        """Return the load process, starting it where there is none."""
        if self._client is None:
            self._client = LoadClient()
        return self._client

    @property
    def spec(self) -> EngineSpec | None:
        """Return what the running engine was started from."""
        return self._engine.spec if self._engine is not None else None

    def acquire(self, spec: EngineSpec, *, used: frozenset[int], log_folder: Path, needs: Needs = NO_NEEDS) -> Engine:
        """Return an engine of this spec, on GPUs that meet the needs, that is none of the `used` starts; raises EngineError.

        The running one serves when it fits; otherwise it is stopped first, because two engines disturb each other.
        """
        gpus = suited(self._host.devices, needs)
        running = self._engine
        if running is not None and running.spec == spec and self.starts not in used:
            leased = running.watch.gpus if running.watch else ()
            if {gpu.uuid for gpu in gpus}.issuperset(gpu.uuid for gpu in leased):
                return running
        if self._engine is not None:
            began_s = time.perf_counter()
            self.close()
            self._tell(f"gone after {time.perf_counter() - began_s:.1f} s")
        kind = kind_of(spec.kind)
        if kind.vllm and spec.python not in self._with_vllm:
            find_vllm(spec.python)  # before this host is waited for: without it there is nothing to wait for
            self._with_vllm.add(spec.python)
        if not self.starts and kind.starts:
            remains.sweep_within(_SWEEP_S)  # before GPUs are waited for: an engine whose run was killed may have them
        _ = self.client  # started first: the engine is not kept waiting for its first request
        with contextlib.ExitStack() as stack:
            turn = self._tenancy.turn(spec.ranks, gpus, together=spec.tp, simulated=kind.simulated)
            watch = stack.enter_context(turn) if kind.starts else None
            self.starts += 1
            self._progress(f"engine {self.starts} ({spec.short_model} tp{spec.tp}): starting")
            settings = replace(self._settings, log_folder=log_folder)
            opened = open_engine(spec, self._host, settings, self._tell, watch)
            # Noted before it starts: what it prints when it dies at once may hold them.
            self.secrets.update((*spec.secrets, getattr(opened, "api_key", None) or ""))
            self._engine = stack.enter_context(opened)
            self._stack = stack.pop_all()
        took = f" after {self._engine.startup_s:.1f} s" if self._engine.startup_s is not None else ""
        where = f" on GPU {', '.join(map(str, self._engine.gpus))}" if self._engine.gpus else ""
        self._progress(f"engine {self.starts} ({spec.short_model} tp{spec.tp}): ready{took}{where}")
        return self._engine

    def _tell(self, text: str) -> None:
        self._progress(f"engine {self.starts}: {text}")

    def close(self) -> None:
        """Stop the running engine, if any; raises EngineError when it would not stop."""
        self._engine = None
        stack, self._stack = self._stack, contextlib.ExitStack()
        stack.close()

    def discard(self) -> None:
        """Stop the engine after a failure: its own complaints about the stop would hide the first error."""
        with contextlib.suppress(EngineError):
            self.close()
        if self._client is not None:
            self._client.close()  # it may be waiting for the dead engine's answers
            self._client = None

    def shutdown(self) -> None:
        """Stop engine and load process; raises EngineError when the engine would not stop."""
        client, self._client = self._client, None
        try:
            self.close()
        finally:
            self._tenancy.close()
            if client is not None:
                client.close()
