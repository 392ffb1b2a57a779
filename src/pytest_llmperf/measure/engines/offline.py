"""`vllm.LLM` without an HTTP server.

The child (`host_llm.py`) is started, checked, watched and ended like a server. A round is sent to it as a whole, played there
step by step, and comes back as the records that a client would have made.
"""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import Future, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from pytest_llmperf.measure.client.messages import OVER, ClientError, RoundLog
from pytest_llmperf.measure.client.response import RequestRecord
from pytest_llmperf.measure.engines import api
from pytest_llmperf.measure.engines.vllm import open_vllm

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_llmperf.measure.client.processes import LoadClient
    from pytest_llmperf.measure.client.prompts import Prompt
    from pytest_llmperf.measure.engines.engine import StartSettings
    from pytest_llmperf.measure.engines.server import ServerEngine
    from pytest_llmperf.measure.gpus.watch import GpuWatch
    from pytest_llmperf.measure.host.machine import Host
    from pytest_llmperf.plan.engine import EngineSpec

_A_DAY_S = 86_400.0
_LOOK_S = 1.0
_HOST = Path(__file__).with_name("host_llm.py")


def open_offline(
    spec: EngineSpec, host: Host, settings: StartSettings, progress: Callable[[str], None], watch: GpuWatch | None
) -> ServerEngine:
    """Return a child that hosts `vllm.LLM`."""
    return open_vllm([spec.python, str(_HOST)], spec, host, settings, progress, watch, _play)


def _play(engine: ServerEngine, prompts: Sequence[Prompt], client: LoadClient, **how: Any) -> RoundLog:
    """Play a round inside the child and return what happened; no load process takes part.

    Raises EngineError for what only a server can do, and when the child has died, ClientError when it refuses.
    """
    if any(prompt.messages or prompt.model for prompt in prompts):
        what = "The offline engine has neither a chat API nor LoRA adapters"
        raise engine.failure(f"{what}; use --llmperf-engine=server for these.")
    body = {
        "prompts": [_plain(prompt) for prompt in prompts],
        "concurrency": how["concurrency"],
        "request_timeout_s": how["request_timeout_s"],
        "max_concurrency": how.get("max_concurrency"),
        "stop_s": how.get("stop_s"),
        "over": OVER,
    }
    try:
        playing = _begin(engine, body)
        if not _moves(engine, playing, how["stall_timeout_s"]):
            engine.stop()  # which also ends the thread's waiting
            return RoundLog(tuple(RequestRecord(None, error="the engine hung") for _ in prompts), stalled=True)
        status, answer = playing.result()
    except OSError as error:
        engine.check()
        raise ClientError(f"the offline engine gave no answer to a round ({error})") from error
    if status != 200:
        raise ClientError(f"the offline engine refused a round: {answer[:500]}")
    records = msgspec.convert(json.loads(answer), tuple[RequestRecord, ...])
    return RoundLog(records)


def _begin(engine: ServerEngine, body: dict[str, Any]) -> Future[tuple[int, str]]:
    """Send a round to the child, and return what its answer will be."""
    playing: Future[tuple[int, str]] = Future()

    def post() -> None:
        try:
            playing.set_result(api.post(f"{engine.url}/play", body, timeout_s=_A_DAY_S, api_key=engine.endpoint.api_key))
        except BaseException as error:
            playing.set_exception(error)

    # A daemon: an executor's thread is waited for, on Ctrl-C too. It ends with the child, which is stopped then.
    threading.Thread(target=post, name="llmperf-offline", daemon=True).start()
    return playing


def _moves(engine: ServerEngine, playing: Future[tuple[int, str]], stall_timeout_s: float) -> bool:
    """Wait until the round is over; return False when requests are open, and no token comes for too long."""
    before, since_s = -1, time.monotonic()
    while not playing.done():
        wait([playing], timeout=_LOOK_S)
        try:
            now = json.loads(api.get(f"{engine.url}/progress", api_key=engine.endpoint.api_key)[1])
        except (OSError, ValueError):
            now = {"tokens": before, "open": 1}  # not even that is answered
        if now["tokens"] != before or not now["open"]:
            before, since_s = now["tokens"], time.monotonic()
        elif time.monotonic() - since_s > stall_timeout_s:
            return False
    return True


def _plain(prompt: Prompt) -> dict[str, Any]:
    body = json.loads(prompt.body)
    return {
        "token_ids": prompt.token_ids,
        "text": prompt.text,
        "output_tokens": prompt.output_tokens,
        "due_s": prompt.due_s,
        "follows": prompt.follows,
        "think_s": prompt.think_s,
        "exact": bool(body.get("ignore_eos", True)),
        "body": body,
    }
