"""Rounds of the simulated engine in virtual time: the clock model's own times, read as the load process reads answers."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from pytest_llmperf.measure.client.endpoint import Endpoint
from pytest_llmperf.measure.client.messages import ClientError, RoundLog
from pytest_llmperf.measure.client.processes import LoadClient
from pytest_llmperf.measure.client.prompts import prompts
from pytest_llmperf.measure.engines.engine import EngineError
from pytest_llmperf.measure.engines.simulated import play_virtually
from pytest_llmperf.plan.arguments import workload_from
from pytest_llmperf.plan.axes import Axes
from pytest_llmperf.plan.workload import Workload
from pytest_llmperf.testing import Clock, Options, SimulatedEngine
from pytest_llmperf.testing.scheduler import Request, token_times_s

# An hour of it could not be waited for.
SLOW = Clock(step_s=2.0, sequence_s=0.1, prefill_token_s=0.01, prefix_cache=False)


class Served:
    """The engine as the plugin uses it, at a server that the test has."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.endpoint = Endpoint(url, "simulated")

    def check(self) -> None:
        raise EngineError("it is dead")


def play(engine: SimulatedEngine, workload: Workload, number: int = 0) -> RoundLog:
    drawn = prompts(workload, number, vocabulary=None, nonce="test")
    how: dict[str, Any] = {"concurrency": workload.concurrency, "request_timeout_s": 60.0, "stall_timeout_s": 60.0}
    how |= {"stream": workload.stream, "max_concurrency": workload.max_concurrency, "stop_s": workload.stops_s}
    return play_virtually(Served(engine.url), drawn, None, **how)  # type: ignore[arg-type]


def closed(**given: Any) -> Workload:
    return Workload(**{"prompt_tokens": 6, "output_tokens": 8, "requests": 20, "concurrency": 8, **given})


def test_its_times_are_those_of_the_clock_and_nobody_waits_for_them() -> None:
    requests = [Request(number, (0,) * 6, 8) for number in range(20)]
    expected = token_times_s(SLOW, requests, 8)
    began_s = time.monotonic()
    with SimulatedEngine(Options(clock=SLOW)) as engine:
        log = play(engine, closed())
    start_s = min(record.sent_s for record in log.records if record.sent_s is not None)
    for record, (sent_s, *tokens) in zip(log.records, (expected[number] for number in range(20)), strict=True):
        assert record.error is None
        assert record.sent_s == pytest.approx(start_s + sent_s)
        assert record.token_times_s == pytest.approx([start_s + instant for instant in tokens])
    took_s = log.records[-1].token_times_s[-1] - start_s
    assert took_s > 60
    assert time.monotonic() - began_s < took_s


def test_two_rounds_of_an_engine_are_alike_and_follow_each_other() -> None:
    with SimulatedEngine(Options(clock=SLOW)) as engine:
        first, second = play(engine, closed(), 0), play(engine, closed(), 1)
        assert engine.counters.rounds == 2
        assert engine.counters.generation_tokens == 2 * 20 * 8
    ttft = [[record.token_times_s[0] - (record.sent_s or 0) for record in log.records] for log in (first, second)]
    assert ttft[0] == pytest.approx(ttft[1])
    assert max(record.end_s or 0 for record in first.records) <= min(record.sent_s or 0 for record in second.records)


def test_it_counts_what_a_round_in_real_time_counts() -> None:
    fast = replace(SLOW, step_s=1e-4, sequence_s=1e-6, prefill_token_s=1e-7)
    drawn = prompts(closed(), 0, vocabulary=None, nonce="test")
    # However late a busy machine sends a request, it is of this round.
    with SimulatedEngine(Options(clock=fast, round_gap_s=60)) as engine, LoadClient() as client:
        plan = Endpoint(engine.url, "simulated").plan(drawn, concurrency=8, request_timeout_s=60, stall_timeout_s=60)
        real, counted = client.play(plan), engine.counters
    with SimulatedEngine(Options(clock=fast)) as engine:
        virtual = play(engine, closed())
        assert replace(engine.counters, peak_blocks=0) == replace(counted, peak_blocks=0)
    for record, other in zip(real.records, virtual.records, strict=True):
        assert (record.prompt_tokens, record.output_tokens) == (other.prompt_tokens, other.output_tokens)
        assert record.error == other.error


def test_in_an_open_loop_requests_are_sent_when_they_are_due() -> None:
    workload = closed(rate=(0.5,), arrivals="constant")
    with SimulatedEngine(Options(clock=SLOW)) as engine:
        log = play(engine, workload)
    assert [record.error for record in log.records] == [None] * 20
    due = [record.due_s for record in log.records]
    assert [record.sent_s for record in log.records] == pytest.approx(due)
    assert [record.delay_s for record in log.records] == pytest.approx([0.0] * 20)
    assert due[-1] - due[0] == pytest.approx(2.0 * 19)  # type: ignore[operator]


