"""Engines whose figures are not those of one engine under our load alone: others use it, or it is restarted meanwhile."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import threading
import time
import urllib.request
from typing import TYPE_CHECKING

import pytest

from pytest_llmperf.measure import launch as launches
from pytest_llmperf.measure import telemetry
from pytest_llmperf.measure.client.processes import LoadClient
from pytest_llmperf.measure.engines.opening import open_engine
from pytest_llmperf.measure.engines.server import ServerEngine
from pytest_llmperf.measure.exposition import read_scrape
from pytest_llmperf.measure.launch import RoundSettings, measure_launch
from pytest_llmperf.measure.plausibility import Caused
from pytest_llmperf.measure.telemetry import foreign, restarted
from pytest_llmperf.plan.arguments import workload_from
from pytest_llmperf.plan.axes import Axes
from pytest_llmperf.plan.engine import EngineSpec
from pytest_llmperf.testing import Clock, Options, SimulatedEngine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_llmperf.measure.measurement import Launch

CLOCK = Clock(step_s=1e-3, sequence_s=0.0, prefill_token_s=0.0)
SHORT = workload_from(Axes(), {"prompt_tokens": 8, "output_tokens": 2, "requests": 12, "concurrency": 4})
COUNTED = ("generation_tokens_total", "prompt_tokens_total", "request_success_total")
SERVING = "def test_serving(llmperf, baseline):\n    assert llmperf(prompt_tokens=8, output_tokens=1, requests=8) == baseline\n"


def measured(engine: SimulatedEngine, progress: Callable[[str], None] = lambda _: None, rounds: int = 1) -> Launch:
    """Return a launch on an endpoint."""
    with LoadClient() as client, open_engine(EngineSpec(kind="url", url=engine.url)) as endpoint:
        return measure_launch(endpoint, client, SHORT, RoundSettings(nonce="case", rounds=rounds), progress)


@pytest.mark.fault("no false green", "an engine counts ten times our tokens, answers being short")
def test_ten_times_our_load_is_never_recorded(run, monkeypatch) -> None:
    ask = ServerEngine.metrics_text

    def tenfold(engine: ServerEngine) -> str:
        pattern = rf"^(vllm:(?:{'|'.join(COUNTED)})\{{.*\}}) (\S+)$"
        return re.sub(pattern, lambda m: f"{m[1]} {10 * float(m[2])}", ask(engine) or "", flags=re.MULTILINE)

    monkeypatch.setattr(ServerEngine, "metrics_text", tenfold)
    result = run(SERVING, "--update-baselines", "--llmperf-launches=2")
    assert list(result.statuses.values()) == ["INVALID"], result.stdout
    assert "the engine counted 80 requests, though only 8 were sent: others send requests too" in result.stdout


@contextlib.contextmanager
def others(url: str, *, at_once: int = 8) -> Iterator[None]:
    """Have somebody else send short requests, as many at a time, until the block ends."""
    over = threading.Event()
    numbers = itertools.count()

    def send() -> None:
        while not over.is_set():
            body = {"model": "simulated", "prompt": f"another question {next(numbers)}", "max_tokens": 1}
            head = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), head)
            with contextlib.suppress(OSError):
                urllib.request.urlopen(request, timeout=10).read()

    threads = [threading.Thread(target=send, daemon=True) for _ in range(at_once)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


@pytest.mark.fault("no false green", "another client sends short requests during a round")
def test_the_load_of_another_client_is_seen(attempts) -> None:
    for _ in attempts(quick=1, full=10):
        slow = Clock(step_s=0.05, sequence_s=0.0, prefill_token_s=0.0)
        with SimulatedEngine(Options(clock=slow)) as engine, others(engine.url, at_once=16):
            launch = measured(engine)
        assert any("others send requests too" in reason for reason in launch.invalid), launch.invalid


@pytest.mark.fault("no false green", "another client's load between two rounds makes a launch invalid")
def test_load_between_rounds_is_no_business_of_ours(attempts) -> None:
    for _ in attempts(quick=1, full=5):
        with SimulatedEngine(Options(clock=CLOCK)) as engine:

            def between(_: str, url: str = engine.url) -> None:
                with others(url):
                    time.sleep(0.1)  # so long they send

            launch = measured(engine, between, rounds=2)
        assert launch.invalid == ()


@contextlib.contextmanager
def restartable() -> Iterator[tuple[SimulatedEngine, Callable[[], None]]]:
    """Yield an engine, and what stops it and starts another one at the same address, as a supervisor does."""
    with contextlib.ExitStack() as stack:
        running = contextlib.ExitStack()
        stack.callback(lambda: running.close())
        engine = running.enter_context(SimulatedEngine(Options(clock=CLOCK)))
        port = engine.port

        def restart() -> None:
            nonlocal running
            running.close()
            running = contextlib.ExitStack()
            running.enter_context(SimulatedEngine(Options(clock=CLOCK, port=port)))

        yield engine, restart


@pytest.mark.fault("no false green", "an engine is restarted between two rounds of a launch")
def test_a_restart_between_rounds_makes_a_launch_invalid(attempts) -> None:
    for chance in attempts(quick=2, full=20):
        number = chance.choice([1, 2])
        with restartable() as (engine, restart):

            def behind(text: str, restart=restart, line=f"round {number}/") -> None:
                if text.startswith(line):
                    restart()

            launch = measured(engine, behind, rounds=3)
        said = "\n".join(launch.invalid)
        assert re.search(rf"the engine was restarted between round {number}|between round \d and", said), said
        assert "a launch is one start of an engine" in said


@pytest.mark.fault("no false green", "an engine is restarted between the warm-up and the first round")
def test_a_restart_behind_the_warm_up_makes_a_launch_invalid(monkeypatch) -> None:
    warm_up = launches.Player.warm_up
    with restartable() as (engine, restart):

        def then_restarted(player: launches.Player) -> list[str]:
            reasons = warm_up(player)
            restart()
            return reasons

        monkeypatch.setattr(launches.Player, "warm_up", then_restarted)
        launch = measured(engine, rounds=2)
    assert "the engine was restarted between the warm-up and round 1" in "\n".join(launch.invalid)


def answer(tokens: int, **more: float) -> telemetry.Scrape:
    lines = [f"vllm:generation_tokens_total {tokens}", *(f"{name} {value}" for name, value in more.items())]
    return read_scrape("\n".join(["# TYPE vllm:generation_tokens_total counter", *lines]))


def test_a_process_of_another_beginning_is_no_same_engine() -> None:
    old, new = answer(50, process_start_time_seconds=100), answer(90, process_start_time_seconds=170)
    assert "was restarted between round 2 and 3" in (restarted(old, new, "round 2 and 3") or "")
    older = restarted(new, answer(9000, process_start_time_seconds=100), "round 2 and 3") or ""
    assert older.startswith("between round 2 and 3, ")
    assert "more than one engine" in older


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        (None, answer(5)),
        (answer(5), read_scrape("")),
        (answer(5), answer(5)),
        (answer(5), answer(500)),
        (answer(5), read_scrape("# TYPE vllm:generation_tokens_total counter\nvllm:generation_tokens_total NaN\nx 1\n")),
    ],
    ids=["no earlier answer", "no later answer", "nothing has happened", "others had their turn", "not a number"],
)
def test_what_proves_no_restart_is_none(earlier, later) -> None:
    assert restarted(earlier, later, "round 1 and 2") is None


@pytest.mark.parametrize(
    ("counted", "is_foreign"), [(None, False), (100, False), (118, False), (119, True), (1000, True), (0, False)]
)
def test_some_probes_are_no_load(counted, is_foreign) -> None:
    assert bool(foreign(counted, Caused(requests=100))) == is_foreign
    assert foreign(counted, None) is None
