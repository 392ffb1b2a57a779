"""Other users of the machine: what they can ask of our engines, and what they can see and read of them."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from pytest_llmperf import EngineSpec, open_engine
from pytest_llmperf.measure.engines.engine import StartSettings
from pytest_llmperf.measure.engines.simulated import CLOCK
from pytest_llmperf.testing import SimulatedEngine

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_llmperf.testing import Result
    from tests.faults import Attempts

GUARDED = (
    ("GET", "/v1/models"), ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("POST", "/play"), ("POST", "/idle"),
)  # fmt: skip


def _status(url: str, method: str, path: str, headers: dict[str, str]) -> int:
    request = urllib.request.Request(url + path, b"{}" if method == "POST" else None, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def _command_lines() -> list[str]:
    lines = []
    for process in psutil.process_iter():
        try:
            lines.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return lines


@pytest.mark.fault("no stranger", "somebody without the key asks an engine")
@pytest.mark.parametrize("clock", ["real", "virtual"])
def test_who_has_no_key_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attempts: Attempts, clock: str) -> None:
    monkeypatch.setenv(CLOCK, clock)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    keys = set()
    for _ in attempts(quick=1, full=5):
        with open_engine(EngineSpec(kind="simulated"), settings=StartSettings(tmp_path)) as engine:
            assert engine.api_key
            keys.add(engine.api_key)
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {engine.api_key}"}):
                assert {_status(engine.url, *route, headers) for route in GUARDED} == {401}
            assert _status(engine.url, "GET", "/v1/models", engine.headers) == 200
            assert _status(engine.url, "GET", "/health", {}) == _status(engine.url, "GET", "/metrics", {}) == 200
            assert engine.generate("hello", max_tokens=2).output_tokens == 2
            assert not [line for line in _command_lines() if engine.api_key in line]
            assert engine.api_key not in engine.log_text()
    assert len(keys) == attempts.tried


def _addresses(process: psutil.Process) -> set[str]:
    sockets: Any = getattr(process, "net_connections", None) or process.connections
    return {each.laddr.ip for each in sockets("inet") if each.status in (psutil.CONN_LISTEN, psutil.CONN_NONE) and each.laddr}


@pytest.mark.fault("no stranger", "somebody on the network asks an engine")
def test_every_server_of_ours_listens_on_the_loopback_alone(tmp_path: Path) -> None:
    with open_engine(EngineSpec(kind="simulated"), settings=StartSettings(tmp_path)), SimulatedEngine():
        ours = [psutil.Process(), *psutil.Process().children(recursive=True)]
        listening = {address for process in ours for address in _addresses(process)}
    assert "127.0.0.1" in listening
    assert listening <= {"127.0.0.1", "::1"}


@pytest.mark.fault("no stranger", "another user reads the engines' logs")
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_logs_and_what_is_stored_are_no_more_open_than_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with open_engine(EngineSpec(kind="simulated")) as engine:
            assert engine.log_path is not None
            folder = engine.log_path.parent
            assert folder.stat().st_mode & 0o077 == 0  # a log may hold prompts
            assert engine.log_path.stat().st_mode & umask & 0o777 == 0
    finally:
        os.umask(before)


SOURCE = """
import pathlib, pytest

@pytest.mark.llmperf(ENV)
def test_x(llm_engine, llmperf):
    pathlib.Path("key").write_text(f"{llm_engine.api_key} {llm_engine.headers.get('Authorization')}")
    llmperf(requests=8, prompt_tokens=6, output_tokens=4)
"""


@pytest.mark.parametrize(
    ("env", "option", "key"),
    [
        ("", "--api-key of-option second", "of-option"),
        ("env={'VLLM_API_KEY': 'of-marker'}", "", "of-marker"),
        ("env={'VLLM_API_KEY': ''}", "", None),
    ],
)
def test_a_test_has_the_key_for_requests_of_its_own(
    run: Callable[..., Result], tmp_path: Path, env: str, option: str, key: str | None
) -> None:
    result = run(SOURCE.replace("ENV", env), f"--llmperf-engine-args={option}")
    assert result.outcomes == {"passed": 1}, result.stdout
    assert (tmp_path / "key").read_text() == (f"{key} Bearer {key}" if key else "None None")
