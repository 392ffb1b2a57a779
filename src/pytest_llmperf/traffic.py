"""What is sent: lengths, classes of requests, arrivals, and the workload that joins them.

Frozen values, made from what a test writes (`llmperf(prompt_tokens="lognormal(512, 0.6)", rate=10)`) and checked when they are
made. Which prompts and instants they come to is drawn in `measure.workload`, from the seed alone: the same in every launch.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_llmperf.corpus import File, parse_file, read_dataset, read_lengths, read_trace
from pytest_llmperf.plan import PlanError, degree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from pytest_llmperf.plan import Axes

APIS = ("completions", "chat")
SLO_LIMITS = ("ttft_s", "itl_s", "tpot_s", "e2e_s")
DEFAULT_REQUESTS = 32
_TAKEN = frozenset({
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "stream", "stream_options", "n", "best_of",
    "return_token_ids",
})  # fmt: skip
"""Fields of a request's body that decide what is measured."""
_NEEDS_STREAM = ("ttft_s", "itl_s", "tpot_s")
_CALL = re.compile(r"(\w+)\(\s*(.*?)\s*\)")


@dataclass(frozen=True)
class Lengths:
    """A distribution of token counts: `uniform(low, high)`, `lognormal(mean, sigma[, max])` or `file(path)`, one per line."""

    kind: str
    numbers: tuple[float, ...] = ()
    file: File | None = None

    @property
    def mean(self) -> float:
        """Return the mean number of tokens, before a lognormal's tail is cut."""
        return self.numbers[0] if self.kind == "lognormal" else sum(self.numbers) / len(self.numbers)

    def __str__(self) -> str:
        """Return it as it is written in a test."""
        shown = [str(self.file)] if self.file else [f"{number:g}" for number in self.numbers]
        return f"{self.kind}({', '.join(shown)})"


def parse_lengths(name: str, value: object, folder: Path) -> int | Lengths:
    """Return a number of tokens, or a distribution of them; raises PlanError naming `name`."""
    if isinstance(value, Lengths):
        return value
    call = _CALL.fullmatch(str(value).strip())
    if not call:
        if isinstance(value, str) and not re.fullmatch(r"\s*[+-]?\d+\s*", value):
            raise PlanError(f"{name}={value!r}: {_LENGTHS}")
        return degree(name, value)
    kind, inside = call.groups()
    if kind == "file":
        file = parse_file(name, inside.strip("'\""), folder)
        return Lengths("file", tuple(map(float, read_lengths(file))), file)
    try:
        numbers = tuple(float(word) for word in inside.split(","))
    except ValueError:
        numbers = ()
    whole = all(number == int(number) for number in numbers if math.isfinite(number))
    uniform = kind == "uniform" and len(numbers) == 2 and whole and 1 <= numbers[0] <= numbers[1]
    lognormal = kind == "lognormal" and len(numbers) in (2, 3) and numbers[0] >= 1 and numbers[1] > 0
    if not all(map(math.isfinite, numbers)) or not (uniform or (lognormal and numbers[2:] >= (1,) * len(numbers[2:]))):
        raise PlanError(f"{name}={value!r}: {_LENGTHS}")
    return Lengths(kind, numbers)


_LENGTHS = (
    "must be a number of tokens, or uniform(LOW, HIGH), lognormal(MEAN, SIGMA[, MAX]) or file(PATH), with lengths of 1 or more"
)


@dataclass(frozen=True)
class RequestClass:
    """One kind of request in a workload of several, with metrics of its own (`short/ttft_p50_s`)."""

    name: str
    share: float
    """Of the requests; shares need not sum to 1."""
    prompt_tokens: int | Lengths
    output_tokens: int | Lengths
    extra_body: str = "{}"
    """Sampling parameters and the like as JSON, over those of the workload."""
    lora: str = ""
    """The name of the LoRA adapter that it asks for; empty for the model itself."""


