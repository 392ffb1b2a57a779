"""No engine outlives its run: whatever is killed, when, and by which signal."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING

import psutil
import pytest

from pytest_llmperf.testing import SimulatedEngine
from tests.chaos.background import LONG, PATIENCE_S, Background
from tests.processes import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.faults import Attempts

PROMISE = "no engine outlives the run"
STUBBORN = "--llmperf-engine-args=--sim-stop-s inf --sim-children 2"
SOON = "--llmperf-stop-grace=1"

Start = "Callable[..., Background]"


@pytest.fixture
def background(tmp_path: Path) -> Iterator[Callable[..., Background]]:
    """Start runs in the background, each in a folder of its own."""
    runs: list[Background] = []

    def start(*args: str, source: str = LONG, **how: str) -> Background:
        run = Background(tmp_path / str(len(runs)), source, *args, **how)
        runs.append(run)
        return run

    yield start
    for run in runs:
        run.close()


def signalled(run: Background, *numbers: int, between_s: float = 0.2) -> float:
    """Send pytest these signals, and return when the first one was sent."""
    began_s = time.monotonic()
    for number in numbers:
        run.pytest.send_signal(number)
        time.sleep(between_s if len(numbers) > 1 else 0)
    return began_s


@pytest.mark.fault(PROMISE, "SIGKILL of pytest at a random moment")
def test_sigkill_of_pytest_at_a_random_moment(background: Callable[..., Background], attempts: Attempts) -> None:
    for chance in attempts(quick=3, full=40):
        run = background(*chance.choice(((), (STUBBORN, SOON))))
        time.sleep(chance.uniform(0.2, 3.0))
        attempts.took(run.gone_after_s(signalled(run, signal.SIGKILL)))


@pytest.mark.parametrize(
    ("fault", "numbers"),
    [
        pytest.param(name, numbers, marks=pytest.mark.fault(PROMISE, f"{name} in a round", full=later), id=name)
        for name, numbers, later in (
            ("Ctrl-C", (signal.SIGINT,), False),
            ("Ctrl-C twice", (signal.SIGINT, signal.SIGINT), True),
            ("SIGTERM", (signal.SIGTERM,), False),
            ("SIGHUP", (signal.SIGHUP,), True),
        )
    ],
)
def test_a_signal_to_pytest_in_a_round(
    background: Callable[..., Background], attempts: Attempts, fault: str, numbers: tuple[int, ...]
) -> None:
    for chance in attempts(quick=1, full=3):
        run = background()
        run.until_in_a_round()
        time.sleep(chance.uniform(0, 1.0))
        attempts.took(run.gone_after_s(signalled(run, *numbers)))
        assert run.pytest.wait(PATIENCE_S) in (2, -numbers[0])


@pytest.mark.fault(PROMISE, "os._exit in a test")
def test_os_exit_in_a_test(background: Callable[..., Background], attempts: Attempts) -> None:
    source = "import os\n" + LONG.replace("output_tokens=1900", "output_tokens=2") + "    print('bye')\n    os._exit(3)\n"
    for _ in attempts(quick=1, full=3):
        run = background("-s", source=source)
        run.until("bye")
        attempts.took(run.gone_after_s(time.monotonic()))
        assert run.pytest.wait(PATIENCE_S) == 3


@pytest.mark.parametrize(
    "who",
    [
        pytest.param(
            who, marks=pytest.mark.fault(PROMISE, f"SIGKILL of {words} in a round", full=who in ("outer", "inner")), id=who
        )
        for who, words in {
            "load": "the load process",
            "engine": "the engine",
            "outer": "the outer supervisor",
            "inner": "the inner supervisor",
            "both": "both supervisors",
        }.items()
    ],
)
def test_sigkill_of_another_process_in_a_round(background: Callable[..., Background], attempts: Attempts, who: str) -> None:
    """The test fails at once, and pytest ends by itself."""
    for chance in attempts(quick=1, full=3):
        run = background(STUBBORN, SOON)
        run.until_in_a_round()
        time.sleep(chance.uniform(0, 1.0))
        outer, inner = run.supervisors()
        victims = {"load": [run.load()], "engine": [run.engine()], "outer": [outer], "inner": [inner], "both": [outer, inner]}[
            who
        ]
        began_s = time.monotonic()
        for victim in victims:
            victim.kill()
        assert run.pytest.wait(PATIENCE_S) == 1
        attempts.took(run.gone_after_s(began_s))
        assert "INTERNALERROR" not in run.output
        words = {"load": "load process ended", "engine": "ended with signal SIGKILL"}.get(who, "its supervisor was killed")
        assert words in run.output


@pytest.mark.fault(PROMISE, "SIGKILL of a supervisor at a random moment")
def test_sigkill_of_a_supervisor_at_a_random_moment(background: Callable[..., Background], attempts: Attempts) -> None:
    """Start-up, warm-up, round or stop: pytest ends soon, and says so where the engine was still needed."""
    source = LONG.replace("output_tokens=1900", "output_tokens=100")
    for chance in attempts(quick=1, full=12):
        run = background("--llmperf-engine-args=--sim-children 2 --sim-startup-s 0.5", SOON, source=source)
        assert wait_until(lambda run=run: len(run.processes("supervisor.py")) == 2, PATIENCE_S), run.output
        time.sleep(chance.uniform(0, 4.0))
        began_s = time.monotonic()
        for victim in run.processes("supervisor.py")[: chance.choice((1, 2))]:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
        assert run.pytest.wait(PATIENCE_S) in (0, 1), run.output
        attempts.took(run.gone_after_s(began_s))
        assert "INTERNALERROR" not in run.output


@pytest.mark.fault(PROMISE, "SIGKILL of both supervisors in a round, the server being a child of a shell that goes on serving")
def test_a_server_behind_a_shell_does_not_go_on_without_supervisors(
    background: Callable[..., Background], attempts: Attempts
) -> None:
    """The kernel ends the shell only; pytest would play its rounds to their end, for minutes."""
    command = "--llmperf-command=sh -c '{python} -m pytest_llmperf.testing --port {port} --host {host}; true'"
    source = LONG.replace("requests=16", "requests=128")
    for chance in attempts(quick=1, full=3):
        run = background(command, SOON, "--llmperf-exclusive=off", source=source, kind="command")
        run.until_in_a_round()
        time.sleep(chance.uniform(0, 1.0))
        began_s = time.monotonic()
        for supervisor in run.supervisors():
            supervisor.kill()
        assert run.pytest.wait(PATIENCE_S) == 1, run.output
        attempts.took(run.gone_after_s(began_s))
        assert "its supervisor was killed" in run.output


@pytest.mark.parametrize(
    "who",
    [
        pytest.param(
            who, marks=pytest.mark.fault(PROMISE, f"SIGKILL of {words} at once", full=who != "pytest outer inner"), id=who
        )
        for who, words in {
            "pytest outer": "pytest and the outer supervisor",
            "inner pytest": "the inner supervisor and pytest",
            "pytest outer inner": "pytest and both supervisors",
            "outer inner pytest": "both supervisors and pytest",
        }.items()
    ],
)
def test_sigkill_of_supervisors_and_pytest_at_once(background: Callable[..., Background], attempts: Attempts, who: str) -> None:
    for _ in attempts(quick=1, full=3):
        run = background(STUBBORN, SOON)
        run.until_in_a_round()
        outer, inner = run.supervisors()
        victims = {"pytest": run.pytest, "outer": outer, "inner": inner}
        began_s = time.monotonic()
        for name in who.split():
            victims[name].kill()
        attempts.took(run.gone_after_s(began_s))


@pytest.mark.fault(PROMISE, "SIGKILL of pytest and all that watch it at once; the next run")
def test_the_next_run_ends_what_nobody_is_left_to_end(background: Callable[..., Background], attempts: Attempts) -> None:
    for _ in attempts(quick=1, full=3):
        run = background(STUBBORN)
        run.until_in_a_round()
        for process in (*run.supervisors(), run.load()):
            process.suspend()  # so that none of them sees the end of another one
        for process in (*run.supervisors(), run.load()):
            process.kill()
        run.pytest.kill()
        run.pytest.wait()
        assert run.engine_processes()
        following = background(source=LONG.replace("output_tokens=1900", "output_tokens=2"), TMPDIR=str(run.temporary))
        began_s = time.monotonic()
        assert following.pytest.wait(60) == 0, following.output
        attempts.took(run.gone_after_s(began_s))


FORKED = """
import os, signal, time

