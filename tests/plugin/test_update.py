"""--update-baselines on a baseline that exists: extend it or replace it, the review of what changes, and calibration."""

from __future__ import annotations

import json
import re

from pytest_llmperf.measure.metrics import METRICS
from tests.baselines import rewrite
from tests.conftest import SERVING

RECORD = ("--update-baselines", "--llmperf-launches=2", "--llmperf-tolerance=90%")
FILE = "baselines/simulated/test_it/test_serving-tiny-tp1-c8.json"
CASE = "test_it.py::test_serving[tiny-tp1-c8]"


def stored(tmp_path):
    return json.loads((tmp_path / FILE).read_text())


def test_a_baseline_of_the_same_version_is_extended(run, tmp_path):
    run(SERVING, *RECORD)
    before = stored(tmp_path)["launches"]
    result = run(SERVING, *RECORD)
    assert f"recorded {FILE}: extended by 2 launches of the same version to 4, from 2 runs" in result.stdout
    after = stored(tmp_path)["launches"]
    assert after[:2] == before
    assert len({launch["job"] for launch in after}) == 2


def test_another_version_replaces_the_baseline_and_says_what_differs(run, tmp_path):
    run(SERVING, *RECORD)
    result = run(SERVING, *RECORD, "--llmperf-engine-args=--max-num-seqs 64")
    assert "2 launches in place of 2, which were of another version: engine argument --max-num-seqs" in result.stdout
    assert len(stored(tmp_path)["launches"]) == 2


def test_launches_that_disagree_with_the_stored_ones_replace_them(run, tmp_path):
    run(SERVING, *RECORD)

    def quicken(data):
        for launch in data["launches"]:
            for one in launch["rounds"]:
                one["metrics"]["tpot_p50_s"] /= 10

    rewrite(tmp_path / FILE, quicken)
    result = run(SERVING, *RECORD)
    assert re.search(r"of another version: tpot_p50_s: .* as much", result.stdout), result.stdout
    assert len(stored(tmp_path)["launches"]) == 2


def test_replace_always_replaces(run, tmp_path):
    run(SERVING, *RECORD)
    result = run(SERVING, *RECORD, "--llmperf-update=replace")
    assert "2 launches in place of 2, as --llmperf-update=replace says" in result.stdout
    assert len(stored(tmp_path)["launches"]) == 2


def test_the_review_shows_old_new_and_change_of_every_metric(run):
    run(SERVING, *RECORD)
    result = run(SERVING, *RECORD, "--llmperf-engine-args=--sim-slow-down 4")
    lines = result.stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if re.match(r"metric +old +new +change", line))
    review = {line.split()[0]: line for line in lines[start + 2 : start + 2 + len(METRICS)] if line}
    assert {row["metric"] for row in result.cases[0]["verdict"]["metrics"] if row["measured"] is not None} <= review.keys()
    assert re.search(r"tokens/s .* tokens/s +\d+\.\d% worse", review["output_tokens_per_s"])


def test_an_invalid_launch_is_refused_and_the_stored_baseline_stays(run, tmp_path):
    run(SERVING, *RECORD)
    before = (tmp_path / FILE).read_bytes()
    for flags in (RECORD, ("--llmperf-calibrate=2",)):
        result = run(SERVING, *flags, "--llmperf-engine-args=--sim-fail-every 7")
        assert result.returncode == 1
        assert result.statuses == {CASE: "INVALID"}
        assert (tmp_path / FILE).read_bytes() == before


def test_a_calibration_stores_the_parts_of_the_noise_and_proposes_tolerances(run, tmp_path):
    noisy = "--llmperf-engine-args=--sim-launch-cv .05 --sim-round-cv .02 --sim-launch-file launches"
    run(SERVING, *RECORD, noisy)
    for _ in range(2):
        result = run(SERVING, "--llmperf-calibrate=2", noisy, "--llmperf-tolerance=90%")
        assert result.statuses == {CASE: "RECORDED"}, result.stdout
    assert "to gate by what can be found: @pytest.mark.llmperf(gate={'output_tokens_per_s': '" in result.stdout
    data = stored(tmp_path)
    assert len(data["launches"]) == 6
    noise = data["noise"]["output_tokens_per_s"]
    assert (noise["launches"], noise["jobs"]) == (6, 3)
    assert noise["job_sd"] is not None  # three jobs tell
    assert noise["round_sd"] > 0
    assert 0 < noise["detectable"] <= noise["proposed_tolerance"] < noise["detectable"] + 0.01 + 1e-9
    assert set(data["noise"]) == {"output_tokens_per_s", "ttft_p50_s", "tpot_p50_s", "e2e_p50_s", "kv_cache_tokens",
        "gpu_memory_peak_bytes",
    }  # fmt: skip


def test_a_calibration_of_something_else_fails_and_moves_nothing(run, tmp_path):
    run(SERVING, *RECORD)
    before = (tmp_path / FILE).read_bytes()
    result = run(SERVING, "--llmperf-calibrate=2", "--llmperf-engine-args=--max-num-seqs 64")
    assert result.returncode == 1
    assert "this is not what the stored baseline was recorded of" in result.stdout
    assert "Accept it first with --update-baselines" in result.stdout
    assert (tmp_path / FILE).read_bytes() == before
