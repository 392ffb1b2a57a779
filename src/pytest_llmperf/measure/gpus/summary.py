"""From what was read of an engine's GPUs in one round to its figures and to what was wrong: functions of values alone.

Memory is that of the engine's own processes as the driver tells it by process; where process ids are hidden (containers), it is
what the device uses beyond what it used before the engine was started.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_llmperf.measure.gpus.device import DISTURBED, POWER_CAP, Gpu, Reading, Totals

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

_BUSY = 0.5
_FEWEST = 5
"""Busy samples that a statement on clocks needs."""
_SLOW_CLOCK, _FAR_TOO_SLOW_CLOCK = 0.9, 0.5
"""Of the clock that a GPU should reach: below the first is worth a warning (few workstation cards hold their highest clock under
load), below the second something is wrong."""
_FEWEST_LIMITED, _LIMITED_SHARE = 2, 0.01
"""Fewer samples than both are a change of clocks, of which the driver may say the same."""


@dataclass(frozen=True)
class RoundReadings:
    """What was read in one round: of each GPU in the order of the engine's ranks."""

    gpus: Sequence[Gpu]
    before: Sequence[Reading]
    """Before the engine was started."""
    samples: Sequence[Sequence[Reading]]
    noted: Sequence[Totals]
    """The counters when the last round ended: what happens between two rounds counts against the second."""
    first: Sequence[Totals]
    last: Sequence[Totals]
    duration_s: float
    engine: Collection[int]
    """The engine's process ids."""
    cpu_s: float = 0.0
    """CPU time that the sampling took."""
    failures: Sequence[str] = ()
    """Why something could not be read."""
    strangers: Sequence[str] = ()
    """Which processes that are not the engine's used a GPU, in words."""

    def of(self, index: int) -> list[Reading]:
        """Return all readings of one GPU."""
        return [sample[index] for sample in self.samples]


@dataclass(frozen=True)
class GpuRound:
    """What an engine's GPUs did in one round; None for what is not told."""

    peak_bytes: tuple[int | None, ...] = ()
    """Of the engine, by rank."""
    end_bytes: tuple[int | None, ...] = ()
    energy_j: float | None = None
    """Of all its GPUs together."""
    power_w: float | None = None
    """The same, on average."""
    utilization: float | None = None
    """Mean share of time in which a GPU was busy."""
    sm_clock_mhz: float | None = None
    """Median while busy."""
    temperature_c: float | None = None
    """The highest."""
    power_capped: float | None = None
    """Share of the busy samples in which a GPU's clock was held down by its power limit: normal under full load."""
    trouble: tuple[str, ...] = ()
    """Why the round must not count; most of it passes when it is waited for."""
    warnings: tuple[str, ...] = ()
    """What a reader should know, though the round counts."""
    cpu_share: float | None = None
    """Share of a core that the sampling took."""


def summarize(read: RoundReadings) -> GpuRound:
    """Return the figures of a round, and what was wrong."""
    ranks = range(len(read.gpus))
    memory = [_memory(read.of(rank), read.before[rank], read.engine) for rank in ranks]
    every = [reading for rank in ranks for reading in read.of(rank)]
    busy = [reading for reading in every if _is_busy(reading)]
    # A counter that has not moved is one that is not kept, or a round too short for it: no GPU takes 0 J, 0 MHz or 0 degrees.
    energy_j = _sum([_risen(first.energy_j, last.energy_j) or None for first, last in zip(read.first, read.last, strict=True)])
    return GpuRound(
        peak_bytes=tuple(max((size for size in sizes if size is not None), default=None) for sizes in memory),
        end_bytes=tuple(sizes[-1] if sizes else None for sizes in memory),
        energy_j=energy_j,
        power_w=energy_j / read.duration_s if energy_j is not None and read.duration_s else None,
        utilization=_mean(reading.utilization for reading in every),
        sm_clock_mhz=_median(reading.sm_clock_mhz or None for reading in busy),
        temperature_c=max(_known(reading.temperature_c or None for reading in every), default=None),
        power_capped=_mean(float(POWER_CAP in reading.limits) for reading in busy),
        trouble=tuple(_trouble(read)),
        warnings=tuple(_low_clocks(read, _FAR_TOO_SLOW_CLOCK, _SLOW_CLOCK)),
        cpu_share=read.cpu_s / read.duration_s if read.duration_s else None,
    )


