"""What goes over the wire between a client and the simulated engine: HTTP/1.1, OpenAI bodies, metrics text.

Pure functions from values to bytes and back. Field names, their order, and the framing (one HTTP chunk per SSE event)
are those that vLLM 0.32 was seen to send: a client may take a short cut that only real bytes show to be wrong.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_llmperf.testing.scheduler import Scheduler

VOCABULARY = 32_000
"""Generated token ids are below this."""

EVENT_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)

_TYPES = {400: "BadRequestError", 404: "NotFoundError", 500: "InternalServerError"}


class RefusedError(Exception):
    """A request is answered with this HTTP status and vLLM's error body instead of tokens."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None) -> None:
        """Name the reason, and the field of the body that it is about."""
        super().__init__(message)
        error = {"message": message, "type": _TYPES[status], "param": param, "code": status}
        self.response = json_response({"error": error}, status)


@dataclass(frozen=True)
class HttpRequest:
    """One parsed HTTP request."""

    method: str
    path: str
    """Without the query."""
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes

    @property
    def keep_alive(self) -> bool:
        """Return whether the connection stays open after the response."""
        return self.headers.get("connection", "").lower() != "close"


@dataclass(frozen=True)
class GenerationBody:
    """What a completion or chat request asks for, after vLLM's defaults and limits."""

    chat: bool
    prompt: tuple[int | str, ...]
    """Token ids, or for text one word per token: the simulated tokenizer."""
    output_tokens: int
    stream: bool
    include_usage: bool
    continuous_usage: bool
    return_token_ids: bool


