"""What an engine is: the protocol that every kind meets, its error, and the settings of a start.

Every engine is a process of its own or a URL. It is a context manager: what it started is gone when the block ends.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pytest_llmperf.measure.client.endpoint import Endpoint
    from pytest_llmperf.measure.client.messages import RoundLog
    from pytest_llmperf.measure.client.processes import LoadClient
    from pytest_llmperf.measure.client.prompts import Prompt
    from pytest_llmperf.measure.engines.phases import Phases
    from pytest_llmperf.measure.gpus.watch import GpuWatch
    from pytest_llmperf.plan.engine import EngineSpec


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
    prompt_tokens: int | None
    output_tokens: int | None
    """As the server counts them; None where it does not tell."""


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
    def api_key(self) -> str | None:
        """Return the API key that requests must bring, None for none; an engine that is started has one of its own."""

    @property
    def headers(self) -> dict[str, str]:
        """Return the headers that every request must have, the key's among them."""

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
    def phases(self) -> Phases:
        """Return what its start was spent on; nothing of it is known where the plugin did not start it."""

    @property
    def log_path(self) -> Path | None:
        """Return its log file, None if the plugin did not start it."""

    @property
    def versions(self) -> dict[str, str]:
        """Return the versions of what serves, e.g. `{"vllm": "0.32.0"}`; empty where they are not known."""

    def play(
        self,
        prompts: Sequence[Prompt],
        client: LoadClient,
        *,
        concurrency: int,
        request_timeout_s: float,
        stall_timeout_s: float,
        stream: bool = True,
        max_concurrency: int | None = None,
        stop_s: float | None = None,
    ) -> RoundLog:
        """Send these prompts, as the load processes of `client` do it or in its own way, and return what happened.

        At a rate at most `max_concurrency` are in flight; in a closed loop nothing is sent after `stop_s`, and what is not has
        the error `messages.OVER`.

        Raises ClientError when a load process fails.
        """

    def idle(self, idle_s: float) -> None:
        """Return when it has had nothing to do for so long; raises EngineError where it ends meanwhile."""

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
    api_key: str | None = field(default=None, repr=False)
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """(name, value) of further headers of every request to a `url` engine."""
    served_model: str | None = None
    """The model's name at a `url` engine; None asks the endpoint."""