def test_a_conversations_next_request_waits_for_the_answer() -> None:
    with SimulatedEngine(Options(clock=SLOW)) as engine:
        log = play(engine, closed(requests=12, turns=3, concurrency=2))
    for turn in range(0, 12, 3):
        talk = log.records[turn : turn + 3]
        for before, after in pairwise(talk):
            assert after.sent_s == pytest.approx(before.end_s)


@pytest.mark.parametrize("given", [{"api": "chat"}, {"stream": False}, {"extra_body": '{"temperature": 0.5}'}])
def test_whatever_can_be_asked_is_answered(given: dict[str, Any]) -> None:
    with SimulatedEngine(Options(clock=SLOW)) as engine:
        log = play(engine, closed(**given))
    assert [record.error for record in log.records] == [None] * 20
    assert {record.output_tokens for record in log.records} == {8}


def test_refused_and_cut_answers_are_failures_with_their_reason() -> None:
    with SimulatedEngine(Options(clock=SLOW, fail_every=5, cut_every=7)) as engine:
        errors = [record.error or "" for record in play(engine, closed()).records]
        assert sum(error.startswith("HTTP 500") for error in errors) == 4
        assert errors.count("the server closed the connection in the middle of the response") == 2
        assert engine.counters.requests_aborted == 2


def test_an_engine_that_hangs_has_stalled() -> None:
    with SimulatedEngine(Options(clock=SLOW, hang_after=10)) as engine:
        log = play(engine, closed())
    assert log.stalled
    assert log.records[-1].error == "never sent: the round had stalled"


def test_a_dead_engine_and_an_odd_answer_are_different_errors() -> None:
    with SimulatedEngine(Options(clock=SLOW)) as engine:
        url = engine.url
        assert [record.error for record in play(engine, closed()).records] == [None] * 20
    how: dict[str, Any] = {"concurrency": 8, "request_timeout_s": 5.0, "stall_timeout_s": 5.0}
    drawn = prompts(closed(), 0, vocabulary=None, nonce="test")
    with pytest.raises(EngineError, match="it is dead"):
        play_virtually(Served(url), drawn, None, **how)  # type: ignore[arg-type]
    with SimulatedEngine(Options(clock=SLOW)) as engine, pytest.raises(ClientError, match="refused a round"):
        play_virtually(Served(f"{engine.url}/nowhere"), drawn, None, **how)  # type: ignore[arg-type]


def test_classes_of_requests_are_played_too() -> None:
    given = {"classes": {"short": {"share": 2}, "long": {"share": 1, "prompt_tokens": 200}}}
    with SimulatedEngine(Options(clock=SLOW)) as engine:
        log = play(engine, workload_from(Axes(), given))
    assert {record.error for record in log.records} == {None}
    assert {record.prompt_tokens for record in log.records} == {100, 200}


def test_beside_a_rate_the_cap_holds_in_virtual_time_too() -> None:
    workload = workload_from(Axes(), {"rate": "inf", "requests": 20, "max_concurrency": 4, "output_tokens": 8})
    with SimulatedEngine(Options(clock=SLOW)) as engine:
        log = play(engine, workload)
    assert [record.error for record in log.records] == [None] * 20
    spans = [(record.sent_s or 0, record.end_s or 0) for record in log.records]
    assert max(sum(start <= at < end for start, end in spans) for at, _ in spans) == 4
    assert len({record.due_s for record in log.records}) == 1
    assert [record.delay_s for record in log.records] == pytest.approx([0.0] * 20)
    assert log.records[-1].asked_s == log.records[0].sent_s


@pytest.mark.parametrize("load", [{"concurrency": 2}, {"rate": 0.1}])
def test_a_pause_is_as_long_as_its_user_thinks(load: dict[str, Any]) -> None:
    workload = workload_from(Axes(), {"turns": 3, "requests": 12, "think_s": 7, **load})
    with SimulatedEngine(Options(clock=SLOW)) as engine:
        log = play(engine, workload)
    for turn in range(0, 12, 3):
        for before, after in pairwise(log.records[turn : turn + 3]):
            assert after.sent_s == pytest.approx((before.end_s or 0) + 7)
            assert after.asked_s == pytest.approx(after.sent_s)
    if "concurrency" in load:
        assert log.records[6].sent_s == pytest.approx(log.records[2].end_s), "a user who thinks keeps the place"


def test_a_round_ends_with_its_time() -> None:
    workload = workload_from(Axes(), {"duration_s": 100, "requests": 400, "turns": 2, "think_s": 5, "output_tokens": 4})
    with SimulatedEngine(Options(clock=SLOW)) as engine:
        sent, kept = play(engine, workload).sent()
    starts = [record.sent_s or 0 for record in sent.records]
    assert 8 < len(kept) < 400
    assert max(starts) - min(starts) < 100
    assert {record.error for record in sent.records} == {None}
