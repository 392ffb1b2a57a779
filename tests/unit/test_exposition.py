"""Reading `/metrics`: Prometheus's text format, OpenMetrics, and whatever else a server may answer."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pytest_llmperf.measure.dialects import COUNTERS, software_in, value_of
from pytest_llmperf.measure.exposition import parse_metrics, read_scrape, read_series
from pytest_llmperf.measure.kv_cache import read_capacity

REAL = (Path(__file__).parent / "data" / "vllm_metrics.txt").read_text()


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
        (r'vllm:x{a="C:\\models\\n\nx"} 5', ("vllm:x", {"a": "C:\\models\\n\nx"}, 5.0)),
        ('vllm:x{le="+Inf"} +Inf', ("vllm:x", {"le": "+Inf"}, float("inf"))),
        # A timestamp: of Prometheus's format in milliseconds, of OpenMetrics in seconds; federated answers have them.
        ("vllm:x 5 1763942400000", ("vllm:x", {}, 5.0)),
        ('vllm:x{a="b"} 5 1763942400.25', ("vllm:x", {"a": "b"}, 5.0)),
        # Exemplars, which only OpenMetrics has.
        ('vllm:x_count{a="b"} 5 # {trace_id="7f"} 0.5 1763942400.25', ("vllm:x_count", {"a": "b"}, 5.0)),
        ('vllm:x{a="b"} 5 1763942400.25 # {} 0.5', ("vllm:x", {"a": "b"}, 5.0)),
        ('vllm:x{a="no # {exemplar"} 5', ("vllm:x", {"a": "no # {exemplar"}, 5.0)),
        (r'vllm:x{a="quote \" # {"} 5 # {t="1"} 2', ("vllm:x", {"a": 'quote " # {'}, 5.0)),
    ],
)
def test_a_line_is_read_as_it_is_written(line: str, expected: tuple[str, dict[str, str], float]) -> None:
    assert parse_metrics(line, "vllm:") == [expected]


def test_only_the_series_that_are_asked_for_are_parsed() -> None:
    names = [name for name, _, _ in parse_metrics(REAL, "vllm:prompt_tokens_total", "vllm:num_requests_running")]
    assert names == ["vllm:num_requests_running", "vllm:prompt_tokens_total"]


@pytest.mark.parametrize("line", ["", "# HELP vllm:x 5", "# TYPE vllm:x counter", "# EOF", "#", "python_info 1"])
def test_a_line_that_is_no_vllm_series_is_passed_over(line: str) -> None:
    assert parse_metrics(line, "vllm:") == []


BROKEN = ("vllm:x", "vllm:x{", "vllm:x five", "vllm:x{} -", 'vllm:x{a="b", ="c"} five', f"vllm:x {10**400}e", "vllm:x 5 later")


@pytest.mark.parametrize("line", BROKEN)
def test_a_malformed_line_is_passed_over_and_the_others_are_read(line: str) -> None:
    assert parse_metrics(f"vllm:a 1\n{line}\nvllm:b 2", "vllm:") == [("vllm:a", {}, 1.0), ("vllm:b", {}, 2.0)]
    assert [each.name for each in read_scrape(f"vllm:a 1\n{line}\nvllm:b 2").series] == ["vllm:a", "vllm:b"]


OPENMETRICS = """\
# TYPE vllm:prompt_tokens counter
# HELP vllm:prompt_tokens Number of prefill tokens processed.
# UNIT vllm:prompt_tokens tokens
vllm:prompt_tokens_total{engine="0"} 12.0 # {request="a"} 3.0
vllm:prompt_tokens_created{engine="0"} 1795247335.5
# TYPE vllm:e2e_request_latency_seconds histogram
vllm:e2e_request_latency_seconds_bucket{le="1.0"} 2 # {trace_id="f"} 0.7 1795247336.1
vllm:e2e_request_latency_seconds_count 2
vllm:e2e_request_latency_seconds_sum 1.5
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running 3
# EOF
"""


@pytest.mark.parametrize(
    ("name", "grows"),
    [
        ("vllm:prompt_tokens_total", True),
        ("vllm:prompt_tokens_created", False),
        ("vllm:e2e_request_latency_seconds_count", True),
        ("vllm:e2e_request_latency_seconds_sum", True),
        ("vllm:num_requests_running", False),
        ("unknown_total", True),
        ("unknown", False),
    ],
)
def test_what_only_grows_is_told_by_type_or_by_name(name: str, grows: bool) -> None:
    assert read_scrape(OPENMETRICS).is_cumulative(name) == grows


def test_a_gauge_whose_name_ends_like_a_counters_does_not_grow() -> None:
    scrape = read_scrape("# TYPE sglang:lora_pool_slots_total gauge\nsglang:lora_pool_slots_total 8\n")
    assert not scrape.is_cumulative("sglang:lora_pool_slots_total")


def test_openmetrics_is_read_like_prometheus() -> None:
    scrape = read_scrape(OPENMETRICS)
    assert value_of(scrape, "prompt_tokens") == 12
    assert scrape.help_of("vllm:prompt_tokens_total") == "Number of prefill tokens processed."
    assert not any(each.name.endswith("_bucket") for each in scrape.series)


def test_windows_line_ends_are_no_part_of_a_value() -> None:
    assert value_of(read_scrape("vllm:prompt_tokens_total 12\r\nvllm:generation_tokens_total 5\r\n"), "prompt_tokens") == 12


LINES = st.lists(st.sampled_from([*OPENMETRICS.splitlines(), *BROKEN]) | st.text(max_size=40), max_size=12).map("\n".join)


@settings(deadline=None)
@given(st.text(max_size=40), st.text(max_size=40))
@example('a="b", ="c"', "5")
@example("", str(10**400))
@example("", "5 # {")
@example('"vllm:x"', "1")
def test_no_text_makes_the_reading_fail(labels: str, rest: str) -> None:
    info = f"vllm:cache_config_info{{{labels}}} 1\n# TYPE {labels}\n{{{rest}}}"
    text = f"{rest}\nvllm:num_preemptions_total{{{labels}}} {rest}\n{info}"
    for feature in COUNTERS:
        value_of(read_scrape(text), feature)
    read_capacity(text, rest)


@settings(deadline=None)
@given(LINES)
def test_no_order_of_lines_makes_the_reading_fail(text: str) -> None:
    scrape = read_scrape(text)
    assert software_in(scrape) in (None, "vllm")
    assert {each for each in read_series(text, ("vllm:",)).series if "_bucket" not in each.name} <= set(scrape.series)
