"""Servers of the field, as far as a client sees them: each answers in the ways of one engine, on a thread of the test.

Their ways are taken from the engines' own sources and documents: vLLM, SGLang, TGI, llama.cpp's llama-server, TensorRT-LLM's
trtllm-serve, Ray Serve LLM, and gateways in front of them.
"""

from __future__ import annotations

import contextlib
import json
import threading
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

_OPENAI = frozenset({"model", "prompt", "messages", "max_tokens", "temperature", "stream", "stream_options"})


@dataclass(frozen=True)
class Habits:
    """What is particular about a server; the default is that of a plain OpenAI-compatible one."""

    models: Any = field(default_factory=lambda: {"object": "list", "data": [{"id": "m", "object": "model"}]})
    """The body of its list of models, None for a server without one."""
    prefix: str = "/v1"
    apis: tuple[str, ...] = ("completions", "chat/completions")
    takes_ids: bool = True
    reads_ids_as_text: bool = False
    """Token ids are no error, but taken for a text that looks like them."""
    fields: frozenset[str] | None = None
    """The fields of a body that it knows where it refuses all others; None: it ignores them."""
    pages: dict[str, Any] = field(default_factory=dict)
    """Further paths with their bodies, text or JSON."""
    headers: dict[str, str] = field(default_factory=dict)
    """What must stand in the head of every request, names in lower case."""
    says: str = "a header is missing"
    """Its words for who does not bring them."""
    redirects_to: str = ""
    """The address that every request is sent to instead."""
    query: str = ""
    """What must stand behind the `?` of every request."""
    events: tuple[bytes, ...] | None = None
    """The body of a streamed answer in place of a sound one."""
    finish_reason: str | None = "length"
    done: bool = True
    """`[DONE]` ends a stream."""
    usage_with_choice: bool = False
    """Usage stands in the event with the last token, not in one of its own."""


VLLM = Habits(
    models={"data": [
        {"id": "m", "owned_by": "vllm", "root": "org/m", "parent": None},
        {"id": "m-alias", "owned_by": "vllm", "root": "org/m", "parent": None},
        {"id": "adapter", "owned_by": "vllm", "root": "adapters/a", "parent": "m"},
    ]},
    pages={"/health": "", "/version": {"version": "0.32.0"}},
)  # fmt: skip
SGLANG = Habits(
    models={"data": [{"id": "m", "owned_by": "sglang", "root": "m"}]},
    pages={"/health": "", "/get_server_info": {"version": "0.5.2"}},
)
TGI = Habits(
    models={"data": [{"id": "m", "owned_by": "m"}]},
    takes_ids=False,
    done=False,
    usage_with_choice=True,
    pages={"/health": "", "/info": {"version": "3.3.0", "model_id": "m"}, "/metrics": "# HELP tgi_x x\ntgi_request_count 3\n"},
)
LLAMA_CPP = Habits(
    models={"models": [{"name": "m"}], "data": [{"id": "m", "owned_by": "llamacpp"}]},
    pages={"/health": {"status": "ok"}, "/props": {"build_info": "b6100-3db4da5", "model_path": "m.gguf"}},
)
TENSORRT_LLM = Habits(
    models={"data": [{"id": "m", "owned_by": "tensorrt_llm"}]},
    fields=_OPENAI | {"ignore_eos"},
    pages={"/health": "", "/version": {"version": "1.1.0"}},
)
RAY = Habits(models={"data": [{"id": "m", "owned_by": "organization-owner"}]})
GATEWAY = Habits(models=None, prefix="", apis=("chat/completions",), headers={"x-team": "blue"}, query="api-version=3")
SERVERS = {
    "vllm": VLLM, "sglang": SGLANG, "tgi": TGI, "llama.cpp": LLAMA_CPP, "tensorrt-llm": TENSORRT_LLM, "ray": RAY,
}  # fmt: skip


