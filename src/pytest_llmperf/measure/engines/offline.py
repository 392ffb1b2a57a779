"""`vllm.LLM` without a server: what the engine can do when no HTTP front end stands before it.

The child (`host_llm.py`) is started, checked, watched and ended like a server. A round is sent to it as a whole, played there
step by step, and comes back as the records that a client would have made.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from pytest_llmperf.measure.client import ClientError, RoundLog
from pytest_llmperf.measure.engines import api
from pytest_llmperf.measure.engines.server import ServerEngine
from pytest_llmperf.measure.response import RequestRecord

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_llmperf.measure.client import LoadClient
    from pytest_llmperf.measure.workload import Prompt

_HOST = Path(__file__).with_name("host_llm.py")


class OfflineEngine(ServerEngine):
    """A child that hosts `vllm.LLM`. It is started on entry and gone on exit."""

    def program(self) -> list[str]:
        """Return what is started, before its arguments."""
        return [self.spec.python, str(_HOST)]

    def play(self, prompts: Sequence[Prompt], client: LoadClient, **how: Any) -> RoundLog:
        """Play a round inside the child and return what happened; no load process takes part.

        Raises EngineError for what only a server can do, and when the child has died, ClientError when it refuses.
        """
        if any(prompt.messages or prompt.model for prompt in prompts):
            what = "The offline engine has neither a chat API nor LoRA adapters"
            raise self.failure(f"{what}; use --llmperf-engine=server for these.")
        body = {
            "prompts": [_plain(prompt) for prompt in prompts],
            "concurrency": how["concurrency"],
            "request_timeout_s": how["request_timeout_s"],
        }
        try:
            # Each request has its own time-out in there; one more is for all of them, should the engine hang.
            limit_s = how["request_timeout_s"] + how["stall_timeout_s"]
            status, answer = api.post(f"{self.url}/play", body, timeout_s=limit_s)
        except OSError as error:
            if isinstance(error, TimeoutError):
                return RoundLog(tuple(RequestRecord(None, error="the engine hung") for _ in prompts), stalled=True)
            self.check()
            raise ClientError(f"the offline engine gave no answer to a round ({error})") from error
        if status != 200:
            raise ClientError(f"the offline engine refused a round: {answer[:500]}")
        records = msgspec.convert(json.loads(answer), tuple[RequestRecord, ...])
        return RoundLog(records)


def _plain(prompt: Prompt) -> dict[str, Any]:
    body = json.loads(prompt.body)
    return {
        "token_ids": prompt.token_ids,
        "text": prompt.text,
        "output_tokens": prompt.output_tokens,
        "due_s": prompt.due_s,
        "follows": prompt.follows,
        "exact": bool(body.get("ignore_eos", True)),
        "body": body,
    }
