"""GPUs, simulated: memory of each rank, what is wrong with a GPU, who has which, and what is left behind."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
from contextlib import ExitStack

import pytest

from pytest_llmperf.measure.gpus.device import Gpu
from pytest_llmperf.measure.gpus.leases import Locks, host_turn, lease
from pytest_llmperf.testing import Example, nvml
from tests.conftest import SERVING
from tests.processes import marked, wait_until

CASE = "test_it.py::test_serving[tiny-tp1-c8]"

SHORT = "prompt_tokens=16, output_tokens=6, requests=8"

# What waits for a GPU to get well, or for memory to come back, does not wait here.
AT_ONCE = """
import pytest
from pytest_llmperf.measure import launch
from pytest_llmperf.measure.gpus import tenancy
from pytest_llmperf.run import pool
from pytest_llmperf.testing import gpus, nvml

launch.CALM_S = tenancy.RELEASE_S = pool.PATIENCE_S = 0.0

@pytest.fixture
def conditions():
    nvml.forget()
    yield gpus.set_conditions
"""


@pytest.fixture
def state(tmp_path):
    """The folder of the simulated GPUs, which the run shares with the test."""
    folder = tmp_path / "state"
    folder.mkdir()
    return folder


def say(state, conditions):
    (state / "conditions.json").write_text(json.dumps(conditions))


def metric(case, name):
    return next(row for row in case["verdict"]["metrics"] if row["metric"] == name)


# --------------------------------------------------------------------------------------------------------------- memory


RANKS = f"""
import pytest

@pytest.mark.llmperf(tp=2)
def test_compared(llmperf, baseline):
    assert llmperf({SHORT}) == baseline

@pytest.mark.llmperf(tp=2)
def test_equal(llmperf):
    assert llmperf({SHORT}).gpu_memory.is_equal(rel=0.02)
