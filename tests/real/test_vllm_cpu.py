"""The main job on real vLLM engines: the bundled model on vLLM's CPU build."""

from __future__ import annotations

import json
import os
import re
import statistics
from typing import TYPE_CHECKING

import pytest

from pytest_llmperf.testing import Example
from tests.real.conftest import ASKING, ENGINE

if TYPE_CHECKING:
    from pathlib import Path

TIMEOUT_S = 420
# Two shared cores are noisy; what is tested here is that real engines are driven and judged, not how small a change is seen.
NOISY = (*ENGINE, "--llmperf-tolerance=80%", "--llmperf-rounds=2", "--llmperf-max-launches=4")
SERVING = """
def test_serving(llmperf, baseline):
    measured = llmperf(prompt_tokens=100, output_tokens=16, requests=24)
    assert measured == baseline
"""
CASE = "test_it.py::test_serving[tiny-tp1-c8]"


def test_serving_one_request_at_a_time_fails_after_record_and_pass(tmp_path: Path):
    project = Example({"test_it.py": SERVING}, NOISY)
    recorded = project.run(tmp_path, "--update-baselines", "--llmperf-launches=2", timeout_s=TIMEOUT_S)
    assert recorded.statuses == {CASE: "RECORDED"}, recorded.stdout
    assert recorded.engine_starts == 2
    [file] = (tmp_path / "baselines").rglob("*.json")
    stored = json.loads(file.read_text())
    assert stored["provenance"]["versions"]["vllm"]
    assert stored["launches"][0]["metrics"]["kv_cache_tokens"] == 512 * 128

    passed = project.run(tmp_path, timeout_s=TIMEOUT_S)
    assert passed.outcomes == {"passed": 1}, passed.stdout
    assert passed.statuses[CASE] in ("PASS", "IMPROVED", "INCONCLUSIVE")  # the last where this host is too unsteady to tell

    slow = project.run(tmp_path, "--llmperf-engine-args=--max-num-seqs 1", timeout_s=TIMEOUT_S)
    assert slow.outcomes == {"failed": 1}, slow.stdout
    assert slow.statuses == {CASE: "REGRESSED"}
    assert len(slow.cases[0]["launches"]) >= 2  # never red by one
    assert "changed since the baseline: engine argument --max-num-seqs: not set -> 1" in slow.stdout


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="TP 2 on CPU needs two cores")
def test_tp_2_on_cpu_runs_two_ranks(tmp_path: Path):
    source = """
import re

def test_ranks(llm_engine, llmperf):
    measured = llmperf(prompt_tokens=100, output_tokens=20, requests=8)
    ranks = set(re.findall(r"Worker_TP(\\d+) pid=", llm_engine.log_path.read_text()))
    assert ranks == {"0", "1"}
    assert measured["output_tokens_per_s"] > 0
"""
    result = Example({"test_it.py": source}, NOISY).run(tmp_path, "--llmperf-tp=2", timeout_s=TIMEOUT_S)
    assert result.outcomes == {"passed": 1}, result.stdout


def test_too_many_ranks_skip_with_the_numbers_and_fail_under_require_gpus(tmp_path: Path):
    project = Example({"test_it.py": SERVING}, ENGINE)
    cores = len(os.sched_getaffinity(0))
    skipped = project.run(tmp_path, f"--llmperf-tp={cores + 62}", "-rs")
    assert skipped.outcomes == {"skipped": 1}
    assert f"needs {cores + 62} GPUs" in skipped.stdout
    assert f"this host has {cores}" in re.sub(r"\s+", " ", skipped.stdout)
    red = project.run(tmp_path, f"--llmperf-tp={cores + 62}", "--llmperf-require-gpus")
    assert red.returncode == 1


