"""Start vLLM's OpenAI server on CPU with its engine core forked, which saves that process the import of vLLM.

Run as a script by the engine's interpreter, for the bundled model on CPU only. vLLM's CPU platform always spawns its engine
core, which then imports everything again (docs/engines.md says what this brings). The workers of tensor parallelism are
spawned as ever: each binds its threads to its own cores, which a forked process could not do any more. Where vLLM's inside
has changed, the server starts as usual: this is about seconds, never about what is measured.
"""

from __future__ import annotations

import multiprocessing
import runpy
import sys


def _fork_engine_core() -> None:
    """Make vLLM fork its engine core, with what that needs imported already."""
    import vllm.utils.system_utils as system

    spawn, system.get_mp_context = system.get_mp_context, lambda: multiprocessing.get_context("fork")
    import vllm.v1.engine.core
    import vllm.v1.executor.multiproc_executor as executor
    import vllm.v1.executor.uniproc_executor
    import vllm.v1.worker.cpu_worker  # noqa: F401  these imports are what the forked process is spared

    executor.get_mp_context = spawn


if __name__ == "__main__":
    if not getattr(sys.flags, "safe_path", False):
        sys.path.pop(0)  # this script's folder, whose modules would hide others of the same name
    try:
        _fork_engine_core()
    except (ImportError, AttributeError) as error:
        print(f"llmperf: starting without fork, because vLLM's inside has changed: {error}", file=sys.stderr)
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
