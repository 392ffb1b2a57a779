"""What machine this is, with a stand-in for NVIDIA's library."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_llmperf.measure.host.machine import Host, core_groups, describe_host, has_bfloat16
from pytest_llmperf.plan.checks import PlanError

if TYPE_CHECKING:
    from collections.abc import Callable

GIB = 1 << 30
CPU = Host("AMD EPYC 9554 64-Core Processor", 2, 8 * GIB)
TWO_GPUS = Host("AMD EPYC 9554 64-Core Processor", 64, 512 * GIB, ("NVIDIA H200", "NVIDIA H200"), "580.1")

CARDS = (
    ("GPU-aaaa1111-0000", "NVIDIA H200"),
    ("GPU-aaaa2222-0000", "NVIDIA H100"),
    ("GPU-bbbb3333-0000", "NVIDIA L4"),
    ("GPU-cccc4444-0000", "NVIDIA A100"),
)


class NoDriverError(Exception):
    """Stands for pynvml.NVMLError."""

    value = 12


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a function that puts GPUs into the machine, or takes the driver out, and sets CUDA_VISIBLE_DEVICES."""

    def install(visible: str | None = None, *, cards: tuple[tuple[str, str], ...] = CARDS, driver: bool = True) -> Any:
        calls: list[str] = []

        def initialise() -> None:
            if not driver:
                raise NoDriverError("NVML Shared Library Not Found")
            calls.append("init")

        nvml = SimpleNamespace(
            NVMLError=NoDriverError,
            nvmlInit=initialise,
            nvmlShutdown=lambda: calls.append("shutdown"),
            nvmlSystemGetDriverVersion=lambda: "580.65.06",
            nvmlDeviceGetCount=lambda: len(cards),
            nvmlDeviceGetHandleByIndex=lambda index: index,
            nvmlDeviceGetUUID=lambda handle: cards[handle][0],
            nvmlDeviceGetName=lambda handle: cards[handle][1],
            calls=calls,
        )
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        return nvml

    return install


def gpus() -> list[str]:
    return [name.removeprefix("NVIDIA ") for name in describe_host().gpus]


# ------------------------------------------------------------------------------------------------ which GPUs are visible


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, ["H200", "H100", "L4", "A100"]),
        ("0,1,2,3", ["H200", "H100", "L4", "A100"]),
        ("2,0", ["L4", "H200"]),
        (" 1 , 3 ", ["H100", "A100"]),
        ("GPU-bbbb3333-0000", ["L4"]),
        ("GPU-bbbb,GPU-aaaa1", ["L4", "H200"]),
        ("GPU-cccc,0", ["A100", "H200"]),
        ("", []),
        ("  ", []),
        ("-1", []),
        ("0,-1,1", ["H200"]),
        ("1,9,0", ["H100"]),
        ("0,GPU-dddd,1", ["H200"]),
        ("0,", ["H200"]),
        ("0,,1", ["H200"]),
    ],
)
def test_the_gpus_are_those_that_cuda_would_show(cards: Callable[..., Any], visible: str | None, expected: list[str]) -> None:
    cards(visible)
    assert gpus() == expected


@pytest.mark.parametrize("visible", ["9", "NoDevFiles", ",0", "MIG-abc"])
def test_a_list_that_names_no_gpu_is_refused(cards: Callable[..., Any], visible: str) -> None:
    cards(visible)
    with pytest.raises(PlanError, match=f"CUDA_VISIBLE_DEVICES={visible}: names none of the"):
        gpus()


def test_a_uuid_prefix_that_two_gpus_share_ends_the_list(cards: Callable[..., Any]) -> None:
    # CUDA: "a partial UUID must be unique".
    cards("0,GPU-aaaa")
    assert gpus() == ["H200"]


@pytest.mark.parametrize("visible", ["", "-1"])
def test_hidden_gpus_are_not_even_asked_for(cards: Callable[..., Any], visible: str) -> None:
    nvml = cards(visible)
    describe_host()
    assert nvml.calls == []


def test_the_library_is_shut_down_again(cards: Callable[..., Any]) -> None:
    nvml = cards()
    assert describe_host().driver == "580.65.06"
    assert nvml.calls == ["init", "shutdown"]


