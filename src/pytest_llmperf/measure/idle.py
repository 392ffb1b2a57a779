"""Is an engine that has idled still warm? The same rounds before and after a pause, as ratios, and the first request after it."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_llmperf.measure import formulas
from pytest_llmperf.units import duration

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pytest_llmperf.measure.client.response import RequestRecord
    from pytest_llmperf.measure.measurement import Round
    from pytest_llmperf.plan.workload import Workload

TTFT, OUTPUT, FIRST = "idle_ttft_ratio", "idle_output_tokens_ratio", "idle_first_ttft_s"
_OF = {TTFT: "ttft_p50_s", OUTPUT: "output_tokens_per_s"}
_WORTH_A_WORD = 0.1
"""An engine that is worse by less than this share is said to be as before."""


def single(workload: Workload) -> Workload:
    """Return the workload of the first request after the pause: one of the workload's, alone."""
    return replace(workload, requests=workload.turns, concurrency=1, classes=())


def ratios(before: Sequence[Round], after: Sequence[Round], first: RequestRecord) -> dict[str, float | None]:
    """Return after over before, of the medians over rounds (1 is unchanged), and the seconds to the first token after the pause.

    None for what was not measured on both sides.
    """
    values = {name: _ratio(_median(before, metric), _median(after, metric)) for name, metric in _OF.items()}
    return values | {FIRST: next(iter(formulas.ttft(first)), None)}


def warnings(measured: Mapping[str, float | None], idle_s: float) -> Iterator[str]:
    """Yield that an engine is slower after it has idled."""
    ttft, output = measured.get(TTFT), measured.get(OUTPUT)
    worse = []
    if ttft and ttft > 1 + _WORTH_A_WORD:
        worse.append(f"TTFT p50 is {ttft:.2f} times what it was")
    if output and output < 1 - _WORTH_A_WORD:
        worse.append(f"output tokens/s are {output:.2f} times what they were")
    if worse:
        yield f"the engine did not stay warm: after idling for {duration(idle_s)} {' and '.join(worse)}"


def _median(rounds: Sequence[Round], metric: str) -> float | None:
    values = [value for each in rounds if (value := each.metrics.get(metric)) is not None]
    return statistics.median(values) if values else None


def _ratio(before: float | None, after: float | None) -> float | None:
    return after / before if before and after else None
