"""How tokens come: what is missing where a stream is held back, and what is called a clump."""

from __future__ import annotations

import random
from itertools import accumulate

import pytest

from pytest_llmperf.measure.arrivals import clumps, gaps, time_per_token, warnings
from pytest_llmperf.measure.client.response import RequestRecord
from pytest_llmperf.measure.formulas import LaunchSample, RoundSample
from pytest_llmperf.measure.kv_cache import Capacity
from pytest_llmperf.measure.metrics import launch_metrics, round_metrics
from pytest_llmperf.measure.telemetry import Telemetry


def answer(*steps_s: float, first_s: float = 0.2, tokens: int | None = None) -> RequestRecord:
    """Return an answer whose tokens came these seconds after one another."""
    times = tuple(accumulate(steps_s, initial=1.0 + first_s))
    return RequestRecord(1.0, times, times[-1], 8, tokens or len(times))


REGULAR = answer(*[0.01] * 63)
AT_ONCE = answer(*[0.0] * 19)
PACKETS = answer(*([0.0] * 30 + [2e-5]) * 3)
"""A held-back body that filled four packets, microseconds apart."""
NEARLY = answer(*[0.0] * 15, 0.016, *[0.0] * 3)
"""16 of 20 tokens were flushed at once."""


def clumped(size: int, count: int = 16, apart_s: float = 0.1, within_s: float = 2e-5) -> RequestRecord:
    return answer(*([within_s] * (size - 1) + [apart_s]) * count)


def measured(*records: RequestRecord, **how: object) -> dict[str, float | None]:
    return round_metrics(RoundSample(records, Telemetry(), **how))  # type: ignore[arg-type]


@pytest.mark.parametrize("record", [AT_ONCE, PACKETS, NEARLY])
def test_an_answer_that_was_held_back_has_no_time_per_token(record: RequestRecord) -> None:
    assert time_per_token(record) is None
    assert measured(record, record)["tpot_p50_s"] is None


@pytest.mark.parametrize("record", [AT_ONCE, PACKETS])
def test_an_answer_that_came_at_once_has_no_gaps(record: RequestRecord) -> None:
    assert gaps(record) == []
    assert [measured(record)[name] for name in ("itl_mean_s", "itl_p50_s")] == [None, None]


def test_a_proxy_that_buffers_is_named_once_for_all_answers() -> None:
    [text] = warnings([AT_ONCE, PACKETS])
    assert text.startswith("no TPOT: every answer came in one read; is a proxy buffering the stream?")
    assert "TTFT is then the time to all of the answer" in text
    [text] = warnings([AT_ONCE, NEARLY])
    assert text.startswith("no TPOT: most of every answer came in its first read; is a proxy buffering the stream?")


def test_a_few_answers_that_came_at_once_are_counted() -> None:
    [text] = warnings([REGULAR] * 8 + [AT_ONCE] * 2)
    assert text.startswith("2 of 10 answers came in one read")
    assert not list(warnings([REGULAR] * 99 + [AT_ONCE]))


def test_answers_without_a_stream_or_of_one_token_are_no_buffered_ones() -> None:
    single = RequestRecord(1.0, (1.2,), 1.2, 8, 1)
    unseen = RequestRecord(1.0, (), 1.5, 8, 20)
    assert not list(warnings([single, unseen]))


def test_the_first_token_of_a_buffered_answer_is_measured_as_it_came() -> None:
    values = measured(AT_ONCE)
    assert values["ttft_p50_s"] == values["e2e_p50_s"] == pytest.approx(0.2)


@pytest.mark.parametrize("limit", ["tpot_s", "itl_s"])
def test_nobody_knows_whether_held_back_answers_keep_a_limit_between_tokens(limit: str) -> None:
    assert measured(AT_ONCE, AT_ONCE, slo=((limit, 0.05),))["goodput_ratio"] is None
    assert measured(AT_ONCE, AT_ONCE, slo=(("ttft_s", 0.5),))["goodput_ratio"] == 1
    assert measured(REGULAR, AT_ONCE, slo=((limit, 0.05),))["goodput_ratio"] == 1


# --------------------------------------------------------------------------------------------------------- clumps


def jittered(spread: float, seed: int = 1) -> RequestRecord:
    rng = random.Random(seed)
    return answer(*(0.01 * max(0.02, 1 + rng.uniform(-spread, spread)) for _ in range(200)))


def stalled() -> RequestRecord:
    """An engine of 5 ms a token that is held up for ten seconds now and then."""
    return answer(*([0.005] * 99 + [10.0]) * 4)


def speculated(seed: int = 2) -> RequestRecord:
    """One to four tokens a step, which come in one read."""
    rng = random.Random(seed)
    return answer(*(step for _ in range(80) for step in [*[0.0] * rng.randrange(4), 0.02]))


