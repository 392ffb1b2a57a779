"""One more launch: a run under way, and where a test measures its cases."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pytest_llmperf.judge.verdict import Status, Verdict
from pytest_llmperf.measure.capacity import measure_capacity
from pytest_llmperf.measure.client.messages import ClientError
from pytest_llmperf.measure.engines.engine import EngineError
from pytest_llmperf.measure.launch import RoundSettings, measure_launch
from pytest_llmperf.plan.capacity import CapacityWorkload
from pytest_llmperf.plan.checks import PlanError, brief
from pytest_llmperf.plan.engine import check_url, merge_engine_args, parse_engine_args
from pytest_llmperf.plan.kinds import ENDPOINT, exchangeable, kind_of
from pytest_llmperf.plan.limits import LocalLimits, named_accelerators
from pytest_llmperf.plan.secrets import shown
from pytest_llmperf.run.cases import CaseState, RunError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from typing import Any

    from pytest_llmperf.measure.client.processes import LoadClient
    from pytest_llmperf.measure.engines.engine import Engine
    from pytest_llmperf.measure.host.machine import Host
    from pytest_llmperf.measure.measurement import Launch
    from pytest_llmperf.plan.case import Case
    from pytest_llmperf.plan.engine import EngineSpec
    from pytest_llmperf.run.cases import Planned
    from pytest_llmperf.run.pool import EnginePool
    from pytest_llmperf.run.rules import Rules


@dataclass
class Run:
    """A run under way: its rules, its engine, and the cases whose tests are not over."""

    rules: Rules
    pool: EnginePool
    progress: Callable[[str], None] = lambda _: None
    states: dict[str, CaseState] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """Where a test measures: everything that it needs of the run, and the cases that it has measured."""

    run: Run
    plan: Planned
    states: list[CaseState]
    """In the order of the test's calls."""
    log_folder: Path

    def state(self, case: Case) -> CaseState:
        """Return what is known of a case so far; raises RunError for another case by the same id."""
        if case.id not in self.run.states:
            self.run.states[case.id] = CaseState(case)
            self.states.append(self.run.states[case.id])
        state = self.run.states[case.id]
        if state.case != case:
            raise RunError(
                f"{case.id}: another workload or engine than in its first launch; a test must ask for the same each time",
                line_matters=True,
            )
        return state

    def acquire(self, spec: EngineSpec, used: frozenset[int] | None = None) -> Engine:
        """Return a running engine that is none of the `used` starts, by default none that a case of this test was measured on.

        Raises EngineError where it does not start; the test's cases are INVALID then.
        """
        pool = self.run.pool
        if used is None:
            used = frozenset[int]().union(*(state.starts for state in self.states))
        try:
            return pool.acquire(spec, used=used, log_folder=self.log_folder, needs=self.plan.marker.needs)
        except EngineError as error:
            pool.discard()
            for state in self.states:
                state.verdict = Verdict(Status.INVALID, reasons=(error.what,), launches=len(state.launches))
            raise

    def launch(self, engine: Engine, state: CaseState) -> None:
        """Add a launch to a case.

        Raises EngineError or ClientError where it cannot be measured, and RunError where it proves nothing.
        """
        run, settings = self.run, self.run.rules.settings
        gpus = [gpu.name for gpu in run.rules.host.devices if gpu.index in engine.gpus]
        state.limits = local_limits(self.plan, run.rules.host, engine.spec, gpus)
        rounds = RoundSettings(
            # An endpoint that outlives the run has seen a fixed seed before.
            nonce=state.case.id if kind_of(engine.spec.kind).starts else uuid.uuid4().hex,
            rounds=settings.rounds,
            job=run.rules.job,
            stall_timeout_s=settings.stall_timeout_s,
            idle_s=settings.idle_s,
        )
        name = f"{state.case.id} launch {len(state.launches) + 1}"
        try:
            launch = _measured(engine, run.pool.client, state, rounds, lambda text: run.progress(f"{name}, {text}"))
        except BaseException as error:
            run.pool.discard()  # the answer that was not read would be taken for the next round's
            if isinstance(error, (EngineError, ClientError)):
                why = str(error).partition("\n")[0]
                state.verdict = Verdict(Status.INVALID, reasons=(why,), launches=len(state.launches))
                state.decided = True
            raise
        state.launches = (*state.launches, launch)
        state.starts |= {run.pool.starts}
        if launch.invalid:
            state.verdict, state.decided = None, True  # what the launches before it came to does not count any more
            raise RunError("INVALID: " + "\n".join(launch.invalid))

    def arrange(self, ids: Sequence[str]) -> None:
        """Have the report name these cases in this order, whatever was measured first."""
        places = [place for place, state in enumerate(self.states) if state.case.id in ids]
        ordered = sorted((self.states[place] for place in places), key=lambda state: ids.index(state.case.id))
        for place, state in zip(places, ordered, strict=True):
            self.states[place] = state


