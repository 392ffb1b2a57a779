"""A round as the engine tells it: differences, whether one engine told them, and whether the client can have caused them."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_llmperf.measure import telemetry
from pytest_llmperf.measure.audit import without_source
from pytest_llmperf.measure.client.response import RequestRecord
from pytest_llmperf.measure.plausibility import Caused, caused_by
from pytest_llmperf.measure.telemetry import Recorder, Telemetry
from pytest_llmperf.plan.arguments import workload_from
from pytest_llmperf.plan.axes import Axes
from pytest_llmperf.plan.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_llmperf.measure.engines.engine import Engine

REAL = (Path(__file__).parent / "data" / "vllm_metrics.txt").read_text()
CAUSED = Caused(requests=8, asked_tokens=160, counted_tokens=160, prompt_tokens=320)
NAMES = {
    "preemptions": "vllm:num_preemptions_total",
    "prompt_tokens": "vllm:prompt_tokens_total",
    "output_tokens": "vllm:generation_tokens_total",
    "hits": "vllm:prefix_cache_hits_total",
}
RESTARTED, SEVERAL = "it was restarted during the round", "more than one engine (a balancer in front?)"


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "SETTLE_S", 0.0)
    monkeypatch.setattr(telemetry, "RAY_SETTLE_S", 0.0)


def counted(labels: str = 'engine="0",model_name="m"', more: str = "", **values: float) -> str:
    return "".join(f"{NAMES[name]}{{{labels}}} {value}\n" for name, value in values.items()) + more


class Texts:
    """An engine that answers with one text after another, and with the last one for ever."""

    def __init__(self, *texts: str | None) -> None:
        self.left = list(texts)

    def metrics_text(self) -> str | None:
        return self.left.pop(0) if len(self.left) > 1 else self.left[0]


def recorded(before: str | None, after: str | None, *, caused: Caused | None = None, second: str | None = None) -> Telemetry:
    """Return what a round brought; before it an engine is asked twice."""
    recorder = Recorder(cast("Engine", Texts(before, second or before, after)))
    with recorder:
        pass
    return recorder.result(caused)


# ------------------------------------------------------------------------------------------------ differences


def test_a_round_brings_the_differences() -> None:
    result = recorded(
        counted(preemptions=3, prompt_tokens=100, output_tokens=50), counted(preemptions=32, prompt_tokens=300, output_tokens=90)
    )  # fmt: skip
    assert (result.preemptions, result.prompt_tokens, result.output_tokens, result.prefix_hit_tokens) == (29, 200, 40, None)
    assert result.doubt is None


def test_nothing_happened_in_a_real_engine_between_two_answers_that_are_alike() -> None:
    result = recorded(REAL, REAL)
    assert (result.preemptions, result.prompt_tokens, result.prefix_hit_tokens, result.external_hit_tokens) == (0, 0, 0, 0)
    assert result.doubt is None


def test_the_growth_of_engine_cores_is_summed() -> None:
    cores = [counted(f'engine="{core}"', output_tokens=50 * core) for core in (1, 2)]
    grown = [counted(f'engine="{core}"', output_tokens=50 * core + 7 * core) for core in (1, 2)]
    assert recorded("".join(cores), "".join(grown)).output_tokens == 7 + 14


def test_no_metrics_at_all_is_all_none() -> None:
    assert recorded(None, None) == Telemetry()
    assert not any(asdict(Telemetry()).values())


@pytest.mark.parametrize("after", [None, "", "<html>502 Bad Gateway</html>", "vllm:num_preem"])
def test_metrics_on_one_side_only_give_no_difference(after: str | None) -> None:
    result = recorded(counted(preemptions=1), after)
    assert (result.preemptions, result.counters, result.doubt) == (None, {}, None)
    assert recorded(after, counted(preemptions=1)).preemptions is None


def test_a_series_that_appears_has_grown_from_nothing() -> None:
    failed = 'vllm:request_success_total{finished_reason="abort"} 2\n'
    result = recorded(counted(output_tokens=50), counted(output_tokens=60, more=failed))
    assert (result.counters["vllm:request_success_total"], result.doubt) == (2, None)


def test_a_step_of_speculative_decoding_has_a_length() -> None:
    def text(drafts: int, accepted: int) -> str:
        return f"vllm:spec_decode_num_drafts_total {drafts}\nvllm:spec_decode_num_accepted_tokens_total {accepted}\n"

    assert recorded(text(100, 200), text(150, 280)).acceptance_length == 1 + 80 / 50
    assert recorded(text(100, 200), text(100, 200)).acceptance_length is None


# ------------------------------------------------------------------------------------------------ counters by name

TYPED = """\
# TYPE vllm:request_success_total counter
vllm:request_success_total{{engine="0",finished_reason="stop"}} {stop}
vllm:request_success_total{{engine="1",finished_reason="stop"}} {stop}
vllm:request_success_total{{engine="0",finished_reason="length"}} {length}
# TYPE vllm:iteration_tokens_total histogram
vllm:iteration_tokens_total_bucket{{le="1.0"}} {stop}
vllm:iteration_tokens_total_sum {length}
vllm:iteration_tokens_total_count {stop}
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running {stop}
# TYPE tgi_request_count counter
tgi_request_count {length}
"""


def test_every_counter_has_its_growth_by_name_and_no_gauge_has() -> None:
    counters = recorded(TYPED.format(stop=1, length=10), TYPED.format(stop=4, length=30)).counters
    assert counters == {
        "vllm:request_success_total": 3 + 3 + 20,
        "vllm:iteration_tokens_total_sum": 20,
        "vllm:iteration_tokens_total_count": 3,
        "tgi_request_count": 20,
    }


def test_a_counter_that_did_not_grow_is_0_and_not_missing() -> None:
    assert recorded(REAL, REAL).counters["vllm:num_preemptions_total"] == 0


# ------------------------------------------------------------------------------------------------ one engine?

BORN = "process_start_time_seconds {}\n"


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        # Restarted: it counts from 0, and no more than this round's requests.
        (counted(output_tokens=500, prompt_tokens=900), counted(output_tokens=160, prompt_tokens=320), RESTARTED),
        (counted(output_tokens=500), counted(output_tokens=0), RESTARTED),
        (counted(output_tokens=100, prompt_tokens=900), counted(output_tokens=160, prompt_tokens=320), RESTARTED),
        (counted(output_tokens=5, more=BORN.format(100)), counted(output_tokens=160, more=BORN.format(200)), RESTARTED),
        (counted(output_tokens=5, more="vllm:x_created 1\n"), counted(output_tokens=160, more="vllm:x_created 2\n"), RESTARTED),
        (counted(output_tokens=5, preemptions=3), counted(output_tokens=160), RESTARTED),
        # Another engine: it has a past.
        (counted(output_tokens=730_000, preemptions=402), counted(output_tokens=500_160, preemptions=17), SEVERAL),
        (counted(output_tokens=500, preemptions=402), counted(output_tokens=600, preemptions=17), SEVERAL),
        (counted('pod="a"', output_tokens=500), counted('pod="b"', output_tokens=600), SEVERAL),
        (counted('ReplicaId="a"', output_tokens=500), counted('ReplicaId="b"', output_tokens=600), SEVERAL),
        (counted(output_tokens=5, more=BORN.format(200)), counted(output_tokens=160, more=BORN.format(100)), SEVERAL),
        (counted(output_tokens=500, more=BORN.format(1)), counted(output_tokens=660, more=BORN.format(2)), SEVERAL),
        # Without output tokens nobody can tell which.
        (counted(preemptions=9), counted(preemptions=3), f"{RESTARTED}, or its counters come from {SEVERAL}"),
        # Up, and by more than was asked for.
        (counted(output_tokens=500_000, preemptions=17), counted(output_tokens=730_000, preemptions=402), "others send"),
        (counted(output_tokens=0), counted(output_tokens=400), "though only 160 were asked for: others send requests too, or"),
        (counted(output_tokens=0, prompt_tokens=0), counted(output_tokens=160, prompt_tokens=9000), "though only 320 were sent"),
        # Up, but by less than was received.
        (counted(output_tokens=500), counted(output_tokens=580), "the client counted 160 output tokens, the engine only 80"),
    ],
)  # fmt: skip
def test_what_one_engine_cannot_have_told_is_a_reason_and_no_number(before: str, after: str, reason: str) -> None:
    result = recorded(before, after, caused=CAUSED)
    assert reason in (result.doubt or "")
    assert result == Telemetry(answered=True, doubt=result.doubt)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (counted(output_tokens=500), counted(output_tokens=660)),
        (counted(output_tokens=500), counted(output_tokens=690)),  # an orchestrator asks for a token now and then
        (counted(output_tokens=500, more=BORN.format(5)), counted(output_tokens=660, more=BORN.format(5))),
        # A sum of what may be below 0, and an average that llama.cpp calls a counter.
        (counted(output_tokens=5, more="x_seconds_sum 9\n"), counted(output_tokens=165, more="x_seconds_sum 7\n")),
        (
            counted(output_tokens=5, more="# TYPE llamacpp:n_busy_slots counter\nllamacpp:n_busy_slots 4\n"),
            counted(output_tokens=165, more="# TYPE llamacpp:n_busy_slots counter\nllamacpp:n_busy_slots 3\n"),
        ),
        (
            counted(output_tokens=5, more="# TYPE sglang:lora_pool_slots_total gauge\nsglang:lora_pool_slots_total 9\n"),
            counted(output_tokens=165, more="# TYPE sglang:lora_pool_slots_total gauge\nsglang:lora_pool_slots_total 7\n"),
        ),
        # A second core that begins to count, or a label that had no event before.
        (counted(output_tokens=5), counted(output_tokens=85) + counted('engine="1",model_name="m"', output_tokens=80)),
        (counted(output_tokens=5, more='vllm:request_success_total{r="stop"} 0\n'), counted(output_tokens=165)),
    ],
)
def test_what_one_engine_can_have_told_is_believed(before: str, after: str) -> None:
    result = recorded(before, after, caused=CAUSED)
    assert result.doubt is None
    assert result.output_tokens in (160, 190)


def test_another_replica_is_seen_before_the_round_begins() -> None:
    first, second = counted(output_tokens=730_000), counted(output_tokens=500_000)
    assert SEVERAL in (recorded(first, counted(output_tokens=730_160), caused=CAUSED, second=second).doubt or "")


def test_a_young_replica_beside_an_old_one_is_no_restart() -> None:
    young, old = counted(output_tokens=60), counted(output_tokens=9060)
    assert SEVERAL in (recorded(young, counted(output_tokens=120), caused=CAUSED, second=old).doubt or "")
    assert RESTARTED in (recorded(old, counted(output_tokens=120), caused=CAUSED).doubt or "")


def test_another_replica_is_seen_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "SAMPLE_INTERVAL_S", 0.0)
    mine, other = counted(output_tokens=500), counted(output_tokens=9000)
    result = sampled([mine, mine, other, counted(output_tokens=660)], caused=CAUSED)
    assert SEVERAL in (result.doubt or "")


def test_without_knowing_the_client_only_going_back_is_doubted() -> None:
    assert recorded(counted(output_tokens=0), counted(output_tokens=10**9)).doubt is None
    assert RESTARTED in (recorded(counted(output_tokens=5), counted(output_tokens=1)).doubt or "")


def test_what_requests_can_have_caused_is_what_they_asked_and_got() -> None:
    good = RequestRecord(1.0, (1.1, 1.2), 1.2, prompt_tokens=4, output_tokens=2)
    failed = RequestRecord(1.0, error="cut", output_tokens=1)
    assert caused_by(60, [good, good]) == Caused(2, 60, 4, 8)
    assert caused_by(90, [good, good, failed]) == Caused(3, 90, 4, None)


LINES = st.sampled_from([*REAL.splitlines(), "vllm:num_preemptions_total{", "process_start_time_seconds nan", "vllm:x_total NaN"])
ANSWERS = st.lists(LINES | st.text(max_size=30), max_size=20).map("\n".join) | st.none()


@settings(deadline=None)
@given(ANSWERS, ANSWERS, ANSWERS)
def test_no_answers_make_a_round_fail(before: str | None, second: str | None, after: str | None) -> None:
    result = recorded(before, after, caused=CAUSED, second=second)
    assert result.doubt is None or result == Telemetry(answered=True, doubt=result.doubt)


BASES = st.integers(0, 10**6)


@settings(deadline=None)
@given(st.lists(st.tuples(BASES, BASES), min_size=1, max_size=4), st.integers(0, 160))
def test_an_engine_of_any_past_is_believed_and_its_growth_exact(cores: list[tuple[int, int]], less: int) -> None:
    caused = Caused(8, 160, 160 - less, None)
    before = "".join(counted(f'engine="{core}"', output_tokens=out, preemptions=pre) for core, (out, pre) in enumerate(cores))
    first, *others = cores
    after = counted('engine="0"', output_tokens=first[0] + 160 - less, preemptions=first[1] + 5)
    after += "".join(counted(f'engine="{core}"', output_tokens=out, preemptions=pre) for core, (out, pre) in enumerate(others, 1))
    result = recorded(before, after, caused=caused)
    assert (result.doubt, result.output_tokens, result.preemptions) == (None, 160 - less, 5)


@settings(deadline=None)
@given(BASES, BASES)
def test_two_replicas_make_no_number_unless_they_could_be_one(first: int, second: int) -> None:
    result = recorded(counted(output_tokens=first), counted(output_tokens=second + 80), caused=CAUSED)
    could_be_one = CAUSED.counted_tokens <= second + 80 - first <= CAUSED.most("output_tokens")
    assert (result.output_tokens is not None) == (result.doubt is None) == could_be_one


# ------------------------------------------------------------------------------------------------ counters that come late


def test_counters_that_come_late_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "SETTLE_S", 60.0)
    monkeypatch.setattr(telemetry, "_ASK_AGAIN_S", 0.0)
    late = [counted(output_tokens=value) for value in (500, 500, 500, 540, 600, 660)]
    recorder = Recorder(cast("Engine", Texts(*late)))
    with recorder:
        pass
    assert recorder.result(CAUSED).output_tokens == 160


@pytest.mark.parametrize("text", [REAL, "python_info 1\n", counted(preemptions=1)])
def test_an_engine_that_tells_no_tokens_is_not_waited_for(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "SETTLE_S", 1e9)
    recorder = Recorder(cast("Engine", Texts(text)))
    with recorder:
        pass
    assert recorder.result(Caused()).doubt is None


# ------------------------------------------------------------------------------------------------ samples


def sampled(texts: Sequence[str], caused: Caused | None = None) -> Telemetry:
    """Return a round in which an engine was asked until it had no text left but the last."""
    engine = Texts(*texts)
    recorder = Recorder(cast("Engine", engine))
    with recorder:
        deadline = time.monotonic() + 10
        while len(engine.left) > 1:
            assert time.monotonic() < deadline
            threading.Event().wait(0.001)
    return recorder.result(caused)


def samplers() -> int:
    return sum(thread.name == "llmperf-telemetry" for thread in threading.enumerate())


def test_the_sampler_ends_with_the_round() -> None:
    with Recorder(cast("Engine", Texts(REAL))):
        assert samplers() == 1
    assert samplers() == 0


def test_the_sampler_ends_with_a_round_that_fails() -> None:
    with pytest.raises(KeyError), Recorder(cast("Engine", Texts(REAL))):
        raise KeyError
    assert samplers() == 0


def test_an_engine_without_metrics_is_not_sampled() -> None:
    with Recorder(cast("Engine", Texts(None))):
        assert samplers() == 0


def test_the_largest_use_and_the_mean_batch_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "SAMPLE_INTERVAL_S", 0.0)

    def gauges(*cores: tuple[float, int]) -> str:
        return counted(preemptions=0) + "".join(
            f'vllm:kv_cache_usage_perc{{engine="{core}"}} {use}\nvllm:num_requests_running{{engine="{core}"}} {running}\n'
            for core, (use, running) in enumerate(cores)
        )

    result = sampled(
        [counted(preemptions=0)] * 2 + [gauges((0.2, 2), (0.9, 4)), gauges((0.4, 6), (0.1, 6)), counted(preemptions=0)]
    )
    assert (result.kv_cache_peak, result.running_mean) == (0.9, (6 + 12) / 2)


# ------------------------------------------------------------------------------------------------ audits without a source

KNOWN = Telemetry(preemptions=0, prompt_tokens=0, output_tokens=0, prefix_hit_tokens=0, answered=True)


def test_an_engine_that_tells_all_has_no_audit_off() -> None:
    assert without_source(KNOWN, Workload()) is None


def test_an_engine_without_metrics_is_one_line() -> None:
    line = without_source(Telemetry(), Workload())
    assert line == (
        "audits off: this engine has no /metrics, so its prefix-cache hits, output tokens and preemptions are not known"
    )


def test_no_hits_are_missed_where_prompts_share_something() -> None:
    blind = Telemetry(preemptions=0, prompt_tokens=0, output_tokens=0, answered=True)
    assert without_source(blind, Workload()) == "prefix-cache audit off: this engine tells no hits"
    assert without_source(blind, workload_from(Axes(), {"prefix_tokens": 32})) is None


def test_what_is_a_problem_is_not_said_again() -> None:
    assert without_source(Telemetry(answered=True, doubt="others send requests too"), Workload()) is None
