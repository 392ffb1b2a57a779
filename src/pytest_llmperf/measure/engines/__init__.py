"""Engines: one protocol, and `open_engine`, which starts the engine that a spec asks for.

Every engine is a process of its own or a URL. It is a context manager: what it started is gone when the block ends.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from pytest_llmperf.measure.client import Endpoint, LoadClient, RoundLog
    from pytest_llmperf.measure.gpus import GpuWatch
    from pytest_llmperf.measure.host import Host
    from pytest_llmperf.measure.workload import Prompt
    from pytest_llmperf.plan import EngineSpec

CLOCK = "LLMPERF_SIMULATED_CLOCK"
"""The environment variable that is `virtual` where rounds of the simulated engine are to take no time."""


class EngineError(RuntimeError):
    """An engine did not start, died or would not stop.

    The message holds the last lines of its log, `tail`, and names the log file.
    """

    def __init__(self, what: str, *, tail: str = "", log_path: Path | None = None, causes: Sequence[str] = ()) -> None:
        """Make the error from what happened, in one sentence; `causes` are the exceptions that the log names, the first first."""
        parts = [what]
        if causes:
            parts.append("\n".join(["Errors in its log, the first first:", *(f"  {cause}" for cause in causes)]))
        if tail:
            parts.append(f"Last lines of its log:\n{tail}")
        if log_path:
            parts.append(f"Whole log: {log_path}")
        super().__init__("\n".join(parts))
        self.what = what
        self.tail = tail
        self.causes = tuple(causes)
        self.log_path = log_path


@dataclass(frozen=True)
class Completion:
    """The answer to an ad-hoc `generate` call."""

    text: str
    prompt_tokens: int
    output_tokens: int


class Engine(Protocol):
    """A running engine."""

    @property
    def spec(self) -> EngineSpec:
        """Return what was asked for."""

    @property
    def url(self) -> str:
        """Return the root of its OpenAI-compatible API, without `/v1`."""

    @property
    def endpoint(self) -> Endpoint:
        """Return where the load client sends to."""

    @property
    def gpus(self) -> tuple[int, ...]:
        """Return the indices of its GPUs, empty on CPU and for a URL."""

    @property
    def watch(self) -> GpuWatch | None:
        """Return what watches its GPUs, None where it has none or the plugin did not start it."""

    @property
    def startup_s(self) -> float | None:
        """Return the seconds from launch to the first real token, None if the plugin did not start it."""

    @property
    def log_path(self) -> Path | None:
        """Return its log file, None if the plugin did not start it."""

    @property
    def versions(self) -> dict[str, str]:
        """Return the versions of what serves, e.g. `{"vllm": "0.32.0"}`; empty where they are not known."""

    @property
    def prefix_cache_off(self) -> bool:
        """Return whether its prefix cache was switched off, so that no hit can be counted."""

    def play(
        self,
        prompts: Sequence[Prompt],
        client: LoadClient,
        *,
        concurrency: int,
        request_timeout_s: float,
        stall_timeout_s: float,
        stream: bool = True,
    ) -> RoundLog:
        """Send these prompts, as the load processes of `client` do it or in its own way, and return what happened.

        Raises ClientError when a load process fails.
        """

    def check(self) -> None:
        """Raise EngineError if the engine is dead or gives no token."""

    def metrics_text(self) -> str | None:
        """Return its `/metrics` in Prometheus text format, None if it has none."""

    def log_text(self) -> str:
        """Return its log so far, empty if the plugin did not start it."""

    def failure(self, what: str) -> EngineError:
        """Return an error that says what happened, with the last lines of its log where there is one."""

    def generate(self, prompt: str | list[int], *, max_tokens: int = 16) -> Completion:
        """Return the completion of one prompt, or raise EngineError."""


@dataclass(frozen=True)
class StartSettings:
    """How to start engines, the same for all engines of a run."""

    log_folder: Path
    startup_timeout_s: float = 600.0
    stop_grace_s: float = 10.0
    api_key: str | None = None
    served_model: str | None = None
    """The model's name at a `url` engine; None asks the endpoint."""


def open_engine(
    spec: EngineSpec,
    host: Host | None = None,
    settings: StartSettings | None = None,
    progress: Callable[[str], None] = lambda _: None,
    watch: GpuWatch | None = None,
) -> AbstractContextManager[Engine]:
    """Return the engine of a spec as a context manager that starts it on entry and stops it on exit.

    Entering raises EngineError when it does not come up within the start-up time-out. A `url` engine is only checked, and
    never stopped. The engine uses the GPUs of `watch`; without it, it may use all. `host` is this machine where it is not
    given, and logs go to a new temporary folder without `settings`.
    """
    settings = settings or StartSettings(log_folder=Path(tempfile.mkdtemp(prefix="llmperf-")))
    if spec.kind == "url":
        from pytest_llmperf.measure.engines.url import UrlEngine

        return UrlEngine(spec, settings)
    from pytest_llmperf.measure.engines.server import ServerEngine
    from pytest_llmperf.measure.host import describe_host

    host = host or describe_host(spec.kind)
    if spec.kind == "offline":
        from pytest_llmperf.measure.engines.offline import OfflineEngine

        return OfflineEngine(spec, host, settings, progress, watch)
    if spec.kind == "simulated" and (clock := os.environ.get(CLOCK, "")) not in ("", "real"):
        from pytest_llmperf.measure.engines.simulated import VirtualEngine

        if clock != "virtual":
            raise EngineError(f"{CLOCK}={clock}: must be real or virtual")
        return VirtualEngine(spec, host, settings, progress, watch)
    return ServerEngine(spec, host, settings, progress, watch)
