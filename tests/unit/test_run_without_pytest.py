"""A run on the simulated engine that no pytest drives: recorded, compared, undecided, launched again, judged."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING
from unittest import mock

from pytest_llmperf.judge.verdict import Status
from pytest_llmperf.plan.engine import parse_engine_args
from tests.whole_run import whole_run

if TYPE_CHECKING:
    from pathlib import Path


virtual = mock.patch.dict(os.environ, LLMPERF_SIMULATED_CLOCK="virtual")  # nothing waits, nothing varies


def engine(args: str) -> dict[str, object]:
    return {"engine_args": parse_engine_args(args, origin="test")}


@virtual
def test_a_run_records_compares_and_judges(tmp_path: Path) -> None:
    recorded, lines = whole_run(tmp_path, update="all")
    assert recorded.status is Status.RECORDED
    assert sum(": starting" in line for line in lines) == 3
    again, lines = whole_run(tmp_path)
    assert again.status is Status.PASS
    slow, lines = whole_run(tmp_path, **engine("--sim-slow-down 1.5"))
    assert slow.status is Status.REGRESSED
    # One launch never fails a test: the first is undecided, and another one is asked for.
    assert slow.verdict.launches == sum(": starting" in line for line in lines) >= 2
    assert "changed since the baseline: engine argument --sim-slow-down: not set -> 1.5" in slow.notes


@virtual
def test_a_case_without_a_baseline_says_how_to_record_it(tmp_path: Path) -> None:
    outcome, _ = whole_run(tmp_path)
    assert outcome.status is Status.NO_BASELINE
    assert outcome.notes[1] == "record it with: pytest --update-baselines 'test_it.py::test_x[tiny-tp1-c4]'"


def test_the_run_imports_no_pytest() -> None:
    code = (
        "import importlib, pkgutil, sys, pytest_llmperf.run as run\n"
        "for found in pkgutil.iter_modules(run.__path__, run.__name__ + '.'): importlib.import_module(found.name)\n"
        "sys.exit('pytest' in sys.modules or '_pytest' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
