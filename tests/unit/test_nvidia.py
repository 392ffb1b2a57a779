"""NVIDIA GPUs through NVML: over values recorded on two real H200, and over the stand-in of the simulated engine."""

# The functions of the recorded NVML have nvidia-ml-py's names.
# ruff: noqa: N802

from __future__ import annotations

import json
import os
import re
import sys
from inspect import getsource
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_llmperf.measure.gpus import nvidia
from pytest_llmperf.measure.gpus.device import AcceleratorError, Gpu, Reading, Totals
from pytest_llmperf.measure.gpus.nvidia import Nvidia, find
from pytest_llmperf.measure.gpus.vendors import open_accelerators
from pytest_llmperf.testing import gpus as simulated
from pytest_llmperf.testing import nvml as stand_in

if TYPE_CHECKING:
    from collections.abc import Callable

RECORDED = json.loads((Path(__file__).parent / "data" / "nvml_h200.json").read_text())
FIRST, SECOND = (gpu["uuid"] for gpu in RECORDED["gpus"])
GIB = 1 << 30


class NvmlError(Exception):
    """Stands for pynvml.NVMLError, which knows the code of nvml.h."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        codes = {"No Permission": 4, "Driver Not Loaded": 9, "Shared Library Not Found": 12, "Version Mismatch": 18}
        self.value = codes.get(text, 999)


class RecordedNvml:
    """NVML as it answered on two H200; `now` says at which of the three moments, and `refused` which functions it lacks."""

    NVMLError = NvmlError

    def __init__(self) -> None:
        self.now = "idle"
        self.refused: set[str] = set()
        self.lost: set[int] = set()
        self.slices: dict[int, list[dict[str, Any]]] = {}
        """The MIG slices of GPUs in MIG mode."""
        self.listening: set[int] = set()
        self.events: list[tuple[int, int]] = []
        self.closed: list[str] = []

    def _gpu(self, handle: Any, function: str) -> dict[str, Any]:
        physical = handle // 100 - 1 if handle >= 100 else handle  # 100 is the first slice of GPU 0
        if physical in self.lost:
            raise NvmlError("GPU is lost")
        if function in self.refused:
            raise NvmlError("Not Supported")
        if handle >= 100:
            return self.slices[physical][handle % 100]
        gpu = RECORDED["gpus"][handle]
        return {"total": RECORDED["total"], **gpu, **gpu[self.now]}

    def _told(self, handle: Any, function: str, name: str) -> Any:
        try:
            return self._gpu(handle, function)[name]
        except KeyError:
            raise NvmlError("Not Supported") from None

    def nvmlInit(self) -> None:
        if "nvmlInit" in self.refused:
            raise NvmlError("Driver Not Loaded")

    def nvmlShutdown(self) -> None:
        self.closed.append("nvmlShutdown")

    def nvmlEventSetFree(self, events: str) -> None:
        self.closed.append("nvmlEventSetFree")

    def nvmlSystemGetDriverVersion(self) -> Any:
        return RECORDED["driver"]

    def nvmlSystemGetCudaDriverVersion_v2(self) -> Any:
        return RECORDED["cuda"]

    def nvmlDeviceGetCount(self) -> int:
        return len(RECORDED["gpus"])

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        self._gpu(index, "nvmlDeviceGetHandleByIndex")
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> Any:
        return self._told(handle, "nvmlDeviceGetUUID", "uuid")

    def nvmlDeviceGetName(self, handle: int) -> Any:
        return self._told(handle, "nvmlDeviceGetName", "name")

    def nvmlDeviceGetMigMode(self, handle: int) -> Any:
        self._gpu(handle, "nvmlDeviceGetMigMode")
        return [1, 1] if handle in self.slices else RECORDED["mig"]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: int) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: int, number: int) -> int:
        if number >= len(self.slices[handle]):
            raise NvmlError("Not Found")
        return 100 * (handle + 1) + number

    def nvmlDeviceGetNvLinkState(self, handle: int, link: int) -> Any:
        if handle >= 100:
            raise NvmlError("Not Supported")
        self._gpu(handle, "nvmlDeviceGetNvLinkState")
        return RECORDED["nvlink"]

    def nvmlDeviceGetP2PStatus(self, handle: int, other: int, kind: int) -> Any:
        self._gpu(handle, "nvmlDeviceGetP2PStatus")
        assert kind == 2
        return RECORDED["p2p_nvlink"]

    def nvmlDeviceGetApplicationsClock(self, handle: int, kind: int) -> Any:
        self._gpu(handle, "nvmlDeviceGetApplicationsClock")
        return RECORDED["application_clocks"][{1: "sm", 2: "memory"}[kind]]

    def nvmlDeviceGetMaxClockInfo(self, handle: int, kind: int) -> Any:
        self._gpu(handle, "nvmlDeviceGetMaxClockInfo")
        return RECORDED["application_clocks"][{1: "sm", 2: "memory"}[kind]]

    def nvmlDeviceGetPowerManagementLimit(self, handle: int) -> Any:
        if handle >= 100:
            raise NvmlError("Not Supported")
        self._gpu(handle, "nvmlDeviceGetPowerManagementLimit")
        return RECORDED["power_limit"]

    def nvmlDeviceGetPowerManagementDefaultLimit(self, handle: int) -> Any:
        return self.nvmlDeviceGetPowerManagementLimit(handle)

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        used = self._told(handle, "nvmlDeviceGetMemoryInfo", "used")
        total = self._told(handle, "nvmlDeviceGetMemoryInfo", "total")
        return SimpleNamespace(total=total, used=used, free=total - used)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> Any:
        processes = self._told(handle, "nvmlDeviceGetComputeRunningProcesses", "processes")
        return [SimpleNamespace(pid=int(pid), usedGpuMemory=used) for pid, used in processes.items()]

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        gpu, memory = self._told(handle, "nvmlDeviceGetUtilizationRates", "utilization")
        return SimpleNamespace(gpu=gpu, memory=memory)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> Any:
        if handle >= 100:
            raise NvmlError("Not Supported")
        self._gpu(handle, "nvmlDeviceGetTotalEnergyConsumption")
        return RECORDED["energy"]

    def nvmlDeviceGetClockInfo(self, handle: int, kind: int) -> Any:
        assert kind == 1
        return self._told(handle, "nvmlDeviceGetClockInfo", "sm_clock")

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> Any:
        assert sensor == 0
        return self._told(handle, "nvmlDeviceGetTemperature", "temperature")

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: int) -> Any:
        return self._told(handle, "nvmlDeviceGetCurrentClocksEventReasons", "reasons")

    def nvmlDeviceGetTotalEccErrors(self, handle: int, kind: int, counter: int) -> Any:
        self._gpu(handle, "nvmlDeviceGetTotalEccErrors")
        assert (kind, counter) == (1, 0)
        return RECORDED["ecc_uncorrected"]

    def nvmlEventSetCreate(self) -> str:
        if "nvmlEventSetCreate" in self.refused:
            raise NvmlError("Not Supported")
        return "events"

    def nvmlDeviceRegisterEvents(self, handle: int, kinds: int, events: str) -> None:
        assert (kinds, events) == (8, "events")
        self.listening.add(handle)

    def nvmlEventSetWait_v2(self, events: str, timeout_ms: int) -> Any:
        assert (events, timeout_ms) == ("events", 0)
        for number, (handle, xid) in enumerate(self.events):
            if handle in self.listening:
                del self.events[number]
                return SimpleNamespace(device=handle, eventData=xid)
        raise NvmlError("Timeout")


OPTIONAL = {name for name in dir(RecordedNvml) if name.startswith("nvmlDeviceGet")} - {
    "nvmlDeviceGetCount",
    "nvmlDeviceGetHandleByIndex",
    "nvmlDeviceGetUUID",
    "nvmlDeviceGetName",
}


@pytest.fixture
def nvml() -> RecordedNvml:
    return RecordedNvml()


def read(nvml: RecordedNvml, *, processes: bool = True) -> list[Reading]:
    gpus = Nvidia(nvml)
    return gpus.read(gpus.devices(), processes=processes)


# --------------------------------------------------------------------------------------------------- two recorded H200


def test_two_h200_are_known_by_uuid_size_links_clock_and_power_limit(nvml):
    assert Nvidia(nvml).devices() == (
        Gpu(0, FIRST, "NVIDIA H200", 150_754_820_096, (1,), 18, 1980.0, 700.0, 700.0),
        Gpu(1, SECOND, "NVIDIA H200", 150_754_820_096, (0,), 18, 1980.0, 700.0, 700.0),
    )


def test_the_versions_are_those_of_driver_and_cuda(nvml):
    assert Nvidia(nvml).versions == {"driver": "580.159.04", "cuda": "13.0"}


def test_an_idle_gpu_has_the_drivers_share_in_use_and_no_process(nvml):
    idle = Reading(644_939_776, {}, 345.0, 0.0, 32.0, ())
    assert read(nvml) == [idle, idle]


def test_a_gpu_under_load_tells_its_process_and_its_power_limit(nvml):
    nvml.now = "loaded"
    assert read(nvml) == [
        Reading(141_379_436_544, {1990: 140_725_190_656}, 1590.0, 1.0, 51.0, ("power cap",)),
        Reading(141_379_436_544, {1991: 140_725_190_656}, 1650.0, 1.0, 51.0, ("power cap",)),
    ]


def test_processes_are_not_asked_for_where_they_are_not_wanted(nvml):
    nvml.now = "loaded"
    nvml.refused = {"nvmlDeviceGetComputeRunningProcesses"}
    without = read(nvml, processes=False)
    assert [gpu.processes for gpu in without] == [None, None]
    assert [gpu.used_bytes for gpu in without] == [141_379_436_544, 141_379_436_544]


def test_what_is_not_told_at_one_moment_is_none_at_that_moment(nvml):
    nvml.now = "ready"
    assert read(nvml)[0] == Reading(140_909_674_496, {1990: 140_255_428_608})


def test_counters_are_energy_in_joules_and_uncorrected_memory_errors(nvml):
    gpus = Nvidia(nvml)
    assert gpus.totals(gpus.devices()) == [Totals(78_657.164, 0, ()), Totals(78_657.164, 0, ())]


def test_what_nvml_does_not_support_is_none(nvml):
    nvml.refused = OPTIONAL
    gpus = Nvidia(nvml)
    assert gpus.devices() == (Gpu(0, FIRST, "NVIDIA H200", None), Gpu(1, SECOND, "NVIDIA H200", None))
    assert gpus.read(gpus.devices(), processes=True) == [Reading(), Reading()]
    assert gpus.totals(gpus.devices()) == [Totals(), Totals()]


def test_without_application_clocks_a_gpu_should_reach_its_highest_clock(nvml):
    nvml.refused = {"nvmlDeviceGetApplicationsClock"}
    assert [gpu.sm_clock_mhz for gpu in Nvidia(nvml).devices()] == [1980.0, 1980.0]


def test_a_process_whose_memory_is_hidden_is_known_by_its_id(nvml, monkeypatch):
    hidden = [SimpleNamespace(pid=4711, usedGpuMemory=None)]
    monkeypatch.setattr(nvml, "nvmlDeviceGetComputeRunningProcesses", lambda handle: hidden)
    assert read(nvml)[0].processes == {4711: None}


@pytest.mark.parametrize(
    ("bits", "limits"),
    [
        (0x0, ()),
        (0x1, ()),
        (0x2, ("clocks set lower",)),
        (0x4, ("power cap",)),
        (0x8, ("hardware slow-down",)),
        (0x20, ("thermal slow-down",)),
        (0x40, ("thermal slow-down",)),
        (0x48, ("hardware slow-down", "thermal slow-down")),
        (0x88, ("hardware slow-down", "power brake")),
        (0x10, ("clocks set lower",)),
        (0x100, ("clocks set lower",)),
    ],
)
def test_what_holds_the_clocks_down_is_told_in_words(nvml, monkeypatch, bits, limits):
    monkeypatch.setattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", lambda handle: bits)
    assert read(nvml)[0].limits == limits


def test_an_older_library_has_another_name_for_what_holds_the_clocks_down(nvml, monkeypatch):
    monkeypatch.delattr(RecordedNvml, "nvmlDeviceGetCurrentClocksEventReasons")
    nvml.nvmlDeviceGetCurrentClocksThrottleReasons = lambda handle: 0x20
    assert read(nvml)[0].limits == ("thermal slow-down",)


# ------------------------------------------------------------------------------------------------------------------ XID


@pytest.fixture
def listening(nvml) -> tuple[Nvidia, Gpu, Gpu]:
    """NVML with its two GPUs, after the first counters of the first GPU were read."""
    gpus = Nvidia(nvml)
    first, second = gpus.devices()
    gpus.totals([first])
    return gpus, first, second


def test_without_an_event_the_wait_times_out_and_nothing_is_told(listening):
    gpus, first, second = listening
    assert [totals.events for totals in gpus.totals([first, second])] == [(), ()]


def test_an_xid_is_told_once_and_of_its_own_gpu(nvml, listening):
    gpus, first, second = listening
    gpus.totals([first, second])
    nvml.events = [(1, 79), (1, 45)]
    assert [totals.events for totals in gpus.totals([first, second])] == [(), ("XID 79", "XID 45")]
    assert [totals.events for totals in gpus.totals([first, second])] == [(), ()]


def test_an_engine_on_other_gpus_hears_of_their_xids_too(nvml, listening):
    gpus, _, second = listening
    gpus.totals([second])
    nvml.events = [(1, 79)]
    assert [totals.events for totals in gpus.totals([second])] == [("XID 79",)]


def test_the_xid_of_a_lost_gpu_is_still_told(nvml, listening):
    gpus, first, _ = listening
    nvml.events, nvml.lost = [(0, 79)], {0}
    assert gpus.totals([first]) == [Totals(None, None, ("XID 79",))]


def test_a_driver_without_events_tells_none(nvml):
    nvml.refused = {"nvmlEventSetCreate"}
    gpus = Nvidia(nvml)
    assert gpus.totals(gpus.devices())[0].events == ()
    gpus.close()
    assert nvml.closed == ["nvmlShutdown"]


# --------------------------------------------------------------------------------------------------------- MIG and loss


SLICES = [
    {"name": "NVIDIA H200 MIG 3g.71gb", "uuid": f"MIG-{number}", "total": 70 * GIB, "used": 1 * GIB, "processes": {}}
    for number in range(2)
]


def test_mig_slices_take_the_place_of_their_gpu(nvml):
    nvml.slices = {0: SLICES}
    assert Nvidia(nvml).devices() == (
        Gpu(0, "MIG-0", "NVIDIA H200 MIG 3g.71gb", 70 * GIB, (), 0, 1980.0, None),
        Gpu(0, "MIG-1", "NVIDIA H200 MIG 3g.71gb", 70 * GIB, (), 0, 1980.0, None),
        Gpu(1, SECOND, "NVIDIA H200", 150_754_820_096, (0,), 18, 1980.0, 700.0, 700.0),
    )


def test_a_gpu_in_mig_mode_without_slices_cannot_be_used(nvml):
    nvml.slices = {0: []}
    assert [gpu.uuid for gpu in Nvidia(nvml).devices()] == [SECOND]


def test_a_slice_has_own_memory_and_its_gpus_clocks_heat_and_limits(nvml):
    nvml.slices, nvml.now = {0: SLICES}, "loaded"
    assert read(nvml)[0] == Reading(GIB, {}, 1590.0, None, 51.0, ("power cap",))


def test_the_events_of_a_gpu_are_those_of_each_of_its_slices(nvml):
    nvml.slices = {0: SLICES}
    gpus = Nvidia(nvml)
    slices = gpus.devices()[:2]
    gpus.totals(slices)
    nvml.events = [(0, 94)]
    assert gpus.totals(slices) == [Totals(None, 0, ("XID 94",)), Totals(None, 0, ("XID 94",))]


def test_a_gpu_that_is_lost_is_named(nvml):
    nvml.lost = {1}
    gpus = Nvidia(nvml)
    assert [gpu.index for gpu in gpus.devices()] == [0]
    assert gpus.lost == {1: "GPU is lost"}


def test_a_gpu_that_a_container_may_not_use_is_not_lost(nvml, monkeypatch):
    def handle(index: int) -> int:
        if index == 1:
            raise NvmlError("No Permission")
        return index

    monkeypatch.setattr(nvml, "nvmlDeviceGetHandleByIndex", handle)
    gpus = Nvidia(nvml)
    assert [gpu.index for gpu in gpus.devices()] == [0]
    assert gpus.lost == {}


@pytest.mark.parametrize("text", ["Driver Not Loaded", "Shared Library Not Found"])
def test_no_driver_means_no_gpus(monkeypatch, text):
    monkeypatch.setitem(sys.modules, "no_nvml", SimpleNamespace(NVMLError=NvmlError, nvmlInit=raising(text)))
    assert find("no_nvml") is None


def test_a_driver_that_does_not_work_is_not_taken_for_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "no_nvml", SimpleNamespace(NVMLError=NvmlError, nvmlInit=raising("Version Mismatch")))
    with pytest.raises(AcceleratorError, match=r"^NVML: the driver does not answer \(Version Mismatch\); nvidia-smi should tell"):
        find("no_nvml")


def raising(text: str) -> Callable[[], None]:
    def call() -> None:
        raise NvmlError(text)

    return call


def test_a_gpu_that_gets_lost_is_read_as_telling_nothing(nvml):
    gpus = Nvidia(nvml)
    both = gpus.devices()
    nvml.lost = {0}
    assert gpus.read(both, processes=True)[0] == Reading()


def test_a_slice_that_was_taken_away_is_named(nvml):
    gone = Gpu(0, "MIG-7", "NVIDIA H200 MIG 3g.71gb", 70 * GIB)
    gpus = Nvidia(nvml)
    gpus.devices()
    for asked in (lambda: gpus.read([gone], processes=False), lambda: gpus.totals([gone])):
        with pytest.raises(AcceleratorError, match=r"^NVML: GPU 0 \(MIG-7\) is no longer there; nvidia-smi should tell more$"):
            asked()


def test_closing_frees_the_events_and_the_library(nvml, listening):
    listening[0].close()
    assert nvml.closed == ["nvmlEventSetFree", "nvmlShutdown"]


def test_without_a_driver_there_are_no_nvidia_gpus(nvml, monkeypatch):
    nvml.refused = {"nvmlInit"}
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert nvidia.find() is None


# --------------------------------------------------------------------------------------------------------- the stand-in


@pytest.fixture
def state(tmp_path, monkeypatch) -> Path:
    """The folder of the simulated GPUs, of which there are two; nothing of other tests is remembered."""
    monkeypatch.setenv(simulated.STATE, str(tmp_path))
    monkeypatch.setenv(simulated.NUMBER, "2")
    stand_in.forget()
    return tmp_path


def test_the_stand_in_lacks_only_functions_of_mig_and_older_libraries():
    asked = set(re.findall(r"\bnvml[A-Z]\w+", getsource(nvidia)))
    assert asked - set(dir(stand_in)) == {
        "nvmlDeviceGetCurrentClocksThrottleReasons",
        "nvmlDeviceGetMaxClockInfo",
        "nvmlDeviceGetMaxMigDeviceCount",
        "nvmlDeviceGetMigDeviceHandleByIndex",
    }


def test_simulated_gpus_are_all_linked(state):
    gpus = open_accelerators(simulated=True)
    assert gpus.devices() == (
        Gpu(0, "GPU-51000000-0000-0000-0000-000000000000", "Simulated", 150_754_820_096, (1,), 18, 1980.0, 700.0, 700.0),
        Gpu(1, "GPU-51000000-0000-0000-0000-000000000001", "Simulated", 150_754_820_096, (0,), 18, 1980.0, 700.0, 700.0),
    )


def test_simulated_gpus_can_be_on_different_islands_and_without_links(state, monkeypatch):
    monkeypatch.setenv(simulated.NUMBER, "4")
    simulated.set_conditions({"2": {"island": 1}, "3": {"links": 0}})
    links = [(gpu.peers, gpu.links) for gpu in open_accelerators(simulated=True).devices()]
    assert links == [((1,), 18), ((0,), 18), ((), 18), ((), 0)]


def test_no_simulated_gpus_are_no_accelerators(state, monkeypatch):
    monkeypatch.setenv(simulated.NUMBER, "0")
    assert open_accelerators(simulated=True) is None


def test_simulated_gpus_are_idle_until_a_process_occupies_them(state):
    gpus = open_accelerators(simulated=True)
    first, second = gpus.devices()
    simulated.occupy({1: 16 * GIB})
    assert gpus.read([first, second], processes=True) == [
        Reading(644_939_776, {}, 345.0, 0.0, 32.0, ()),
        Reading(644_939_776 + 16 * GIB, {os.getpid(): 16 * GIB}, 1590.0, 1.0, 51.0, ("power cap",)),
    ]


def test_a_condition_is_read_from_its_gpu(state):
    simulated.set_conditions({"*": {"temperature_c": 91}, "1": {"reasons": 0x40, "times": 1, "xid": 79}})
    gpus = open_accelerators(simulated=True)
    both = gpus.devices()
    readings = [gpus.read(both, processes=False) for _ in range(2)]
    assert [[gpu.limits for gpu in now] for now in readings] == [[(), ("thermal slow-down",)], [(), ()]]
    assert [gpu.temperature_c for gpu in readings[0]] == [91.0, 91.0]
    assert [gpu.events for gpu in gpus.totals(both)] == [(), ("XID 79",)]
    assert [gpu.events for gpu in gpus.totals(both)] == [(), ()]
