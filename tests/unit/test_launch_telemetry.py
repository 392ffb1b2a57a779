"""A launch whose engine's `/metrics` is not what it seems: behind a balancer, used by others, without hits, or not there."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING

import pytest

from pytest_llmperf.measure import telemetry
from pytest_llmperf.measure.client.processes import LoadClient
from pytest_llmperf.measure.engines.opening import open_engine
from pytest_llmperf.measure.launch import RoundSettings, measure_launch
from pytest_llmperf.plan.arguments import workload_from
from pytest_llmperf.plan.axes import Axes
from pytest_llmperf.plan.engine import EngineSpec
from pytest_llmperf.testing import Clock, Options, SimulatedEngine

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_llmperf.measure.measurement import Launch

CLOCK = Clock(step_s=1e-3, sequence_s=0.0, prefill_token_s=0.0)
WORKLOAD = workload_from(Axes(), {"prompt_tokens": 8, "output_tokens": 5, "requests": 12, "concurrency": 4})


def launched(change: Callable[[str], str | None], monkeypatch: pytest.MonkeyPatch) -> Launch:
    """Return a launch on an engine whose `/metrics` is changed on its way."""
    monkeypatch.setattr(telemetry, "SETTLE_S", 0.0)
    with (
        SimulatedEngine(Options(clock=CLOCK)) as served,
        LoadClient() as client,
        open_engine(EngineSpec(kind="url", url=served.url)) as engine,
    ):
        ask = engine.metrics_text
        monkeypatch.setattr(engine, "metrics_text", lambda: change(ask() or ""))
        return measure_launch(engine, client, WORKLOAD, RoundSettings(nonce="case", rounds=1))


def more(text: str, name: str, amount: float) -> str:
    """Return the text with a counter that counts more."""
    return re.sub(rf"^(vllm:{name}_total\{{.*\}}) (\S+)$", lambda m: f"{m[1]} {float(m[2]) + amount}", text, flags=re.MULTILINE)


def test_counters_of_two_replicas_are_never_subtracted(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = itertools.cycle([0, 1])

    def balanced(text: str) -> str:
        return more(more(text, "generation_tokens", 9000), "num_preemptions", 385) if next(turns) else text

    launch = launched(balanced, monkeypatch)
    assert "more than one engine (a balancer in front?)" in launch.invalid[0]
    assert launch.rounds[0].metrics["preemptions"] is None
    assert launch.rounds[0].counters == {}


def test_what_others_send_is_a_problem_with_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    grown = itertools.count(0, 4000)
    launch = launched(lambda text: more(text, "generation_tokens", next(grown)), monkeypatch)
    assert re.search(
        r"counted [48],\d{3} output tokens, though only 60 were asked for: others send requests too", launch.invalid[0]
    )


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda _: None, "audits off: this engine has no /metrics"),
        (
            lambda text: re.sub(r"^vllm:prefix_cache_hits.*\n", "", text, flags=re.MULTILINE),
            "prefix-cache audit off: this engine tells no hits",
        ),
        (lambda _: "process_open_fds 7\n", "output-token audit off: this engine tells no output tokens"),
    ],
)  # fmt: skip
def test_a_launch_says_which_of_its_audits_are_off(
    change: Callable[[str], str | None], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = launched(change, monkeypatch)
    assert launch.invalid == ()
    assert sum(line in warning for warning in launch.warnings) == 1


def test_a_launch_that_was_told_all_keeps_counters_and_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = launched(lambda text: text, monkeypatch)
    assert not any("audit" in warning for warning in launch.warnings)
    assert launch.rounds[0].counters["vllm:generation_tokens_total"] == 60
    assert launch.values("e2e_p95_s")[0] is not None
    assert launch.samples.keys() >= {"ttft", "itl", "tpot", "e2e"}