def test_half_the_kv_cache_fails_by_its_preemptions(tmp_path: Path):
    """40 blocks of 128 tokens hold every prompt of 28 requests at once, but not their 200 output tokens."""
    source = """
import pytest

@pytest.mark.llmperf(concurrency=28)
def test_preemptions(llmperf, baseline):
    measured = llmperf(prompt_tokens=100, output_tokens=200, requests=28)
    assert measured == baseline
"""
    project = Example({"test_it.py": source}, NOISY)
    recorded = project.run(
        tmp_path, "--llmperf-engine-args=--num-gpu-blocks-override 40", "--update-baselines", "--llmperf-launches=2",
        timeout_s=TIMEOUT_S,
    )  # fmt: skip
    assert recorded.outcomes == {"passed": 1}, recorded.stdout
    [file] = (tmp_path / "baselines").rglob("*.json")
    rounds = [one["metrics"]["preemptions"] for launch in json.loads(file.read_text())["launches"] for one in launch["rounds"]]
    # 15 where all requests are there before the first step; when they arrive decides on one or two more.
    stored = statistics.median(rounds)
    assert stored == pytest.approx(15, abs=3), rounds

    halved = project.run(tmp_path, "--llmperf-engine-args=--num-gpu-blocks-override 20", timeout_s=TIMEOUT_S)
    assert halved.outcomes == {"failed": 1}, halved.stdout
    [case] = halved.cases
    assert case["status"] == "REGRESSED"
    rows = {row["metric"]: row for row in case["verdict"]["metrics"]}
    assert rows["kv_cache_tokens"]["status"] == "REGRESSED"  # exact: two launches are enough
    # A count that differs between launches needs more than the two which the exact metric took to end the case.
    assert rows["preemptions"]["status"] in ("REGRESSED", "UNDECIDED")
    assert rows["preemptions"]["baseline"] == stored
    assert rows["preemptions"]["measured"] > 1.5 * stored
    assert "--num-gpu-blocks-override (now 20): raise it" in halved.stdout


@pytest.mark.fault("no stranger", "somebody without the key asks a real engine")
def test_a_server_against_the_engine_alone(tmp_path: Path):
    source = (
        ASKING
        + """
import pytest

def test_online_and_offline(llmperf, llm_engine):
    check_key(llm_engine)
    load = dict(prompt_tokens=32, output_tokens=16, requests=24)
    classes = {"short": {"share": 2, "prompt_tokens": 16}, "long": {"share": 1, "prompt_tokens": 200}}
    chat = llmperf(**load, api="chat", extra_body={"temperature": 0.5})
    mixed = llmperf(**load | {"classes": classes}, slo={"e2e_s": 60.0})
    online = llmperf(**load)
    offline = llmperf(**load, engine="offline")
    assert chat["failed_requests"] == 0
    assert mixed["goodput_ratio"] == 1
    assert mixed["long/ttft_p50_s"] > 0
    for measured in (online, offline):
        assert measured["preemptions"] == measured["failed_requests"] == 0
        assert measured["kv_cache_tokens"] == 512 * 128
        assert measured["ttft_p50_s"] > measured["itl_p50_s"] > 0
    assert online.limited_by(offline).partition(":")[0] in ("client", "front end", "engine")

@pytest.mark.llmperf(engine="offline")
def test_marked(llmperf, llm_engine):  # the engine that the other test has left
    check_key(llm_engine)
    llmperf(prompt_tokens=32, output_tokens=4, requests=8)
"""
    )
    result = Example({"test_it.py": source}, NOISY).run(tmp_path, timeout_s=TIMEOUT_S)
    assert result.outcomes == {"passed": 2}, result.stdout
    assert [case["engine"]["kind"] for case in result.cases] == ["server", "server", "server", "offline", "offline"]
    assert result.engine_starts == 2


def test_preemptions_are_counted_by_the_engine_alone_too(tmp_path: Path):
    source = """
import pytest

@pytest.mark.llmperf(concurrency=32, engine_args="--num-gpu-blocks-override 24")
def test_preempted(llmperf):
    llmperf(prompt_tokens=100, output_tokens=200, requests=32)
"""
    result = Example({"test_it.py": source}, (*NOISY, "--llmperf-engine=offline")).run(tmp_path, timeout_s=TIMEOUT_S)
    assert result.outcomes == {"passed": 1}, result.stdout
    counts = [one["metrics"]["preemptions"] for one in result.cases[0]["launches"][0]["rounds"]]
    # All requests are there before the first step, so that nothing is left to chance.
    assert len(set(counts)) == 1, counts
    assert counts[0] > 10