"""


def test_a_rank_with_more_memory_fails_assertion_and_comparison(run):
    recorded = run(RANKS, "--update-baselines", "--llmperf-launches=2")
    assert recorded.outcomes == {"passed": 2}, recorded.stdout
    result = run(RANKS, "--llmperf-engine-args=--sim-extra-memory-gib 0,4")
    assert result.outcomes == {"failed": 2}, result.stdout
    assert "rank 0 on GPU 0: 16.00 GiB, rank 1 on GPU 1: 20.00 GiB; rank 1 holds 4.00 GiB (25.0%) more than the other" in (
        result.stdout
    )
    assert result.statuses["test_it.py::test_compared[tiny-tp2-c8]"] == "REGRESSED"
    compared = next(case for case in result.cases if "test_compared" in case["id"])
    assert (metric(compared, "gpu_memory_peak_bytes")["status"], metric(compared, "gpu_memory_balance_ratio")["status"]) == (
        "REGRESSED",
        "REGRESSED",
    )


# -------------------------------------------------------------------------------------------------------------- trouble


TROUBLES = {
    "hot": (
        {"reasons": 0x40, "times": 2, "temperature_c": 91},
        r"GPU 0: thermal slow-down in \d+% of the samples, 91 degrees .*",
    ),
    "brake": ({"reasons": 0x80, "times": 2}, r"GPU 0: power brake in \d+% of the samples, 51 degrees at most"),
    "foreign": ({"foreign": 1}, r"GPU 0 is used by another process: pid 1 \(.+\), 2\.0 GiB"),
    "xid": ({"xid": 94}, r"GPU 0: XID 94"),
    "ecc": ({"ecc": 3}, r"GPU 0: 3 memory errors that ECC could not correct"),
}


def test_trouble_that_passes_costs_a_round_and_leaves_a_warning(run):
    tests = (
        f"def test_{name}(llmperf, conditions):\n    conditions({{'0': {said}}})\n    llmperf({SHORT})\n"
        for name, (said, _) in TROUBLES.items()
    )
    result = run({"conftest.py": AT_ONCE, "test_it.py": "\n".join(tests)}, "-rP")
    assert result.outcomes == {"passed": 5}, result.stdout
    notes = {re.findall(r"test_(\w+)\[", case["id"])[0]: case["notes"] for case in result.cases}
    again = {name: [one for one in notes[name] if "measured again" in one] for name in TROUBLES}
    for name, (_, text) in TROUBLES.items():
        assert len(again[name]) == 1, notes
        assert re.fullmatch(f"a round was measured again: {text}", again[name][0]), again[name]
        assert f"\n{again[name][0]}\n" in result.stdout
        assert again[name][0].replace("a round was measured again", "round dropped") in result.stdout


def test_what_stays_is_invalid_with_its_reason_and_never_a_baseline(run, tmp_path, state):
    say(state, {"*": {"reasons": 0x40}})
    result = run(
        {"conftest.py": AT_ONCE, "test_it.py": SERVING},
        "--update-baselines",
        "--llmperf-launches=1",
        LLMPERF_SIMULATED_STATE=str(state),
    )
    assert result.outcomes == {"failed": 1}
    assert result.statuses == {CASE: "INVALID"}
    assert "INVALID: GPU 0: thermal slow-down in 100% of the samples, 51 degrees at most" in result.stdout
    assert "0 compared, 1 not compared (1 INVALID)" in result.stdout
    assert not (tmp_path / "baselines").exists()


def test_gpus_that_others_use_are_invalid_after_the_startup_timeout(run, state):
    say(state, {"*": {"foreign": 1_000_000}})
    how = ("--llmperf-startup-timeout=0.2", "--update-baselines")
    result = run(SERVING, *how, LLMPERF_SIMULATED_STATE=str(state), LLMPERF_SIMULATED_GPUS="1")
    assert result.outcomes == {"error": 1}
    assert result.statuses == {CASE: "INVALID"}
    why = r"GPU 0 is used by pid 1 \(.+\), 2\.0 GiB"
    assert re.search(rf"{why}\. Waited 0\.2 s\. End what uses it, or leave it out with CUDA_VISIBLE_DEVICES\.", result.stdout), (
        result.stdout
    )
    assert re.search(rf"\nllmperf: waiting: {why}\n", result.stdout), result.stdout
    assert result.engine_starts == 0


def test_a_gpu_that_keeps_its_memory_gets_no_other_engine(run, state):
    source = f"""
import pytest

def test_leaks(llmperf, conditions):
    llmperf({SHORT})
    conditions({{"0": {{"used_bytes": 5 << 30}}}})

@pytest.mark.llmperf(engine_args={{"max_num_seqs": 16}})
def test_next(llm_engine):
    assert llm_engine.gpus == (1,)

@pytest.mark.llmperf(tp=2)
def test_needs_both(llm_engine):
    pass
"""
    host = {"LLMPERF_SIMULATED_GPUS": "2", "LLMPERF_SIMULATED_STATE": str(state)}
    result = run({"conftest.py": AT_ONCE, "test_it.py": source}, "-v", **host)
    assert result.outcomes == {"passed": 2, "error": 2}, result.stdout
    left = "GPU 0 still has 5.0 GiB more in use than before its engine, and the driver names no process that has it."
    assert "ERROR at teardown of test_leaks[tiny-tp1-c8]" in result.stdout
    assert f"{left} It gets no other engine until that is free." in result.stdout
    assert "ERROR at setup of test_needs_both[tiny-tp2-c8]" in result.stdout
    assert f"quarantine: {left} Waited 0 s." in result.stdout


@pytest.mark.parametrize(("options", "errors"), [((), {"test_x"}), (("-x",), {"test_a_sweep"})], ids=["all", "exitfirst"])
def test_a_kept_engine_is_stopped_in_the_last_tests_teardown(run, state, options, errors):
    source = f"""
import pytest

@pytest.mark.llmperf(tp=[1, 2])
def test_a_sweep(llmperf_sweep, conditions):
    llmperf_sweep({SHORT})
    conditions({{"1": {{"used_bytes": 5 << 30}}}})
    raise ValueError("not a limit that was missed: there is no second launch")

