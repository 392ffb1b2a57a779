"""What is said of a case agrees with what came of its test, and with what lies on the disk: terminal, JSON and JUnit."""

from __future__ import annotations

import json
import re

import pytest

from pytest_llmperf.measure.engines.engine import EngineError
from pytest_llmperf.run.pool import EnginePool
from tests.conftest import SERVING

RECORD = ("--update-baselines", "--llmperf-launches=1")
CASE = "test_it.py::test_serving[tiny-tp1-c8]"
FILE = "baselines/simulated/test_it/test_serving-tiny-tp1-c8.json"

SKIPPED = "import pytest\n" + SERVING + "    pytest.skip('behind the comparison')\n"
STRICT = "import pytest\n\n@pytest.mark.xfail(strict=True)" + SERVING
EXPECTED = "import pytest\n\n@pytest.mark.xfail" + SERVING + "    assert False\n"
SOFT = """
import pytest

@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "call":
        report.outcome, report.longrepr = "failed", "a soft assertion"
    return report
"""
SUBTESTS = (
    SERVING.replace("baseline)", "baseline, subtests)")
    + """
    with subtests.test("part"):
        assert False, "a part of it"
"""
)
TEARDOWN = """
import pytest

@pytest.fixture(autouse=True)
def broken():
    yield
    raise RuntimeError("broken")
"""
MEANWHILE = """
import pytest
from pytest_llmperf.run import launches

real = launches.measure_launch

@pytest.fixture(autouse=True)
def second_launch_is_invalid(monkeypatch):
    from dataclasses import replace
    def measure(engine, client, workload, settings, progress):
        launch = real(engine, client, workload, settings, progress)
        count.append(launch)
        return replace(launch, invalid=("1 of 8 requests failed",)) if len(count) == 2 else launch
    monkeypatch.setattr(launches, "measure_launch", measure)

count = []
"""


@pytest.mark.parametrize(
    ("files", "outcomes"),
    [
        ({"test_it.py": SERVING + "    assert False\n"}, {"failed": 1}),
        ({"test_it.py": SKIPPED}, {"skipped": 1}),
        ({"test_it.py": STRICT}, {"failed": 1}),
        ({"test_it.py": EXPECTED}, {}),
        ({"test_it.py": SERVING, "conftest.py": SOFT}, {"failed": 1}),
    ],
    ids=["failed", "skipped", "should have failed", "failed as expected", "softly failed"],
)
def test_a_test_that_does_not_pass_records_nothing(run, tmp_path, files, outcomes):
    result = run(files, *RECORD, "--junitxml=junit.xml")
    assert result.outcomes == outcomes
    assert result.statuses == {CASE: "MEASURED"}
    assert "RECORDED" not in result.stdout
    assert "0 compared, 1 not compared (1 MEASURED)" in result.stdout
    assert result.cases[0]["notes"][0] == "not recorded, because the test failed or was skipped"
    assert not (tmp_path / FILE).exists()
    assert (tmp_path / "junit.xml").read_text().count('name="llmperf.ttft_p50_s"') == 1


@pytest.mark.skipif(not hasattr(pytest, "Subtests"), reason="this pytest has no subtests")
def test_a_test_with_a_subtest_that_failed_records_nothing(run, tmp_path):
    result = run(SUBTESTS, *RECORD)
    assert result.returncode == 1
    assert result.statuses == {CASE: "MEASURED"}, result.stdout
    assert result.cases[0]["notes"][0] == "not recorded, because the test failed or was skipped"
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize("mark", ["", "@pytest.mark.xfail"])
def test_a_baseline_that_cannot_be_written_fails_its_test(run, tmp_path, mark):
    (tmp_path / FILE).parent.mkdir(parents=True)
    (tmp_path / FILE).with_name(f".{FILE.rpartition('/')[2]}.llmperf-new").mkdir()
    result = run("import pytest\n" + mark + SERVING, *RECORD)
    assert result.outcomes == {"failed": 1}, result.stdout
    assert result.statuses == {CASE: "MEASURED"}
    assert "cannot be written" in result.stdout
    assert "fault of pytest-llmperf" not in result.stdout
    assert not (tmp_path / FILE).exists()


def test_an_engine_that_does_not_stop_is_no_expected_failure(run, monkeypatch):
    real = EnginePool.close

    def close(pool):
        real(pool)
        raise EngineError("it would not stop")

    monkeypatch.setattr(EnginePool, "close", close)
    result = run("import pytest\n\n@pytest.mark.xfail" + SERVING + "    assert False\n", *RECORD)
    assert result.outcomes.get("error") == 1, result.stdout
    assert result.returncode == 1


def test_a_teardown_that_fails_comes_behind_the_recording(run, tmp_path):
    result = run({"test_it.py": SERVING, "conftest.py": TEARDOWN}, *RECORD)
    assert result.outcomes == {"passed": 1, "error": 1}
    assert result.statuses == {CASE: "RECORDED"}
    assert (tmp_path / FILE).exists()


