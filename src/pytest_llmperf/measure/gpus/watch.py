"""What the GPUs of one engine do, from before its start until after its end: memory of each rank, power, clocks, and trouble.

Memory is that of the engine's own process tree as the driver tells it by process; where process ids are hidden (containers), it
is what the device uses beyond what it used before the engine was started. Nothing is sampled outside of rounds.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from pytest_llmperf.measure.gpus.device import (
    GIB,
    HARDWARE,
    POWER_BRAKE,
    POWER_CAP,
    THERMAL,
    AcceleratorError,
    Gpu,
    Reading,
    Totals,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Self

    from pytest_llmperf.measure.gpus.device import Accelerators

_INTERVAL_S = 0.1
_PROCESSES_EVERY = 10
"""Who uses the memory is asked for in every tenth sample: on an H200 that takes 0.5 ms, the rest 0.1 ms."""
_POLL_S = 0.2
BACK_TO_IDLE_BYTES = 256 << 20
"""A GPU that has no more than so much more in use than before its engine has got its memory back."""
_BUSY = 0.5
_FEWEST = 5
"""Busy samples that a statement on clocks needs."""
_SLOW_CLOCK, _FAR_TOO_SLOW_CLOCK = 0.9, 0.5
"""Of the clock that a GPU should reach: below the first is worth a warning (few workstation cards hold their highest clock under
load), below the second something is wrong."""
_TROUBLE = (THERMAL, HARDWARE, POWER_BRAKE)
_FEWEST_LIMITED, _LIMITED_SHARE = 2, 0.01
"""Fewer samples than both are a change of clocks, of which the driver may say the same."""


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


class GpuWatch:
    """Watches the GPUs of one engine; made before the engine is started."""

    def __init__(self, accelerators: Accelerators, gpus: Sequence[Gpu]) -> None:
        """Note what is in use before anything of the engine is there."""
        self.gpus = tuple(gpus)
        self.accelerators = accelerators
        self.before = self.read(processes=True)
        self.noted = self.totals()
        """The counters when the last round ended: what happens between two rounds counts against the second."""
        self.started: tuple[int | None, ...] = ()
        self._pid: int | None = None
        self._tree: set[int] = set()
        self._names: dict[int, str] = {}

    def read(self, *, processes: bool) -> list[Reading]:
        """Return what the GPUs do now."""
        return self.accelerators.read(self.gpus, processes=processes)

    def totals(self) -> list[Totals]:
        """Return the GPUs' counters."""
        return self.accelerators.totals(self.gpus)

    def follow(self, pid: int) -> None:
        """Note the process whose descendants the engine's processes are."""
        self._pid = pid

    def mark_started(self) -> None:
        """Note the memory of the engine that is ready now."""
        try:
            self.started = self.engine_bytes(self.read(processes=True))
        except AcceleratorError:  # the first round says so
            self.started = (None,) * len(self.gpus)

    def tree(self) -> set[int]:
        """Return the engine's process ids, living now or seen before."""
        with contextlib.suppress(psutil.NoSuchProcess):
            if self._pid is not None:
                parent = psutil.Process(self._pid)
                self._tree |= {self._pid, *(one.pid for one in parent.children(recursive=True))}
        return self._tree

    def engine_bytes(self, readings: Sequence[Reading]) -> tuple[int | None, ...]:
        """Return what the engine uses on each GPU, of readings with processes."""
        tree = self.tree()
        return tuple(_engine_bytes(now, old, tree) for now, old in zip(readings, self.before, strict=True))

    def notice(self, readings: Sequence[Reading]) -> None:
        """Note whose the processes are while they live: a round is summed up when some of them may have ended."""
        pids = {pid for reading in readings for pid in reading.processes or {}}
        if pids <= self._tree | self._names.keys():
            return
        for pid in pids - self.tree():
            self._names.setdefault(pid, _name(pid))

    def strangers(self, *samples: Sequence[Reading]) -> list[str]:
        """Return which processes that are not the engine's use a GPU, in words; none where process ids are hidden."""
        tree, most = self.tree(), dict[tuple[Gpu, int], int]()
        for readings in samples:
            for gpu, reading in zip(self.gpus, readings, strict=True):
                for pid, used in (reading.processes or {}).items():
                    most[gpu, pid] = max(most.get((gpu, pid), 0), used or 0)
        known = {pid for _, pid in most}
        if known and not known & tree and not all(psutil.pid_exists(pid) for pid in known):
            return []  # ids of another namespace: whose they are cannot be told
        return [
            f"GPU {gpu.index} is used by another process: {in_words(pid, used, self._names.get(pid))}"
            for (gpu, pid), used in most.items()
            if pid not in tree
        ]

    def round(self) -> RoundWatch:
        """Return what watches one round, a context manager."""
        return RoundWatch(self)

    def calm(self, within_s: float) -> bool:
        """Wait until nothing slows the GPUs down and nobody else uses them; return whether that came within the time."""
        deadline = time.monotonic() + within_s
        while not self._is_calm():
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)  # a poll with a deadline: the driver tells nobody when a GPU has cooled down
        return True

    def _is_calm(self) -> bool:
        try:
            readings = self.read(processes=True)
        except AcceleratorError:
            return False
        return not self.strangers(readings) and not any(limit in _TROUBLE for one in readings for limit in one.limits)

    def held(self, within_s: float) -> dict[str, str]:
        """Wait until the memory of an engine that has ended is free; return which GPUs did not give it back, and why, by UUID."""
        deadline = time.monotonic() + within_s
        while True:
            left = {}
            for gpu, now, old in zip(self.gpus, self.read(processes=True), self.before, strict=True):
                more = (now.used_bytes or 0) - (old.used_bytes or 0)
                if now.used_bytes is None and old.used_bytes is not None:
                    left[gpu.uuid] = f"GPU {gpu.index} no longer tells how much of its memory is in use"
                elif more > BACK_TO_IDLE_BYTES:
                    left[gpu.uuid] = (
                        f"GPU {gpu.index} still has {more / GIB:.1f} GiB more in use than before its engine{_who(now)}"
                    )
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(_POLL_S)  # a poll with a deadline: the driver frees memory some seconds after a process has ended


