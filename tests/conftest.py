from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_llmperf.testing import Example

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_llmperf.testing import Result

QUICK = ("--llmperf-engine=simulated", "--llmperf-rounds=2", "--llmperf-tolerance=60%", "-p", "no:benchmark")

SERVING = """
def test_serving(llmperf, baseline):
    measured = llmperf(prompt_tokens=16, output_tokens=6, requests=8)
    assert measured == baseline
"""


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Result]:
    """Run pytest on a project of one test file (or several) with the simulated engine, in a process of its own."""

    def run_project(source: str | dict[str, str], *args: str, quick: bool = True, **env: str) -> Result:
        files = {"test_it.py": source} if isinstance(source, str) else source
        return Example(files, QUICK if quick else (), env).run(tmp_path, *args)

    return run_project