def local_limits(plan: Planned, host: Host, spec: EngineSpec, gpus: Sequence[str] = ()) -> LocalLimits:
    """Return the limits of a test on this host; `gpus` are the names of its engine's, by default those of the host."""
    return LocalLimits(plan.limits, named_accelerators(gpus or host.gpus, started_here=kind_of(spec.kind).starts))


def _measured(
    engine: Engine, client: LoadClient, state: CaseState, settings: RoundSettings, progress: Callable[[str], None]
) -> Launch:
    """Return one launch of a case: its rounds, or the search for the largest load."""
    workload = state.case.workload
    if not isinstance(workload, CapacityWorkload):
        return measure_launch(engine, client, workload, settings, progress)
    last = state.launches[-1].metrics.get(workload.metric) if state.launches else None
    number = len(state.launches) + 1
    return measure_capacity(engine, client, workload, settings, progress, number=number, start=last)


def own_spec(spec: EngineSpec, arguments: dict[str, Any], url: str | None) -> EngineSpec:
    """Return a test's planned engine with what the fixtures `llm_engine_args` and `llm_engine_url` say of it.

    Raises PlanError.
    """
    if url is not None:
        if not isinstance(url, str):
            raise PlanError(f"llm_engine_url={brief(url)}: must be the URL of an endpoint, or None")
        return replace(spec, kind=ENDPOINT, url=check_url(url, origin="llm_engine_url"), args=())
    layer = parse_engine_args(arguments, origin="llm_engine_args", verbatim=kind_of(spec.kind).commanded)
    return replace(spec, args=merge_engine_args(layer, spec.args))  # marker and command line win over the fixture


def other_engine(own: EngineSpec, kind: str | None, arguments: Any) -> EngineSpec:
    """Return a test's engine as a call wants it: of another kind, with other arguments, or as it is where it wants neither.

    Raises PlanError where the two kinds cannot take each other's place, or nothing can be passed to an endpoint.
    """
    if kind is not None and not isinstance(kind, str):
        raise PlanError(f"llmperf(engine={brief(kind)}): must be one of {', '.join(exchangeable())}")
    kind = kind or own.kind
    vllm = kind in exchangeable() and own.kind in exchangeable()
    if kind != own.kind and not vllm:
        raise PlanError(
            f"llmperf(engine={brief(kind)}): this test's engine is of the kind {own.kind!r}; only"
            f" {' and '.join(exchangeable())} can take each other's place"
        )
    if arguments is None:
        return replace(own, kind=kind)
    origin = "llmperf(engine_args=...)"
    if not kind_of(kind).starts:
        raise PlanError(
            f"{origin}: this test's engine is the endpoint {shown(own.url)}, whose arguments are what it was started with;"
            " leave engine_args out, or the endpoint"
        )
    layer = parse_engine_args(arguments, origin=origin, verbatim=kind_of(kind).commanded)
    return replace(own, kind=kind, args=merge_engine_args(own.args, layer))
