"""One launch of a search: the largest load at which the share of good requests holds.

Each probe is a round of the workload at one load, with prompts of its own. Which load is next, and when the search is over, says
`judge.maths.search`; here a round becomes a probe, and the probes a launch, whose one value is judged like any other.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pytest_llmperf.judge.maths.search import Edge, Probe, Search, conclude, next_load, provable, requests_for
from pytest_llmperf.measure import arrivals, audit, formulas, metrics
from pytest_llmperf.measure.launch import MOST_DISTURBED, Player
from pytest_llmperf.measure.metric import end_name
from pytest_llmperf.units import quantity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pytest_llmperf.measure.client.processes import LoadClient
    from pytest_llmperf.measure.client.response import RequestRecord
    from pytest_llmperf.measure.engines.engine import Engine
    from pytest_llmperf.measure.launch import Played, RoundSettings
    from pytest_llmperf.measure.measurement import Launch
    from pytest_llmperf.plan.capacity import CapacityWorkload
    from pytest_llmperf.plan.workload import Workload

_USUAL_LIMIT_S = 1.0
"""Stands in for a limit on waiting where the test names none."""
_LONGEST_S = 60.0
"""A round at a rate is no longer than this, unless it takes longer to send as many requests as prove the share."""
_FEWEST_TO_GROW = 40
_CLEAR = 4.0
"""A wait has grown when it is longer by so many standard errors of the two medians."""


@dataclass
class _Probes:
    """The rounds of a search."""

    probes: list[Probe] = field(default_factory=list)
    held: Played | None = None
    """The round at the largest load that seemed to hold; the first round while none did."""
    invalid: list[str] = field(default_factory=list)


def measure_capacity(
    engine: Engine,
    client: LoadClient,
    workload: CapacityWorkload,
    settings: RoundSettings,
    progress: Callable[[str], None] = lambda _: None,
    *,
    number: int = 1,
    start: float | None = None,
) -> Launch:
    """Return one launch: the largest load that holds, and the round at it. Its metrics are the capacity and its interval.

    `number` is that of the launch in its run: it moves the loads that are tried. `start` is what the launch before found; it
    saves rounds, and decides nothing. A failed request is not a good one; at a load that holds otherwise, and at the smallest,
    it makes the launch invalid, as whatever else does that says that the numbers are not the engine's.
    Raises EngineError and ClientError like `measure_launch`.
    """
    usual = start or math.sqrt(workload.low * workload.high)  # at the smallest rate the warm-up would take longer than a round
    player = Player(engine, client, workload.at(usual, _requests(workload, usual)), settings)
    search = Search(
        low=workload.low, high=workload.high, share=workload.share, resolution=workload.resolution,
        repeats=workload.repeats, whole=workload.varied == "concurrency", seed=f"{workload.seed}/{number}",
    )  # fmt: skip
    tried = _search(player, workload, search, start, progress)
    result = conclude(search, tried.probes) if tried.probes and not tried.invalid else None
    values = _metrics(workload, result) if result else {}
    warnings = _warnings(workload, tried, result)
    return player.launch([tried.held] if tried.held else [], values, invalid=tried.invalid, warnings=warnings)


def _search(
    player: Player, workload: CapacityWorkload, search: Search, start: float | None, progress: Callable[[str], None]
) -> _Probes:
    """Play rounds until the search is over, or one proves nothing."""
    tried = _Probes(invalid=player.warm_up())
    largest, disturbed = 0.0, 0
    while not tried.invalid and (load := next_load(search, tried.probes, start)) is not None:
        player.workload = workload.at(load, _requests(workload, load))
        played = player.round()
        if played.trouble and disturbed < MOST_DISTURBED and player.wait_until_undisturbed():
            disturbed += 1
            continue
        probe = to_probe(load, played.records, player.workload, workload.resolution)
        tried.probes.append(probe)
        good = probe.good / probe.total if probe.total else 0.0
        growing = ", its queue grows" if probe.grows else ""
        unit = metrics.find(workload.metric).unit
        progress(f"probe {len(tried.probes)}: {good:.1%} of {probe.total} good at {quantity(load, unit)}{growing}")
        holds = good >= workload.share and not probe.grows
        tried.invalid = _invalid(workload, played, served=holds or load <= workload.low)
        if tried.held is None or (holds and load >= largest):
            tried.held = played
        largest = max(largest, load if holds else 0.0)
    return tried


def _requests(workload: CapacityWorkload, load: float) -> int:
    """Return how many requests a round at this load has.

    As many as prove the share, all of them good. At a rate so many that a queue which grows by one step of the resolution passes
    the limit on waiting within the round: else a load beyond what is served looks good while the queue is short. In a closed loop
    the first wave, which comes all at once, is not judged, and two more at least follow it.
    """
    enough = workload.judged or requests_for(workload.share)
    if workload.varied == "concurrency":
        return round(load) * workload.turns + max(enough, 0 if workload.judged else 2 * round(load) * workload.turns)
    limits = [limit for name, limit in workload.slo if name in ("ttft_s", "e2e_s")]
    grown_s = min(min(limits, default=_USUAL_LIMIT_S) / workload.resolution, _LONGEST_S)
    return enough if workload.judged else max(enough, math.ceil(load * grown_s))


def to_probe(load: float, records: Sequence[RequestRecord], workload: Workload, resolution: float) -> Probe:
    """Return what a round at one load came to: how many of its requests were good, and whether its queue grew."""
    judged = list(records)
    if not workload.is_open:  # the first wave comes all at once, which users do not
        first = sorted((record for record in records if record.sent_s is not None), key=lambda record: record.sent_s or 0.0)
        wave = {id(record) for record in first[: workload.concurrency]}
        judged = [record for record in records if id(record) not in wave]
    good = sum(formulas.is_good(record, workload.slo) for record in judged)
    return Probe(load, good, len(judged), grows=workload.is_open and queue_grows(records, resolution))


def queue_grows(records: Sequence[RequestRecord], resolution: float) -> bool:
    """Return whether requests waited ever longer, as they do where more are sent than served: answers may still be in time.

    A load that is beyond the capacity by a share lengthens the wait by that share of the time that passes. The waits of the
    second and the last quarter of the requests are held against each other; the first is that in which the engine fills.
    """
    waits = sorted((record.due_s, wait) for record in records for wait in (formulas.ttft(record) or formulas.e2e(record))
                   if record.due_s is not None and record.error is None)  # fmt: skip
    if len(waits) < _FEWEST_TO_GROW:
        return False
    quarter = len(waits) // 4
    early, late = waits[quarter : 2 * quarter], waits[-quarter:]
    longer_s = statistics.median(wait for _, wait in late) - statistics.median(wait for _, wait in early)
    passed_s = statistics.fmean(due for due, _ in late) - statistics.fmean(due for due, _ in early)
    spread_s = math.hypot(*(_spread([wait for _, wait in part]) for part in (early, late)))
    return longer_s > resolution * passed_s and longer_s > _CLEAR * 1.25 * spread_s / math.sqrt(quarter)


def _spread(values: Sequence[float]) -> float:
    """Return the standard deviation as the middle half of the values tells it (1.35 sds of a normal law)."""
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 1.35


def _invalid(workload: CapacityWorkload, played: Played, *, served: bool) -> list[str]:
    """Return why a round proves nothing.

    Failed requests do at a load that is `served`, as in any other measurement; a larger one may be refused: it does not hold.
    """
    failures = [] if served else audit.failures(played.records)
    problems = [problem for problem in (*played.problems, *played.trouble) if problem not in failures]
    if unknown := formulas.unknown_limit(played.records, workload.slo):
        problems.append(f"nobody knows whether slo {unknown} was kept: every answer came in one read; is a proxy buffering them?")
    return problems


def _metrics(workload: CapacityWorkload, result: Edge) -> dict[str, float | None]:
    name = workload.metric
    return {name: result.value, end_name(name, "low"): result.low, end_name(name, "high"): result.high}


def _warnings(workload: CapacityWorkload, tried: _Probes, result: Edge | None) -> Iterator[str]:
    """Yield what the search came to in words, and what it cannot tell."""
    yield from arrivals.warnings(tried.held.complete if tried.held else ())
    unit = metrics.find(workload.metric).unit
    low, high = quantity(workload.low, unit), quantity(workload.high, unit)
    if result and result.low is None:
        share = tried.probes[-1].good / tried.probes[-1].total
        within = f"{share:.1%} of requests are within the limits, {workload.share:.1%} are wanted"
        yield f"not even {low} holds: {within}; lower the bounds"
    elif result and result.high is None:
        yield f"the largest load asked for holds: the capacity is at least {high}; raise the bound to find it"
    if tried.probes and (proves := provable(tried.probes[0].total)) < workload.share:
        yield (
            f"a round of {tried.probes[0].total} requests, all of them good, proves a share of {proves:.1%} only;"
            f" {requests_for(workload.share)} would prove {workload.share:.1%}"
        )
