"""Samples of an engine's GPUs in one round, taken by a thread beside the load. Nothing is sampled outside of rounds."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from pytest_llmperf.measure.gpus.device import AcceleratorError, Reading, Totals
from pytest_llmperf.measure.gpus.summary import GpuRound, RoundReadings, summarize

if TYPE_CHECKING:
    from typing import Self

    from pytest_llmperf.measure.gpus.watch import GpuWatch

INTERVAL_S = 0.1
_PROCESSES_EVERY = 10
"""Who uses the memory is asked for in every tenth sample: on an H200 that takes 0.5 ms, the rest 0.1 ms."""


class RoundWatch:
    """A context manager around one round: samples in a thread, and sums up afterwards."""

    def __init__(self, watch: GpuWatch) -> None:
        """Note whose GPUs these are."""
        self._watch = watch
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="llmperf-gpus", daemon=True)
        self._samples: list[list[Reading]] = []
        self._noted, self._first, self._last = watch.noted, list[Totals](), list[Totals]()
        self._began_s = self._ended_s = self._cpu_s = 0.0
        self._failures: list[str] = []

    def __enter__(self) -> Self:
        """Read the counters and begin to sample."""
        self._began_s, self._first = time.perf_counter(), self._totals()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End the sampling, and read the counters again."""
        self._ended.set()
        self._thread.join()
        self._read(processes=True)
        self._ended_s, self._last = time.perf_counter(), self._totals()
        self._watch.noted = self._last

    def _totals(self) -> list[Totals]:
        try:
            return self._watch.totals()
        except AcceleratorError as error:
            self._failures.append(str(error))
            return [Totals() for _ in self._watch.gpus]

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
            if self._ended.wait(INTERVAL_S):
                break
        self._cpu_s = time.thread_time()

    def result(self) -> GpuRound:
        """Return what the round brought; call it after the block."""
        watch = self._watch
        return summarize(
            RoundReadings(
                gpus=watch.gpus,
                before=watch.before,
                samples=self._samples,
                noted=self._noted,
                first=self._first,
                last=self._last,
                duration_s=self._ended_s - self._began_s,
                engine=watch.tree(),
                cpu_s=self._cpu_s,
                failures=self._failures,
                strangers=watch.strangers(*self._samples),
            )
        )
