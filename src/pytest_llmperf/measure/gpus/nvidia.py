"""NVIDIA GPUs through NVML (nvidia-ml-py), MIG slices included.

What a GPU does not support, NVML answers with an error: it is None here. Call times on an H200 (driver 580): clocks,
temperature and limits 2 to 20 us each, memory 80 us, processes 500 us, the energy counter 3 ms. Hence `read` and `totals`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pytest_llmperf.measure.gpus.device import (
    HARDWARE,
    POWER_BRAKE,
    POWER_CAP,
    SET_LOWER,
    THERMAL,
    AcceleratorError,
    Gpu,
    Reading,
    Totals,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

# Numbers of nvml.h; nvidia-ml-py names only some of them, and not the same in every release.
_SM_CLOCK = 1
_TEMPERATURE_GPU = 0
_P2P_NVLINK, _P2P_OK = 2, 0
_UNCORRECTED, _SINCE_BOOT = 1, 0
_XID_EVENT = 8
_MOST_LINKS = 18
_LIMITS = (
    (0x4, POWER_CAP),
    (0x8, HARDWARE),
    (0x20 | 0x40, THERMAL),
    (0x80, POWER_BRAKE),
    (0x2 | 0x10 | 0x100, SET_LOWER),  # application clocks, those of another GPU (sync boost), those of a display
)
_NO_PERMISSION, _DRIVER_NOT_LOADED, _LIBRARY_NOT_FOUND = 4, 9, 12


def find(module: str = "pynvml") -> Nvidia | None:
    """Return the NVIDIA GPUs of this machine, None where there is no driver; `module` has nvidia-ml-py's names."""
    nvml = importlib.import_module(module)
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        if getattr(error, "value", None) in (_DRIVER_NOT_LOADED, _LIBRARY_NOT_FOUND):
            return None  # a CPU host, which is a normal place to run
        # Taking it for a CPU host would skip every test of several GPUs, and be green.
        raise AcceleratorError(f"NVML: the driver does not answer ({error}); nvidia-smi should tell more") from error
    return Nvidia(nvml)


