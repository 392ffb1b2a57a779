"""What an engine or a baseline tells that makes no sense: it is not known, or refused, and never ends in a traceback of ours."""

from __future__ import annotations

import itertools
import json
import re
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pytest_llmperf.measure import audit
from pytest_llmperf.measure.engines.server import ServerEngine
from pytest_llmperf.measure.exposition import LARGEST, read_scrape
from pytest_llmperf.measure.kv_cache import read_capacity
from pytest_llmperf.measure.plausibility import Caused
from pytest_llmperf.measure.telemetry import Recorder
from pytest_llmperf.plan.workload import Workload
from tests.conftest import SERVING

if TYPE_CHECKING:
    import random

TRACEBACKS = ("INTERNALERROR", "Traceback", "fault of pytest-llmperf")
NO_NUMBERS = ("NaN", "+Inf", "-Inf", "1e999", "9" * 400, "-5", "9" * 300)
NAMES = (
    "vllm:generation_tokens_total", "vllm:prompt_tokens_total", "vllm:num_preemptions_total", "vllm:prefix_cache_hits_total",
    "vllm:kv_cache_usage_perc", "vllm:num_requests_running", "vllm:spec_decode_num_drafts_total",
    "vllm:spec_decode_num_accepted_tokens_total", "vllm:request_success_total", "sglang:max_total_num_tokens",
    "trtllm_kv_cache_max_blocks", "trtllm_kv_cache_tokens_per_block", "process_start_time_seconds",
)  # fmt: skip


def recorded(*answers: str):
    """Return what is known of a round with these answers: two before it, samples, and one after it."""
    given_answers = itertools.chain(answers, itertools.repeat(answers[-1]))
    with Recorder(SimpleNamespace(metrics_text=lambda: next(given_answers))) as recorder:  # type: ignore[arg-type]
        pass
    return recorder.result(Caused(requests=4, asked_tokens=40, counted_tokens=0, prompt_tokens=40))


def finite(value: object) -> bool:
    """Return whether JSON holds a value without NaN and infinity."""
    json.dumps(value, allow_nan=False)
    return True


SAMPLES = st.lists(
    st.tuples(
        st.sampled_from([*NAMES, "vllm:x", "", "vllm:", "x_total", "http_requests_total"]),
        st.dictionaries(st.sampled_from(["engine", "tp_rank", "le", "model_name", "kv_cache_size_tokens"]), st.text(max_size=8)),
        st.one_of(st.sampled_from([*NO_NUMBERS, "0", "1", "7", "12", "1_0", "١٢", "0x1", "", "1 1e400"]), st.text(max_size=6)),
    ),
    max_size=12,
)


def exposed(samples) -> str:
    """Return samples as a `/metrics` answer."""
    return "".join(
        f"{name}{{{','.join(f'{key}={json.dumps(label)}' for key, label in labels.items())}}} {value}\n"
        for name, labels, value in samples
    )


@pytest.mark.fault("bad input is told", "NaN, infinity, 400 digits, negative or repeated counters in /metrics")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(before=SAMPLES, after=SAMPLES)
@example([(NAMES[0], {}, "1")], [(NAMES[0], {}, "NaN")])
@example([(NAMES[0], {}, "1")], [(NAMES[0], {}, "5"), (NAMES[0], {}, "9")])
def test_whatever_metrics_hold_no_figure_is_without_number(before, after) -> None:
    telemetry = recorded(exposed(before), exposed(before), exposed(after))
    finite([vars(telemetry)["counters"], *(value for value in vars(telemetry).values() if isinstance(value, (int, float)))])
    capacity = read_capacity(exposed(after), "")
    assert finite([capacity.kv_cache_tokens, capacity.max_concurrency])
    assert audit.without_source(telemetry, Workload()) is None or "audit" in str(audit.without_source(telemetry, Workload()))


@pytest.mark.parametrize("value", NO_NUMBERS)
def test_a_counter_without_a_number_is_not_known_and_says_why(value: str) -> None:
    text = f"vllm:prompt_tokens_total 5\n{NAMES[0]} {value}\n"
    telemetry = recorded(text, text, text)
    assert telemetry.output_tokens is None
    said = audit.without_source(telemetry, Workload()) or ""
    assert re.search(rf"tells no output tokens; .*of its /metrics {NAMES[0]} is ", said)


