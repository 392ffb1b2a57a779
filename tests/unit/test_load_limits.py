"""Limits of a load over real sockets: a cap beside a rate, pauses between turns, and a round that time ends."""

from __future__ import annotations

import itertools
import socket
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_llmperf.measure import audit
from pytest_llmperf.measure.client.endpoint import Endpoint
from pytest_llmperf.measure.client.messages import OVER, RoundLog
from pytest_llmperf.measure.client.processes import LoadClient
from pytest_llmperf.measure.client.prompts import prompts
from pytest_llmperf.plan.arguments import workload_from
from pytest_llmperf.plan.axes import Axes
from pytest_llmperf.testing import Clock, Options, SimulatedEngine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_llmperf.measure.client.messages import RoundPlan
    from pytest_llmperf.plan.workload import Workload

STEPS = Clock(step_s=0.01, sequence_s=0.0, prefill_token_s=0.0)
"""Steps that are long enough for all that may be in flight to be so at once, however busy this machine is."""


@pytest.fixture(scope="module")
def client() -> Iterator[LoadClient]:
    with LoadClient() as started:
        yield started


def wanted(**arguments: Any) -> Workload:
    return workload_from(Axes(), {"prompt_tokens": 6, "output_tokens": 8, **arguments})


def plan_of(url: str, workload: Workload) -> RoundPlan:
    return Endpoint(url, "simulated").plan(
        prompts(workload, 0, vocabulary=None, nonce="case"),
        concurrency=workload.concurrency,
        request_timeout_s=30.0,
        stall_timeout_s=10.0,
        max_concurrency=workload.max_concurrency,
        stop_s=workload.stops_s,
    )


def errors(log: RoundLog) -> list[str]:
    return [record.error for record in log.records if record.error is not None]


@pytest.mark.parametrize("processes", [1, 2])
def test_beside_a_rate_no_more_are_in_flight_than_the_cap(processes: int) -> None:
    # Each request occupies one KV block of 16 tokens.
    with SimulatedEngine(Options(clock=STEPS)) as engine, LoadClient(processes) as client:
        log = client.play(plan_of(engine.url, wanted(rate="inf", requests=24, max_concurrency=4)))
        assert engine.counters.peak_blocks == 4
    assert errors(log) == []


def test_waiting_for_the_cap_counts_as_latency_and_not_as_lateness(client: LoadClient) -> None:
    with SimulatedEngine(Options(clock=STEPS)) as engine:
        log = client.play(plan_of(engine.url, wanted(rate="inf", requests=24, max_concurrency=4)))
    first_s = min(record.sent_s or 0 for record in log.records)
    held_back = [record for record in log.records if record.sent_s and record.sent_s > first_s + STEPS.step_s]
    assert len(held_back) >= 20
    for record in held_back:
        assert record.due_s is not None
        assert record.sent_s is not None
        assert record.asked_s == record.due_s <= first_s
        assert record.delay_s is not None
        assert 0 <= record.delay_s < record.sent_s - record.due_s
    assert audit.lateness(log) is None


def test_all_are_due_at_once_at_an_infinite_rate(client: LoadClient) -> None:
    with SimulatedEngine(Options(clock=STEPS)) as engine:
        log = client.play(plan_of(engine.url, wanted(rate="inf", requests=40)))
        assert engine.counters.peak_blocks == 40
    assert errors(log) == []
    assert len({record.due_s for record in log.records}) == 1


@pytest.mark.parametrize("load", [{"concurrency": 3}, {"rate": 50}, {"rate": "inf", "max_concurrency": 3}])
def test_a_user_thinks_before_the_next_turn(client: LoadClient, load: dict[str, Any]) -> None:
    with SimulatedEngine(Options(clock=replace(STEPS, step_s=1e-3))) as engine:
        log = client.play(plan_of(engine.url, wanted(turns=3, requests=18, think_s=0.05, **load)))
    assert errors(log) == []
    for first in range(0, 18, 3):
        for before, after in itertools.pairwise(log.records[first : first + 3]):
            assert after.sent_s is not None
            assert before.end_s is not None
            assert after.sent_s >= before.end_s + 0.05
            if "rate" in load:
                assert after.due_s == pytest.approx(before.end_s + 0.05, abs=1e-6), "latency counts from the pause's end"
            else:
                assert after.due_s is None
    assert audit.lateness(log) is None


def test_a_connection_that_the_server_closes_in_a_pause_loses_no_turn(client: LoadClient) -> None:
    body = b'{"choices":[{"text":"a"}],"usage":{"prompt_tokens":3,"completion_tokens":1}}'
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                connection = listener.accept()[0]
            except OSError:
                return
            with connection:
                if connection.recv(1 << 16):
                    connection.sendall(answer)

    # One conversation: between two there is no pause, and what is sent while the server closes is lost.
    workload = wanted(turns=2, requests=2, concurrency=1, output_tokens=1, think_s=0.5, stream=False)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        plan = replace(plan_of(f"http://127.0.0.1:{listener.getsockname()[1]}", workload), stream=False)
        log = client.play(plan)
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(10)
    assert errors(log) == []


@pytest.mark.parametrize("arguments", [{}, {"turns": 4}, {"turns": 4, "think_s": 0.01}, {"turns": 2, "think_s": 60}])
def test_when_its_time_is_over_a_round_sends_no_more(client: LoadClient, arguments: dict[str, Any]) -> None:
    with SimulatedEngine(Options(clock=STEPS)) as engine:
        log = client.play(plan_of(engine.url, wanted(duration_s=0.3, requests=2000, concurrency=4, **arguments)))
        finished = engine.counters.requests_finished
    sent, kept = log.sent()
    assert len(log.records) == 2000
    assert {record.error for record in log.records} == {None, OVER}
    assert len(sent.records) == len(kept) == finished < 2000, "what was sent is answered"
    assert errors(sent) == []
    assert not log.stalled


def test_requests_that_are_used_up_before_the_time_are_told() -> None:
    workload = wanted(duration_s=100, requests=8)
    with SimulatedEngine(Options(clock=STEPS)) as engine, LoadClient() as client:
        log = client.play(plan_of(engine.url, workload))
    assert "duration_s=100: all 8 requests were sent in" in (audit.used_up(log, workload) or "")
    assert audit.used_up(log, replace(workload, requests=9)) is None
    assert audit.used_up(log, replace(workload, duration_s=None)) is None


def test_processes_share_a_cap() -> None:
    plan = plan_of("http://127.0.0.1:1", wanted(rate=10, requests=20, max_concurrency=5))
    shares = plan.split(3)
    assert [part.max_concurrency for part, _ in shares] == [2, 2, 1]
    assert len(plan_of("http://127.0.0.1:1", wanted(rate=10, requests=20, max_concurrency=1)).split(3)) == 1
    assert sorted(index for _, indices in shares for index in indices) == list(range(20))
