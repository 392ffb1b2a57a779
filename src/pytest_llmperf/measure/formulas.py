"""From the records of requests to numbers: the samples that metrics are computed from, and their formulas.

A formula returns None for what could not be measured. The table of metrics, which names them, is in `metrics.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from pytest_llmperf.measure.arrivals import clumps, gaps, time_per_token

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_llmperf.measure.client.response import RequestRecord
    from pytest_llmperf.measure.gpus.memory import RankMemory
    from pytest_llmperf.measure.gpus.summary import GpuRound
    from pytest_llmperf.measure.kv_cache import Capacity
    from pytest_llmperf.measure.telemetry import Telemetry

_SHORTEST_WINDOW = 0.1
"""A window that is a smaller share of its round is not steady: that between two neighbouring reads gives any rate, 0 too."""


@dataclass(frozen=True)
class RoundSample:
    """What a round's metrics are computed from."""

    records: tuple[RequestRecord, ...]
    telemetry: Telemetry
    classes: tuple[str, ...] = ()
    """The class of each request; empty where there are none."""
    concurrency: int | None = None
    """Requests kept in flight; None in an open loop."""
    slo: tuple[tuple[str, float], ...] = ()
    cpu_share: float | None = None
    """Share of a core that the busiest load process took."""
    gpus: GpuRound | None = None
    """What the engine's GPUs did; None for an engine without, or one that the plugin did not start."""

    @cached_property
    def complete(self) -> list[RequestRecord]:
        """Return the requests that were answered in full."""
        return [record for record in self.records if record.error is None]

    @property
    def duration_s(self) -> float | None:
        """Return the seconds from the first request sent to the last response complete."""
        sent = [record.sent_s for record in self.complete if record.sent_s is not None]
        ends = [record.end_s for record in self.complete if record.end_s is not None]
        return max(ends) - min(sent) if sent and ends else None

    @cached_property
    def steady(self) -> tuple[float, float] | None:
        """Return the window in which the load is full: None where there are too few requests for one, or it is too short.

        It begins when as many requests as are kept in flight have been answered (in an open loop, the first), so that the
        first wave, which comes all at once, is over, and ends when the last request is sent.
        """
        ends = sorted(record.end_s for record in self.complete if record.end_s is not None)
        sent = [record.sent_s for record in self.complete if record.sent_s is not None]
        first = (self.concurrency or 1) - 1
        if len(ends) <= first or not sent:
            return None
        window_s, round_s = max(sent) - ends[first], ends[-1] - min(sent)
        return (ends[first], max(sent)) if window_s > 0 and window_s >= _SHORTEST_WINDOW * round_s else None

    def of_class(self, name: str) -> RoundSample:
        """Return the sample of one class of requests."""
        return replace(self, records=_of_class(self.records, self.classes, name), classes=())


@dataclass(frozen=True)
class LaunchSample:
    """What the metrics of a launch as a whole are computed from."""

    startup_s: float | None
    capacity: Capacity
    complete: tuple[RequestRecord, ...] = ()
    """The requests of all its rounds that were answered in full."""
    classes: tuple[str, ...] = ()
    """The class of each of them; empty where there are none."""
    memory: tuple[RankMemory, ...] = ()
    """The GPU memory of each rank; empty on CPU."""

    def of_class(self, name: str) -> LaunchSample:
        """Return the sample of one class of requests."""
        return replace(self, complete=_of_class(self.complete, self.classes, name), classes=())


def _of_class(records: Sequence[RequestRecord], classes: Sequence[str], name: str) -> tuple[RequestRecord, ...]:
    return tuple(record for record, group in zip(records, classes, strict=True) if group == name)


def rate(amount: Callable[[RequestRecord], float | None]) -> Callable[[RoundSample], float | None]:
    """Return a formula: what an amount of the complete requests comes to in a second; None where one's is not known."""

    def of_round(sample: RoundSample) -> float | None:
        duration_s, amounts = sample.duration_s, [amount(record) for record in sample.complete]
        known = [value for value in amounts if value is not None]
        return sum(known) / duration_s if duration_s and len(known) == len(amounts) else None

    return of_round


