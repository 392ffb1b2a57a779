"""Points and limits as tests write them: ids, selection, what is measured, and what a limit that is not kept comes to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_llmperf.testing import Result, SimulatedEngine

    Run = Callable[..., Result]

HEAD = "import pytest\n\n"
LADDER = (
    HEAD
    + """
@pytest.mark.llmperf(points=[
    {"concurrency": 1, "requests": 5},
    {"concurrency": 4, "requests": 12, "prompt_tokens": 40},
    {"rate": 50, "requests": 20},
    {"rate": 50, "requests": 10, "id": "brief"},
])
def test_ladder(llmperf):
    llmperf(output_tokens=3)
"""
)


def nodes(result: Result) -> list[str]:
    return [line.rpartition("::")[2] for line in result.stdout.splitlines() if line.startswith("test_it.py::")]


def limited(marker: str, *, body: str = "assert not llmperf(output_tokens=3).broken_limits()") -> str:
    return f"{HEAD}@pytest.mark.llmperf({marker})\ndef test_it(llmperf):\n    {body}\n"


# ------------------------------------------------------------------------------------------------ points


def test_each_point_is_a_test_with_its_own_arguments(run: Run) -> None:
    result = run(LADDER)
    assert result.outcomes == {"passed": 4}, result.stdout
    sent = {case["id"].partition("[")[2]: case["workload"] for case in result.cases}
    assert {name: (load["requests"], load["prompt_tokens"], load.get("rate")) for name, load in sent.items()} == {
        "tiny-tp1-c1]": (5, 100, None), "tiny-tp1-c4]": (12, 40, None),
        "tiny-tp1-r50]": (20, 100, [50.0]), "tiny-tp1-r50-brief]": (10, 100, [50.0]),
    }  # fmt: skip


def test_options_select_points_as_they_select_axes(run: Run) -> None:
    assert nodes(run(LADDER, "--co", "-q", "--llmperf-concurrency=4,9")) == ["test_ladder[tiny-tp1-c4]"]
    result = run(LADDER, "--co", "-q", "--llmperf-rate=50")
    assert nodes(result) == ["test_ladder[tiny-tp1-r50]", "test_ladder[tiny-tp1-r50-brief]"]
    assert "2 deselected" in result.stdout


def test_the_call_wins_over_a_point_and_a_point_over_the_fixture(run: Run) -> None:
    conftest = (
        "import pytest\n\n@pytest.fixture\ndef llm_workload():\n    return {'requests': 30, 'output_tokens': 2, 'seed': 7}\n"
    )
    source = HEAD + (
        "@pytest.mark.llmperf(points=[{'concurrency': 2, 'requests': 6, 'prompt_tokens': 8}])\n"
        "def test_it(llmperf):\n    llmperf(prompt_tokens=9)\n"
    )
    [case] = run({"test_it.py": source, "conftest.py": conftest}).cases
    assert case["workload"] == {"prompt_tokens": 9, "output_tokens": 2, "requests": 6, "concurrency": 2, "seed": 7}


def test_a_point_has_a_baseline_of_its_own(run: Run) -> None:
    source = LADDER.replace("(llmperf)", "(llmperf, baseline)").replace(
        "    llmperf(output", "    assert baseline == llmperf(output"
    )
    run(source, "--update-baselines", "--llmperf-launches=2", "--llmperf-concurrency=1,4")
    result = run(source, "--llmperf-concurrency=1,4")
    assert set(result.statuses.values()) == {"PASS"}, result.stdout


def test_at_an_endpoint_points_are_the_loads(run: Run, simulated_engine: SimulatedEngine) -> None:
    result = run(LADDER, "--co", "-q", f"--llmperf-url=x={simulated_engine.url}", "--llmperf-concurrency=4", quick=False)
    assert nodes(result) == ["test_ladder[x-c4]"]


def test_a_sweep_goes_through_its_degrees_at_each_point(run: Run) -> None:
    source = HEAD + (
        "@pytest.mark.llmperf(tp=[1, 2], points=[{'concurrency': 2, 'requests': 4}, {'concurrency': 3, 'requests': 6}])\n"
        "def test_it(llmperf_sweep):\n    assert llmperf_sweep(output_tokens=2).degrees == (1, 2)\n"
    )
    result = run(source)
    assert result.outcomes == {"passed": 2}, result.stdout
    assert {case["workload"]["requests"] for case in result.cases} == {4, 6}


def test_the_closer_of_points_and_axes_wins(run: Run) -> None:
    source = (
        HEAD
        + """
@pytest.mark.llmperf(concurrency=[3, 5], tp=2)
class TestBoth:
    @pytest.mark.llmperf(points=[{"rate": 2}])
    def test_points(self, llmperf): pass

@pytest.mark.llmperf(points=[{"rate": 2}])
class TestAxes:
    @pytest.mark.llmperf(concurrency=7)
    def test_axes(self, llmperf): pass
