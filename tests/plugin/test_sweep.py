"""`llmperf_sweep`: one workload at every TP degree inside one test, recorded and compared degree by degree."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_llmperf.testing import Result

    Run = Callable[..., Result]

STEPS = "--sim-step-s 0.02"
"""Long steps: on a busy machine the degrees still differ as the clock model says."""
SWEEP = """
import pytest

@pytest.mark.llmperf(tp=[1, 2, 4], engine_args="--sim-step-s 0.02")
def test_x(llmperf_sweep, baseline):
    measured_scaling = llmperf_sweep(prompt_tokens=8, output_tokens=4, requests=8)
    assert measured_scaling == baseline
"""
CASE = "test_it.py::test_x[tiny-sweep-c8]"
RECORD = ("--update-baselines", "--llmperf-launches=2")


def asking(expression: str, *, marker: str = "tp=[1, 2, 4]") -> str:
    """Return a test that sweeps and asserts."""
    return f"""
import pytest

@pytest.mark.llmperf({marker}, engine_args="{STEPS}")
def test_x(llmperf_sweep):
    measured_scaling = llmperf_sweep(prompt_tokens=8, output_tokens=4, requests=8)
    assert {expression}
"""


def test_a_sweep_is_one_test_with_a_case_for_each_degree(run: Run) -> None:
    result = run(asking("measured_scaling.degrees == (1, 2, 4)"))
    assert result.outcomes == {"passed": 1}, result.stdout
    assert result.statuses == {f"{CASE}#tp{tp}": "MEASURED" for tp in (1, 2, 4)}
    assert [case["engine"]["tp"] for case in result.cases] == [1, 2, 4]
    assert result.engine_starts == 3
    assert f"scaling of {CASE}\nGPUs    output tok/s    speed-up" in result.stdout


def test_the_scaling_is_that_of_the_engines(run: Run) -> None:
    result = run(asking("1.5 < measured_scaling.speed_up(2) <= 2.1 and measured_scaling.efficiency(4) > 0.5"))
    assert result.outcomes == {"passed": 1}, result.stdout


def test_a_floor_that_one_launch_misses_is_confirmed_by_a_second(run: Run) -> None:
    result = run(asking("measured_scaling.efficiency(4) >= 1.5"))
    assert result.outcomes == {"failed": 1}
    assert {len(case["launches"]) for case in result.cases} == {2}
    assert re.search(r"where [\d.]+ = efficiency\(4\)", result.stdout)
    assert re.search(r"efficiency = <scaling TP 1: .*, TP 4: [\d,]+ tok/s [\d.]+x \d+%>\.efficiency", result.stdout)


def test_every_degree_is_recorded_and_compared_with_its_own_baseline(run: Run, tmp_path: Path) -> None:
    recorded = run(SWEEP, *RECORD)
    assert recorded.outcomes == {"passed": 1}, recorded.stdout
    assert recorded.statuses == {f"{CASE}#tp{tp}": "RECORDED" for tp in (1, 2, 4)}
    assert {len(case["launches"]) for case in recorded.cases} == {2}
    assert len(list((tmp_path / "baselines").rglob("*.json"))) == 3
    result = run(SWEEP)
    assert result.outcomes == {"passed": 1}, result.stdout
    assert set(result.statuses) == {f"{CASE}#tp{tp}" for tp in (1, 2, 4)}
    assert set(result.statuses.values()) == {"PASS"}, result.stdout
    assert "baselines: 3 found, 0 new" in result.stdout


def test_a_slow_down_of_the_larger_degrees_is_red_and_names_them(run: Run) -> None:
    assert run(SWEEP, *RECORD).outcomes == {"passed": 1}
    result = run(SWEEP, "--llmperf-engine-args=--sim-communication-s 0.1")
    assert result.outcomes == {"failed": 1}, result.stdout
    assert result.statuses[f"{CASE}#tp4"] == "REGRESSED"
    assert result.statuses[f"{CASE}#tp1"] != "REGRESSED"
    explained = "\n".join(line for line in result.stdout.splitlines() if line.startswith("E "))
    assert "TP 4 REGRESSED" in explained
    assert "TP 4 REGRESSED: output_tokens_per_s: " in explained
    assert "TP 1 REGRESSED" not in explained
    assert "TP 4 is slower than TP 1" in result.stdout
    assert "likely causes, the likeliest first:" in result.stdout
    # A degree that is decided was not measured again for those that were not.
    launches = {case["engine"]["tp"]: len(case["launches"]) for case in result.cases}
    assert launches[1] < max(launches[2], launches[4])
    assert result.engine_starts == sum(launches.values())
    assert "the run ended before it was decided" not in result.stdout


def test_without_baselines_every_degree_says_how_to_record_it(run: Run) -> None:
    result = run(SWEEP)
    assert result.outcomes == {"failed": 1}
    assert set(result.statuses.values()) == {"NO-BASELINE"}
    assert f"pytest --update-baselines '{CASE}'" in result.stdout


def test_without_baselines_it_may_be_skipped_when_all_degrees_were_measured(run: Run) -> None:
    result = run(SWEEP, "--llmperf-missing-baseline=skip")
    assert result.outcomes == {"skipped": 1}
    assert len(result.cases) == 3


def test_the_comparisons_of_all_degrees_are_counted_and_tested_beforehand(run: Run) -> None:
    assert run(SWEEP, *RECORD).outcomes == {"passed": 1}
    result = run(SWEEP, "--llmperf-selftest", LLMPERF_SIMULATED_GPUS="1")
    assert "changes injected into stored samples" in result.stdout, result.stdout


@pytest.mark.parametrize("option", ["--llmperf-tp=1,2", "--llmperf-tp=2,1,16"])
def test_the_option_restricts_the_degrees_and_the_id_stays_the_same(run: Run, option: str) -> None:
    result = run(asking("measured_scaling.degrees == (1, 2)"), option)
    assert result.outcomes == {"passed": 1}, result.stdout
    assert set(result.statuses) == {f"{CASE}#tp1", f"{CASE}#tp2"}


def test_an_option_that_leaves_one_degree_skips_and_none_deselects(run: Run) -> None:
    result = run(asking("False"), "--llmperf-tp=2", "--llmperf-require-gpus", "-rs")
    assert result.outcomes == {"skipped": 1}
    assert "a sweep needs two TP degrees or more, this one has TP 2: --llmperf-tp leaves no other" in result.stdout
    assert "of those that the marker allows (1, 2, 4)" in result.stdout
    assert run(asking("False"), "--llmperf-tp=3").outcomes == {"deselected": 1}


@pytest.mark.parametrize(("gpus", "degrees"), [("2", "(1, 2)"), ("5", "(1, 2, 4)")])
def test_by_default_the_degrees_are_powers_of_two_up_to_all_gpus(run: Run, gpus: str, degrees: str) -> None:
    source = asking(f"measured_scaling.degrees == {degrees}").replace("tp=[1, 2, 4], ", "")
    assert run(source, LLMPERF_SIMULATED_GPUS=gpus).outcomes == {"passed": 1}


def test_without_a_marker_the_option_names_the_degrees(run: Run) -> None:
    source = asking("measured_scaling.degrees == (2, 4)").replace("tp=[1, 2, 4], ", "")
    assert run(source, "--llmperf-tp=4,2", LLMPERF_SIMULATED_GPUS="4").outcomes == {"passed": 1}


def test_degrees_that_the_host_cannot_run_are_left_out_and_named(run: Run) -> None:
    result = run(asking("4 in measured_scaling.unfit and measured_scaling.degrees == (1, 2)"), LLMPERF_SIMULATED_GPUS="2")
    assert result.outcomes == {"passed": 1}, result.stdout
    assert result.statuses == {f"{CASE}#tp1": "MEASURED", f"{CASE}#tp2": "MEASURED", f"{CASE}#tp4": "SKIPPED"}
    assert "TP 4 was not measured: needs 4 GPUs (TP 4 x PP 1 x DP 1 = 4), this host has 2" in result.stdout


def test_a_degree_that_the_model_does_not_fit_is_left_out(run: Run) -> None:
    source = asking("'attention heads' in measured_scaling.unfit[3]", marker="tp=[1, 2, 3]")
    result = run(source, "--llmperf-require-gpus")
    assert result.outcomes == {"passed": 1}, result.stdout
    assert result.statuses[f"{CASE}#tp3"] == "SKIPPED"


def test_a_smallest_degree_that_does_not_fit_does_not_skip_the_others(run: Run) -> None:
    source = asking("measured_scaling.degrees == (2, 4)", marker='model="qwen2.5-7b-shape", tp=[1, 2, 4]')
    result = run(source, "--llmperf-engine-args=--gpu-memory-utilization 0.08")
    assert result.outcomes == {"passed": 1}, result.stdout
    assert "TP 1 was not measured: the weights of qwen2.5-7b-shape take" in result.stdout


def test_where_gpus_are_required_a_degree_that_lacks_them_is_a_failure(run: Run) -> None:
    result = run(asking("False"), "--llmperf-require-gpus", LLMPERF_SIMULATED_GPUS="2")
    assert result.outcomes == {"error": 1}
    assert "TP 4 needs 4 GPUs" in result.stdout
    assert result.engine_starts == 0


def test_with_one_gpu_there_is_nothing_to_sweep(run: Run) -> None:
    result = run(asking("False"), "-rs", LLMPERF_SIMULATED_GPUS="1")
    assert result.outcomes == {"skipped": 1}
    assert "a sweep needs two TP degrees or more, this one has TP 1: TP 2 needs 2 GPUs" in result.stdout
    source = asking("False").replace("tp=[1, 2, 4], ", "")
    assert run(source, LLMPERF_SIMULATED_GPUS="1").outcomes == {"skipped": 1}
    assert run(source, "--llmperf-require-gpus", LLMPERF_SIMULATED_GPUS="1").outcomes == {"error": 1}


def test_a_marker_of_one_degree_makes_no_sweep(run: Run) -> None:
    result = run(asking("False", marker="tp=2"))
    assert result.outcomes == {"error": 1}
    assert "llmperf(tp=2): a sweep needs two TP degrees or more, e.g. tp=[1, 2, 4]" in result.stdout


def test_an_endpoint_cannot_be_swept(run: Run) -> None:
    result = run(asking("False"), "--llmperf-url=http://127.0.0.1:9", "-rs", quick=False)
    assert result.outcomes == {"skipped": 1}
    assert "an endpoint has the one that it was started with" in result.stdout


def test_a_sweep_beside_another_engine_is_refused(run: Run) -> None:
    result = run(asking("False").replace("(llmperf_sweep)", "(llmperf_sweep, llmperf)"))
    assert result.outcomes == {"error": 1}
    assert "use one of them in a test" in result.stdout


def test_two_sweeps_of_a_test_are_cases_of_their_own(run: Run) -> None:
    source = """