def all_tokens(record: RequestRecord) -> float | None:
    """Return prompt and output tokens; None where the server tells only one of them."""
    if record.prompt_tokens is None or record.output_tokens is None:
        return None
    return record.prompt_tokens + record.output_tokens


def ttft(record: RequestRecord) -> list[float]:
    """Return the seconds to the first token, from the instant that latencies count from; empty without a token."""
    if record.asked_s is None or record.first_token_s is None:
        return []
    return [record.first_token_s - record.asked_s]


def itl(record: RequestRecord) -> list[float]:
    """Return the seconds between arrivals; tokens of one read are one arrival."""
    return gaps(record)


def tpot(record: RequestRecord) -> list[float]:
    """Return the seconds per token behind the first; empty for fewer than two tokens, and where nothing was between them."""
    value_s = time_per_token(record)
    return [] if value_s is None else [value_s]


def e2e(record: RequestRecord) -> list[float]:
    """Return the seconds to the complete response."""
    return [record.end_s - record.asked_s] if record.asked_s is not None and record.end_s is not None else []


def sent_ttft(record: RequestRecord) -> list[float]:
    """Return the seconds to the first token from sending, where requests are sent at a rate."""
    # Only an open loop has both: elsewhere it would say the same again.
    return [record.first_token_s - record.sent_s] if record.due_s and record.sent_s and record.first_token_s else []


def sent_e2e(record: RequestRecord) -> list[float]:
    """Return the seconds to the complete response from sending, where requests are sent at a rate."""
    return [record.end_s - record.sent_s] if record.due_s and record.sent_s and record.end_s else []


def delay(record: RequestRecord) -> list[float]:
    """Return how many seconds too late the request was sent."""
    return [record.delay_s] if record.delay_s is not None else []


def steady_rate(sample: RoundSample) -> float | None:
    """Return output tokens per second in the steady window."""
    timed = all(len(record.token_times_s) == record.output_tokens for record in sample.complete)
    if sample.steady is None or not timed:
        return None  # without a stream, or with events of unknown length, nobody knows when a token came
    begin_s, end_s = sample.steady
    came = sum(begin_s < at_s <= end_s for record in sample.complete for at_s in record.token_times_s)
    # An engine that had work all the time made some: none came where answers are held back to their end.
    return came / (end_s - begin_s) if came else None


def in_flight(sample: RoundSample) -> float | None:
    """Return the mean number of requests in flight, in the steady window: Little's law says it is rate times latency."""
    if sample.steady is None:
        return None
    begin_s, end_s = sample.steady
    spans = [(r.sent_s, r.end_s) for r in sample.complete if r.sent_s is not None and r.end_s is not None]
    return sum(max(0.0, min(end, end_s) - max(start, begin_s)) for start, end in spans) / (end_s - begin_s)


def jain(sample: RoundSample) -> float | None:
    """Return Jain's index of the requests' speeds (R. Jain, DEC-TR-301, 1984); None for a single one, which is fair to itself."""
    speeds = [(record.output_tokens or 0) / seconds for record in sample.complete for seconds in e2e(record) if seconds > 0]
    squares = sum(speed * speed for speed in speeds)
    return sum(speeds) ** 2 / (len(speeds) * squares) if squares and len(speeds) > 1 else None


_LIMITED = {"ttft_s": ttft, "itl_s": itl, "tpot_s": tpot, "e2e_s": e2e}


def is_good(record: RequestRecord, slo: tuple[tuple[str, float], ...]) -> bool:
    """Return whether a request was complete and kept to every limit; one that has no such value has kept to it."""
    return record.error is None and all(value <= limit for name, limit in slo for value in _LIMITED[name](record))


