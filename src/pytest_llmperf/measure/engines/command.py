"""A server that the user's command line starts: llama-server, trtllm-serve, SGLang, a script around one of them.

It is supervised, logged and stopped as vLLM's is. Nothing is known of it but its port, so the rest is asked: whether it is
ready, whether it is ours, and what it calls its model. What it does not tell is missing.
"""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from typing import TYPE_CHECKING, Any

import psutil

from pytest_llmperf.measure.engines import api
from pytest_llmperf.measure.engines.engine import EngineError, StartSettings
from pytest_llmperf.measure.engines.server import Program, ServerEngine, port_taken, visible_gpus
from pytest_llmperf.measure.engines.vllm import QUIET, STAGES
from pytest_llmperf.measure.host.model import bundled_model
from pytest_llmperf.plan.axes import short_model
from pytest_llmperf.plan.command import command_words
from pytest_llmperf.plan.engine import command_line

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_llmperf.measure.engines.child import Child
    from pytest_llmperf.measure.gpus.watch import GpuWatch
    from pytest_llmperf.measure.host.machine import Host
    from pytest_llmperf.plan.engine import EngineSpec

_HOST = "127.0.0.1"
_NO_ROUTE = (404, 405, 501)
"""How servers answer what they don't have: they are asked something else instead."""
_ASK_S = 5.0
_TOKEN_S = 60.0
"""A first token may take long: kernels are compiled for it."""


def open_command(
    spec: EngineSpec, host: Host, settings: StartSettings, progress: Callable[[str], None], watch: GpuWatch | None
) -> ServerEngine:
    """Return the server that the spec's command line starts, as a child."""
    program = Program(
        command=lambda port, _: [*command_words(spec.command, _values(spec, port, watch)), *command_line(spec.args)],
        environment={**QUIET, **os.environ, **visible_gpus(watch), **dict(spec.env)},
        versions=partial(find_program, spec.command, spec.python),
        answers=answers_on_its_port,
        stages=STAGES,
    )
    return ServerEngine(spec, program, settings, progress, watch)


def _values(spec: EngineSpec, port: int, watch: GpuWatch | None) -> dict[str, str]:
    return {
        "model": str(bundled_model(spec.model) or spec.model),
        "port": str(port),
        "host": _HOST,
        "tp": str(spec.tp),
        "pp": str(spec.pp),
        "dp": str(spec.dp),
        "python": spec.python,
        "gpus": ",".join(str(gpu.index) for gpu in watch.gpus) if watch else "",
    }


def find_program(command: str, python: str) -> dict[str, str]:
    """Return the versions of what a command starts, of which none is known; raises EngineError where there is no such program."""
    values = dict.fromkeys(("model", "port", "host", "tp", "pp", "dp", "gpus"), "") | {"python": python}
    program = command_words(command, values)[0]
    if not shutil.which(program):
        raise EngineError(f"there is no program {program!r}; write its path, or put its folder into PATH.")
    return {}


def answers_on_its_port(engine: ServerEngine, child: Child) -> str | None:
    """Return what the server calls its model, when it is up, and nobody else's; else None.

    Up is a 200 of `/health`, where it has none of `/v1/models`, where it has neither an answer to a prompt. Raises EngineError
    where another process has the port.
    """
    try:
        health, _ = _get(engine, "/health")
        if health != 200 and health not in _NO_ROUTE:
            return None  # llama-server and SGLang answer 503 while they load the model
        listed, body = _get(engine, "/v1/models")
        if listed not in (200, 401) and listed not in _NO_ROUTE:
            return None
        if health != 200 and listed in _NO_ROUTE and not _answers_a_prompt(engine):
            return None
    except OSError:
        return None
    if other := _other_owner(int(engine.url.rpartition(":")[2]), child):
        raise port_taken(engine, other)
    if listed == 401:
        raise EngineError(f"{engine.url} wants an API key (HTTP 401); set LLMPERF_API_KEY to the one in --llmperf-command.")
    return _served_name(engine.spec, body if listed == 200 else "")


def _get(engine: ServerEngine, path: str) -> tuple[int, str]:
    return api.get(engine.url + path, timeout_s=_ASK_S, api_key=engine.endpoint.api_key)


def _answers_a_prompt(engine: ServerEngine) -> bool:
    """Return whether a completion or a chat is answered, be it by a refusal: what is wrong with it is told by the next one."""
    body = {"model": engine.spec.model, "max_tokens": 1}
    asked: dict[str, dict[str, Any]] = {
        "completions": {"prompt": "Hello"},
        "chat/completions": {"messages": [{"role": "user", "content": "Hello"}]},
    }
    for route, prompt in asked.items():
        status, _ = api.post(f"{engine.url}/v1/{route}", body | prompt, timeout_s=_TOKEN_S, api_key=engine.endpoint.api_key)
        if status < 500 and status not in (*_NO_ROUTE, 429):
            return True
    return False


def _other_owner(port: int, child: Child) -> str | None:
    """Return who else listens on a port, None where the child or what it has started does, or where it cannot be told.

    The processes of other users and containers are not shown: then the port was free before, and the child lives.
    """
    if port in child.listening():
        return None
    try:
        pids = {each.pid for each in psutil.net_connections("tcp") if each.laddr and each.laddr.port == port and _listens(each)}
    except (psutil.Error, OSError):
        return None
    return f"pid {pid}, which the command has not started" if (pid := next(filter(None, pids), None)) else None


def _listens(connection: Any) -> bool:
    return bool(connection.status == psutil.CONN_LISTEN)


def _served_name(spec: EngineSpec, body: str) -> str:
    """Return the name of the spec's model in a list, the list's first where none is alike, the spec's own without a list."""
    try:
        names = [str(model["id"]) for model in json.loads(body)["data"]]
    except (ValueError, KeyError, TypeError):
        names = []
    wanted = {spec.model, str(bundled_model(spec.model) or spec.model)}
    alike = [name for name in names if name in wanted] or [name for name in names if short_model(name) == spec.short_model]
    return next(iter(alike or names), spec.model)
