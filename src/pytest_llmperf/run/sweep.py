"""Sweeps: one workload at every TP degree, inside one test. Each degree is a case of its own, with its own baseline."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pytest_llmperf.measure.host.preflight import device_shortage, shortage

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pytest_llmperf.measure.host.machine import Host
    from pytest_llmperf.plan.case import Case
    from pytest_llmperf.plan.engine import EngineSpec
    from pytest_llmperf.plan.marker import Marker
    from pytest_llmperf.run.cases import CaseState, Planned

LEAST_DEGREES = 2
"""Degrees that a sweep needs: one says nothing about scaling."""
MOST_DEGREES = tuple(2**power for power in range(7))
"""TP degrees that are looked for among the baselines of any host, where a sweep names none."""
_MOST_MEASUREMENTS = 9
"""How many measurements of one test are looked for among the stored baselines when the comparisons are counted."""


@dataclass(frozen=True)
class Degrees:
    """The TP degrees of a sweep on this host."""

    able: tuple[int, ...]
    """Those that it can run, the smallest first."""
    unfit: dict[int, str]
    """The others, with the reason."""
    lacking: tuple[int, ...]
    """Those of `unfit` that marker or option name, and that more or other GPUs would run; not those that a model does not fit."""


def named_degrees(marker: Marker, selected: Mapping[str, tuple[Any, ...]]) -> tuple[int, ...] | None:
    """Return the TP degrees of a sweep, the smallest first: the marker's that the option selects; None if neither names any."""
    allowed, asked = marker.axes.get("tp"), selected.get("tp")
    if allowed is None and asked is None:
        return None
    return tuple(sorted({degree for degree in allowed or asked or () if asked is None or degree in asked}))


def degrees_of(plan: Planned, spec: EngineSpec, selected: Mapping[str, tuple[Any, ...]], host: Host) -> Degrees:
    """Return the degrees of a planned sweep: those of marker and option, else powers of two up to what the host has."""
    named = named_degrees(plan.marker, selected)
    devices = (len(host.gpus) or host.cores) // (spec.pp * spec.dp)
    powers = tuple(2**power for power in range(max(LEAST_DEGREES, devices.bit_length())))
    wanted = powers if named is None else named
    needs = plan.marker.needs
    short = {degree: shortage(replace(spec, tp=degree), host, needs) for degree in wanted}
    unfit = {degree: reason for degree, reason in short.items() if reason}
    lacking = tuple(degree for degree in named or () if device_shortage(replace(spec, tp=degree), host, needs))
    return Degrees(tuple(degree for degree in wanted if degree not in unfit), unfit, lacking)


def refusal(marker: Marker, degrees: Degrees, *, require_gpus: bool) -> tuple[str | None, str | None]:
    """Return why a sweep must fail, and why it is skipped; None for what is not so.

    It has too few degrees; or, where GPUs are required, it lacks some for a degree that is named.
    """
    allowed = marker.axes.get("tp")
    if allowed is not None and len(set(allowed)) < LEAST_DEGREES:
        return f"llmperf(tp={allowed[0]}): a sweep needs two TP degrees or more, e.g. tp=[1, 2, 4]", None
    unfit = "; ".join(f"TP {degree} {why}" for degree, why in degrees.unfit.items())
    few = len(degrees.able) < LEAST_DEGREES
    if require_gpus and (degrees.lacking or (few and unfit)):
        return f"{unfit}; --llmperf-require-gpus turns this into a failure", None
    if not few:
        return None, None
    left = f"TP {degrees.able[0]}" if degrees.able else "none"
    why = unfit or "--llmperf-tp leaves no other: name two or more" + (
        f" of those that the marker allows ({', '.join(map(str, allowed))})" if allowed else ""
    )
    return None, f"a sweep needs two TP degrees or more, this one has {left}: {why}"


def suffix(degree: int, call: int = 1) -> str:
    """Return what a degree's case id has behind that of its test; `call` counts the sweeps of one test."""
    return f"#tp{degree}" if call == 1 else f"#{call}-tp{degree}"


def numbered(case_id: str, degrees: Sequence[int] | None) -> Iterator[list[str]]:
    """Yield the ids that the first, second, ... measurement of a test would have; a sweep's has one for each of its degrees."""
    for number in range(1, _MOST_MEASUREMENTS + 1):
        plain = case_id if number == 1 else f"{case_id}#{number}"
        yield [plain] if degrees is None else [case_id + suffix(degree, number) for degree in degrees]


def order(cases: Mapping[int, Case], states: Mapping[str, CaseState], running: EngineSpec | None, start: int) -> list[int]:
    """Return the degrees as they are measured: that of the running engine, then downwards to the second smallest.

    Tests are grouped by engine, the small degrees mostly first: the engine that is left is likely to be the next one's.
    `start` is the number of the running engine, which cannot serve a case twice.
    """

    def can_serve(case: Case) -> bool:
        return case.engine == running and (case.id not in states or start not in states[case.id].starts)

    degrees = list(cases)
    first = next((degree for degree, case in cases.items() if can_serve(case)), degrees[0])
    return [first, *(degree for degree in reversed(degrees) if degree != first)]