"""
    )
    assert sorted(nodes(run(source, "--co", "-q"))) == ["test_axes[tiny-tp1-c7]", "test_points[tiny-tp2-r2]"]


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ("points=[{'concurrency': 2}], concurrency=4", "points say the load themselves; leave concurrency out"),
        ("points=[{'concurrency': 2}, {'concurrency': 2}]", "points[0] and points[1] are both c2"),
        ("points=[{'rate': 2, 'request': 4}]", "points[0]: request=4: unknown argument of a point"),
        ("points=[{'rate': 2, 'limits': {'ttft': 4}}]", "llmperf(points=...): points[0]: limits: 'ttft' is not a metric"),
        ("limits={'H200': {'ttft_ms': 4}}", "llmperf(limits=...): 'ttft_ms' is not a metric; known are"),
        ("limits={'ttft_p50_s': '4 ms'}", "llmperf(limits=...): ttft_p50_s='4 ms': must be a number from 0"),
    ],
)
def test_unusable_points_and_limits_are_usage_errors(run: Run, marker: str, message: str) -> None:
    result = run(limited(marker))
    assert result.returncode == 4
    assert "test_it.py::test_it" in result.stderr
    assert message in result.stderr


# ------------------------------------------------------------------------------------------------ parameters with markers


LIST = (
    HEAD
    + """
@pytest.mark.parametrize("entry", [
    pytest.param("small", marks=pytest.mark.llmperf(tp=2, points=[{"concurrency": 1, "requests": 3}, {"rate": 40, "requests": 8}],
    )),
    pytest.param("large", marks=[pytest.mark.llmperf(points=[{"rate": 40, "requests": 9}], gate={"ttft_p50_s": "20 %"})]),
    "plain",
])
@pytest.mark.llmperf(engine_args="--max-num-seqs 16")
def test_list(llmperf, entry):
    llmperf(output_tokens=3)
"""
)


def test_a_parameters_marker_makes_the_points_of_that_parameter(run: Run) -> None:
    result = run(LIST)
    assert result.outcomes == {"passed": 4}, result.stdout
    assert {case["id"].partition("[")[2]: (case["engine"]["tp"], case["workload"]["requests"]) for case in result.cases} == {
        "tiny-tp2-c1-small]": (2, 3), "tiny-tp2-r40-small]": (2, 8), "tiny-tp1-r40-large]": (1, 9), "tiny-tp1-c8-plain]": (1, 32),
    }  # fmt: skip
    assert all("--max-num-seqs 16" in str(case["engine"]["args"]) for case in result.cases)


def test_markers_of_several_parameters_are_taken_together(run: Run) -> None:
    source = (
        HEAD
        + """
@pytest.mark.parametrize("degree", [pytest.param(n, marks=pytest.mark.llmperf(tp=n)) for n in (1, 2)])
@pytest.mark.parametrize("load", [pytest.param(n, marks=pytest.mark.llmperf(concurrency=n)) for n in (3, 4)])
def test_it(llmperf, degree, load): pass
"""
    )
    assert sorted(nodes(run(source, "--co", "-q"))) == [
        "test_it[tiny-tp1-c3-3-1]", "test_it[tiny-tp1-c4-4-1]", "test_it[tiny-tp2-c3-3-2]", "test_it[tiny-tp2-c4-4-2]",
    ]  # fmt: skip


def test_models_of_different_parameters_are_told_apart_too(run: Run) -> None:
    source = (
        HEAD
        + """
@pytest.mark.parametrize("n", [pytest.param(n, marks=pytest.mark.llmperf(model=f"{n}/model")) for n in ("old", "new")])
def test_it(llmperf, n): pass
"""
    )
    assert sorted(nodes(run(source, "--co", "-q"))) == ["test_it[new_model-tp1-c8-new]", "test_it[old_model-tp1-c8-old]"]


@pytest.mark.parametrize("marker", ["tp=2", "concurrency=3", "points=[{'concurrency': 3}]"])
def test_a_marker_that_comes_too_late_for_the_points_is_refused(run: Run, marker: str) -> None:
    source = (
        HEAD
        + f"""
@pytest.fixture(params=[pytest.param(1, marks=pytest.mark.llmperf({marker}))])
def late(request): return request.param

