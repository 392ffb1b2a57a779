"""The simulated engine on a virtual clock: a round is sent to it as a whole, and comes back as the bytes of its answers, stamped.

The requests are those that the load process would send, and the answers are read as it reads them. What is missing is the
waiting: no load process takes part, so that what is measured is the same on every machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from pytest_llmperf.measure.client import ClientError, RoundLog
from pytest_llmperf.measure.engines import api
from pytest_llmperf.measure.engines.server import ServerEngine
from pytest_llmperf.measure.load import to_record
from pytest_llmperf.measure.response import RequestRecord

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_llmperf.measure.client import LoadClient, RoundPlan
    from pytest_llmperf.measure.workload import Prompt

_ROUND_TIMEOUT_S = 600.0
"""For the computing of a round, however long that takes in virtual time."""


class _Exchange(msgspec.Struct):
    sent_ns: int
    from_ns: int
    reads: list[tuple[int, str]]
    error: str | None


class _Played(msgspec.Struct):
    start_ns: int
    stalled: bool
    exchanges: list[_Exchange]


class VirtualEngine(ServerEngine):
    """A simulated engine whose rounds take no time. It is started on entry and gone on exit."""

    def play(self, prompts: Sequence[Prompt], client: LoadClient, **how: Any) -> RoundLog:
        """Play a round in virtual time and return what a client without any delay would have seen.

        Raises EngineError when the engine has died, ClientError when it refuses.
        """
        plan = self.endpoint.plan(prompts, **how)
        body = {
            "requests": [request.decode("latin-1") for request in plan.requests],
            "concurrency": plan.concurrency,
            "due_ns": plan.due_ns,
            "conversations": [list(indices) for indices in plan.conversations()],
        }
        try:
            status, answer = api.post(f"{self.url}/play", body, timeout_s=_ROUND_TIMEOUT_S)
        except OSError as error:
            self.check()
            raise ClientError(f"the simulated engine gave no answer to a round ({error})") from error
        if status != 200:
            raise ClientError(f"the simulated engine refused a round: {answer[:500]}")
        played = msgspec.json.decode(answer, type=_Played)
        records = tuple(_record(plan, index, one, played.start_ns) for index, one in enumerate(played.exchanges))
        return RoundLog(records, stalled=played.stalled)


def _record(plan: RoundPlan, index: int, exchange: _Exchange, start_ns: int) -> RequestRecord:
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
    )