def _who(reading: Reading) -> str:
    users = [in_words(pid, used) for pid, used in (reading.processes or {}).items()]
    return f": {', '.join(users)}" if users else ", and the driver names no process that has it"


def in_words(pid: int, used: int | None, name: str | None = None) -> str:
    """Return a user of a GPU in words, e.g. `pid 4711 (python3), 2.0 GiB`; its name is looked up where it isn't given."""
    return f"pid {pid} ({name or _name(pid)})" + (f", {used / GIB:.1f} GiB" if used else "")


def _name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.NoSuchProcess:
        return "not in this container, or ended"
    except psutil.Error:
        return "of another user"


def _engine_bytes(now: Reading, before: Reading, tree: set[int]) -> int | None:
    mine = [used for pid, used in (now.processes or {}).items() if pid in tree]
    if mine and None not in mine:
        return sum(one for one in mine if one is not None)
    if now.used_bytes is None or before.used_bytes is None:
        return None
    return max(0, now.used_bytes - before.used_bytes)


class RoundWatch:
    """A context manager around one round: samples in a thread, and sums up afterwards."""

    def __init__(self, watch: GpuWatch) -> None:
        """Note whose GPUs these are."""
        self._watch = watch
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="llmperf-gpus", daemon=True)
        self._samples: list[list[Reading]] = []
        self._noted = watch.noted
        self._totals: list[list[Totals]] = []
        self._times_s: list[float] = []
        self._failures: list[str] = []
        self._cpu_s = 0.0

    def __enter__(self) -> Self:
        """Read the counters and begin to sample."""
        self._mark()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End the sampling, and read the counters again."""
        self._ended.set()
        self._thread.join()
        self._read(processes=True)
        self._mark()
        self._watch.noted = self._totals[-1]

    def _mark(self) -> None:
        self._times_s.append(time.perf_counter())
        try:
            self._totals.append(self._watch.totals())
        except AcceleratorError as error:
            self._failures.append(str(error))
            self._totals.append([Totals() for _ in self._watch.gpus])

    def _read(self, *, processes: bool) -> None:
        try:
            readings = self._watch.read(processes=processes)
        except Exception as error:  # whatever it is: a thread that ends would leave the round unwatched, and green
            self._failures.append(str(error) or type(error).__name__)
            return
        self._samples.append(readings)
        if processes:
            self._watch.notice(readings)

    def _sample(self) -> None:
        number = 0
        while True:
            self._read(processes=number % _PROCESSES_EVERY == 0)
            number += 1
            if self._ended.wait(_INTERVAL_S):
                break
        self._cpu_s = time.thread_time()

    def result(self) -> GpuRound:
        """Return what the round brought; call it after the block."""
        series = [[one[index] for one in self._samples] for index in range(len(self._watch.gpus))]
        tree = self._watch.tree()
        memory = [self._memory(index, readings, tree) for index, readings in enumerate(series)]
        busy = [one for readings in series for one in readings if (one.utilization or 0) >= _BUSY]
        everything = [one for readings in series for one in readings]
        duration_s = self._times_s[-1] - self._times_s[0]
        energy_j = _sum(self._energy_j(index) for index in range(len(series)))
        return GpuRound(
            peak_bytes=tuple(max((one for one in values if one is not None), default=None) for values in memory),
            end_bytes=tuple(values[-1] if values else None for values in memory),
            energy_j=energy_j,
            power_w=energy_j / duration_s if energy_j is not None and duration_s else None,
            utilization=_mean(one.utilization for one in everything),
            sm_clock_mhz=_median(one.sm_clock_mhz for one in busy),
            temperature_c=max((one.temperature_c for one in everything if one.temperature_c is not None), default=None),
            power_capped=_mean(float(POWER_CAP in one.limits) for one in busy),
            trouble=tuple(self._trouble(series)),
            warnings=tuple(_low_clocks(self._watch.gpus, series, _FAR_TOO_SLOW_CLOCK, _SLOW_CLOCK)),
            cpu_share=self._cpu_s / duration_s if duration_s else None,
        )

    def _memory(self, index: int, readings: Sequence[Reading], tree: set[int]) -> list[int | None]:
        """Return the engine's bytes at each sample: told by process in some, in the others by what the device uses since."""
        before = self._watch.before[index]
        mine = used = None
        found = []
        for number, one in enumerate(readings):
            if one.processes is not None or not number:
                mine, used = _engine_bytes(one, before, tree), one.used_bytes
            since = 0 if used is None or one.used_bytes is None else one.used_bytes - used
            found.append(None if mine is None else mine + since)
        return found

    def _energy_j(self, index: int) -> float | None:
        return _risen(self._totals[0][index].energy_j, self._totals[-1][index].energy_j)

    def _trouble(self, series: Sequence[Sequence[Reading]]) -> list[str]:
        found = [f"the GPUs could not be watched: {text}" for text in dict.fromkeys(self._failures)]
        found += self._watch.strangers(*self._samples)
        found += _low_clocks(self._watch.gpus, series, 0.0, _FAR_TOO_SLOW_CLOCK)
        for index, (gpu, readings) in enumerate(zip(self._watch.gpus, series, strict=True)):
            found += [f"GPU {gpu.index}: {text}" for text in _slowed(readings)]
            if readings and readings[-1].used_bytes is None and self._watch.before[index].used_bytes is not None:
                found.append(f"GPU {gpu.index} no longer tells how much of its memory is in use")
            if errors := _risen(self._noted[index].uncorrected_errors, self._totals[-1][index].uncorrected_errors):
                what = "memory errors" if errors > 1 else "memory error"
                found.append(f"GPU {gpu.index}: {errors:.0f} {what} that ECC could not correct")
            found += [f"GPU {gpu.index}: {event}" for totals in self._totals for event in totals[index].events]
        return found


