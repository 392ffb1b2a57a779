"""The GPUs of one engine, from before its start until after its end: who uses them, and whether they are as they were before."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import psutil

from pytest_llmperf.measure.gpus.device import DISTURBED, AcceleratorError, Gpu, Reading, Totals
from pytest_llmperf.measure.gpus.summary import engine_bytes
from pytest_llmperf.units import gib

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_llmperf.measure.gpus.device import Accelerators

POLL_S = 0.2
BACK_TO_IDLE_BYTES = 256 << 20
"""A GPU that has no more than so much more in use than before its engine has got its memory back."""


def process_tree(pid: int) -> set[int]:
    """Return the ids of a process and of all its living descendants; none where it has ended."""
    try:
        return {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}
    except psutil.NoSuchProcess:
        return set()


class GpuWatch:
    """Watches the GPUs of one engine; made before the engine is started."""

    def __init__(
        self, accelerators: Accelerators, gpus: Sequence[Gpu], processes: Callable[[int], set[int]] = process_tree
    ) -> None:
        """Note what is in use before anything of the engine is there; `processes` tells a process's descendants."""
        self.gpus = tuple(gpus)
        self.accelerators = accelerators
        self.before = self.read(processes=True)
        self.noted = self.totals()
        """The counters when the last round ended: what happens between two rounds counts against the second."""
        self.started: tuple[int | None, ...] = ()
        self._processes = processes
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
            readings = self.read(processes=True)
        except AcceleratorError:  # the first round says so
            self.started = (None,) * len(self.gpus)
        else:
            tree = self.tree()
            self.started = tuple(engine_bytes(now, old, tree) for now, old in zip(readings, self.before, strict=True))

    def tree(self) -> set[int]:
        """Return the engine's process ids, living now or seen before."""
        if self._pid is not None:
            self._tree |= self._processes(self._pid)
        return self._tree

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

    def wait_until_undisturbed(self, within_s: float) -> bool:
        """Wait until nothing slows the GPUs down and nobody else uses them; return whether that came within the time."""
        deadline = time.monotonic() + within_s
        while self._is_disturbed():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)  # a poll with a deadline: the driver tells nobody when a GPU has cooled down
        return True

    def _is_disturbed(self) -> bool:
        try:
            readings = self.read(processes=True)
        except AcceleratorError:
            return True
        return bool(self.strangers(readings)) or any(limit in DISTURBED for reading in readings for limit in reading.limits)

    def wait_until_released(self, within_s: float) -> dict[str, str]:
        """Wait until the memory of an engine that has ended is free; return why a GPU did not get it back, by UUID."""
        deadline = time.monotonic() + within_s
        while True:
            left = {}
            for gpu, now, old in zip(self.gpus, self.read(processes=True), self.before, strict=True):
                more = (now.used_bytes or 0) - (old.used_bytes or 0)
                if now.used_bytes is None and old.used_bytes is not None:
                    left[gpu.uuid] = f"GPU {gpu.index} no longer tells how much of its memory is in use"
                elif more > BACK_TO_IDLE_BYTES:
                    left[gpu.uuid] = f"GPU {gpu.index} still has {gib(more)} more in use than before its engine{_who(now)}"
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(POLL_S)  # a poll with a deadline: the driver frees memory some seconds after a process has ended


def _who(reading: Reading) -> str:
    users = [in_words(pid, used) for pid, used in (reading.processes or {}).items()]
    return f": {', '.join(users)}" if users else ", and the driver names no process that has it"


def in_words(pid: int, used: int | None, name: str | None = None) -> str:
    """Return a user of a GPU in words, e.g. `pid 4711 (python3), 2.0 GiB`; its name is looked up where it isn't given."""
    return f"pid {pid} ({name or _name(pid)})" + (f", {gib(used)}" if used else "")


def _name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.NoSuchProcess:
        return "not in this container, or ended"
    except psutil.Error:
        return "of another user"
