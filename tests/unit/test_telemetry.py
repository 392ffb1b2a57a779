"""What an engine tells of itself: its `/metrics` (a real vLLM 0.32's, in data/) and its log."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pytest_llmperf.measure import telemetry
from pytest_llmperf.measure.telemetry import Capacity, Counters, Recorder, Telemetry, parse_metrics, read_capacity, read_counters

if TYPE_CHECKING:
    from pytest_llmperf.measure.engines.engine import Engine

REAL = (Path(__file__).parent / "data" / "vllm_metrics.txt").read_text()

LOG_032 = """\
(EngineCore pid=3423) INFO 11-21 07:48:37 [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config: model='tiny'
(Worker pid=3435) INFO 11-21 07:49:54 [cpu_worker.py:260] Explicitly set (1.0/8.34) GiB for KV cache on node 0.
(EngineCore pid=3423) INFO 11-21 07:49:54 [kv_cache_utils.py:2327] CPU KV cache size: 262,144 tokens, \
Maximum concurrency for 2,048 tokens per request: 128.00x
(EngineCore pid=3423) INFO 11-21 07:49:57 [core.py:402] init engine (profile, create kv cache, warmup model) took 3.03 s
"""
LOG_TWO_LINES = """\
INFO 03-01 10:00:00 [kv_cache_utils.py:634] GPU KV cache size: 1,234,560 tokens
INFO 03-01 10:00:00 [kv_cache_utils.py:637] Maximum concurrency for 32,768 tokens per request: 37.68x
"""


def two_engines(text: str) -> str:
    """Return the text of two engine cores that count alike."""
    return text + text.replace('engine="0"', 'engine="1"')


def counted(**values: float) -> str:
    names = {"preemptions": "num_preemptions", "prompt_tokens": "prompt_tokens", "output_tokens": "generation_tokens"}
    return "".join(f'vllm:{names[name]}_total{{engine="0",model_name="m"}} {value}\n' for name, value in values.items())


class Texts:
    """An engine that answers with one text after another, and with the last one for ever."""

    def __init__(self, *texts: str | None) -> None:
        self.left = list(texts)

    def metrics_text(self) -> str | None:
        return self.left.pop(0) if len(self.left) > 1 else self.left[0]


def recorded(*texts: str | None) -> Telemetry:
    recorder = Recorder(cast("Engine", Texts(*texts)))
    with recorder:
        pass
    return recorder.result()


# ------------------------------------------------------------------------------------------------ the format


def test_every_vllm_series_is_found_and_no_other() -> None:
    series = parse_metrics(REAL, "vllm:")
    assert len(series) == sum(line.startswith("vllm:") for line in REAL.splitlines())
    assert all(name.startswith("vllm:") for name, _, _ in series)


def test_a_series_has_its_labels_and_its_value() -> None:
    assert ("vllm:prompt_tokens_total", {"engine": "0", "model_name": "tiny"}, 12804.0) in parse_metrics(REAL, "vllm:")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("vllm:x 5", ("vllm:x", {}, 5.0)),
        ("vllm:x{} 5", ("vllm:x", {}, 5.0)),
        ('vllm:x{a="b"} 1.5e+06', ("vllm:x", {"a": "b"}, 1.5e6)),
        ('vllm:x{a="}",b="1,2"} 5', ("vllm:x", {"a": "}", "b": "1,2"}, 5.0)),
        (r'vllm:x{a="say \"hi\"",b="c"} 5', ("vllm:x", {"a": 'say "hi"', "b": "c"}, 5.0)),
        ('vllm:x{le="+Inf"} +Inf', ("vllm:x", {"le": "+Inf"}, float("inf"))),
    ],
)
def test_a_line_is_read_as_prometheus_writes_it(line: str, expected: tuple[str, dict[str, str], float]) -> None:
    assert parse_metrics(line, "vllm:") == [expected]


def test_only_the_series_that_are_asked_for_are_parsed() -> None:
    names = [name for name, _, _ in parse_metrics(REAL, "vllm:prompt_tokens_total", "vllm:num_requests_running")]
    assert names == ["vllm:num_requests_running", "vllm:prompt_tokens_total"]


@pytest.mark.parametrize("line", ["", "# HELP vllm:x 5", "# TYPE vllm:x counter", "python_info 1"])
def test_a_line_that_is_no_vllm_series_is_passed_over(line: str) -> None:
    assert parse_metrics(line, "vllm:") == []


@pytest.mark.parametrize(
    "line", ["vllm:x", "vllm:x{", "vllm:x five", "vllm:x{} -", 'vllm:x{a="b", ="c"} five', f"vllm:x {10**400}e", "vllm:x 5 later"]
)
def test_a_malformed_line_is_passed_over_and_the_others_are_read(line: str) -> None:
    assert parse_metrics(f"vllm:a 1\n{line}\nvllm:b 2", "vllm:") == [("vllm:a", {}, 1.0), ("vllm:b", {}, 2.0)]


@settings(deadline=None)
@given(st.text(max_size=40), st.text(max_size=40))
@example('a="b", ="c"', "5")
@example("", str(10**400))
def test_no_text_makes_the_reading_fail(labels: str, rest: str) -> None:
    text = f"{rest}\nvllm:num_preemptions_total{{{labels}}} {rest}\nvllm:cache_config_info{{{labels}}} 1"
    read_counters(text)
    read_capacity(text, rest)


# ------------------------------------------------------------------------------------------------ counters


def test_the_counters_of_a_real_engine() -> None:
    assert read_counters(REAL) == Counters(preemptions=0, prompt_tokens=12804, output_tokens=6401, prefix_hit_tokens=0)


def test_the_counters_of_two_engine_cores_are_summed() -> None:
    both = read_counters(two_engines(REAL))
    assert both == Counters(preemptions=0, prompt_tokens=2 * 12804, output_tokens=2 * 6401, prefix_hit_tokens=0)


@pytest.mark.parametrize("text", [None, "", "python_info 1\n", "<html>404</html>"])
def test_without_metrics_there_is_no_counter_rather_than_nought(text: str | None) -> None:
    assert read_counters(text) == Counters(None, None, None, None)


# ------------------------------------------------------------------------------------------------ a round


def test_a_round_brings_the_differences() -> None:
    result = recorded(
        counted(preemptions=3, prompt_tokens=100, output_tokens=50), counted(preemptions=32, prompt_tokens=300, output_tokens=90)
    )  # fmt: skip
    assert (result.preemptions, result.prompt_tokens, result.output_tokens, result.prefix_hit_tokens) == (29, 200, 40, None)
    assert not result.restarted


def test_a_counter_that_went_down_means_a_restart() -> None:
    assert recorded(counted(output_tokens=50), counted(output_tokens=10)).restarted


def test_one_counter_is_enough_to_see_a_restart() -> None:
    before = counted(output_tokens=50, prompt_tokens=100)
    assert recorded(before, counted(output_tokens=60, prompt_tokens=10)).restarted


def test_no_metrics_at_all_is_all_none_and_no_restart() -> None:
    assert asdict(recorded(None)) == {**dict.fromkeys(asdict(Telemetry())), "restarted": False}


@pytest.mark.parametrize("texts", [(counted(preemptions=1), None), (None, counted(preemptions=1))])
def test_metrics_on_one_side_only_give_no_difference(texts: tuple[str | None, ...]) -> None:
    assert recorded(*texts).preemptions is None


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


def test_the_largest_use_of_the_kv_cache_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "SAMPLE_INTERVAL_S", 0.0)
    use = [f'vllm:kv_cache_usage_perc{{engine="{engine}"}} {value}\n' for engine, value in ((0, 0.2), (1, 0.9), (0, 0.4))]
    texts = Texts(counted(preemptions=0), use[0] + use[1], use[2])
    recorder = Recorder(cast("Engine", texts))
    with recorder:
        deadline = time.monotonic() + 10
        while len(texts.left) > 1:
            assert time.monotonic() < deadline
            threading.Event().wait(0.001)
    assert recorder.result().kv_cache_peak == 0.9


# ------------------------------------------------------------------------------------------------ capacity


def test_the_capacity_of_a_real_engine_stands_in_its_metrics() -> None:
    assert read_capacity(REAL, "") == Capacity(kv_cache_tokens=262_144, max_concurrency=128)


def test_the_metrics_win_over_the_log() -> None:
    assert read_capacity(REAL, LOG_TWO_LINES) == Capacity(262_144, 128)


def test_the_capacity_stands_in_the_one_line_of_vllm_0_32() -> None:
    assert read_capacity(None, LOG_032) == Capacity(kv_cache_tokens=262_144, max_concurrency=128)


def test_the_capacity_stands_in_the_two_lines_of_older_releases() -> None:
    assert read_capacity("", LOG_TWO_LINES) == Capacity(kv_cache_tokens=1_234_560, max_concurrency=37.68)


@pytest.mark.parametrize(("metrics", "log"), [(two_engines(REAL), ""), ("", LOG_032 * 2)])
def test_the_capacity_of_two_engine_cores_is_their_sum(metrics: str, log: str) -> None:
    assert read_capacity(metrics, log) == Capacity(2 * 262_144, 2 * 128)


def test_metrics_that_do_not_tell_the_size_leave_it_to_the_log() -> None:
    metrics = 'vllm:cache_config_info{block_size="128",kv_cache_size_tokens="None",num_gpu_blocks="2048"} 1.0'
    assert read_capacity(metrics, LOG_032) == Capacity(262_144, 128)


def test_metrics_that_tell_the_size_only_leave_the_concurrency_unknown() -> None:
    metrics = 'vllm:cache_config_info{kv_cache_size_tokens="4096"} 1.0'
    assert read_capacity(metrics, "") == Capacity(4096, None)


@pytest.mark.parametrize("metrics", [None, "", "python_info 1\n"])
def test_an_engine_that_tells_nothing_has_an_unknown_capacity(metrics: str | None) -> None:
    assert read_capacity(metrics, "nothing of interest\n") == Capacity(None, None)
