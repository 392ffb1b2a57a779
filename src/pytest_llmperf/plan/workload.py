"""The workload: what is sent in one round, as a frozen value that is checked when it is made.

Which prompts and instants it comes to is drawn in `measure.client`, from the seed alone: the same in every launch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_llmperf.plan.checks import PlanError, brief, degree, parse_positive, parse_switch, parse_whole, written
from pytest_llmperf.plan.datasets import Conversation, fitting, read_dataset
from pytest_llmperf.plan.fingerprint import fingerprint_of, plain
from pytest_llmperf.plan.lengths import OWN, Lengths, Pairs, mean_length, parse_lengths, parse_seconds
from pytest_llmperf.plan.traces import UNITS, Arrival, failed_rows, read_trace
from pytest_llmperf.plan.traffic import AT_ONCE, WarmUp, parse_arrivals
from pytest_llmperf.plan.traffic import RequestClass as RequestClass
from pytest_llmperf.units import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pytest_llmperf.plan.files import File

APIS = ("completions", "chat")
SLO_LIMITS = ("ttft_s", "itl_s", "tpot_s", "e2e_s")
_NEEDS_STREAM = ("ttft_s", "itl_s", "tpot_s")


@dataclass(frozen=True)
class Workload:
    """What is sent in one round: `requests` requests, at most `concurrency` at a time or at a `rate`."""

    prompt_tokens: int | Lengths = 100
    output_tokens: int | Lengths = 50
    requests: int = 32
    """Requests of a round; with a duration in a closed loop the most that there are."""
    concurrency: int = 8
    """Requests in flight (closed loop). With a rate or a trace only the axis's value, which then has no meaning."""
    seed: int = 0
    """Seeds everything that is drawn: lengths, order and arrivals are the same in every round, token ids only in every launch."""
    rate: tuple[float, ...] = ()
    """Requests per second (open loop): one number, or those at the beginning and the end of a ramp; infinite: all are due at
    the beginning; empty in closed loop."""
    arrivals: str = "poisson"
    """`poisson`, `constant`, or `gamma(BURSTINESS)`: the gamma distribution's shape, 1 is Poisson, less is burstier."""
    trace: File | None = None
    """Arrivals and lengths from a trace; the other way of an open loop."""
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
    """Prompts from a file."""
    api: str = "completions"
    stream: bool = True
    extra_body: str = "{}"
    """Sampling parameters, structured output and whatever else the engine takes, as JSON, over the plugin's own."""
    lora: tuple[str, ...] = ()
    """Names of LoRA adapters, taken in turn; empty for the model itself."""
    slo: tuple[tuple[str, float], ...] = ()
    """Limits that a request must keep to count as goodput, by name of SLO_LIMITS, in seconds."""
    pairs: Pairs | None = None
    """Lengths of prompt and answer together, in place of `prompt_tokens` and `output_tokens`."""
    max_prompt_tokens: int | None = None
    """Entries of a dataset with longer prompts are left out."""
    block_tokens: int | None = None
    """Tokens of a trace's block; None: proven from the file."""
    trace_unit: str | None = None
    """Unit of a trace's time, a key of UNITS; None: proven from the file."""
    max_concurrency: int | None = None
    """The most requests in flight in an open loop: those that are due wait, and their latency counts from when they were due."""
    duration_s: float | None = None
    """In a closed loop no request is sent later than this; at a rate `requests` follows from it."""
    think_s: float | Lengths = 0.0
    """Seconds from an answer to the next request of its conversation."""
    warm_up: WarmUp | None = None
    """What warms up, where it is not one wave of the workload's own requests."""
    tolerated_failures: float = 0.0
    """Share of a round's requests that may fail before its launch is INVALID. It changes nothing of what is sent."""

    def __post_init__(self) -> None:
        """Raise PlanError where a field is unusable, or contradicts another one."""
        for name, check in _CHECKS.items():
            value = getattr(self, name)
            if value is not None or DEFAULTS[name] is not None:
                object.__setattr__(self, name, check(name, value))
        for wrong in _contradictions(self):
            raise PlanError(wrong)

    @property
    def is_open(self) -> bool:
        """Return whether requests are sent at instants of their own, whatever the engine has answered."""
        return bool(self.rate or self.trace)

    @property
    def stops_s(self) -> float | None:
        """Return the seconds after which nothing more is sent, None where all requests are."""
        return None if self.is_open else self.duration_s

    @property
    def mean_output_tokens(self) -> float:
        """Return the mean number of output tokens of a request."""
        if self.classes:
            return sum(kind.share * mean_length(kind.output_tokens) for kind in self.classes) / sum(
                kind.share for kind in self.classes
            )
        if self.pairs:
            return self.pairs.mean_output
        usual = mean_length(self.output_tokens)
        of_files: list[float] = [row.output_tokens for row in self.trace_rows]
        own = self.has_own_answers
        of_files += [(own and entry.answer_tokens) or entry.output_tokens or usual for entry in self.entries]
        return sum(of_files) / len(of_files) if of_files else usual

    def class_share(self, name: str) -> float:
        """Return the share of requests that are of a class, 0 for one that there is not."""
        return sum(kind.share for kind in self.classes if kind.name == name) / sum(kind.share for kind in self.classes or _ONE)

    @property
    def trace_rows(self) -> tuple[Arrival, ...]:
        """Return all arrivals of the trace, empty without one; raises PlanError."""
        return read_trace(self.trace, self.block_tokens, self.trace_unit) if self.trace else ()

    @property
    def entries(self) -> tuple[Conversation, ...]:
        """Return the entries of the dataset that are sent, empty without one; raises PlanError."""
        return fitting(self.dataset, self.max_prompt_tokens, answered=self.has_own_answers) if self.dataset else ()

    @property
    def has_own_answers(self) -> bool:
        """Return whether an answer is as long as the dataset's own."""
        return isinstance(self.output_tokens, Lengths) and self.output_tokens.kind == OWN

    @property
    def left_out(self) -> tuple[str, ...]:
        """Return what of the files is not sent, in words."""
        reasons = []
        if self.trace and (failed := failed_rows(self.trace, self.block_tokens, self.trace_unit)):
            reasons.append(f"trace: {failed:,} of {failed + len(self.trace_rows):,} rows have no prompt or no answer: not sent")
        if self.dataset and (short := len(read_dataset(self.dataset)) - len(self.entries)):
            reasons.append(f"dataset: {short:,} of {short + len(self.entries):,} entries are too long or unanswered: not sent")
        return tuple(reasons)

    @property
    def shares_prompts(self) -> bool:
        """Return whether an engine's prefix cache may find prompts of a round that it has seen: then hits prove nothing wrong."""
        has_blocks = any(arrival.blocks for arrival in self.trace_rows)
        # A template writes the tools of a request in front of all that is said.
        has_tools = any('"tools"' in entry.body or '"functions"' in entry.body for entry in self.entries)
        return bool(self.prefix_tokens or self.turns > 1 or has_blocks or has_tools)

    @property
    def description(self) -> dict[str, Any]:
        """Return what is stored and shown of it: plain data, without what has not been asked for."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: plain(value) for name, value in given.items() if name in _ALWAYS or value != DEFAULTS[name]}

    @property
    def fingerprint(self) -> str:
        """Return 16 hex digits that differ whenever what is sent differs; part of the baseline, never of its key."""
        return fingerprint_of(self.description)


_ONE = (RequestClass("", 1.0, 1, 1),)
_ALWAYS = ("prompt_tokens", "output_tokens", "requests", "concurrency", "seed")
DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(Workload)}


def _arrivals(name: str, value: object) -> str:
    if not isinstance(value, str) or parse_arrivals(value) is None:
        raise PlanError(f"{name}={brief(value)}: must be poisson, constant or gamma(BURSTINESS), e.g. gamma(0.5)")
    return value


def _choice(choices: Iterable[str], name: str, value: object) -> str:
    if not isinstance(value, str) or value not in choices:
        raise PlanError(f"{name}={brief(value)}: must be one of {', '.join(choices)}")
    return value


def _whole_or_degree(name: str, value: object) -> int:
    return 0 if written(value) in ("0", "0.0", "-0") else degree(name, value)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(("requests", "concurrency", "turns", "prefixes"), degree),
    **dict.fromkeys(("max_prompt_tokens", "block_tokens", "max_concurrency"), degree),
    **dict.fromkeys(("prompt_tokens", "output_tokens"), partial(parse_lengths, folder=Path())),
    **dict.fromkeys(("speed", "duration_s"), parse_positive),
    "seed": parse_whole,
    "prefix_tokens": _whole_or_degree,
    "stream": parse_switch,
    "arrivals": _arrivals,
    "api": partial(_choice, APIS),
    "trace_unit": partial(_choice, tuple(UNITS)),
    "think_s": parse_seconds,
}
"""How each field is checked; None is allowed where it is the default."""


def check_field(name: str, value: object) -> Any:
    """Return the value of a field, checked; raises PlanError where it is unusable, whatever the others are."""
    if name in _CHECKS and (value is not None or DEFAULTS[name] is not None):
        return _CHECKS[name](name, value)
    return value


_SOURCES = (
    ("dataset", ("classes", "trace", "turns", "prefix_tokens", "pairs")),
    ("trace", ("classes", "turns", "prefix_tokens", "api", "pairs")),
    ("pairs", ("classes", "prompt_tokens", "output_tokens")),
)
"""Fields that prompts or their lengths come from, each with those that would say it a second time."""
_PARTS = (
    ("block_tokens", "trace", "only a trace has blocks"),
    ("trace_unit", "trace", "only a trace has times of its own"),
    ("max_prompt_tokens", "dataset", "only entries of a dataset are left out"),
)
"""Fields that say something of another one, which must be there."""


def _contradictions(workload: Workload) -> Iterable[str]:
    """Yield what is wrong with a workload, in the words of its arguments."""
    load = workload
    yield from _of_load(load)
    for name, others in _SOURCES:
        for other in others:
            if getattr(load, name) and getattr(load, other) != DEFAULTS[other]:
                yield f"{name} and {other}: prompts come from the one or the other; leave {other} out"
    for name, source, why in _PARTS:
        if getattr(load, name) is not None and not getattr(load, source):
            yield f"{name}={brief(getattr(load, name))}: {why}; add {source}, or leave {name} out"
    if load.speed != 1 and not load.trace:
        yield f"speed={load.speed:g}: only a trace can be replayed faster; give trace, or another rate"
    lengths = [load.output_tokens, *(kind.output_tokens for kind in load.classes)]
    if any(isinstance(each, Lengths) and each.kind == OWN for each in lengths) and not load.dataset:
        yield "output_tokens='dataset': these are the lengths of a dataset's answers; add dataset, or give a number"
    if not load.stream and (limits := [name for name, _ in load.slo if name in _NEEDS_STREAM]):
        yield f"slo={limits[0]!r}: without a stream only the end of a response is seen; leave stream=False out, or limit e2e_s"
    if load.classes and load.requests // load.turns < len(load.classes):
        yield f"requests={load.requests}: too few for {len(load.classes)} classes; send at least one conversation of each"


def _of_load(load: Workload) -> Iterable[str]:
    """Yield what is wrong with how many requests are sent, and when."""
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
    if load.arrivals != DEFAULTS["arrivals"] and not load.rate:
        yield f"arrivals={brief(load.arrivals)}: only requests that are sent at a rate arrive so; add rate"
    if load.max_concurrency is not None and not load.is_open:
        yield (
            f"max_concurrency={load.max_concurrency}: without a rate or a trace so many are in flight as concurrency says;"
            " add rate, or leave max_concurrency out"
        )
    if load.duration_s is not None and load.trace:
        yield "duration_s and trace: a trace lasts as long as its arrivals; leave duration_s out, or give requests or speed"
    if load.duration_s is not None and load.rate == (AT_ONCE,):
        yield "duration_s and rate='inf': all requests are due at the beginning; leave duration_s out, and give requests"
    if load.think_s != DEFAULTS["think_s"] and load.turns == 1:
        yield f"think_s={plain(load.think_s)}: a pause is between the turns of a conversation; add turns=2 or more"
