"""`--llmperf-selftest`: the self-test of a test's gates is reported in the place of the test."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import msgspec
import pytest

from pytest_llmperf.plugin.state import ITEM, run_of
from pytest_llmperf.run.selftest import self_tested

if TYPE_CHECKING:
    from pytest_llmperf.run.selftest import SelfTest


def report(item: pytest.Item) -> None:
    """Report the self-test of an item's gates; its fixtures and its body don't run."""
    result = self_tested(run_of(item.config).rules, item.stash[ITEM].planned)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for when in ("setup", "call", "teardown"):
        item.ihook.pytest_runtest_logreport(report=_report(item, result, when))
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)


def _report(item: pytest.Item, result: SelfTest, when: Literal["setup", "call", "teardown"]) -> pytest.TestReport:
    keywords: dict[str, Any] = dict.fromkeys(item.keywords, 1)
    if when != "call":
        return pytest.TestReport(item.nodeid, item.location, keywords, "passed", None, when)
    longrepr: Any = {"failed": result.why, "skipped": (str(item.path), 1, f"Skipped: {result.why}")}.get(result.outcome)
    made = pytest.TestReport(item.nodeid, item.location, keywords, result.outcome, longrepr, when)
    made.llmperf_selftest = msgspec.to_builtins(result.checks)  # type: ignore[attr-defined]  # as report.llmperf
    return made
