from __future__ import annotations

import os
import sys

import pytest

from pytest_llmperf.measure.engines.engine import EngineError
from pytest_llmperf.measure.engines.vllm import find_vllm

PYTHON = os.environ.get("LLMPERF_REAL_PYTHON", sys.executable)
"""The interpreter that has vLLM."""

ENGINE = (f"--llmperf-python={PYTHON}",)


@pytest.fixture(autouse=True)
def _needs_vllm() -> None:
    try:
        find_vllm(PYTHON)
    except EngineError as error:
        why = f"{error} These tests need vLLM's CPU build: run `tox run -e real`, or leave tests/real out"
        pytest.fail(why, pytrace=False)
