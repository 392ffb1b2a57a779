"""Can the numbers be trusted? What went wrong in a round, and whether our own client was what was measured.

A problem makes a launch INVALID, never slower: it says what it was about. A warning only says what the reader should know.
"""

from __future__ import annotations

import os
import statistics
from collections import Counter
from typing import TYPE_CHECKING

from pytest_llmperf.units import percent, quantity

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pytest_llmperf.measure.client.messages import RoundLog
    from pytest_llmperf.measure.client.response import RequestRecord
    from pytest_llmperf.measure.telemetry import Telemetry
    from pytest_llmperf.plan.workload import Workload

CORES = len(os.sched_getaffinity(0))
MOST_PROCESSES = max(1, min(8, CORES // 2))
"""Load processes that are started at most: half of the cores stay the engine's."""
BUSY = 0.6
"""A load process that took this share of a core gets help, where there are cores."""
_BOTTLENECK = 0.95
"""One that took this share of a core may have been what limited the load."""
LATE_SHARE = 0.05
LATE_S = 0.02
"""Requests count as late when their mean delay is above both: this share of their mean E2E latency, and this many seconds."""
_TEMPLATE_TOKENS = 128
"""A chat template may put so many tokens in front of every prompt, which a prefix cache then finds."""
_OFF = "off: this engine"
_WAVES = 3
"""A steady window of a closed loop takes a first wave, a last one, and one between them."""
UNSTAMPED = (
    "the kernel stamped no arrivals (SO_TIMESTAMPNS), so that times are those at which the client got to read: later than the"
    " arrivals where it was busy"
)


def is_busy(log: RoundLog) -> bool:
    """Return whether another load process should help."""
    return (log.cpu_share or 0.0) > BUSY


def is_unstamped(log: RoundLog) -> bool:
    """Return whether the kernel has left arrivals without a stamp; the client's precision rests on them."""
    return log.clock_stamps > log.kernel_stamps


def failures(records: Sequence[RequestRecord], tolerated: float = 0.0) -> list[str]:
    """Return that more than a tolerated share of requests failed, with the most common reasons; empty where no more have."""
    failed = sum(record.error is not None for record in records)
    if failed <= tolerated * len(records):
        return []
    return [failed_text(records) + (f" ({percent(tolerated)} are tolerated)" if tolerated else "")]


def failed_text(records: Sequence[RequestRecord]) -> str:
    """Return how many requests failed, with the most common reasons; empty where none has."""
    errors = Counter(record.error for record in records if record.error is not None)
    shown = "; ".join(f"{count}x {error}" for error, count in errors.most_common(3))
    return f"{errors.total()} of {quantity(len(records), 'requests')} failed: {shown}" if errors else ""


def problems(log: RoundLog, telemetry: Telemetry, workload: Workload, *, ranks: int = 1) -> list[str]:
    """Return why a round must not be judged; empty for a sound one.

    Where an engine has a rank for each core of this host, none is left for the client: its lateness is then no problem.
    """
    reasons = failures(log.records, workload.tolerated_failures)
    if telemetry.doubt:
        reasons.append(telemetry.doubt)
    template = _TEMPLATE_TOKENS * len(log.records) if workload.api == "chat" else 0
    for tokens, cache in _hits(telemetry):
        if tokens > template and not workload.shares_prompts:
            reasons.append(
                f"{tokens:,.0f} prompt tokens came from {cache}, though no two prompts are alike:"
                " the endpoint was sent these prompts before; restart it or change the workload's seed"
            )
    late = lateness(log) if ranks < CORES else None
    return reasons + _of_client(log) + ([f"the client was the bottleneck: {late}"] if late else [])


def _hits(telemetry: Telemetry) -> Iterator[tuple[float, str]]:
    yield telemetry.prefix_hit_tokens or 0.0, "the prefix cache"
    if not telemetry.receives_kv:
        yield telemetry.external_hit_tokens or 0.0, "an external KV cache"


def without_source(telemetry: Telemetry, workload: Workload) -> str | None:
    """Return which audits are off because the engine does not tell what they need, in one line; None where all are on."""
    if telemetry.doubt:
        return None  # it was told, and is a problem
    if not telemetry.answered:
        return f"audits {_OFF} has no /metrics, so its prefix-cache hits, output tokens and preemptions are not known"
    hits_told = telemetry.prefix_hit_tokens is not None or workload.shares_prompts
    texts = [
        "" if hits_told else f"prefix-cache audit {_OFF} tells no hits",
        "" if telemetry.output_tokens is not None else f"output-token audit {_OFF} tells no output tokens",
        "" if telemetry.preemptions is not None else "preemptions are not known: this engine does not tell them",
    ]
    if telemetry.unusable and any(texts):
        texts.append(f"of its /metrics {telemetry.unusable}")
    return "; ".join(filter(None, texts)) or None


def is_blind(warning: str) -> bool:
    """Return whether a warning says that an audit is off."""
    return _OFF in warning


def lateness(log: RoundLog) -> str | None:
    """Return that requests were sent late, None where they were not."""
    delays = [record.delay_s for record in log.records if record.delay_s is not None]
    spans = [record.end_s - record.asked_s for record in log.records if record.end_s is not None and record.asked_s is not None]
    if not delays or not spans:
        return None
    late_s, span_s = statistics.fmean(delays), statistics.fmean(spans)
    if late_s <= max(LATE_S, LATE_SHARE * span_s):
        return None
    return (
        f"requests were sent {late_s * 1e3:.0f} ms late on average, and took {span_s * 1e3:.0f} ms;"
        " something else keeps this host's cores"
    )


def used_up(log: RoundLog, workload: Workload) -> str | None:
    """Return that a round bound by time ran out of requests before, None where it did not."""
    sent = [record.sent_s for record in log.records if record.sent_s is not None]
    stop_s = workload.stops_s
    if stop_s is None or len(log.records) < workload.requests or not sent or max(sent) - min(sent) >= stop_s:
        return None
    return (
        f"duration_s={stop_s:g}: all {workload.requests:,} requests were sent in {max(sent) - min(sent):.3g} s, and nothing for"
        " the rest of the time; give more requests"
    )


def _of_client(log: RoundLog) -> list[str]:
    texts = []
    if log.clock_set:
        texts.append("the wall clock was set during the round, and arrivals are stamped by it")
    if (log.cpu_share or 0.0) > _BOTTLENECK:
        texts.append(
            f"the client was the bottleneck: the busiest of {log.processes} load processes took {log.cpu_share:.0%} of a core;"
            " give this host more cores, or send less"
        )
    return texts


def warnings(workload: Workload, rounds: Sequence[Mapping[str, float | None]]) -> tuple[str, ...]:
    """Return what a reader should know of a launch's rounds."""
    reasons = []
    if rounds and not workload.is_open and workload.requests < _WAVES * workload.concurrency:
        reasons.append(
            f"no steady window: {quantity(workload.requests, 'requests')} {'is' if workload.requests == 1 else 'are'}"
            f" {quantity(workload.requests / workload.concurrency, 'waves')} of"
            f" {workload.concurrency}, and throughput is that of filling and emptying the engine too;"
            f" {_WAVES * workload.concurrency} requests or more have one"
        )
    # What is not told at all (an empty mapping) is not known to be missing.
    if rounds and workload.is_open and all(each.get("in_flight_mean", 0.0) is None for each in rounds):
        reasons.append(
            "no steady window: the last request was sent before the first was answered, or soon after; throughput is that of"
            " filling and emptying the engine too; more requests have a window"
        )
    return (*reasons, *workload.left_out)
