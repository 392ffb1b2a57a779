"""Whether a round's numbers can be trusted: what is found out, in which words, and what is let pass."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pytest_llmperf.measure import audit
from pytest_llmperf.measure.client.messages import RoundLog
from pytest_llmperf.measure.client.response import RequestRecord
from pytest_llmperf.measure.measurement import Launch, Measurement, Round
from pytest_llmperf.measure.telemetry import Telemetry
from pytest_llmperf.plan.arguments import workload_from
from pytest_llmperf.plan.axes import Axes
from pytest_llmperf.plan.case import Case
from pytest_llmperf.plan.engine import EngineSpec
from pytest_llmperf.plan.workload import Workload

GOOD = RequestRecord(1.0, (1.1, 1.2), 1.2, prompt_tokens=4, output_tokens=2, delay_s=0.0001)
SOUND = RoundLog((GOOD,) * 4, cpu_s=0.1, busy_s=1.0)
TOLD = Telemetry(preemptions=0, prompt_tokens=16, output_tokens=8, prefix_hit_tokens=0, answered=True)


def problems(log: RoundLog = SOUND, telemetry: Telemetry = TOLD, workload: Workload | None = None) -> list[str]:
    return audit.problems(log, telemetry, workload or Workload())


def test_a_sound_round_has_no_problem() -> None:
    assert problems() == []


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (replace(SOUND, cpu_s=0.97, processes=2), "the busiest of 2 load processes took 97% of a core"),
        (replace(SOUND, clock_set=True), "the wall clock was set during the round"),
        (replace(SOUND, records=(replace(GOOD, delay_s=0.05),) * 4), "sent 50 ms late on average, and took 200 ms"),
    ],
)
def test_a_client_that_was_the_bottleneck_is_said_to_have_been(log: RoundLog, message: str) -> None:
    [problem] = problems(log)
    assert message in problem


@pytest.mark.parametrize(
    "log",
    [
        replace(SOUND, cpu_s=0.9),
        replace(SOUND, busy_s=0.0),
        replace(SOUND, records=(replace(GOOD, delay_s=0.015),) * 4),  # 15 ms happen on a shared host
        replace(SOUND, records=(replace(GOOD, delay_s=0.05, end_s=11.0),) * 4),  # of 10 s they are nothing
        replace(SOUND, records=(replace(GOOD, delay_s=None),) * 4),
    ],
)
def test_a_client_that_kept_up_is_let_pass(log: RoundLog) -> None:
    assert problems(log) == []


def test_failed_requests_are_a_problem_with_the_most_common_reasons_first() -> None:
    failed = replace(GOOD, error="HTTP 500: no")
    other = replace(GOOD, error="cut")
    [problem] = problems(replace(SOUND, records=(failed, failed, other, GOOD)))
    assert problem == "3 of 4 requests failed: 2x HTTP 500: no; 1x cut"


@pytest.mark.parametrize(("failed", "tolerated", "invalid"), [(1, 0.0, True), (1, 0.25, False), (2, 0.25, True), (0, 0.0, False)])
def test_no_more_than_a_tolerated_share_may_fail(failed: int, tolerated: float, invalid: bool) -> None:
    records = (*(replace(GOOD, error="cut"),) * failed, *(GOOD,) * (4 - failed))
    reasons = problems(replace(SOUND, records=records), workload=Workload(tolerated_failures=tolerated))
    assert bool(reasons) == invalid
    assert not (invalid and tolerated) or "2 of 4 requests failed: 2x cut (25 % are tolerated)" in reasons


@pytest.mark.parametrize(
    ("telemetry", "message"),
    [
        (Telemetry(answered=True, doubt="it was restarted during the round"), "restarted during the round"),
        (replace(TOLD, prefix_hit_tokens=160), "160 prompt tokens came from the prefix cache"),
        (replace(TOLD, external_hit_tokens=96), "96 prompt tokens came from an external KV cache"),
    ],
)
def test_what_the_engine_tells_is_held_against_what_was_seen(telemetry: Telemetry, message: str) -> None:
    assert any(message in problem for problem in problems(telemetry=telemetry))


@pytest.mark.parametrize("shape", [{"prefix_tokens": 32}, {"turns": 2}])
def test_prefix_hits_are_expected_where_prompts_share_something(shape: dict[str, int]) -> None:
    assert problems(telemetry=replace(TOLD, prefix_hit_tokens=160), workload=workload_from(Axes(), shape)) == []


def test_a_chat_template_may_be_found_in_front_of_every_prompt() -> None:
    chat = workload_from(Axes(), {"api": "chat"})
    assert problems(telemetry=replace(TOLD, prefix_hit_tokens=4 * 32), workload=chat) == []
    assert problems(telemetry=replace(TOLD, prefix_hit_tokens=4 * 320), workload=chat)


@pytest.mark.parametrize(("requests", "warned"), [(8, True), (23, True), (24, False), (100, False)])
def test_too_few_requests_for_a_steady_window_are_a_warning(requests: int, warned: bool) -> None:
    warnings = audit.warnings(Workload(requests=requests), [{}])
    assert bool(warnings) == warned
    assert not warned or "24 requests or more have one" in warnings[0]
    assert audit.warnings(workload_from(Axes(rate=5), {"requests": 4}), [{}]) == ()


def measured(speed: float, *, cpu: float = 0.05, delay_s: float = 0.0001) -> Measurement:
    values = {"output_tokens_per_s": speed, "client_cpu_cores": cpu, "send_delay_p99_s": delay_s, "e2e_p50_s": 1.0}
    return Measurement(Case("x", EngineSpec(), Workload()), (Launch("1", "", (Round(values),), {}),))


@pytest.mark.parametrize(
    ("online", "limit"),
    [
        (measured(980), "engine: 980 tok/s behind the server, 1,000 without (98%)"),
        (measured(600), "front end: 600 tok/s behind the server, 1,000 without (60%); the client took 5% of a core"),
        (measured(600, cpu=0.8), "client: "),
        (measured(600, delay_s=0.2), "client: "),
    ],
)
def test_who_limits_a_server_is_named_with_the_figures(online: Measurement, limit: str) -> None:
    assert online.limited_by(measured(1000)).startswith(limit)


def test_a_limit_is_not_named_where_it_cannot_be_seen() -> None:
    alone = measured(1000)
    for other in ({"rate": 5}, {"requests": 33}):
        sent = workload_from(Axes(), other)
        with pytest.raises(ValueError, match="what limits is seen where"):
            replace(measured(900), case=Case("y", EngineSpec(), sent)).limited_by(alone)
    few = Launch("1", "", (Round({"output_tokens_per_s": 980.0, "e2e_p50_s": 1.0}),), {})
    assert replace(alone, launches=(few,)).limited_by(alone).startswith("engine")


def test_a_client_without_a_core_is_late_but_no_bottleneck(monkeypatch: pytest.MonkeyPatch) -> None:
    late = replace(SOUND, records=(replace(GOOD, delay_s=0.05),) * 4)
    monkeypatch.setattr(audit, "CORES", 2)
    assert problems(late)
    assert audit.problems(late, TOLD, Workload(), ranks=2) == []
    assert "50 ms late on average" in (audit.lateness(late) or "")


def test_an_open_loop_that_ends_before_it_is_answered_is_a_warning() -> None:
    workload = workload_from(Axes(rate=5), {"requests": 4})
    [text] = audit.warnings(workload, [{"in_flight_mean": None}] * 2)
    assert text.startswith("no steady window: the last request was sent before the first was answered")
    assert audit.warnings(workload, [{"in_flight_mean": None}, {"in_flight_mean": 2.0}]) == ()
