"""Whole HTTP requests, built before any clock starts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pytest_llmperf.measure.client.messages import RoundPlan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_llmperf.measure.client.prompts import Prompt


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
        max_concurrency: int | None = None,
        stop_s: float | None = None,
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
            max_concurrency=max_concurrency,
            think_ns=tuple(int(prompt.think_s * 1e9) for prompt in prompts) if any(prompt.think_s for prompt in prompts) else (),
            stop_ns=None if stop_s is None else int(stop_s * 1e9),
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
