"""Whose turn it is on the GPUs, and which GPUs get no engine, over the simulated GPUs."""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from pytest_llmperf.measure.engines.engine import EngineError
from pytest_llmperf.measure.gpus import leases, tenancy
from pytest_llmperf.measure.gpus.device import AcceleratorError
from pytest_llmperf.measure.gpus.tenancy import Tenancy
from pytest_llmperf.measure.gpus.watch import GpuWatch
from pytest_llmperf.measure.host.machine import describe_host
from pytest_llmperf.testing import gpus as simulated
from pytest_llmperf.testing import nvml

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pytest_llmperf.measure.host.machine import Host

GIB = 1 << 30


class Waits(Exception):  # noqa: N818  # it is no error: what would be waited for
    """Says that something would be waited for, which nothing in this process would end."""


def waits(text: str) -> None:
    raise Waits(text)


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of two simulated GPUs, where nothing is waited for."""
    monkeypatch.setenv(simulated.STATE, str(tmp_path))
    monkeypatch.setenv(simulated.NUMBER, "2")
    nvml.forget()
    monkeypatch.setattr(tenancy, "RELEASE_S", 0.0)
    monkeypatch.setattr("pytest_llmperf.measure.gpus.watch.POLL_S", 0.0)
    monkeypatch.setattr(leases, "POLL_S", 0.0)


@pytest.fixture
def run() -> Iterator[Callable[..., Tenancy]]:
    """Return a function that makes the tenancy of one more run on the machine as it is now."""
    with ExitStack() as stack:

        def begin(host: Host | None = None, *, alone: bool = False, waiting: Callable[[str], None] = waits) -> Tenancy:
            tenant = Tenancy(host or describe_host(simulated=True), alone=alone, patience_s=0.0, waiting=waiting)
            stack.callback(tenant.close)
            return tenant

        yield begin


def turn(of: Tenancy, ranks: int = 1) -> tuple[int, ...] | None:
    """The GPUs that an engine of so many ranks gets now; it ends at once."""
    with of.turn(ranks, simulated=True) as watch:
        return None if watch is None else indices(watch)


def indices(watch: GpuWatch | None) -> tuple[int, ...]:
    assert watch is not None
    return tuple(gpu.index for gpu in watch.gpus)


def leak(gpu: int, gib: float) -> None:
    """Have memory of a GPU in use, of no process."""
    simulated.set_conditions({str(gpu): {"used_bytes": int(gib * GIB)}})


# --------------------------------------------------------------------------------------------------------------- turns


def test_an_engine_gets_one_gpu_for_each_rank(run):
    assert (turn(run()), turn(run(), 2)) == ((0,), (0, 1))


def test_a_host_without_gpus_has_turns_too_and_nothing_to_watch(run, monkeypatch):
    monkeypatch.setenv(simulated.NUMBER, "0")
    assert turn(run()) is None


def test_two_runs_that_do_not_mind_neighbours_have_different_gpus(run):
    with run().turn(1, simulated=True) as first, run().turn(1, simulated=True) as second:
        assert (indices(first), indices(second)) == ((0,), (1,))


def test_a_run_that_wants_the_host_alone_waits_for_other_engines(run):
    with (
        run().turn(1, simulated=True),
        pytest.raises(Waits, match=r"^waiting for another run's engine to end \(process \d+ has it\)$"),
    ):
        turn(run(alone=True))


def test_the_engine_of_a_run_alone_on_the_host_is_waited_for(run):
    with (
        run(alone=True).turn(1, simulated=True),
        pytest.raises(Waits, match=r"^waiting for another run's engine to end \(process \d+ has it\)$"),
    ):
        turn(run())


def test_on_a_host_without_gpus_engines_take_turns_whatever_they_mind(run, monkeypatch):
    monkeypatch.setenv(simulated.NUMBER, "0")
    with (
        run().turn(1, simulated=True),
        pytest.raises(Waits, match=r"^waiting for another run's engine to end \(process \d+ has it\)$"),
    ):
        turn(run())


def test_gpus_that_other_runs_have_are_waited_for(run):
    with run().turn(2, simulated=True), pytest.raises(Waits, match=r"^waiting for GPUs that other engines have$"):
        turn(run())


# ---------------------------------------------------------------------------------------------------------- unfit GPUs


def test_a_gpu_that_another_process_uses_is_left_to_it(run):
    simulated.set_conditions({"0": {"foreign": 100}})
    assert turn(run()) == (1,)


def test_where_every_gpu_is_used_the_processes_are_named_with_the_remedy(run):
    simulated.set_conditions({"*": {"foreign": 100}})
    with pytest.raises(EngineError) as error:
        turn(run(waiting=lambda text: None))
    assert re.fullmatch(
        r"GPU 0 is used by pid 1 \(.+\), 2\.0 GiB; GPU 1 is used by pid 1 \(.+\), 2\.0 GiB\. Waited 0 s\."
        r" End what uses it, or leave it out with CUDA_VISIBLE_DEVICES\.",
        str(error.value),
    )


def test_a_gpu_whose_memory_an_unknown_user_holds_is_not_idle(run):
    leak(0, 20)
    assert turn(run()) == (1,)
    with pytest.raises(EngineError) as error:
        turn(run(), 2)
    assert str(error.value) == (
        "GPU 0 has 20.6 GiB in use, and the driver names no process that has it. Waited 0 s. End what uses it, or leave it out"
        " with CUDA_VISIBLE_DEVICES."
    )


def test_the_drivers_own_memory_is_no_use(run):
    leak(0, 1)
    assert turn(run()) == (0,)


# ---------------------------------------------------------------------------------------------------------- quarantine


@pytest.fixture
def leaky(run) -> Tenancy:
    """A run of which an engine on GPU 0 has left memory behind."""
    tenant: Tenancy = run()
    with pytest.raises(EngineError) as error, tenant.turn(1, simulated=True):
        leak(0, 4)
    assert str(error.value) == (
        "GPU 0 still has 4.0 GiB more in use than before its engine, and the driver names no process that has it."
        " It gets no other engine until that is free."
    )
    return tenant


def test_a_gpu_without_its_memory_back_gets_no_other_engine(leaky):
    assert turn(leaky) == (1,)


def test_a_gpu_in_quarantine_that_is_needed_is_named(leaky):
    with pytest.raises(EngineError) as error:
        turn(leaky, 2)
    assert str(error.value) == (
        "quarantine: GPU 0 still has 4.0 GiB more in use than before its engine, and the driver names no process that has it."
        " Waited 0 s. End what uses it, or leave it out with CUDA_VISIBLE_DEVICES."
    )


def test_a_gpu_leaves_quarantine_when_its_memory_is_back(leaky):
    leak(0, 0)
    assert turn(leaky) == (0,)


def test_a_gpu_does_not_leave_quarantine_because_it_tells_nothing(leaky, monkeypatch):
    monkeypatch.delattr(nvml, "nvmlDeviceGetMemoryInfo")
    assert turn(leaky) == (1,)


def test_the_engines_failure_is_not_hidden_by_memory_left_behind(run):
    tenant = run()

    def end() -> None:
        leak(0, 4)
        raise EngineError("The engine ended")

    with pytest.raises(EngineError, match=r"^The engine ended$"), tenant.turn(1, simulated=True):
        end()
    assert turn(tenant) == (1,)


def test_gpus_that_cannot_be_read_after_their_engine_are_in_quarantine(run, monkeypatch):
    tenant = run()

    def no_answer(watch: GpuWatch, within_s: float) -> dict[str, str]:
        raise AcceleratorError("NVML: GPU 0 does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(GpuWatch, "wait_until_released", no_answer)
        with pytest.raises(EngineError) as error:
            turn(tenant)
    assert str(error.value) == (
        "GPU 0 may still be in use: NVML: GPU 0 does not answer. It gets no other engine until that is free."
    )


# -------------------------------------------------------------------------------------------------------------- no turn


def test_more_ranks_than_gpus_are_an_engine_error(run):
    with pytest.raises(EngineError, match=r"^4 GPUs are needed, and this run may use 2\.$"):
        turn(run(), 4)


def test_a_driver_that_went_away_since_the_run_began_is_told(run, monkeypatch):
    tenant = run()
    monkeypatch.setenv(simulated.NUMBER, "0")
    with pytest.raises(EngineError) as error:
        turn(tenant)
    assert str(error.value) == "The accelerators that this run began with are gone: their driver does not answer."


def test_a_gpu_that_went_away_since_the_run_began_is_named(run, monkeypatch):
    tenant = run()
    monkeypatch.setenv(simulated.NUMBER, "1")
    with pytest.raises(EngineError) as error:
        turn(tenant)
    assert str(error.value) == (
        "GPU 1 (GPU-51000000-0000-0000-0000-000000000001) is gone since this run began; the driver's own tools should tell more."
    )


def test_an_engine_gets_some_of_the_gpus_that_are_asked_for(run):
    tenant = run()
    with tenant.turn(1, describe_host(simulated=True).devices[1:], simulated=True) as watch:
        assert indices(watch) == (1,)


def test_a_gpu_waited_for_in_vain_is_not_waited_for_again(run):
    leak(0, 20)
    texts: list[str] = []
    tenant = Tenancy(describe_host(simulated=True), alone=False, patience_s=0.01, waiting=texts.append)
    try:
        for patience in ("0.01", "0"):
            with pytest.raises(EngineError, match=rf"Waited {patience} s"):
                turn(tenant, 2)
        simulated.set_conditions({})
        assert turn(tenant, 2) == (0, 1)
        leak(0, 20)
        with pytest.raises(EngineError, match=r"Waited 0\.01 s"):
            turn(tenant, 2)
    finally:
        tenant.close()


def test_a_driver_that_does_not_answer_for_a_gpu_is_told(run, monkeypatch):
    tenant = run()

    def lost(index: int) -> int:
        raise nvml.NVMLError(10)

    monkeypatch.setattr(nvml, "nvmlDeviceGetHandleByIndex", lost)
    with pytest.raises(EngineError) as error:
        turn(tenant)
    assert str(error.value).startswith("GPU 0 (GPU-51000000-0000-0000-0000-000000000000, Timeout), GPU 1 (")
    assert str(error.value).endswith(" is gone since this run began; the driver's own tools should tell more.")


def test_lock_files_that_cannot_be_opened_are_an_engine_error(run, tmp_path):
    (tmp_path / "host.lock").symlink_to(tmp_path / "host.lock")
    with pytest.raises(EngineError, match=r"host\.lock, the lock that keeps two engines apart, is no plain file"):
        turn(run())


def test_a_run_can_be_closed_twice(run):
    tenant = run()
    turn(tenant)
    tenant.close()
    tenant.close()
    assert turn(tenant) == (0,)


def test_a_run_keeps_to_the_gpus_that_it_may_use(run):
    host = describe_host(simulated=True)
    assert turn(run(replace(host, devices=host.devices[1:]))) == (1,)