class Nvidia:
    """The NVIDIA GPUs of this machine; NVML is initialized until `close`."""

    vendor = "nvidia"
    visible_variable = "CUDA_VISIBLE_DEVICES"

    def __init__(self, nvml: Any) -> None:
        """Take an initialized NVML."""
        self._nvml = nvml
        self._handles: dict[str, tuple[Any, Any]] = {}
        """By UUID what to ask of the accelerator, and of the whole GPU where that is a slice of one."""
        self.lost: dict[int, str] = {}
        """Why GPUs do not answer, by index, as `devices` has found it."""
        self._events: Any = None
        self._heard: set[str] = set()
        """The UUIDs of the whole GPUs whose events are listened to."""

    @property
    def versions(self) -> dict[str, str]:
        """Return the driver's version, and that of the newest CUDA that it runs."""
        versions = {"driver": self._ask("nvmlSystemGetDriverVersion")}
        cuda = self._ask("nvmlSystemGetCudaDriverVersion_v2")
        versions["cuda"] = f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else None
        return {name: str(value) for name, value in versions.items() if value is not None}

    def _ask(self, function: str, *arguments: Any) -> Any:
        """Return what NVML answers, None where it can't."""
        try:
            return getattr(self._nvml, function)(*arguments)
        except (self._nvml.NVMLError, AttributeError):  # an older nvidia-ml-py has fewer functions
            return None

    def devices(self) -> tuple[Gpu, ...]:
        """Return every GPU that answers, and the MIG slices in place of one in MIG mode; raises AcceleratorError."""
        nvml, devices, handles = self._nvml, list[Gpu](), dict[int, Any]()
        self.lost = {}
        try:
            count = nvml.nvmlDeviceGetCount()
        except nvml.NVMLError as error:
            raise AcceleratorError(f"NVML: the driver does not answer ({error}); nvidia-smi should tell more") from error
        for index in range(count):
            try:
                handles[index] = nvml.nvmlDeviceGetHandleByIndex(index)
            except nvml.NVMLError as error:
                if getattr(error, "value", None) != _NO_PERMISSION:  # a container's GPUs are counted with those of others
                    self.lost[index] = str(error)
        for index, handle in handles.items():
            try:
                slices = self._slices(handle)
                if slices is not None:
                    devices += [self._device(index, part, handle, ()) for part in slices]
                else:
                    peers = tuple(i for i, other in handles.items() if i != index and self._linked(handle, other))
                    devices.append(self._device(index, handle, handle, peers))
            except nvml.NVMLError as error:
                self.lost[index] = str(error)
        return tuple(devices)

    def _device(self, index: int, handle: Any, physical: Any, peers: tuple[int, ...]) -> Gpu:
        nvml = self._nvml
        uuid = str(nvml.nvmlDeviceGetUUID(handle))
        self._handles[uuid] = handle, physical
        memory = self._ask("nvmlDeviceGetMemoryInfo", handle)
        limit = self._ask("nvmlDeviceGetPowerManagementLimit", handle)
        default_limit = self._ask("nvmlDeviceGetPowerManagementDefaultLimit", handle)
        clock = self._ask("nvmlDeviceGetApplicationsClock", physical, _SM_CLOCK) or self._ask(
            "nvmlDeviceGetMaxClockInfo", physical, _SM_CLOCK
        )
        return Gpu(
            index=index,
            uuid=uuid,
            name=str(nvml.nvmlDeviceGetName(handle)),
            memory_bytes=int(memory.total) if memory else None,
            peers=peers,
            links=sum(self._ask("nvmlDeviceGetNvLinkState", handle, link) == 1 for link in range(_MOST_LINKS)),
            sm_clock_mhz=_number(clock),
            power_limit_w=limit / 1000 if limit else None,
            default_power_limit_w=default_limit / 1000 if default_limit else None,
        )

    def _slices(self, handle: Any) -> list[Any] | None:
        """Return the slices of a GPU in MIG mode, None for one that isn't: without slices, CUDA can't use it at all."""
        mode = self._ask("nvmlDeviceGetMigMode", handle)
        if not mode or mode[0] != 1:
            return None
        count = self._ask("nvmlDeviceGetMaxMigDeviceCount", handle) or 0
        handles = [self._ask("nvmlDeviceGetMigDeviceHandleByIndex", handle, number) for number in range(count)]
        return [handle for handle in handles if handle is not None]

    def _linked(self, handle: Any, other: Any) -> bool:
        return bool(self._ask("nvmlDeviceGetP2PStatus", handle, other, _P2P_NVLINK) == _P2P_OK)

    def read(self, gpus: Sequence[Gpu], *, processes: bool) -> list[Reading]:
        """Return what each of these does now."""
        return [self._read(*self._handles_of(gpu), processes=processes) for gpu in gpus]

    def _handles_of(self, gpu: Gpu) -> tuple[Any, Any]:
        if gpu.uuid not in self._handles:
            raise AcceleratorError(f"NVML: GPU {gpu.index} ({gpu.uuid}) is no longer there; nvidia-smi should tell more")
        return self._handles[gpu.uuid]

    def _read(self, handle: Any, physical: Any, *, processes: bool) -> Reading:
        """Return the reading of a GPU or of a slice, whose clocks, heat and limits are those of the physical GPU."""
        memory = self._ask("nvmlDeviceGetMemoryInfo", handle)
        busy = self._ask("nvmlDeviceGetUtilizationRates", handle)
        return Reading(
            used_bytes=int(memory.used) if memory else None,
            processes=self._processes(handle) if processes else None,
            sm_clock_mhz=_number(self._ask("nvmlDeviceGetClockInfo", physical, _SM_CLOCK)),
            utilization=None if busy is None else busy.gpu / 100,
            temperature_c=_number(self._ask("nvmlDeviceGetTemperature", physical, _TEMPERATURE_GPU)),
            limits=self._limits(physical),
        )

    def _processes(self, handle: Any) -> dict[int, int | None] | None:
        processes = self._ask("nvmlDeviceGetComputeRunningProcesses", handle)
        if processes is None:
            return None
        return {int(process.pid): None if process.usedGpuMemory is None else int(process.usedGpuMemory) for process in processes}

    def _limits(self, handle: Any) -> tuple[str, ...]:
        bits = self._ask("nvmlDeviceGetCurrentClocksEventReasons", handle)
        if bits is None:  # the name before nvidia-ml-py 12.535
            bits = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons", handle) or 0
        return tuple(name for mask, name in _LIMITS if bits & mask)

    def totals(self, gpus: Sequence[Gpu]) -> list[Totals]:
        """Return the cumulative counters of each of these, and the critical events since the last call."""
        events = self._new_events(gpus)
        totals = []
        for gpu in gpus:
            handle, physical = self._handles_of(gpu)
            energy = self._ask("nvmlDeviceGetTotalEnergyConsumption", handle)
            errors = self._ask("nvmlDeviceGetTotalEccErrors", physical, _UNCORRECTED, _SINCE_BOOT)
            joule = None if energy is None else energy / 1000
            own = [text for uuid, text in events if uuid in (self._uuid(physical), None)]
            totals.append(Totals(joule, None if errors is None else int(errors), tuple(own)))
        return totals

    def _uuid(self, handle: Any) -> str | None:
        uuid = self._ask("nvmlDeviceGetUUID", handle)
        return None if uuid is None else str(uuid)

    def _new_events(self, gpus: Sequence[Gpu]) -> list[tuple[str | None, str]]:
        """Return the XID events that came since the last call, each with its GPU's UUID; None where the GPU is lost."""
        events: list[tuple[str | None, str]] = []
        if self._events is None:
            self._events = self._ask("nvmlEventSetCreate")
        if self._events is None:
            return events
        for gpu in gpus:
            physical = self._handles_of(gpu)[1]
            uuid = self._uuid(physical)
            if uuid is not None and uuid not in self._heard:
                self._ask("nvmlDeviceRegisterEvents", physical, _XID_EVENT, self._events)
                self._heard.add(uuid)
        # NVML says "time-out", which is None here, when there is none left.
        while (event := self._ask("nvmlEventSetWait_v2", self._events, 0)) is not None:
            events.append((self._uuid(event.device), f"XID {int(event.eventData)}"))
        return events

    def close(self) -> None:
        """Shut NVML down."""
        if self._events is not None:
            self._ask("nvmlEventSetFree", self._events)
        self._ask("nvmlShutdown")


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
