"""The few plain HTTP calls that are not load: readiness, metrics and ad-hoc completions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_llmperf.measure.client.endpoint import PATHS
from pytest_llmperf.measure.client.reasons import http_error
from pytest_llmperf.measure.engines.engine import Completion, EngineError
from pytest_llmperf.measure.engines.plain_http import MOST_BYTES, exchange

if TYPE_CHECKING:
    from pytest_llmperf.measure.client.endpoint import Endpoint

_COMPLETION_TIMEOUT_S = 120.0


_MOST_BYTES_OF_A_ROUND = 1 << 30
"""What an engine of ours may send for a round that it has played itself: the stamped bytes of all its answers."""


@dataclass(frozen=True)
class Answer:
    """An HTTP answer, whatever its status."""

    status: int
    text: str
    headers: dict[str, str]
    """Names in lower case."""

    @property
    def error(self) -> str:
        """Return what an answer that is none of use says, with the option that helps."""
        words = http_error(str(self.status), self.headers, self.text.encode())
        return words + _REMEDIES.get(self.status, "")

    def json(self) -> Any:
        """Return its value; None where it is no JSON."""
        try:
            return json.loads(self.text)
        except (ValueError, RecursionError):
            return None


_KEY = "; it wants an API key (LLMPERF_API_KEY) or other headers (--llmperf-header)"
_REMEDIES = {401: _KEY, 403: _KEY} | dict.fromkeys((301, 302, 303, 307, 308), "; name that address with --llmperf-url")


def ask(endpoint: Endpoint, path: str, body: dict[str, Any] | None = None, *, timeout_s: float = 5.0) -> Answer:
    """Return the answer to a GET, or with a body to a POST of JSON, of a path below an endpoint's root.

    Raises OSError where it is not whole after `timeout_s`, however its bytes come, or longer than `plain_http.MOST_BYTES`.
    """
    return _send(endpoint.address(path), body, endpoint.head(), timeout_s)


def get(url: str, *, timeout_s: float = 5.0, api_key: str | None = None) -> tuple[int, str]:
    """Return (status, body) of a GET; raises OSError where no whole answer comes in time."""
    answer = _send(url, None, _bearer(api_key), timeout_s)
    return answer.status, answer.text


def post(url: str, body: dict[str, Any], *, timeout_s: float = 60.0, api_key: str | None = None) -> tuple[int, str]:
    """Return (status, body) of a POST of JSON to an engine of ours; raises OSError where no whole answer comes in time."""
    answer = _send(url, body, _bearer(api_key), timeout_s, _MOST_BYTES_OF_A_ROUND)
    return answer.status, answer.text


def _bearer(api_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def _send(
    url: str, body: dict[str, Any] | None, headers: dict[str, str], timeout_s: float, most_bytes: int = MOST_BYTES
) -> Answer:
    data = None if body is None else json.dumps(body).encode()
    response = exchange(url, data, headers, timeout_s=timeout_s, most_bytes=most_bytes)
    return Answer(response.status, response.body.decode(errors="replace"), response.headers)


def served_models(url: str, *, api_key: str | None = None, timeout_s: float = 5.0) -> list[str]:
    """Return the names under `/v1/models`, or raise EngineError."""
    try:
        answer = _send(f"{url}/v1/models", None, _bearer(api_key), timeout_s)
    except OSError as error:
        raise EngineError(f"{url} cannot be reached ({error}).") from error
    if answer.status == 401:
        raise EngineError(f"{url} wants an API key (HTTP 401); set LLMPERF_API_KEY.")
    try:
        return [str(model["id"]) for model in answer.json()["data"]]
    except (KeyError, TypeError) as error:
        words = answer.text[:200] if answer.status == 200 else answer.error
        raise EngineError(f"{url}/v1/models answered HTTP {answer.status} without a list of models: {words}") from error


def complete(endpoint: Endpoint, prompt: str | list[int], max_tokens: int, *, api: str = "completions") -> Completion:
    """Return the completion of one prompt with at least one token, or raise EngineError.

    `api` is one of `plan.workload.APIS`; a chat API is sent a text.
    """
    asked: dict[str, Any] = {"prompt": prompt} if api == "completions" else {"messages": [{"role": "user", "content": prompt}]}
    body = {"model": endpoint.model, **asked, "max_tokens": max_tokens, "temperature": 0}
    path = endpoint.prefix + PATHS[api]
    try:
        answer = ask(endpoint, path, body, timeout_s=_COMPLETION_TIMEOUT_S)
    except OSError as error:
        raise EngineError(f"{endpoint.shown} gave no completion within {_COMPLETION_TIMEOUT_S:g} s ({error}).") from error
    done = completion_in(answer)
    if done is None:
        raise EngineError(f"{endpoint.shown}{path} answered {answer.error}")
    return done


def completion_in(answer: Answer) -> Completion | None:
    """Return the completion that an answer holds; None where it holds none with at least one token."""
    value = answer.json()
    if not 200 <= answer.status < 300 or not isinstance(value, dict):
        return None
    choices, usage = value.get("choices"), value.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return None
    message = choices[0].get("message")
    text = message.get("content") if isinstance(message, dict) else choices[0].get("text")
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    before, after = (count if isinstance(count, int) else None for count in counts)
    has_token = bool(after) if after is not None else bool(text)
    return Completion(str(text or ""), before, after) if has_token else None


_METRICS = ("/metrics", "/prometheus/metrics")
"""Where metrics are in Prometheus' format; trtllm-serve has JSON at the first, and these at the second."""


def metrics_text(endpoint: Endpoint) -> str | None:
    """Return the endpoint's metrics in Prometheus' format, None if it has none or doesn't answer."""
    for path in _METRICS:
        try:
            answer = ask(endpoint, path)
        except OSError:
            return None
        if answer.status == 200 and not answer.text.lstrip().startswith(("{", "[", "<")):
            return answer.text
    return None