def test_a_counter_told_twice_is_believed_where_both_agree() -> None:
    [once] = read_scrape('x_total{a="1"} 5\nx_total{a="1"} 5\n').series
    assert once.value == 5
    twice = read_scrape('x_total{a="1"} 5\nx_total{a="1"} 7\nx_total{a="2"} 1\n')
    assert (twice.series, twice.unusable) == ((), {"x_total": "5 and 7 for the same labels"})


def test_the_largest_number_is_read_and_none_beyond() -> None:
    assert [each.value for each in read_scrape(f"x {LARGEST:g}\ny {2 * LARGEST:g}\n").series] == [LARGEST]


@pytest.mark.fault("no hang", "a line of a million quotes in /metrics")
def test_monstrous_lines_are_passed_over(attempts) -> None:
    for _ in attempts(quick=1, full=3):
        begin_s = time.monotonic()
        lines = ['x{a="' + '\\"' * 1_000_000 + ' # {"} 1', "y " + "{" * 1_000_000, 'z{a="' + "\\" * 1_000_001 + '"} 1', "w 1"]
        assert [each.name for each in read_scrape("\n".join(lines)).series] == ["w"]
        attempts.took(time.monotonic() - begin_s)


@pytest.mark.fault("bad input is told", "metrics without a number through a run that records")
@pytest.mark.parametrize(("name", "value"), [(NAMES[0], "NaN"), (NAMES[2], "9" * 400), ("sglang:max_total_num_tokens", "+Inf")])
def test_a_run_gets_over_metrics_without_numbers(run, monkeypatch, name: str, value: str) -> None:
    ask = ServerEngine.metrics_text

    def changed(engine: ServerEngine) -> str:
        text = re.sub(r"kv_cache_size_tokens=", "other=", ask(engine) or "")
        return re.sub(rf"^{name}.*\n", "", text, flags=re.MULTILINE) + f'{name}{{engine="0"}} {value}\n'

    monkeypatch.setattr(ServerEngine, "metrics_text", changed)
    result = run(SERVING, "--update-baselines", "--llmperf-launches=2")
    assert not any(word in result.stdout for word in TRACEBACKS), result.stdout
    assert set(result.statuses.values()) <= {"RECORDED", "NOT-COMPARABLE", "INVALID"}, result.stdout
    assert name.startswith("sglang") or f"{name} is " in result.stdout + json.dumps(result.cases)


NAN = float("nan")
DAMAGES: dict[str, tuple[str, object]] = {
    "noise without numbers": ("noise", {"tpot_p50_s": {"launch_cv": NAN, "detectable": NAN, "tolerance": NAN}}),
    "noise of texts": ("noise", {"tpot_p50_s": {"launch_cv": "much"}}),
    "noise of unknown metrics": ("noise", {"no_such_metric": {"launch_cv": 0.1}}),
    "noise that is a list": ("noise", [1, 2]),
    "engine arguments as a list": ("provenance.engine.args", ["--x", "1"]),
    "an environment as a text": ("provenance.engine.env", "A=1"),
    "no versions": ("provenance.versions", None),
    "versions of numbers": ("provenance.versions", {"vllm": 5, "torch": None}),
    "a host as a list": ("provenance.host", ["a", 1]),
    "an engine as a list": ("provenance.engine", [1]),
    "an engine without anything": ("provenance.engine", {}),
    "a kind that nobody knows": ("provenance.engine.kind", "steam"),
    "a kind that is a list": ("provenance.engine.kind", ["server"]),
    "a commit of a number": ("provenance.commit", 5),
    "no provenance": ("provenance", None),
    "a metric of a class that the workload has not": ("launches.*.rounds.*.metrics.long/ttft_p50_s", 0.5),
    "a throughput of a class that the workload has not": ("launches.*.rounds.*.metrics.long/output_tokens_per_s", 9.0),
    "a class without a name": ("launches.*.rounds.*.metrics./ttft_p50_s", 0.5),
    "a metric of two classes": ("launches.*.rounds.*.metrics.a/b/ttft_p50_s", 0.5),
    "an unknown metric of the launch": ("launches.*.metrics.long/kv_cache_tokens", 5.0),
    "a metric with an escape": ("launches.*.rounds.*.metrics.\x1b[31m", 0.5),
    "an unknown metric": ("launches.*.rounds.*.metrics.no_such", 0.5),
    "a metric of a text": ("launches.*.rounds.*.metrics.tpot_p50_s", "fast"),
    "a metric without a number": ("launches.*.rounds.*.metrics.tpot_p50_s", NAN),
    "a metric of 400 digits": ("launches.*.rounds.*.metrics.tpot_p50_s", 10**400),
    "a negative metric": ("launches.*.rounds.*.metrics.tpot_p50_s", -1.0),
    "no rounds": ("launches.*.rounds", []),
    "no launches": ("launches", []),
    "a workload of a list": ("workload", [1]),
    "a version of a text": ("version", "new"),
}