def unknown_limit(records: Sequence[RequestRecord], slo: tuple[tuple[str, float], ...]) -> str | None:
    """Return the limit of which nobody knows whether it was kept: no answer of several tokens has such a value."""
    several = [record for record in records if record.error is None and (record.output_tokens or 0) > 1]
    return next((name for name, _ in slo if several and not any(_LIMITED[name](record) for record in several)), None)


def good_requests(sample: RoundSample) -> float | None:
    """Return how many requests were complete and kept to every limit; None where that is not known."""
    if not sample.slo or unknown_limit(sample.complete, sample.slo):
        return None
    return sum(is_good(record, sample.slo) for record in sample.complete)


def goodput(sample: RoundSample) -> float | None:
    """Return requests per second that kept to every limit; None where there are none."""
    good, duration_s = good_requests(sample), sample.duration_s
    return good / duration_s if good is not None and duration_s else None


def good_share(sample: RoundSample) -> float | None:
    """Return the share of requests that kept to every limit; None where there are none."""
    good = good_requests(sample)
    return good / len(sample.records) if good is not None and sample.records else None


def energy_per_token(sample: RoundSample) -> float | None:
    """Return joules of all the engine's GPUs per output token."""
    tokens = sum(record.output_tokens or 0 for record in sample.complete)
    return sample.gpus.energy_j / tokens if sample.gpus and sample.gpus.energy_j is not None and tokens else None


def of_gpus(name: str) -> Callable[[RoundSample], float | None]:
    """Return a formula: a field of `GpuRound`."""
    return lambda sample: getattr(sample.gpus, name) if sample.gpus else None


def _peaks(sample: LaunchSample) -> list[int] | None:
    """Return the peak of every rank, None where one is not known."""
    known = [rank.peak_bytes for rank in sample.memory if rank.peak_bytes]  # a rank that uses nothing was not seen
    return known if known and len(known) == len(sample.memory) else None


def peak_memory(sample: LaunchSample) -> float | None:
    """Return the bytes of the fullest rank."""
    peaks = _peaks(sample)
    return float(max(peaks)) if peaks else None


def memory_balance(sample: LaunchSample) -> float | None:
    """Return how much the emptiest rank holds of what the fullest does; None for a single rank."""
    peaks = _peaks(sample)
    return min(peaks) / max(peaks) if peaks and len(peaks) > 1 and max(peaks) else None


def memory_growth(sample: LaunchSample) -> float | None:
    """Return the bytes by which the rank that grew most has grown from the first round's end to the last's."""
    grown = [rank.grown_bytes for rank in sample.memory if rank.grown_bytes is not None]
    return float(max(grown)) if grown else None


def shared_arrivals(sample: RoundSample) -> float | None:
    """Return the share of tokens that came in one read with the token before them."""
    tokens = sum(len(record.token_times_s) for record in sample.complete)
    return 1 - sum(len(set(record.token_times_s)) for record in sample.complete) / tokens if tokens else None


def mean(values: Sequence[float]) -> float:
    """Return the mean."""
    return float(np.mean(values))


def percentile(percent: float) -> Callable[[Sequence[float]], float]:
    """Return what computes a percentile, interpolated linearly."""
    return lambda values: float(np.percentile(values, percent))


def deviation(values: Sequence[float]) -> float:
    """Return the standard deviation."""
    return float(np.std(values))


def spread(
    times: Callable[[RequestRecord], list[float]], reduce: Callable[[Sequence[float]], float]
) -> Callable[[RoundSample | LaunchSample], float | None]:
    """Return a formula: a statistic over the times of all complete requests.

    Of tokens that come in clumps the mean gap is known, and no percentile: it is that within a clump, or that between two.
    """

    def of_sample(sample: RoundSample | LaunchSample) -> float | None:
        values = [value for record in sample.complete for value in times(record)]
        if not values or (times is itl and reduce is not mean and clumps(values)):
            return None
        return reduce(values)

    return of_sample
