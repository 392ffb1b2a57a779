"""The GPU memory of an engine's ranks, as values: `measured.gpu_memory`. Where the bytes come from is in `summary.py`."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_llmperf.units import gib

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_llmperf.measure.gpus.summary import GpuRound
    from pytest_llmperf.measure.gpus.watch import GpuWatch


@dataclass(frozen=True)
class RankMemory:
    """The GPU memory of one rank of an engine in one launch; None for what is not told."""

    rank: int
    gpu: int
    """The GPU's index in the driver's own numbering."""
    idle_bytes: int | None
    """In use on the device before the engine was started, the driver's own share included."""
    started_bytes: int | None
    """Of the engine, when it was ready."""
    peak_bytes: int | None
    """Of the engine, the most that was seen during the rounds, sampled ten times a second."""
    grown_bytes: int | None
    """Of the engine, at the end of the last round less that at the end of the first."""


_UNEQUAL = "either TP does not split the model, or code on one rank, or another process, takes memory for itself"


@dataclass(frozen=True)
class GpuMemory:
    """The memory of an engine's ranks, the peak of the rounds: `measured.gpu_memory`."""

    ranks: tuple[RankMemory, ...]

    @property
    def per_rank(self) -> tuple[int, ...]:
        """Return the peak of each rank in bytes; raises KeyError where a rank's is not known."""
        peaks = tuple(rank.peak_bytes for rank in self.ranks)
        if not peaks or None in peaks:
            raise KeyError("the GPU memory of the engine was not measured: it has no GPU, or its driver doesn't tell")
        return tuple(peak for peak in peaks if peak is not None)

    @property
    def imbalance(self) -> float:
        """Return how much less the emptiest rank holds than the fullest, as a fraction of the fullest: 0 is equal."""
        most = max(self.per_rank)
        return 1 - min(self.per_rank) / most if most else 0.0

    def is_equal(self, *, rel: float = 0.02) -> Equality:
        """Return whether no rank holds over `rel` less than the fullest; as a bool it fails an assertion that says which does."""
        equal = self.imbalance <= rel
        return Equality(equal, str(self) if equal else f"{self}; {_UNEQUAL}")

    def __str__(self) -> str:
        """Return each rank's memory, and who stands out by how much."""
        peaks = self.per_rank
        each = ", ".join(f"rank {rank.rank} on GPU {rank.gpu}: {gib(peak, 2)}" for rank, peak in _pairs(self.ranks, peaks))
        if len(peaks) < 2 or min(peaks) == max(peaks):
            return each
        middle = statistics.median(peaks)
        far, peak = max(_pairs(self.ranks, peaks), key=lambda pair: (abs(pair[1] - middle), pair[1]))
        others = (sum(peaks) - peak) / (len(peaks) - 1)
        share = f" ({abs(peak / others - 1):.1%})" if others else ""
        more = f"{gib(abs(peak - others), 2)}{share} {'more' if peak > others else 'less'}"
        return f"{each}; rank {far.rank} holds {more} than the other{'s' if len(peaks) > 2 else ''}"


def _pairs(ranks: Sequence[RankMemory], peaks: Sequence[int]) -> list[tuple[RankMemory, int]]:
    return list(zip(ranks, peaks, strict=True))


@dataclass(frozen=True)
class Equality:
    """A truth value that says what it is about."""

    equal: bool
    why: str

    def __bool__(self) -> bool:
        """Return whether it is so."""
        return self.equal

    def __repr__(self) -> str:
        """Return what a failing assertion shows."""
        return f"<{'equal' if self.equal else 'not equal'}: {self.why}>"


def rank_memory(watch: GpuWatch, rounds: Sequence[GpuRound]) -> tuple[RankMemory, ...]:
    """Return the memory of each rank over the rounds of a launch."""
    memory = []
    for rank, (gpu, old) in enumerate(zip(watch.gpus, watch.before, strict=True)):
        peaks = [played.peak_bytes[rank] for played in rounds]
        ends = [played.end_bytes[rank] for played in rounds]
        first, last = (ends[0], ends[-1]) if len(ends) > 1 else (None, None)  # within one round nobody sees it grow
        memory.append(
            RankMemory(
                rank=rank,
                gpu=gpu.index,
                idle_bytes=old.used_bytes,
                started_bytes=watch.started[rank] if watch.started else None,
                peak_bytes=max((peak for peak in peaks if peak is not None), default=None),
                grown_bytes=None if first is None or last is None else last - first,
            )
        )
    return tuple(memory)