def test_forks(llmperf):
    child = os.fork()
    if not child:
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        time.sleep(600)
        os._exit(0)
    print("child", child)
    llmperf(prompt_tokens=8, output_tokens={tokens}, requests=16)
"""


@pytest.mark.fault(PROMISE, "SIGKILL of pytest when a test has forked a child that lives on")
def test_a_forked_child_does_not_hold_the_engine(background: Callable[..., Background], attempts: Attempts) -> None:
    for _ in attempts(quick=1, full=3):
        run = background("-s", "-W", "ignore::DeprecationWarning", source=FORKED.format(tokens=1900))
        run.until(r"child \d+")
        child = int(run.output.rpartition("child ")[2].split()[0])
        attempts.took(run.gone_after_s(signalled(run, signal.SIGKILL), child))
        assert psutil.pid_exists(child)
        os.kill(child, signal.SIGKILL)


@pytest.mark.fault(PROMISE, "a test has forked a child that lives on, and the run ends normally", full=True)
def test_a_forked_child_does_not_hold_up_the_stop(background: Callable[..., Background], attempts: Attempts) -> None:
    for _ in attempts(quick=1, full=3):
        run = background("-s", "-W", "ignore::DeprecationWarning", source=FORKED.format(tokens=2))
        run.until(r"child \d+")
        child = int(run.output.rpartition("child ")[2].split()[0])
        run.until("PASSED")
        began_s = time.monotonic()
        assert run.pytest.wait(PATIENCE_S) == 0, run.output
        attempts.took(run.gone_after_s(began_s, child))
        assert "could not be stopped" not in run.output
        os.kill(child, signal.SIGKILL)


@pytest.mark.fault(PROMISE, "a test has forked a child that lives on, and another engine is started; the same by the next run")
def test_a_forked_child_does_not_keep_the_locks(
    background: Callable[..., Background], attempts: Attempts, tmp_path: Path
) -> None:
    state = {"LLMPERF_SIMULATED_STATE": str(tmp_path / "state")}
    another = "\ndef test_next(llmperf):\n    llmperf(requests=8, output_tokens=2, engine_args='--max-num-seqs 4')\n"
    for _ in attempts(quick=1, full=3):
        run = background("-s", "-W", "ignore::DeprecationWarning", source=FORKED.format(tokens=2) + another, **state)
        run.until(r"child \d+")
        child = int(run.output.rpartition("child ")[2].split()[0])
        assert run.pytest.wait(60) == 0, run.output
        assert psutil.pid_exists(child)
        following = background(source=LONG.replace("output_tokens=1900", "output_tokens=2"), **state)
        assert following.pytest.wait(60) == 0, following.output
        assert "waiting" not in run.output + following.output
        os.kill(child, signal.SIGKILL)


@pytest.mark.fault(PROMISE, "SIGKILL of pytest in a round against a URL")
def test_nothing_is_sent_to_a_url_when_pytest_was_killed(background: Callable[..., Background], attempts: Attempts) -> None:
    source = LONG.replace("output_tokens=1900", "output_tokens=4000").replace(
        "requests=16", "warm_up={'requests': 256}"
    )  # minutes
    with SimulatedEngine() as engine:
        for chance in attempts(quick=1, full=3):
            run = background(f"--llmperf-url={engine.url}", source=source, kind="url")
            assert wait_until(lambda: requests_running(engine.url) > 0, 60), run.output
            time.sleep(chance.uniform(0, 1.0))
            began_s = signalled(run, signal.SIGKILL)
            assert wait_until(lambda: not requests_running(engine.url), PATIENCE_S)
            attempts.took(run.gone_after_s(began_s))


def requests_running(url: str) -> float:
    """Return how many requests an engine is working on."""
    import urllib.request

    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("vllm:num_requests_running"))


@pytest.mark.parametrize(
    "who",
    [
        pytest.param(who, marks=pytest.mark.fault(PROMISE, f"SIGKILL of {words} of xdist", full=who == "controller"), id=who)
        for who, words in {"controller": "the controller", "worker": "a worker"}.items()
    ],
)
def test_sigkill_under_xdist(background: Callable[..., Background], attempts: Attempts, who: str) -> None:
    for chance in attempts(quick=1, full=3):
        run = background("-n", "1", "--max-worker-restart=0")
        run.until_in_a_round()
        time.sleep(chance.uniform(0, 1.0))
        outer, _ = run.supervisors()
        worker = outer.parent()
        assert worker is not None
        assert worker.pid != run.pytest.pid
        began_s = time.monotonic()
        (run.pytest if who == "controller" else worker).kill()
        attempts.took(run.gone_after_s(began_s))
