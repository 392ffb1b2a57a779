"""Where requests go, and whole HTTP requests, built before any clock starts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pytest_llmperf.measure.client.messages import RoundPlan
from pytest_llmperf.measure.client.prompts import WORDS
from pytest_llmperf.plan.secrets import Secret

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_llmperf.measure.client.prompts import Prompt

PATHS = {"completions": "/completions", "chat": "/chat/completions"}
"""Where each API of `plan.workload.APIS` is, below the endpoint's prefix."""


@dataclass(frozen=True)
class Endpoint:
    """Where requests go, and what must be written on them."""

    url: str = field(repr=False)
    """The server's root, without `/v1`; with a query where every request must have it."""
    model: str
    """The name under which the server serves the model."""
    api_key: str | None = field(default=None, repr=False)
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """(name, value) of what else stands in the head of every request; it wins over what is sent by default."""
    prefix: str = "/v1"
    """What stands between the root and the API's path; empty behind gateways that have no `/v1`."""
    takes_ids: bool = True
    """Prompts may be token ids; else they are words in their stead."""
    gives_ids: bool = True
    """`return_token_ids` may be asked for, which is vLLM's own field."""

    @property
    def shown(self) -> str:
        """Return the root as messages name it: without its query, in which secrets may stand."""
        return self.url.partition("?")[0]

    def address(self, path: str) -> str:
        """Return the URL of a path below the root."""
        parts = urlsplit(self.url)
        return parts._replace(path=parts.path.rstrip("/") + path).geturl()

    def head(self) -> dict[str, str]:
        """Return the headers of every request: the API key's, and those that were given."""
        usual = {"Authorization": Secret(f"Bearer {self.api_key}")} if self.api_key else {}
        given: dict[str, str] = {name: Secret(value) for name, value in self.headers}
        names = {name.lower() for name in given}
        return {name: value for name, value in usual.items() if name.lower() not in names} | given

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
        bodies = [self._body(prompt, stream=stream) for prompt in prompts]
        exact = [bool(body.get("ignore_eos")) for body in bodies]
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
            exact=() if all(exact) else tuple(exact),
            stream=stream,
            max_concurrency=max_concurrency,
            think_ns=tuple(int(prompt.think_s * 1e9) for prompt in prompts) if any(prompt.think_s for prompt in prompts) else (),
            stop_ns=None if stop_s is None else int(stop_s * 1e9),
        )

    def _request(self, prompt: Prompt, body: dict[str, Any]) -> bytes:
        parts = urlsplit(self.address(self.prefix + PATHS["chat" if prompt.messages else "completions"]))
        host = parts.hostname or ""
        port = parts.port or (443 if parts.scheme == "https" else 80)
        data = json.dumps(body, separators=(",", ":")).encode()
        usual = {
            "Host": f"{f'[{host}]' if ':' in host else host}:{port}",
            "Content-Type": "application/json",
            "Accept": "text/event-stream",
        }
        given = self.head()
        names = {name.lower() for name in given}
        lines = {name: value for name, value in usual.items() if name.lower() not in names} | given
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        return f"POST {target} HTTP/1.1\r\n{head}Content-Length: {len(data)}\r\n\r\n".encode() + data

    def _body(self, prompt: Prompt, *, stream: bool) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": prompt.model or self.model,
            **self._asked(prompt),
            "max_tokens": prompt.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        body |= {"return_token_ids": True} if self.gives_ids else {}
        body |= json.loads(prompt.body)
        if body["max_tokens"] is None and prompt.messages:
            body["max_completion_tokens"] = prompt.output_tokens  # newer chat APIs refuse the older name
        return {name: value for name, value in body.items() if value is not None}

    def _asked(self, prompt: Prompt) -> dict[str, Any]:
        if prompt.messages:
            return {"messages": [{"role": role, "content": text} for role, text in prompt.messages]}
        if prompt.token_ids and not self.takes_ids:
            return {"prompt": words_for(prompt.token_ids)}
        return {"prompt": prompt.token_ids or prompt.text}


def words_for(token_ids: Sequence[int]) -> str:
    """Return as many common words as there are token ids, the same for the same ids: prompts share what their ids share."""
    return " ".join(WORDS[token_id % len(WORDS)] for token_id in token_ids)
