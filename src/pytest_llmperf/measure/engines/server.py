"""An engine with an HTTP server that is a child of ours: it is started, waited for, checked and stopped here.

What the child runs, and how a round is played on it, are values: vLLM's are in `vllm.py` and `offline.py`, the simulated one's
in `simulated.py`.
"""

from __future__ import annotations

import re
import secrets
import socket
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from pytest_llmperf.measure.client.endpoint import Endpoint
from pytest_llmperf.measure.engines import api, discovery
from pytest_llmperf.measure.engines.child import Child, failure, read_log
from pytest_llmperf.measure.engines.engine import Completion, EngineError, StartSettings
from pytest_llmperf.measure.engines.phases import Phases, read_phases

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from typing import Self

    from pytest_llmperf.measure.client.messages import RoundLog
    from pytest_llmperf.measure.client.processes import LoadClient
    from pytest_llmperf.measure.client.prompts import Prompt
    from pytest_llmperf.measure.gpus.watch import GpuWatch
    from pytest_llmperf.plan.engine import EngineSpec

_POLL_S, _LOOK_S = 0.1, 1.0
_LAST_BREATH_S = 5.0
"""A dying engine refuses connections before its process is gone."""
_PORT_ATTEMPTS = 3
_PORT_TAKEN = re.compile(r"address already in use|EADDRINUSE|couldn't bind HTTP server socket", re.I)


class Play(Protocol):
    """How a round is played on an engine."""

    def __call__(self, engine: ServerEngine, prompts: Sequence[Prompt], client: LoadClient, **how: Any) -> RoundLog:
        """Send these prompts and return what happened; `how` are the keyword arguments of `Engine.play`."""


class Idle(Protocol):
    """How an engine is let idle."""

    def __call__(self, engine: ServerEngine, idle_s: float) -> None:
        """Return when it has had nothing to do for so long."""


def play_over_http(engine: ServerEngine, prompts: Sequence[Prompt], client: LoadClient, **how: Any) -> RoundLog:
    """Send these prompts over HTTP and return what happened; raises ClientError when a load process fails.

    Raises EngineError where the engine has only a chat API, and the prompts are for the other.
    """
    if discovery.lacks_api(engine.api, prompts):
        raise engine.failure(discovery.ONLY_CHAT)
    return client.play(engine.endpoint.plan(prompts, **how))


@dataclass(frozen=True)
class Ready:
    """How a child that is ready is asked."""

    endpoint: Endpoint
    api: str = "completions"
    """The API that gives tokens, one of `plan.workload.APIS`."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """What it tells of its own."""


class Answers(Protocol):
    """How it is known that a child is ready, and what it calls its model."""

    def __call__(self, engine: ServerEngine, child: Child) -> Ready | None:
        """Return how it is asked, None while the child is not ready.

        Raises EngineError, with "address already in use" as its tail, where another process has the port.
        """


def answers_to_alias(engine: ServerEngine, child: Child) -> Ready | None:
    """Return the endpoint when /health is 200, and the server behind it knows that name, which this start has made up."""
    try:
        if api.get(f"{engine.url}/health", timeout_s=2)[0] != 200:
            return None
        models = api.served_models(engine.url, api_key=engine.endpoint.api_key)
    except OSError:
        return None
    except EngineError as error:
        if "401" in error.what:
            raise
        return None  # it answers /health already, but not this yet
    if engine.endpoint.model not in models:
        raise port_taken(engine, f"which serves {models}")
    return Ready(engine.endpoint)


def port_taken(engine: ServerEngine, who: str) -> EngineError:
    """Return the error that has another port tried."""
    return EngineError(f"{engine.url} is answered by another server, {who}.", tail="address already in use")


@dataclass(frozen=True)
class Program:
    """What a child runs, and how it is measured."""

    command: Callable[[int, str], Sequence[str]]
    """Returns the words of its command line, for the port that it must listen on, and a name that no other server knows."""
    environment: Mapping[str, str] = field(repr=False)
    api_key: str | None = field(default=None, repr=False)
    """What requests must bring, None for nothing; it is the child's own, or known to it by its environment."""
    versions: Callable[[], dict[str, str]] = dict
    """Returns the versions of what serves; raises EngineError where it is not there."""
    play: Play = play_over_http
    answers: Answers = answers_to_alias
    idle: Idle | None = None
    """How it is let idle; None: by waiting."""
    stages: Mapping[str, str] = field(default_factory=dict)
    """Patterns of log lines, and what progress says of each; `{0}` is a pattern's first group."""


def visible_gpus(watch: GpuWatch | None) -> dict[str, str]:
    """Return the variables that keep an engine to the GPUs that it was given."""
    if not watch:
        return {}
    # vLLM reads indices; a MIG slice has none. CUDA's own order is by speed, NVML's by bus.
    names = [gpu.uuid if gpu.uuid.startswith("MIG-") else str(gpu.index) for gpu in watch.gpus]
    visible = {watch.accelerators.visible_variable: ",".join(names)}
    return visible | ({"CUDA_DEVICE_ORDER": "PCI_BUS_ID"} if watch.accelerators.vendor == "nvidia" else {})


