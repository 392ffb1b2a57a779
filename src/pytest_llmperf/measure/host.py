"""What machine this is.

A host's key names the folder of its baselines, so it holds what makes numbers comparable (the GPU's or CPU's name and, on
CPU, the number of cores) and nothing that changes from day to day.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_llmperf.plan import PlanError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator



@dataclass(frozen=True)
class Host:
    """The machine that engines are started on."""

    cpu: str
    """The CPU's model name."""
    cores: int
    """Cores that this process may use."""
    memory_bytes: int
    gpus: tuple[str, ...] = ()
    """The name of every NVIDIA GPU that `CUDA_VISIBLE_DEVICES` leaves visible."""
    driver: str | None = None
    """The NVIDIA driver's version."""

    @property
    def key(self) -> str:
        """Return the name of the host's kind, e.g. `nvidia-h200` or `cpu-amd-epyc-9554-2c`."""
        if self.gpus:
            return _slug("-".join(dict.fromkeys(self.gpus)))
        return f"cpu-{_slug(self.cpu)}-{self.cores}c"

    @property
    def summary(self) -> str:
        """Return the host in words, e.g. `4x NVIDIA H200` or `CPU, 2 cores`."""
        kinds = dict.fromkeys(self.gpus)
        return ", ".join(f"{self.gpus.count(name)}x {name}" for name in kinds) or f"no GPU, {self.cores} CPU cores"


def _slug(name: str) -> str:
    words = re.sub(r"\((r|tm|c)\)|@.*|\b(cpu|processor|\d+-core)\b", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-") or "unknown"


def describe_host(kind: str = "server") -> Host:
    """Return this machine; a missing NVIDIA driver means no GPUs.

    For the `simulated` engine kind the GPUs are simulated too, `LLMPERF_SIMULATED_GPUS` (8) of them.
    """
    if kind == "simulated":
        gpus, driver = ("Simulated",) * int(os.environ.get("LLMPERF_SIMULATED_GPUS", "8")), None
    else:
        gpus, driver = _nvidia()
    return Host(
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpus=gpus,
        driver=driver,
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.is_file() else None
    return found[1].strip() if found else platform.machine()


def _nvidia() -> tuple[tuple[str, ...], str | None]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return (), None
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver or no GPU: a CPU host, which is a normal place to run
        return (), None
    try:
        driver = str(pynvml.nvmlSystemGetDriverVersion())
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        named = [(str(pynvml.nvmlDeviceGetUUID(one)), str(pynvml.nvmlDeviceGetName(one))) for one in handles]
    finally:
        pynvml.nvmlShutdown()
    found = tuple(_visible(named, visible))
    if named and not found:
        # Taking it for a CPU host would file a GPU's figures under the CPU's name.
        raise PlanError(
            f"CUDA_VISIBLE_DEVICES={visible}: names none of the {len(named)} GPUs that NVML lists (MIG slices are not"
            " supported yet); give indices or UUIDs, or an empty value for CPU"
        )
    return found, driver


def _visible(named: list[tuple[str, str]], visible: str | None) -> list[str]:
    """Return the names that CUDA would show: indices or UUID prefixes in order, ending at the first invalid one."""
    if visible is None:
        return [name for _, name in named]
    names = []
    for entry in (word.strip() for word in visible.split(",")):
        if entry.isdigit():
            match = [named[int(entry)][1]] if int(entry) < len(named) else []
        else:
            match = [name for uuid, name in named if entry and uuid.startswith(entry)]
        if len(match) != 1:
            break
        names.append(match[0])
    return names


@contextlib.contextmanager
def exclusive_host(waiting: Callable[[], None]) -> Iterator[None]:
    """Keep the host for one engine at a time, over all processes of this user; call `waiting` when that takes time.

    Neighbours disturb: two engines on one CPU, or one that allocates memory while another profiles its own.
    """
    path = Path(tempfile.gettempdir()) / f"llmperf-{os.getuid()}.lock"
    with path.open("w") as lock:  # the kernel releases the lock when the process ends, however it ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def core_groups(ranks: int) -> list[list[int]]:
    """Return one group of CPU cores per rank, equal in size; a core is left over for the front end where there is one."""
    cores = sorted(os.sched_getaffinity(0))
    each = max(1, (len(cores) - 1) // ranks if len(cores) > ranks else 1)
    return [cores[rank * each : (rank + 1) * each] for rank in range(ranks)]
