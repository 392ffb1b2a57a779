"""The harness that measures error rates end to end: its engine keeps the simulated engine's time, and its suites are sound."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pytest_llmperf.measure.client.prompts import prompts
from pytest_llmperf.plan.engine import EngineSpec
from pytest_llmperf.plan.workload import Workload
from pytest_llmperf.testing import Clock
from pytest_llmperf.testing.scheduler import Request, token_times_s
from tests.simulated_suites import Design, Machine, SuiteResult, run_suites, table, upper_bound

SMALL = Design(tests=4, engines=2, launches=3, seed=1)


def test_an_engine_in_virtual_time_answers_as_the_simulated_engine_does() -> None:
    workload = Workload(prompt_tokens=40, output_tokens=6, requests=7, concurrency=3)
    drawn = prompts(workload, 0, vocabulary=None, nonce="")
    clock = Clock(launch_cv=0.1, round_cv=0.1, seed=5, launch=2, slow_down=1.2, max_num_seqs=2)
    expected = token_times_s(clock, [Request(n, one.token_ids, 6) for n, one in enumerate(drawn)], 3)
    machine = Machine(replace(clock, max_num_seqs=256))
    with machine.open_engine(EngineSpec(kind="simulated", args=(("max-num-seqs", ("2",)),))) as engine:
        log = machine.play(engine.endpoint.plan(drawn, concurrency=3, request_timeout_s=1, stall_timeout_s=1))
    for number, record in enumerate(log.records):
        assert (record.sent_s, *record.token_times_s) == pytest.approx(expected[number])
        assert (record.end_s, record.prompt_tokens, record.output_tokens) == (record.token_times_s[-1], 40, 6)


def test_each_start_and_each_round_has_noise_of_its_own() -> None:
    drawn = prompts(Workload(requests=8), 0, vocabulary=None, nonce="")
    machine, spec = Machine(Clock(launch_cv=0.1, round_cv=0.1)), EngineSpec(kind="simulated")
    durations = set()
    for _ in range(2):
        with machine.open_engine(spec) as engine:
            plan = engine.endpoint.plan(drawn, concurrency=8, request_timeout_s=1, stall_timeout_s=1)
            for _ in range(2):
                record = machine.play(plan).records[0]
                durations.add(round(record.end_s - record.sent_s, 9))
    assert len(durations) == 4
    assert machine.starts[spec] == 2


def sound(design: Design) -> list[SuiteResult]:
    results = list(run_suites(design, 2))
    assert [result.broken for result in results] == ["", ""]
    assert all(len(result.statuses) == len(result.launches) == 4 for result in results)
    assert all(result.starts == result.promised and len(result.starts) == 2 for result in results)
    return results


def test_clean_suites_are_green_and_clearly_slower_ones_red() -> None:
    clean, slower = sound(SMALL), sound(replace(SMALL, slow_down=1.3))
    assert [result.red for result in clean + slower] == [False, False, True, True]
    assert {status for result in slower for status in result.statuses} == {"REGRESSED"}
    assert clean[0].noise == slower[0].noise != clean[1].noise  # the same noise for every slow-down, another in each suite
    assert "| red suites | 2 of 2: 100.00% " in table(SMALL, slower, 1.0)


def test_a_suite_that_cannot_be_judged_is_broken_and_not_red() -> None:
    (result,) = run_suites(replace(SMALL, max_launches=1), 1)
    assert "--llmperf-max-launches=1: one launch can never fail a test" in result.broken
    assert not result.red


def test_no_case_in_200_is_bounded_by_the_rule_of_three() -> None:
    assert upper_bound(0, 200) == pytest.approx(1 - 0.05 ** (1 / 200))
    assert upper_bound(200, 200) == 1.0