@pytest.mark.llmperf(tp=2)
def test_x(llm_engine):
    pass
"""
    host = {"LLMPERF_SIMULATED_GPUS": "2", "LLMPERF_SIMULATED_STATE": str(state)}
    result = run({"conftest.py": AT_ONCE, "test_it.py": source}, "-v", *options, **host)
    assert result.engine_starts == 2, result.stdout
    assert set(re.findall(r"ERROR at teardown of (\w+)", result.stdout)) == errors
    assert result.outcomes["failed"] == 1


# ----------------------------------------------------------------------------------------------------------------- whose


def test_an_engine_sees_its_leased_gpus_and_their_power_is_measured(run, state):
    say(state, {"0": {"foreign": 1_000_000}})
    source = f"""
import os
from pathlib import Path
import psutil
import pytest

@pytest.mark.llmperf(tp=2)
def test_x(llm_engine, llmperf):
    assert llm_engine.gpus == (1, 2)
    engine, = Path(os.environ["LLMPERF_SIMULATED_STATE"]).glob("[0-9]*.json")
    environment = psutil.Process(int(engine.stem)).environ()
    assert (environment["CUDA_VISIBLE_DEVICES"], environment["CUDA_DEVICE_ORDER"]) == ("1,2", "PCI_BUS_ID")
    measured = llmperf({SHORT})
    assert measured.gpu_memory.per_rank == (16 << 30, 16 << 30)
    assert measured["gpu_memory_peak_bytes"] == 16 << 30
    assert measured["gpu_memory_balance_ratio"] == 1.0
    assert measured["gpu_utilization_ratio"] == 1.0
    assert measured["gpu_power_w"] == pytest.approx(2 * 696.598, rel=0.5)
    assert measured["energy_per_output_token_j"] > 0
    assert measured["gpu_sm_clock_mhz"] == 1590
    assert measured["gpu_power_capped_ratio"] == 1.0
    assert measured["gpu_temperature_c"] == 51
"""
    result = run(source, LLMPERF_SIMULATED_STATE=str(state))
    assert result.outcomes == {"passed": 1}, result.stdout


def test_without_gpus_what_gpus_do_is_missing_and_not_zero(run):
    source = f"""
import pytest

def test_x(llm_engine, llmperf):
    assert llm_engine.gpus == ()
    measured = llmperf({SHORT})
    for name in ("gpu_power_w", "energy_per_output_token_j", "gpu_utilization_ratio", "gpu_memory_peak_bytes"):
        with pytest.raises(KeyError, match="was not measured by this engine"):
            measured[name]
    with pytest.raises(KeyError, match="the GPU memory of the engine was not measured: it has no GPU"):
        measured.gpu_memory.is_equal()
"""
    result = run(source, LLMPERF_SIMULATED_GPUS="0")
    assert result.outcomes == {"passed": 1}, result.stdout
    assert all(value is None for name, value in result.cases[0]["launches"][0]["metrics"].items() if name.startswith("gpu_"))


MEETING = """
import os, time
from pathlib import Path
import pytest

HERE = Path(__file__).parent

@pytest.mark.parametrize("name", ["one", "other"])
def test_meets(llm_engine, name):
    (HERE / name).write_text(str(llm_engine.gpus))
    deadline = time.monotonic() + 20
    while not all((HERE / one).exists() for one in ("one", "other")):
        assert time.monotonic() < deadline, "the other engine did not come"
        time.sleep(0.01)  # a poll with a deadline
"""


def test_engines_that_share_the_host_run_on_different_gpus_at_once(run, tmp_path, state):
    result = run(MEETING, "-n", "2", "--llmperf-exclusive=off", LLMPERF_SIMULATED_STATE=str(state))
    assert result.outcomes == {"passed": 2}, result.stdout
    assert {(tmp_path / name).read_text() for name in ("one", "other")} == {"(0,)", "(1,)"}


TURNS = """
import os
from pathlib import Path
import pytest

