"""Load and size: what thousands of baselines cost a run is counted in reads, which no busy machine changes."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
from benchmarks.collection import case_ids, write_baselines

from pytest_llmperf.testing import Example
from tests.baselines import rewrite
from tests.conftest import ENVIRONMENT, QUICK

if TYPE_CHECKING:
    from pathlib import Path

    from tests.faults import Attempts

TEST = """
import pytest

@pytest.mark.parametrize("n", range({}))
def test_x(n, llmperf, baseline):
    assert llmperf(prompt_tokens=16, output_tokens=8, requests=8) == baseline
"""

COUNTER = """
import atexit, collections, json, sys

opened = collections.Counter()

def hear(event, args):
    if event == "open" and "baselines" in str(args[0]) and str(args[0]).endswith(".json"):
        opened[str(args[0]).rpartition("/")[2]] += 1

sys.addaudithook(hear)
atexit.register(lambda: open("opened", "w").write(json.dumps(opened)))
"""


def reads(folder: Path, cases: int, *args: str) -> dict[str, int]:
    """Return how often each baseline was opened by a run on so many cases."""
    files = {"test_it.py": TEST.format(cases), "conftest.py": COUNTER}
    result = Example(files, QUICK, ENVIRONMENT).run(folder, *args, timeout_s=300)
    assert result.returncode == 0, result.stdout
    opened: dict[str, int] = json.loads((folder / "opened").read_text())
    return opened


@pytest.mark.fault("load and size", "thousands of cases with baselines are collected: no baseline is read")
def test_collecting_reads_no_baseline(tmp_path: Path, attempts: Attempts) -> None:
    cases = 5000 if attempts.is_full else 400
    write_baselines(tmp_path, cases)
    for _ in attempts():
        assert reads(tmp_path, cases, "--co", "-q") == {}


@pytest.mark.fault("load and size", "thousands of cases with baselines are announced: only so many are read")
def test_a_header_reads_as_many_as_tell_the_noise(tmp_path: Path, attempts: Attempts) -> None:
    write_baselines(tmp_path, 400)
    for _ in attempts():
        opened = reads(tmp_path, 400, "--co")
        assert sum(opened.values()) == 400 + 300  # the head of each tells what gates it


@pytest.mark.fault("load and size", "a case that is measured reads its baseline once, whatever it takes to decide")
def test_a_measured_case_reads_its_baseline_once(tmp_path: Path, attempts: Attempts) -> None:
    reads(tmp_path, 3, "--update-baselines", "--llmperf-launches=2")
    for _ in attempts():
        opened = reads(tmp_path, 3)
        assert sorted(opened.values()) == [1, 1, 1]


def test_the_self_tests_read_each_baseline_once(tmp_path: Path) -> None:
    reads(tmp_path, 3, "--update-baselines", "--llmperf-launches=2")
    shutil.copytree(tmp_path / "baselines/simulated", tmp_path / "baselines/other")
    for path in (tmp_path / "baselines/other").rglob("*.json"):
        rewrite(path, lambda data: data.update(host="other"))
    opened = reads(tmp_path, 3, "--llmperf-selftest")
    assert [opened[f"test_x-tiny-tp1-c8-{n}.json"] for n in range(3)] == [2, 2, 2], opened  # one for each host


def test_the_ids_of_the_benchmark_are_those_of_its_tests(tmp_path: Path) -> None:
    write_baselines(tmp_path, 2)
    names = {path.stem for path in (tmp_path / "baselines").rglob("*.json")}
    assert names == {case_id.partition("::")[2].replace("[", "-").removesuffix("]") for case_id in case_ids(2)}
