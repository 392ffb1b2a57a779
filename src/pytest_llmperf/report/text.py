"""Text: the table of a case, and the summary of a run."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from pytest_llmperf.judge.baseline import is_of_older
from pytest_llmperf.judge.verdict import MetricVerdict, Status
from pytest_llmperf.measure.audit import is_blind
from pytest_llmperf.measure.metrics import find
from pytest_llmperf.report.tables import Table, change, metrics_table
from pytest_llmperf.units import counted, percent, quantity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from pytest_llmperf.judge.comparison import Comparison
    from pytest_llmperf.judge.maths.stats import Decision
    from pytest_llmperf.report.outcome import Outcome


_ASSERTION_LINES = 5  # pytest cuts an explanation after 8 lines or 640 characters


def render(table: Table) -> str:
    """Return a table as text, its footnotes below it."""
    align = [column.align for column in table.columns] if table.rows else None  # tabulate has no alignment for no rows
    headers = [column.header for column in table.columns]
    return "\n".join([tabulate(table.rows, headers=headers, disable_numparse=True, colalign=align), *table.footnotes])


def headline(outcome: Outcome) -> str:
    """Return the verdict on a case in one line."""
    verdict = outcome.verdict
    launches = counted(verdict.launches, "launch")
    against = f" against {verdict.baseline_launches} of the baseline" if verdict.baseline_launches else ""
    return f"{outcome.status} {outcome.id} ({launches}{against})"


def metric_line(row: MetricVerdict) -> str:
    """Return the line of one metric: name, baseline, now and change; the rule where there are no numbers."""
    metric = find(row.metric)
    change_text = change(row) if row.status is not Status.NOT_COMPARABLE else row.rule
    before, now = row.compared
    return f"{row.metric}: {quantity(before, metric.unit)} -> {quantity(now, metric.unit)}, {change_text}"


def assertion(outcome: Outcome) -> list[str]:
    """Return the explanation of a failed comparison: what decided it, short enough that pytest shows all of it."""
    decisive = [row for row in outcome.verdict.metrics if row.status is not None and row.status.value == outcome.status.value]
    lines = [f"  {line}" for line in (*outcome.verdict.reasons, *map(metric_line, decisive))]
    if outcome.status is Status.NO_BASELINE:
        lines = [f"  {note}" for note in outcome.notes]
    shown, rest = lines[:_ASSERTION_LINES], len(lines) - _ASSERTION_LINES
    more = [f"  and {rest} more"] if rest > 0 else []
    return [headline(outcome), *shown, *more]


def section(outcome: Outcome) -> str:
    """Return what a failing test's report says of a case: verdict, what may be the reason, and every metric."""
    return "\n".join([headline(outcome), *outcome.verdict.reasons, *outcome.notes, "", render(metrics_table(outcome))])


def prospects(cases: Iterable[tuple[str, list[Comparison]]], *, verbose: bool) -> list[str]:
    """Return what the stored baselines can find within the budget, per case: everything if verbose, else what falls short.

    A tolerance that the noise hides is told before any GPU time is spent on it.
    """
    lines: list[str] = []
    short: list[tuple[str, Comparison, float]] = []
    for case_id, comparisons in cases:
        rated = [(comparison, comparison.detectable) for comparison in comparisons]
        able = [f"{comparison.metric.name} {percent(detectable)}" for comparison, detectable in rated if detectable is not None]
        if verbose and able:
            budget = counted(comparisons[0].design.launches, "launch")
            lines.append(f"llmperf: {case_id}: slow-down found 19 times in 20 within {budget}: {', '.join(able)}")
        for comparison, detectable in rated:
            if detectable is not None and detectable > comparison.gate.share:
                short.append((case_id, comparison, detectable))
    return [*lines, *_first(short, _shortfall, "tolerance", verbose=verbose)]


def limit_gaps(notes: Iterable[tuple[str, Iterable[str]]], *, verbose: bool) -> list[str]:
    """Return which cases have limits that are none for these accelerators: what is not asked must not look as if it were kept."""
    rows = [(case_id, note) for case_id, case_notes in notes for note in case_notes]
    return _first(rows, "llmperf: {}: {}".format, "limit", verbose=verbose)


def _first(rows: Sequence[tuple[Any, ...]], text: Callable[..., str], what: str, *, verbose: bool) -> list[str]:
    """Return the texts of the first rows, of all if `verbose`, and how many more there are: a text may take long to make."""
    shown = rows if verbose else rows[:_SHORTFALLS]
    more = len(rows) - len(shown)
    rest = [f"llmperf: and {counted(more, f'more such {what}')}; -v shows all"] if more else []
    return [*(text(*row) for row in shown), *rest]


_SHORTFALLS = 4


def _shortfall(case_id: str, comparison: Comparison, detectable: float) -> str:
    needed, of_baseline = comparison.launches_needed, len(comparison.rounds)
    budget = comparison.design.launches
    find = f"{counted(budget, 'launch')} find{'s' if budget == 1 else ''}"
    if needed is not None:
        cure = f"it takes {counted(needed, 'launch')} (--llmperf-max-launches={needed})"
    else:
        cure = f"no number of launches will do against {of_baseline} of the baseline: extend it with --update-baselines"
    return (
        f"llmperf: {case_id}: {comparison.metric.name} may not be decided: its tolerance of {percent(comparison.gate.share)} is"
        f" below the {percent(detectable)} that {find} 19 times in 20; {cure},"
        f" or a tolerance of {percent(detectable, up=True)}"
    )


def suite_line(decision: Decision) -> str:
    """Return the verdict on all comparisons together in one line."""
    low, mid, high = (math.expm1(x / 100) for x in (decision.lower, decision.estimate, decision.upper))
    way = "worse" if mid > 0 else "better"
    verdict = decision.outcome.upper()
    return f"suite as a whole: {abs(mid):.1%} {way} [{low:+.1%}, {high:+.1%}] on the {decision.rule}: {verdict}"


def blind_lines(outcomes: Sequence[Outcome]) -> list[str]:
    """Return which audits were off, and which formats have no checksum, each once, with how many cases it is about."""
    texts = Counter(note for outcome in outcomes for note in outcome.notes if is_blind(note) or is_of_older(note))
    return [f"{text} ({count} case{'s' if count > 1 else ''})" for text, count in texts.items()]


def self_test_line(checks: Sequence[dict[str, Any]]) -> str:
    """Return how many gates and injected changes there were, and how many were judged wrongly."""
    faults = sum(check["fault"] is not None for check in checks)
    return f"{counted(len(checks), 'change')} injected into stored samples; {faults or 'none'} judged wrongly"


def counts_line(outcomes: Sequence[Outcome]) -> str:
    """Return `n compared, m not`, with each status and how often it came."""
    compared = [outcome for outcome in outcomes if outcome.compared]
    groups = []
    for label, group in (
        ("compared", compared),
        ("not compared", [outcome for outcome in outcomes if not outcome.compared]),
    ):
        tally = Counter(outcome.status for outcome in group)
        detail = ", ".join(f"{count} {status}" for status, count in sorted(tally.items()))
        groups.append(f"{len(group)} {label}" + (f" ({detail})" if detail else ""))
    return ", ".join(groups)