@pytest.mark.parametrize("number", range(6))
def test_takes_its_turn(llm_engine, number):
    engines = [path.stem for path in Path(os.environ["LLMPERF_SIMULATED_STATE"]).glob("[0-9]*.json")]
    with (Path(__file__).parent / "turns").open("a") as file:
        file.write(f"{os.environ['PYTEST_XDIST_WORKER']} {llm_engine.gpus} {len(engines)}\\n")
"""


def test_by_default_engines_of_two_workers_run_one_after_the_other(run, tmp_path, state):
    result = run(TURNS, "-n", "2", LLMPERF_SIMULATED_STATE=str(state))
    assert result.outcomes == {"passed": 6}, result.stdout
    turns = [line.split(" ", 1) for line in (tmp_path / "turns").read_text().splitlines()]
    workers = [worker for worker, _ in turns]
    assert workers == sorted(workers, key=workers.index)  # one worker's tests, and then the other's
    assert set(workers) == {"gw0", "gw1"}
    assert {rest for _, rest in turns} == {"(0,) 1"}


def test_missing_links_and_lowered_power_limits_are_warnings(run, state):
    say(state, {"*": {"links": 0}, "1": {"links": 0, "power_limit_w": 450}})
    source = f"""
import pytest

@pytest.mark.llmperf(tp=[1, 2])
def test_x(llmperf):
    llmperf({SHORT})
"""
    result = run(source, LLMPERF_SIMULATED_STATE=str(state))
    assert result.outcomes == {"passed": 2}, result.stdout
    found = {case["engine"]["tp"]: case["launches"][0]["warnings"] for case in result.cases}
    linked = {tp: [one for one in warnings if "direct links" in one] for tp, warnings in found.items()}
    assert linked[1] == []
    assert len(linked[2]) == 1
    assert linked[2][0].startswith("TP 2 over GPUs 0, 1, which direct links (NVLink) do not join")
    lowered = {tp: [one for one in warnings if "power limit" in one] for tp, warnings in found.items()}
    assert lowered[1] == []  # it runs on GPU 0
    assert "power limit lowered: GPU 1 (450 W, by default 700 W)" in lowered[2][0]


def test_every_rank_of_pp_and_dp_has_a_gpu_in_order(run, state):
    say(state, {"1": {"foreign": 1_000_000}})
    source = f"""
import pytest

@pytest.mark.llmperf(tp=2, pp=2, engine_args={{"sim_extra_memory_gib": "0,1,2,3"}})
def test_pipeline(llm_engine, llmperf):
    assert llm_engine.gpus == (0, 2, 3, 4)
    assert llmperf({SHORT}).gpu_memory.per_rank == (16 << 30, 17 << 30, 18 << 30, 19 << 30)

@pytest.mark.llmperf(dp=2)
def test_replicas(llm_engine, llmperf):
    assert llm_engine.gpus == (0, 2)
    assert llmperf({SHORT}).gpu_memory.per_rank == (16 << 30, 16 << 30)
"""
    result = run(source, LLMPERF_SIMULATED_STATE=str(state))
    assert result.outcomes == {"passed": 2}, result.stdout
    ranks = [[(one["rank"], one["gpu"]) for one in case["launches"][0]["memory"]] for case in result.cases]
    assert sorted(ranks) == [[(0, 0), (1, 2)], [(0, 0), (1, 2), (2, 3), (3, 4)]]
    assert not [one for case in result.cases for one in case["launches"][0]["warnings"] if "direct links" in one]


# Both workers are inside their first round at the same instant, and inside their second one.
TOGETHER = """
import os
import time
from pathlib import Path

from pytest_llmperf.measure import launch
from pytest_llmperf.measure.gpus.sampling import RoundWatch

launch.CALM_S = 0.0  # a stranger would be INVALID at once
HERE, ME = Path(__file__).parent, os.environ.get("PYTEST_XDIST_WORKER")
enter, rounds = RoundWatch.__enter__, []

