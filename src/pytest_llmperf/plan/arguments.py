"""From the arguments that a test writes (`llmperf(prompt_tokens="lognormal(512, 0.6)", rate=10)`) to its workload."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_llmperf.plan.checks import PlanError, degree, parse_fraction
from pytest_llmperf.plan.datasets import File, parse_file, read_dataset, read_trace
from pytest_llmperf.plan.lengths import Lengths, parse_lengths
from pytest_llmperf.plan.workload import DEFAULTS, SLO_LIMITS, RequestClass, Workload

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pytest_llmperf.plan.axes import Axes

DEFAULT_REQUESTS = 32
"""Requests of a round where nobody says how many."""
_TAKEN = frozenset({
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "stream", "stream_options", "n", "best_of",
    "return_token_ids",
})  # fmt: skip
"""Fields of a request's body that decide what is measured."""


def workload_from(axes: Axes, *layers: Mapping[str, Any], folder: Path | None = None) -> Workload:
    """Return the workload of a call: concurrency or rate of its axes, then each layer's arguments, the last one winning.

    Files are relative to `folder`. Raises PlanError naming the argument.
    """
    merged: dict[str, Any] = {"concurrency": axes.concurrency} | ({"rate": axes.rate} if axes.rate else {})
    given: set[str] = set()
    for layer in layers:
        unknown = sorted(set(layer) - set(Workload.__dataclass_fields__))
        if unknown:
            known = ", ".join(Workload.__dataclass_fields__)
            raise PlanError(f"llmperf({unknown[0]}=...): unknown workload argument; known are {known}")
        if "concurrency" in layer and ("rate" in layer or "trace" in layer):
            raise PlanError("llmperf(concurrency=..., rate=...): requests are sent so many at a time or at a rate; leave one out")
        if "concurrency" in layer:  # a call's own form of load wins over the fixture's and the test id's
            merged.pop("rate", None)
            merged.pop("trace", None)
        merged |= layer
        given |= set(layer)
    here = folder or Path()
    parsed = {name: _PARSERS[name](value, here) for name, value in merged.items() if name in _PARSERS}
    parsed = {**merged, **parsed}
    if "classes" in merged:
        lengths = {name: parsed.get(name, DEFAULTS[name]) for name in ("prompt_tokens", "output_tokens")}
        parsed["classes"] = _classes(merged["classes"], here, lengths)
    for source, lengths_of in (("dataset", {"prompt_tokens"}), ("trace", {"prompt_tokens", "output_tokens"})):
        if parsed.get(source) and (twice := sorted(lengths_of & given)):
            raise PlanError(f"{twice[0]} and {source}: lengths come from the one or the other; leave {twice[0]} out")
    workload = Workload(**{"requests": _requests(parsed), **parsed})
    if workload.trace and workload.requests > (most := len(read_trace(workload.trace))):
        raise PlanError(f"requests={workload.requests}: the trace has only {most} arrivals; send as many at most")
    return workload


def parse_rate(name: str, value: object) -> tuple[float, ...]:
    """Return requests per second, or those at both ends of a ramp; raises PlanError naming `name`."""
    ends = value if isinstance(value, (list, tuple)) else str(value).split("..")
    try:
        rates = tuple(float(str(end)) for end in ends)
    except ValueError:
        rates = ()
    if len(rates) not in (1, 2) or not all(0 < rate < math.inf for rate in rates):
        raise PlanError(f"{name}={value!r}: must be requests per second above 0, e.g. 2.5, or a ramp such as '1..10'")
    return rates


