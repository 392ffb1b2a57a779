"""The GPUs of a run: one engine after another gets some to itself, and those that did not get their memory back get none.

What is left of an engine, or another process, would make the next engine smaller or slower, and the blame would be on it.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from pytest_llmperf.measure.engines.engine import EngineError
from pytest_llmperf.measure.engines.remains import folder_prefix
from pytest_llmperf.measure.gpus.device import AcceleratorError
from pytest_llmperf.measure.gpus.leases import LeaseError, Locks, host_turn, lease, lock_folder
from pytest_llmperf.measure.gpus.vendors import open_accelerators
from pytest_llmperf.measure.gpus.watch import BACK_TO_IDLE_BYTES, GpuWatch, in_words
from pytest_llmperf.units import GIB, gib

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from pytest_llmperf.measure.gpus.device import Accelerators, Gpu, Reading
    from pytest_llmperf.measure.host.machine import Host

RELEASE_S = 30.0
"""How long the driver may take to free the memory of processes that have ended; seen on H200: 4 to 6 s."""
_IN_USE_BYTES, _IN_USE_SHARE = 2 * GIB, 0.02
"""More than both in use, with no process that is told, is no idle GPU. A driver keeps 0.6 GiB of an H200 for itself."""


class Tenancy:
    """Gives the host's GPUs to one engine at a time."""

    def __init__(self, host: Host, *, alone: bool, patience_s: float, waiting: Callable[[str], None]) -> None:
        """Note whose GPUs they are. `alone` keeps other engines off the whole host, not only off the GPUs."""
        self._host = host
        self._alone = alone
        self._patience_s = self._patience_left_s = patience_s
        self._waiting = waiting
        self._accelerators: Accelerators | None = None
        self._quarantine: dict[str, tuple[str, int]] = {}
        """By UUID why a GPU must not be used, and the bytes that were in use before."""

    @contextlib.contextmanager
    def turn(
        self, ranks: int, gpus: Sequence[Gpu] | None = None, *, together: int = 1, simulated: bool = False
    ) -> Iterator[GpuWatch | None]:
        """Have the host, and one GPU for each rank, while an engine is started, measured and stopped inside.

        The GPUs are some of `gpus`, by default of the host's; each `together` of them are a TP group. Yields what watches them,
        None where there are none. Raises EngineError when GPUs can't be had, and afterwards when one did not get its memory back.
        """
        locks = Locks(_simulated_folder() if simulated else lock_folder(), self._waiting)
        with contextlib.ExitStack() as stack:
            try:
                # On CPU every engine wants all cores.
                stack.enter_context(host_turn(locks, alone=self._alone or not self._host.devices))
                some = self._host.devices if gpus is None else gpus
                watch = self._leased(simulated, (ranks, together), some, locks, stack) if self._host.devices else None
            except (LeaseError, AcceleratorError) as error:
                raise EngineError(str(error)) from None
            if watch is None:
                yield None
            else:
                yield from self._watched(watch)

    def _leased(
        self, simulated: bool, number: tuple[int, int], gpus: Sequence[Gpu], locks: Locks, stack: contextlib.ExitStack
    ) -> GpuWatch:
        """Return what watches the GPUs that are leased now, until the stack is closed."""
        self._accelerators = accelerators = self._accelerators or open_accelerators(simulated=simulated)
        if accelerators is None:
            raise EngineError("The accelerators that this run began with are gone: their driver does not answer.")
        here = {gpu.uuid for gpu in accelerators.devices()}
        if gone := [gpu for gpu in gpus if gpu.uuid not in here]:
            named = (
                f"GPU {gpu.index} ({gpu.uuid}{', ' * (gpu.index in accelerators.lost)}{accelerators.lost.get(gpu.index, '')})"
                for gpu in gone
            )
            raise EngineError(f"{', '.join(named)} is gone since this run began; the driver's own tools should tell more.")
        remedy = f"End what uses it, or leave it out with {accelerators.visible_variable}."
        # GPUs that were waited for in vain are not waited for again: every further test would wait as long for the same.
        patience_s, self._patience_left_s = self._patience_left_s, 0.0
        asked = lease(gpus, number[0], locks, unfit=self._unfit, together=number[1], patience_s=patience_s, remedy=remedy)
        leased = stack.enter_context(asked)
        self._patience_left_s = self._patience_s
        return GpuWatch(accelerators, leased)

    def _watched(self, watch: GpuWatch) -> Iterator[GpuWatch]:
        left: dict[str, str] = {}
        try:
            yield watch
        finally:
            try:
                left = watch.wait_until_released(RELEASE_S)
            except AcceleratorError as error:
                left = {gpu.uuid: f"GPU {gpu.index} may still be in use: {error}" for gpu in watch.gpus}
            for gpu, before in zip(watch.gpus, watch.before, strict=True):
                if gpu.uuid in left:
                    self._quarantine[gpu.uuid] = left[gpu.uuid], before.used_bytes or 0
        if left:
            raise EngineError(f"{'; '.join(left.values())}. It gets no other engine until that is free.")

    def _unfit(self, gpus: Sequence[Gpu]) -> dict[str, str]:
        assert self._accelerators is not None
        readings = self._accelerators.read(gpus, processes=True)
        reasons = {gpu.uuid: self._wrong(gpu, now) for gpu, now in zip(gpus, readings, strict=True)}
        return {uuid: why for uuid, why in reasons.items() if why}

    def _wrong(self, gpu: Gpu, now: Reading) -> str | None:
        """Return why an engine must not have this GPU now."""
        used = now.used_bytes or 0
        if gpu.uuid in self._quarantine:
            why, before = self._quarantine[gpu.uuid]
            if now.used_bytes is None or used > before + BACK_TO_IDLE_BYTES:
                return f"quarantine: {why}"
            del self._quarantine[gpu.uuid]
        if now.processes:
            return f"GPU {gpu.index} is used by {', '.join(in_words(pid, n) for pid, n in now.processes.items())}"
        if used > max(_IN_USE_BYTES, _IN_USE_SHARE * (gpu.memory_bytes or 0)):
            return f"GPU {gpu.index} has {gib(used)} in use, and the driver names no process that has it"
        return None

    def close(self) -> None:
        """Release the driver's library."""
        accelerators, self._accelerators = self._accelerators, None
        if accelerators is not None:
            accelerators.close()


def _simulated_folder() -> Path:
    from importlib import import_module

    folder: Path = import_module("pytest_llmperf.testing.gpus").folder(folder_prefix("simulated"))
    return folder
