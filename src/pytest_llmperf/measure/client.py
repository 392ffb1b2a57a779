"""The load client: whole HTTP requests are built here, sent and stamped by load processes, and come back as records.

A process of its own (`load.py`) sends and stamps, so that nothing that the test does delays a request or a stamp. Where one
does not keep up there can be several: each then has its share of the conversations.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

from pytest_llmperf.measure.response import RequestRecord

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    from pytest_llmperf.measure.workload import Prompt

_START_DELAY_NS = 2_000_000
"""From the last process's readiness to the first request, so that all processes begin together."""


@dataclass(frozen=True)
class RoundPlan:
    """What the load processes are told to do: complete HTTP requests, kept at `concurrency` in flight, or sent when due."""

    host: str
    port: int
    tls: bool
    requests: tuple[bytes, ...]
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

    def conversations(self) -> list[range]:
        """Return the requests of each conversation, most often a single one."""
        starts = [index for index in range(len(self.requests)) if not (self.follows and self.follows[index])]
        return [range(start, end) for start, end in zip(starts, [*starts[1:], len(self.requests)], strict=True)]

    def split(self, parts: int) -> list[tuple[RoundPlan, list[int]]]:
        """Return plans for so many processes, each with the indices of its requests; conversations stay whole."""
        talks = self.conversations()
        # In a closed loop each process has at least one request in flight.
        parts = max(1, min(parts, len(talks), len(talks) if self.due_ns else self.concurrency))
        found = []
        for part in range(parts):
            mine = list(chain.from_iterable(talks[part::parts]))
            found.append((self._only(mine, max(1, len(range(part, self.concurrency, parts)))), mine))
        return found

    def _only(self, indices: Sequence[int], concurrency: int) -> RoundPlan:
        columns = {name: getattr(self, name) for name in ("requests", "output_tokens", "due_ns", "follows", "exact")}
        picked: dict[str, Any] = {name: tuple(values[index] for index in indices) for name, values in columns.items() if values}
        return replace(self, concurrency=concurrency, **picked)


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

    @property
    def cpu_share(self) -> float | None:
        """Return the share of a core that the busiest load process took, None for a round of no length."""
        return self.cpu_s / self.busy_s if self.busy_s else None


class ClientError(RuntimeError):
    """A load process itself failed; nothing was measured."""


class LoadClient:
    """One load process or more. Start it before the engine is ready: a round then begins at once."""

    def __init__(self, processes: int = 1) -> None:
        """Start the processes."""
        self._processes = [_Process() for _ in range(processes)]

    def __enter__(self) -> Self:
        """Return the client."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes."""
        self.close()

    @property
    def processes(self) -> int:
        """Return how many load processes there are."""
        return len(self._processes)

    def grow(self) -> None:
        """Add one more load process."""
        self._processes.append(_Process())

    def close(self) -> None:
        """End the processes, also in the middle of a round."""
        for process in self._processes:
            process.close()

    def play(self, plan: RoundPlan) -> RoundLog:
        """Send the requests of one round and return what happened, or raise ClientError."""
        shares = plan.split(len(self._processes))
        active = list(zip(self._processes, shares, strict=False))
        for process, (part, _) in active:
            process.write(msgspec.msgpack.encode(part))
        for process, _ in active:
            process.read()  # it has connected
        start_ns = time.monotonic_ns() + (_START_DELAY_NS if len(active) > 1 else 0)
        for process, _ in active:
            process.write(start_ns.to_bytes(8, "big"))
        logs = [msgspec.msgpack.decode(process.read(), type=RoundLog) for process, _ in active]
        joined = _joined(logs, [indices for _, indices in shares])
        if len(joined.records) != len(plan.requests):
            raise ClientError(f"the load processes answered for {len(joined.records)} requests, not {len(plan.requests)}")
        return joined


def _joined(logs: Sequence[RoundLog], places: Sequence[Sequence[int]]) -> RoundLog:
    """Return the logs of several processes as one, its records in the order of the plan."""
    if len(logs) == 1:
        return logs[0]
    records = {place: one for log, mine in zip(logs, places, strict=True) for place, one in zip(mine, log.records, strict=True)}
    busiest = max(logs, key=lambda log: log.cpu_share or 0.0)
    return RoundLog(
        records=tuple(records[place] for place in sorted(records)),
        stalled=any(log.stalled for log in logs),
        kernel_stamps=sum(log.kernel_stamps for log in logs),
        clock_stamps=sum(log.clock_stamps for log in logs),
        cpu_s=busiest.cpu_s,
        busy_s=busiest.busy_s,
        parse_s=busiest.parse_s,
        clock_set=any(log.clock_set for log in logs),
        processes=len(logs),
    )


