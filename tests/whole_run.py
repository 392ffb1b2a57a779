"""A complete run without pytest: what the plugin does around a test, in a loop."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from pytest_llmperf.measure.engines.engine import StartSettings
from pytest_llmperf.measure.host.machine import describe_host
from pytest_llmperf.measure.measurement import Launch, Round
from pytest_llmperf.plan.axes import Axes
from pytest_llmperf.plan.case import Case
from pytest_llmperf.plan.kinds import kind_of
from pytest_llmperf.plan.workload import Workload
from pytest_llmperf.run.cases import Planned
from pytest_llmperf.run.judging import compare
from pytest_llmperf.run.launches import Bench, Run
from pytest_llmperf.run.outcomes import outcome_of
from pytest_llmperf.run.pool import EnginePool
from pytest_llmperf.run.recording import settle
from pytest_llmperf.run.rules import Rules
from pytest_llmperf.run.selection import planned
from pytest_llmperf.run.settings import Settings
from pytest_llmperf.run.turns import Result, Turns, runs_again

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_llmperf.report.outcome import Outcome

WORKLOAD = Workload(prompt_tokens=8, output_tokens=6, requests=16, concurrency=4)
_PLAIN: dict[str, Any] = {
    "selected": {}, "kind": "simulated", "urls": {}, "served_model": None, "python": "", "engine_args": (),
    "startup_timeout_s": 60.0, "stop_grace_s": 5.0, "stall_timeout_s": 30.0, "missing": "fail", "update": "no", "extend": True,
    "calibrate": False, "selftest": False, "gate": (), "launches": 3, "rounds": 2, "max_launches": 4, "tolerance": 0.05,
    "fail_inconclusive": False, "require_gpus": False, "exclusive": False, "json_path": None,
}  # fmt: skip


def settings_from(folder: Path, **given: Any) -> Settings:
    """Return plain settings of a run in a folder, with what is given."""
    return Settings(**_PLAIN | {"baselines": folder / "baselines"} | given)


def launch(metrics: dict[str, float | None]) -> Launch:
    """Return a launch of one round with these figures."""
    return Launch("launch", "", (Round(metrics),), {})


def plan(settings: Settings, case_id: str = "test_it.py::test_x[tiny-tp1-c4]") -> Planned:
    """Return a test that compares, at the first point of the grid."""
    return planned(case_id, [], Axes(concurrency=4), settings, compares=True)


def whole_run(folder: Path, **given: Any) -> tuple[Outcome, list[str]]:
    """Measure and judge one case in a run of its own; return what came of it, and the progress lines."""
    settings = settings_from(folder, **given)
    host, test = describe_host(simulated=kind_of(settings.kind).simulated), plan(settings)
    lines: list[str] = []
    rules = Rules(settings, host, folder, {test.case_id: test}, (test.case_id,), uuid.uuid4().hex)
    run = Run(rules, EnginePool(host, StartSettings(folder), lines.append, alone=False), lines.append)
    bench, turns = Bench(run, test, [], folder), Turns[Planned](lambda item: item.spec if item else None)
    turns.offer(test, None)
    try:
        while turns.current is not None:
            state = bench.state(Case(test.case_id, test.spec, WORKLOAD))
            bench.launch(bench.acquire(test.spec), state)
            result = Result.UNDECIDED if compare(rules, state, test.marker).undecided else Result.PASSED
            action = turns.next(test, again=runs_again(result, bench.states), running=run.pool.spec)
            if action.stops_engine:
                run.pool.close()
        settle(bench.states, passed=True)
    finally:
        run.pool.shutdown()
    return outcome_of(bench.states[0]), lines
