"""Baselines that are no evidence: edited by hand, another host's, or too noisy to find anything."""

from __future__ import annotations

import json

import pytest

from tests.baselines import rewrite
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
    assert EDITED in result.stdout
    assert "restore the file from version control, or record it anew with --update-baselines" in result.stdout


def test_an_edited_baseline_is_replaced_and_never_extended(run, edited):
    result = run(SERVING, *RECORD)
    assert f"3 launches in place of 3, which were of another version: {EDITED}" in result.stdout
    assert set(run(SERVING).statuses.values()) == {"PASS"}


def test_an_edited_baseline_is_not_calibrated(run, edited):
    result = run(SERVING, "--llmperf-calibrate=2")
    assert result.outcomes == {"failed": 1}
    assert EDITED in result.stdout


def test_an_edited_baseline_fails_the_self_test(run, edited):
    result = run(SERVING, "--llmperf-selftest")
    assert result.outcomes == {"failed": 1}
    assert EDITED in result.stdout


def test_a_baseline_of_another_host_is_named_with_both(run, tmp_path):
    run(SERVING, *RECORD)
    rewrite(tmp_path / FILE, lambda data: data.update(host="nvidia-h200"))
    result = run(SERVING)
    assert set(result.statuses.values()) == {"NOT-COMPARABLE"}
    assert "the baseline is another host's: recorded on 'nvidia-h200', and not on 'simulated'" in result.stdout


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
