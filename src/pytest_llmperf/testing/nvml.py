"""A stand-in for nvidia-ml-py: its names, with the GPUs of the simulated engine behind them.

Values are those that NVML gave on two NVIDIA H200 (driver 580.159.04), idle and under load; what may be wrong with a GPU is said
in `gpus.py`. Only what the plugin calls is here.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

from pytest_llmperf.testing import gpus

TOTAL_BYTES = 150_754_820_096
RESERVED_BYTES = 644_939_776
_IDLE = {"power": 80_031, "clock": 345, "temperature": 32, "gpu": 0}
_BUSY = {"power": 696_598, "clock": 1_590, "temperature": 51, "gpu": 100}
_IDLE_REASON, _POWER_CAP_REASON = 1, 4
_BEGAN_S = time.monotonic()
_reads: dict[int, int] = {}
_reported: set[tuple[int, int]] = set()
"""GPU and XID of the events that were waited for already."""


def forget() -> None:
    """Have everything begin anew, as in a process that has not asked yet: how often what was read, which events came."""
    _reads.clear()
    _reported.clear()


_DRIVER_NOT_LOADED, _TIMEOUT = 9, 10


class NVMLError(Exception):
    """What NVML raises, with its code; subclasses are not simulated."""

    def __init__(self, value: int) -> None:
        """Make the error of a code of nvml.h."""
        super().__init__({_DRIVER_NOT_LOADED: "Driver Not Loaded", _TIMEOUT: "Timeout"}[value])
        self.value = value


@dataclass(frozen=True)
class _Memory:
    total: int
    free: int
    used: int


@dataclass(frozen=True)
class _Utilization:
    gpu: int
    memory: int


@dataclass(frozen=True)
class _Process:
    pid: int
    usedGpuMemory: int | None


@dataclass(frozen=True)
class _Event:
    device: int
    eventData: int


def nvmlInit() -> None:
    """Do nothing: the GPUs are files."""
    if gpus.count() == 0:
        raise NVMLError(_DRIVER_NOT_LOADED)


def nvmlShutdown() -> None:
    """Do nothing."""


def nvmlSystemGetDriverVersion() -> str:
    """Return a driver's version."""
    return "580.159.04"


def nvmlSystemGetCudaDriverVersion_v2() -> int:
    """Return 1000 * major + 10 * minor."""
    return 13_000


def nvmlDeviceGetCount() -> int:
    """Return how many GPUs there are."""
    return gpus.count()


def nvmlDeviceGetHandleByIndex(index: int) -> int:
    """Return a handle: the index."""
    return index


def nvmlDeviceGetUUID(handle: int) -> str:
    """Return a name that no other GPU has."""
    return f"GPU-51000000-0000-0000-0000-{handle:012x}"


def nvmlDeviceGetName(handle: int) -> str:
    """Return the kind of GPU."""
    return "Simulated"


def nvmlDeviceGetMigMode(handle: int) -> list[int]:
    """Return current and pending mode: off."""
    return [0, 0]


def nvmlDeviceGetNvLinkState(handle: int, link: int) -> int:
    """Return 1 for a link that is up; `links` of the conditions takes them away."""
    return int(link < gpus.condition(handle, "links", 18))


def nvmlDeviceGetP2PStatus(handle: int, other: int, kind: int) -> int:
    """Return 0 where two GPUs are linked: `island` of the conditions says which belong together."""
    linked = all(gpus.condition(gpu, "links", 18) for gpu in (handle, other))
    return 0 if linked and gpus.condition(handle, "island", 0) == gpus.condition(other, "island", 0) else 5


def nvmlDeviceGetApplicationsClock(handle: int, kind: int) -> int:
    """Return MHz."""
    return 1980 if kind == 1 else 3201


def nvmlDeviceGetPowerManagementLimit(handle: int) -> int:
    """Return mW; `power_limit_w` of the conditions changes it."""
    return int(1000 * gpus.condition(handle, "power_limit_w", 700))


