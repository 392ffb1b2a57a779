"""What the engine says of itself during a round: its `/metrics` before and after, and in between.

Counters only grow, and a round's are the differences. They are believed only where one engine has told all of them, and where
the client can have caused them: behind a balancer each answer may be another replica's, and others may send requests too.
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pytest_llmperf.measure.dialects import (
    COUNTERS,
    NIXL,
    canonical,
    find_row,
    is_through_ray,
    join,
    software_in,
    spellings,
    tokens_per,
    value_of,
)
from pytest_llmperf.measure.exposition import Scrape, Series, read_scrape, read_series
from pytest_llmperf.measure.plausibility import implausible, moved

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Self

    from pytest_llmperf.measure.dialects import Feature
    from pytest_llmperf.measure.engines.engine import Engine
    from pytest_llmperf.measure.plausibility import Caused

SAMPLE_INTERVAL_S = 0.5
SETTLE_S = 2.0
"""How long an engine's counters may be behind its answers: some count a request when it is over, or once a second."""
RAY_SETTLE_S = 15.0
"""Ray's metrics agents export every 10 s."""
_ASK_AGAIN_S = 0.1
_SLACK, _PROBES = 1.1, 8
"""An engine may count so many more requests than were sent, as a factor and a number, before somebody else is seen in it."""
_SAMPLED: tuple[Feature, ...] = ("kv_usage", "running", "prompt_tokens", "output_tokens")


@dataclass(frozen=True)
class Telemetry:
    """What happened inside the engine during one round; None where it doesn't tell, or cannot be believed."""

    preemptions: float | None = None
    prompt_tokens: float | None = None
    output_tokens: float | None = None
    prefix_hit_tokens: float | None = None
    external_hit_tokens: float | None = None
    """Prompt tokens whose KV cache came from outside of the engine (LMCache and other connectors)."""
    acceptance_length: float | None = None
    """Tokens per step of speculative decoding: 1 + accepted tokens / drafts."""
    kv_cache_peak: float | None = None
    """Largest share of the KV cache seen in use; sampled, hence a lower bound of the true peak."""
    running_mean: float | None = None
    """Mean number of requests in the batch; sampled."""
    counters: Mapping[str, float] = field(default_factory=dict)
    """Every counter of the engine by its exported name, and the sums and counts of its histograms."""
    answered: bool = False
    """There is a `/metrics` with something in it."""
    receives_kv: bool = False
    """It is the decoding half of a pair: KV caches come from outside by design."""
    doubt: str | None = None
    """Why its counters are not believed; then they are all None."""
    unusable: str | None = None
    """Which of the metrics that are read have no usable value, and what they have instead."""


def software_of(text: str | None) -> str | None:
    """Return which engine a `/metrics` answer is of (`vllm`, `sglang`, `tgi`, `llama.cpp`, `tensorrt-llm`), None if unknown."""
    return software_in(read_scrape(text))


