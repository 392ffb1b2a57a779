"""Text: the table of a case, and the summary of a run."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from pytest_llmperf.judge.verdict import MetricVerdict, Status
from pytest_llmperf.measure.metrics import find
from pytest_llmperf.units import percent, quantity

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pytest_llmperf.judge.comparison import Comparison
    from pytest_llmperf.judge.maths.stats import Decision
    from pytest_llmperf.report.outcome import Outcome


_LARGEST_BOUND = 100.0  # as a fraction: beyond it a bound says nothing, and its digits only distract
_ASSERTION_LINES = 5  # pytest cuts an explanation after 8 lines or 640 characters


def change(row: MetricVerdict) -> str:
    """Return how much worse or better, e.g. `12.1 % worse`; in the metric's own direction."""
    if row.worse is None:
        return "-"
    if abs(row.worse) < 0.0005:
        return "same"
    if row.worse <= 0:
        return f"{-row.worse:.1%} better"
    return f"{row.worse:.1%} worse" if row.worse < 2 else f"{1 + row.worse:.1f}x as much"


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
    return "\n".join([headline(outcome), *outcome.verdict.reasons, *outcome.notes, "", metrics_table(outcome)])


def metrics_table(outcome: Outcome) -> str:
    """Return every metric of a case, observed ones too."""
    rows = [
        (row.metric, *(quantity(one, find(row.metric).unit) for one in row.compared),
         change(row), bounds(row), "" if row.tolerance is None else percent(row.tolerance),
         "" if row.detectable is None else percent(row.detectable), row.status or "observed", row.rule)
        for row in outcome.verdict.metrics
        if row.measured is not None or row.baseline is not None
    ]  # fmt: skip
    return tabulate(
        rows,
        headers=("metric", "baseline", "now", "change", "bounds", "tolerance", "detectable", "verdict", "rule"),
        disable_numparse=True,
    )


def summary_table(outcomes: Sequence[Outcome]) -> str:
    """Return one line per case: the figures that most readers want."""
    shown = ("output_tokens_per_s", "ttft_p50_s", "tpot_p50_s", "preemptions")
    rows = []
    for outcome in outcomes:
        verdicts = {row.metric: row for row in outcome.verdict.metrics}
        cells = [_cell(verdicts.get(name), name) for name in shown]
        rows.append((outcome.id, *cells, len(outcome.launches), outcome.status))
    headers = ("case", "output tok/s", "TTFT p50", "TPOT p50", "preempt.", "launches", "verdict")
    return tabulate(rows, headers=headers, disable_numparse=True)


def _cell(row: MetricVerdict | None, name: str) -> str:
    if row is None or row.measured is None:
        return "-"
    value = quantity(row.compared[1], find(name).unit)
    if find(name).unit != "s":
        value = value.removesuffix(find(name).unit).strip()
    changed = "" if row.worse is None or abs(row.worse) < 0.0005 else f" ({change(row)})"
    return value + changed


def review_table(outcome: Outcome) -> str:
    """Return every metric of a baseline that was just recorded: old, new, change; and its noise where it was calibrated."""
    rows = []
    for row in outcome.verdict.metrics:
        if row.measured is None and row.baseline is None:
            continue
        metric, parts = find(row.metric), row.noise
        noise = (_sd(parts.rounds), _sd(parts.launches), _sd(parts.jobs)) if parts else ("", "", "")
        found = "" if row.detectable is None else percent(row.detectable)
        proposed = "" if row.tolerance is None else percent(row.tolerance, up=True)
        rows.append(
            (
                row.metric,
                quantity(row.baseline, metric.unit),
                quantity(row.measured, metric.unit),
                change(row),
                *noise,
                found,
                proposed,
            )
        )
    headers = ("metric", "old", "new", "change", "rounds sd", "launches sd", "jobs sd", "detectable", "tolerance to propose")
    used = [i for i in range(len(headers)) if i < 4 or any(row[i] for row in rows)]
    table = tabulate([[row[i] for i in used] for row in rows], headers=[headers[i] for i in used], disable_numparse=True)
    wide = {row.metric: percent(row.tolerance, up=True) for row in outcome.verdict.metrics if row.tolerance}
    return f"{table}\nto gate by what can be found: @pytest.mark.llmperf(gate={wide})" if wide else table


def _sd(log_percent: float | None) -> str:
    return "?" if log_percent is None else f"{log_percent:.2g}%"


def prospects(cases: Iterable[tuple[str, list[Comparison]]], *, verbose: bool) -> list[str]:
    """Return what the stored baselines can find within the budget, per case: everything if verbose, else what falls short.

    A tolerance that the noise hides is told before any GPU time is spent on it.
    """
    lines, short = [], []
    for case_id, comparisons in cases:
        found = [(one, one.detectable) for one in comparisons]
        able = [f"{one.metric.name} {percent(detectable)}" for one, detectable in found if detectable is not None]
        if verbose and able:
            budget = comparisons[0].design.launches
            lines.append(f"llmperf: {case_id}: slow-down found 19 times in 20 within {budget} launches: {', '.join(able)}")
        for one, detectable in found:
            if detectable is not None and detectable > one.gate.share:
                short.append(_shortfall(case_id, one, detectable))
    shown = short if verbose else short[:_SHORTFALLS]
    more = [f"llmperf: and {len(short) - len(shown)} more such tolerances; -v shows all"] if len(short) > len(shown) else []
    return [*lines, *shown, *more]


_SHORTFALLS = 4


def _shortfall(case_id: str, one: Comparison, detectable: float) -> str:
    needed = one.launches_needed
    if needed is not None:
        cure = f"it takes {needed} launches (--llmperf-max-launches={needed})"
    else:
        cure = f"no number of launches will do against {len(one.rounds)} of the baseline: extend it with --update-baselines"
    return (
        f"llmperf: {case_id}: {one.metric.name} may not be decided: its tolerance of {percent(one.gate.share)} is below the"
        f" {percent(detectable)} that {one.design.launches} launches find 19 times in 20; {cure}, or a tolerance of"
        f" {percent(detectable, up=True)}"
    )


def suite_line(decision: Decision) -> str:
    """Return the verdict on all comparisons together in one line."""
    low, mid, high = (math.expm1(x / 100) for x in (decision.lower, decision.estimate, decision.upper))
    way = "worse" if mid > 0 else "better"
    verdict = decision.outcome.upper()
    return f"suite as a whole: {abs(mid):.1%} {way} [{low:+.1%}, {high:+.1%}] on the {decision.rule}: {verdict}"


def self_test_line(checks: Sequence[dict[str, Any]]) -> str:
    """Return how many gates and injected changes there were, and how many were judged wrongly."""
    faults = sum(check["fault"] is not None for check in checks)
    return f"{len(checks)} changes injected into stored samples; {faults or 'none'} judged wrongly"


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
