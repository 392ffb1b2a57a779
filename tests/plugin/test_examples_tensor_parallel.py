"""`examples/test_tensor_parallel.py` on simulated GPUs: it records, compares, and finds GPUs that do not hold alike."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_llmperf.testing import Result

    RunExample = Callable[..., Result]

EXAMPLE = (Path(__file__).parents[2] / "examples" / "test_tensor_parallel.py").read_text()
SMALL = ("--llmperf-tp=1,2", "--llmperf-concurrency=16", "--llmperf-launches=2", "--llmperf-max-launches=2")
FAST = "--sim-step-s 0.0004 --sim-sequence-s 1e-5 --sim-prefill-token-s 2e-6 --sim-communication-s 2e-5"


@pytest.fixture
def example(run: RunExample) -> RunExample:
    """Run the example with small settings on a quick engine; `engine` adds to the engine's arguments."""

    def run_example(*args: str, engine: str = "", **env: str) -> Result:
        return run({"test_tensor_parallel.py": EXAMPLE}, *SMALL, f"--llmperf-engine-args={FAST} {engine}", *args, **env)

    return run_example


def test_it_records_and_then_passes(example: RunExample) -> None:
    recorded = example("--update-baselines")
    # Answers at two degrees, memory at TP 2, and the speed of server and engine at both; the rest is not selected.
    assert recorded.outcomes == {"passed": 7, "deselected": 22}, recorded.stdout
    assert sorted(recorded.statuses.values()) == ["MEASURED"] + ["RECORDED"] * 4
    compared = example()
    assert compared.outcomes == {"passed": 7, "deselected": 22}, compared.stdout
    assert sorted(compared.statuses.values()) == ["MEASURED"] + ["PASS"] * 4, compared.stdout
    assert "4 compared" in compared.stdout


def test_an_uneven_split_fails_and_names_the_gpu_that_stands_out(example: RunExample) -> None:
    result = example("-k", "holds", "--llmperf-concurrency=1", engine="--sim-extra-memory-gib 0,2")
    assert result.outcomes["failed"] == 1, result.stdout
    assert "rank 1 holds" in result.stdout, result.stdout


def test_without_gpus_requests_are_short_and_the_memory_test_is_skipped(example: RunExample) -> None:
    result = example("--update-baselines", "-rs", "--llmperf-tp=2", "--llmperf-concurrency=1", LLMPERF_SIMULATED_GPUS="0")
    assert "needs 2 GPUs (the marker's min_gpus), this host has none" in result.stdout
    sent = [case["workload"] for case in result.cases if case["status"] == "RECORDED"]
    assert sent == [{"prompt_tokens": 64, "output_tokens": 16, "requests": 8, "concurrency": 1, "seed": 0}] * 2
