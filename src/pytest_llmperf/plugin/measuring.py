"""What tests call: a measurement, a sweep, and the baseline to compare them with.

The run decides; here its values and errors become pytest's: a test that fails, is skipped, or runs again.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_llmperf.judge.causes import likely_cause
from pytest_llmperf.measure.client.messages import ClientError
from pytest_llmperf.measure.engines.engine import EngineError
from pytest_llmperf.measure.measurement import Measurement
from pytest_llmperf.plan.arguments import workload_from
from pytest_llmperf.plan.capacity import capacity_from
from pytest_llmperf.plan.case import Case
from pytest_llmperf.plan.checks import PlanError
from pytest_llmperf.plan.kinds import kind_in_file, kind_of
from pytest_llmperf.report.scaling import Scaling, scaling_assertion, scaling_of
from pytest_llmperf.report.text import assertion
from pytest_llmperf.run.cases import RunError
from pytest_llmperf.run.judging import compare
from pytest_llmperf.run.launches import other_engine
from pytest_llmperf.run.outcomes import outcome_of
from pytest_llmperf.run.sweep import order, suffix

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pytest_llmperf.measure.engines.engine import Engine
    from pytest_llmperf.plan.engine import EngineSpec
    from pytest_llmperf.plan.marker import Marker
    from pytest_llmperf.plan.workload import Workload
    from pytest_llmperf.run.cases import CaseState
    from pytest_llmperf.run.launches import Bench, Run
    from pytest_llmperf.run.sweep import Degrees


class Undecided(BaseException):
    """A test cannot be told yet: it will run again on another engine start. Not an Exception, so that no test swallows it."""


@contextlib.contextmanager
def failing() -> Iterator[None]:
    """Fail the test with what happens inside: a message for its author, without our own traceback.

    Of an engine's error that is the likely cause too, and the last lines of the log.
    """
    try:
        yield
    except (PlanError, RunError, EngineError, ClientError) as error:
        cause = likely_cause("\n".join((error.what, *error.causes, error.tail))) if isinstance(error, EngineError) else None
        text = f"Likely cause: {cause}.\n{error}" if cause else str(error)
        pytrace = isinstance(error, RunError) and error.line_matters
        raise pytest.fail.Exception(text, pytrace=pytrace) from None  # pytest would show the error twice


class LLMPerf:
    """The `llmperf` fixture: call it with the workload, and get the measurement."""

    def __init__(self, bench: Bench, engine: Engine, defaults: dict[str, Any], folder: Path) -> None:
        """Note the test and its engine; files of workloads are relative to `folder`."""
        self._bench = bench
        self._engine = engine
        self._own = engine.spec
        self._defaults = defaults
        self._folder = folder
        self._calls = 0

    def __call__(self, *, engine: str | None = None, engine_args: Any = None, **workload: Any) -> Measurement:
        """Measure a workload, the arguments being the fields of `Workload`, and return the launches.

        `engine="offline"` measures it on `vllm.LLM`, with the same arguments and without a server, and `engine="server"` on a
        server. `engine_args` are engine arguments over those of the test's own engine, in the marker's forms. Such an engine is
        started in the place of the test's own, which starts again when a call asks for neither.
        Fails the test when a request failed, when the engine died, or when anything else makes the numbers worthless.
        """
        with failing():
            plan = self._bench.plan
            wanted = workload_from(plan.axes, self._defaults, plan.arguments, workload, folder=self._folder)
            return self._measured(wanted, other_engine(self._own, engine, engine_args), engine)

    def capacity(self, **search: Any) -> Measurement:
        """Find the largest load at which a share of the requests keeps every limit, and return the launches.

        `slo={"ttft_s": 0.5}`, and `rate=(1, 64)` or `concurrency=(1, 256)`, the bounds of the search; `share`, `resolution` and
        `repeats`; all else as for a measurement. Each launch is a search of its own, and one value: `capacity_requests_per_s` or
        `capacity_concurrency`, which gates; see docs/capacity.md. Fails the test as a measurement does.
        """
        with failing():
            plan = self._bench.plan
            wanted = capacity_from(plan.axes, self._defaults | plan.arguments, search, folder=self._folder)
            if not kind_of(self._own.kind).serves:
                raise PlanError(
                    f"llmperf.capacity(...): an engine of the kind {self._own.kind!r} has no server to send a load to"
                )
            return self._measured(wanted, self._own)

    def _measured(self, wanted: Workload, spec: EngineSpec, engine: str | None = None) -> Measurement:
        """Return the measurement of the test's next case, one launch longer where it is undecided.

        `engine` is the kind of engine that the call names.
        """
        self._calls += 1
        number = "" if self._calls == 1 else f"#{self._calls}"
        case_id = self._bench.plan.case_id + number
        file_kind = kind_in_file(spec.kind, engine or self._bench.plan.own_kind)  # one that the test itself names is its own
        state = self._bench.state(Case(case_id, spec, wanted, file_kind))
        if not state.decided:
            if spec != self._engine.spec:
                self._engine = self._bench.acquire(spec)
            self._bench.launch(self._engine, state)
        return state.measurement


class Sweep:
    """The `llmperf_sweep` fixture: call it with the workload, and get the scaling."""

    def __init__(self, bench: Bench, spec: EngineSpec, degrees: Degrees, defaults: dict[str, Any], folder: Path) -> None:
        """Note the test, its engine at any degree, and the degrees; nothing is started yet."""
        self.degrees = degrees.able
        """The TP degrees that are measured, the smallest first."""
        self._bench = bench
        self._spec = spec
        self._unfit = degrees.unfit
        self._defaults = defaults
        self._folder = folder
        self._calls = 0

    def __call__(self, **workload: Any) -> Scaling:
        """Measure a workload at every degree, the arguments being the fields of `Workload`, and return the scaling.

        One engine after the other is started, in the order that starts fewest. Fails the test as `llmperf` does, at the first
        degree that cannot be measured.
        """
        bench, pool = self._bench, self._bench.run.pool
        plan = bench.plan
        self._calls += 1
        with failing():
            wanted = workload_from(plan.axes, self._defaults, plan.arguments, workload, folder=self._folder)
            file_kind = kind_in_file(self._spec.kind, plan.own_kind)
            cases = {
                degree: Case(plan.case_id + suffix(degree, self._calls), replace(self._spec, tp=degree), wanted, file_kind)
                for degree in self.degrees
            }
            try:
                for degree in order(cases, bench.run.states, pool.spec, pool.starts):
                    state = bench.state(cases[degree])
                    if not state.decided:
                        bench.launch(bench.acquire(state.case.engine, state.starts), state)
            finally:
                bench.arrange([case.id for case in cases.values()])
        measurements = (bench.run.states[case.id].measurement for case in cases.values())
        return scaling_of(measurements, unfit=self._unfit)


class BaselineView:
    """The `baseline` fixture: `measured == baseline` is true when no gating metric is proven worse, at any degree of a sweep."""

    def __init__(self, run: Run, marker: Marker) -> None:
        """Note the run, and what the test itself says of its gates."""
        self._run = run
        self._marker = marker

    def __eq__(self, measured: object) -> bool:
        """Judge a measurement, or each of a scaling; asks for another launch where it is undecided.

        Every degree is judged, though one may be worse already: which of them are is what a reader wants to know.
        """
        if not isinstance(measured, (Measurement, Scaling)):
            return NotImplemented
        answers = []
        for state in self._states(measured):
            answers.append(compare(self._run.rules, state, self._marker))
            if answers[-1].failure:
                pytest.fail(answers[-1].failure, pytrace=False)
        if any(answer.undecided for answer in answers):
            raise Undecided
        good = all(answer.accepted or answer.skip for answer in answers)
        skips = [answer.skip for answer in answers if answer.skip]
        if good and skips:
            pytest.skip(skips[-1])
        return good

    def _states(self, measured: Measurement | Scaling) -> list[CaseState]:
        measurements = measured.measurements if isinstance(measured, Scaling) else (measured,)
        return [self._state(measurement.case.id) for measurement in measurements]

    def _state(self, case_id: str) -> CaseState:
        if case_id not in self._run.states:
            raise ValueError(f"{case_id} was measured by a test that is over; compare it in the test that measures it")
        return self._run.states[case_id]

    def explain(self, measured: object) -> list[str] | None:
        """Return the lines that explain why `==` is false; None for what cannot be compared."""
        if isinstance(measured, Scaling):
            return scaling_assertion([outcome_of(state) for state in self._states(measured)])
        return assertion(outcome_of(self._state(measured.case.id))) if isinstance(measured, Measurement) else None

    __hash__ = None  # type: ignore[assignment]  # equality is a judgement: nothing may be looked up by it

    def __repr__(self) -> str:
        """Return what a failing assertion shows."""
        return f"<baselines of {self._run.rules.host.key}>"


def explain(left: object, right: object) -> list[str] | None:
    """Return the lines that explain `measured == baseline`, None for other operands."""
    view, measured = (left, right) if isinstance(left, BaselineView) else (right, left)
    return view.explain(measured) if isinstance(view, BaselineView) else None
