"""Which gating metrics of a baseline can never be compared, and why: said when it is recorded, not in every run after it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_llmperf.judge import noise
from pytest_llmperf.judge.comparison import Comparison
from pytest_llmperf.judge.gates import judged
from pytest_llmperf.measure.measurement import Round
from pytest_llmperf.measure.metric import end_name
from pytest_llmperf.plan.capacity import CAPACITIES

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from pytest_llmperf.judge.baseline import Baseline
    from pytest_llmperf.judge.gates import Tolerance
    from pytest_llmperf.judge.maths.stats import Design
    from pytest_llmperf.measure.measurement import Launch
    from pytest_llmperf.measure.metrics import Metric
    from pytest_llmperf.plan.workload import Workload

_UNMEASURED = "not measured"
_NEVER_LACKING = frozenset({"output_tokens_per_s", "e2e_p50_s"})
"""What every sound launch has: older files, which do not say what they lack, cannot have been recorded without it."""
_GONE = "the baseline has lost it: restore the file, or record it anew with --update-baselines"


def reason(metric: Metric, launches: Sequence[Launch], gate: Tolerance, design: Design) -> str | None:
    """Return why nothing can be compared with a metric of these launches; None where it can."""
    values = noise.values(metric, launches)
    if not values:
        return f"no start was {metric.start}"
    if not any(values):
        return _UNMEASURED
    if not all(values):
        return f"not measured in {sum(not each for each in values)} of {len(values)} launches"
    if not all(math.isfinite(value) for launch in values for value in launch):
        return "a value is not a finite number"
    if metric.name in CAPACITIES.values() and any(
        launch.metrics.get(end_name(metric.name, "low")) is None for launch in launches
    ):
        return "not even the smallest load of the search holds; lower its bounds, or loosen the limits"
    return Comparison(metric, values, gate, design).unusable


def lacking(
    launches: Sequence[Launch], gated: Mapping[str, Tolerance], design: Design, workload: Workload, *, complete: bool = True
) -> dict[str, str]:
    """Return the gating metrics that a baseline of these launches can never be compared by, each with the reason.

    Where the launches are not `complete`, those to come may be warm; a cold start comes first or not at all.
    """
    rounds = min(len(launch.rounds) for launch in launches)
    lacks = {}
    for name, gate in gated.items():
        metric = judged(name, gate)
        if not complete and metric.start == "warm" and not noise.alike(metric, launches):
            continue
        why = reason(metric, launches, gate, design) or metric.too_few(workload, rounds)
        if why and (gate.asked or applies(metric, launches)):
            lacks[name] = why
    return lacks


def unexplained(metric: Metric, stored: Baseline, *, measured: bool) -> str | None:
    """Return why a metric that gates by default, and that a baseline has no value of, is no small matter; None where it is said.

    What is lacking is named in the file since format 3. Older ones hold the metric's name with null values, which is taken for
    it; one whose name is gone was damaged, or is older than the metric, and matters where it can be `measured`.
    """
    if stored.lacking is not None:
        return _GONE if measured and metric.name not in stored.lacking else None
    named = all(
        any(metric.name in figures for figures in (launch.metrics, *(each.metrics for each in launch.rounds)))
        for launch in stored.launches
    )
    return _GONE if metric.name in _NEVER_LACKING or (measured and not named) else None


def lost(
    before: Sequence[Launch], lacks: Collection[str], gated: Mapping[str, Tolerance], design: Design, workload: Workload
) -> list[str]:
    """Return which of the metrics that a new baseline lacks the one `before` could be compared by."""
    lacked = lacking(before, gated, design, workload)
    return [name for name in lacks if name in gated and name not in lacked and applies(judged(name, gated[name]), before)]


def applies(metric: Metric, launches: Sequence[Launch]) -> bool:
    """Return whether a metric could be told of these launches at all: memory of GPUs needs some, its balance several."""
    if not metric.name.startswith("gpu_"):
        return True
    least = 2 if metric.name == "gpu_memory_balance_ratio" else 1
    return any(len(launch.memory) >= least for launch in launches)


def without(launches: Sequence[Launch], names: Collection[str]) -> tuple[Launch, ...]:
    """Return the launches as they are stored: nothing of these metrics, which would look as if they could gate."""

    def stripped(values: dict[str, float | None]) -> dict[str, float | None]:
        return {name: None if name in names else value for name, value in values.items()}

    return tuple(
        replace(launch, metrics=stripped(launch.metrics), rounds=tuple(Round(stripped(each.metrics)) for each in launch.rounds))
        for launch in launches
    )


def sentence(lacks: Mapping[str, str]) -> str:
    """Return what a note says of them: the metrics of each reason together."""
    reasons = dict.fromkeys(lacks.values())
    groups = (f"{', '.join(name for name in lacks if lacks[name] == why)} ({why})" for why in reasons)
    return f"not in the baseline, and never compared: {'; '.join(groups)}"
