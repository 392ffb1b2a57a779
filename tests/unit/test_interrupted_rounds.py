"""Ctrl-C ends a round at once, whatever the kind of engine: what is waited for is told, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import marked, wait_until

FAKE = Path(__file__).parents[1] / "fake_vllm.py"

MEASURING = """
import sys
from pathlib import Path
from pytest_llmperf.measure.client.processes import LoadClient
from pytest_llmperf.measure.engines import api
from pytest_llmperf.measure.engines.engine import StartSettings
from pytest_llmperf.measure.engines.opening import open_engine
from pytest_llmperf.measure.launch import RoundSettings, measure_launch
from pytest_llmperf.plan.engine import EngineSpec, parse_engine_args
from pytest_llmperf.plan.workload import Workload

def announced(call, is_round=lambda *_: True):
    def announce(*given, **named):
        if is_round(*given):
            print("under way", flush=True)
        return call(*given, **named)
    return announce

LoadClient.play = announced(LoadClient.play)
api.post = announced(api.post, lambda url, *_: url.endswith("/play"))
kind, python, args = sys.argv[1:4]
spec = EngineSpec(kind=kind, python=python, args=parse_engine_args(args, origin="test"))
settings = StartSettings(log_folder=Path.cwd(), stop_grace_s=20.0)
try:
    with LoadClient() as client, open_engine(spec, None, settings) as engine:
        workload = Workload(prompt_tokens=8, output_tokens=100_000, requests=64, concurrency=8)
        measure_launch(engine, client, workload, RoundSettings(nonce="x", stall_timeout_s=600.0))
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def interrupted(tmp_path: Path, kind: str, python: str, args: str = "", *, clock: str = "real", begun: str = "under way") -> None:
    """Interrupt a run when its output or a log says `begun`: it ends long before its round would, and before the grace time."""
    environment = {**os.environ, "LLMPERF_TEST_MARK": str(tmp_path), "LLMPERF_SIMULATED_CLOCK": clock}
    output = tmp_path / "output.log"
    with output.open("w") as file:
        run = subprocess.Popen(
            [sys.executable, "-c", MEASURING, kind, python, args],
            cwd=tmp_path,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    logs = lambda: "".join(path.read_text() for path in tmp_path.glob("*.log"))  # noqa: E731  a text that is read again
    assert wait_until(lambda: begun in logs(), 30), logs()
    run.send_signal(signal.SIGINT)
    assert wait_until(lambda: run.poll() is not None, 10), logs()
    assert "interrupted" in output.read_text()
    assert wait_until(lambda: not marked(tmp_path), 10), marked(tmp_path)


def test_an_offline_round_ends_at_once(tmp_path: Path) -> None:
    FAKE.chmod(0o755)
    interrupted(tmp_path, "offline", str(FAKE), begun="round begun")


@pytest.mark.parametrize("clock", ["real", "virtual"])
def test_a_simulated_round_ends_at_once(tmp_path: Path, clock: str) -> None:
    interrupted(tmp_path, "simulated", sys.executable, "--max-model-len 1000000", clock=clock)


def test_an_engine_that_starts_is_stopped_at_once(tmp_path: Path) -> None:
    interrupted(tmp_path, "simulated", sys.executable, "--sim-startup-s 600", begun="rank 0")
