"""What an endpoint is that somebody else runs: its model, its software, and which requests it takes.

Nothing is demanded that is not needed: an endpoint that lists no models is measured under the name that was given, one that has
only a chat API through that, one that forbids a field without it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pytest_llmperf.measure.client.endpoint import PATHS, words_for
from pytest_llmperf.measure.engines import api
from pytest_llmperf.measure.engines.engine import EngineError
from pytest_llmperf.measure.telemetry import software_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pytest_llmperf.measure.client.endpoint import Endpoint
    from pytest_llmperf.measure.client.prompts import Prompt

_PROBE_TIMEOUT_S = 120.0
_PROBE_IDS = [5, 6, 7, 8, 9, 10, 11, 12]
"""Ids of every vocabulary. A server that counts other than these, or these and a beginning, has taken them for something else."""
_OWNERS = {
    "vllm": "vllm", "sglang": "sglang", "llamacpp": "llama.cpp", "llama.cpp": "llama.cpp", "tensorrt_llm": "tensorrt-llm",
    "lmdeploy": "lmdeploy", "library": "ollama",
}  # fmt: skip
"""Software by what it writes as `owned_by` into its list of models."""
_VERSIONS: dict[str, tuple[str, str]] = {
    "vllm": ("/version", "version"),
    "sglang": ("/get_server_info", "version"),
    "llama.cpp": ("/props", "build_info"),
    "tensorrt-llm": ("/version", "version"),
    "tgi": ("/info", "version"),
    "ollama": ("/api/version", "version"),
}
"""Where each software tells its version, and in which field."""


@dataclass(frozen=True)
class Listing:
    """What an endpoint says of its models."""

    names: tuple[str, ...] = ()
    """Models that can be asked for, without LoRA adapters of others."""
    distinct: tuple[str, ...] = ()
    """One name of each model: several names may be aliases."""
    owner: str = ""
    why: str = ""
    """Why there is no list; empty where there is one."""


def listing(endpoint: Endpoint) -> Listing:
    """Return what an endpoint lists as its models; raises EngineError where it cannot be reached, refuses us, or redirects."""
    why = ""
    for path in ("/v1/models", "/models"):  # behind some gateways there is no /v1
        try:
            answer = api.ask(endpoint, path)
        except OSError as error:
            raise EngineError(f"{endpoint.shown} cannot be reached ({error}).") from error
        if answer.status == 401:
            raise EngineError(f"{endpoint.shown} wants an API key (HTTP 401); set LLMPERF_API_KEY, or --llmperf-header.")
        if answer.status == 403 or 300 <= answer.status < 400:
            raise EngineError(f"{endpoint.shown}{path} answered {answer.error}")
        entries = _entries(answer.json()) if answer.status == 200 else None
        if entries is not None:
            return _listing(entries)
        why = why or f"{endpoint.shown}{path} answered {answer.error}"
    return Listing(why=why)


def _listing(entries: list[dict[str, Any]]) -> Listing:
    own = [entry for entry in entries if not entry.get("parent")]  # vLLM lists LoRA adapters with their model as parent
    roots: dict[str, str] = {}
    for entry in own:
        roots.setdefault(str(entry.get("root") or entry["id"]), entry["id"])
    owner = next((str(entry["owned_by"]) for entry in own if entry.get("owned_by")), "")
    return Listing(tuple(entry["id"] for entry in entries), tuple(roots.values()), owner)


def _entries(value: Any) -> list[dict[str, Any]] | None:
    """Return the entries of a list of models, each with its name as `id`; None for what is no such list."""
    if isinstance(value, dict):
        value = next((value[name] for name in ("data", "models") if isinstance(value.get(name), list)), None)
    if not isinstance(value, list):
        return None
    named = [({"id": entry} if isinstance(entry, str) else entry) for entry in value]
    entries = [entry for entry in named if isinstance(entry, dict)]
    return [
        {**entry, "id": str(name)} for entry in entries if (name := entry.get("id") or entry.get("name") or entry.get("model"))
    ]


def chosen_model(endpoint: Endpoint, found: Listing, wanted: str | None) -> str:
    """Return the name of the model that is measured: the one that is wanted, else the only one that there is.

    Raises EngineError where there are several, none, or not the wanted one: what was chosen for the user could be another one
    next time.
    """
    if wanted and (found.why or not found.names or wanted in found.names):
        return wanted
    if wanted:
        raise EngineError(f"{endpoint.shown} serves {', '.join(found.names)}, not {wanted!r}; see --llmperf-model.")
    if found.why:
        raise EngineError(f"{found.why}; it lists no models: name the one to be measured with --llmperf-model.")
    if not found.distinct:
        raise EngineError(f"{endpoint.shown} lists no model; name the one to be measured with --llmperf-model.")
    if len(found.distinct) > 1:
        raise EngineError(
            f"several models are served at {endpoint.shown} ({', '.join(found.distinct)}); name the one to be measured with"
            " --llmperf-model."
        )
    return found.distinct[0]


def software(endpoint: Endpoint, found: Listing, metrics: str | None) -> dict[str, str]:
    """Return the server's software with its version, e.g. `{"vllm": "0.33.0"}`; empty where it does not tell.

    `metrics` is what stands under `/metrics`, whose names tell the software too.
    """
    owner = _OWNERS.get(found.owner.lower(), "")
    name = owner or software_of(metrics) or ""
    path, field = _VERSIONS.get(name, ("/version", "version"))
    try:
        value = api.ask(endpoint, path).json()
    except OSError:
        value = None
    version = value.get(field) if isinstance(value, dict) else None
    if not name:
        return {"server": str(version)} if version else {}
    return {name: str(version) if version else "unknown"}


def may_give_ids(versions: Mapping[str, str]) -> bool:
    """Return whether software may know `return_token_ids`, which is vLLM's: any that is not known may be vLLM behind a proxy."""
    return not {"tensorrt-llm", "ollama", "tgi", "llama.cpp", "sglang", "lmdeploy"} & set(versions)