class ServerEngine:
    """A server process that this plugin owns. It is started on entry and gone on exit."""

    def __init__(
        self,
        spec: EngineSpec,
        program: Program,
        settings: StartSettings,
        progress: Callable[[str], None],
        watch: GpuWatch | None = None,
    ) -> None:
        """Note what to start, and on which GPUs; nothing runs before the block is entered."""
        self.spec = spec
        self.watch = watch
        self.gpus = tuple(gpu.index for gpu in watch.gpus) if watch else ()
        self.url = ""
        self.startup_s: float | None = None
        self.phases = Phases()
        self.log_path: Path = settings.log_folder / "engine.log"
        self.versions: dict[str, str] = {}
        self.api = "completions"
        """The API that gives tokens."""
        self.endpoint = Endpoint("", spec.model, program.api_key)
        self._program = program
        self._settings = settings
        self._progress = progress
        self._child: Child | None = None
        self._shown: set[str] = set()
        self._launched_s = 0.0
        self._lines: list[tuple[float, str]] = []
        """Of its log while it starts: seconds since the launch, line."""

    @property
    def api_key(self) -> str | None:
        """Return what requests must bring, None for nothing."""
        return self.endpoint.api_key

    @property
    def headers(self) -> dict[str, str]:
        """Return the headers that every request must have."""
        return self.endpoint.head()

    def __enter__(self) -> Self:
        """Start the server and wait for its first real token, or raise EngineError with nothing left running."""
        started_s = time.perf_counter()
        self.versions = self._program.versions()
        try:
            for attempt in range(1, _PORT_ATTEMPTS + 1):
                try:
                    self._launch()
                    self._wait_until_ready(started_s + self._settings.startup_timeout_s)
                    break
                except EngineError as error:
                    # Another process bound the port between our probe and the engine's bind: take another one.
                    if attempt == _PORT_ATTEMPTS or not _PORT_TAKEN.search(error.tail):
                        raise
                    self.stop()
            self.startup_s = time.perf_counter() - started_s
            if self.watch:
                self.watch.mark_started()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the server and everything it has started, or raise EngineError naming what is left."""
        self.stop()

    def _launch(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        alias = f"llmperf-{secrets.token_hex(4)}"  # proves that the port is answered by this engine
        self.endpoint = replace(self.endpoint, url=self.url, model=alias)
        self.log_path = self._settings.log_folder / f"engine-{self.spec.short_model}-tp{self.spec.tp}-{port}.log"
        command = self._program.command(port, alias)
        self._launched_s, self._lines = time.perf_counter(), []
        self._child = Child(command, self._program.environment, self.log_path, grace_s=self._settings.stop_grace_s)
        if self.watch:
            self.watch.follow(self._child.pid)

    def _running(self) -> Child:
        if self._child is None:
            raise EngineError("The engine is not running.")
        return self._child

    def _wait_until_ready(self, deadline_s: float) -> None:
        while True:
            self._report_progress()
            self._running().check_alive("while it was starting")
            if time.perf_counter() > deadline_s:
                raise self.failure(
                    f"The engine was not ready after {self._settings.startup_timeout_s:g} s{self._elsewhere()};"
                    " see --llmperf-startup-timeout."
                )
            asked_s = time.perf_counter()
            if ready := self._program.answers(self, self._running()):
                self.endpoint, self.api = ready.endpoint, ready.api
                self.versions |= ready.versions
                break
            time.sleep(_POLL_S)
        self.check()
        first_token_s = time.perf_counter() - asked_s
        self._report_progress()
        self.phases = read_phases(self._lines, first_token_s)
        self._lines.clear()

    def _elsewhere(self) -> str:
        """Return that it listens, but not where it was told to; empty where it does not listen at all."""
        port, ports = int(self.url.rpartition(":")[2]), self._running().listening()
        if not ports or port in ports:
            return ""
        return f": it listens on port {', '.join(map(str, sorted(ports)))}, and was told {port}"

    def check(self) -> None:
        """Raise EngineError if the engine is dead or gives no token: /health is 200 for stuck engines too."""
        when = "before it was stopped"
        self._running().check_alive(when)
        try:
            self.generate([5, 6, 7], max_tokens=1)
        except EngineError as error:
            self._running().check_alive(when, patience_s=_LAST_BREATH_S)
            raise self.failure(f"The engine is up but gives no token: {error.what}") from error

    def play(self, prompts: Sequence[Prompt], client: LoadClient, **how: Any) -> RoundLog:
        """Send these prompts and return what happened, as `Engine.play` says."""
        return self._program.play(self, prompts, client, **how)

    def idle(self, idle_s: float) -> None:
        """Return when it has had nothing to do for so long; raises EngineError where it ends meanwhile."""
        if self._program.idle:
            return self._program.idle(self, idle_s)
        deadline_s = time.perf_counter() + idle_s
        while (left_s := deadline_s - time.perf_counter()) > 0:
            self._running().check_alive("while it idled (--llmperf-idle)", patience_s=min(left_s, _LOOK_S))
        return None

    def generate(self, prompt: str | list[int], *, max_tokens: int = 16) -> Completion:
        """Return the completion of one prompt, or raise EngineError."""
        return api.complete(self.endpoint, discovery.asked_as(self.endpoint, self.api, prompt), max_tokens, api=self.api)

    def metrics_text(self) -> str | None:
        """Return the engine's `/metrics`, None if it has none or doesn't answer."""
        return api.metrics_text(self.endpoint)

    def log_text(self) -> str:
        """Return the log so far."""
        return read_log(self.log_path)

    def failure(self, what: str) -> EngineError:
        """Return an error that says what happened, with the last lines of the log."""
        return failure(what, self.log_path)

    def _report_progress(self) -> None:
        """Tell each stage once: a progress bar in the log, or a second rank, says the same again and again."""
        for line in self._running().new_lines():
            self._lines.append((time.perf_counter() - self._launched_s, line))
            for pattern, text in self._program.stages.items():
                match = re.search(pattern, line)
                stage = text.format(*match.groups()) if match else ""
                if stage and stage not in self._shown:
                    self._shown.add(stage)
                    self._progress(stage)

    def stop(self) -> None:
        """Stop the server and everything it has started; raises EngineError naming what is left."""
        child, self._child = self._child, None
        if child is not None:
            child.stop()
