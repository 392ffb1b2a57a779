"""Makes a vLLM engine slower by `LLMPERF_SLOWED` (a factor such as 1.1): put this folder on the engine's PYTHONPATH.

After each engine step the engine core sleeps for a share of the time since the step before, so that whatever takes the engine's
time while it is busy (scheduling, model, sampling, queues) takes that much longer. Nothing else changes.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time

_CORE = "vllm.v1.engine.core"
_IDLE_S = 0.05
"""A longer gap between two steps is the engine waiting for requests, which nobody slows down."""


class _Finder:
    """Finds vLLM's engine core as usual, and patches it when it has been loaded."""

    def find_spec(self, name, path=None, target=None):
        if name != _CORE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            _slow_down(module.EngineCoreProc, float(os.environ["LLMPERF_SLOWED"]) - 1)

        spec.loader.exec_module = exec_module
        return spec


def _slow_down(core, share):
    step, last_s = core._process_engine_step, 0.0

    def slowed(self):
        nonlocal last_s
        began_s = time.perf_counter()
        done = step(self)
        since_s = last_s if began_s - last_s < _IDLE_S else began_s
        time.sleep((time.perf_counter() - since_s) * share)
        last_s = time.perf_counter()
        return done

    core._process_engine_step = slowed


if os.environ.get("LLMPERF_SLOWED"):
    sys.meta_path.insert(0, _Finder())