STREAMS = {
    "regular": (REGULAR, False),
    "jitter of a third": (jittered(0.33), False),
    "jitter of all": (jittered(1.0), False),
    "exponential gaps": (answer(*(random.Random(3).expovariate(100) for _ in range(300))), False),
    "long stalls": (stalled(), False),
    "speculation, a read a step": (speculated(), False),
    "half a millisecond a token": (answer(*[5e-4] * 99), False),
    "pairs": (clumped(2), True),
    "fours": (clumped(4), True),
    "sixteens": (clumped(16), True),
    "hundreds": (clumped(100, count=4), True),
    "every other answer": (clumped(8), True),
}


@pytest.mark.parametrize("name", STREAMS)
def test_clumps_are_told_from_other_streams(name: str) -> None:
    record, is_clumped = STREAMS[name]
    assert (clumps(gaps(record)) is not None) is is_clumped
    assert any("in clumps" in text for text in warnings([record])) is is_clumped


def test_half_of_the_answers_in_clumps_are_clumps() -> None:
    assert clumps([gap for record in (REGULAR, clumped(8)) for gap in gaps(record)])


def test_clumps_are_told_in_figures() -> None:
    [text] = warnings([clumped(2, count=50, apart_s=0.0124)])
    assert text.startswith("tokens come in clumps: 50% of the gaps are below 0.02 ms and the mean is 6.2 ms;")


def test_of_clumps_only_the_mean_gap_is_known() -> None:
    record = clumped(8)
    values = measured(record) | launch_metrics(LaunchSample(None, Capacity(), (record,)))
    assert values["itl_mean_s"] == pytest.approx(0.1 / 8, rel=0.01)
    assert [values[f"itl_{name}_s"] for name in ("p50", "p90", "p99")] == [None] * 3
    assert values["tpot_p50_s"] == pytest.approx(0.1 / 8, rel=0.01)


def test_pieces_of_many_tokens_are_named_and_measured_as_they_come() -> None:
    record = answer(*(([0.0] * 15 + [0.064]) * 12)[:-1])
    [text] = warnings([record])
    assert text == "tokens come in pieces of 16, 64 ms apart: ITL is the time between pieces, TTFT that to the first"
    assert measured(record)["itl_p50_s"] == pytest.approx(0.064)
    assert not list(warnings([speculated()]))


def test_too_few_gaps_tell_nothing_of_clumps() -> None:
    assert clumps([1e-5] * 9 + [0.1] * 9) is None


# ------------------------------------------------------------------------------------------------- other zeros


def test_a_window_between_two_neighbouring_reads_is_not_steady() -> None:
    # Two of four requests begin when two others end, which happens within microseconds.
    first = [RequestRecord(0.0, (0.5, 1.0), 1.0 + n * 1e-6, 8, 2) for n in range(2)]
    second = [RequestRecord(1.000003, (1.5, 2.0), 2.0, 8, 2) for _ in range(2)]
    values = measured(*first, *second, concurrency=2)
    assert values["steady_output_tokens_per_s"] is values["in_flight_mean"] is None


def test_a_window_in_which_no_token_came_has_no_rate() -> None:
    held_back = [RequestRecord(start, (start + 1.0,) * 9, start + 1.0, 8, 9) for start in (0.0, 0.3, 1.5)]
    values = measured(*held_back, concurrency=1)
    assert values["steady_output_tokens_per_s"] == pytest.approx(9 / 0.5)
    lone = [RequestRecord(0.0, (1.0,) * 9, 1.0, 8, 9), RequestRecord(1.5, (2.6,) * 9, 2.6, 8, 9)]
    assert measured(*lone, concurrency=1)["steady_output_tokens_per_s"] is None


def test_a_single_request_is_neither_fair_nor_unfair() -> None:
    assert measured(REGULAR)["jain_fairness"] is None
    assert measured(REGULAR, REGULAR)["jain_fairness"] == pytest.approx(1)


def test_prompts_that_nobody_counted_are_not_taken_for_empty() -> None:
    uncounted = RequestRecord(1.0, (1.2, 1.3), 1.3, None, 2)
    assert measured(uncounted)["total_tokens_per_s"] is None
    assert measured(uncounted)["output_tokens_per_s"] == pytest.approx(2 / 0.3)


def test_gauges_that_were_seen_only_between_steps_are_missing() -> None:
    values = round_metrics(RoundSample((REGULAR,), Telemetry(kv_cache_peak=0.0, running_mean=0.0, preemptions=0.0)))
    assert values["kv_cache_peak_ratio"] is values["running_requests_mean"] is None
    assert values["preemptions"] == 0


def test_a_cache_of_no_tokens_is_not_known() -> None:
    assert launch_metrics(LaunchSample(1.0, Capacity(0.0, 0.0)))["kv_cache_tokens"] is None
