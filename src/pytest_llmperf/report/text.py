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


def bounds(row: MetricVerdict) -> str:
    """Return the one-sided bounds of the change, e.g. `[+4.1 %, +8.0 %]`, empty where there are none."""
    if row.worse_low is None and row.worse_high is None:
        return ""
    low = "-inf" if row.worse_low is None else f"{row.worse_low:+.1%}"
    high = "inf" if row.worse_high is None else f"{row.worse_high:+.1%}"
    return f"[{low}, {high}]"


def metric_line(row: MetricVerdict) -> str:
    """Return the line of one metric: verdict, name, baseline, now, change, bounds and rule."""
    metric = BY_NAME[row.metric]
    parts = [f"{row.status or 'observed':<14} {row.metric}: {quantity(row.baseline, metric)} -> {quantity(row.measured, metric)}"]
    parts += [f"{change(row)} {bounds(row)}".strip()] if row.worse is not None else []
    return ", ".join([*parts, row.rule] if row.rule else parts)


def explanation(outcome: Outcome) -> list[str]:
    """Return why a comparison came out as it did: a headline, a line per gating metric, and what may be the reason."""
    verdict = outcome.verdict
    launches = f"{verdict.launches} launch{'es' if verdict.launches != 1 else ''}"
    against = f" against {verdict.baseline_launches} of the baseline" if verdict.baseline_launches else ""
    lines = [f"{outcome.status} {outcome.id} ({launches}{against})"]
    lines += [f"  {reason}" for reason in verdict.reasons]
    order = [
        Status.REGRESSED,
        Status.NOT_COMPARABLE,
        Status.INCONCLUSIVE,
        Status.UNDECIDED,
        Status.PASS,
        Status.IMPROVED,
    ]
    gating = [row for row in verdict.metrics if row.status is not None]
    lines += [f"  {metric_line(row)}" for row in sorted(gating, key=lambda row: order.index(row.status or Status.PASS))]
    return lines + [f"  {note}" for note in outcome.notes]


def metrics_table(outcome: Outcome) -> str:
    """Return every metric of a case, observed ones too."""
    rows = [
        (row.metric, quantity(row.baseline, BY_NAME[row.metric]), quantity(row.measured, BY_NAME[row.metric]),
         change(row), bounds(row), row.status or "observed")
        for row in outcome.verdict.metrics
        if row.measured is not None or row.baseline is not None
    ]  # fmt: skip
    return tabulate(rows, headers=("metric", "baseline", "now", "change", "bounds", "verdict"), disable_numparse=True)


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
