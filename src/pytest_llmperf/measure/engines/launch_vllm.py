"""Start vLLM's OpenAI server on CPU with its processes forked, which saves each of them the import of vLLM.

Run as a script by the engine's interpreter, for the bundled model on CPU only. vLLM's CPU platform always spawns its engine
core, which then imports everything again (see docs/engines.md for what this brings). Where vLLM's inside has changed, the
server starts as usual: this is about seconds, never about whether or what is measured.
"""

from __future__ import annotations

import sys

sys.path.pop(0)  # this script's folder, whose modules would hide others of the same name

import multiprocessing
import runpy


def _fork() -> None:
    """Make vLLM fork its processes, with what they need imported already."""
    import vllm.utils.system_utils as system

    system.get_mp_context = lambda: multiprocessing.get_context("fork")
    import vllm.v1.engine.core
    import vllm.v1.executor.uniproc_executor
    import vllm.v1.worker.cpu_worker  # noqa: F401  these imports are what the forked process is spared


if __name__ == "__main__":
    try:
        _fork()
    except (ImportError, AttributeError) as error:
        print(f"llmperf: starting without fork, because vLLM's inside has changed: {error}", file=sys.stderr)
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
