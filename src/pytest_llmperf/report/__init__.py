"""Who is told: outcomes become rows, rows become text or JSON. Nothing is measured or decided here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from pytest_llmperf.judge.verdict import MetricVerdict, Status, Verdict
from pytest_llmperf.measure import Launch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_llmperf.measure.metrics import Metric

JSON_VERSION = 1
"""Version of the `--llmperf-json` file. History: 1, the first."""


@dataclass(frozen=True)
class Outcome:
    """What came of one case, final. It travels on the test report, hence as plain data (`to_data`, `from_data`)."""

    id: str
    nodeid: str
    status: Status
    verdict: Verdict
    launches: tuple[Launch, ...]
    engine: dict[str, Any]
    workload: dict[str, Any]
    notes: tuple[str, ...] = ()
    """What else the reader should know: the file that was written, what has changed, which setting to move."""


def to_data(outcome: Outcome) -> dict[str, Any]:
    """Return the outcome as dicts, lists, strings and numbers."""
    data = msgspec.to_builtins(outcome)
    assert isinstance(data, dict)
    return data


def from_data(data: dict[str, Any]) -> Outcome:
    """Return the outcome that `to_data` took apart."""
    return msgspec.convert(data, Outcome)


def json_document(outcomes: Iterable[Outcome]) -> str:
    """Return the text of `--llmperf-json`: every case with every raw sample."""
    document = {"version": JSON_VERSION, "cases": [to_data(outcome) for outcome in outcomes]}
    return msgspec.json.format(msgspec.json.encode(document), indent=1).decode() + "\n"


def quantity(value: float | None, metric: Metric) -> str:
    """Return a value with its unit, e.g. `8,242 tokens/s`, `12.3 ms`; `-` where there is none."""
    if value is None:
        return "-"
    if metric.unit == "s":
        return f"{value * 1e3:.3g} ms" if abs(value) < 1 else f"{value:.3g} s"
    if metric.unit == "index":
        return f"{value:.3f}"
    if metric.unit == "bytes":
        return f"{value / (1 << 30):.2f} GiB"
    if metric.unit == "share":
        return f"{value:.1%}"
    return f"{value:,.0f} {metric.unit}" if abs(value) >= 100 or value == int(value) else f"{value:.3g} {metric.unit}"


def percent(share: float, *, up: bool = False) -> str:
    """Return a fraction in percent with the digits that matter, e.g. `5 %`, `7.4 %`; whole and rounded up if `up`."""
    return f"{math.ceil(100 * share - 1e-9)} %" if up else f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def change(row: MetricVerdict) -> str:
    """Return how much worse or better, e.g. `12.1 % worse`; in the metric's own direction."""
    if row.worse is None:
        return "-"
    if abs(row.worse) < 0.0005:
        return "same"
    if row.worse <= 0:
        return f"{-row.worse:.1%} better"
    return f"{row.worse:.1%} worse" if row.worse < 2 else f"{1 + row.worse:.1f}x as much"