@dataclass(frozen=True)
class Workload:
    """What is sent in one round: `requests` requests, at most `concurrency` at a time or at a `rate`."""

    prompt_tokens: int | Lengths = 100
    output_tokens: int | Lengths = 50
    requests: int = 32
    concurrency: int = 8
    """Requests in flight (closed loop). With a rate or a trace only the axis's value, which then has no meaning."""
    seed: int = 0
    """Seeds everything that is drawn: lengths, order and arrivals are the same in every round, token ids only in every launch."""
    rate: tuple[float, ...] = ()
    """Requests per second (open loop): one number, or those at the beginning and the end of a ramp; empty in closed loop."""
    arrivals: str = "poisson"
    """`poisson`, `constant`, or `gamma(BURSTINESS)`: the gamma distribution's shape, 1 is Poisson, less is burstier."""
    trace: File | None = None
    """Arrivals and lengths from a trace, Mooncake's JSONL or BurstGPT's CSV; the other way of an open loop."""
    speed: float = 1.0
    """How many times faster than recorded a trace is replayed."""
    prefix_tokens: int = 0
    """Tokens that prompts share, in front of `prompt_tokens` of their own."""
    prefixes: int = 1
    """How many different shared prefixes there are, taken in turn."""
    turns: int = 1
    """Requests of a conversation: each holds all that was said before, and is sent when the one before is answered."""
    classes: tuple[RequestClass, ...] = ()
    dataset: File | None = None
    """Prompts from a file: ShareGPT's JSON, or JSONL of OpenAI messages."""
    api: str = "completions"
    stream: bool = True
    extra_body: str = "{}"
    """Sampling parameters, structured output and whatever else the engine takes, as JSON, over the plugin's own."""
    lora: tuple[str, ...] = ()
    """Names of LoRA adapters, taken in turn; empty for the model itself."""
    slo: tuple[tuple[str, float], ...] = ()
    """Limits that a request must keep to count as goodput, by name of SLO_LIMITS, in seconds."""

    def __post_init__(self) -> None:
        """Raise PlanError where a field is unusable, or contradicts another one."""
        for name in ("requests", "concurrency", "turns", "prefixes"):
            object.__setattr__(self, name, degree(name, getattr(self, name)))
        for name in ("prompt_tokens", "output_tokens"):
            object.__setattr__(self, name, parse_lengths(name, getattr(self, name), Path()))
        for wrong in _contradictions(self):
            raise PlanError(wrong)

    @property
    def is_open(self) -> bool:
        """Return whether requests are sent at instants of their own, whatever the engine has answered."""
        return bool(self.rate or self.trace)

    @property
    def mean_output_tokens(self) -> float:
        """Return the mean number of output tokens of a request."""
        if self.classes:
            return sum(one.share * _mean(one.output_tokens) for one in self.classes) / sum(one.share for one in self.classes)
        return _mean(self.output_tokens)

    def class_share(self, name: str) -> float:
        """Return the share of requests that are of a class, 0 for one that there is not."""
        return sum(one.share for one in self.classes if one.name == name) / sum(one.share for one in self.classes or _ONE)

    @property
    def shares_prompts(self) -> bool:
        """Return whether an engine's prefix cache may find prompts of a round that it has seen: then hits prove nothing wrong."""
        has_blocks = bool(self.trace) and any(one.blocks for one in read_trace(self.trace))
        return bool(self.prefix_tokens or self.turns > 1 or has_blocks)

    @property
    def description(self) -> dict[str, Any]:
        """Return what is stored and shown of it: plain data, without what has not been asked for."""
        shown = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: _plain(value) for name, value in shown.items() if name in _ALWAYS or value != _DEFAULTS[name]}

    @property
    def fingerprint(self) -> str:
        """Return 16 hex digits that differ whenever what is sent differs; part of the baseline, never of its key."""
        return hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()[:16]


_ONE = (RequestClass("", 1.0, 1, 1),)
_ALWAYS = ("prompt_tokens", "output_tokens", "requests", "concurrency", "seed")
_DEFAULTS: dict[str, Any] = {one.name: one.default for one in fields(Workload)}


def _mean(lengths: int | Lengths) -> float:
    return lengths.mean if isinstance(lengths, Lengths) else float(lengths)


def _plain(value: Any) -> Any:
    if isinstance(value, File):
        return str(value)
    if isinstance(value, Lengths):
        return str(value)
    if isinstance(value, RequestClass):
        return {one.name: _plain(getattr(value, one.name)) for one in fields(value)}
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


