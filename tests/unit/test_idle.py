"""What an engine that has idled comes to, from rounds before and after."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.measure import idle
from pytest_llmperf.measure.client.response import RequestRecord
from pytest_llmperf.measure.measurement import Round
from pytest_llmperf.plan.arguments import workload_from
from pytest_llmperf.plan.axes import Axes
from pytest_llmperf.units import duration, parse_duration

FIRST = RequestRecord(1.0, (1.4, 1.5), 1.5, 8, 2)


def rounds(*values: tuple[float | None, float | None]) -> list[Round]:
    return [Round({"ttft_p50_s": ttft, "output_tokens_per_s": rate}) for ttft, rate in values]


def test_ratios_are_of_the_medians_over_rounds() -> None:
    found = idle.ratios(rounds((0.1, 100), (0.1, 100), (9.0, 1)), rounds((0.2, 50), (0.13, 80), (0.1, 90)), FIRST)
    assert found == {
        "idle_ttft_ratio": pytest.approx(1.3), "idle_output_tokens_ratio": pytest.approx(0.8),
        "idle_first_ttft_s": pytest.approx(0.4),
    }  # fmt: skip


def test_what_a_side_lacks_is_missing() -> None:
    unseen = RequestRecord(1.0, (), 1.5, 8, 2)
    assert set(idle.ratios(rounds((None, None)), rounds((0.1, 5.0)), unseen).values()) == {None}
    assert not list(idle.warnings({}, 60.0))


def test_a_little_slower_is_not_worth_a_word() -> None:
    assert not list(idle.warnings({"idle_ttft_ratio": 1.09, "idle_output_tokens_ratio": 0.92}, 60.0))
    [text] = idle.warnings({"idle_ttft_ratio": 1.09, "idle_output_tokens_ratio": 0.8}, 60.0)
    assert text.endswith("after idling for 1 min output tokens/s are 0.80 times what they were")


@pytest.mark.parametrize(
    "arguments", [{}, {"turns": 3, "requests": 24}, {"rate": 5}, {"classes": {"a": {}, "b": {}}}, {"concurrency": 16}]
)
def test_the_first_request_is_alone(arguments: dict[str, object]) -> None:
    workload = workload_from(Axes(), arguments)
    alone = idle.single(workload)
    assert (alone.requests, alone.concurrency) == (workload.turns, 1)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("30m", 1800), ("30 min", 1800), ("1.5h", 5400), (" 2 H ", 7200)]
)
def test_a_time_is_read_with_its_unit(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@given(st.text(max_size=8))
def test_what_is_no_time_above_0_is_no_number(text: str) -> None:
    try:
        seconds = parse_duration(text)
    except ValueError:
        return
    assert 0 < seconds < float("inf")


@pytest.mark.parametrize(("seconds", "text"), [(90, "90 s"), (60, "1 min"), (1800, "30 min"), (5400, "90 min"), (7200, "2 h")])
def test_a_time_is_written_as_people_say_it(seconds: float, text: str) -> None:
    assert duration(seconds) == text
