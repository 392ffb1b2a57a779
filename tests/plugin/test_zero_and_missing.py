"""What could not be measured, or can never be compared, is said when a baseline is recorded, and fails no later run."""

from __future__ import annotations

import json
import socket
import threading
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pytest_llmperf.testing import Result, SimulatedEngine

    Run = Callable[..., Result]

BUFFERED = """
def test_it(llmperf, baseline):
    assert llmperf(prompt_tokens=8, output_tokens=6, requests=9) == baseline
"""

UNSTREAMED = """
def test_it(llmperf, baseline):
    assert llmperf(prompt_tokens=8, output_tokens=6, requests=24, stream=False) == baseline
"""

RECORD = ("--update-baselines", "--llmperf-launches=2")


def _request(connection: socket.socket) -> bytes:
    """Return the next whole request of a connection; empty where there is none."""
    data = b""
    while b"\r\n\r\n" not in data and (more := connection.recv(65536)):
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    sizes = [line.partition(b":")[2] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
    while sizes and len(body) < int(sizes[0]) and (more := connection.recv(65536)):
        body += more
    return head + b"\r\nConnection: close\r\n\r\n" + body if data else b""


class BufferingProxy:
    """Passes each answer on when it has all of it, as many a proxy does by default."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            while request := _request(connection):
                with socket.create_connection(("127.0.0.1", self._port)) as upstream:
                    upstream.sendall(request)
                    held_back = b"".join(iter(lambda: upstream.recv(65536), b""))  # called in this turn
                connection.sendall(held_back)

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def buffered(simulated_engine: SimulatedEngine) -> Iterator[str]:
    proxy = BufferingProxy(simulated_engine.port)
    yield f"--llmperf-url=x={proxy.url}"
    proxy.close()


def at_proxy(run: Run, url: str, *args: str, **how: bool) -> Result:
    return run(BUFFERED, "--llmperf-engine=url", url, "--llmperf-tolerance=90%", "-rA", *args, **how)


def stored(folder: Path) -> dict[str, object]:
    [file] = (folder / "baselines").rglob("*.json")
    content = json.loads(file.read_text())
    assert isinstance(content, dict)
    return content


def test_a_buffered_stream_has_no_tpot_and_later_runs_are_compared(run: Run, buffered: str, tmp_path: Path) -> None:
    recorded = at_proxy(run, buffered, *RECORD)
    [case] = recorded.cases
    assert case["status"] == "RECORDED", recorded.stdout
    [text] = [note for note in case["notes"] if "never compared" in note]
    assert "tpot_p50_s" in text
    assert any(note.startswith("no TPOT: every answer came in one read") for note in case["notes"])
    assert {each["metrics"]["tpot_p50_s"] for launch in stored(tmp_path)["launches"] for each in launch["rounds"]} == {None}  # type: ignore[attr-defined]
    compared = at_proxy(run, buffered, "--llmperf-max-launches=2")
    # How fast it was is the machine's affair: what counts is that it was compared.
    assert compared.cases[0]["status"] not in ("NOT-COMPARABLE", "INVALID", "NO-BASELINE"), compared.stdout
    [row] = [row for row in compared.cases[0]["verdict"]["metrics"] if row["metric"] == "tpot_p50_s"]
    assert (row["status"], row["rule"], row["measured"]) == (None, "not in the baseline", None)
    assert "not compared" in compared.stdout


def test_a_gate_that_could_never_fire_is_refused_when_it_is_recorded(run: Run) -> None:
    result = run(UNSTREAMED, "--llmperf-gate=ttft_p50_s=90%", *RECORD)
    assert result.outcomes == {"failed": 1}
    assert "no baseline is recorded, because what is to gate could never be compared:" in result.stdout
    assert "ttft_p50_s: not measured" in result.stdout
    assert result.engine_starts == 1  # it is known after the first launch


def test_a_gate_on_what_is_always_zero_is_refused_too(run: Run, tmp_path: Path) -> None:
    result = run(BUFFERED, "--llmperf-gate=send_delay_p99_s=90%", *RECORD)
    assert result.outcomes == {"failed": 1}
    assert "send_delay_p99_s: A round is 0.0" in result.stdout
    assert not list(tmp_path.rglob("baselines/**/*.json"))


def test_a_gate_on_a_percentile_of_too_few_values_is_refused_too(run: Run) -> None:
    result = run(BUFFERED, "--llmperf-gate=ttft_p99_s=90%", *RECORD)
    assert "ttft_p99_s: a launch has 0.18 values beyond it, 10 are needed" in result.stdout


def test_what_is_not_measured_is_named_once_at_the_recording(run: Run) -> None:
    [case] = run(UNSTREAMED, *RECORD).cases
    [text] = [note for note in case["notes"] if "never compared" in note]
    assert text == "not in the baseline, and never compared: ttft_p50_s, tpot_p50_s (not measured)"
    assert run(UNSTREAMED).outcomes == {"passed": 1}


def test_a_metric_that_appears_later_makes_another_version(run: Run, buffered: str, simulated_engine: SimulatedEngine) -> None:
    at_proxy(run, buffered, *RECORD)
    direct = at_proxy(run, f"--llmperf-url=x={simulated_engine.url}", *RECORD)
    [note] = [note for note in direct.cases[0]["notes"] if note.startswith("recorded")]
    assert "in place of 2, which were of another version" in note
    assert "tpot_p50_s could not be compared before" in note


def test_a_search_by_a_limit_that_nobody_can_check_is_invalid(run: Run, buffered: str) -> None:
    source = """
def test_it(llmperf):
    llmperf.capacity(slo={"tpot_s": 1.0}, rate=(20, 40), requests=10, prompt_tokens=8, output_tokens=6)
"""
    result = run(source, "--llmperf-engine=url", buffered)
    assert set(result.statuses.values()) == {"INVALID"}, result.stdout
    assert "nobody knows whether slo tpot_s was kept: every answer came in one read" in result.stdout