class Recorder:
    """A context manager around one round: counters before and after, KV-cache use in between."""

    def __init__(self, engine: Engine) -> None:
        """Note whose `/metrics` to read."""
        self._read: Callable[[], str | None] = engine.metrics_text
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample, name="llmperf-telemetry", daemon=True)
        self._seen: list[Scrape] = []
        """The answers before the round, in full: two, because a balancer may give the second to another replica."""
        self.last: Scrape | None = None
        """The answer after the round, once `result` was asked for."""
        self._samples: list[Scrape] = []

    def __enter__(self) -> Self:
        """Read the counters and begin to sample."""
        self._seen = [read_scrape(self._read())]
        if self._seen[0].series:
            self._seen.append(read_scrape(self._read()))
            self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End the sampling."""
        self._ended.set()
        if self._sampler.is_alive():
            self._sampler.join()

    def _sample(self) -> None:
        # The names that this engine uses: each further one costs time beside the load.
        rows = (find_row(self._seen[-1], feature) for feature in _SAMPLED)
        names = tuple({each.name for row in rows if row for each in row[1]}) or spellings(_SAMPLED)
        while not self._ended.wait(SAMPLE_INTERVAL_S):
            self._samples.append(read_series(self._read(), names))

    def result(self, caused: Caused | None = None) -> Telemetry:
        """Return what the round brought; call it after the block. Without `caused` its size is not doubted."""
        if not self._seen[0].series:
            return Telemetry()
        after = self._settled(caused)
        self.last = after
        answers = _alike([*self._seen, *self._samples, after])
        before, after = answers[len(self._seen) - 1], answers[-1]
        gauges = Telemetry(
            kv_cache_peak=max(_known(self._samples, "kv_usage"), default=None),
            running_mean=_mean(_known(self._samples, "running")),
            answered=True,
        )
        deltas = {feature: _delta(before, after, feature) for feature in COUNTERS}
        if doubt := moved(answers, caused) or implausible(deltas, caused) or foreign(deltas["requests"], caused):
            # Gauges of several engines in turn are of none of them.
            return Telemetry(answered=True, doubt=doubt)
        accepted, drafts = deltas["accepted_tokens"], deltas["drafts"]
        return replace(
            gauges,
            preemptions=deltas["preemptions"],
            prompt_tokens=deltas["prompt_tokens"],
            output_tokens=deltas["output_tokens"],
            prefix_hit_tokens=deltas["prefix_hits"],
            external_hit_tokens=deltas["external_hits"],
            acceptance_length=None if accepted is None or not drafts else 1 + accepted / drafts,
            counters=_all_deltas(before, after),
            unusable=_unusable(self._seen[0], after),
            receives_kv=any(canonical(each.name).startswith(NIXL) for each in after.series),
        )

    @property
    def first(self) -> Scrape:
        """Return the answer before the round."""
        return self._seen[0]

    def _settled(self, caused: Caused | None) -> Scrape:
        """Return the answer after the round, as soon as it has counted what the client has received."""
        after, before = read_scrape(self._read()), self._seen[-1]
        end_s = time.monotonic() + (RAY_SETTLE_S if is_through_ray(after) else SETTLE_S)
        while caused and time.monotonic() < end_s:
            counted = _delta(before, after, "output_tokens")
            if counted is None or not 0 <= counted < caused.counted_tokens:
                break
            threading.Event().wait(_ASK_AGAIN_S)
            after = read_scrape(self._read())
        return after


def foreign(requests: float | None, caused: Caused | None) -> str | None:
    """Return that the engine has served others meanwhile, as the number of its requests says; None where it may not have.

    Tokens alone don't tell where answers are short: engines may count some more than were asked for. A probe of an orchestrator
    now and then is no load, and neither are requests of the warm-up that an engine counts late.
    """
    if caused is None or requests is None or requests <= caused.requests * _SLACK + _PROBES:
        return None
    return (
        f"the engine counted {requests:,.0f} requests, though only {caused.requests:,} were sent: others send requests too,"
        " and their load is in the figures; measure where nobody else does"
    )


def restarted(earlier: Scrape | None, later: Scrape, between: str) -> str | None:
    """Return that the engine of a later answer is not the one of an earlier one, None where it may be.

    A launch is one start of an engine: what its rounds have in common is what makes them a launch. Load of others in the pause
    between two rounds is no business of either.
    """
    if earlier is None or not earlier.series or not later.series:
        return None
    what = moved(_alike([earlier, later]), None)
    if what is None:
        return None
    anew = "the engine was restarted between {}: its counters began anew, and a launch is one start of an engine"
    return anew.format(between) if "restarted" in what else f"between {between}, {what}"


def _alike(answers: Sequence[Scrape]) -> list[Scrape]:
    """Return the answers without the metrics that one of them has no usable value of: none of these is gone, or went down."""
    unusable = {name for answer in answers for name in answer.unusable}
    if not unusable:
        return list(answers)
    return [replace(answer, series=tuple(each for each in answer.series if each.name not in unusable)) for answer in answers]


def _unusable(*answers: Scrape) -> str | None:
    """Return in words what stands in place of a value of metrics that are read, None where nothing does."""
    read = spellings((*COUNTERS, *_SAMPLED))
    said = {name: value for answer in answers for name, value in answer.unusable.items() if name.startswith(read)}
    return "; ".join(f"{name} is {value}" for name, value in sorted(said.items())) or None


def _known(samples: Iterable[Scrape], feature: Feature) -> list[float]:
    values = (value_of(sample, feature) for sample in samples)
    return [value for value in values if value is not None and math.isfinite(value)]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _by_labels(series: Iterable[Series]) -> dict[frozenset[tuple[str, str]], float]:
    return {each.labels: each.value for each in series}


def _grown(old: Iterable[Series], new: Iterable[Series]) -> list[Series]:
    """Return by how much each series has grown; one that is new has grown from 0, where every counter begins."""
    earlier = _by_labels(old)
    return [replace(each, value=each.value - earlier.get(each.labels, 0.0)) for each in new]


def _delta(before: Scrape, after: Scrape, feature: Feature) -> float | None:
    """Return by how much a feature has grown, in tokens or events; None where an answer does not tell it."""
    old, new = find_row(before, feature), find_row(after, feature)
    if new is None or (old is None and not before.series):
        return None
    if old is None or old[0] != new[0]:
        # A name that only the later answer has is a counter's that began with its first event.
        old = new[0], ()
    grown = join(_grown(old[1], new[1]), new[0].ranks) * tokens_per(after, *new)
    return grown if math.isfinite(grown) else None


def _all_deltas(before: Scrape, after: Scrape) -> dict[str, float]:
    """Return by how much every counter has grown, by its exported name."""
    names = dict.fromkeys(each.name for each in after.series if after.is_cumulative(each.name))
    deltas = {}
    for name in names:
        old, new = ([each for each in scrape.series if each.name == name] for scrape in (before, after))
        grown = join(_grown(old, new))
        if math.isfinite(grown):
            deltas[name] = grown
    return deltas
