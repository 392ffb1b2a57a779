"""The simulated engine: the server of `pytest_llmperf.testing` as a child, on a real or a virtual clock.

On the virtual one a round is sent to it as a whole, and comes back as the bytes of its answers, stamped. The requests are those
that the load process would send, and the answers are read as it reads them. What is missing is the waiting: no load process
takes part, so that what is measured is the same on every machine.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import msgspec

from pytest_llmperf.measure.client.answers import to_record
from pytest_llmperf.measure.client.messages import OVER, ClientError, RoundLog
from pytest_llmperf.measure.client.processes import python_path
from pytest_llmperf.measure.client.response import RequestRecord
from pytest_llmperf.measure.engines import api
from pytest_llmperf.measure.engines.engine import EngineError, StartSettings
from pytest_llmperf.measure.engines.server import Idle, Play, Program, ServerEngine, play_over_http, visible_gpus
from pytest_llmperf.measure.engines.vllm import QUIET, SAFE_PATH, STAGES, keys_of, vllm_command
from pytest_llmperf.plan.engine import command_line
from pytest_llmperf.plan.secrets import guarded

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_llmperf.measure.client.messages import RoundPlan
    from pytest_llmperf.measure.client.processes import LoadClient
    from pytest_llmperf.measure.client.prompts import Prompt
    from pytest_llmperf.measure.gpus.watch import GpuWatch
    from pytest_llmperf.measure.host.machine import Host
    from pytest_llmperf.plan.engine import EngineSpec

CLOCK = "LLMPERF_SIMULATED_CLOCK"
"""The environment variable that is `virtual` where rounds of the simulated engine are to take no time."""
_ROUND_TIMEOUT_S = 600.0
"""For the computing of a round, however long that takes in virtual time."""


class _Exchange(msgspec.Struct):
    sent_ns: int
    from_ns: int
    reads: list[tuple[int, str]]
    error: str | None
    due_ns: int = 0
    over: bool = False


class _Played(msgspec.Struct):
    start_ns: int
    stalled: bool
    exchanges: list[_Exchange]


def play_virtually(engine: ServerEngine, prompts: Sequence[Prompt], client: LoadClient, **how: Any) -> RoundLog:
    """Play a round in virtual time and return what a client without any delay would have seen.

    Raises EngineError when the engine has died, ClientError when it refuses.
    """
    plan = engine.endpoint.plan(prompts, **how)
    body = {
        "requests": [request.decode("latin-1") for request in plan.requests],
        "concurrency": plan.concurrency,
        "due_ns": plan.due_ns,
        "conversations": [list(indices) for indices in plan.conversations()],
        "max_concurrency": plan.max_concurrency,
        "think_ns": plan.think_ns,
        "stop_ns": plan.stop_ns,
    }
    try:
        status, answer = api.post(f"{engine.url}/play", body, timeout_s=_ROUND_TIMEOUT_S, api_key=engine.endpoint.api_key)
    except OSError as error:
        engine.check()
        raise ClientError(f"the simulated engine gave no answer to a round ({error})") from error
    if status != 200:
        raise ClientError(f"the simulated engine refused a round: {answer[:500]}")
    played = msgspec.json.decode(answer, type=_Played)
    records = tuple(_record(plan, index, exchange, played.start_ns) for index, exchange in enumerate(played.exchanges))
    return RoundLog(records, stalled=played.stalled)


def _record(plan: RoundPlan, index: int, exchange: _Exchange, start_ns: int) -> RequestRecord:
    if exchange.over:
        return RequestRecord(None, error=OVER)
    if not exchange.sent_ns:
        return RequestRecord(None, error="never sent: the round had stalled")
    reads = [(stamp_ns, text.encode("latin-1")) for stamp_ns, text in exchange.reads]
    return to_record(
        plan,
        index,
        reads,
        sent_ns=exchange.sent_ns,
        from_ns=exchange.from_ns,
        start_ns=start_ns,
        error=exchange.error,
        due_ns=exchange.due_ns or None,
    )


def idle_virtually(engine: ServerEngine, idle_s: float) -> None:
    """Let time pass on the engine's clock, and nowhere else; raises EngineError where it cannot be told to."""
    body = {"seconds": idle_s}
    status, answer = api.post(f"{engine.url}/idle", body, timeout_s=_ROUND_TIMEOUT_S, api_key=engine.endpoint.api_key)
    if status != 200:
        raise engine.failure(f"The simulated engine refused to idle: {answer[:500]}")


_CLOCKS: dict[str, tuple[Play, Idle | None]] = {"real": (play_over_http, None), "virtual": (play_virtually, idle_virtually)}


def open_simulated(
    spec: EngineSpec, host: Host, settings: StartSettings, progress: Callable[[str], None], watch: GpuWatch | None
) -> ServerEngine:
    """Return the simulated server as a child; raises EngineError for an unknown clock."""
    clock = os.environ.get(CLOCK) or "real"
    if clock not in _CLOCKS:
        raise EngineError(f"{CLOCK}={clock}: must be {' or '.join(_CLOCKS)}")
    environment = {**QUIET, **SAFE_PATH, **os.environ, **visible_gpus(watch), **dict(spec.env)}
    command = [spec.python or sys.executable, "-m", "pytest_llmperf.testing"]
    keys = keys_of(spec)
    program = Program(
        command=vllm_command(command, spec, command_line(keys.without(spec.args))),
        # Its program is found where this package is, whatever the interpreter has installed.
        environment=guarded(environment | keys.environment | {"PYTHONPATH": python_path(environment)}),
        api_key=keys.api_key,
        play=_CLOCKS[clock][0],
        idle=_CLOCKS[clock][1],
        stages=STAGES,
    )
    return ServerEngine(spec, program, settings, progress, watch)
