"""Baselines that are no evidence: edited by hand, another host's, or too noisy to find anything."""

from __future__ import annotations

import json

import pytest

from pytest_llmperf.run.recording import settle
from tests.baseline_writers import recorded, rules_for
from tests.baselines import as_version_2, rewrite
from tests.conftest import SERVING

RECORD = ("--update-baselines", "--llmperf-launches=3")
FILE = "baselines/simulated/test_it/test_serving-tiny-tp1-c8.json"
EDITED = "the baseline was edited by hand, or mixed of two by a merge: its checksum does not fit what it holds"


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def slow_down(data):
    for launch in data["launches"]:
        for one in launch["rounds"]:
            one["metrics"]["tpot_p50_s"] *= 1.5


@pytest.fixture
def edited(run, tmp_path):
    run(SERVING, *RECORD)
    edit(tmp_path / FILE, slow_down)
    return tmp_path / FILE


def test_an_edited_baseline_fails_its_test_before_an_engine_starts(run, edited):
    result = run(SERVING)
    assert set(result.statuses.values()) == {"NOT-COMPARABLE"}
    assert result.engine_starts == 0
    assert f"{FILE}: {EDITED}" in result.stdout
    assert "restore the file from version control, or record it anew with --update-baselines" in result.stdout


def test_an_edited_baseline_is_replaced_and_never_extended(run, edited):
    result = run(SERVING, *RECORD)
    assert f"3 launches in place of 3, which were of another version: {FILE}: {EDITED}" in result.stdout
    assert set(run(SERVING).statuses.values()) == {"PASS"}


@pytest.mark.parametrize("sound", [True, False])
def test_a_baseline_of_another_kind_is_kept_where_it_is_sound(tmp_path, sound):
    rules, case_id = rules_for(tmp_path, "job", kind="server"), "test_it.py::test_x"
    settle([recorded(rules, case_id)], passed=True)
    (rewrite if sound else edit)(rules.path(case_id), lambda data: data["provenance"]["engine"].update(kind="offline"))
    settle([recorded(rules, case_id)], passed=True)
    names = sorted(path.name for path in tmp_path.rglob("*.json"))
    assert "test_x.json" in names
    assert len(names) == (2 if sound else 1)


def test_an_edited_baseline_is_not_calibrated(run, edited):
    result = run(SERVING, "--llmperf-calibrate=2")
    assert result.outcomes == {"failed": 1}
    assert EDITED in result.stdout


def test_an_edited_baseline_fails_the_self_test(run, edited):
    result = run(SERVING, "--llmperf-selftest")
    assert result.outcomes == {"failed": 1}
    assert f"{FILE}: {EDITED}" in result.stdout


TWICE = """
def test_serving(llmperf, baseline):
    for requests in (8, 10):
        assert llmperf(prompt_tokens=16, output_tokens=6, requests=requests) == baseline
"""


def test_an_edited_baseline_that_no_call_uses_any_more_blocks_nothing(run, tmp_path):
    run(TWICE, *RECORD)
    (second,) = (path for path in (tmp_path / FILE).parent.glob("*.json") if path != tmp_path / FILE)
    edit(second, slow_down)
    name = second.relative_to(tmp_path).as_posix()
    assert set(run(SERVING).statuses.values()) == {"PASS"}
    twice = run(TWICE)
    assert list(twice.statuses.values()) == ["PASS", "NOT-COMPARABLE"]
    assert f"{name}: {EDITED}" in twice.stdout
    assert f"unused baseline: {name} (its test was recorded without it; delete the file)" in run(SERVING, *RECORD).stdout
    assert set(run(SERVING).statuses.values()) == {"PASS"}
    assert "unused baseline" not in run(TWICE, *RECORD).stdout
    assert list(run(TWICE).statuses.values()) == ["PASS", "PASS"]


def test_an_edited_baseline_of_a_degree_is_named_before_an_engine_starts(run, tmp_path):
    sweep = """
import pytest

@pytest.mark.llmperf(tp=[1, 2])
def test_serving(llmperf_sweep, baseline):
    assert llmperf_sweep(prompt_tokens=16, output_tokens=6, requests=8) == baseline
"""
    run(sweep, *RECORD, LLMPERF_SIMULATED_GPUS="2")
    degree = next(path for path in (tmp_path / "baselines").rglob("*.json") if "tp2" in path.name)
    edit(degree, slow_down)
    result = run(sweep, LLMPERF_SIMULATED_GPUS="2")
    assert result.engine_starts == 0
    assert f"{degree.relative_to(tmp_path).as_posix()}: {EDITED}" in result.stdout


def test_a_baseline_of_another_host_is_named_with_both(run, tmp_path):
    run(SERVING, *RECORD)
    rewrite(tmp_path / FILE, lambda data: data.update(host="nvidia-h200"))
    result = run(SERVING)
    assert set(result.statuses.values()) == {"NOT-COMPARABLE"}
    assert "the baseline is another host's: recorded on 'nvidia-h200', and not on 'simulated'" in result.stdout


def test_a_baseline_of_a_format_without_a_checksum_is_believed_and_told(run, tmp_path):
    run(SERVING, *RECORD)
    older = "the baseline is of format 2, which has no checksum: record it anew (1 case)"
    assert older not in run(SERVING).stdout
    as_version_2(tmp_path / FILE)
    result = run(SERVING)
    assert set(result.statuses.values()) == {"PASS"}
    assert older in result.stdout
    run(SERVING, *RECORD)
    assert older not in run(SERVING).stdout


def test_a_baseline_that_can_find_nothing_is_told(run, tmp_path):
    run(SERVING, *RECORD)

    def scatter(data):
        for factor, launch in zip((0.1, 1, 10), data["launches"], strict=True):
            for one in launch["rounds"]:
                one["metrics"]["ttft_p50_s"] *= factor

    rewrite(tmp_path / FILE, scatter)
    result = run(SERVING, "--llmperf-max-launches=2")
    assert set(result.statuses.values()) == {"INCONCLUSIVE"}
    assert result.outcomes == {"passed": 1}
    assert "  this baseline cannot find 60 %: no less than " in result.stdout
    red = run(SERVING, "--llmperf-max-launches=2", "--llmperf-inconclusive=fail")
    assert red.outcomes == {"failed": 1}
    assert "this baseline cannot find 60 %" in red.stdout