def _requests(parsed: Mapping[str, Any]) -> int:
    """Return how many requests a round has when nobody says so."""
    if trace := parsed.get("trace"):
        return len(read_trace(trace))
    least = degree("concurrency", parsed["concurrency"]) * degree("turns", parsed.get("turns", 1))
    turns = degree("turns", parsed.get("turns", 1))
    return max(-(-DEFAULT_REQUESTS // turns) * turns, 0 if parsed.get("rate") else least)


def _classes(value: object, folder: Path, usual: Mapping[str, int | Lengths]) -> tuple[RequestClass, ...]:
    if not isinstance(value, dict) or not all(isinstance(given, dict) for given in value.values()):
        raise PlanError(f"classes={value!r}: must be a dict of dicts, e.g. {{'short': {{'share': 0.8, 'prompt_tokens': 64}}}}")
    classes = []
    for name, given in value.items():
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
            raise PlanError(f"classes: {name!r} is not a name; write letters, digits, '_', '.' or '-'")
        unknown = sorted(set(given) - set(RequestClass.__dataclass_fields__) - {"name"})
        if unknown:
            raise PlanError(f"classes: {name}: unknown argument {unknown[0]!r}; known are share, prompt_tokens, output_tokens,"
                            " extra_body, lora")  # fmt: skip
        share = _positive(f"classes: {name}: share", given.get("share", 1))
        lengths = {key: parse_lengths(f"classes: {name}: {key}", given.get(key, length), folder) for key, length in usual.items()}
        body = _json(given.get("extra_body", {}), f"classes: {name}: extra_body")
        classes.append(RequestClass(name, share, **lengths, extra_body=body, lora=str(given.get("lora", ""))))
    return tuple(classes)


def _positive(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise PlanError(f"{name}={value!r}: must be a number above 0")
    return float(value)


def _switch(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise PlanError(f"{name}={value!r}: must be True or False")
    return value


def _json(value: object, name: str) -> str:
    if not isinstance(value, dict):
        raise PlanError(f"{name}={value!r}: must be a dict of what goes into the request's body, e.g. {{'temperature': 0.7}}")
    if taken := sorted(_TAKEN & set(value)):
        raise PlanError(f"{name}: {taken[0]!r} is set by the plugin; use the arguments of llmperf(...) instead")
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PlanError(f"{name}={value!r}: cannot be written as JSON ({error})") from None


def _slo(value: object, _: Path) -> tuple[tuple[str, float], ...]:
    if not isinstance(value, dict) or not value or set(value) - set(SLO_LIMITS):
        raise PlanError(f"slo={value!r}: must be a dict of limits in seconds; known are {', '.join(SLO_LIMITS)}")
    return tuple((name, _positive(f"slo: {name}", value[name])) for name in SLO_LIMITS if name in value)


def _tolerated(name: str, value: object) -> float:
    """Return a share of requests that may fail, 0 for none."""
    none = re.fullmatch(r"0+(\.0+)?\s*%?", str(value).strip()) is not None
    return 0.0 if none else parse_fraction(name, value)


def _names(value: object, _: Path) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (list, tuple)) else ()
    if not names or not all(isinstance(name, str) and name for name in names):
        raise PlanError(f"lora={value!r}: must be the name of an adapter, or a list of names")
    return names


_PARSERS: dict[str, Any] = {
    "prompt_tokens": lambda value, folder: parse_lengths("prompt_tokens", value, folder),
    "output_tokens": lambda value, folder: parse_lengths("output_tokens", value, folder),
    "rate": lambda value, _: () if value is None else parse_rate("rate", value),
    "trace": lambda value, folder: _checked("trace", value, folder, read_trace),
    "dataset": lambda value, folder: _checked("dataset", value, folder, read_dataset),
    "speed": lambda value, _: _positive("speed", value),
    "prefix_tokens": lambda value, _: 0 if value == 0 and value is not False else degree("prefix_tokens", value),
    "stream": lambda value, _: _switch("stream", value),
    "arrivals": lambda value, _: str(value),
    "extra_body": lambda value, _: _json(value, "extra_body"),
    "slo": _slo,
    "tolerated_failures": lambda value, _: _tolerated("tolerated_failures", value),
    "lora": _names,
}


def _checked(name: str, value: object, folder: Path, read: Callable[[File], object]) -> File:
    file = parse_file(name, value, folder)
    read(file)  # a bad line must be told now, and not after the engine's start
    return file
