"""No process of a real engine outlives its run: vLLM on CPU, whose workers are processes that vLLM starts."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest

from tests.chaos.background import Background
from tests.processes import wait_until
from tests.real.conftest import ENGINE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import psutil

    from tests.faults import Attempts

PROMISE = "no engine outlives the run"
START_S, GONE_S = 240.0, 30.0
LONG = """
import pytest

@pytest.mark.llmperf(concurrency=8)
def test_long(llmperf):
    llmperf(prompt_tokens=8, output_tokens=1900, requests=64)
"""


@pytest.fixture
def background(tmp_path: Path) -> Iterator[Callable[..., Background]]:
    """Start runs in the background, and wait until their engine is measured."""
    runs: list[Background] = []

    def start(*args: str) -> Background:
        run = Background(tmp_path / str(len(runs)), LONG, *ENGINE, *args, kind="server")
        runs.append(run)
        run.until_in_a_round(START_S)
        return run

    yield start
    for run in runs:
        run.close()


def gone_after_s(run: Background, processes: Sequence[psutil.Process], began_s: float) -> float:
    """Wait until none of these processes is left, nor any other of the run; return the seconds since then."""
    assert wait_until(lambda: not any(each.is_running() for each in processes), GONE_S), list(processes)
    return run.gone_after_s(began_s)


@pytest.mark.fault(PROMISE, "vLLM: SIGKILL of pytest in a round")
def test_no_process_of_vllm_outlives_pytest(background: Callable[..., Background], attempts: Attempts) -> None:
    for chance in attempts(quick=1, full=5):
        run = background()
        time.sleep(chance.uniform(0, 3.0))
        processes, began_s = run.tree(), time.monotonic()
        assert len(processes) >= 4  # two supervisors, vLLM, the load process
        run.pytest.kill()
        run.pytest.wait()
        attempts.took(gone_after_s(run, processes, began_s))


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="TP 2 on CPU needs two cores")
@pytest.mark.fault(PROMISE, "vLLM at TP 2: SIGKILL of its supervisors in a round", full=True)
def test_no_worker_of_vllm_outlives_its_supervisors(background: Callable[..., Background], attempts: Attempts) -> None:
    for number, chance in enumerate(attempts(quick=1, full=6)):
        run = background("--llmperf-tp=2")
        time.sleep(chance.uniform(0, 3.0))
        processes, began_s = run.tree(), time.monotonic()
        assert len(processes) >= 7  # as above, and the engine core with two workers
        for supervisor in (run.supervisors(), run.supervisors()[:1], run.supervisors()[1:])[number % 3]:
            supervisor.kill()
        assert run.pytest.wait(60) == 1, run.output
        attempts.took(gone_after_s(run, processes, began_s))
        assert "its supervisor was killed" in run.output
