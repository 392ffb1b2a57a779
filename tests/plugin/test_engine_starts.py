"""How often engines are started: once per spec, and once more for each launch of the most undecided case."""

from __future__ import annotations

import pytest

from tests.conftest import SERVING

TWELVE = """
import pytest

@pytest.mark.parametrize("n", range(4))
@pytest.mark.llmperf(tp=[1, 2, 4])
def test_many(llmperf, n):
    assert llmperf(prompt_tokens=8, output_tokens=4, requests=8).preemptions == 0
"""


def test_twelve_tests_over_three_specs_start_three_engines(run):
    result = run(TWELVE)
    assert result.outcomes == {"passed": 12}, result.stdout
    assert result.engine_starts == 3


def test_all_tests_of_an_engine_share_its_recorded_launches(run):
    both = SERVING + SERVING.replace("test_serving", "test_other")
    result = run(both, "--update-baselines", "--llmperf-launches=3")
    assert result.outcomes == {"passed": 2}
    assert result.engine_starts == 3


def test_undecided_cases_share_a_start_and_decided_ones_rest(run):
    three = """
def test_a(llmperf, baseline):
    assert llmperf(prompt_tokens=8, output_tokens=4, requests=8) == baseline

def test_b(llmperf, baseline):
    assert llmperf(prompt_tokens=8, output_tokens=4, requests=8) == baseline

def test_decided(llmperf):
    assert llmperf(prompt_tokens=8, output_tokens=4, requests=8).failed_requests == 0
"""
    run(three, "--update-baselines", "--llmperf-launches=2")
    result = run(three, "--llmperf-tolerance=0.01%", "--llmperf-max-launches=4")
    launches = {case["nodeid"].partition("::")[2]: len(case["launches"]) for case in result.cases}
    assert launches == {"test_a[tiny-tp1-c8]": 4, "test_b[tiny-tp1-c8]": 4, "test_decided[tiny-tp1-c8]": 1}
    assert result.engine_starts == 4
    assert result.outcomes == {"passed": 3}  # each is reported once


def test_fixtures_of_an_undecided_test_are_renewed_for_each_launch(run):
    source = """
import pytest

@pytest.fixture
def resource():
    print("RESOURCE up")
    yield
    print("RESOURCE down")

def test_a(llmperf, baseline, resource):
    assert llmperf(prompt_tokens=8, output_tokens=4, requests=8) == baseline
"""
    result = run(source, "--update-baselines", "--llmperf-launches=3", "-s")
    assert result.outcomes == {"passed": 1}
    assert result.stdout.count("RESOURCE up") == result.stdout.count("RESOURCE down") == 3


def test_undecided_tests_of_several_files_and_classes_wait_for_each_other(run):
    files = {
        "test_one.py": SERVING,
        "sub/test_two.py": SERVING,
        "test_three.py": "".join(
            f"class Test{name}:\n    def test_it(self, llmperf, baseline):\n        assert llmperf(requests=8) == baseline\n\n"
            for name in "AB"
        ),
    }
    result = run(files, "--update-baselines", "--llmperf-launches=2", "--llmperf-rounds=1")
    assert result.outcomes == {"passed": 4}, result.stdout
    assert result.engine_starts == 2


def test_session_fixtures_live_through_all_launches_and_tmp_path_works(run):
    source = """
import pytest

@pytest.fixture(scope="session")
def costly():
    print("COSTLY up")
    yield
    print("COSTLY down")

def test_a(llmperf, baseline, costly, tmp_path):
    assert llmperf(prompt_tokens=8, output_tokens=4, requests=8) == baseline

def test_b(llmperf, baseline, costly, tmp_path):
    assert llmperf(prompt_tokens=8, output_tokens=4, requests=8) == baseline
"""
    result = run(source, "--update-baselines", "--llmperf-launches=3", "-s")
    assert result.outcomes == {"passed": 2}, result.stdout
    assert result.stdout.count("COSTLY up") == result.stdout.count("COSTLY down") == 1


BROKEN = """
import pytest

@pytest.fixture
def broken():
    yield
    raise RuntimeError("broken teardown")

def test_a(llmperf, baseline, broken):
    assert llmperf(prompt_tokens=8, output_tokens=4, requests=8) == baseline
"""


@pytest.mark.parametrize("files", [BROKEN + SERVING, {"test_a.py": BROKEN, "test_b.py": SERVING}], ids=["one", "two"])
def test_a_failing_teardown_between_launches_leaves_other_tests_alone(run, files):
    result = run(files, "--update-baselines", "--llmperf-launches=2", "--llmperf-rounds=1")
    assert result.outcomes == {"passed": 1, "error": 1}, result.stdout
    assert "broken teardown" in result.stdout


def test_other_tests_run_once_and_first(run):
    result = run(SERVING + "\ndef test_plain():\n    pass\n", "--update-baselines", "--llmperf-launches=1", "-v")
    assert result.outcomes == {"passed": 2}
    assert result.stdout.index("test_plain PASSED") < result.stdout.index("engine 1")