ONLY_CHAT = "it has a chat API and none of completions; measure it with llmperf(api='chat')"


def lacks_api(api_name: str, prompts: Sequence[Prompt]) -> bool:
    """Return whether prompts are for another API than the one that has given a token."""
    return api_name == "chat" and any(not prompt.messages for prompt in prompts)


def asked_as(endpoint: Endpoint, api_name: str, prompt: str | list[int]) -> str | list[int]:
    """Return a prompt as an endpoint takes it: token ids become words where it takes none."""
    takes_ids = endpoint.takes_ids and api_name == "completions"
    return prompt if isinstance(prompt, str) or takes_ids else words_for(prompt)


@dataclass(frozen=True)
class Probe:
    """One form of request that an endpoint may take."""

    api: str
    prefix: str
    takes_ids: bool
    gives_ids: bool


def _probes(prefix: str, *, gives_ids: bool) -> Iterator[Probe]:
    """Yield the forms of request in the order in which they are wanted."""
    for each in dict.fromkeys((prefix, "/v1", "")):
        for asks_ids in dict.fromkeys((gives_ids, False)):
            yield Probe("completions", each, True, asks_ids)
        yield Probe("completions", each, False, False)
        for asks_ids in dict.fromkeys((gives_ids, False)):
            yield Probe("chat", each, False, asks_ids)


def probed(endpoint: Endpoint, *, gives_ids: bool) -> tuple[Endpoint, str]:
    """Return the endpoint as requests reach it, and the API that has given a token; raises EngineError where none has.

    `gives_ids`: its software is one that may know `return_token_ids`.
    """
    failures: dict[str, str] = {}
    for probe in _probes(endpoint.prefix, gives_ids=gives_ids):
        path = probe.prefix + PATHS[probe.api]
        if path in failures and not _refused(failures[path]):
            continue  # another form of the same request would meet the same
        text = words_for(_PROBE_IDS)
        asked: dict[str, Any] = {"prompt": _PROBE_IDS if probe.takes_ids else text}
        if probe.api == "chat":
            asked = {"messages": [{"role": "user", "content": text}]}
        body = {"model": endpoint.model, **asked, "max_tokens": 1, "temperature": 0}
        body |= {"return_token_ids": True} if probe.gives_ids else {}
        try:
            answer = api.ask(endpoint, path, body, timeout_s=_PROBE_TIMEOUT_S)
        except OSError as error:
            raise EngineError(f"{endpoint.shown} gave no completion within {_PROBE_TIMEOUT_S:g} s ({error}).") from error
        done = api.completion_in(answer)
        if done is None:
            failures[path] = answer.error
            if answer.status in (401, 403) or 300 <= answer.status < 400:
                break
            continue
        if probe.takes_ids and done.prompt_tokens not in (None, len(_PROBE_IDS), len(_PROBE_IDS) + 1):
            failures[path] = f"{_REFUSED} {len(_PROBE_IDS)} token ids, of which it made {done.prompt_tokens} tokens"
            continue
        usable = replace(endpoint, prefix=probe.prefix, takes_ids=probe.takes_ids, gives_ids=probe.gives_ids)
        return usable, probe.api
    answers = "; ".join(f"{path} answered {why}" for path, why in failures.items())
    raise EngineError(f"{endpoint.shown} gives no token: {answers}")


_REFUSED = "refuses"


def _refused(why: str) -> bool:
    """Return whether a server took offence at the form of a request, so that another form may do."""
    return why.startswith(("HTTP 400", "HTTP 415", "HTTP 422", "HTTP 500", "HTTP 501", _REFUSED))
