from __future__ import annotations

import os
import sys

import pytest

from pytest_llmperf.measure.engines.engine import EngineError
from pytest_llmperf.measure.engines.vllm import find_vllm

PYTHON = os.environ.get("LLMPERF_REAL_PYTHON", sys.executable)
"""The interpreter that has vLLM."""

ENGINE = (f"--llmperf-python={PYTHON}",)

ASKING = """
import urllib.error, urllib.request
import psutil


def answer(engine, headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{engine.url}/v1/models", headers=headers), timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def words(process):
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def check_key(engine):
    key = engine.api_key
    assert len(key) >= 20
    assert engine.generate("hello", max_tokens=2).output_tokens == 2
    assert answer(engine, {}) == answer(engine, {"Authorization": "Bearer wrong"}) == 401
    assert answer(engine, engine.headers) == 200
    assert not [process for process in psutil.process_iter() if any(key in word for word in words(process))]
    assert key not in engine.log_path.read_text()
"""
"""What a test's file begins with that checks the key of an engine: it has one of its own, asks for it, and it stands nowhere."""


@pytest.fixture(autouse=True)
def _needs_vllm() -> None:
    try:
        find_vllm(PYTHON)
    except EngineError as error:
        why = f"{error} These tests need vLLM's CPU build: run `tox run -e real`, or leave tests/real out"
        pytest.fail(why, pytrace=False)
