"""The demo of the README: what it sizes, and a run of it where there is no vLLM."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("demo", ROOT / "examples/quickstart/demo.py")
assert spec is not None
assert spec.loader is not None
demo: Any = importlib.util.module_from_spec(spec)
sys.modules["demo"] = demo
spec.loader.exec_module(demo)


def test_a_quick_machine_measures_both_degrees_with_all_rounds_and_launches() -> None:
    sizes = demo.choose_sizes(2_000, 14, cores=2)
    assert (sizes.degrees, sizes.slower, sizes.rounds, sizes.launches) == ((1, 2), (1, 2), 3, 3)
    assert sizes.output_tokens == 50


def test_on_slow_cores_less_is_measured_and_it_ends_within_its_time() -> None:
    sizes = demo.choose_sizes(330, 35, cores=2)
    assert sizes.output_tokens < 50
    assert (sizes.degrees, sizes.slower, sizes.launches) == ((1, 2), (1,), 2)
    assert sizes.total_s < demo.BUDGET_S
    assert "--llmperf-tp=1" in demo.steps(sizes)[2].options


def test_the_second_degree_goes_last_and_one_core_has_none() -> None:
    assert demo.choose_sizes(330, 80, cores=2).degrees == (1,)
    assert demo.choose_sizes(2_000, 14, cores=1).degrees == (1,)


def test_a_machine_that_becomes_slower_is_asked_for_less() -> None:
    sizes = demo.choose_sizes(1_549, 19, cores=2)
    assert (sizes.most, sizes.slower) == (3, (1, 2))
    assert demo.shorten(sizes, 1.0, 500, compared=False) == sizes
    late = demo.shorten(sizes, 1.35, 345, compared=False)
    assert (late.most, late.slower, late.degrees) == (2, (1,), (1, 2))
    assert demo.shorten(sizes, 1.35, 345, compared=True).slower == (1, 2)


@pytest.mark.parametrize("speed", [50, 330, 603, 2_000, 50_000])
def test_every_round_has_a_steady_window(speed: float) -> None:
    sizes = demo.choose_sizes(speed, 20, cores=2)
    assert sizes.requests >= demo.WAVES * demo.CONCURRENCY
    assert sizes.requests % demo.CONCURRENCY == 0


def test_without_vllm_the_demo_runs_on_the_simulated_engine(tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(ROOT / "examples/quickstart", project / "examples/quickstart", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "examples/quickstart/demo.py", "--llmperf-python=/no/such/python"]
    virtual = os.environ | {"LLMPERF_SIMULATED_CLOCK": "virtual"}
    done = subprocess.run(command, cwd=project, env=virtual, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    ours = [line.removeprefix("##### ") for line in done.stdout.splitlines() if line.startswith("##### ")]
    assert ours[0].startswith("/no/such/python cannot be run as a Python interpreter")
    assert "So this runs on the simulated engine, whose verdicts are real and whose speed is made up" in ours[0]
    end = ours[next(n for n, line in enumerate(ours) if line.startswith("Done in")) :]
    assert [line.replace(",", " ").split()[:2] for line in end[1:4]] == [
        ["record", "RECORDED"],
        ["unchanged", "PASS"],
        ["slower", "REGRESSED"],
    ]
    stored = [line.strip() for line in end if line.endswith(".json")]
    assert stored
    assert all((project / path).is_file() for path in stored)
    commands = [match[0] for line in end if (match := re.search(r"\S+ -m pytest.*?(?=  +#)", line))]
    assert len(commands) == 3
    for command_line in (commands[0], commands[2]):  # those that start nothing
        assert (
            subprocess.run(command_line, shell=True, cwd=project / ".llmperf-demo", check=False, capture_output=True).returncode
            == 0
        )
