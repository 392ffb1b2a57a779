"""The simulated engine as an OpenAI-compatible HTTP server, with the failures that a test may inject.

Failures are counted, not drawn: each Nth request of the engine's life fails, so a test can demand the exact number.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self

from pytest_llmperf.testing import wire
from pytest_llmperf.testing.clock import Clock
from pytest_llmperf.testing.connection import Connection
from pytest_llmperf.testing.realtime import Steps, event_loop
from pytest_llmperf.testing.scheduler import Counters, Request
from pytest_llmperf.testing.virtual import VIRTUAL_START_NS, Generation, VirtualPlan, VirtualRound, to_data

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType


@dataclass(frozen=True)
class Options:
    """What a simulated engine is and how it misbehaves. Generation requests are counted from 1; None is never."""

    clock: Clock = field(default_factory=Clock)
    host: str = "127.0.0.1"
    port: int = 0
    """0 takes a free one."""
    model: str = "simulated"
    """The name it serves; another one in a request is a 404."""
    aliases: tuple[str, ...] = ()
    """Further names that it serves the same model under."""
    max_model_len: int = 4096
    """Prompt and output tokens of one request."""
    api_key: str | None = None
    """What each request of an API must bring, as vLLM's `--api-key`; /health and /metrics are open."""
    further_api_keys: tuple[str, ...] = ()
    """What requests may bring in its place."""
    version: str = "0.32.0+simulated"
    startup_s: float = 0.0
    """Seconds for which the port is taken but refuses connections."""
    round_gap_s: float = 0.05
    """A pause of at least this many seconds ends a round; a shorter one is a client between two requests."""
    fail_every: int | None = None
    """HTTP 500 for each Nth request."""
    cut_every: int | None = None
    """The connection of each Nth request is closed after half of its tokens."""
    crash_after: int | None = None
    """The engine is gone as soon as the request after the Nth arrives."""
    hang_after: int | None = None
    """From the request after the Nth on, no token leaves any more; /health stays 200."""
    dev_endpoints: bool = True
    """Whether /reset_prefix_cache exists; in vLLM only with VLLM_SERVER_DEV_MODE=1."""


class Server:
    """The endpoints and the injected failures, over one `Steps`. Use it in a running event loop."""

    def __init__(self, options: Options, crash: Callable[[], None]) -> None:
        """Listen nowhere yet; `crash` is called for `crash_after`."""
        self.options = options
        self.connections: set[Connection] = set()
        self.steps = Steps(options.clock, round_gap_s=options.round_gap_s)
        self.port = options.port
        self.plays = False
        """A round is computed in virtual time, during which the loop does nothing else."""
        self._crash = crash
        self._generations = 0
        self._virtual_ns = VIRTUAL_START_NS
        self._listener: asyncio.Server | None = None

    def bind(self) -> socket.socket:
        """Return the bound socket, not yet listening; raises OSError when the port is taken."""
        family = socket.AF_INET6 if ":" in self.options.host else socket.AF_INET
        # asyncio switches Nagle off only where it sees TCP named: without it tokens wait for the client's delayed ACK (40 ms).
        bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((self.options.host, self.options.port))
        except OSError:
            bound.close()
            raise
        self.port = bound.getsockname()[1]
        return bound

    async def listen(self, bound: socket.socket) -> None:
        """Accept connections; raises OSError when another process listens there since."""
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(lambda: Connection(self.answer, self.connections), sock=bound, backlog=2048)

    def close(self) -> None:
        """Stop listening and drop every connection, as vLLM's `shutdown mode=abort` does."""
        self.steps.stop()
        if self._listener is not None:
            self._listener.close()
        for connection in tuple(self.connections):
            connection.close(abort=True)

    def answer(self, connection: Connection, request: wire.HttpRequest) -> None:
        """Answer a request: now, or for a generation token by token."""
        options, route = self.options, (request.method, request.path)
        if options.api_key and request.path.startswith(("/v1", "/play", "/idle")):
            scheme, _, key = request.headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or key not in (options.api_key, *options.further_api_keys):
                return connection.finish(wire.json_response({"error": "Unauthorized"}, 401))
        if route in (("POST", "/v1/completions"), ("POST", "/v1/chat/completions")):
            try:
                return self._generate(connection, request)
            except wire.RefusedError as refused:
                return connection.finish(refused.response)
        if route == ("POST", "/play"):
            return connection.finish(self._play(request.body))
        connection.finish(self._idle(request.body) if route == ("POST", "/idle") else self._plain(route))
        return None

    def _plain(self, route: tuple[str, str]) -> bytes:
        if route == ("GET", "/health"):
            return wire.response(b"")
        if route == ("GET", "/metrics"):
            text = wire.metrics_text(self.steps.scheduler, self.options.model)
            return wire.response(text.encode(), content_type="text/plain; version=0.0.4; charset=utf-8")
        if route == ("GET", "/version"):
            return wire.json_response({"version": self.options.version})
        if route == ("GET", "/v1/models"):
            return wire.json_response(wire.model_list((self.options.model, *self.options.aliases), self.options.max_model_len))
        if route == ("POST", "/reset_prefix_cache") and self.options.dev_endpoints:
            if not self.steps.busy:  # as vLLM, which cannot drop blocks that are in use
                self.steps.scheduler.reset_prefix_cache()
            return wire.response(b"")
        return wire.json_response({"detail": "Not Found"}, 404)

    def _generate(self, connection: Connection, request: wire.HttpRequest) -> None:
        generation = self._accept(request)
        if generation is None:
            return

        def emit() -> None:
            if generation.sent == generation.cut_at:
                return connection.close()
            generation.sent += 1
            last = generation.sent == generation.request.output_tokens
            if generation.stream:
                (connection.finish if last else connection.write)(generation.reply.token(generation.sent - 1))
            elif last:
                connection.finish(generation.reply.response())
            return None

        self.steps.submit(generation.request, emit)
        connection.began(lambda: self.steps.abort(generation.request.request_id))
        if generation.stream:
            connection.write(wire.EVENT_STREAM_HEAD)  # before the first token, as vLLM: it is no sign of progress

    def _accept(self, request: wire.HttpRequest) -> Generation | None:
        """Return the accepted request, None for an engine that has crashed; raises RefusedError with the answer otherwise."""
        options = self.options
        chat = request.path == "/v1/chat/completions"
        models = (options.model, *options.aliases)
        body = wire.parse_generation(request.body, chat=chat, models=models, max_model_len=options.max_model_len)
        self._generations = number = self._generations + 1
        if options.crash_after is not None and number > options.crash_after:
            self._crash()
            return None
        if options.fail_every and number % options.fail_every == 0:
            raise wire.RefusedError("EngineCore encountered an issue. See stack trace for the root cause.", status=500)
        if options.hang_after is not None and number > options.hang_after:
            self.steps.hang()
        cut_at = body.output_tokens // 2 if options.cut_every and number % options.cut_every == 0 else None
        accepted = Request(number, body.prompt, body.output_tokens)
        try:
            self.steps.scheduler.check(accepted)
        except ValueError as error:
            raise wire.RefusedError(str(error), param="max_tokens") from None
        return Generation(accepted, wire.Reply(body, number, options.model), body.stream, cut_at)

    def _idle(self, body: bytes) -> bytes:
        """Let virtual time pass with nothing to do; return the response to the JSON that says for how many seconds."""
        try:
            seconds = float(json.loads(body)["seconds"])
        except (ValueError, KeyError, TypeError) as error:
            return wire.json_response({"error": {"message": f"no seconds: {type(error).__name__}: {error}"}}, 400)
        self._virtual_ns += round(seconds * 1e9)
        self.steps.scheduler.idled(seconds)
        return wire.response(b"")

    def _play(self, body: bytes) -> bytes:
        """Return the response to the JSON of a `virtual.VirtualPlan`: its round, played in virtual time."""
        if self.steps.busy:
            return wire.json_response({"error": {"message": "a request is under way in real time"}}, 409)
        try:
            plan = VirtualPlan.from_data(json.loads(body))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return wire.json_response({"error": {"message": f"not a round: {type(error).__name__}: {error}"}}, 400)
        played = VirtualRound(self.steps, self._accept, plan)
        start_ns = self._virtual_ns
        self.plays = True
        try:
            self._virtual_ns = played.play(start_ns)
            return wire.json_response(to_data(played, start_ns))
        finally:
            self.plays = False


