"""`--llmperf-idle`: the engine idles after its rounds, and is measured again; on the virtual clock it takes no time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_llmperf.testing import Result, SimulatedEngine

    Run = Callable[..., Result]

SERVED = """
def test_it(llmperf, baseline):
    assert llmperf(prompt_tokens=8, output_tokens=4, requests=24) == baseline
"""
MEASURED = """
def test_it(llmperf):
    measured = llmperf(prompt_tokens=8, output_tokens=4, requests=24)
    {}
"""
RECORD = ("--update-baselines", "--llmperf-launches=2")
COLD = "--llmperf-engine-args=--sim-idle-slow-down 1.3 --sim-idle-s 600"
GATE = "--llmperf-gate=idle_ttft_ratio=10%,idle_output_tokens_ratio=10%"


def of_launch(result: Result, name: str) -> float:
    value = result.cases[0]["launches"][0]["metrics"][name]
    assert isinstance(value, float)
    return value


def test_an_engine_that_stays_warm_is_as_before(run: Run) -> None:
    result = run(MEASURED.format("assert measured['idle_first_ttft_s'] > 0"), "--llmperf-idle=30m")
    assert result.outcomes == {"passed": 1}, result.stdout
    assert of_launch(result, "idle_ttft_ratio") == pytest.approx(1, rel=1e-6)
    assert of_launch(result, "idle_output_tokens_ratio") == pytest.approx(1, rel=1e-6)
    assert "idling for 30 min" in result.stdout
    assert not any("stay warm" in note for note in result.cases[0]["notes"])


def test_an_engine_that_cools_down_is_named(run: Run) -> None:
    result = run(MEASURED.format("pass"), "--llmperf-idle=30m", COLD)
    assert of_launch(result, "idle_ttft_ratio") == pytest.approx(1.3, rel=1e-3)
    assert of_launch(result, "idle_output_tokens_ratio") == pytest.approx(1 / 1.3, rel=1e-3)
    assert (
        "the engine did not stay warm: after idling for 30 min TTFT p50 is 1.30 times what it was"
        " and output tokens/s are 0.77 times what they were"
    ) in result.cases[0]["notes"]


def test_a_pause_too_short_to_cool_down_changes_nothing(run: Run) -> None:
    assert of_launch(run(MEASURED.format("pass"), "--llmperf-idle=90", COLD), "idle_ttft_ratio") == pytest.approx(1)


def test_the_rounds_after_the_pause_are_not_those_that_are_judged(run: Run) -> None:
    plain = run(MEASURED.format("pass"))
    idled = run(MEASURED.format("pass"), "--llmperf-idle=1h", COLD)
    rounds = [[each["metrics"]["ttft_p50_s"] for each in result.cases[0]["launches"][0]["rounds"]] for result in (plain, idled)]
    assert rounds[0] == pytest.approx(rounds[1])


def test_cooling_down_can_gate(run: Run) -> None:
    assert set(run(SERVED, GATE, "--llmperf-idle=30m", *RECORD).statuses.values()) == {"RECORDED"}
    assert run(SERVED, GATE, "--llmperf-idle=30m").outcomes == {"passed": 1}
    worse = run(SERVED, GATE, "--llmperf-idle=30m", COLD)
    assert set(worse.statuses.values()) == {"REGRESSED"}, worse.stdout
    assert "idle_ttft_ratio: 100.0% -> 130.0%, 30.0% worse" in worse.stdout


def test_a_gate_on_idling_without_the_option_cannot_be_recorded(run: Run) -> None:
    result = run(SERVED, GATE, *RECORD)
    assert "idle_ttft_ratio: not measured" in result.stdout


def test_it_is_off_by_default(run: Run) -> None:
    result = run(MEASURED.format("pass"))
    assert "idle_ttft_ratio" not in result.cases[0]["launches"][0]["metrics"]


def test_the_ini_file_can_ask_for_it(run: Run) -> None:
    result = run({"test_it.py": MEASURED.format("pass"), "pytest.ini": "[pytest]\nllmperf_idle = 20m\n"})
    assert "idling for 20 min" in result.stdout


@pytest.mark.parametrize("value", ["0", "-1", "soon", "5d", ""])
def test_what_is_no_time_is_a_usage_error(run: Run, value: str) -> None:
    result = run(SERVED, f"--llmperf-idle={value}")
    assert result.returncode == 4
    assert f"--llmperf-idle={value}: must be a time above 0" in result.stdout + result.stderr


def test_an_endpoint_is_let_idle_too(run: Run, simulated_engine: SimulatedEngine) -> None:
    url = f"--llmperf-url={simulated_engine.url}"
    result = run(MEASURED.format("pass"), "--llmperf-engine=url", url, "--llmperf-idle=0.2")
    assert of_launch(result, "idle_first_ttft_s") > 0
    assert "idling for 0.2 s" in result.stdout


def test_an_engine_on_the_real_clock_is_waited_for(run: Run) -> None:
    result = run(MEASURED.format("pass"), "--llmperf-idle=0.1", LLMPERF_SIMULATED_CLOCK="real")
    assert of_launch(result, "idle_first_ttft_s") > 0


def test_an_engine_that_fails_after_the_pause_is_invalid(run: Run) -> None:
    # Warm-up and rounds take 8 + 3 x 24 requests and those of the start; the next fails.
    result = run(MEASURED.format("pass"), "--llmperf-idle=30m", "--llmperf-engine-args=--sim-fail-every 60", "--llmperf-rounds=2")
    assert set(result.statuses.values()) == {"INVALID"}
