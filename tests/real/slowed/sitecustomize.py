"""Changes how long a vLLM engine's steps take: put this folder on the engine's PYTHONPATH.

`LLMPERF_SLOWED` (a factor such as 1.1): after each engine step the engine core sleeps for a share of the time since the step
before, so that whatever takes the engine's time while it is busy (scheduling, model, sampling, queues) takes that much longer.

`LLMPERF_STEP_MS`: a step that takes less than that many milliseconds (times `LLMPERF_SLOWED`) is made to last as long, by
sleeping. An accelerator's steps are like that: they last as long as they last, while the cores have little to do.

Nothing else changes.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import time

_CORE = "vllm.v1.engine.core"
_IDLE_S = 0.05
"""A longer gap between two steps is the engine waiting for requests, which nobody slows down."""

_SLOWED = float(os.environ.get("LLMPERF_SLOWED") or 1)
_STEP_S = float(os.environ.get("LLMPERF_STEP_MS") or 0) / 1000


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
            if _STEP_S:
                _pad(module.EngineCoreProc, _STEP_S * _SLOWED)
            else:
                _slow_down(module.EngineCoreProc, _SLOWED - 1)

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


def _pad(core, step_s):
    for name in ("step", "step_with_batch_queue"):
        setattr(core, name, _padded(getattr(core, name), step_s))


def _padded(step, step_s):
    @functools.wraps(step)
    def padded(self):
        began_s = time.perf_counter()
        outputs, executed = step(self)
        if executed:
            time.sleep(max(began_s + step_s - time.perf_counter(), 0))
        return outputs, executed

    return padded


if _STEP_S or _SLOWED != 1:
    sys.meta_path.insert(0, _Finder())
