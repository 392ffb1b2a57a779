"""Tables as values: columns, rows of cells, footnotes. Text renders them (`text.render`), as any other format can."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from pytest_llmperf.measure.metrics import find
from pytest_llmperf.plan.capacity import CAPACITIES
from pytest_llmperf.units import percent, quantity, signed_percent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_llmperf.judge.scaling import Curve
    from pytest_llmperf.judge.verdict import MetricVerdict
    from pytest_llmperf.report.outcome import Outcome

_LARGEST_BOUND = 100.0
"""As a fraction: beyond it a bound says nothing, and its digits only distract."""
_SHOWN = {"output_tokens_per_s": "output tok/s", "ttft_p50_s": "TTFT p50", "tpot_p50_s": "TPOT p50", "preemptions": "preempt."}
"""The metrics of the summary, which most readers want, and their headers."""


@dataclass(frozen=True)
class Column:
    """What stands above a column, and how its cells are aligned."""

    header: str
    align: Literal["left", "right"] = "left"


@dataclass(frozen=True)
class Table:
    """Cells are texts: quantities are written by `units`, the same in every format."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    footnotes: tuple[str, ...] = ()

    def without_empty(self, *headers: str) -> Table:
        """Return the table without those of these columns in which no row has anything."""
        empty = {column.header for i, column in enumerate(self.columns) if not any(row[i] for row in self.rows)}
        kept = [i for i, column in enumerate(self.columns) if column.header not in empty.intersection(headers)]
        rows = tuple(tuple(row[i] for i in kept) for row in self.rows)
        return replace(self, columns=tuple(self.columns[i] for i in kept), rows=rows)


def _columns(*headers: str) -> tuple[Column, ...]:
    return tuple(map(Column, headers))


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
    return unbounded if value is None or abs(value) > _LARGEST_BOUND else signed_percent(value)


def _share(value: float | None, *, up: bool = False) -> str:
    return "" if value is None else percent(value, up=up)


def metrics_table(outcome: Outcome) -> Table:
    """Return every metric of a case, observed ones too."""
    rows = tuple(
        (row.metric, *(quantity(value, find(row.metric).unit) for value in row.compared), change(row), bounds(row),
         _share(row.tolerance), _share(row.detectable), row.status or ("not compared" if row.rule else "observed"), row.rule)
        for row in outcome.verdict.metrics
        if row.measured is not None or row.baseline is not None or (row.rule and row.status is None)
    )  # fmt: skip
    return Table(_columns("metric", "baseline", "now", "change", "bounds", "tolerance", "detectable", "verdict", "rule"), rows)


def summary_table(outcomes: Sequence[Outcome]) -> Table:
    """Return one row per case: the figures that most readers want."""
    rows = []
    for outcome in outcomes:
        verdicts = {row.metric: row for row in outcome.verdict.metrics}
        searched = next((verdicts[name] for name in CAPACITIES.values() if name in verdicts and verdicts[name].measured), None)
        capacity = _cell(searched, with_unit=True) if searched else ""
        # What a search measured at the largest load that held is of another load each time: no change is to be read from it.
        figures = {name: replace(row, worse=None) for name, row in verdicts.items()} if searched else verdicts
        cells = (_cell(figures.get(name)) for name in _SHOWN)
        rows.append((outcome.id, capacity, *cells, str(len(outcome.launches)), str(outcome.status)))
    columns = _columns("case", "capacity", *_SHOWN.values(), "launches", "verdict")
    return Table(columns, tuple(rows)).without_empty("capacity")


def _cell(row: MetricVerdict | None, *, with_unit: bool = False) -> str:
    if row is None or row.measured is None:
        return "-"
    unit = find(row.metric).unit
    value = quantity(row.compared[1], unit)
    if unit != "s" and not with_unit:
        value = value.removesuffix(unit).strip()
    changed = change(row)
    return value if changed in ("-", "same") else f"{value} ({changed})"


def review_table(outcome: Outcome) -> Table:
    """Return every metric of a baseline that was just recorded: old, new, change; and its noise where it was calibrated."""
    rows = []
    for row in outcome.verdict.metrics:
        if row.measured is None and row.baseline is None:
            continue
        unit, parts = find(row.metric).unit, row.noise
        noise = (_sd(parts.rounds), _sd(parts.launches), _sd(parts.jobs)) if parts else ("", "", "")
        figures = (quantity(row.baseline, unit), quantity(row.measured, unit), change(row))
        rows.append((row.metric, *figures, *noise, _share(row.detectable), _share(row.tolerance, up=True)))
    optional = ("rounds sd", "launches sd", "jobs sd", "detectable", "tolerance to propose")
    wide = {row.metric: percent(row.tolerance, up=True) for row in outcome.verdict.metrics if row.tolerance}
    notes = (f"to gate by what can be found: @pytest.mark.llmperf(gate={wide})",) if wide else ()
    return Table(_columns("metric", "old", "new", "change", *optional), tuple(rows), notes).without_empty(*optional)


def _sd(log_percent: float | None) -> str:
    return "?" if log_percent is None else f"{log_percent:.2g}%"


def scaling_table(scaling: Curve) -> Table:
    """Return a row for each degree; footnotes say what is relative to what, and which degrees were not measured."""
    rows = tuple(
        (
            str(point.degree),
            str(point.gpus),
            f"{point.output_tokens_per_s:,.0f}",
            f"{point.speed_up:.2f}x",
            f"{point.efficiency:.0%}",
            f"{point.output_tokens_per_s_per_gpu:,.0f}",
            *(quantity(value, "s") for value in (point.ttft_p50_s, point.tpot_p50_s)),
        )
        for point in scaling.points
    )
    headers = ("TP", "GPUs", "output tok/s", "speed-up", "efficiency", "tok/s per GPU", "TTFT p50", "TPOT p50")
    first = scaling.reference.degree
    relative = f"speed-up and efficiency are relative to TP {first}, the smallest degree that was measured"
    missing = (f"TP {degree} was not measured: {why}" for degree, why in sorted(scaling.unfit.items()))
    table = Table(_columns(*headers), rows, (*([relative] if first != 1 else []), *missing))
    if any(point.gpus != point.degree for point in scaling.points):
        return table
    return replace(table, columns=table.columns[1:], rows=tuple(row[1:] for row in rows))
