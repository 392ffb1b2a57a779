"""From the arguments that a test writes (`llmperf(prompt_tokens="lognormal(512, 0.6)", rate=10)`) to its workload."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_llmperf.plan.checks import (
    MOST,
    PlanError,
    brief,
    cut,
    degree,
    parse_fraction,
    parse_positive,
    representation,
    written,
)
from pytest_llmperf.plan.datasets import TAKEN, api_of
from pytest_llmperf.plan.files import parse_file
from pytest_llmperf.plan.lengths import Lengths, mean_length, parse_lengths, parse_pairs
from pytest_llmperf.plan.traces import read_trace, units_of
from pytest_llmperf.plan.traffic import AT_ONCE, WarmUp, parse_rate
from pytest_llmperf.plan.workload import DEFAULTS, SLO_LIMITS, RequestClass, Workload, check_field

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_llmperf.plan.axes import Axes

DEFAULT_REQUESTS = 32
"""Requests of a round where nobody says how many."""
_REQUESTS_PER_S = 4
"""Requests a second that a closed loop bound by time has ready for each that is in flight, where nobody says how many."""
_READY_TOKENS = 4_000_000
"""Tokens of prompts that are made ready for it at most: they are written before the clock starts."""
_OPTIONAL = frozenset({"max_tokens", "return_token_ids", "stream_options"})
"""Those that an endpoint may refuse, so that None leaves them out. Without `max_tokens` a chat API is sent
`max_completion_tokens`."""


def workload_from(axes: Axes, *layers: Mapping[str, Any], folder: Path | None = None) -> Workload:
    """Return the workload of a call: concurrency or rate of its axes, then each layer's arguments, the last one winning.

    Files are relative to `folder`. Raises PlanError naming the argument.
    """
    merged, given = _merged(axes, layers)
    here = folder or Path()
    parsed = {
        name: _PARSERS[name](value, here) if name in _PARSERS else check_field(name, value) for name, value in merged.items()
    }
    if "classes" in merged:
        lengths = {name: parsed.get(name, DEFAULTS[name]) for name in ("prompt_tokens", "output_tokens")}
        parsed["classes"] = _classes(merged["classes"], here, lengths)
    for source, lengths_of in _LENGTHS_OF.items():
        if parsed.get(source) and (twice := sorted(lengths_of & given)):
            raise PlanError(f"{twice[0]} and {source}: lengths come from the one or the other; leave {twice[0]} out")
    if "prefixes" in given and not parsed.get("prefix_tokens"):
        raise PlanError(f"prefixes={brief(merged['prefixes'])}: texts that prompts share have a length; add prefix_tokens")
    if parsed.get("dataset") and "api" not in given:
        parsed["api"] = api_of(parsed["dataset"]) or DEFAULTS["api"]
    if parsed.get("trace"):
        stated = (parsed.get("block_tokens"), parsed.get("trace_unit"))
        # Checked with the others below: what is proven of a file is part of what is sent.
        Workload(**{**parsed, "requests": 1})
        parsed["block_tokens"], parsed["trace_unit"] = units_of(parsed["trace"], *stated)
    # What is wrong with an argument is told before what follows from it.
    workload = Workload(**{"requests": _requests(parsed), **parsed})
    _check_files(workload)
    return workload


_LENGTHS_OF = {
    "dataset": {"prompt_tokens"},
    "trace": {"prompt_tokens", "output_tokens"},
    "pairs": {"prompt_tokens", "output_tokens"},
}
"""Arguments that bring lengths with them, and those that would say them a second time."""


def _merged(axes: Axes, layers: tuple[Mapping[str, Any], ...]) -> tuple[dict[str, Any], set[str]]:
    """Return the arguments of all layers over the axes, and the names that a layer gives; raises PlanError."""
    merged: dict[str, Any] = {"concurrency": axes.concurrency} | ({"rate": axes.rate} if axes.rate else {})
    given: set[str] = set()
    for layer in layers:
        unknown = sorted(map(str, set(layer) - set(Workload.__dataclass_fields__)))
        if unknown:
            known = ", ".join(Workload.__dataclass_fields__)
            raise PlanError(f"llmperf({unknown[0]}=...): unknown workload argument; known are {known}")
        if "concurrency" in layer and ("rate" in layer or "trace" in layer):
            raise PlanError(
                "llmperf(concurrency=..., rate=...): requests are sent so many at a time or at a rate; leave one out"
                " (max_concurrency is the most in flight beside a rate)"
            )
        if "concurrency" in layer:  # a call's own form of load wins over the fixture's and the test id's
            merged.pop("rate", None)
            merged.pop("trace", None)
        rate = {**merged, **layer}.get("rate")
        at_a_rate = rate is not None and not (isinstance(rate, tuple) and not rate)
        if "requests" in layer and layer.get("duration_s") is not None and at_a_rate:
            raise PlanError(
                f"requests={brief(layer['requests'])} and duration_s={brief(layer['duration_s'])}: at a rate the one follows from"
                " the other; leave one out"
            )
        for name, other in (("requests", "duration_s"), ("duration_s", "requests")):
            if name in layer and other not in layer and at_a_rate:
                merged.pop(other, None)
        merged |= layer
        given |= set(layer)
    return merged, given


def _check_files(workload: Workload) -> None:
    """Raise PlanError where a file does not hold what is asked of it: that must be known before an engine is started."""
    if (rows := workload.trace_rows) and workload.requests > len(rows):
        raise PlanError(f"requests={workload.requests}: the trace has only {len(rows)} arrivals; send as many at most")
    entries = workload.entries
    if entries and entries[0].api not in (None, workload.api):
        raise PlanError(
            f"api={brief(workload.api)}: the entries of the dataset are for the API {entries[0].api!r}; leave api out, or write"
            f" api={entries[0].api!r}"
        )
    if workload.warm_up and workload.warm_up.dataset and (api := api_of(workload.warm_up.dataset)) not in (None, workload.api):
        raise PlanError(f"warm_up: the entries of its dataset are for the API {api!r}, and the round asks {brief(workload.api)}")


def check_layer(arguments: Mapping[str, Any], *, origin: str) -> None:
    """Raise PlanError that names `origin` where an argument of a layer is unusable, whatever the other layers say.

    Files are left to the call, which knows the folder that they are in.
    """
    for name, value in arguments.items():
        if name in ("dataset", "trace") or any(word in representation(value) for word in ("file(", "'dataset': ")):
            continue
        try:
            if name == "classes":
                _classes(value, Path(), {length: DEFAULTS[length] for length in ("prompt_tokens", "output_tokens")})
            else:
                check_field(name, _PARSERS[name](value, Path()) if name in _PARSERS else value)
        except PlanError as error:
            raise PlanError(f"{origin}: {error}") from None


def _requests(parsed: Mapping[str, Any]) -> int:
    """Return how many requests a round has when nobody says so."""
    if parsed.get("trace"):
        return len(read_trace(parsed["trace"], parsed["block_tokens"], parsed["trace_unit"]))
    turns = degree("turns", parsed.get("turns", 1))
    concurrency = degree("concurrency", parsed["concurrency"])
    wanted: float = DEFAULT_REQUESTS
    rate = parsed.get("rate")
    if parsed.get("duration_s") is not None:
        seconds = parse_positive("duration_s", parsed["duration_s"])
        if rate and rate != (AT_ONCE,):
            wanted = max(1, round(sum(rate) / len(rate) * seconds))
        elif not rate:
            ready = concurrency * math.ceil(seconds) * _REQUESTS_PER_S
            most = _READY_TOKENS // max(1, round(mean_length(parsed.get("prompt_tokens", DEFAULTS["prompt_tokens"]))))
            wanted = max(DEFAULT_REQUESTS, min(ready, most))
    requests = max(math.ceil(wanted / turns) * turns, 0 if rate else concurrency * turns)
    if requests > MOST:
        sources = {name: parsed.get(name) for name in ("turns", "concurrency", "rate", "duration_s")}
        asked = ", ".join(f"{name}={brief(value)}" for name, value in sources.items() if value is not None)
        raise PlanError(f"{asked}: a round would have {requests:,} requests, and can have {MOST:,}; ask for less")
    return requests


def _classes(value: object, folder: Path, usual: Mapping[str, int | Lengths]) -> tuple[RequestClass, ...]:
    if not isinstance(value, dict) or not value or not all(isinstance(given, dict) for given in value.values()):
        raise PlanError(
            f"classes={brief(value)}: must be a dict of dicts, e.g. {{'short': {{'share': 0.8, 'prompt_tokens': 64}}}}"
        )
    classes = []
    for name, given in value.items():
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
            raise PlanError(f"classes: {brief(name)} is not a name; write letters, digits, '_', '.' or '-'")
        unknown = sorted(map(representation, set(given) - set(RequestClass.__dataclass_fields__)))
        if unknown:
            raise PlanError(f"classes: {name}: unknown argument {cut(unknown[0])}; known are share, prompt_tokens, output_tokens,"
                            " extra_body, lora")  # fmt: skip
        share = parse_positive(f"classes: {name}: share", given.get("share", 1))
        lengths = {key: parse_lengths(f"classes: {name}: {key}", given.get(key, length), folder) for key, length in usual.items()}
        body = _json(given.get("extra_body", {}), f"classes: {name}: extra_body")
        lora = given.get("lora", "")
        if not isinstance(lora, str):
            raise PlanError(f"classes: {name}: lora={brief(lora)}: must be the name of an adapter")
        classes.append(RequestClass(name, share, **lengths, extra_body=body, lora=lora))
    return tuple(classes)


def _json(value: object, name: str) -> str:
    if not isinstance(value, dict) or not all(isinstance(field, str) for field in value):
        raise PlanError(
            f"{name}={brief(value)}: must be a dict of what goes into the request's body, e.g. {{'temperature': 0.7}}"
        )
    left_out = {field for field in _OPTIONAL if field in value and value[field] is None}
    if taken := sorted(TAKEN & set(value) - left_out):
        raise PlanError(f"{name}: {brief(taken[0])} is set by the plugin; use the arguments of llmperf(...) instead")
    if not isinstance(value.get("ignore_eos"), (bool, type(None))):
        raise PlanError(f"{name}: ignore_eos={brief(value['ignore_eos'])}: must be True or False")
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise PlanError(f"{name}={brief(value)}: cannot be written as JSON ({cut(str(error))})") from None


def _slo(value: object, _: Path) -> tuple[tuple[str, float], ...]:
    if not isinstance(value, dict) or not value or set(value) - set(SLO_LIMITS):
        raise PlanError(f"slo={brief(value)}: must be a dict of limits in seconds; known are {', '.join(SLO_LIMITS)}")
    return tuple((name, parse_positive(f"slo: {name}", value[name])) for name in SLO_LIMITS if name in value)


def _tolerated(name: str, value: object) -> float:
    """Return a share of requests that may fail, 0 for none."""
    none = re.fullmatch(r"0+(\.0+)?\s*%?", written(value)) is not None
    return 0.0 if none else parse_fraction(name, value)


def _names(value: object, _: Path) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (list, tuple)) else ()
    if not names or not all(isinstance(name, str) and name for name in names):
        raise PlanError(f"lora={brief(value)}: must be the name of an adapter, or a list of names")
    return names


def _warm_up(value: object, folder: Path) -> WarmUp | None:
    if value is None or isinstance(value, WarmUp):
        return value
    known = tuple(WarmUp.__dataclass_fields__)
    if not isinstance(value, dict) or not value or set(value) - set(known):
        raise PlanError(f"warm_up={brief(value)}: must be a dict of what warms up; known are {', '.join(known)}")
    given = {name: item for name, item in value.items() if item is not None}
    lengths = {
        name: parse_lengths(f"warm_up: {name}", given[name], folder)
        for name in ("prompt_tokens", "output_tokens")
        if name in given
    }
    if "dataset" in given and "prompt_tokens" in given:
        raise PlanError("warm_up: prompt_tokens and dataset: lengths come from the one or the other; leave prompt_tokens out")
    return WarmUp(
        requests=degree("warm_up: requests", given["requests"]) if "requests" in given else None,
        dataset=_dataset("warm_up: dataset", given["dataset"], folder) if "dataset" in given else None,
        **lengths,
    )


def _dataset(name: str, value: object, folder: Path) -> Any:
    file = parse_file(name, value, folder)
    api_of(file)  # a bad line must be told now, and not after the engine's start
    return file


_PARSERS: dict[str, Any] = {
    "prompt_tokens": lambda value, folder: parse_lengths("prompt_tokens", value, folder),
    "output_tokens": lambda value, folder: parse_lengths("output_tokens", value, folder),
    "pairs": lambda value, folder: None if value is None else parse_pairs(value, folder),
    "rate": lambda value, _: () if value is None else parse_rate("rate", value),
    "trace": lambda value, folder: None if value is None else parse_file("trace", value, folder),
    "dataset": lambda value, folder: None if value is None else _dataset("dataset", value, folder),
    "warm_up": _warm_up,
    "extra_body": lambda value, _: _json(value, "extra_body"),
    "slo": _slo,
    "tolerated_failures": lambda value, _: _tolerated("tolerated_failures", value),
    "lora": _names,
}
