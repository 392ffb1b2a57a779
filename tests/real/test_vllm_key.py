"""The API key of a real vLLM engine: one of its own, which it asks for, and which stands nowhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_llmperf.testing import Example
from tests.real.conftest import ENGINE

if TYPE_CHECKING:
    from pathlib import Path

TIMEOUT_S = 420
SOURCE = """
import urllib.error, urllib.request
import psutil
import pytest


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


def test_key(llm_engine, llmperf):
    key = llm_engine.api_key
    assert len(key) >= 20
    assert llm_engine.generate("hello", max_tokens=2).output_tokens == 2
    llmperf(prompt_tokens=16, output_tokens=4, requests=8)
    assert answer(llm_engine, {}) == answer(llm_engine, {"Authorization": "Bearer wrong"}) == 401
    assert answer(llm_engine, llm_engine.headers) == 200
    assert not [process for process in psutil.process_iter() if any(key in word for word in words(process))]
    assert key not in llm_engine.log_path.read_text()
"""


@pytest.mark.fault("no stranger", "somebody without the key asks a real engine")
@pytest.mark.parametrize("kind", ["server", "offline"])
def test_a_real_engine_refuses_who_has_no_key(tmp_path: Path, kind: str) -> None:
    project = Example({"test_it.py": SOURCE}, (*ENGINE, f"--llmperf-engine={kind}", "--llmperf-rounds=2"))
    result = project.run(tmp_path, timeout_s=TIMEOUT_S)
    assert result.outcomes == {"passed": 1}, result.stdout
