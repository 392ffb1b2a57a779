"""Percentiles and counters by name, audits without a source, and tolerated failures, as a test and its report meet them."""

from __future__ import annotations

import json

import pytest

RECORD = ("--update-baselines", "--llmperf-launches=3")
CASE = "test_it.py::test_serving[tiny-tp1-c8]"
ASKED = """
import pytest

@pytest.mark.llmperf(gate={gate!r})
def test_serving(llmperf, baseline):
    measured = llmperf(prompt_tokens=16, output_tokens=6, requests=120{more})
    assert measured["ttft_p50_s"] <= measured["ttft_p95_s"] <= measured.ttft_max_s
    assert measured["vllm:generation_tokens_total"] == 120 * 6
    assert measured == baseline
"""
TOLERANT = """
def test_serving(llmperf, baseline):
    assert llmperf(prompt_tokens=16, output_tokens=6, requests=40, tolerated_failures={share!r}) == baseline
"""


def asked(gate, more=""):
    return ASKED.format(gate=gate, more=more)


def gating(result):
    return {row["metric"]: row["status"] for row in result.cases[0]["verdict"]["metrics"] if row["status"]}


def stored(folder):
    return json.loads(next((folder / "baselines").rglob("*.json")).read_text())


GATE = {"*": False, "ttft_p95_s": "30 %", "vllm:generation_tokens_total": "higher 5 %", "vllm:num_preemptions_total": "50 %"}


def test_percentiles_and_counters_gate_by_their_names(run, tmp_path):
    assert run(asked(GATE), *RECORD).statuses == {CASE: "RECORDED"}
    result = run(asked(GATE))
    assert result.statuses == {CASE: "PASS"}, result.stdout
    assert gating(result) == dict.fromkeys([*GATE][1:], "PASS")
    slow = run(asked(GATE), "--llmperf-engine-args=--sim-slow-down 4")
    assert slow.statuses == {CASE: "REGRESSED"}
    assert "ttft_p95_s: " in slow.stdout


def test_a_baseline_grows_by_what_gates_and_by_nothing_else(run, tmp_path):
    run(asked({}), *RECORD)
    plain = stored(tmp_path)["launches"][0]
    run(asked(GATE), *RECORD, "--llmperf-update=replace")
    gated = stored(tmp_path)["launches"][0]
    assert gated["metrics"].keys() - plain["metrics"].keys() == {"ttft_p95_s"}
    added = {"vllm:generation_tokens_total", "vllm:num_preemptions_total"}
    assert gated["rounds"][0]["metrics"].keys() - plain["rounds"][0]["metrics"].keys() == added
    assert gated.keys() == plain.keys()


def test_a_gate_that_the_baseline_does_not_know_says_so(run):
    run(asked({}), *RECORD)
    result = run(asked(GATE))
    assert result.statuses == {CASE: "NOT-COMPARABLE"}
    assert "not measured in the baseline" in result.stdout


def test_the_json_file_has_the_counters_and_no_samples(run):
    launch, *_ = run(asked({}), *RECORD).cases[0]["launches"]
    assert launch["rounds"][0]["counters"]["vllm:generation_tokens_total"] == 120 * 6
    assert not launch["samples"]


@pytest.mark.parametrize(
    ("share", "every", "status"), [(0, 50, "INVALID"), ("10 %", 20, "RECORDED"), (0.1, 20, "RECORDED"), ("10 %", 3, "INVALID")]
)
def test_a_tolerated_share_of_failures_leaves_a_launch_valid(run, share, every, status):
    result = run(TOLERANT.format(share=share), *RECORD, f"--llmperf-engine-args=--sim-fail-every {every}")
    assert result.statuses == {CASE: status}
    assert ("(tolerated)" in result.stdout) == (status == "RECORDED")


def test_tolerated_failures_are_judged_as_the_count_that_they_are(run):
    run(TOLERANT.format(share="30 %"), *RECORD)
    result = run(TOLERANT.format(share="30 %"), "--llmperf-engine-args=--sim-fail-every 5")
    assert result.statuses == {CASE: "REGRESSED"}
    assert gating(result)["failed_requests"] == "REGRESSED"


@pytest.mark.parametrize("share", [-0.1, 1, "200 %", "some", True, None])
def test_a_share_of_failures_that_is_none_is_refused(run, share):
    result = run(TOLERANT.format(share=share), *RECORD)
    assert f"tolerated_failures={share!r}: must be a share between 0 and 1" in result.stdout


def test_an_engine_that_tells_everything_has_no_line_on_audits(run):
    result = run(asked({}), *RECORD)
    assert "audit" not in result.stdout
    assert "audit" not in json.dumps(result.cases)
