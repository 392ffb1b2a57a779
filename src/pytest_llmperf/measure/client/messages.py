"""What pytest's process and the load processes tell each other: the plan of a round, and the log of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from pytest_llmperf.measure.client.response import RequestRecord

if TYPE_CHECKING:
    from collections.abc import Sequence


OVER = "not sent: the round's time was over"
"""The error of a request whose turn did not come in a round that is bound by time: it is none of its requests."""


@dataclass(frozen=True)
class RoundPlan:
    """What the load processes are told to do: complete HTTP requests, kept at `concurrency` in flight, or sent when due."""

    host: str
    port: int
    tls: bool
    requests: tuple[bytes, ...] = field(repr=False)
    """As they are sent, with all headers."""
    output_tokens: tuple[int, ...]
    concurrency: int
    request_timeout_s: float
    stall_timeout_s: float
    due_ns: tuple[int, ...] = ()
    """When each request is to be sent, from the round's beginning; empty in a closed loop. That of a request which follows
    another is not looked at."""
    follows: tuple[bool, ...] = ()
    """Which requests are sent on the connection of the one before, when that one is answered; empty: none."""
    exact: tuple[bool, ...] = ()
    """Which requests must have just as many tokens as asked for, not at most; empty: all."""
    stream: bool = True
    max_concurrency: int | None = None
    """The most requests in flight where they are sent when due; None: as many as are due."""
    think_ns: tuple[int, ...] = ()
    """The pause before each request that follows another, from that one's answer; empty: none."""
    stop_ns: int | None = None
    """From when on, since the round's beginning, a closed loop sends nothing more; None: all is sent."""

    def conversations(self) -> list[range]:
        """Return the requests of each conversation, most often a single one."""
        starts = [index for index in range(len(self.requests)) if not (self.follows and self.follows[index])]
        return [range(start, end) for start, end in zip(starts, [*starts[1:], len(self.requests)], strict=True)]

    def split(self, parts: int) -> list[tuple[RoundPlan, list[int]]]:
        """Return plans for so many processes, each with the indices of its requests; conversations stay whole."""
        talks = self.conversations()
        # In a closed loop each process has at least one request in flight.
        most = self.max_concurrency or len(talks) if self.due_ns else self.concurrency
        parts = max(1, min(parts, len(talks), most))
        plans = []
        for part in range(parts):
            indices = list(chain.from_iterable(talks[part::parts]))
            # Each has its share of the cap too: it may wait while another one has room.
            cap = self.max_concurrency and len(range(part, self.max_concurrency, parts))
            share = replace(self, concurrency=max(1, len(range(part, self.concurrency, parts))), max_concurrency=cap)
            plans.append((share._only(indices), indices))
        return plans

    def _only(self, indices: Sequence[int]) -> RoundPlan:
        names = ("requests", "output_tokens", "due_ns", "follows", "exact", "think_ns")
        columns = {name: getattr(self, name) for name in names}
        picked: dict[str, Any] = {name: tuple(values[index] for index in indices) for name, values in columns.items() if values}
        return replace(self, **picked)


@dataclass(frozen=True)
class RoundLog:
    """What the load processes saw in one round."""

    records: tuple[RequestRecord, ...]
    stalled: bool = False
    """No byte came on any connection for the stall time-out."""
    kernel_stamps: int = 0
    """Reads whose arrival the kernel stamped."""
    clock_stamps: int = 0
    """Reads stamped by the process's own clock: a kernel that gave no stamp."""
    cpu_s: float = 0.0
    """CPU time of the busiest load process during the round."""
    busy_s: float = 0.0
    """Seconds from that process's first request to its last response."""
    parse_s: float = 0.0
    """CPU time that it took after the round, for what it had not parsed in time."""
    clock_set: bool = False
    """The wall clock, which kernel stamps are on, was set during the round."""
    processes: int = 1

    def sent(self) -> tuple[RoundLog, tuple[int, ...]]:
        """Return the log of what was sent before the round's time was over, and which requests that are."""
        kept = tuple(index for index, record in enumerate(self.records) if record.error != OVER)
        return replace(self, records=tuple(self.records[index] for index in kept)), kept

    @property
    def cpu_share(self) -> float | None:
        """Return the share of a core that the busiest load process took, None for a round of no length."""
        return self.cpu_s / self.busy_s if self.busy_s else None


class ClientError(RuntimeError):
    """A load process itself failed; nothing was measured."""
