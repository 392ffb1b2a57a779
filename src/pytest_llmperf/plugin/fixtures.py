"""The fixtures: the running engine, the measuring call, the baseline, and the seams that a project can override."""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pytest_llmperf.measure.engines.engine import Engine
    from pytest_llmperf.measure.measurement import Measurement
    from pytest_llmperf.plan.axes import Axes
    from pytest_llmperf.plan.case import Case
    from pytest_llmperf.plan.engine import EngineSpec
    from pytest_llmperf.plan.marker import Marker
    from pytest_llmperf.plugin.run import CaseState, Run
    from pytest_llmperf.testing import SimulatedEngine


@pytest.fixture
def llmperf_axes(request: pytest.FixtureRequest) -> Axes:
    """Return the point of the grid that this test runs on; parametrized by marker and options."""
    axes: Axes = request.param
    return axes


@pytest.fixture(scope="session")
def llm_engine_args() -> dict[str, Any]:
    """Return engine arguments to merge into the spec, e.g. `{"max_num_seqs": 64}`; override it in your conftest.py."""
    return {}


@pytest.fixture(scope="session")
def llm_engine_url() -> str | None:
    """Return an endpoint to use instead of starting an engine; override it in your conftest.py."""
    return None


@pytest.fixture(scope="session")
def llm_workload() -> dict[str, Any]:
    """Return defaults for the workload of `llmperf(...)`; override it in your conftest.py."""
    return {}


@pytest.fixture(scope="session")
def llmperf_logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the engines' logs; pytest keeps those of the last three runs."""
    return tmp_path_factory.mktemp("llmperf")


@pytest.fixture
def llm_engine(
    request: pytest.FixtureRequest,
    llmperf_axes: Axes,
    llmperf_logs: Path,
    llm_engine_args: dict[str, Any],
    llm_engine_url: str | None,
) -> Engine:
    """Return the running engine of this test: `.spec`, `.url`, `.gpus`, `.startup_s`, `.log_path`, `.generate()`."""
    from pytest_llmperf.plugin.collection import PLANNED
    from pytest_llmperf.plugin.session import skip_or_fail

    plan = request.node.stash[PLANNED]
    spec = own_spec(plan.spec, llm_engine_args, llm_engine_url)
    if plan.marker.kind == "offline" and spec.kind == "url":
        pytest.skip(f"its marker says engine='offline', an engine without a server, and {spec.url} is a server")
    skip_or_fail(request.node, spec)
    return acquire_engine(request, llmperf_logs, spec)


def acquire_engine(
    request: pytest.FixtureRequest, log_folder: Path, spec: EngineSpec, used: frozenset[int] | None = None
) -> Engine:
    """Return a running engine that is none of the `used` starts; fails the test where it does not start.

    None: none of those that any case of this test was measured on.
    """
    from pytest_llmperf.judge.verdict import Status, Verdict
    from pytest_llmperf.measure.engines.engine import EngineError
    from pytest_llmperf.plugin.collection import PLANNED
    from pytest_llmperf.plugin.protocol import STATES
    from pytest_llmperf.plugin.session import POOL

    pool = request.config.stash[POOL]
    if used is None:
        used = frozenset[int]().union(*(state.starts for state in request.node.stash[STATES]))
    try:
        needs = request.node.stash[PLANNED].marker.needs
        return pool.acquire(spec, used=used, log_folder=log_folder, needs=needs)
    except EngineError as error:
        failure = error  # failing inside `except` would show the error twice
    pool.discard()
    for state in request.node.stash[STATES]:
        state.verdict = Verdict(Status.INVALID, reasons=(failure.what,), launches=len(state.launches))
    return fail_engine(failure)


def own_spec(spec: EngineSpec, arguments: dict[str, Any], url: str | None) -> EngineSpec:
    """Return a test's planned engine with what the fixtures `llm_engine_args` and `llm_engine_url` say of it."""
    from pytest_llmperf.plan.checks import PlanError
    from pytest_llmperf.plan.engine import check_url, merge_engine_args, parse_engine_args

    try:
        if url is not None:
            return replace(spec, kind="url", url=check_url(url, origin="llm_engine_url"), args=())
        layer = parse_engine_args(arguments, origin="llm_engine_args")
        return replace(spec, args=merge_engine_args(layer, spec.args))  # marker and command line win over the fixture
    except PlanError as error:
        pytest.fail(str(error), pytrace=False)