async def serve(
    options: Options,
    stop: asyncio.Event,
    *,
    crash: Callable[[], None] | None = None,
    started: Callable[[Server], None] | None = None,
) -> None:
    """Serve until `stop` is set; calls `started` when connections are accepted.

    `crash` is what `crash_after` does: by default the server drops everything and returns. Raises OSError when the port
    is taken.
    """
    server = Server(options, crash or stop.set)
    bound = server.bind()
    try:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), options.startup_s)
        if not stop.is_set():
            await server.listen(bound)
            if started is not None:
                started(server)
            await stop.wait()
    finally:
        server.close()
        bound.close()
        await asyncio.sleep(0)  # the aborted connections close their sockets in the next turn of the loop


class SimulatedEngine:
    """A simulated engine in a background thread: `with SimulatedEngine(Options()) as engine: engine.url`.

    `crash_after` closes it as a crash would, without ending this process.
    """

    def __init__(self, options: Options | None = None) -> None:
        """Take the options; nothing runs before `with`."""
        self.options = options or Options()
        self._ready = threading.Event()
        self._error: OSError | None = None
        self._server: Server | None = None
        self._stop: Callable[[], object]
        self._thread = threading.Thread(target=self._run, name="simulated-engine", daemon=True)

    @property
    def url(self) -> str:
        """Return the base URL, without /v1."""
        host = f"[{self.options.host}]" if ":" in self.options.host else self.options.host
        return f"http://{host}:{self.port}"

    @property
    def port(self) -> int:
        """Return the port it listens on; the options' one before it has started."""
        return self._server.port if self._server else self.options.port

    @property
    def counters(self) -> Counters:
        """Return a copy of the counters as they are now."""
        return replace(self._server.steps.scheduler.counters) if self._server else Counters()

    def __enter__(self) -> Self:
        """Return when connections are accepted; raises OSError when the port is taken."""
        self._thread.start()
        self._ready.wait()
        if self._server is None:
            self._thread.join()
            raise self._error or RuntimeError("The simulated engine did not start; its thread said why.")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Drop every connection and return when the thread has ended."""
        with contextlib.suppress(RuntimeError):  # the loop is closed after a crash
            self._stop()
        self._thread.join()

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=event_loop) as runner:
                runner.run(self._main())
        except OSError as error:
            self._error = error
        finally:
            self._ready.set()

    async def _main(self) -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        self._stop = lambda: loop.call_soon_threadsafe(stop.set)

        def started(server: Server) -> None:
            self._server = server
            self._ready.set()

        await serve(self.options, stop, started=started)