def test_it(llmperf, late): pass
"""
    )
    result = run(source)
    assert result.returncode == 4
    assert f"llmperf({marker.partition('=')[0]}=...): this marker comes with a parameter that is known too late" in result.stderr


def test_parameters_that_can_be_read_only_once_are_left_to_pytest(run: Run) -> None:
    source = HEAD + "@pytest.mark.parametrize('n', (n for n in (1, 2)))\ndef test_it(llmperf, n): pass\n"
    assert nodes(run(source, "--co", "-q")) == ["test_it[tiny-tp1-c8-1]", "test_it[tiny-tp1-c8-2]"]


# ------------------------------------------------------------------------------------------------ limits


def test_kept_limits_pass_on_one_launch(run: Run) -> None:
    result = run(limited("limits={'ttft_p50_s': 5, 'output_tokens_per_s': 1, 'preemptions': 0}"))
    assert result.outcomes == {"passed": 1}, result.stdout
    assert result.engine_starts == 1


def test_a_limit_that_is_not_kept_fails_after_a_second_launch(run: Run) -> None:
    result = run(limited("limits={'ttft_p50_s': 0.0001, 'output_tokens_per_s': 1}"))
    assert result.outcomes == {"failed": 1}
    assert "above the limit of 0.1 ms" in result.stdout
    assert result.engine_starts == 2


def test_a_limit_that_only_the_first_launch_misses_passes(run: Run, tmp_path: Path) -> None:
    noise = f"--sim-launch-file {tmp_path / 'launches'} --sim-launch-cv 0.8 --sim-noise-seed 1"
    result = run(limited("limits={'e2e_p50_s': 0.022}"), f"--llmperf-engine-args={noise}", "-rA")
    assert result.outcomes == {"passed": 1}, result.stdout
    assert result.engine_starts == 2


def test_a_points_limits_are_its_own(run: Run) -> None:
    points = "[{'concurrency': 1, 'limits': {'ttft_p50_s': 1e-5}}, {'concurrency': 2, 'limits': {'e2e_p50_s': None}}]"
    result = run(limited(f"points={points}, limits={{'ttft_p50_s': 9, 'e2e_p50_s': 1e-5}}"))
    assert result.outcomes == {"passed": 1, "failed": 1}, result.stdout
    assert "e2e_p50_s is" in result.stdout
    assert "ttft_p50_s is" in result.stdout


@pytest.mark.parametrize(("name", "gpus", "outcome"), [
    ("Simulated", "8", "failed"), ("simul", "8", "failed"), ("cpu", "0", "failed"),
    ("cpu", "8", "passed"), ("H200", "8", "passed"),
])  # fmt: skip
def test_limits_by_accelerator_hold_on_that_one(run: Run, name: str, gpus: str, outcome: str) -> None:
    result = run(limited(f"limits={{'{name}': {{'ttft_p50_s': 1e-5}}}}"), LLMPERF_SIMULATED_GPUS=gpus)
    assert result.outcomes == {outcome: 1}, result.stdout


def test_no_limits_for_this_accelerator_are_told_before_and_after(run: Run) -> None:
    result = run(limited("limits={'H100': {'ttft_p50_s': 1e-5}, 'cpu': {}}"))
    note = "llmperf(limits=...): none for Simulated; given for H100, cpu"
    assert f"llmperf: test_it.py::test_it[tiny-tp1-c8]: {note}" in result.stdout
    assert note in result.cases[0]["notes"]


def test_what_the_engine_does_not_tell_keeps_no_limit(run: Run) -> None:
    result = run(limited("limits={'goodput_ratio': 0.5}"))
    assert result.outcomes == {"failed": 1}
    assert "goodput_ratio was not measured, and has a limit of 50.0%" in result.stdout


def test_a_sweep_names_the_degree_that_does_not_keep_a_limit(run: Run) -> None:
    source = limited(
        "tp=[1, 2], engine_args='--sim-step-s 0.1 --sim-communication-s 0', limits={'tpot_p50_s': 0.08}",
        body="print(*llmperf_sweep(output_tokens=3).broken_limits(), sep='\\n')",
    )
    result = run(source.replace("(llmperf)", "(llmperf_sweep)"), "-s")
    told = [line for line in result.stdout.splitlines() if " the limit of " in line]
    assert [line.partition(" is ")[0] for line in told] == ["TP 1: tpot_p50_s"], result.stdout


def test_limits_come_beside_a_baseline(run: Run) -> None:
    body = "m = llmperf(output_tokens=3); assert m == baseline; assert not m.broken_limits()"
    source = limited("limits={'ttft_p50_s': 9}", body=body).replace("(llmperf)", "(llmperf, baseline)")
    run(source, "--update-baselines", "--llmperf-launches=2")
    assert list(run(source).statuses.values()) == ["PASS"]
    strict = source.replace("9}", "1e-5}")
    result = run(strict)
    assert result.outcomes == {"failed": 1}
    assert "ttft_p50_s is" in result.stdout


def test_any_percentile_and_any_counter_may_have_a_limit(run: Run) -> None:
    limits = {"ttft_p95_s": 5, "e2e_max_s": 1e-5, "vllm:generation_tokens_total": ">= 1e6", "vllm:num_preemptions_total": 0}
    result = run(limited(f"limits={limits}", body="m = llmperf(output_tokens=3); print(*m.broken_limits(), sep='\\n')"), "-s")
    assert result.outcomes == {"passed": 1}, result.stdout
    told = [line for line in result.stdout.splitlines() if " the limit of " in line or "not measured" in line]
    assert len(told) == 2, told
    assert told[0].startswith("e2e_max_s is ")
    assert told[1].startswith("vllm:generation_tokens_total is ")
    assert " below the limit of 1,000,000 " in told[1]


def test_a_counter_that_the_engine_does_not_have_keeps_no_limit(run: Run) -> None:
    result = run(limited("limits={'vllm:no_such_thing_total': 5}"))
    assert result.outcomes == {"failed": 1}
    assert "vllm:no_such_thing_total was not measured, and has a limit of 5" in result.stdout
