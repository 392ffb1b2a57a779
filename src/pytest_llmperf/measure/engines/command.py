"""A server that the user's command line starts: llama-server, trtllm-serve, SGLang, a script around one of them.

It is supervised, logged and stopped as vLLM's is. Nothing is known of it but its port, so the rest is asked: whether it is
ready, whether it is ours, and what it calls its model. What it does not tell is missing.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import psutil

from pytest_llmperf.measure.engines import api, discovery
from pytest_llmperf.measure.engines.engine import EngineError, StartSettings
from pytest_llmperf.measure.engines.server import Program, Ready, ServerEngine, port_taken, visible_gpus
from pytest_llmperf.measure.engines.vllm import QUIET, STAGES
from pytest_llmperf.measure.host.model import bundled_model
from pytest_llmperf.plan.axes import short_model
from pytest_llmperf.plan.command import command_words
from pytest_llmperf.plan.engine import command_line
from pytest_llmperf.plan.secrets import guarded

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_llmperf.measure.engines.child import Child
    from pytest_llmperf.measure.gpus.watch import GpuWatch
    from pytest_llmperf.measure.host.machine import Host
    from pytest_llmperf.plan.engine import EngineSpec

_HOST = "127.0.0.1"
_NO_ROUTE = (404, 405, 501)
"""How servers answer what they don't have: they are asked something else instead."""
_BUSY = re.compile(r"answered HTTP (?:429|503)|cannot be reached|gave no completion")
"""How it is told that a server is not ready yet."""
_LAST_BREATH_S = 5.0


def open_command(
    spec: EngineSpec, host: Host, settings: StartSettings, progress: Callable[[str], None], watch: GpuWatch | None
) -> ServerEngine:
    """Return the server that the spec's command line starts, as a child."""
    program = Program(
        command=lambda port, _: [*command_words(spec.command, _values(spec, port, watch)), *command_line(spec.args)],
        environment=guarded({**QUIET, **os.environ, **visible_gpus(watch), **dict(spec.env)}),
        api_key=settings.api_key,
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


def answers_on_its_port(engine: ServerEngine, child: Child) -> Ready | None:
    """Return how the server is asked, when it is up, gives a token, and is nobody else's; else None.

    Up is a 200 of `/health`, where it has none of `/v1/models`, where it has neither a token. Raises EngineError where another
    process has the port, and where the server refuses what it is asked.
    """
    endpoint = engine.endpoint
    try:
        health = api.ask(endpoint, "/health").status
        up = health if health not in _NO_ROUTE else api.ask(endpoint, "/v1/models").status
    except OSError:
        return None
    if up >= 500 and up not in _NO_ROUTE:
        return None  # llama-server and SGLang answer 503 while they load the model
    if other := _other_owner(int(engine.url.rpartition(":")[2]), child):
        raise port_taken(engine, other)
    try:
        listing = discovery.listing(endpoint)
        endpoint = replace(endpoint, model=_served_name(engine.spec, listing.names))
        versions = discovery.software(endpoint, listing, api.metrics_text(endpoint))
        endpoint, name = discovery.probed(endpoint, gives_ids=discovery.may_give_ids(versions))
    except EngineError as error:
        if _BUSY.search(error.what):
            return None
        child.check_alive("while it was starting", patience_s=_LAST_BREATH_S)
        raise engine.failure(f"The engine is up but gives no token: {error.what}") from error
    return Ready(endpoint, name, versions)


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


def _served_name(spec: EngineSpec, names: Sequence[str]) -> str:
    """Return the name of the spec's model in a list, the list's first where none is alike, the spec's own without a list."""
    wanted = {spec.model, str(bundled_model(spec.model) or spec.model)}
    alike = [name for name in names if name in wanted] or [name for name in names if short_model(name) == spec.short_model]
    return next(iter(alike or names), spec.model)
