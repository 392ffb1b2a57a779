"""The self-test of the gates: sound gates have no fault, and each way in which a gate can be broken has one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from pytest_llmperf.judge import noise, selftest
from pytest_llmperf.judge.baseline import Baseline
from pytest_llmperf.judge.gates import Tolerance, gates
from pytest_llmperf.judge.maths.stats import Design
from pytest_llmperf.judge.provenance import Provenance
from pytest_llmperf.judge.selftest import Check, self_test
from pytest_llmperf.judge.verdict import MetricVerdict, Status, Verdict
from pytest_llmperf.measure import metrics
from pytest_llmperf.measure.measurement import Launch, Round
from pytest_llmperf.measure.metrics import BY_NAME, GATING, METRICS
from pytest_llmperf.plan.gates import Gate
from pytest_llmperf.plan.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

DESIGN = Design(comparisons=6)
WORKLOAD = Workload(requests=200)
TTFT, RATE, TAIL, KV = "ttft_p50_s", "output_tokens_per_s", "ttft_p90_s", "kv_cache_tokens"
MEMORY = ("gpu_memory_peak_bytes", "gpu_memory_balance_ratio")
LEVELS = [name for name in GATING if BY_NAME[name].kind in noise.RATIOS]


def stored(
    sd: float = 0.002,
    *,
    launches: int = 20,
    count: Callable[[int], float | None] = lambda _: 0.0,
    without: str = "",
    start: str | None = "warm",
) -> Baseline:
    """Return a baseline whose launches differ by this share; `count` gives the events of each of its launches."""
    rng = np.random.default_rng(1)

    def values(factor: float, number: int) -> dict[str, float | None]:
        found = {
            metric.name: 0.05 * factor if metric.unit == "s" else 900 * factor
            for metric in METRICS
            if metric.start in (None, start)
        }
        found |= {
            KV: 4096.0,
            MEMORY[0]: 1.4e11,
            MEMORY[1]: 1.0,
            "max_concurrency": 9.0,
            "preemptions": count(number),
            "failed_requests": 0.0,
        }
        return {name: value for name, value in found.items() if name != without}

    def launch(number: int) -> Launch:
        found = values(math.exp(rng.normal(0, sd)), number)
        rounds = {name: value for name, value in found.items() if BY_NAME[name].of_round}
        return Launch("l", "", (Round(rounds),) * 5, {name: found[name] for name in found.keys() - rounds.keys()})

    sound = tuple(launch(number) for number in range(launches))
    return Baseline("test_a.py::test_x", "h", dict(vars(WORKLOAD)), WORKLOAD.fingerprint, Provenance({}), sound)


def checked(
    baseline: Baseline, gated: Mapping[str, Tolerance] | None = None, *, cases: int = 10, design: Design = DESIGN
) -> list[Check]:
    """Return the checks of a case in a suite of several that are as noisy."""
    gated = gates(tolerance=design.tolerance) if gated is None else gated
    suite = [replace(baseline, case_id=f"{n}", provenance=Provenance({"n": n})) for n in range(cases)]
    beliefs = {name: belief for (case, name), belief in noise.beliefs(suite, {"0": tuple(gated)}).items() if case == "0"}
    return self_test(baseline, gated, design, beliefs)


def faults(checks: list[Check]) -> dict[tuple[str, str], str]:
    return {(check.metric, check.change): check.fault for check in checks if check.fault}


def statuses(checks: list[Check], metric: str) -> dict[str, Status]:
    return {check.change: check.status for check in checks if check.metric == metric}


def only(*names: str, tolerance: float | None = None) -> dict[str, Tolerance]:
    """Return these gates alone, all of them asked for."""
    asked = [Gate(name, True, tolerance) for name in names]
    return gates([Gate("*", False), *asked], tolerance=DESIGN.tolerance)


# ------------------------------------------------------------------------------------------------ sound gates


def test_every_gate_of_a_quiet_baseline_is_checked_and_has_no_fault() -> None:
    checks = checked(stored())
    assert {check.metric for check in checks} == set(GATING)
    assert faults(checks) == {}


@pytest.mark.parametrize("name", [metric.name for metric in METRICS if metric.kind != "count"])
def test_every_metric_can_gate_without_a_fault(name: str) -> None:
    assert faults(checked(stored(start=BY_NAME[name].start), only(name))) == {}


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [(name, tolerance) for name in (TTFT, RATE, TAIL, KV) for tolerance in (0.01, 0.05, 0.08, 0.3)],
)
def test_no_tolerance_of_a_quiet_metric_is_a_fault(name: str, tolerance: float) -> None:
    checks = checked(stored(), only(name, tolerance=tolerance))
    assert faults(checks) == {}
    found = statuses(checks, name)
    for share in (0.05, 0.10, 0.20):
        if share > tolerance or (share == tolerance and name != KV):  # an exact metric's allowance belongs to it
            assert found[f"{share:.0%} worse"] is Status.REGRESSED
        elif share < tolerance / 2:
            assert found[f"{share:.0%} worse"].green


@pytest.mark.parametrize("name", [*LEVELS, KV])
def test_a_sound_gate_notices_what_is_no_measurement(name: str) -> None:
    found = statuses(checked(stored()), name)
    assert found["unchanged"].green
    assert found["missing"] is found["not a number"] is Status.NOT_COMPARABLE
    units = {found[f"unit 1000 times {change}"] for change in ("smaller", "larger")}
    assert units == {Status.REGRESSED, Status.NOT_COMPARABLE}
    assert not found["zero"].green


@pytest.mark.parametrize(
    "count",
    [lambda _: 0.0, lambda _: 1.0, lambda _: 29.0, lambda number: 28.0 + number % 3, lambda _: 10_000.0],
    ids=["none", "one", "29", "28 to 30", "10 000"],
)
def test_gates_on_counts_have_no_fault_whether_there_were_any_or_none(count: Callable[[int], float]) -> None:
    checks = checked(stored(count=count), only("preemptions"))
    assert faults(checks) == {}
    found = statuses(checks, "preemptions")
    assert found["twice as many and 5 a round"] is Status.REGRESSED
    assert found["missing"] is found["not a number"] is Status.NOT_COMPARABLE
    assert ("20% worse" in found) == bool(count(0))  # a share of none is none


def test_an_asked_gate_without_a_metric_in_the_baseline_is_a_fault() -> None:
    baseline = stored(without=TTFT)
    assert [fault for (metric, _), fault in faults(checked(baseline, only(TTFT))).items() if metric == TTFT] == [
        "the baseline has no such metric: the gate can never fire"
    ]
    assert faults(checked(baseline)).keys() == {(TTFT, "none")}
    assert faults(checked(replace(baseline, lacking={TTFT: "not measured"}))) == {}
    assert faults(checked(stored(count=lambda _: None))) == {}


def test_a_metric_that_only_some_launches_have_is_a_fault() -> None:
    some = stored(count=lambda number: 29.0 if number else None)
    assert faults(checked(some, only("preemptions")))["preemptions", "unchanged"] == "fires where it must not: NOT-COMPARABLE"


# ------------------------------------------------------------------------------------------------ broken gates


def test_a_metric_with_a_wrong_direction_has_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    turned = tuple(replace(one, better="higher") if one.name == TTFT else one for one in METRICS)
    monkeypatch.setattr(metrics, "METRICS", turned)
    monkeypatch.setitem(metrics.BY_NAME, TTFT, next(one for one in turned if one.name == TTFT))
    found = faults(checked(stored()))
    assert {metric for metric, _ in found} == {TTFT}
    for share in ("5%", "10%", "20%"):
        assert found[TTFT, f"{share} worse"].startswith("does not fire: ")
        assert found[TTFT, f"{share} better"] == "fires where it must not: REGRESSED"


def test_a_noisy_baseline_has_gates_that_do_not_fire() -> None:
    found = faults(checked(stored(0.1)))
    assert {metric for metric, _ in found} == set(LEVELS)
    assert all(found[name, "5% worse"] == "does not fire: INCONCLUSIVE" for name in LEVELS)


def test_a_budget_of_one_launch_fires_never() -> None:
    found = faults(checked(stored(), design=replace(DESIGN, launches=1)))
    assert {metric for (metric, change) in found if change == "20% worse"} == {*LEVELS, KV, *MEMORY}


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (Status.PASS, {"does not fire: PASS", "is not noticed: PASS"}),
        (Status.INCONCLUSIVE, {"does not fire: INCONCLUSIVE", "is not noticed: INCONCLUSIVE"}),
        (Status.REGRESSED, {"fires where it must not: REGRESSED", "is not noticed: REGRESSED"}),
        (Status.NOT_COMPARABLE, {"does not fire: NOT-COMPARABLE", "fires where it must not: NOT-COMPARABLE"}),
    ],
)
def test_a_judge_that_always_says_the_same_has_faults(
    monkeypatch: pytest.MonkeyPatch, status: Status, expected: set[str]
) -> None:
    def judge(*_: object, gated: Mapping[str, Tolerance], **__: object) -> Verdict:
        return Verdict(status, tuple(MetricVerdict(name, status, 1.0, 1.0) for name in gated))

    monkeypatch.setattr(selftest, "judge", judge)
    found = faults(checked(stored(count=lambda _: 29.0)))
    assert {metric for metric, _ in found} == set(GATING)
    assert set(found.values()) == expected


def test_a_judge_that_asks_for_more_for_ever_has_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "judge", lambda *_, **__: Verdict(Status.UNDECIDED, tuple(unjudged())))
    assert {metric for metric, _ in faults(checked(stored()))} == set(GATING)


def unjudged() -> list[MetricVerdict]:
    return [MetricVerdict(name, None, 1.0, 1.0) for name in BY_NAME]


def test_a_gate_without_a_verdict_is_judged_by_the_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "judge", lambda *_, **__: Verdict(Status.NOT_COMPARABLE, tuple(unjudged())))
    assert {check.status for check in checked(stored())} == {Status.NOT_COMPARABLE}


def test_a_change_of_one_metric_leaves_the_others_and_the_baseline_alone() -> None:
    baseline = stored()
    before = repr(baseline)
    self_test(baseline, gates(tolerance=0.05), DESIGN, {})
    assert repr(baseline) == before
