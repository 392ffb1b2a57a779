"""The capacity under limits: what is asked for, how a round becomes a probe, and how values at the bounds are judged."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.judge.baseline import Baseline
from pytest_llmperf.judge.gates import Tolerance, gates, gates_of
from pytest_llmperf.judge.lacking import lacking
from pytest_llmperf.judge.maths.stats import Design
from pytest_llmperf.judge.provenance import Provenance
from pytest_llmperf.judge.verdict import Status, judge
from pytest_llmperf.measure.capacity import measure_capacity, queue_grows, to_probe
from pytest_llmperf.measure.client.processes import LoadClient
from pytest_llmperf.measure.client.response import RequestRecord
from pytest_llmperf.measure.engines.opening import open_engine
from pytest_llmperf.measure.engines.phases import Phases
from pytest_llmperf.measure.launch import RoundSettings
from pytest_llmperf.measure.measurement import Launch, Measurement, Round
from pytest_llmperf.plan.axes import Axes
from pytest_llmperf.plan.capacity import CapacityWorkload, capacity_from
from pytest_llmperf.plan.case import Case
from pytest_llmperf.plan.checks import PlanError
from pytest_llmperf.plan.engine import EngineSpec
from pytest_llmperf.plan.gates import parse_gate
from pytest_llmperf.testing import Clock, Options, SimulatedEngine

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SLO = {"ttft_s": 0.5}


def asked(**arguments: Any) -> CapacityWorkload:
    return capacity_from(Axes(), {}, {"slo": SLO, **arguments})


# ------------------------------------------------------------------------------------------------ what is asked


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "name the bounds of one load"),
        ({"rate": (1, 2), "concurrency": (1, 2)}, "and only one"),
        ({"rate": 5}, "must be the smallest and the largest load to try"),
        ({"rate": (5, 5)}, "must be the smallest and the largest load to try"),
        ({"rate": (0, 5)}, "must be the smallest and the largest load to try"),
        ({"rate": ("a", "b")}, "must be the smallest and the largest load to try"),
        ({"concurrency": (1.5, 4)}, "must be a whole number"),
        ({"rate": (1, 5), "slo": None}, "name the limits that a good request keeps"),
        ({"rate": (1, 5), "share": 1}, "must be a share between 0 and 1"),
        ({"rate": (1, 5), "resolution": 0}, "must be a share between 0 and 1"),
        ({"rate": (1, 5), "repeats": 0}, "the smallest value is 1"),
        ({"rate": (1, 5), "trace": "x.jsonl"}, "no load that could be varied"),
        ({"rate": (1, 5), "shares": 0.9}, "unknown workload argument"),
    ],
)
def test_a_search_that_cannot_be_is_refused_in_words(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        asked(**arguments)


@pytest.mark.parametrize("bounds", [(1, 64), [1, 64], "1..64"])
def test_bounds_are_a_pair_or_a_range(bounds: object) -> None:
    workload = asked(rate=bounds)
    assert (workload.varied, workload.low, workload.high) == ("rate", 1, 64)


@given(st.sampled_from(["rate", "concurrency"]), st.one_of(st.text(max_size=9), st.tuples(st.floats() | st.integers(),
       st.floats() | st.integers()), st.none() | st.booleans() | st.floats()))  # fmt: skip
def test_whatever_is_given_as_bounds_is_two_loads_or_refused(name: str, value: object) -> None:
    try:
        workload = asked(**{name: value})
    except PlanError:
        return
    assert 0 < workload.low < workload.high < math.inf


def test_the_load_of_the_test_id_and_of_the_defaults_gives_way() -> None:
    workload = capacity_from(Axes(rate=3.0), {"concurrency": 4, "slo": SLO, "prompt_tokens": 7}, {"rate": (1, 64)})
    round_ = workload.at(8.0, 300)
    assert (round_.rate, round_.requests, round_.prompt_tokens) == ((8.0,), 300, 7)


def test_users_in_flight_are_whole_numbers_of_a_closed_loop() -> None:
    round_ = asked(concurrency=(2, 64)).at(5.0, 40)
    assert (round_.concurrency, round_.rate, round_.requests) == (5, (), 40)


def test_conversations_stay_whole_at_every_load() -> None:
    assert asked(rate=(1, 64), turns=3).at(2.0, 100).requests == 102


@pytest.mark.parametrize(
    "other",
    [{"rate": (1, 65)}, {"share": 0.95}, {"resolution": 0.1}, {"repeats": 2}, {"slo": {"ttft_s": 0.6}}, {"requests": 50},
     {"prompt_tokens": 9}, {"seed": 1}],
)  # fmt: skip
def test_another_search_is_another_workload(other: dict[str, Any]) -> None:
    assert asked(**{"rate": (1, 64)} | other).fingerprint != asked(rate=(1, 64)).fingerprint


def test_the_load_of_the_test_id_is_no_part_of_the_search() -> None:
    same = [capacity_from(Axes(concurrency=number), {}, {"slo": SLO, "rate": (1, 64)}).fingerprint for number in (1, 8)]
    assert same[0] == same[1]


def test_a_search_is_described_by_its_bounds_and_what_it_sends() -> None:
    shown = asked(rate=(1, 64), prompt_tokens=9).description
    assert shown["capacity"] == {"varied": "rate", "low": 1, "high": 64, "share": 0.99, "resolution": 0.05, "repeats": 3}
    assert shown["prompt_tokens"] == 9
    assert not {"rate", "concurrency", "requests"} & set(shown)


# ---------------------------------------------------------------------------------------------- rounds to probes


def at_rate(rate: float, waits: Callable[[int], float], count: int = 400) -> list[RequestRecord]:
    """Return requests that were due at a rate, each answered after a wait."""
    return [RequestRecord(due := 100 + n / rate, (due + waits(n),), due + waits(n) + 0.1, 8, 1, due_s=due) for n in range(count)]


def test_a_queue_grows_where_more_is_sent_than_served() -> None:
    for over in (1.1, 1.2, 2.0):
        assert queue_grows(at_rate(20, lambda n, over=over: 0.05 + (over - 1) * n / 20), 0.05)  # type: ignore[misc]


@pytest.mark.parametrize("spread", [0.0, 0.01, 0.3])
def test_a_wait_that_only_varies_is_no_growing_queue(spread: float) -> None:
    for seed in range(50):
        rng = random.Random(seed)
        assert not queue_grows(at_rate(20, lambda _, rng=rng: 0.05 + rng.expovariate(1) * spread), 0.05)  # type: ignore[misc]


def test_an_engine_that_fills_at_the_beginning_has_no_growing_queue() -> None:
    assert not queue_grows(at_rate(20, lambda n: min(n, 60) / 60 * 0.4), 0.05)


def test_too_few_requests_say_nothing_of_a_queue() -> None:
    assert not queue_grows(at_rate(20, lambda n: n / 20, count=39), 0.05)


def test_a_failed_request_is_not_good() -> None:
    workload = asked(rate=(1, 64)).at(20.0, 400)
    records = [*at_rate(20, lambda _: 0.2, count=48), RequestRecord(None, error="HTTP 503"), *at_rate(20, lambda _: 0.6, count=1)]
    probe = to_probe(20.0, records, workload, 0.05)
    assert (probe.good, probe.total, probe.grows) == (48, 50, False)


def test_the_first_wave_of_a_closed_loop_is_not_judged() -> None:
    workload = asked(concurrency=(1, 64)).at(4.0, 12)
    wave = [RequestRecord(1.0 + n / 1e6, (2.0,), 2.1, 8, 1) for n in range(4)]
    later = [RequestRecord(2.2, (2.3,), 2.4, 8, 1) for _ in range(8)]
    probe = to_probe(4.0, [*later, *wave], workload, 0.05)
    assert (probe.good, probe.total) == (8, 8)


# ------------------------------------------------------------------------------------------- values at the bounds

NAME = "capacity_requests_per_s"


def launch(value: float, *, low: bool = True, high: bool = True) -> Launch:
    ends = {
        "capacity_low_requests_per_s": value * 0.98 if low else None,
        "capacity_high_requests_per_s": value * 1.02 if high else None,
    }
    return Launch("a", "2026-01-01T00:00:00", (Round({}),), {NAME: value, **ends}, job="j")


def verdict(before: Sequence[Launch], now: Sequence[Launch]) -> tuple[Status, str]:
    case = Case("test_x.py::test_x", EngineSpec(), asked(rate=(1, 64)))
    workload = case.workload
    stored = Baseline(case.id, "h", workload.description, workload.fingerprint, Provenance({}), tuple(before))
    gated = {NAME: Tolerance(0.1, asked=True)}
    result = judge(Measurement(case, tuple(now)), stored, design=Design(), gated=gated, beliefs={})
    [row] = [row for row in result.metrics if row.metric == NAME]
    return result.status, row.rule


TOP = launch(64.0, high=False)
NOWHERE = launch(1.0, low=False)
INSIDE = launch(62.0)


def test_all_at_the_upper_bound_are_alike() -> None:
    assert verdict([TOP] * 5, [TOP])[0] is Status.PASS


def test_a_capacity_at_the_bound_is_no_worse_than_a_smaller_one() -> None:
    assert verdict([launch(40.0)] * 5, [TOP])[0] is Status.IMPROVED


def test_much_less_than_a_baseline_at_the_bound_is_worse() -> None:
    assert verdict([TOP] * 5, [launch(40.0)] * 2)[0] is Status.REGRESSED


def test_a_little_less_than_a_baseline_at_the_bound_cannot_be_told() -> None:
    status, rule = verdict([TOP] * 5, [INSIDE] * 2)
    assert status is Status.NOT_COMPARABLE
    assert "raise the bound and record it anew" in rule


def test_where_not_even_the_smallest_load_holds_it_is_worse() -> None:
    assert verdict([launch(40.0)] * 5, [NOWHERE] * 2)[0] is Status.REGRESSED


def test_where_nothing_holds_near_a_small_baseline_it_cannot_be_told() -> None:
    status, rule = verdict([launch(1.02)] * 5, [NOWHERE] * 3)
    assert status is Status.NOT_COMPARABLE
    assert "not even the smallest load holds in this run" in rule


def test_no_baseline_is_made_of_a_search_that_found_nothing() -> None:
    lacks = lacking([NOWHERE], {NAME: Tolerance(0.1, asked=True)}, Design(), asked(rate=(1, 64)))
    assert lacks[NAME].startswith("not even the smallest load of the search holds")


def test_only_what_a_search_comes_to_gates_it() -> None:
    description = asked(rate=(1, 64)).description
    assert gates_of((), description, tolerance=0.05) == {NAME: Tolerance(0.1, asked=True)}
    stricter = parse_gate({NAME: "4 %", "ttft_p50_s": "1 %"}, origin="gate")
    assert gates_of(stricter, description, tolerance=0.05) == {NAME: Tolerance(0.04, asked=True)}


def test_what_a_search_comes_to_gates_nothing_else_of_its_test() -> None:
    both = parse_gate({NAME: "4 %", "ttft_p50_s": "1 %"}, origin="gate")
    gated = gates_of(both, {"requests": 3}, tolerance=0.05)
    assert NAME not in gated
    assert gated["ttft_p50_s"].asked


@pytest.mark.parametrize(("pattern", "count"), [("*_per_s", 0), ("*", 0), ("capacity_*", 6), ("capacity_requests_per_s", 1)])
def test_a_pattern_means_a_capacity_only_where_it_says_so(pattern: str, count: int) -> None:
    gated = gates(parse_gate({pattern: "on"}, origin="gate"), tolerance=0.05)
    assert sum(name.startswith("capacity_") for name in gated) == count


# ------------------------------------------------------------------------------------------------ how the engine was started


@pytest.mark.parametrize("cold", [True, False])
def test_a_search_tells_cold_starts_from_warm_ones(cold: bool) -> None:
    wanted = asked(concurrency=(1, 2), requests=2, prompt_tokens=4, output_tokens=2, slo={"e2e_s": 60}, share=0.5)
    clock = Clock(step_s=1e-3, sequence_s=0.0, prefill_token_s=0.0)
    with (
        SimulatedEngine(Options(clock=clock)) as served,
        LoadClient() as client,
        open_engine(EngineSpec(kind="url", url=served.url)) as engine,
    ):
        engine.startup_s, engine.phases = 90.0, Phases(import_s=30.0, compile_s=20.0, cold=cold)  # type: ignore[misc]
        launch = measure_capacity(engine, client, wanted, RoundSettings(nonce="case"))
    assert (launch.metrics["startup_cold_s"], launch.metrics["startup_compile_s"]) == ((90.0, None) if cold else (None, 20.0))
    assert any("a cold start" in warning for warning in launch.warnings) == cold
