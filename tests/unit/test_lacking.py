"""What a baseline of some launches can never be compared by."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from pytest_llmperf.judge.gates import Tolerance
from pytest_llmperf.judge.lacking import lacking, sentence, without
from pytest_llmperf.judge.maths.stats import Design
from pytest_llmperf.measure.gpus.memory import RankMemory
from pytest_llmperf.measure.measurement import Launch, Round
from pytest_llmperf.plan.workload import Workload


def launch(**values: float | None) -> Launch:
    return Launch("a", "2026-01-01T00:00:00", (Round(values), Round(values)), {"kv_cache_tokens": 100.0})


def found(*launches: Launch, asked: bool = False, gate: str = "tpot_p50_s") -> dict[str, str]:
    return lacking(launches, {gate: Tolerance(0.05, asked)}, Design(), Workload())


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ((0.01, 0.02), None),
        ((None, None), "not measured"),
        ((0.01, None), "not measured in 1 of 2 launches"),
        ((0.01, 0.0), "A round is 0.0"),
        ((0.01, -1.0), "A round is -1.0"),
        ((0.01, math.inf), "a value is not a finite number"),
        ((math.nan, 0.01), "a value is not a finite number"),
    ],
)
def test_a_ratio_is_lacking_where_no_ratio_can_be_formed(values: tuple[float | None, ...], why: str | None) -> None:
    said = found(*(launch(tpot_p50_s=value) for value in values)).get("tpot_p50_s")
    assert said is None if why is None else said is not None and said.startswith(why), said


def test_a_count_of_zero_can_be_compared() -> None:
    assert not found(launch(preemptions=0.0), launch(preemptions=0.0), gate="preemptions")
    assert found(launch(preemptions=0.3), gate="preemptions")["preemptions"].startswith("Counts are whole numbers")


def test_a_percentile_of_too_few_values_is_lacking() -> None:
    launches = [replace(launch(), metrics={"ttft_p99_s": 0.2})] * 2
    assert "10 are needed" in found(*launches, asked=True, gate="ttft_p99_s")["ttft_p99_s"]


def test_memory_of_gpus_is_not_missed_where_there_are_none() -> None:
    alone = replace(launch(), memory=(RankMemory(0, 0, None, None, None, None),))
    assert not found(launch(), gate="gpu_memory_peak_bytes")
    assert found(alone, gate="gpu_memory_peak_bytes")
    assert not found(alone, gate="gpu_memory_balance_ratio")
    assert found(launch(), gate="gpu_memory_peak_bytes", asked=True)


def test_metrics_that_lack_for_one_reason_are_named_together() -> None:
    text = sentence({"ttft_p50_s": "not measured", "e2e_p50_s": "A round is 0.0.", "tpot_p50_s": "not measured"})
    assert text == "not in the baseline, and never compared: ttft_p50_s, tpot_p50_s (not measured); e2e_p50_s (A round is 0.0.)"


def test_what_is_lacking_is_stored_as_missing_and_nothing_else() -> None:
    [kept] = without([launch(tpot_p50_s=0.0, e2e_p50_s=0.2)], {"tpot_p50_s", "kv_cache_tokens"})
    assert [each.metrics for each in kept.rounds] == [{"tpot_p50_s": None, "e2e_p50_s": 0.2}] * 2
    assert kept.metrics == {"kv_cache_tokens": None}