class _Process:
    """A load process and its two pipes; messages have their length in front."""

    def __init__(self) -> None:
        source = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pytest_llmperf.measure.load"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C reaches pytest, which ends the round; the process ends with its stdin
            env={**os.environ, "PYTHONPATH": path},
        )

    def write(self, message: bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(len(message).to_bytes(8, "big") + message)
            self._process.stdin.flush()
        except OSError as error:
            raise self._ended(f" ({error})") from error

    def read(self) -> bytes:
        assert self._process.stdout is not None
        try:
            size = int.from_bytes(self._process.stdout.read(8), "big")
            message = self._process.stdout.read(size)
        except OSError as error:
            raise self._ended(f" ({error})") from error
        if not message or len(message) < size:
            raise self._ended("")
        return message

    def _ended(self, why: str) -> ClientError:
        return ClientError(f"the load process ended with exit code {self._process.wait()}{why}")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with contextlib.suppress(OSError):  # what was not written any more can never be
                    pipe.close()


@dataclass(frozen=True)
class Endpoint:
    """Where requests go, and what must be written on them."""

    url: str
    """The server's root, without `/v1`."""
    model: str
    """The name under which the server serves the model."""
    api_key: str | None = None

    def plan(
        self,
        prompts: Sequence[Prompt],
        *,
        concurrency: int,
        request_timeout_s: float,
        stall_timeout_s: float,
        stream: bool = True,
    ) -> RoundPlan:
        """Return the round as complete HTTP requests, built before any clock starts."""
        parts = urlsplit(self.url)
        host = parts.hostname or ""
        tls = parts.scheme == "https"
        port = parts.port or (443 if tls else 80)
        bodies = [_body(self.model, prompt, stream=stream) for prompt in prompts]
        due = tuple(int((prompt.due_s or 0) * 1e9) for prompt in prompts) if any(p.due_s is not None for p in prompts) else ()
        return RoundPlan(
            host=host,
            port=port,
            tls=tls,
            requests=tuple(self._request(prompt, body) for prompt, body in zip(prompts, bodies, strict=True)),
            output_tokens=tuple(prompt.output_tokens for prompt in prompts),
            concurrency=concurrency,
            request_timeout_s=request_timeout_s,
            stall_timeout_s=stall_timeout_s,
            due_ns=due,
            follows=tuple(prompt.follows for prompt in prompts) if any(prompt.follows for prompt in prompts) else (),
            exact=() if all(body["ignore_eos"] for body in bodies) else tuple(bool(body["ignore_eos"]) for body in bodies),
            stream=stream,
        )

    def _request(self, prompt: Prompt, body: dict[str, Any]) -> bytes:
        parts = urlsplit(self.url)
        host = parts.hostname or ""
        port = parts.port or (443 if parts.scheme == "https" else 80)
        key = f"Authorization: Bearer {self.api_key}\r\n" if self.api_key else ""
        shown = f"[{host}]" if ":" in host else host
        api = "chat/completions" if prompt.messages else "completions"
        data = json.dumps(body, separators=(",", ":")).encode()
        head = (
            f"POST {parts.path}/v1/{api} HTTP/1.1\r\nHost: {shown}:{port}\r\nContent-Type: application/json\r\n"
            f"Accept: text/event-stream\r\n{key}Content-Length: {len(data)}\r\n\r\n"
        )
        return head.encode() + data


def _body(model: str, prompt: Prompt, *, stream: bool) -> dict[str, Any]:
    asked: dict[str, Any] = (
        {"messages": [{"role": role, "content": text} for role, text in prompt.messages]}
        if prompt.messages
        else {"prompt": prompt.token_ids or prompt.text}
    )
    body: dict[str, Any] = {
        "model": prompt.model or model,
        **asked,
        "max_tokens": prompt.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return body | {"return_token_ids": True, **json.loads(prompt.body)}
