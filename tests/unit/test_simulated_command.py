"""The simulated engine as a command: `python -m pytest_llmperf.testing`, its arguments, its log, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PROMPT = {"prompt": [5, 6, 7, 8], "max_tokens": 5}
DEADLINE_S = 10.0


def call(port: int, path: str, body: object = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", data, DEADLINE_S) as response:
        return json.loads(response.read() or "null")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        threading.Event().wait(0.002)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest_llmperf.testing", "--sim-step-s", "2e-4", *arguments]


@contextmanager
def started(
    *arguments: str, ready: str = r"server on http://127.0.0.1:(\d+)"
) -> Iterator[tuple[subprocess.Popen[str], int, str]]:
    """The process, its port and its log so far; killed at the end, and if it is silent for too long."""
    process = subprocess.Popen(command("--port", "0", *arguments), stdout=subprocess.PIPE, text=True, process_group=0)
    assert process.stdout is not None
    watchdog = threading.Timer(DEADLINE_S, process.kill)
    watchdog.start()
    log = ""
    try:
        while (at := re.search(ready, log)) is None:
            line = process.stdout.readline()
            assert line, f"ended with {process.wait()}: {log}"
            log += line
        yield process, int(at[1] or 0), log
    finally:
        watchdog.cancel()
        with suppress(ProcessLookupError):  # it may have ended, and its children too
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_the_command_logs_as_vllm_does_and_sigterm_ends_it_with_0() -> None:
    with started("--tensor-parallel-size", "2", "--model", "org/tiny", "--enforce-eager", "--dtype", "auto") as run:
        process, port, log = run
        assert "  version 0.32.0+simulated\n" in log
        assert "GPU KV cache size: 122,880 tokens, Maximum concurrency for 4,096 tokens per request: 30.00x\n" in log
        assert re.findall(r"rank \d in world size 2", log) == ["rank 0 in world size 2", "rank 1 in world size 2"]
        assert call(port, "/v1/models")["data"][0]["id"] == "org/tiny"
        assert call(port, "/v1/completions", PROMPT)["usage"]["completion_tokens"] == 5
        process.terminate()
        assert process.wait(DEADLINE_S) == 0


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--sim-crash-at-start"], 1, "torch.OutOfMemoryError: CUDA out of memory."),
        (["--sim-crash-at-start", "ValueError: no such model"], 1, "ValueError: no such model\n"),
        (["--tensor-paralel-size", "2"], 2, "unrecognized arguments: --tensor-paralel-size 2"),
        (["--num-gpu-blocks-override", "1"], 2, "num_gpu_blocks must be at least 2"),
    ],
)
def test_a_start_that_fails_says_why(arguments: list[str], status: int, words: str) -> None:
    done = subprocess.run(command(*arguments), capture_output=True, text=True, check=False, timeout=DEADLINE_S)
    assert done.returncode == status
    assert words in done.stdout + done.stderr


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run(command("--port", port), capture_output=True, text=True, check=False, timeout=DEADLINE_S)
    assert done.returncode == 1
    address = f"('127.0.0.1', {port})"
    assert f"[Errno 98] error while attempting to bind on address {address}: address already in use\n" in done.stderr


def test_a_starting_engine_refuses_connections_and_obeys_sigterm() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with started("--port", str(port), "--sim-startup-s", "60", ready="KV cache size()") as (process, _, _):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        # The log line comes before the signal handlers: without one, the signal itself ends the process.
        process.terminate()
        assert process.wait(DEADLINE_S) in (0, -signal.SIGTERM)


def test_a_crash_ends_the_process_with_1() -> None:
    with started("--sim-crash-after", "1") as (process, port, _):
        assert call(port, "/v1/completions", PROMPT)["usage"]["completion_tokens"] == 5
        with pytest.raises(ConnectionError):
            call(port, "/v1/completions", PROMPT)
        assert process.wait(DEADLINE_S) == 1


def test_a_slow_stop_takes_time_and_an_infinite_one_forever() -> None:
    with started("--sim-stop-s", "0.2") as (process, _, _):
        start = time.monotonic()
        process.terminate()
        assert process.wait(DEADLINE_S) == 0
        assert time.monotonic() - start >= 0.2
    with started("--sim-stop-s", "inf") as (process, port, _):
        process.terminate()
        assert process.stdout is not None
        assert "shutdown triggered" in process.stdout.readline()
        assert call(port, "/health") is None


def test_children_outlive_sigterm_but_not_the_kill_of_their_group() -> None:
    with started("--sim-children", "2") as (process, _, log):
        children = [int(pid) for pid in re.findall(r"with pid (\d+)", log)]
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
        assert [gone(child) for child in children] == [False, False]
    until(lambda: all(gone(child) for child in children))


def test_launches_are_counted_in_a_file(tmp_path: Path) -> None:
    counter = tmp_path / "launches"
    for launches in (1, 2):
        with started("--sim-launch-file", str(counter), "--sim-launch-cv", "0.1", "--sim-startup-s", "0.05"):
            assert counter.stat().st_size == launches
