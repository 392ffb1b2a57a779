"""Gate settings: which metrics can fail a test, as marker and options write it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pytest_llmperf.plan.checks import PlanError, brief, cut, parse_fraction, written


@dataclass(frozen=True)
class Gate:
    """One entry of a gate setting: which metrics it is about, and what becomes of them."""

    metrics: str
    """A metric's name, or a pattern such as `*_p90_s`."""
    on: bool
    tolerance: float | None = None
    """The change for the worse that must not pass, as a fraction; None for the metric's default."""
    better: str = ""
    """`higher` or `lower` where the entry says it, which only a counter of the engine needs."""
    origin: str = "gate"
    """The option or marker argument it came from, for messages."""


def parse_gate(source: object, *, origin: str) -> tuple[Gate, ...]:
    """Return gate entries from `"ttft_p90_s=8%,preemptions=off"`, or from a dict of the same; a later entry wins.

    A value is a tolerance, `on` (True) for the metric's default tolerance, or `off` (False) for a metric that is only observed.
    In front of a tolerance, or in its place, may stand which values are better: `higher 10 %`, `lower`.
    """
    pairs: list[tuple[object, object]]
    if isinstance(source, str):
        words = [word.strip() for word in source.split(",") if word.strip()]
        if any("=" not in word for word in words):
            raise PlanError(f"{origin}={brief(source)}: write METRIC=TOLERANCE by comma, e.g. ttft_p90_s=8%,preemptions=off")
        pairs = [(name.strip(), value.strip()) for name, _, value in (word.partition("=") for word in words)]
    else:
        pairs = list(source.items()) if isinstance(source, dict) else [(None, None)]
    gates = []
    for name, value in pairs:
        if not isinstance(name, str) or not name:
            raise PlanError(f"{origin}={brief(source)}: must be a dict of metrics and tolerances, e.g. {{'ttft_p90_s': '8 %'}}")
        switch = written(value).lower()
        if isinstance(value, bool) or switch in ("on", "off"):
            gates.append(Gate(name, on=value is True or switch == "on", origin=origin))
            continue
        better, rest = _direction(value)
        tolerance = None if better and not rest else parse_fraction(f"{origin}: {cut(name)}", rest if better else value)
        gates.append(Gate(name, True, tolerance, better, origin))
    return tuple(gates)


def _direction(value: object) -> tuple[str, str]:
    """Return which values are better, where a gate's value says so, and what else it says."""
    match = re.fullmatch(r"\s*(higher|lower)\b\s*(.*?)\s*", value, re.IGNORECASE) if isinstance(value, str) else None
    return (match[1].lower(), match[2]) if match else ("", "")
