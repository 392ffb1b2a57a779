"""The table of the summary: tests that are parametrized by TP and differ in nothing else are one scaling."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_llmperf.judge.verdict import MetricVerdict, Status, Verdict
from pytest_llmperf.report.outcome import Outcome
from pytest_llmperf.report.scaling import scaling_lines, scalings

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_llmperf.testing import Result

    Run = Callable[..., Result]

PARAMETRIZED = """
import pytest

@pytest.mark.llmperf(tp=[1, 2, 4], engine_args="--sim-step-s 0.02")
def test_x(llmperf):
    llmperf(prompt_tokens=8, output_tokens=4, requests=8)

def test_plain(llmperf):
    llmperf(prompt_tokens=8, output_tokens=4, requests=8)
"""


def test_degrees_of_a_parametrized_test_are_one_table(run: Run) -> None:
    result = run(PARAMETRIZED, "--llmperf-tp=1,2,4")
    assert result.outcomes == {"passed": 6}, result.stdout
    lines = result.stdout.splitlines()
    start = lines.index("scaling of test_it.py::test_x[tiny-c8]")
    assert lines[start + 1].startswith("GPUs    output tok/s    speed-up    efficiency    tok/s per GPU    TTFT p50")
    assert [line.split()[0] for line in lines[start + 3 : start + 6]] == ["1", "2", "4"]
    assert lines[start + 6].startswith("recommended: TP ")
    assert "scaling of test_it.py::test_plain[tiny-c8]" in lines


def test_one_degree_makes_no_table(run: Run) -> None:
    assert "scaling of" not in run(PARAMETRIZED, "--llmperf-tp=2").stdout


def test_a_degree_that_was_skipped_is_named_under_the_table(run: Run) -> None:
    result = run(PARAMETRIZED, LLMPERF_SIMULATED_GPUS="2")
    assert result.outcomes == {"passed": 3, "skipped": 1}, result.stdout
    assert "\nTP 4 was not measured: needs 4 GPUs" in result.stdout.replace("Skipped: ", "")


# ------------------------------------------------------------------------------------------------ from outcomes


def outcome(id: str, tp: int, tokens_per_s: float | None = 100.0, **changed: object) -> Outcome:
    row = MetricVerdict("output_tokens_per_s", None, None, tokens_per_s)
    status = changed.pop("status", Status.MEASURED)
    engine = {"kind": "server", "model": "tiny", "tp": tp, "pp": 1, "dp": 1, "args": "", "env": {}} | changed
    verdict = Verdict(Status(str(status)), (row,), ("it died",))
    return Outcome(id, id, verdict.status, verdict, (), engine, {"requests": 8})


def names(*outcomes: Outcome) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, scaling.degrees) for name, scaling in scalings(outcomes)]


def test_the_degree_is_taken_out_of_the_id_wherever_it_stands() -> None:
    assert names(outcome("t[tiny-tp1-c8]", 1), outcome("t[tiny-tp2-c8]", 2)) == [("t[tiny-c8]", (1, 2))]
    assert names(outcome("t[a-tiny-tp1-c8]#2", 1), outcome("t[a-tiny-tp2-c8]#2", 2)) == [("t[a-tiny-c8]#2", (1, 2))]
    assert names(outcome("t[tiny-sweep-c8]#tp1", 1), outcome("t[tiny-sweep-c8]#tp2", 2)) == [("t[tiny-sweep-c8]", (1, 2))]
    assert names(outcome("t[s-c8]#2-tp1", 1), outcome("t[s-c8]#2-tp16", 16)) == [("t[s-c8]#2", (1, 16))]


def test_what_differs_in_more_than_the_degree_is_not_one_scaling() -> None:
    first = outcome("t[tiny-tp1-c8]", 1)
    assert names(first, outcome("t[tiny-tp2-c4]", 2)) == []
    assert names(first, outcome("u[tiny-tp2-c8]", 2)) == []
    for change in ({"model": "other"}, {"args": "--max-num-seqs 4"}, {"env": {"A": "1"}}, {"pp": 2}, {"kind": "offline"}):
        assert names(first, outcome("t[tiny-tp2-c8]", 2, **change)) == []


def test_endpoints_have_no_degree_that_is_known() -> None:
    assert names(outcome("t[tp1-c8]", 1, kind="url"), outcome("t[c8]", 2, kind="url")) == []


def test_figures_of_an_invalid_case_are_not_taken() -> None:
    cases = [outcome("t[tp1-c8]", 1), outcome("t[tp2-c8]", 2), outcome("t[tp4-c8]", 4, status=Status.INVALID)]
    [(_, scaling)] = scalings(cases)
    assert scaling.degrees == (1, 2)
    assert dict(scaling.unfit) == {4: "it died"}
    assert "TP 4 was not measured: it died" in scaling_lines(cases)


def test_a_larger_degree_that_is_slower_is_explained() -> None:
    lines = scaling_lines([outcome("t[tp1-c8]", 1), outcome("t[tp2-c8]", 2, 80.0)], direct_links=False)
    assert "TP 2 is slower than TP 1: 80 tok/s against 100 tok/s" in lines
    assert any("linked by PCIe only" in line for line in lines)
