"""Outcomes: what came of a case, as the report shows it, whether it was measured or not; and of all cases together."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

from pytest_llmperf.judge import suite
from pytest_llmperf.judge.provenance import engine_facts, model_facts
from pytest_llmperf.judge.verdict import Status, Verdict, observed
from pytest_llmperf.plan.case import Case
from pytest_llmperf.plan.workload import Workload
from pytest_llmperf.report.outcome import NEVER_DECIDED, Outcome
from pytest_llmperf.run.sweep import degrees_of, suffix

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_llmperf.judge.maths.stats import Decision
    from pytest_llmperf.measure.measurement import Launch
    from pytest_llmperf.plan.engine import EngineSpec
    from pytest_llmperf.run.cases import Answer, CaseState, Planned
    from pytest_llmperf.run.rules import Rules

SUITE_ADVICE = """
No single comparison proves it, but all of them together do. Look at the host first: one that is slow today looks just like it.
Then look for what all tests share: the engine's version, its start-up arguments, the driver."""


def outcome_of(state: CaseState, nodeid: str = "") -> Outcome:
    """Return what came of a case that was measured; `nodeid` is that of its test."""
    verdict = state.verdict
    if verdict is None:
        invalid = state.measurement.invalid
        status = Status.INVALID if invalid else Status.MEASURED
        verdict = Verdict(status, observed(state.launches, None), invalid, launches=len(state.launches))
    elif verdict.status is Status.UNDECIDED:
        verdict = replace(verdict, status=Status.INCONCLUSIVE, reasons=(NEVER_DECIDED,))
    notes = state.notes
    if state.record and verdict.status is Status.RECORDED:  # it is written only behind the test
        verdict, notes = replace(verdict, status=Status.MEASURED), ("not recorded, because the run ended before its test did",)
    warnings = dict.fromkeys(chain.from_iterable(launch.warnings for launch in state.launches))
    return Outcome(
        id=state.case.id,
        nodeid=nodeid or state.case.id,
        status=verdict.status,
        verdict=verdict,
        launches=tuple(_without_samples(launch, verdict) for launch in state.launches),
        engine=engine_facts(state.case) | model_facts(state.case, state.launches),
        workload=state.case.workload.description,
        notes=(*notes, *state.limits.notes, *warnings),
    )


def _without_samples(launch: Launch, verdict: Verdict) -> Launch:
    """Return the launch as it is reported: of all percentiles by name only those that the verdict shows."""
    return replace(launch.keeping(row.metric for row in verdict.metrics), rounds=launch.rounds)


def unmeasured(plan: Planned, *, skipped: bool, why: str) -> Outcome:
    """Return the outcome of a test that ended before it measured anything."""
    status = Status.SKIPPED if skipped else Status.INVALID
    return _without_figures(plan, plan.spec, plan.case_id, status, why.partition("\n")[0])


def without_baseline(rules: Rules, plan: Planned, answer: Answer) -> list[Outcome]:
    """Return the outcomes of a test that is not measured, because it would meet no usable baseline: one for each degree."""
    verdict = answer.verdict
    assert verdict is not None
    degrees = degrees_of(plan, plan.spec, rules.settings.selected, rules.host).able if plan.axes.sweep else ()
    cases = [(plan.case_id + suffix(degree), replace(plan.spec, tp=degree)) for degree in degrees] or [(plan.case_id, plan.spec)]
    made = (_without_figures(plan, spec, case_id, verdict.status, "") for case_id, spec in cases)
    return [replace(outcome, verdict=verdict, notes=answer.notes) for outcome in made]


def left_out(plan: Planned, spec: EngineSpec, why: str) -> Outcome:
    """Return the outcome of a degree that a sweep left out, because this host cannot run it."""
    return _without_figures(plan, spec, plan.case_id + suffix(spec.tp), Status.SKIPPED, why)


def _without_figures(plan: Planned, spec: EngineSpec, case_id: str, status: Status, why: str) -> Outcome:
    case = Case(case_id, spec, Workload())
    engine = engine_facts(case) | model_facts(case)
    return Outcome(case_id, plan.case_id, status, Verdict(status, reasons=(why,)), (), engine, {})


def suite_verdict(outcomes: Sequence[Outcome], host_key: str) -> Decision | None:
    """Return the verdict on all comparisons together; None where there are fewer than two."""
    compared = ((json.dumps(case.engine, sort_keys=True), case.verdict) for case in outcomes if case.status.compared)
    return suite.judge_suite(compared, host_key)


def is_red_alone(verdict: Decision, outcomes: Sequence[Outcome]) -> bool:
    """Return whether the suite as a whole is the only thing that is red: a run that is red already needs no second failure."""
    return verdict.outcome == "regressed" and not any(outcome.status is Status.REGRESSED for outcome in outcomes)
