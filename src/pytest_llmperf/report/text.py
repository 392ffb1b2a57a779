"""Text: the table of a case, and the summary of a run."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from tabulate import tabulate

from pytest_llmperf.judge.verdict import MetricVerdict, Status
from pytest_llmperf.measure.metrics import BY_NAME
from pytest_llmperf.report import change, quantity

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_llmperf.report import Outcome


_LARGEST_BOUND = 100.0  # as a fraction: beyond it a bound says nothing, and its digits only distract
_ASSERTION_LINES = 5  # pytest cuts an explanation after 8 lines or 640 characters


def bounds(row: MetricVerdict) -> str:
    """Return the one-sided bounds of the change, e.g. `[+4.1 %, +8.0 %]`, empty where there are none."""
    if row.worse_low is None and row.worse_high is None:
        return ""
    return f"[{_bound(row.worse_low, '-inf')}, {_bound(row.worse_high, 'inf')}]"


def _bound(value: float | None, unbounded: str) -> str:
    return unbounded if value is None or abs(value) > _LARGEST_BOUND else f"{value:+.1%}"


def headline(outcome: Outcome) -> str:
    """Return the verdict on a case in one line."""
    verdict = outcome.verdict
    launches = f"{verdict.launches} launch{'es' if verdict.launches != 1 else ''}"
    against = f" against {verdict.baseline_launches} of the baseline" if verdict.baseline_launches else ""
    return f"{outcome.status} {outcome.id} ({launches}{against})"


def metric_line(row: MetricVerdict) -> str:
    """Return the line of one metric: name, baseline, now and change; the rule where there are no numbers."""
    metric = BY_NAME[row.metric]
    change_text = change(row) if row.status is not Status.NOT_COMPARABLE else row.rule
    return f"{row.metric}: {quantity(row.baseline, metric)} -> {quantity(row.measured, metric)}, {change_text}"


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
    return "\n".join([headline(outcome), *outcome.verdict.reasons, *outcome.notes, "", metrics_table(outcome)])


def metrics_table(outcome: Outcome) -> str:
    """Return every metric of a case, observed ones too."""
    rows = [
        (row.metric, quantity(row.baseline, BY_NAME[row.metric]), quantity(row.measured, BY_NAME[row.metric]),
         change(row), bounds(row), row.status or "observed", row.rule)
        for row in outcome.verdict.metrics
        if row.measured is not None or row.baseline is not None
    ]  # fmt: skip
    return tabulate(rows, headers=("metric", "baseline", "now", "change", "bounds", "verdict", "rule"), disable_numparse=True)


def summary_table(outcomes: Sequence[Outcome]) -> str:
    """Return one line per case: the figures that most readers want."""
    shown = ("output_tokens_per_s", "ttft_p50_s", "itl_p50_s", "preemptions")
    rows = []
    for outcome in outcomes:
        verdicts = {row.metric: row for row in outcome.verdict.metrics}
        cells = [_cell(verdicts.get(name), name) for name in shown]
        rows.append((outcome.id, *cells, len(outcome.launches), outcome.status))
    headers = ("case", "output tok/s", "TTFT p50", "ITL p50", "preempt.", "launches", "verdict")
    return tabulate(rows, headers=headers, disable_numparse=True)


def _cell(row: MetricVerdict | None, name: str) -> str:
    if row is None or row.measured is None:
        return "-"
    value = quantity(row.measured, BY_NAME[name]).removesuffix(BY_NAME[name].unit).strip()
    if BY_NAME[name].unit == "s":
        value = quantity(row.measured, BY_NAME[name])
    changed = "" if row.worse is None or abs(row.worse) < 0.0005 else f" ({change(row)})"
    return value + changed


def counts_line(outcomes: Sequence[Outcome]) -> str:
    """Return `n compared, m not`, with each status and how often it came."""
    compared = [outcome for outcome in outcomes if outcome.status.compared]
    groups = []
    for label, group in (
        ("compared", compared),
        ("not compared", [outcome for outcome in outcomes if not outcome.status.compared]),
    ):
        tally = Counter(outcome.status for outcome in group)
        detail = ", ".join(f"{count} {status}" for status, count in sorted(tally.items()))
        groups.append(f"{len(group)} {label}" + (f" ({detail})" if detail else ""))
    return ", ".join(groups)