def engine_bytes(now: Reading, before: Reading, engine: Collection[int]) -> int | None:
    """Return what the engine's processes use of a GPU; None where that is not told."""
    own = [used for pid, used in (now.processes or {}).items() if pid in engine]
    if own and None not in own:
        return sum(used for used in own if used is not None)
    if now.used_bytes is None or before.used_bytes is None:
        return None
    return max(0, now.used_bytes - before.used_bytes)


def _memory(readings: Sequence[Reading], before: Reading, engine: Collection[int]) -> list[int | None]:
    """Return the engine's bytes at each sample: told by process in some, in the others by what the device uses since."""
    own = used = None
    sizes = []
    for number, reading in enumerate(readings):
        if reading.processes is not None or not number:
            own, used = engine_bytes(reading, before, engine), reading.used_bytes
        since = 0 if used is None or reading.used_bytes is None else reading.used_bytes - used
        sizes.append(None if own is None else own + since)
    return sizes


def _trouble(read: RoundReadings) -> list[str]:
    trouble = [f"the GPUs could not be watched: {text}" for text in dict.fromkeys(read.failures)]
    trouble += read.strangers
    trouble += _low_clocks(read, 0.0, _FAR_TOO_SLOW_CLOCK)
    for rank, gpu in enumerate(read.gpus):
        readings = read.of(rank)
        trouble += [f"GPU {gpu.index}: {text}" for text in _slowed(readings)]
        if readings and readings[-1].used_bytes is None and read.before[rank].used_bytes is not None:
            trouble.append(f"GPU {gpu.index} no longer tells how much of its memory is in use")
        if errors := _risen(read.noted[rank].uncorrected_errors, read.last[rank].uncorrected_errors):
            what = "memory errors" if errors > 1 else "memory error"
            trouble.append(f"GPU {gpu.index}: {errors:.0f} {what} that ECC could not correct")
        trouble += [f"GPU {gpu.index}: {event}" for event in read.first[rank].events + read.last[rank].events]
    return trouble


def _slowed(readings: Sequence[Reading]) -> list[str]:
    """Return what slowed a GPU down, other than its power limit: that one is met under every full load."""
    slowed = []
    hottest = max(_known(reading.temperature_c for reading in readings), default=None)
    for limit in DISTURBED:
        limited = sum(limit in reading.limits for reading in readings)
        if limited >= max(_FEWEST_LIMITED, _LIMITED_SHARE * len(readings)):
            heat = "" if hottest is None else f", {hottest:.0f} degrees at most"
            slowed.append(f"{limit} in {limited / len(readings):.0%} of the samples{heat}")
    return slowed


def _low_clocks(read: RoundReadings, low: float, high: float) -> list[str]:
    """Return which GPUs ran, while busy, at a share of their clock from `low` to below `high`, and no limit was told."""
    slow = []
    for rank, gpu in enumerate(read.gpus):
        free = _known(reading.sm_clock_mhz or None for reading in read.of(rank) if _is_busy(reading) and not reading.limits)
        clock = statistics.median(free) if len(free) >= _FEWEST else None
        if clock is not None and gpu.sm_clock_mhz and low <= clock / gpu.sm_clock_mhz < high:
            text = f"ran at {clock:,.0f} of {gpu.sm_clock_mhz:,.0f} MHz while busy, and the driver names no limit"
            slow.append(f"GPU {gpu.index}: {text}")
    return slow


def _is_busy(reading: Reading) -> bool:
    return (reading.utilization or 0) >= _BUSY


def _risen(first: float | None, last: float | None) -> float | None:
    """Return by how much a counter has risen, None where it isn't told, or has begun anew."""
    return None if first is None or last is None or last < first else last - first


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: Iterable[float | None]) -> float | None:
    known = _known(values)
    return statistics.fmean(known) if known else None


def _median(values: Iterable[float | None]) -> float | None:
    known = _known(values)
    return statistics.median(known) if known else None


def _sum(values: Sequence[float | None]) -> float | None:
    """Return the sum; None where a value is missing."""
    known = _known(values)
    return sum(known) if known and len(known) == len(values) else None