def enter_with_the_other(self):
    entered = enter(self)
    rounds.append(self)
    if len(rounds) <= 2:
        (HERE / f"{ME}-{len(rounds)}").touch()
        deadline = time.monotonic() + 20
        while len(list(HERE.glob(f"gw?-{len(rounds)}"))) < 2:
            assert time.monotonic() < deadline, "the other worker plays no round"
            time.sleep(0.01)  # a poll with a deadline
    return entered

RoundWatch.__enter__ = enter_with_the_other
"""


def test_engines_of_one_run_are_no_strangers_to_one_another(run, tmp_path, state):
    source = f"""
import pytest

@pytest.mark.parametrize("name", ["one", "other"])
def test_x(llmperf, name):
    llmperf({SHORT})
"""
    files = {"conftest.py": TOGETHER, "test_it.py": source}
    result = run(files, "-n", "2", "--llmperf-exclusive=off", LLMPERF_SIMULATED_STATE=str(state))
    assert result.outcomes == {"passed": 2}, result.stdout
    assert {path.name for path in tmp_path.glob("gw?-?")} == {"gw0-1", "gw0-2", "gw1-1", "gw1-2"}
    assert set(result.statuses.values()) == {"MEASURED"}
    launches = [launch for case in result.cases for launch in case["launches"]]
    assert [launch["invalid"] for launch in launches] == [[], []]
    assert {rank["gpu"] for launch in launches for rank in launch["memory"]} == {0, 1}
    # Of what else a launch may warn (a host that is slow today) this is no test.
    assert not [one for launch in launches for one in launch["warnings"] if "GPU" in one or "round" in one]


@pytest.fixture
def waiting(tmp_path, state):
    """Start a run that waits for what this process has, and return it when its output says that it waits."""
    children = []

    def start(says):
        project = Example({"test_it.py": SERVING}, ("--llmperf-engine=simulated", "--update-baselines"))
        project.write(tmp_path)
        named = {"LLMPERF_TEST_MARK": str(tmp_path), "LLMPERF_SIMULATED_STATE": str(state), "LLMPERF_SIMULATED_GPUS": "1"}
        with (tmp_path / "output").open("w") as output:
            child = subprocess.Popen(
                project.command(tmp_path, "-v"),
                cwd=tmp_path,
                env={**os.environ, **named, "PYTHONUNBUFFERED": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
                # A shell has its background jobs ignore it, and so would all that they start.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        children.append(child)
        assert wait_until(lambda: says in (tmp_path / "output").read_text(), 30), (tmp_path / "output").read_text()
        return child

    yield start
    for child in children:
        child.kill()
        child.wait()
    for process in marked(tmp_path):
        process.kill()


def is_free(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


@pytest.mark.parametrize(
    ("what", "says", "locks"),
    [
        ("GPU", "waiting for GPUs that other engines have", {"host", "queue"}),
        ("host", "waiting for another run's engine to end", {"turn"}),
    ],
)
def test_ctrl_c_ends_a_waiting_run_and_leaves_no_lock(waiting, tmp_path, state, what, says, locks):
    ours, name = Locks(state, lambda text: None), nvml.nvmlDeviceGetUUID(0)
    with ExitStack() as held:
        if what == "GPU":
            held.enter_context(lease([Gpu(0, name, "Simulated", 1)], 1, ours, unfit=lambda gpus: {}))
        else:
            held.enter_context(host_turn(ours, alone=True))
        child = waiting(says)
        theirs = {path.stem for path in state.glob("*.lock") if not is_free(path)} - {name if what == "GPU" else "host"}
        assert theirs == locks  # else there were none to leave
        child.send_signal(signal.SIGINT)
        assert child.wait(15) == 2
        output = (tmp_path / "output").read_text()
        assert "KeyboardInterrupt" in output
        assert ": starting" not in output
        assert wait_until(lambda: not marked(tmp_path), 15), marked(tmp_path)
    assert [path.name for path in state.glob("*.lock") if not is_free(path)] == []