def test_the_library_is_shut_down_also_when_a_gpu_cannot_be_read(
    cards: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(_: int) -> str:
        raise NoDriverError("GPU is lost")

    nvml = cards()
    monkeypatch.setattr(nvml, "nvmlDeviceGetName", lost)
    with pytest.raises(PlanError, match=r"^accelerators that do not answer: nvidia 0 \(GPU is lost\), .*CUDA_VISIBLE_DEVICES$"):
        describe_host()
    assert nvml.calls == ["init", "shutdown"]


def test_a_lost_gpu_can_be_left_out_but_not_asked_for(cards: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def name(handle: int) -> str:
        if handle == 1:
            raise NoDriverError("GPU is lost")
        return CARDS[handle][1]

    monkeypatch.setattr(cards("0,2"), "nvmlDeviceGetName", name)
    assert gpus() == ["H200", "L4"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(PlanError, match=r"^CUDA_VISIBLE_DEVICES=0,1: 1 does not answer \(GPU is lost\)$"):
        describe_host()


def test_without_a_driver_the_host_is_a_cpu_host(cards: Callable[..., Any]) -> None:
    cards(driver=False)
    host = describe_host()
    assert (host.gpus, host.driver) == ((), None)
    assert host.key.startswith("cpu-")


def test_the_host_has_the_cores_that_this_process_may_use(cards: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    cards(driver=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 5, 7})
    host = describe_host()
    assert host.cores == 3
    assert host.memory_bytes > 0


@pytest.mark.parametrize(("number", "expected"), [(None, 8), ("0", 0), ("3", 3)])
def test_the_simulated_kind_has_simulated_gpus_whatever_the_machine_has(
    cards: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, number: str | None, expected: int
) -> None:
    nvml = cards()
    monkeypatch.delenv("LLMPERF_SIMULATED_GPUS", raising=False)
    if number is not None:
        monkeypatch.setenv("LLMPERF_SIMULATED_GPUS", number)
    assert describe_host(simulated=True).gpus == ("Simulated",) * expected
    assert nvml.calls == []


# ------------------------------------------------------------------------------------------------ key and summary


@pytest.mark.parametrize(
    ("host", "key"),
    [
        (TWO_GPUS, "nvidia-h200"),
        (Host("x", 8, GIB, ("NVIDIA H100 80GB HBM3",)), "nvidia-h100-80gb-hbm3"),
        (Host("x", 8, GIB, ("NVIDIA H200", "NVIDIA L4", "NVIDIA H200")), "nvidia-h200-nvidia-l4"),
        (CPU, "cpu-amd-epyc-9554-2c"),
        (Host("Intel(R) Xeon(R) Platinum 8480C CPU @ 2.00GHz", 4, GIB), "cpu-intel-xeon-platinum-8480c-4c"),
        (Host("", 1, GIB), "cpu-unknown-1c"),
        (Host("Weird/../Name", 1, GIB), "cpu-weird-name-1c"),
    ],
)
def test_a_key_that_names_folders_is_the_kind_of_machine(host: Host, key: str) -> None:
    assert host.key == key


def test_the_number_of_gpus_and_the_driver_are_not_in_the_key() -> None:
    host = Host("another cpu", 4, GIB, ("NVIDIA H200",), "1.0")
    assert host.key == TWO_GPUS.key


def test_variants_of_a_gpu_have_keys_of_their_own() -> None:
    names = ["NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA GH200 480GB"]
    assert len({Host("x", 1, GIB, (name,)).key for name in names}) == len(names)


@settings(deadline=None)
@given(st.text(max_size=30), st.lists(st.text(max_size=30), max_size=2))
def test_a_key_is_always_a_plain_folder_name(cpu: str, names: list[str]) -> None:
    key = Host(cpu, 2, GIB, tuple(names)).key
    assert key
    assert set(key) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


@pytest.mark.parametrize(
    ("host", "summary"),
    [
        (TWO_GPUS, "2x NVIDIA H200"),
        (Host("x", 1, GIB, ("A", "B", "A")), "2x A, 1x B"),
        (CPU, "no GPU, 2 CPU cores"),
    ],
)
def test_a_summary_counts_each_kind(host: Host, summary: str) -> None:
    assert host.summary == summary


# ------------------------------------------------------------------------------------------------ cores


@pytest.mark.parametrize(
    ("cores", "ranks", "expected"),
    [
        ({0, 1}, 1, [[0]]),
        ({0, 1}, 2, [[0], [1]]),
        ({0, 1, 2, 3, 4}, 2, [[0, 1], [2, 3]]),
        ({8, 4, 6, 2}, 2, [[2], [4]]),
        ({3}, 1, [[3]]),
    ],
)
def test_each_rank_has_cores_of_its_own(
    monkeypatch: pytest.MonkeyPatch, cores: set[int], ranks: int, expected: list[list[int]]
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores)
    assert core_groups(ranks) == expected


@settings(deadline=None)
@given(st.sets(st.integers(0, 255), min_size=1, max_size=64), st.data())
def test_groups_of_cores_are_equal_in_size_apart_and_allowed(cores: set[int], data: st.DataObject) -> None:
    ranks = data.draw(st.integers(1, len(cores)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda _: cores)
        groups = core_groups(ranks)
    used = [core for group in groups for core in group]
    assert len(groups) == ranks
    assert len({len(group) for group in groups}) == 1
    assert len(set(used)) == len(used) >= ranks
    assert set(used) <= cores
    assert len(used) < len(cores) or len(cores) == ranks


@pytest.mark.parametrize(
    ("cpuinfo", "native"),
    [
        ("processor\t: 0\nflags\t\t: fpu sse4_2 avx2 avx512f avx512_bf16 gfni\n", True),
        ("flags\t\t: fpu avx512f amx_bf16 amx_tile\n", True),
        ("processor\t: 0\nFeatures\t: fp asimd sve bf16 i8mm\n", True),
        ("flags\t\t: fpu sse4_2 avx2 fma\n", False),
        ("flags\t\t: fpu avx2 avx512f avx512_vnni\n", False),
        ("Features\t: fp asimd sve svebf16x\n", False),
        ("", False),
    ],
)
def test_cores_that_emulate_bfloat16_are_known(cpuinfo: str, native: bool) -> None:
    assert has_bfloat16(cpuinfo) is native
