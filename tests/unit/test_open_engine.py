"""Engines without pytest: `open_engine` on the simulated server, through the same child, supervisor and checks as vLLM's."""

from __future__ import annotations

import pytest

from pytest_llmperf import EngineError, EngineSpec, open_engine
from pytest_llmperf.plan import parse_engine_args
from pytest_llmperf.testing import SimulatedEngine
from tests.processes import wait_until


def simulated(args: str = "") -> EngineSpec:
    return EngineSpec(kind="simulated", args=parse_engine_args(args, origin="test"))


def test_an_engine_serves_inside_the_block_and_is_gone_after_it() -> None:
    with open_engine(simulated()) as engine:
        assert engine.generate("hello", max_tokens=3).output_tokens == 3
        assert engine.startup_s
        assert "Application startup complete" in engine.log_text()
    with pytest.raises(EngineError, match="gave no completion"):
        engine.generate("hello")


def test_progress_is_told_while_it_starts() -> None:
    told: list[str] = []
    with open_engine(simulated(), progress=told.append):
        pass
    assert told[-1] == "server is up"


def test_a_crash_at_start_says_how_and_shows_the_log() -> None:
    with (
        pytest.raises(EngineError, match="ended with exit code 1 while it was starting") as caught,
        open_engine(simulated("--sim-crash-at-start boom")),
    ):
        pass
    assert "boom" in caught.value.tail
    assert caught.value.log_path
    assert caught.value.log_path.is_file()


def test_an_engine_that_was_killed_is_noticed_by_check() -> None:
    import psutil

    with open_engine(simulated()) as engine:
        port = engine.url.rpartition(":")[2]
        [server] = [one for one in psutil.process_iter() if f"--port\0{port}" in "\0".join(_command(one)) and _is_engine(one)]
        server.kill()
        assert wait_until(lambda: not server.is_running(), 10)
        with pytest.raises(EngineError, match="ended with signal SIGKILL before it was stopped"):
            engine.check()


def _command(process: object) -> list[str]:
    import psutil

    try:
        return list(process.cmdline()) if isinstance(process, psutil.Process) else []
    except psutil.Error:
        return []


def _is_engine(process: object) -> bool:
    return "pytest_llmperf.testing" in _command(process)[:3]


def test_a_url_engine_is_checked_and_left_running() -> None:
    with SimulatedEngine() as simulation:
        with open_engine(EngineSpec(kind="url", url=simulation.url)) as engine:
            assert engine.versions["vllm"]
            assert engine.startup_s is None
            assert engine.metrics_text()
        with open_engine(EngineSpec(kind="url", url=simulation.url + "/v1")) as again:
            assert again.generate([1, 2, 3], max_tokens=1).output_tokens == 1
