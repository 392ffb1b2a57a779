"""The workload: what is sent in one round, as a frozen value that is checked when it is made.

Which prompts and instants it comes to is drawn in `measure.client.prompts`, from the seed alone: the same in every launch.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_llmperf.plan.checks import PlanError, degree
from pytest_llmperf.plan.datasets import File, read_trace
from pytest_llmperf.plan.lengths import Lengths, mean_length, parse_lengths
from pytest_llmperf.units import counted

if TYPE_CHECKING:
    from collections.abc import Iterable

APIS = ("completions", "chat")
SLO_LIMITS = ("ttft_s", "itl_s", "tpot_s", "e2e_s")
_NEEDS_STREAM = ("ttft_s", "itl_s", "tpot_s")


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
            return sum(kind.share * mean_length(kind.output_tokens) for kind in self.classes) / sum(
                kind.share for kind in self.classes
            )
        return mean_length(self.output_tokens)

    def class_share(self, name: str) -> float:
        """Return the share of requests that are of a class, 0 for one that there is not."""
        return sum(kind.share for kind in self.classes if kind.name == name) / sum(kind.share for kind in self.classes or _ONE)

    @property
    def shares_prompts(self) -> bool:
        """Return whether an engine's prefix cache may find prompts of a round that it has seen: then hits prove nothing wrong."""
        has_blocks = bool(self.trace) and any(arrival.blocks for arrival in read_trace(self.trace))
        return bool(self.prefix_tokens or self.turns > 1 or has_blocks)

    @property
    def description(self) -> dict[str, Any]:
        """Return what is stored and shown of it: plain data, without what has not been asked for."""
        shown = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: _plain(value) for name, value in shown.items() if name in _ALWAYS or value != DEFAULTS[name]}

    @property
    def fingerprint(self) -> str:
        """Return 16 hex digits that differ whenever what is sent differs; part of the baseline, never of its key."""
        return hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()[:16]


_ONE = (RequestClass("", 1.0, 1, 1),)
_ALWAYS = ("prompt_tokens", "output_tokens", "requests", "concurrency", "seed")
DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(Workload)}


def _plain(value: Any) -> Any:
    if isinstance(value, File):
        return str(value)
    if isinstance(value, Lengths):
        return str(value)
    if isinstance(value, RequestClass):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _contradictions(workload: Workload) -> Iterable[str]:
    """Yield what is wrong with a workload, in the words of its arguments."""
    load = workload
    if not load.is_open and load.concurrency > load.requests:
        yield (
            f"requests={load.requests}: fewer than concurrency={load.concurrency}, which could never be reached;"
            " send at least as many requests as are to run at once"
        )
    if load.requests % load.turns:
        yield f"requests={load.requests}: must be a multiple of turns={load.turns}, so that every conversation is whole"
    if load.turns > 1 and not load.is_open and load.concurrency > load.requests // load.turns:
        yield (
            f"requests={load.requests}, turns={load.turns}: only {counted(load.requests // load.turns, 'conversation')},"
            f" fewer than concurrency={load.concurrency}; send at least {load.concurrency * load.turns} requests"
        )
    if load.rate and load.trace:
        yield "rate and trace: a trace has its own arrivals; leave rate out, or give speed"
    if load.speed != 1 and not load.trace:
        yield f"speed={load.speed:g}: only a trace can be replayed faster; give trace, or another rate"
    for name, others in (
        ("dataset", ("classes", "trace", "turns", "prefix_tokens")),
        ("trace", ("classes", "turns", "prefix_tokens", "api")),
    ):
        for other in others:
            if getattr(load, name) and getattr(load, other) != DEFAULTS[other]:
                yield f"{name} and {other}: prompts come from the one or the other; leave {other} out"
    if load.dataset and Path(load.dataset.path).suffix == ".jsonl" and load.api != "chat":
        yield "dataset of messages (.jsonl): these are sent to the chat API; add api='chat'"
    if load.api not in APIS:
        yield f"api={load.api!r}: must be one of {', '.join(APIS)}"
    if not load.stream and (limits := [name for name, _ in load.slo if name in _NEEDS_STREAM]):
        yield f"slo={limits[0]!r}: without a stream only the end of a response is seen; leave stream=False out, or limit e2e_s"
    if parse_arrivals(load.arrivals) is None:
        yield f"arrivals={load.arrivals!r}: must be poisson, constant or gamma(BURSTINESS), e.g. gamma(0.5)"
    if load.classes and load.requests // load.turns < len(load.classes):
        yield f"requests={load.requests}: too few for {len(load.classes)} classes; send at least one conversation of each"
    if load.arrivals != DEFAULTS["arrivals"] and not load.rate:
        yield f"arrivals={load.arrivals!r}: only requests that are sent at a rate arrive so; add rate"


def parse_arrivals(text: str) -> float | None:
    """Return the burstiness of arrivals (the gamma distribution's shape; infinite: constant), None where it is unknown."""
    if text in ("poisson", "constant"):
        return 1.0 if text == "poisson" else math.inf
    match = re.fullmatch(r"gamma\(\s*([\d.]+)\s*\)", text)
    try:
        return float(match[1]) or None if match else None
    except ValueError:
        return None
