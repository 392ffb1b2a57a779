"""How noisy is what was recorded, and which tolerances can be kept with it?"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_llmperf.judge import noise
from pytest_llmperf.judge.comparison import Comparison
from pytest_llmperf.judge.gates import judged

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pytest_llmperf.judge.baseline import Baseline
    from pytest_llmperf.judge.gates import Tolerance
    from pytest_llmperf.judge.maths.stats import Design
    from pytest_llmperf.judge.verdict import MetricVerdict


def calibrated(
    observed: Iterable[MetricVerdict], recorded: Baseline, gated: Mapping[str, Tolerance], design: Design
) -> tuple[MetricVerdict, ...]:
    """Return the rows with how noisy the recorded baseline is: the noise in its parts, and what could be found with it.

    `tolerance` is the one to propose: the detectable slow-down, rounded up to a whole percent.
    """
    believed = noise.beliefs([recorded], {recorded.case_id: tuple(gated)})
    rows = []
    for row in observed:
        gate = gated.get(row.metric)
        metric = judged(row.metric, gate)
        parts = noise.parts(metric, recorded.launches)
        if gate is not None and parts is not None:
            values = noise.values(metric, recorded.launches)
            comparison = Comparison(metric, values, gate, design, believed.get((recorded.case_id, metric.name)))
            detectable = comparison.detectable
            proposed = None if detectable is None else max(math.ceil(100 * detectable), 1) / 100
            row = replace(row, noise=parts, detectable=detectable, tolerance=proposed)
        rows.append(row)
    return tuple(rows)


def noise_of(rows: Iterable[MetricVerdict]) -> dict[str, dict[str, float | None]]:
    """Return what a baseline stores of a calibration, per metric: sds in log-percent, shares as fractions."""
    return {
        row.metric: {
            "round_sd": row.noise.rounds,
            "launch_sd": row.noise.launches,
            "job_sd": row.noise.jobs,
            "launches": row.noise.launch_count,
            "jobs": row.noise.job_count,
            "detectable": row.detectable,
            "proposed_tolerance": row.tolerance,
        }
        for row in rows
        if row.noise is not None
    }
