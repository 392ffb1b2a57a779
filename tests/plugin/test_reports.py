"""What a run leaves for people and machines: summary, progress, JSON, JUnit."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

from tests.conftest import SERVING

RECORD = ("--update-baselines", "--llmperf-launches=2")


def test_the_json_file_has_every_raw_sample(run, tmp_path):
    run(SERVING, *RECORD)
    document = json.loads((tmp_path / "llmperf.json").read_text())
    assert document["version"] == 1
    [case] = document["cases"]
    assert case["id"] == case["nodeid"] == "test_it.py::test_serving[tiny-tp1-c8]"
    assert case["status"] == "RECORDED"
    assert [len(launch["rounds"]) for launch in case["launches"]] == [2, 2]
    metrics = {**case["launches"][0]["rounds"][0]["metrics"], **case["launches"][0]["metrics"]}
    for name in ("ttft_mean_s", "ttft_p50_s", "tpot_p50_s", "e2e_mean_s", "e2e_p99_s", "output_tokens_per_s"):
        assert metrics[name] > 0
    assert metrics["failed_requests"] == 0


def test_metrics_are_junit_properties(run, tmp_path):
    run(SERVING, *RECORD, "--junitxml=junit.xml")
    properties = ET.parse(tmp_path / "junit.xml").getroot().iter("property")
    values = {one.get("name"): float(one.get("value") or "nan") for one in properties}
    assert values["llmperf.output_tokens_per_s"] > 0
    assert values["llmperf.preemptions"] == 0


def test_the_summary_has_a_line_per_case_and_counts(run):
    result = run(SERVING, *RECORD)
    assert "0 compared, 1 not compared (1 RECORDED)" in result.stdout
    assert "case                                   output tok/s    TTFT p50" in result.stdout


def test_progress_is_plain_lines_without_a_terminal_and_absent_with_q(run):
    assert "llmperf: engine 1 (tiny tp1): ready after" in run(SERVING, *RECORD).stdout
    assert "llmperf: engine" not in run(SERVING, *RECORD, "-q").stdout


def test_it_works_without_the_terminal_plugin_and_without_junit(run, tmp_path):
    result = run(SERVING, *RECORD, "-p", "no:terminal", "-p", "no:junitxml")
    assert result.returncode == 0
    assert result.stdout == ""
    assert result.statuses == {"test_it.py::test_serving[tiny-tp1-c8]": "RECORDED"}


def test_a_run_without_llmperf_tests_says_nothing(run):
    result = run("def test_x():\n    pass\n")
    assert "llmperf:" not in result.stdout
    assert "= llmperf =" not in result.stdout