def _contradictions(workload: Workload) -> Iterable[str]:
    """Yield what is wrong with a workload, in the words of its arguments."""
    one = workload
    if not one.is_open and one.concurrency > one.requests:
        yield (
            f"requests={one.requests}: fewer than concurrency={one.concurrency}, which could never be reached;"
            " send at least as many requests as are to run at once"
        )
    if one.requests % one.turns:
        yield f"requests={one.requests}: must be a multiple of turns={one.turns}, so that every conversation is whole"
    if one.turns > 1 and not one.is_open and one.concurrency > one.requests // one.turns:
        yield (
            f"requests={one.requests}, turns={one.turns}: only {one.requests // one.turns} conversations,"
            f" fewer than concurrency={one.concurrency}; send at least {one.concurrency * one.turns} requests"
        )
    if one.rate and one.trace:
        yield "rate and trace: a trace has its own arrivals; leave rate out, or give speed"
    if one.speed != 1 and not one.trace:
        yield f"speed={one.speed:g}: only a trace can be replayed faster; give trace, or another rate"
    for name, others in (
        ("dataset", ("classes", "trace", "turns", "prefix_tokens")),
        ("trace", ("classes", "turns", "prefix_tokens", "api")),
    ):
        for other in others:
            if getattr(one, name) and getattr(one, other) != _DEFAULTS[other]:
                yield f"{name} and {other}: prompts come from the one or the other; leave {other} out"
    if one.dataset and Path(one.dataset.path).suffix == ".jsonl" and one.api != "chat":
        yield "dataset of messages (.jsonl): these are sent to the chat API; add api='chat'"
    if one.api not in APIS:
        yield f"api={one.api!r}: must be one of {', '.join(APIS)}"
    if not one.stream and (limits := [name for name, _ in one.slo if name in _NEEDS_STREAM]):
        yield f"slo={limits[0]!r}: without a stream only the end of a response is seen; leave stream=False out, or limit e2e_s"
    if parse_arrivals(one.arrivals) is None:
        yield f"arrivals={one.arrivals!r}: must be poisson, constant or gamma(BURSTINESS), e.g. gamma(0.5)"
    if one.classes and one.requests // one.turns < len(one.classes):
        yield f"requests={one.requests}: too few for {len(one.classes)} classes; send at least one conversation of each"
    if one.arrivals != _DEFAULTS["arrivals"] and not one.rate:
        yield f"arrivals={one.arrivals!r}: only requests that are sent at a rate arrive so; add rate"


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


def parse_arrivals(text: str) -> float | None:
    """Return the burstiness of arrivals (the gamma distribution's shape; infinite: constant), None where it is unknown."""
    if text in ("poisson", "constant"):
        return 1.0 if text == "poisson" else math.inf
    found = re.fullmatch(r"gamma\(\s*([\d.]+)\s*\)", text)
    try:
        return float(found[1]) or None if found else None
    except ValueError:
        return None


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
        lengths = {name: parsed.get(name, _DEFAULTS[name]) for name in ("prompt_tokens", "output_tokens")}
        parsed["classes"] = _classes(merged["classes"], here, lengths)
    for source, lengths_of in (("dataset", {"prompt_tokens"}), ("trace", {"prompt_tokens", "output_tokens"})):
        if parsed.get(source) and (twice := sorted(lengths_of & given)):
            raise PlanError(f"{twice[0]} and {source}: lengths come from the one or the other; leave {twice[0]} out")
    workload = Workload(**{"requests": _requests(parsed), **parsed})
    if workload.trace and workload.requests > (most := len(read_trace(workload.trace))):
        raise PlanError(f"requests={workload.requests}: the trace has only {most} arrivals; send as many at most")
    return workload


def _requests(parsed: Mapping[str, Any]) -> int:
    """Return how many requests a round has when nobody says so."""
    if trace := parsed.get("trace"):
        return len(read_trace(trace))
    least = degree("concurrency", parsed["concurrency"]) * degree("turns", parsed.get("turns", 1))
    turns = degree("turns", parsed.get("turns", 1))
    return max(-(-DEFAULT_REQUESTS // turns) * turns, 0 if parsed.get("rate") else least)


def _classes(value: object, folder: Path, usual: Mapping[str, int | Lengths]) -> tuple[RequestClass, ...]:
    if not isinstance(value, dict) or not all(isinstance(one, dict) for one in value.values()):
        raise PlanError(f"classes={value!r}: must be a dict of dicts, e.g. {{'short': {{'share': 0.8, 'prompt_tokens': 64}}}}")
    found = []
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
        found.append(RequestClass(name, share, **lengths, extra_body=body, lora=str(given.get("lora", ""))))
    return tuple(found)


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
    "lora": _names,
}


def _checked(name: str, value: object, folder: Path, read: Callable[[File], object]) -> File:
    file = parse_file(name, value, folder)
    read(file)  # a bad line must be told now, and not after the engine's start
    return file