def take_request(buffer: bytearray) -> HttpRequest | None:
    """Return the first request in the buffer and remove it, or None while it is incomplete.

    Raises RefusedError when it cannot be parsed; the connection is then of no more use.
    """
    end = buffer.find(b"\r\n\r\n")
    if end < 0:
        return None
    lines = bytes(buffer[:end]).decode("latin-1").split("\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    try:
        method, target, _ = lines[0].split(" ")
        size = int(headers.get("content-length", "0"))
    except ValueError:
        raise RefusedError("Invalid HTTP request received.") from None
    if "transfer-encoding" in headers:
        raise RefusedError("The simulated engine reads no chunked request bodies.")
    if len(buffer) < end + 4 + size:
        return None
    body = bytes(buffer[end + 4 : end + 4 + size])
    del buffer[: end + 4 + size]
    return HttpRequest(method, target.partition("?")[0], headers, body)


def response(body: bytes, status: int = 200, content_type: str = "application/json") -> bytes:
    """Return a whole HTTP response."""
    head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nserver: uvicorn\r\ncontent-length: {len(body)}\r\n"
    return f"{head}content-type: {content_type}\r\n\r\n".encode() + body


def json_response(value: object, status: int = 200) -> bytes:
    """Return a whole HTTP response with a JSON body."""
    return response(_compact(value), status)


def parse_generation(body: bytes, *, chat: bool, models: tuple[str, ...], max_model_len: int) -> GenerationBody:
    """Return what the body asks for; raises RefusedError where vLLM answers 4xx."""
    try:
        fields = json.loads(body)
    except ValueError as error:
        raise RefusedError(f"[{{'type': 'json_invalid', 'msg': 'JSON decode error: {error}'}}]") from None
    if not isinstance(fields, dict):
        raise RefusedError("[{'type': 'model_attributes_type', 'msg': 'Input should be a valid dictionary'}]")
    if fields.get("model") not in (None, *models):
        message = f"The model `{fields['model']}` does not exist. Valid aliases: {', '.join(models)}"
        raise RefusedError(message, status=404, param="model")
    if (fields.get("n") or 1) != 1:
        raise RefusedError("The simulated engine serves one choice per request.", param="n")
    prompt = _chat_prompt(fields) if chat else _completion_prompt(fields)
    if len(prompt) >= max_model_len:
        raise RefusedError(
            f"This model's maximum context length is {max_model_len} tokens. However, your prompt contains at least "
            f"{len(prompt)} input tokens, which exceeds this limit even without any output tokens. Please reduce the "
            f"length of the input prompt. (parameter=input_tokens, value={len(prompt)})",
            param="input_tokens",
        )
    options = fields.get("stream_options")
    options = options if isinstance(options, dict) else {}
    stream = bool(fields.get("stream"))
    return GenerationBody(
        chat=chat,
        prompt=prompt,
        # vLLM 0.32 cuts a max_tokens that is too large silently.
        output_tokens=min(_max_tokens(fields, chat), max_model_len - len(prompt)),
        stream=stream,
        include_usage=stream and bool(options.get("include_usage")),
        continuous_usage=stream and bool(options.get("continuous_usage_stats")),
        return_token_ids=bool(fields.get("return_token_ids")),
    )


class Reply:
    """The bytes of one answer. Its tokens depend on the prompt alone, as with greedy decoding."""

    def __init__(self, body: GenerationBody, number: int, model: str) -> None:
        """Prepare what is the same in all chunks; `number` makes the id."""
        self._body = body
        self._base = sum(token if isinstance(token, int) else len(token) for token in body.prompt)
        self._id = f"{'chatcmpl' if body.chat else 'cmpl'}-{number:016x}"
        self._created = int(time.time())
        self._model = model
        kind = "chat.completion.chunk" if body.chat else "text_completion"
        common = _compact({"id": self._id, "object": kind, "created": self._created, "model": model})[:-1]
        self._event = b"data: " + common
        self._opening = b'"delta":{"content":"' if body.chat else b'"text":"'
        self._closing = b'"},"logprobs":null' if body.chat else b'","logprobs":null'

    def token_id(self, index: int) -> int:
        """Return the id of a generated token."""
        return (self._base + 7919 * index) % VOCABULARY

    def token(self, index: int) -> bytes:
        """Return the HTTP chunks of one token; the first and the last bring what surrounds the stream."""
        body = self._body
        last = index == body.output_tokens - 1
        token_id = self.token_id(index)
        ids = b"[%d]" % token_id if body.return_token_ids else b"null"
        finish = b'"length"' if last else b"null"
        stop = b"" if body.chat and not last else b',"stop_reason":null'
        prompt = b"" if body.chat else b',"prompt_token_ids":' + self._prompt_ids(index)
        parts = (b',"choices":[{"index":0,', self._opening, b" w%d" % token_id, self._closing, b',"finish_reason":',
                 finish, stop, prompt, b',"token_ids":', ids, b"}]", self._usage(index + 1))  # fmt: skip
        chunks = _chunk(b"".join((self._event, *parts, b"}\n\n")))
        if body.chat and index == 0:
            chunks = self._role() + chunks
        return chunks + self._end() if last else chunks

    def response(self) -> bytes:
        """Return the HTTP response of a request that does not stream."""
        body = self._body
        ids = [self.token_id(index) for index in range(body.output_tokens)]
        text = "".join(f" w{token_id}" for token_id in ids)
        content: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if body.chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": "length", "stop_reason": None,
                  "token_ids": ids if body.return_token_ids else None}  # fmt: skip
        kind = "chat.completion" if body.chat else "text_completion"
        head = {"id": self._id, "object": kind, "created": self._created, "model": self._model}
        return json_response({**head, "choices": [choice], "usage": self._counts(body.output_tokens)})

    def _prompt_ids(self, index: int) -> bytes:
        if index or not self._body.return_token_ids:
            return b"null"
        return _compact([token if isinstance(token, int) else len(token) for token in self._body.prompt])

    def _role(self) -> bytes:
        choice = b'{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
        tail = b',"prompt_token_ids":' + self._prompt_ids(0) + self._usage(0) + b"}\n\n"
        return _chunk(self._event + b',"choices":[' + choice + b"]" + tail)

    def _end(self) -> bytes:
        done = _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
        if not self._body.include_usage:
            return done
        usage = _compact(self._counts(self._body.output_tokens))
        return _chunk(self._event + b',"choices":[],"usage":' + usage + b"}\n\n") + done

    def _usage(self, tokens: int) -> bytes:
        return b',"usage":' + _compact(self._counts(tokens)) if self._body.continuous_usage else b""

    def _counts(self, tokens: int) -> dict[str, int]:
        prompt = len(self._body.prompt)
        return {"prompt_tokens": prompt, "total_tokens": prompt + tokens, "completion_tokens": tokens}


