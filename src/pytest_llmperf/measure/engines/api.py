"""The few plain HTTP calls that are not load: readiness, metrics and ad-hoc completions."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

from pytest_llmperf.measure.engines.engine import Completion, EngineError

if TYPE_CHECKING:
    from pytest_llmperf.measure.client.endpoint import Endpoint

_COMPLETION_TIMEOUT_S = 120.0
_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # engines are reached directly


def get(url: str, *, timeout_s: float = 5.0, api_key: str | None = None) -> tuple[int, str]:
    """Return (status, body) of a GET; raises OSError where no answer comes."""
    return _send(urllib.request.Request(url, headers=_headers(api_key)), timeout_s)


def post(url: str, body: dict[str, Any], *, timeout_s: float = 60.0, api_key: str | None = None) -> tuple[int, str]:
    """Return (status, body) of a POST of JSON; raises OSError where no answer comes."""
    headers = {"Content-Type": "application/json", **_headers(api_key)}
    return _send(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout_s)


def _headers(api_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def _send(request: urllib.request.Request, timeout_s: float) -> tuple[int, str]:
    try:
        with _NO_PROXY.open(request, timeout=timeout_s) as response:
            return response.status, response.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(errors="replace")
    except http.client.HTTPException as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def served_models(url: str, *, api_key: str | None = None, timeout_s: float = 5.0) -> list[str]:
    """Return the names under `/v1/models`, or raise EngineError."""
    try:
        status, body = get(f"{url}/v1/models", api_key=api_key, timeout_s=timeout_s)
    except OSError as error:
        raise EngineError(f"{url} cannot be reached ({error}).") from error
    if status == 401:
        raise EngineError(f"{url} wants an API key (HTTP 401); set LLMPERF_API_KEY.")
    try:
        return [str(model["id"]) for model in json.loads(body)["data"]]
    except (ValueError, KeyError, TypeError) as error:
        raise EngineError(f"{url}/v1/models answered HTTP {status} without a list of models: {body[:200]}") from error


def complete(endpoint: Endpoint, prompt: str | list[int], max_tokens: int) -> Completion:
    """Return the completion of one prompt with at least one token, or raise EngineError."""
    body = {"model": endpoint.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    url = f"{endpoint.url}/v1/completions"
    try:
        status, answer = post(url, body, timeout_s=_COMPLETION_TIMEOUT_S, api_key=endpoint.api_key)
    except OSError as error:
        raise EngineError(f"{endpoint.url} gave no completion within {_COMPLETION_TIMEOUT_S:g} s ({error}).") from error
    try:
        data = json.loads(answer)
        usage = data["usage"]
        done = Completion(data["choices"][0]["text"], int(usage["prompt_tokens"]), int(usage["completion_tokens"]))
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise EngineError(f"{url} answered HTTP {status}: {answer[:300]}") from error
    if done.output_tokens < 1:
        raise EngineError(f"{url} answered HTTP {status}, but with no token.")
    return done


def metrics_text(endpoint: Endpoint) -> str | None:
    """Return the endpoint's `/metrics`, None if it has none or doesn't answer."""
    try:
        status, body = get(f"{endpoint.url}/metrics", api_key=endpoint.api_key)
    except OSError:
        return None
    return body if status == 200 else None