def test_a_run_interrupted_behind_a_comparison_has_recorded_nothing(run, tmp_path):
    result = run(SERVING + "    raise KeyboardInterrupt\n", *RECORD)
    assert result.returncode == 2
    assert result.statuses == {CASE: "MEASURED"}
    assert "0 compared, 1 not compared (1 MEASURED)" in result.stdout
    assert result.cases[0]["notes"][0] == "not recorded, because the run ended before its test did"
    assert not (tmp_path / FILE).exists()


def test_an_invalid_launch_behind_an_undecided_one_is_invalid(run):
    run(SERVING, "--update-baselines", "--llmperf-launches=2")
    result = run({"test_it.py": SERVING, "conftest.py": MEANWHILE}, "--llmperf-tolerance=5%")
    assert result.outcomes == {"failed": 1}
    assert result.statuses == {CASE: "INVALID"}
    assert result.cases[0]["verdict"]["reasons"] == ["1 of 8 requests failed"]
    assert "0 compared, 1 not compared (1 INVALID)" in result.stdout
    assert "INCONCLUSIVE" not in result.stdout


# ------------------------------------------------------------------------------------------------ moved, linked


def test_a_baseline_moved_with_its_renamed_test_is_compared_with(run, tmp_path):
    run(SERVING, "--update-baselines", "--llmperf-launches=2")
    renamed = SERVING.replace("test_serving", "test_chat")
    (tmp_path / FILE).rename(moved := tmp_path / FILE.replace("serving", "chat"))
    result = run(renamed, "-v", "--llmperf-tolerance=90%")
    case = "test_it.py::test_chat[tiny-tp1-c8]"
    assert result.statuses == {case: "PASS"}, result.stdout
    assert result.cases[0]["notes"][0] == f"the baseline was recorded as {CASE}"
    assert "baselines: 1 found, 0 new" in result.stdout
    assert run(renamed, "--llmperf-selftest").returncode == 0
    result = run(renamed, *RECORD)
    assert "extended by 1 launch of the same version to 3, from 2 runs" in result.stdout
    assert f"the baseline was recorded as {CASE}" in result.stdout
    assert "unused baseline" not in result.stdout
    assert json.loads(moved.read_text())["case"] == case


def test_a_moved_baseline_is_unused_when_its_places_test_is_gone(run, tmp_path):
    run(SERVING, *RECORD)
    (tmp_path / FILE).rename(tmp_path / FILE.replace("serving", "gone"))
    result = run(SERVING.replace("serving", "other"), *RECORD)
    assert f"unused baseline: {FILE.replace('serving', 'gone')} (its test is gone; delete the file)" in result.stdout


def test_a_linked_baseline_stays_a_link(run, tmp_path):
    run(SERVING, *RECORD)
    (tmp_path / FILE).rename(tmp_path / "target.json")
    (tmp_path / FILE).symlink_to(tmp_path / "target.json")
    assert run(SERVING, *RECORD).statuses == {CASE: "RECORDED"}
    assert (tmp_path / FILE).is_symlink()
    assert len(json.loads((tmp_path / "target.json").read_text())["launches"]) == 2
    (tmp_path / "target.json").unlink()
    result = run(SERVING)
    assert result.statuses == {CASE: "NO-BASELINE"}
    assert "baselines: 0 found, 1 new" in result.stdout
    assert run(SERVING, *RECORD).statuses == {CASE: "RECORDED"}
    assert (tmp_path / FILE).is_symlink()
    assert (tmp_path / "target.json").is_file()


def test_a_linked_folder_is_written_into(run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "baselines").symlink_to("elsewhere")
    assert run(SERVING, *RECORD).statuses == {CASE: "RECORDED"}
    assert (tmp_path / "elsewhere" / FILE.partition("/")[2]).is_file()
    assert (tmp_path / "baselines").is_symlink()


def test_a_folder_whose_name_is_no_text_has_baselines(run, tmp_path):
    source, uncached = {"d\udcff/test_it.py": SERVING}, ("-p", "no:cacheprovider")  # which cannot write such a name
    run(source, *uncached, *RECORD)
    result = run(source, *uncached, "--llmperf-tolerance=90%", "--llmperf-max-launches=2")
    assert set(result.statuses) == {f"d\\udcff/{CASE}"}
    assert re.search(r"1 compared \(1 \w+\), 0 not compared", result.stdout), result.stdout


@pytest.mark.parametrize(
    "how", [(), ("--llmperf-selftest",), ("--llmperf-calibrate=2",)], ids=["compared", "selftest", "calibrated"]
)
def test_an_unusable_file_fails_no_other_test(run, tmp_path, how):
    both = SERVING + SERVING.replace("test_serving", "test_other")
    run(both, "--update-baselines", "--llmperf-launches=2", "--llmperf-tolerance=90%")
    (tmp_path / FILE).write_text("{}")
    result = run(both, "--llmperf-tolerance=90%", *how)
    assert result.outcomes == {"failed": 1, "passed": 1}, result.stdout
    assert f"{tmp_path / FILE}: not a baseline" in result.stdout
