"""What the terminal shows before and after: the header of a run, and the summary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_llmperf.judge.verdict import Status
from pytest_llmperf.measure.host.preflight import islands
from pytest_llmperf.plugin.outlet import clean
from pytest_llmperf.plugin.state import ITEM, SESSION
from pytest_llmperf.report.outcome import from_data
from pytest_llmperf.report.scaling import scaling_lines
from pytest_llmperf.report.tables import review_table, summary_table
from pytest_llmperf.report.text import (
    blind_lines,
    counts_line,
    headline,
    limit_gaps,
    metric_line,
    prospects,
    render,
    self_test_line,
    suite_line,
)
from pytest_llmperf.run.launches import local_limits
from pytest_llmperf.run.rules import prospects_of, stored_and_new, unmet_baselines, unused_baselines
from pytest_llmperf.run.stored import MOST_WITNESSES
from pytest_llmperf.units import counted

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pytest

    from pytest_llmperf.plugin.state import SessionState
    from pytest_llmperf.report.outcome import Outcome


def header(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    """Return host, cases, engines, baselines, and what they can find; nothing where no test measures."""
    state = config.stash[SESSION]
    if state.run is None:
        return []
    rules = state.run.rules
    planned = [item.stash[ITEM].planned for item in items if ITEM in item.stash]
    stored, new = stored_and_new(rules)
    engines = len({plan.spec for plan in planned})
    links = f", {rules.host.links}" if rules.host.links else ""
    line = f"llmperf: {rules.host.summary}{links} ({rules.host.key})"
    line += f"; {counted(len(planned), 'test')} on {counted(engines, 'engine')}; baselines: {stored} found, {new} new"
    if state.deselected:
        line += f"; {state.deselected} deselected, which their markers allow only at other values"
    verbose, quiet = config.get_verbosity() > 0, config.get_verbosity() < 0
    gaps = ((plan.case_id, local_limits(plan, rules.host, plan.spec).notes) for plan in planned)
    lines = [line, *limit_gaps(gaps, verbose=verbose)]
    if not (quiet or rules.settings.selftest or rules.settings.calibrate or rules.settings.update == "all"):
        if stored > MOST_WITNESSES and not verbose:
            lines.append(f"llmperf: only {MOST_WITNESSES} of the baselines were asked what they can find; -v asks all")
        lines += prospects(prospects_of(rules, every=verbose), verbose=verbose)
    return [clean(config, line) for line in lines]


def summarize(reporter: Any, config: pytest.Config) -> None:
    """Write the summary: a line per case, and how many were compared."""
    state = config.stash[SESSION]
    if state.selftests:
        reporter.section("llmperf self-test")
        reporter.write_line(self_test_line(state.selftests), red=any(check["fault"] for check in state.selftests))
    outcomes = [from_data(data) for data in state.outcomes]
    if not outcomes or config.get_verbosity() < -1:
        return
    reporter.section("llmperf")
    for line in _lines(outcomes, state, config):
        reporter.write_line(clean(config, line))
    red = any(outcome.status in (Status.REGRESSED, Status.INVALID) for outcome in outcomes)
    if state.suite is not None:
        suite_red = state.suite.outcome == "regressed"
        red |= suite_red
        reporter.write_line(suite_line(state.suite), red=suite_red)
    plain = all(outcome.compared or outcome.status is Status.RECORDED for outcome in outcomes)
    reporter.write_line(counts_line(outcomes), red=red, yellow=not red and not plain, green=not red and plain)


def _lines(outcomes: Sequence[Outcome], state: SessionState, config: pytest.Config) -> Iterator[str]:
    yield from render(summary_table(outcomes)).splitlines()
    for outcome in outcomes:
        if outcome.status is Status.INCONCLUSIVE:
            yield headline(outcome)
            yield from (f"  {reason}" for reason in outcome.verdict.reasons)
            rows = [row for row in outcome.verdict.metrics if row.status is Status.INCONCLUSIVE]
            yield from (f"  {metric_line(row)}, {row.rule}" for row in rows)
        elif outcome.status is Status.INVALID and outcome.verdict.reasons:
            yield f"{headline(outcome)}: {outcome.verdict.reasons[0]}"
        elif outcome.status is Status.RECORDED:
            yield from (*outcome.notes, *render(review_table(outcome)).splitlines())
    yield from blind_lines(outcomes)
    yield from scaling_lines(outcomes, direct_links=_direct_links(state))
    if _tells_unused(state, config) and state.run:
        for path in unused_baselines(state.run.rules):
            yield f"unused baseline: {path} (its test is gone; delete the file)"
        for path in unmet_baselines(state.run.rules, {outcome.id: outcome.status for outcome in outcomes}):
            yield f"unused baseline: {path} (its test was recorded without it; delete the file)"


def _direct_links(state: SessionState) -> bool | None:
    """Return whether the GPUs are all joined by direct links; None where that is not known."""
    devices = state.run.rules.host.devices if state.run else ()
    return len(islands(devices)) == 1 if len(devices) > 1 else None


def _tells_unused(state: SessionState, config: pytest.Config) -> bool:
    """Return whether unused baselines are looked for: when baselines are updated and whole files were collected."""
    return bool(state.run and state.run.rules.settings.update != "no" and not any("::" in argument for argument in config.args))
