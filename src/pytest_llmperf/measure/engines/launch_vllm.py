"""Start vLLM's OpenAI server with its API key kept to itself, and on CPU with its engine core forked.

Run as a script by the engine's interpreter: `launch_vllm.py fork|spawn ARGUMENTS ...`.

The key comes in the variable VLLM_API_KEY, and other secrets in LLMPERF_ARGUMENTS, because a command line is everybody's to read.
Engine cores have no use for the key, and vLLM before 0.32 (seen in 0.26.0) makes all VLLM_ variables a part of the name of its
compile cache: with a key of its own each start would compile everything anew. As an argument it would stand in the log.

`fork` is for the bundled model on CPU: it saves the engine core the import of vLLM. vLLM's CPU platform always spawns it, which
then imports everything again (docs/engines.md says what this brings). The workers of tensor parallelism are spawned as ever: each
binds its threads to its own cores, which a forked process could not do any more. Where vLLM's inside has changed, the server
starts as usual: this is about seconds, never about what is measured.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import sys

_KEY = "VLLM_API_KEY"


def _keep_key() -> None:
    """Let this process know the API key, and none that it starts; where that cannot be, all of them know it."""
    key = os.environ.pop(_KEY, "")
    if not key:
        return
    try:
        import vllm.envs as envs

        own = os.getpid()
        # A function of the process: a forked one has this table too.
        envs.environment_variables[_KEY] = lambda: key if os.getpid() == own else None
        known = envs.VLLM_API_KEY
    except (ImportError, AttributeError, TypeError):
        known = None
    if known != key:
        os.environ[_KEY] = key


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
    how = sys.argv.pop(1)
    sys.argv += json.loads(os.environ.pop("LLMPERF_ARGUMENTS", "[]"))  # those that hold secrets
    _keep_key()
    if how == "fork":
        try:
            _fork_engine_core()
        except (ImportError, AttributeError) as error:
            print(f"llmperf: starting without fork, because vLLM's inside has changed: {error}", file=sys.stderr)
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
