"""Engines without pytest: `open_engine` on the simulated server, through the same child, supervisor and checks as vLLM's."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

import pytest_llmperf
from pytest_llmperf import EngineError, EngineSpec, open_engine
from pytest_llmperf.plan.engine import parse_engine_args
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
    stages: list[str] = []
    with open_engine(simulated(), progress=stages.append):
        pass
    assert stages[-1] == "server is up"


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
        port = f"--port\0{engine.url.rpartition(':')[2]}"
        engines = filter(_is_engine, psutil.process_iter())
        [server] = [process for process in engines if port in "\0".join(_command(process))]
        assert server.environ()["SPT_NOENV"] == "1"  # else a title that it gives itself takes its mark away
        server.kill()
        assert wait_until(lambda: not server.is_running(), 10)
        with pytest.raises(EngineError, match="ended with signal SIGKILL before it was stopped"):
            engine.check()


def test_an_engine_that_dies_while_it_idles_is_noticed_at_once() -> None:
    import psutil

    with open_engine(simulated()) as engine:
        port = f"--port\0{engine.url.rpartition(':')[2]}"
        engines = filter(_is_engine, psutil.process_iter())
        [server] = [process for process in engines if port in "\0".join(_command(process))]
        server.kill()
        with pytest.raises(EngineError, match="ended with signal SIGKILL while it idled"):
            engine.idle(600)


def test_its_folder_goes_with_it_but_for_the_log_of_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with open_engine(simulated()) as engine:
        assert engine.log_path
        assert engine.log_path.is_file()
    assert not list(tmp_path.glob("llmperf-logs-*"))
    with pytest.raises(ValueError, match="boom"), open_engine(simulated()):
        raise ValueError("boom")
    assert not list(tmp_path.glob("llmperf-logs-*"))
    with pytest.raises(EngineError) as caught, open_engine(simulated("--sim-crash-at-start boom")):
        pass
    assert caught.value.log_path
    assert caught.value.log_path.is_file()


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


def test_a_url_engine_is_opened_without_a_look_at_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise AssertionError("GPUs that do not answer are no business of an endpoint elsewhere")

    monkeypatch.setattr("pytest_llmperf.measure.engines.opening.describe_host", refuse)
    with SimulatedEngine() as simulation, open_engine(EngineSpec(kind="url", url=simulation.url)) as engine:
        assert engine.gpus == ()


def test_the_simulated_engine_finds_this_package_and_keeps_the_users_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$PYTHONUNBUFFERED $MODE $PYTHONPATH"; exit 1\n')
    python.chmod(0o755)
    monkeypatch.setenv("PYTHONUNBUFFERED", "0")
    monkeypatch.setenv("MODE", "of the machine")
    spec = EngineSpec(kind="simulated", python=str(python), env=(("MODE", "asked-for"), ("PYTHONPATH", "/of/the/test")))
    with pytest.raises(EngineError, match="ended with exit code 1") as caught, open_engine(spec):
        pass
    source = Path(pytest_llmperf.__file__).parents[1]
    assert caught.value.tail == f"0 asked-for {source}:/of/the/test"


@pytest.mark.parametrize(("native", "args", "dtype"), [(True, "", None), (False, "", "float32"), (False, "--dtype half", "half")])
def test_the_bundled_model_runs_in_float32_where_cores_emulate_bfloat16(
    native: bool, args: str, dtype: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"  # has vLLM, and instead of starting it prints how it was asked to
    python.write_text('#!/bin/sh\nif [ "$1" = -c ]; then echo \'{"vllm": "0.32.0"}\'; else echo "$@"; exit 1; fi\n')
    python.chmod(0o755)
    monkeypatch.setattr("pytest_llmperf.measure.engines.vllm.has_bfloat16", lambda: native)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    spec = EngineSpec(kind="server", python=str(python), args=parse_engine_args(args, origin="test"))
    with pytest.raises(EngineError, match="ended with exit code 1") as caught, open_engine(spec):
        pass
    words = caught.value.tail.split()
    assert (words[words.index("--dtype") + 1] if "--dtype" in words else None) == dtype