@dataclass
class OddServer:
    """A running server, and the requests that it has had."""

    url: str
    bodies: list[dict[str, Any]] = field(default_factory=list)
    heads: list[dict[str, str]] = field(default_factory=list)


@contextlib.contextmanager
def odd_server(habits: Habits, **other: Any) -> Iterator[OddServer]:
    """Serve with these habits, some of them other ones, until the block ends."""
    habits = replace(habits, **other)
    seen = OddServer("")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(habits, seen))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    seen.url = f"http://127.0.0.1:{server.server_port}" + (f"?{habits.query}" if habits.query else "")
    try:
        yield seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(habits: Habits, seen: OddServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if self.refused():
                return
            body = habits.models if path == f"{habits.prefix}/models" else habits.pages.get(path)
            self.give(404 if body is None else 200, {"detail": "Not Found"} if body is None else body)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            path = self.path.partition("?")[0]
            seen.bodies.append(body)
            seen.heads.append({name.lower(): value for name, value in self.headers.items()})
            if self.refused():
                return
            if path.removeprefix(f"{habits.prefix}/") not in habits.apis or not path.startswith(f"{habits.prefix}/"):
                self.give(404, {"detail": "Not Found"})
            elif habits.fields is not None and (extra := sorted(set(body) - habits.fields)):
                errors = [{"loc": ["body", name], "msg": "Extra inputs are not permitted"} for name in extra]
                self.give(400, {"object": "error", "message": str(errors), "code": 400})
            elif not habits.takes_ids and isinstance(body.get("prompt"), list):
                self.give(422, "Failed to deserialize the JSON body: prompt: invalid type: sequence, expected a string")
            else:
                self.complete(body, chat="chat" in path)

        def refused(self) -> bool:
            given = {name.lower(): value for name, value in self.headers.items()}
            if habits.redirects_to:
                self.give(307, "", Location=habits.redirects_to + self.path)
            elif any(given.get(name) != value for name, value in habits.headers.items()):
                self.give(403, {"error": habits.says})
            elif habits.query and self.path.partition("?")[2] != habits.query:
                self.give(404, {"error": {"message": "no such version"}})
            else:
                return False
            return True

        def complete(self, body: dict[str, Any], *, chat: bool) -> None:
            prompt, count = body.get("prompt"), body.get("max_tokens") or body.get("max_completion_tokens") or 16
            text = " ".join(message["content"] for message in body.get("messages", ()))
            if habits.reads_ids_as_text and isinstance(prompt, list):
                prompt = " ".join(json.dumps(prompt))
            before = len(prompt) if isinstance(prompt, list) else len((prompt or text).split())
            usage = {"prompt_tokens": before, "completion_tokens": count, "total_tokens": before + count}
            if not body.get("stream"):
                text = "w " * count
                said = {"message": {"content": text}} if chat else {"text": text}
                self.give(200, {"choices": [{**said, "finish_reason": habits.finish_reason}], "usage": usage})
                return
            events = habits.events
            if events is None:
                events = tuple(_sound(habits, count, usage, chat=chat))
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for event in events:
                self.wfile.write(b"%x\r\n%b\r\n" % (len(event), event))
            self.wfile.write(b"0\r\n\r\n")

        def give(self, status: int, body: object, **headers: str) -> None:
            data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Log no request."""

    return Handler


def _sound(habits: Habits, count: int, usage: dict[str, int], *, chat: bool) -> Iterator[bytes]:
    """Yield the events of an answer that is as it should be."""
    for number in range(1, count + 1):
        said = {"delta": {"content": "w "}} if chat else {"text": "w "}
        last = number == count
        event: dict[str, Any] = {"choices": [{"index": 0, **said, "finish_reason": habits.finish_reason if last else None}]}
        if last and habits.usage_with_choice:
            event["usage"] = usage
        yield b"data: " + json.dumps(event).encode() + b"\n\n"
    if not habits.usage_with_choice:
        yield b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n"
    if habits.done:
        yield b"data: [DONE]\n\n"
