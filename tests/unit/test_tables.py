"""Tables as values, and how text renders each of them: in full, so that a change of layout shows."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from typing import Literal

import pytest

from pytest_llmperf.judge.noise import Parts
from pytest_llmperf.judge.scaling import points_of
from pytest_llmperf.judge.verdict import MetricVerdict, Status, Verdict
from pytest_llmperf.report.outcome import Outcome
from pytest_llmperf.report.scaling import Scaling
from pytest_llmperf.report.tables import Column, Table, metrics_table, review_table, scaling_table, summary_table
from pytest_llmperf.report.text import blind_lines, render

NOISE = Parts(rounds=0.61, launches=1.25, jobs=None, launch_count=5, job_count=1)
ROWS = (
    MetricVerdict("output_tokens_per_s", Status.REGRESSED, 8242.0, 7400.0, 0.102, 0.081, None, "t-test", 0.05, 0.031),
    MetricVerdict("ttft_p50_s", Status.PASS, 0.0123, 0.0121, -0.0163, None, 0.021, "t-test", 0.08, 0.074),
    MetricVerdict("preemptions", None, 3.0, 3.0, 0.0),
    MetricVerdict("gpu_memory_peak_bytes", None, None, None),
)


def outcome(rows: tuple[MetricVerdict, ...] = ROWS, status: Status = Status.REGRESSED) -> Outcome:
    return Outcome("test_x[tiny-tp1-c8]", "test_x", status, Verdict(status, rows), (), {}, {})


def text(table: Table) -> str:
    return "\n".join(line.rstrip() for line in render(table).splitlines())


def expected(lines: str) -> str:
    return textwrap.dedent(lines).strip("\n")


METRICS = """
metric               baseline        now             change       bounds         tolerance    detectable    verdict    rule
-------------------  --------------  --------------  -----------  -------------  -----------  ------------  ---------  ------
output_tokens_per_s  8,242 tokens/s  7,400 tokens/s  10.2% worse  [+8.1%, inf]   5 %          3.1 %         REGRESSED  t-test
ttft_p50_s           12.3 ms         12.1 ms         1.6% better  [-inf, +2.1%]  8 %          7.4 %         PASS       t-test
preemptions          3 preemptions   3 preemptions   same                                                   observed
"""


def test_the_metrics_of_a_case_in_full() -> None:
    assert text(metrics_table(outcome())) == METRICS.strip("\n")


def test_the_summary_has_what_most_readers_want() -> None:
    assert text(summary_table([outcome(), outcome(())])) == expected("""
        case                 output tok/s         TTFT p50               TPOT p50    preempt.    launches    verdict
        -------------------  -------------------  ---------------------  ----------  ----------  ----------  ---------
        test_x[tiny-tp1-c8]  7,400 (10.2% worse)  12.1 ms (1.6% better)  -           3           0           REGRESSED
        test_x[tiny-tp1-c8]  -                    -                      -           -           0           REGRESSED
    """)


def test_a_recorded_baseline_is_shown_for_review() -> None:
    assert text(review_table(outcome((MetricVerdict("ttft_p50_s", None, 0.0123, 0.0121, -0.0163),)))) == expected("""
        metric      old      new      change
        ----------  -------  -------  -----------
        ttft_p50_s  12.3 ms  12.1 ms  1.6% better
    """)


def test_a_calibrated_baseline_shows_its_noise() -> None:
    row = MetricVerdict("ttft_p50_s", None, 0.0123, 0.0121, -0.0163, tolerance=0.08, detectable=0.074, noise=NOISE)
    assert text(review_table(outcome((row,)))) == expected("""
        metric      old      new      change       rounds sd    launches sd    jobs sd    detectable    tolerance to propose
        ----------  -------  -------  -----------  -----------  -------------  ---------  ------------  ----------------------
        ttft_p50_s  12.3 ms  12.1 ms  1.6% better  0.61%        1.2%           ?          7.4 %         8 %
        to gate by what can be found: @pytest.mark.llmperf(gate={'ttft_p50_s': '8 %'})
    """)


def test_a_scaling_says_what_it_leaves_out() -> None:
    figures = {2: {"output_tokens_per_s": 13554.0, "ttft_p50_s": 0.5}, 4: {"output_tokens_per_s": 21100.0}}
    scaling = Scaling(points_of(figures, gpus_per_degree=2), unfit={8: "needs 8 GPUs, this host has 4"})
    assert (
        text(scaling_table(scaling))
        == "\n".join(line.rstrip() for line in str(scaling).splitlines())
        == expected("""
        TP    GPUs    output tok/s    speed-up    efficiency    tok/s per GPU    TTFT p50    TPOT p50
        ----  ------  --------------  ----------  ------------  ---------------  ----------  ----------
        2     4       13,554          1.00x       100%          3,388            500 ms      -
        4     8       21,100          1.56x       78%           2,638            -           -
        speed-up and efficiency are relative to TP 2, the smallest degree that was measured
        TP 8 was not measured: needs 8 GPUs, this host has 4
    """)
    )


@pytest.mark.parametrize(("align", "cell"), [("left", "7      x"), ("right", "    7  x")])
def test_a_column_says_how_its_cells_are_aligned(align: Literal["left", "right"], cell: str) -> None:
    assert render(Table((Column("abc", align), Column("d")), (("7", "x"),))).splitlines()[2] == cell


def test_a_table_without_rows_has_its_headers() -> None:
    assert render(Table((Column("a"), Column("b")), (), ("nothing",))).splitlines()[-1] == "nothing"


def test_an_audit_that_is_off_is_said_once_for_all_cases() -> None:
    line = "prefix-cache audit off: this engine tells no hits"
    blind = replace(outcome(), notes=("no steady window: 8 requests are 2 waves of 4", line))
    assert blind_lines([blind, outcome(), blind]) == [f"{line} (2 cases)"]
    assert blind_lines([outcome(), blind]) == [f"{line} (1 case)"]
    assert blind_lines([outcome()]) == []
