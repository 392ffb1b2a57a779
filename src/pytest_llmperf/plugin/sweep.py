"""The fixture `llmperf_sweep`: one workload at every TP degree, inside one test.

Each degree is a case of its own, with its own baseline; a test that only wants each degree by itself is parametrized by TP.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_llmperf.plugin.fixtures import acquire_engine, add_launch, own_spec, state_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pytest_llmperf.judge.scaling import Scaling
    from pytest_llmperf.measure.host.machine import Host
    from pytest_llmperf.plan.case import Case
    from pytest_llmperf.plan.engine import EngineSpec
    from pytest_llmperf.plugin.collection import Planned
    from pytest_llmperf.plugin.run import CaseState, Run
    from pytest_llmperf.report.outcome import Outcome

LEFT_OUT: pytest.StashKey[list[Outcome]] = pytest.StashKey()
"""What a test says of the degrees that this host cannot run, beside the outcomes of those that it measured."""
_LEAST = 2
"""Degrees that a sweep needs: one says nothing about scaling."""


@dataclass(frozen=True)
class Degrees:
    """The TP degrees of a sweep on this host."""

    able: tuple[int, ...]
    """Those that it can run, the smallest first."""
    unfit: dict[int, str]
    """The others, with the reason."""
    lacking: tuple[int, ...]
    """Those of `unfit` that marker or option name, and that more or other GPUs would run; not those that a model does not fit."""


def degrees_of(plan: Planned, spec: EngineSpec, selected: Mapping[str, tuple[Any, ...]], host: Host) -> Degrees:
    """Return the degrees of a planned sweep: those of marker and option, else powers of two up to what the host has."""
    from pytest_llmperf.measure.host.preflight import device_shortage, shortage
    from pytest_llmperf.plugin.collection import named_degrees

    named = named_degrees(plan.marker, selected)
    devices = (len(host.gpus) or host.cores) // (spec.pp * spec.dp)
    powers = tuple(2**power for power in range(max(_LEAST, devices.bit_length())))
    wanted = powers if named is None else named
    needs = plan.marker.needs
    short = {degree: shortage(replace(spec, tp=degree), host, needs) for degree in wanted}
    unfit = {degree: reason for degree, reason in short.items() if reason}
    lacking = tuple(degree for degree in named or () if device_shortage(replace(spec, tp=degree), host, needs))
    return Degrees(tuple(degree for degree in wanted if degree not in unfit), unfit, lacking)


def suffix(degree: int, call: int = 1) -> str:
    """Return what a degree's case id has behind that of its test; `call` counts the sweeps of one test."""
    return f"#tp{degree}" if call == 1 else f"#{call}-tp{degree}"


class Sweep:
    """The `llmperf_sweep` fixture: call it with the workload, and get the scaling."""

    def __init__(
        self, request: pytest.FixtureRequest, spec: EngineSpec, degrees: Degrees, log_folder: Path, defaults: dict[str, Any]
    ) -> None:
        """Note the test, its engine at any degree, and the degrees; nothing is started yet."""
        self.degrees = degrees.able
        """The TP degrees that are measured, the smallest first."""
        self._request = request
        self._spec = spec
        self._unfit = degrees.unfit
        self._log_folder = log_folder
        self._defaults = defaults
        self._calls = 0

    def __call__(self, **workload: Any) -> Scaling:
        """Measure a workload at every degree, the arguments being the fields of `traffic.Workload`, and return the scaling.

        One engine after the other is started, in the order that starts fewest. Fails the test as `llmperf` does, at the first
        degree that cannot be measured.
        """
        from pytest_llmperf.judge.scaling import scaling_of
        from pytest_llmperf.plan.arguments import workload_from
        from pytest_llmperf.plan.case import Case
        from pytest_llmperf.plan.checks import PlanError
        from pytest_llmperf.plugin.collection import PLANNED

        self._calls += 1
        plan = self._request.node.stash[PLANNED]
        try:
            wanted = workload_from(plan.axes, self._defaults, workload, folder=self._request.path.parent)
        except PlanError as error:
            pytest.fail(str(error), pytrace=False)
        cases = {
            degree: Case(plan.case_id + suffix(degree, self._calls), replace(self._spec, tp=degree), wanted)
            for degree in self.degrees
        }
        try:
            states = {degree: self._measured(cases[degree]) for degree in self._order(cases)}
        finally:
            self._tell_in_order([case.id for case in cases.values()])
        return scaling_of((states[degree].measurement for degree in self.degrees), unfit=self._unfit)

    def _tell_in_order(self, ids: list[str]) -> None:
        """Have the report name these cases in this order, whatever was measured first."""
        from pytest_llmperf.plugin.protocol import STATES

        told = self._request.node.stash[STATES]
        places = [place for place, state in enumerate(told) if state.case.id in ids]
        ordered = sorted((told[place] for place in places), key=lambda state: ids.index(state.case.id))
        for place, state in zip(places, ordered, strict=True):
            told[place] = state

    def _order(self, cases: dict[int, Case]) -> list[int]:
        """Return the degrees as they are measured: that of the running engine, then downwards to the second smallest.

        Tests are grouped by engine, the small degrees mostly first: the engine that is left is likely to be the next one's.
        """
        from pytest_llmperf.plugin.run import RUN
        from pytest_llmperf.plugin.session import POOL

        pool, known = self._request.config.stash[POOL], self._request.config.stash[RUN].states

        def is_up(case: Case) -> bool:
            """Return whether the running engine can serve the case, which it cannot twice."""
            return case.engine == pool.spec and (case.id not in known or pool.starts not in known[case.id].starts)

        first = next((degree for degree, case in cases.items() if is_up(case)), self.degrees[0])
        return [first, *(degree for degree in reversed(self.degrees) if degree != first)]

    def _measured(self, case: Case) -> CaseState:
        state = state_of(self._request, case)
        if not state.decided:
            engine = acquire_engine(self._request, self._log_folder, case.engine, state.starts)
            add_launch(self._request, engine, state)
        return state