def fail_engine(error: Exception) -> NoReturn:
    """Fail the test with what happened to its engine, the likely cause and the last lines of the log; never returns."""
    from pytest_llmperf.judge.diagnosis import likely_cause
    from pytest_llmperf.measure.engines.engine import EngineError

    cause = likely_cause("\n".join((*error.causes, error.tail))) if isinstance(error, EngineError) else None
    pytest.fail(f"Likely cause: {cause}.\n{error}" if cause else str(error), pytrace=False)


class LLMPerf:
    """The `llmperf` fixture: call it with the workload, and get the measurement."""

    def __init__(
        self,
        request: pytest.FixtureRequest,
        engine: Engine,
        axes: Axes,
        defaults: dict[str, Any],
        acquire: Callable[[EngineSpec], Engine],
    ) -> None:
        """Note the test and its engine; `acquire` starts another one, in the place of the running one."""
        self._request = request
        self._engine = engine
        self._acquire = acquire
        self._axes = axes
        self._defaults = defaults
        self._calls = 0
        self._own_kind = engine.spec.kind

    def _switch(self, kind: str) -> None:
        """Have an engine of this kind run, otherwise like the test's own."""
        from pytest_llmperf.plan.kinds import exchangeable

        if kind == self._engine.spec.kind:
            return
        if kind not in exchangeable() or self._own_kind not in exchangeable():
            pytest.fail(
                f"llmperf(engine={kind!r}): this test's engine is of the kind {self._own_kind!r}; only"
                f" {' and '.join(exchangeable())} can take each other's place",
                pytrace=False,
            )
        self._engine = self._acquire(replace(self._engine.spec, kind=kind))

    def __call__(self, *, engine: str | None = None, **workload: Any) -> Measurement:
        """Measure a workload, the arguments being the fields of `traffic.Workload`, and return the launches.

        `engine="offline"` measures it on `vllm.LLM`, with the same arguments and without a server, and `engine="server"` on a
        server: such an engine is started in the place of the test's own.
        Fails the test when a request failed, when the engine died, or when anything else makes the numbers worthless.
        """
        from pytest_llmperf.plan.arguments import workload_from
        from pytest_llmperf.plan.case import Case
        from pytest_llmperf.plan.checks import PlanError
        from pytest_llmperf.plugin.collection import PLANNED

        self._calls += 1
        try:
            wanted = workload_from(self._axes, self._defaults, workload, folder=self._request.path.parent)
        except PlanError as error:
            pytest.fail(str(error), pytrace=False)
        self._switch(engine or self._own_kind)
        plan = self._request.node.stash[PLANNED]
        suffix = "" if self._calls == 1 else f"#{self._calls}"
        state = state_of(self._request, Case(plan.case_id + suffix, self._engine.spec, wanted))
        if not state.decided:
            add_launch(self._request, self._engine, state)
        return state.measurement


def state_of(request: pytest.FixtureRequest, case: Case) -> CaseState:
    """Return what is known of a case so far; fails a test that asks for another one by the same id."""
    from pytest_llmperf.plugin.protocol import STATES
    from pytest_llmperf.plugin.run import RUN, CaseState

    run = request.config.stash[RUN]
    if case.id not in run.states:
        run.states[case.id] = CaseState(case)
        request.node.stash[STATES].append(run.states[case.id])
    state = run.states[case.id]
    if state.case != case:
        pytest.fail(f"{case.id}: another workload or engine than in its first launch; a test must ask for the same each time")
    return state


