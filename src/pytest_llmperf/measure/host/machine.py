"""What machine this is.

A host's key names the folder of its baselines, so it holds what makes numbers comparable (the GPU's or CPU's name and, on
CPU, the number of cores) and nothing that changes from day to day.
"""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_llmperf.measure.gpus.device import AcceleratorError
from pytest_llmperf.measure.gpus.vendors import open_accelerators
from pytest_llmperf.plan.checks import PlanError
from pytest_llmperf.units import counted

if TYPE_CHECKING:
    from pytest_llmperf.measure.gpus.device import Accelerators, Gpu


@dataclass(frozen=True)
class Host:
    """The machine that engines are started on."""

    cpu: str
    """The CPU's model name."""
    cores: int
    """Cores that this process may use."""
    memory_bytes: int
    gpus: tuple[str, ...] = ()
    """The name of every accelerator that a process of ours may use (`CUDA_VISIBLE_DEVICES`)."""
    driver: str | None = None
    """The version of the accelerators' driver."""
    cuda: str | None = None
    """The newest CUDA that the driver runs."""
    links: str | None = None
    """How the accelerators are linked, e.g. `18 links each, all to all`; None for one alone, or where it is not known."""
    devices: tuple[Gpu, ...] = ()
    """More about each of `gpus`."""

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
        return ", ".join(f"{self.gpus.count(name)}x {name}" for name in kinds) or f"no GPU, {counted(self.cores, 'CPU core')}"


def _slug(name: str) -> str:
    words = re.sub(r"\((r|tm|c)\)|@.*|\b(cpu|processor|\d+-core)\b", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-") or "unknown"


def describe_host(*, simulated: bool = False) -> Host:
    """Return this machine; one without accelerators is a normal place to run.

    For a `simulated` engine the GPUs are simulated too, `LLMPERF_SIMULATED_GPUS` (8) of them. Raises PlanError where
    the environment allows none of those that there are, or where one of them does not answer.
    """
    devices: tuple[Gpu, ...] = ()
    versions: dict[str, str] = {}
    # NVML is not even loaded where its GPUs are hidden on purpose.
    if simulated or os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() not in ("", "-1"):
        accelerators = open_accelerators(simulated=simulated)
        if accelerators is not None:
            try:
                versions = accelerators.versions
                devices = usable(accelerators, None if simulated else os.environ.get(accelerators.visible_variable))
            except AcceleratorError as error:
                raise PlanError(str(error)) from error
            finally:
                accelerators.close()
    return Host(
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpus=tuple(gpu.name for gpu in devices),
        driver=versions.get("driver") if devices else None,
        cuda=versions.get("cuda") if devices else None,
        links=_links(devices),
        devices=devices,
    )


def _links(devices: tuple[Gpu, ...]) -> str | None:
    if len(devices) < 2:
        return None
    if not any(gpu.peers for gpu in devices):
        return "PCIe only"
    number = min(gpu.links for gpu in devices)
    everybody = all(len(set(gpu.peers) & {other.index for other in devices}) >= len(devices) - 1 for gpu in devices)
    return f"{counted(number, 'link')} each, {'all to all' if everybody else 'not all to all'}"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    name = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.is_file() else None
    return name[1].strip() if name else platform.machine()


_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}
"""As the kernel names them: two of x86-64, and that of Arm."""


def has_bfloat16(cpuinfo: str | None = None) -> bool:
    """Return whether the CPU cores have instructions for bfloat16, from the text of /proc/cpuinfo; others emulate it."""
    if cpuinfo is None:
        path = Path("/proc/cpuinfo")
        cpuinfo = path.read_text() if path.is_file() else ""
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.M)
    return bool(flags and _BFLOAT16 & set(flags[1].split()))


def _numbers(entry: str) -> list[str]:
    """Return the entries that a range stands for, as AWS's variable has them: `0-3`."""
    ends = re.fullmatch(r"(\d+)-(\d+)", entry)
    return [str(number) for number in range(int(ends[1]), int(ends[2]) + 1)] if ends else [entry]


def usable(accelerators: Accelerators, allowed: str | None) -> tuple[Gpu, ...]:
    """Return those that a process may use: indices or prefixes of UUIDs in order, ending at the first invalid one, as CUDA does.

    `allowed` is the value of the environment variable; None allows all. Raises PlanError where it names none of those that
    there are: taking the machine for one without accelerators would file their figures under the CPU's name.
    """
    everything = accelerators.devices()
    lost = {f"{accelerators.vendor} {index}": why for index, why in accelerators.lost.items()}
    if lost and allowed is None:
        raise AcceleratorError(
            f"accelerators that do not answer: {', '.join(f'{name} ({why})' for name, why in lost.items())}; leave them out"
            f" with {accelerators.visible_variable}"
        )
    if allowed is None:
        return everything
    chosen: list[Gpu] = []
    words = [word.strip() for word in allowed.split(",")]
    for entry in chain.from_iterable(map(_numbers, words)) if accelerators.vendor == "aws" else words:
        if entry.isdigit() and int(entry) in accelerators.lost:
            raise AcceleratorError(
                f"{accelerators.visible_variable}={allowed}: {entry} does not answer ({accelerators.lost[int(entry)]})"
            )
        if entry.isdigit():  # an index names a whole GPU; slices have names only
            match = [gpu for gpu in everything if gpu.index == int(entry) and not gpu.uuid.startswith("MIG-")]
        else:
            match = [gpu for gpu in everything if entry and gpu.uuid.startswith(entry)]
        if len(match) != 1 or match[0] in chosen:
            break
        chosen.append(match[0])
    if everything and not chosen and allowed.strip() not in ("", "-1"):
        raise PlanError(
            f"{accelerators.visible_variable}={allowed}: names none of the {len(everything)} accelerators that there are"
            f" ({', '.join(gpu.uuid for gpu in everything[:4])}{', ...' if len(everything) > 4 else ''}); give indices or UUIDs,"
            " or an empty value for CPU"
        )
    return tuple(chosen)


def core_groups(ranks: int) -> list[list[int]]:
    """Return one group of CPU cores per rank, equal in size; a core is left over for the front end where there is one."""
    cores = sorted(os.sched_getaffinity(0))
    each = max(1, (len(cores) - 1) // ranks if len(cores) > ranks else 1)
    return [cores[rank * each : (rank + 1) * each] for rank in range(ranks)]