def model_list(models: tuple[str, ...], max_model_len: int) -> dict[str, Any]:
    """Return the body of /v1/models."""
    card = {"object": "model", "created": int(time.time()), "owned_by": "vllm", "root": models[0], "parent": None}
    return {"object": "list", "data": [{"id": name, **card, "max_model_len": max_model_len} for name in models]}


def metrics_text(scheduler: Scheduler, model: str) -> str:
    """Return the scheduler's counters as Prometheus text, with vLLM's names and labels."""
    clock, counters = scheduler.clock, scheduler.counters
    label = model.replace("\\", "\\\\").replace('"', '\\"')
    labels = f'engine="0",model_name="{label}"'
    finished = {"stop": 0, "length": counters.requests_finished, "abort": counters.requests_aborted, "error": 0}
    rows: list[tuple[str, str, dict[str, float]]] = [
        ("num_requests_running", "gauge", {labels: scheduler.running}),
        ("num_requests_waiting", "gauge", {labels: scheduler.waiting}),
        ("kv_cache_usage_perc", "gauge", {labels: scheduler.kv_usage}),
        ("prefix_cache_queries", "counter", {labels: counters.prefix_queries}),
        ("prefix_cache_hits", "counter", {labels: counters.prefix_hits}),
        ("num_preemptions", "counter", {labels: counters.preemptions}),
        ("prompt_tokens", "counter", {labels: counters.prompt_tokens}),
        ("generation_tokens", "counter", {labels: counters.generation_tokens}),
        ("request_success", "counter",
         {f'engine="0",finished_reason="{why}",model_name="{label}"': count for why, count in finished.items()}),
        ("cache_config_info", "gauge",
         {f'block_size="{clock.block_size}",enable_prefix_caching="{clock.prefix_cache}",engine="0",'
          f'kv_cache_size_tokens="{clock.kv_tokens}",num_gpu_blocks="{clock.num_gpu_blocks}"': 1}),
    ]  # fmt: skip
    lines = []
    for name, kind, values in rows:
        suffix = "_total" if kind == "counter" else ""
        lines += [f"# HELP vllm:{name}{suffix} Simulated.", f"# TYPE vllm:{name}{suffix} {kind}"]
        lines += [f"vllm:{name}{suffix}{{{label_set}}} {float(value)}" for label_set, value in values.items()]
    return "\n".join(lines) + "\n"


def _completion_prompt(fields: dict[str, Any]) -> tuple[int | str, ...]:
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], list | str):
        if len(prompt) > 1:
            raise RefusedError("The simulated engine serves one prompt per request.", param="prompt")
        prompt = prompt[0]
    if isinstance(prompt, str) and prompt.strip():
        return tuple(prompt.split())
    if isinstance(prompt, list) and prompt and all(isinstance(token, int) for token in prompt):
        return tuple(prompt)
    raise RefusedError("Either prompt or prompt_embeds must be provided and non-empty.", param="prompt")


def _chat_prompt(fields: dict[str, Any]) -> tuple[int | str, ...]:
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise RefusedError("[{'type': 'missing', 'loc': ('body', 'messages'), 'msg': 'Field required'}]", param="messages")
    words: list[str] = []
    for message in messages:
        content = message.get("content") or ""
        parts = [{"text": content}] if isinstance(content, str) else content
        texts = [str(part.get("text", "")) for part in parts if isinstance(part, dict)]
        words += [str(message.get("role", "user")), *" ".join(texts).split()]
    return tuple(words)


def _max_tokens(fields: dict[str, Any], chat: bool) -> int:
    value = fields.get("max_completion_tokens")
    if value is None:
        value = fields.get("max_tokens")
    if value is None:
        return 1 << 30 if chat else 16  # a chat's default is all that the context leaves, a completion's is OpenAI's
    if not isinstance(value, int) or value < 1:
        raise RefusedError(f"max_tokens must be at least 1, got {value}.", param="max_tokens")
    return value


def _compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def _chunk(event: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(event), event)
