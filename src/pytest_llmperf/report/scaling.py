"""Scaling over the TP degree, as outcomes show it: those that differ in nothing but TP are one table.

Tests that are parametrized by TP and sweeps inside one test come to the same outcomes, hence to the same table.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from pytest_llmperf.judge.diagnosis import scaling_advice
from pytest_llmperf.judge.scaling import THROUGHPUT, Scaling, advise, scaling_from
from pytest_llmperf.judge.verdict import Status
from pytest_llmperf.report.text import metric_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pytest_llmperf.report.outcome import Outcome

_ASSERTION_LINES = 6  # pytest cuts an explanation after 8 lines


def scalings(outcomes: Iterable[Outcome]) -> list[tuple[str, Scaling]]:
    """Return how each workload scales that was measured at two degrees or more, with its id, which is without the degree.

    What is INVALID has no figures; it is among the degrees that were not measured, with the reason, as is what was skipped.
    Endpoints are left out: which degree they run at is not known.
    """
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.engine.get("kind") != "url":
            groups.setdefault((_without_degree(outcome), _without_tp(outcome.engine)), []).append(outcome)
    return [(name, one) for (name, _), group in groups.items() for one in _of_group(group)]


def _without_degree(outcome: Outcome) -> str:
    """Return a case's id without its degree, e.g. `test_x[tiny-c8]` of `test_x[tiny-tp2-c8]` and of `test_x[tiny-c8]#tp2`."""
    tp = f"tp{outcome.engine['tp']}"
    return re.sub(rf"#{tp}$|-{tp}(?=[-\]]|$)|(?<=\[){tp}-", "", outcome.id)


def _without_tp(engine: dict[str, Any]) -> str:
    return json.dumps({name: value for name, value in engine.items() if name != "tp"}, sort_keys=True)


def _of_group(group: list[Outcome]) -> list[Scaling]:
    """Return the scaling of each workload of a group; a test may send another one at each degree."""
    loads: dict[str, dict[int, dict[str, float]]] = {}
    unfit: dict[int, str] = {}
    for outcome in group:
        degree = int(outcome.engine["tp"])
        medians = {row.metric: row.measured for row in outcome.verdict.metrics if row.measured is not None}
        if outcome.status in (Status.SKIPPED, Status.INVALID):
            unfit[degree] = outcome.verdict.reasons[0] if outcome.verdict.reasons else outcome.status.value
        elif medians.get(THROUGHPUT, 0) > 0:
            loads.setdefault(json.dumps(outcome.workload, sort_keys=True), {})[degree] = medians
    engine = group[0].engine
    return [
        scaling_from(figures, gpus_per_degree=int(engine["pp"]) * int(engine["dp"]), unfit=unfit)
        for figures in loads.values()
        if len(figures) > 1
    ]


def scaling_lines(outcomes: Iterable[Outcome], *, direct_links: bool | None = None) -> list[str]:
    """Return for each workload at several degrees the table, the recommended degree, and why a larger one is slower."""
    lines = []
    for name, scaling in scalings(outcomes):
        lines += ["", f"scaling of {name}", *str(scaling).splitlines(), advise(scaling).summary]
        lines += scaling_advice(scaling, direct_links=direct_links)
    return lines


def scaling_assertion(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the explanation of `scaling == baseline`: which degrees are worse, and what decided it."""
    bad = [outcome for outcome in outcomes if not outcome.status.green]
    rest = [f"TP {outcome.engine['tp']} {outcome.status}" for outcome in outcomes if outcome.status.green]
    lines = []
    for outcome in bad:
        decisive = [metric_line(row) for row in outcome.verdict.metrics if row.status is outcome.status]
        reasons = outcome.notes if outcome.status is Status.NO_BASELINE else outcome.verdict.reasons
        lines += [f"  TP {outcome.engine['tp']} {outcome.status}: {line}" for line in (*reasons, *decisive) or ("",)]
    shown, more = lines[:_ASSERTION_LINES], len(lines) - _ASSERTION_LINES
    verdicts = ", ".join([*(f"TP {outcome.engine['tp']} {outcome.status}" for outcome in bad), *rest])
    return [f"{_without_degree(outcomes[0])}: {verdicts}", *shown, *([f"  and {more} more"] if more > 0 else [])]