def damaged(text: str, place: str, value: object) -> str:
    """Return a baseline with another value at a place."""
    data = json.loads(text)
    *names, last = place.split(".")
    inner: list[Any] = [data]
    for name in names:
        inner = [part for each in inner for part in (each if name == "*" else [each.setdefault(name, {})])]
    for each in inner:
        each[last] = value
    return json.dumps(data)


MANY = """
import pytest

@pytest.mark.parametrize("number", range({count}))
def test_serving(llmperf, baseline, number):
    assert llmperf(prompt_tokens=16, output_tokens=6, requests=8) == baseline
"""
MODES: tuple[tuple[str, ...], ...] = (
    ("-v", "--llmperf-engine-args=--sim-slow-down 3", "--llmperf-max-launches=2"),
    ("--llmperf-selftest",),
    ("--update-baselines", "--llmperf-launches=2"),
    ("--update-baselines-new-only",),
    ("--llmperf-calibrate=2",),
    ("--co", "-v"),
    ("-vv", "--llmperf-max-launches=2"),
)
"""Compared with a slower engine, self-tested, extended, and whatever else reads baselines."""


@pytest.mark.fault("bad input is told", "odd provenance, noise without numbers, unknown metrics in a baseline")
def test_damaged_baselines_end_in_no_traceback(run, tmp_path, attempts) -> None:
    source = MANY.format(count=len(DAMAGES))
    assert run(source, "--update-baselines", "--llmperf-launches=2").returncode == 0
    paths = sorted((tmp_path / "baselines").glob("**/*.json"))
    sound = [path.read_text() for path in paths]
    modes = iter(MODES)
    for _ in attempts(quick=2, full=len(MODES)):
        for path, text, damage in zip(paths, sound, DAMAGES.values(), strict=True):
            path.write_text(damaged(text, *damage))
        mode = next(modes)
        result = run(source, *mode)
        assert not any(word in result.stdout for word in TRACEBACKS), result.stdout
        assert result.returncode in (0, 1), result.stdout
        if mode == MODES[0]:
            assert result.outcomes == {"failed": len(DAMAGES)}, result.stdout


ODD: tuple[Any, ...] = (
    None, True, 0, -1, 5, 10**400, 1e308, NAN, float("inf"), "", "x", "\x1b[2J", [], [None], {}, {"a": None}, {"": {}}, [[1]],
    "long/ttft_p50_s",
)  # fmt: skip


def mutated(text: str, chance: random.Random) -> str:
    """Return a baseline of which one part, wherever it is, has become something else."""
    data = json.loads(text)
    inner: Any = data
    while isinstance(inner, (dict, list)) and inner:
        outer, keys = inner, list(inner) if isinstance(inner, dict) else range(len(inner))
        key = chance.choice([key for key in keys if key != "case"])  # what a renamed test leaves has a test of its own
        inner = outer[key]
        if chance.random() < 0.3:
            break
    what = chance.choice(ODD)
    if chance.random() < 0.2 and isinstance(outer, dict):
        outer[f"{chance.choice(['long/', '', '/', 'a/b/'])}{key}"] = what
    else:
        outer[key] = what
    return json.dumps(data)


@pytest.mark.fault("bad input is told", "any part of a baseline replaced by something else")
def test_any_part_of_a_baseline_may_be_something_else(run, tmp_path, attempts) -> None:
    source = MANY.format(count=20)
    assert run(source, "--update-baselines", "--llmperf-launches=2").returncode == 0
    paths = sorted((tmp_path / "baselines").glob("**/*.json"))
    sound = [path.read_text() for path in paths]
    for chance in attempts(quick=1, full=12):
        for path, text in zip(paths, sound, strict=True):
            path.write_text(mutated(text, chance))
        result = run(source, "-v", "--llmperf-max-launches=2", *chance.choice([(), ("--llmperf-engine-args=--sim-slow-down 3",)]))
        faults = [line for line in result.stdout.splitlines() if "itself failed" in line]
        assert faults == []
        assert not any(word in result.stdout for word in TRACEBACKS), result.stdout
        assert sum(result.outcomes.values()) >= len(paths)