import pytest

@pytest.mark.llmperf(tp=[1, 2])
def test_x(llmperf_sweep, baseline):
    for tokens in (2, 3):
        assert llmperf_sweep(prompt_tokens=8, output_tokens=tokens, requests=8) == baseline
"""
    result = run(source, *RECORD)
    assert result.statuses == {f"{CASE}{tail}": "RECORDED" for tail in ("#tp1", "#tp2", "#2-tp1", "#2-tp2")}, result.stdout
    assert f"scaling of {CASE}#2" in result.stdout
    assert "baselines: 4 found, 0 new" in run(source, "--co").stdout


def test_models_and_loads_are_parametrized_as_ever(run: Run) -> None:
    source = """
import pytest

@pytest.mark.llmperf(tp=[1, 2], concurrency=[2, 4])
def test_x(llmperf_sweep):
    llmperf_sweep(prompt_tokens=8, output_tokens=2, requests=8)
"""
    result = run(source)
    assert set(result.statuses) == {f"test_it.py::test_x[tiny-sweep-c{c}]#tp{tp}" for c in (2, 4) for tp in (1, 2)}


BESIDE = """
import pytest

LOAD = dict(prompt_tokens=8, output_tokens=4, requests=8)

@pytest.mark.llmperf(tp=[1, 2, 4])
def test_a_sweep(llmperf_sweep, baseline):
    assert llmperf_sweep(**LOAD) == baseline

