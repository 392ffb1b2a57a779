"""`--llmperf-selftest`: a test measures nothing, and passes when every gate of its stored baselines fires as it must."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import msgspec
import pytest

from pytest_llmperf.judge.baseline import BaselineError
from pytest_llmperf.plugin.collection import PLANNED
from pytest_llmperf.plugin.run import RUN

if TYPE_CHECKING:
    from pytest_llmperf.judge.selftest import Check

_Outcome = Literal["passed", "failed", "skipped"]


def run(item: pytest.Item) -> None:
    """Report the self-test of an item's gates in the place of the test; its fixtures and its body don't run."""
    outcome, text, checks = _outcome(item)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    phases: tuple[tuple[Literal["setup", "call", "teardown"], _Outcome], ...]
    phases = (("setup", "passed"), ("call", outcome), ("teardown", "passed"))
    for when, phase in phases:
        longrepr: Any = None
        if when == "call" and phase == "skipped":
            longrepr = (str(item.path), 1, f"Skipped: {text}")
        elif when == "call" and phase == "failed":
            longrepr = text
        report = pytest.TestReport(item.nodeid, item.location, dict.fromkeys(item.keywords, 1), phase, longrepr, when)
        if when == "call":
            report.llmperf_selftest = msgspec.to_builtins(checks)  # type: ignore[attr-defined]  # as report.llmperf
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)


def _outcome(item: pytest.Item) -> tuple[_Outcome, str, list[Check]]:
    plan, known = item.stash[PLANNED], item.config.stash[RUN]
    if plan.error:
        return "failed", plan.error, []
    if not plan.compares:
        return "skipped", "the test compares with no baseline", []
    try:
        checks = known.self_test(plan.case_id)
    except BaselineError as error:
        return "failed", str(error), []
    if not checks:
        return "skipped", "no baseline is stored for any host; record one with --update-baselines", []
    faults = [check for _, check in checks if check.fault]
    lines = [f"  {host}: {check.metric}, {check.change}: {check.fault}" for host, check in checks if check.fault]
    text = "\n".join([f"{len(faults)} of {len(checks)} injected changes were not judged as they must be:", *lines])
    return ("failed" if faults else "passed"), text, [check for _, check in checks]