def nvmlDeviceGetPowerManagementDefaultLimit(handle: int) -> int:
    """Return mW."""
    return 700_000


def nvmlDeviceGetMemoryInfo(handle: int) -> _Memory:
    """Return the memory; the driver's own share counts as used, as in version 1 of the struct."""
    used = RESERVED_BYTES + sum(gpus.processes(handle).values()) + gpus.condition(handle, "used_bytes", 0)
    total = gpus.condition(handle, "total_bytes", TOTAL_BYTES)
    return _Memory(total, total - used, used)


def nvmlDeviceGetComputeRunningProcesses(handle: int) -> list[_Process]:
    """Return who uses the GPU; `hidden` of the conditions takes the ids away, as in a container."""
    users = gpus.processes(handle)
    if gpus.condition(handle, "hidden", False):
        users = {4_190_000 + number: used for number, used in enumerate(users.values())}
    if (limit := gpus.condition(handle, "foreign", None)) is not None and _within(handle, limit):
        users[1] = 2 * gpus.GIB
    return [_Process(pid, used) for pid, used in users.items()]


def _within(handle: int, times: int) -> bool:
    _reads[handle] = _reads.get(handle, 0) + 1
    return _reads[handle] <= times


def _state(handle: int) -> dict[str, int]:
    return _BUSY if gpus.processes(handle) else _IDLE


def nvmlDeviceGetUtilizationRates(handle: int) -> _Utilization:
    """Return percents."""
    return _Utilization(_state(handle)["gpu"], 33 if gpus.processes(handle) else 0)


def nvmlDeviceGetPowerUsage(handle: int) -> int:
    """Return mW."""
    return _state(handle)["power"]


def nvmlDeviceGetTotalEnergyConsumption(handle: int) -> int:
    """Return mJ since the driver was loaded."""
    return 78_657_164 + int((time.monotonic() - _BEGAN_S) * _BUSY["power"])


def nvmlDeviceGetClockInfo(handle: int, kind: int) -> int:
    """Return MHz."""
    return int(gpus.condition(handle, "sm_clock_mhz", _state(handle)["clock"])) if kind == 1 else 3201


def nvmlDeviceGetTemperature(handle: int, sensor: int) -> int:
    """Return degrees Celsius."""
    return int(gpus.condition(handle, "temperature_c", _state(handle)["temperature"]))


def nvmlDeviceGetCurrentClocksEventReasons(handle: int) -> int:
    """Return the bits of what lowers the clocks; those of the conditions for the first `times` calls only."""
    normal = _POWER_CAP_REASON if gpus.processes(handle) else _IDLE_REASON
    wrong = gpus.condition(handle, "reasons", None)
    if wrong is None or not _within(handle, gpus.condition(handle, "times", 1 << 30)):
        return normal
    return int(wrong)


def nvmlDeviceGetTotalEccErrors(handle: int, kind: int, counter: int) -> int:
    """Return how many errors could not be corrected: `ecc` of the conditions from the second call on."""
    key = 1_000 + handle
    _reads[key] = _reads.get(key, 0) + 1
    return int(gpus.condition(handle, "ecc", 0)) if _reads[key] > 1 else 0


_sets = itertools.count()


def nvmlEventSetCreate() -> int:
    """Return a new set of events."""
    return next(_sets)


def nvmlDeviceRegisterEvents(handle: int, kinds: int, events: int) -> None:
    """Do nothing: every set hears of every GPU."""


def nvmlEventSetWait_v2(events: int, timeout_ms: int) -> _Event:
    """Return an XID of the conditions once, or raise for a time-out."""
    for handle in range(gpus.count()):
        xid = gpus.condition(handle, "xid", None)
        if xid is not None and (handle, xid) not in _reported:
            _reported.add((handle, xid))
            return _Event(handle, int(xid))
    raise NVMLError(_TIMEOUT)


def nvmlEventSetFree(events: int) -> None:
    """Do nothing."""