@pytest.fixture
def llmperf_sweep(
    request: pytest.FixtureRequest,
    llmperf_axes: object,  # parametrizes the test
    llmperf_logs: Path,
    llm_engine_args: dict[str, Any],
    llm_engine_url: str | None,
    llm_workload: dict[str, Any],
) -> Sweep:
    """Return a callable that measures a workload at every TP degree of the test; see docs/scaling.md."""
    from pytest_llmperf.plugin.collection import PLANNED
    from pytest_llmperf.plugin.run import RUN

    plan, run = request.node.stash[PLANNED], request.config.stash[RUN]
    if other := {"llmperf", "llm_engine"}.intersection(request.fixturenames):
        pytest.fail(f"llmperf_sweep and {other.pop()} each start engines of their own: use one of them in a test", pytrace=False)
    spec = own_spec(plan.spec, llm_engine_args, llm_engine_url)
    if spec.kind == "url":
        pytest.skip("llmperf_sweep starts engines at several TP degrees, and an endpoint has the one that it was started with")
    degrees = degrees_of(plan, spec, run.settings.selected, run.host)
    _require(plan, degrees, run)
    request.node.stash[LEFT_OUT] = [_left_out(plan, replace(spec, tp=degree), why) for degree, why in degrees.unfit.items()]
    return Sweep(request, spec, degrees, llmperf_logs, llm_workload)


def _require(plan: Planned, degrees: Degrees, run: Run) -> None:
    """Skip a sweep that has too few degrees; under --llmperf-require-gpus fail it, and one that lacks GPUs for a named degree."""
    allowed = plan.marker.axes.get("tp")
    if allowed is not None and len(set(allowed)) < _LEAST:
        pytest.fail(f"llmperf(tp={allowed[0]}): a sweep needs two TP degrees or more, e.g. tp=[1, 2, 4]", pytrace=False)
    unfit = "; ".join(f"TP {degree} {why}" for degree, why in degrees.unfit.items())
    few = len(degrees.able) < _LEAST
    if run.settings.require_gpus and (degrees.lacking or (few and unfit)):
        pytest.fail(f"{unfit}; --llmperf-require-gpus turns this into a failure", pytrace=False)
    if few:
        left = f"TP {degrees.able[0]}" if degrees.able else "none"
        why = unfit or "--llmperf-tp leaves no other: name two or more" + (
            f" of those that the marker allows ({', '.join(map(str, allowed))})" if allowed else ""
        )
        pytest.skip(f"a sweep needs two TP degrees or more, this one has {left}: {why}")


def _left_out(plan: Planned, spec: EngineSpec, why: str) -> Outcome:
    from pytest_llmperf.judge.baseline import engine_facts
    from pytest_llmperf.judge.verdict import Status, Verdict
    from pytest_llmperf.plan.case import Case
    from pytest_llmperf.plan.workload import Workload
    from pytest_llmperf.report.outcome import Outcome

    case_id = plan.case_id + suffix(spec.tp)
    engine = engine_facts(Case(case_id, spec, Workload()))
    return Outcome(case_id, plan.case_id, Status.SKIPPED, Verdict(Status.SKIPPED, reasons=(why,)), (), engine, {})