def _risen(first: float | None, last: float | None) -> float | None:
    """Return by how much a counter has risen, None where it isn't told, or has begun anew."""
    return None if first is None or last is None or last < first else last - first


def _slowed(readings: Sequence[Reading]) -> list[str]:
    """Return what slowed a GPU down, other than its power limit: that one is met under every full load."""
    found = []
    hottest = max((one.temperature_c for one in readings if one.temperature_c is not None), default=None)
    for limit in _TROUBLE:
        limited = sum(limit in one.limits for one in readings)
        if limited >= max(_FEWEST_LIMITED, _LIMITED_SHARE * len(readings)):
            heat = "" if hottest is None else f", {hottest:.0f} degrees at most"
            found.append(f"{limit} in {limited / len(readings):.0%} of the samples{heat}")
    return found


def _low_clocks(gpus: Sequence[Gpu], series: Sequence[Sequence[Reading]], low: float, high: float) -> list[str]:
    """Return which GPUs ran, while busy, at a share of their clock from `low` to below `high`, and no limit was told."""
    found = []
    for gpu, readings in zip(gpus, series, strict=True):
        free = _values(one.sm_clock_mhz for one in readings if (one.utilization or 0) >= _BUSY and not one.limits)
        clock = statistics.median(free) if len(free) >= _FEWEST else None
        if clock is not None and gpu.sm_clock_mhz and low <= clock / gpu.sm_clock_mhz < high:
            text = f"ran at {clock:,.0f} of {gpu.sm_clock_mhz:,.0f} MHz while busy, and the driver names no limit"
            found.append(f"GPU {gpu.index}: {text}")
    return found


def _values(values: Iterable[float | None]) -> list[float]:
    return [one for one in values if one is not None]


def _mean(values: Iterable[float | None]) -> float | None:
    known = _values(values)
    return statistics.fmean(known) if known else None


def _median(values: Iterable[float | None]) -> float | None:
    known = _values(values)
    return statistics.median(known) if known else None


def _sum(values: Iterable[float | None]) -> float | None:
    found = list(values)
    known = _values(found)
    return sum(known) if known and len(known) == len(found) else None
