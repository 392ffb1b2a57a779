"""Do the gates fire? Known changes are injected into stored samples, and the verdict on each is held against what it must be.

A gate with its direction the wrong way round, or one that adds two tolerances, is green for years; nobody finds out by
measuring.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_llmperf.judge.baseline import REMEDY, BaselineError
from pytest_llmperf.judge.gates import judged
from pytest_llmperf.judge.lacking import applies, unexplained
from pytest_llmperf.judge.provenance import Provenance
from pytest_llmperf.judge.verdict import Status, judge
from pytest_llmperf.measure.measurement import Measurement, Round
from pytest_llmperf.plan.case import Case
from pytest_llmperf.plan.engine import EngineSpec
from pytest_llmperf.plan.lengths import OWN, Lengths, parse_lengths
from pytest_llmperf.plan.workload import RequestClass, Workload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from pytest_llmperf.judge.baseline import Baseline
    from pytest_llmperf.judge.gates import Tolerance
    from pytest_llmperf.judge.maths.stats import Design
    from pytest_llmperf.judge.noise import Belief
    from pytest_llmperf.measure.measurement import Launch
    from pytest_llmperf.measure.metrics import Metric

_SHARES = (0.05, 0.10, 0.20)
_EVENTS = 1.0
"""What `decide_count` allows beyond the tolerance, in events a round."""


@dataclass(frozen=True)
class Check:
    """One change injected into one gating metric."""

    metric: str
    change: str
    status: Status
    fault: str | None
    """What is wrong with the gate; None where it did what it must."""


@dataclass(frozen=True)
class _Injection:
    change: str
    apply: Callable[[float], float | None]
    wanted: Callable[[Status], str | None]
    """Returns the fault of a gate with this status."""


def self_test(stored: Baseline, gated: Mapping[str, Tolerance], design: Design, beliefs: Mapping[str, Belief]) -> list[Check]:
    """Return what each gate says of known changes of its metric; the baseline's own launches stand in for the run's."""
    if stored.doubts:
        return [Check("every gate", "none", Status.NOT_COMPARABLE, doubt) for doubt in stored.doubts]
    checks = []
    case = _case(stored)
    # Its engine and workload are not at hand, and are the stored ones by definition.
    stored = replace(stored, workload_fingerprint=case.workload.fingerprint, provenance=Provenance({}))
    for name, gate in gated.items():
        metric = judged(name, gate)
        values = [value for launch in stored.launches for value in launch.values(name) if value is not None]
        if not values:
            gone = unexplained(metric, stored, measured=applies(metric, stored.launches))
            fault = "the baseline has no such metric: the gate can never fire" if gate.asked else gone
            checks.append(Check(name, "none", Status.NOT_COMPARABLE, fault))
            continue
        for injection in _injections(metric, gate.share, sum(values) / len(values)):
            measured = Measurement(case, _changed(stored, metric, injection.apply, design.launches))
            verdict = judge(measured, stored, design=design, gated={name: gate}, beliefs=beliefs)
            status = next(row.status for row in verdict.metrics if row.metric == name) or verdict.status
            checks.append(Check(name, injection.change, status, injection.wanted(status)))
    return checks


def _case(stored: Baseline) -> Case:
    """Return the case as far as verdicts ask for it: how many values a percentile has. Raises BaselineError for damaged data."""
    try:
        return _case_of(stored)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise BaselineError(f"{stored.case_id}: its baseline's workload is unusable ({error}); {REMEDY}") from error


def _case_of(stored: Baseline) -> Case:
    known = {name: stored.workload[name] for name in ("requests",) if name in stored.workload}
    known["output_tokens"] = _lengths(stored.workload.get("output_tokens", Workload.output_tokens))
    classes = tuple(
        RequestClass(stored_class["name"], stored_class["share"], 1, _lengths(stored_class["output_tokens"]))
        for stored_class in stored.workload.get("classes", ())
    )
    return Case(stored.case_id, EngineSpec(), Workload(**known, concurrency=1, classes=classes))


def _lengths(stored: Any) -> int | Lengths:
    """Return lengths as they are stored; those of a file or a dataset, which is not at hand, are the usual ones."""
    not_at_hand = "file(" in str(stored) or stored == OWN
    return parse_lengths("output_tokens", Workload.output_tokens if not_at_hand else stored, Path())


def _changed(stored: Baseline, metric: Metric, apply: Callable[[float], float | None], count: int) -> tuple[Launch, ...]:
    def changed(metrics: dict[str, float | None]) -> dict[str, float | None]:
        value = metrics.get(metric.name)
        return metrics if value is None else {**metrics, metric.name: apply(value)}

    return tuple(
        replace(launch, metrics=changed(launch.metrics), rounds=tuple(Round(changed(each.metrics)) for each in launch.rounds))
        for launch in islice(cycle(stored.launches), count)
    )


def _injections(metric: Metric, tolerance: float, typical: float) -> Iterator[_Injection]:
    # Not asked of the table where the unit tells: a wrong direction there is what must be found.
    higher = metric.better == "higher" if metric.unit != "s" and not metric.unit.endswith("/s") else metric.unit != "s"
    sign, events, exact = (-1 if higher else 1), metric.kind == "count", metric.kind == "exact"

    def scaled(factor: float) -> Callable[[float], float | None]:
        return lambda value: float(round(value * factor)) if events else value * factor

    def limit() -> float:
        return tolerance + _EVENTS / typical if events and typical else tolerance

    yield _Injection("unchanged", scaled(1.0), _not_red)
    for share in _SHARES:
        if not events or typical:
            # An exact metric's allowance is in its own unit, and belongs to it.
            must = _red if share > limit() or (share == limit() and not exact) else _not_red if share < limit() / 2 else _anything
            yield _Injection(f"{share:.0%} worse", scaled(1 + sign * share if exact else (1 + share) ** sign), must)
            yield _Injection(f"{share:.0%} better", scaled(1 - sign * share if exact else (1 + share) ** -sign), _not_red)
    if events:
        yield _Injection("twice as many and 5 a round", lambda value: 2 * value + 5 * sign, _red)
    yield _Injection("missing", lambda _: None, _not_compared)
    yield _Injection("not a number", lambda _: float("nan"), _not_compared)
    if not events or typical > 1:
        yield _Injection("unit 1000 times smaller", scaled(1000.0), _not_green if not events else _anything)
        yield _Injection("unit 1000 times larger", scaled(0.001), _not_green if not events else _anything)
    yield _Injection("zero", lambda _: 0.0, _anything if events else _not_green)


def _red(status: Status) -> str | None:
    return None if status is Status.REGRESSED else f"does not fire: {status}"


def _not_red(status: Status) -> str | None:
    return f"fires where it must not: {status}" if status in (Status.REGRESSED, Status.NOT_COMPARABLE) else None


def _not_compared(status: Status) -> str | None:
    return None if status is Status.NOT_COMPARABLE else f"is not noticed: {status}"


def _not_green(status: Status) -> str | None:
    return f"is not noticed: {status}" if status.green else None


def _anything(_: Status) -> str | None:
    return None