def add_launch(request: pytest.FixtureRequest, engine: Engine, state: CaseState) -> None:
    """Add a launch to a case; fails the test where it cannot be measured, or proves nothing."""
    from pytest_llmperf.judge.verdict import Status, Verdict
    from pytest_llmperf.measure.client.messages import ClientError
    from pytest_llmperf.measure.engines.engine import EngineError
    from pytest_llmperf.measure.launch import RoundSettings, measure_launch
    from pytest_llmperf.plugin.output import tell
    from pytest_llmperf.plugin.run import RUN
    from pytest_llmperf.plugin.session import POOL

    config = request.config
    pool, options = config.stash[POOL], config.stash[RUN].settings
    settings = RoundSettings(
        # An endpoint that outlives the run has seen a fixed seed before.
        nonce=uuid.uuid4().hex if engine.spec.kind == "url" else state.case.id,
        rounds=options.rounds,
        job=config.stash[RUN].job,
        stall_timeout_s=options.stall_timeout_s,
    )
    name = f"{state.case.id} launch {len(state.launches) + 1}"
    try:
        launch = measure_launch(engine, pool.client, state.case.workload, settings, lambda text: tell(config, f"{name}, {text}"))
    except (EngineError, ClientError) as error:
        failure: Exception | None = error
    except BaseException:
        pool.discard()  # the answer that was not read would be taken for the next round's
        raise
    else:
        failure = None
    if failure is not None:
        pool.discard()
        state.verdict = Verdict(Status.INVALID, reasons=(str(failure).partition("\n")[0],), launches=len(state.launches))
        state.decided = True
        fail_engine(failure)
    state.launches = (*state.launches, launch)
    state.starts |= {pool.starts}
    if launch.invalid:
        state.decided = True
        pytest.fail("INVALID: " + "\n".join(launch.invalid), pytrace=False)


@pytest.fixture
def llmperf(
    request: pytest.FixtureRequest,
    llm_engine: Engine,
    llmperf_axes: Axes,
    llmperf_logs: Path,
    llm_workload: dict[str, Any],
) -> LLMPerf:
    """Return a callable that measures a workload on this test's engine."""
    return LLMPerf(request, llm_engine, llmperf_axes, llm_workload, lambda spec: acquire_engine(request, llmperf_logs, spec))


@pytest.fixture
def simulated_engine() -> Iterator[SimulatedEngine]:
    """Yield a running simulated engine with default options; its `.url` is an OpenAI-compatible endpoint."""
    from pytest_llmperf.testing import SimulatedEngine

    with SimulatedEngine() as engine:
        yield engine


class BaselineView:
    """The `baseline` fixture: `measured == baseline` is true when no gating metric is proven worse, at any degree of a sweep."""

    def __init__(self, run: Run, marker: Marker) -> None:
        """Note the run, and what the test itself says of its gates."""
        self.run = run
        self._marker = marker

    def __eq__(self, measured: object) -> bool:
        """Judge a measurement, or each of a scaling; asks for another launch where it is undecided."""
        from pytest_llmperf.judge.scaling import Scaling
        from pytest_llmperf.measure.measurement import Measurement

        if isinstance(measured, Scaling):
            return self.run.compare_all([self._state(one) for one in measured.measurements], self._marker)
        if not isinstance(measured, Measurement):
            return NotImplemented
        return self.run.compare(self._state(measured), self._marker)

    def _state(self, measured: Measurement) -> CaseState:
        state = self.run.states.get(measured.case.id)
        if state is None:
            raise ValueError(f"{measured.case.id} was measured by a test that is over; compare it in the test that measures it")
        return state

    __hash__ = None  # type: ignore[assignment]  # equality is a judgement: nothing may be looked up by it

    def __repr__(self) -> str:
        """Return what a failing assertion shows."""
        return f"<baselines of {self.run.host.key}>"


@pytest.fixture
def baseline(request: pytest.FixtureRequest) -> BaselineView:
    """Return the stored baselines of this host, to be compared with `==`."""
    from pytest_llmperf.plugin.collection import PLANNED
    from pytest_llmperf.plugin.run import RUN

    plan = request.node.stash.get(PLANNED, None)
    if plan is None:
        pytest.fail("the baseline fixture belongs to a test that measures: ask for the llmperf fixture too", pytrace=False)
    return BaselineView(request.config.stash[RUN], plan.marker)
