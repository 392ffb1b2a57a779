from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from pytest_llmperf.testing import Example
from tests.faults import (  # noqa: F401 - hooks and a fixture: they work where they are imported
    attempts,
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_runtest_makereport,
)
from tests.processes import marked, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pytest_llmperf.testing import Result


def _heed_ctrl_c() -> None:
    # A shell has its background jobs ignore it, and so would all that they start.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


QUICK = (
    "--llmperf-engine=simulated", "--llmperf-rounds=2", "--llmperf-tolerance=60%",
    "-p", "no:benchmark", "-p", "no:hypothesispytest", "-p", "no:anyio",
)  # fmt: skip

ENVIRONMENT = {"LLMPERF_SIMULATED_CLOCK": "virtual", "PYTHONDONTWRITEBYTECODE": ""}
"""On a virtual clock nothing depends on how busy this machine is; and what is compiled once serves all runs."""

SERVING = """
def test_serving(llmperf, baseline):
    measured = llmperf(prompt_tokens=16, output_tokens=6, requests=8)
    assert measured == baseline
"""

LONG = """
def test_long(llmperf):
    llmperf(prompt_tokens=8, output_tokens=2000, requests=8)
"""


def _changes_modules(source: str) -> bool:
    return "import pytest_llmperf" in source or "from pytest_llmperf" in source or "pytest.exit" in source


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Result]:
    """Run pytest on a project of one test file (or several) with the simulated engine.

    In this process, unless the project changes what others would meet here: modules of the package, or simulated GPUs.
    """

    def run_project(source: str | dict[str, str], *args: str, quick: bool = True, **env: str) -> Result:
        files = {"test_it.py": source} if isinstance(source, str) else source
        alone = not quick or "-n" in args or "LLMPERF_SIMULATED_STATE" in env or any(map(_changes_modules, files.values()))
        return Example(files, QUICK if quick else (), ENVIRONMENT | env).run(tmp_path, *args, in_process=not alone)

    return run_project


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start a run in the background and wait until its engine is measured."""

    def start_run(*engine_args: str, kind: str = "simulated", source: str = LONG, python: str = sys.executable, timeout_s=60.0):
        project = Example({"test_it.py": source}, (f"--llmperf-engine={kind}", f"--llmperf-python={python}"))
        project.write(tmp_path)
        command = project.command(tmp_path, "-v", f"--llmperf-engine-args={' '.join(engine_args)}")
        environment = {**os.environ, "LLMPERF_TEST_MARK": str(tmp_path), "PYTHONUNBUFFERED": "1"}
        with (tmp_path / "output").open("w") as output:
            child = subprocess.Popen(
                command, cwd=tmp_path, env=environment, stdout=output, stderr=subprocess.STDOUT, preexec_fn=_heed_ctrl_c
            )
        ready = re.compile(r"engine 1 \(.*\): ready")
        assert wait_until(lambda: ready.search((tmp_path / "output").read_text()), timeout_s), (tmp_path / "output").read_text()
        return child

    yield start_run
    for process in marked(tmp_path):
        process.kill()