@pytest.mark.llmperf(tp=[1, 2])
def test_each(llmperf, baseline):
    assert llmperf(**LOAD) == baseline
"""


def test_a_sweep_takes_the_engines_of_the_tests_beside_it(run: Run) -> None:
    """TP 1 serves the sweep too, then comes TP 4, and TP 2 is left running for the test that is next."""
    result = run(BESIDE, "--update-baselines", "--llmperf-launches=1", "-v")
    assert set(result.statuses.values()) == {"RECORDED"}, result.stdout
    assert result.engine_starts == 3
    assert result.stdout.index("test_each[tiny-tp1-c8] PASSED") < result.stdout.index("test_a_sweep[tiny-sweep-c8] PASSED")
    assert [case["engine"]["tp"] for case in result.cases] == [1, 1, 2, 4, 2]


def test_launches_of_a_sweep_are_starts_of_their_own(run: Run) -> None:
    """No case is measured twice on one start, though tests share the starts."""
    result = run(BESIDE, *RECORD)
    assert set(result.statuses.values()) == {"RECORDED"}, result.stdout
    assert result.engine_starts == 6  # TP 1, 4 and 2 twice, on which the tests beside the sweep are measured too
    assert all(len(case["launches"]) == 2 for case in result.cases)


OF_TWO_FILES = {
    "test_a.py": """
import pytest

@pytest.fixture(scope="module", autouse=True)
def is_set_up(request):
    request.module.IS_UP = True
    yield
    request.module.IS_UP = False

@pytest.mark.llmperf(tp=[1, 2])
def test_a_sweep(llmperf_sweep, baseline):
    assert IS_UP
    assert llmperf_sweep(prompt_tokens=8, output_tokens=4, requests=8) == baseline
""",
}
OF_TWO_FILES["test_b.py"] = OF_TWO_FILES["test_a.py"].replace("test_a_sweep", "test_each").replace("llmperf_sweep", "llmperf")


def test_waiting_tests_let_the_engine_that_a_sweep_left_go_first(run: Run) -> None:
    """TP 1 and 2 three times, though all wait for each other, also in a file whose fixtures were torn down meanwhile."""
    result = run(OF_TWO_FILES, "--update-baselines", "--llmperf-launches=3")
    assert result.outcomes == {"passed": 3}, result.stdout
    assert all(len(case["launches"]) == 3 for case in result.cases)
    assert result.engine_starts == 6


def test_a_workload_that_cannot_be_is_an_error_in_words(run: Run) -> None:
    result = run(asking("False").replace("requests=8", "requests=0"))
    assert result.outcomes == {"failed": 1}
    assert "requests=0: the smallest value is 1" in result.stdout
    assert result.engine_starts == 0
