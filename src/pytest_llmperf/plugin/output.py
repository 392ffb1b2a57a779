"""What the terminal shows: a line after collection, progress while it measures, the explanation of `==`, the summary."""

from __future__ import annotations

import contextlib
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from pytest_llmperf.plugin.options import OUTCOMES, SELFTESTS

if TYPE_CHECKING:
    from pytest_llmperf.judge.maths.stats import Decision
    from pytest_llmperf.plugin.run import Run

DESELECTED = pytest.StashKey[int]()
"""How many tests the options excluded; other plugins deselect for reasons of their own."""
COLLECTED = pytest.StashKey[list[str]]()
"""The ids of all cases that were collected, deselected ones too."""
SUITE: pytest.StashKey[Decision] = pytest.StashKey()
"""The verdict on all comparisons together."""


def tell(config: pytest.Config, text: str) -> None:
    """Show what is going on: one changing line on a terminal, plain lines otherwise; nothing with -q or -p no:terminal."""
    reporter: Any = config.pluginmanager.getplugin("terminalreporter")
    if reporter is None or config.get_verbosity() < 0:
        return
    capture: Any = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
        reporter.ensure_newline()
        if reporter.isatty:
            width = shutil.get_terminal_size().columns - 1  # a longer line would wrap, and could not be rewritten
            reporter.rewrite(f"llmperf: {text}"[:width], erase=True)
        else:
            reporter.write_line(f"llmperf: {text}")
        reporter.flush()


def clear(config: pytest.Config) -> None:
    """Take the changing line off a terminal, before pytest writes a result there."""
    reporter: Any = config.pluginmanager.getplugin("terminalreporter")
    if reporter is not None and reporter.isatty and config.get_verbosity() >= 0:
        reporter.ensure_newline()
        reporter.rewrite("", erase=True)
        reporter.write("\r")


def collected(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    """Return the header: host, cases, engines, baselines, and what they can find; nothing where there are no llmperf tests."""
    from pytest_llmperf.plugin.collection import PLANNED
    from pytest_llmperf.plugin.run import RUN
    from pytest_llmperf.report.text import prospects

    run: Run | None = config.stash.get(RUN, None)
    planned = [item.stash[PLANNED] for item in items if PLANNED in item.stash]
    if run is None:
        return []
    found, new = run.stored_and_new()
    engines = len({plan.spec for plan in planned})
    skipped = config.stash[DESELECTED]
    links = f", {run.host.links}" if run.host.links else ""
    line = f"llmperf: {run.host.summary}{links} ({run.host.key}); {len(planned)} tests on {engines} engines"
    line += f"; baselines: {found} found, {new} new"
    lines = [line + (f"; {skipped} deselected, which their markers allow only at other values" if skipped else "")]
    if run.settings.selftest or run.settings.calibrate or run.settings.update == "all":
        return lines
    return lines + prospects(run.prospects(), verbose=config.get_verbosity() > 0)


def explain(left: object, right: object) -> list[str] | None:
    """Return the lines that explain `measured == baseline`, None for other operands."""
    from pytest_llmperf.judge.scaling import Scaling
    from pytest_llmperf.measure.measurement import Measurement
    from pytest_llmperf.plugin.fixtures import BaselineView
    from pytest_llmperf.report.scaling import scaling_assertion
    from pytest_llmperf.report.text import assertion

    if isinstance(left, BaselineView):
        left, right = right, left
    if isinstance(left, Scaling) and isinstance(right, BaselineView):
        states = (right.run.states[one.case.id] for one in left.measurements)
        return scaling_assertion([right.run.outcome(state, state.case.id) for state in states])
    if not isinstance(left, Measurement) or not isinstance(right, BaselineView):
        return None
    state = right.run.states[left.case.id]
    return assertion(right.run.outcome(state, state.case.id))


def summarize(reporter: Any, config: pytest.Config) -> None:
    """Write the summary: a line per case, and how many were compared."""
    from pytest_llmperf.judge.verdict import Status
    from pytest_llmperf.report.outcome import from_data
    from pytest_llmperf.report.scaling import scaling_lines
    from pytest_llmperf.report.text import (
        counts_line,
        headline,
        metric_line,
        review_table,
        self_test_line,
        suite_line,
        summary_table,
    )

    if config.stash.get(SELFTESTS, None):
        checks = config.stash[SELFTESTS]
        reporter.section("llmperf self-test")
        reporter.write_line(self_test_line(checks), red=any(check["fault"] for check in checks))
    outcomes = [from_data(data) for data in config.stash.get(OUTCOMES, [])]
    if not outcomes or config.get_verbosity() < -1:
        return
    reporter.section("llmperf")
    for line in summary_table(outcomes).splitlines():
        reporter.write_line(line)
    for outcome in outcomes:
        if outcome.status is Status.INCONCLUSIVE:
            open_rows = [row for row in outcome.verdict.metrics if row.status is Status.INCONCLUSIVE]
            for line in (headline(outcome), *(f"  {metric_line(row)}, {row.rule}" for row in open_rows)):
                reporter.write_line(line)
        elif outcome.status is Status.RECORDED:
            for line in (*outcome.notes, *review_table(outcome).splitlines()):
                reporter.write_line(line)
    for line in scaling_lines(outcomes, direct_links=_direct_links(config)):
        reporter.write_line(line)
    for path in _unused(config):
        reporter.write_line(f"unused baseline: {path} (its test is gone; delete the file)")
    red = any(outcome.status in (Status.REGRESSED, Status.INVALID) for outcome in outcomes)
    if SUITE in config.stash:
        suite = config.stash[SUITE]
        red |= suite.outcome == "regressed"
        reporter.write_line(suite_line(suite), red=suite.outcome == "regressed")
    plain = all(outcome.status.compared or outcome.status is Status.RECORDED for outcome in outcomes)
    reporter.write_line(counts_line(outcomes), red=red, yellow=not red and not plain, green=not red and plain)


def _direct_links(config: pytest.Config) -> bool | None:
    """Return whether the GPUs are all joined by direct links; None where that is not known."""
    from pytest_llmperf.measure.host.preflight import islands
    from pytest_llmperf.plugin.run import RUN

    run: Run | None = config.stash.get(RUN, None)
    devices = run.host.devices if run else ()
    return len(islands(devices)) == 1 if len(devices) > 1 else None


def _unused(config: pytest.Config) -> list[str]:
    """Return baselines whose test is gone; looked for when baselines are updated and whole files were collected."""
    from pytest_llmperf.plugin.run import RUN

    run: Run | None = config.stash.get(RUN, None)
    if run is None or run.settings.update == "no" or any("::" in argument for argument in config.args):
        return []
    return run.unused_baselines()
