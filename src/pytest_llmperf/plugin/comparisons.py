"""`--llmperf-require-comparisons`: a run that compares too little is red, so that nobody takes it for a gate that has passed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_llmperf.plugin.reported import COMPARISONS_ID, report_as_test, was_red
from pytest_llmperf.plugin.state import SESSION, settings_of
from pytest_llmperf.plugin.workers import is_worker
from pytest_llmperf.report.outcome import from_data
from pytest_llmperf.report.text import counts_line
from pytest_llmperf.units import counted

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pytest

    from pytest_llmperf.plugin.state import SessionState
    from pytest_llmperf.report.outcome import Outcome

_MOST_REASONS = 10


def check_comparisons(config: pytest.Config) -> None:
    """Report a test that failed where the run, as its end shows it, has compared fewer cases than were asked for."""
    wanted = settings_of(config).require_comparisons
    if not wanted or is_worker(config) or config.option.collectonly:
        return
    state = config.stash[SESSION]
    outcomes = [from_data(data) for data in state.outcomes]
    compared = sum(outcome.compared for outcome in outcomes)
    if compared < wanted:
        head = f"{counted(compared, 'comparison')} of at least {wanted} (--llmperf-require-comparisons={wanted}): "
        report_as_test(config, COMPARISONS_ID, "\n".join([head + counts_line(outcomes), *_reasons(outcomes, state)]))
    elif was_red(config, COMPARISONS_ID):
        report_as_test(config, COMPARISONS_ID, "")


def _reasons(outcomes: Sequence[Outcome], state: SessionState) -> Iterator[str]:
    """Yield why cases were not compared, and what may not even have run."""
    lines = [f"  {outcome.id}: {outcome.status}{_why(outcome)}" for outcome in outcomes if not outcome.compared]
    yield from lines[:_MOST_REASONS]
    if len(lines) > _MOST_REASONS:
        yield f"  and {len(lines) - _MOST_REASONS} more"
    if state.deselected:
        yield f"  {counted(state.deselected, 'test')} deselected by the options --llmperf-model, -tp, -concurrency and the like"
    if not outcomes:
        yield "  no test that measures has run: see which tests are there with --co, and what -k, -m, --lf and paths leave out"


def _why(outcome: Outcome) -> str:
    reasons = outcome.verdict.reasons or outcome.notes
    return f": {reasons[0]}" if reasons and reasons[0] else ""
