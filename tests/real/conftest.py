from __future__ import annotations

import importlib.util

import pytest


@pytest.fixture(autouse=True)
def _needs_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.fail("these tests need vLLM's CPU build: run `tox -e real`, or leave tests/real out", pytrace=False)
