"""An accelerator, what it does at one instant, and the protocol that each vendor's module meets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence


class AcceleratorError(ValueError):
    """The driver of the accelerators, or its tool, does not answer, or not as it is documented. The message says which."""


@dataclass(frozen=True)
class Gpu:
    """One accelerator: a GPU, a MIG slice of one, or a NeuronCore."""

    index: int
    """Its number in the vendor's own tools; what CUDA_VISIBLE_DEVICES and its like may name."""
    uuid: str
    """What names it for good; leases are taken on it."""
    name: str
    memory_bytes: int | None
    """None where the driver does not tell, as of GPUs that share the machine's memory."""
    peers: tuple[int, ...] = ()
    """Indices of those that it reaches over direct links (NVLink, xGMI, NeuronLink)."""
    links: int = 0
    """How many such links it has; 0: only PCIe."""
    sm_clock_mhz: float | None = None
    """The clock that it should reach under load: its application clock, else its highest."""
    power_limit_w: float | None = None
    default_power_limit_w: float | None = None
    """The power limit that it comes with."""


@dataclass(frozen=True)
class Reading:
    """What one accelerator does at one instant; None for what it doesn't tell."""

    used_bytes: int | None = None
    processes: dict[int, int | None] | None = None
    """Bytes in use by process id; None where that was not asked for or is not told, a None inside where only the id is."""
    sm_clock_mhz: float | None = None
    utilization: float | None = None
    """Share of time in which it was busy."""
    temperature_c: float | None = None
    limits: tuple[str, ...] = ()
    """What holds its clocks down: `POWER_CAP` and the other words below."""


@dataclass(frozen=True)
class Totals:
    """Cumulative counters of one accelerator, slow to read: at the beginning and the end of a round; None where not told."""

    energy_j: float | None = None
    uncorrected_errors: int | None = None
    """Memory errors that ECC could not correct."""
    events: tuple[str, ...] = field(default=())
    """Critical events since the last reading, e.g. `XID 79`."""


POWER_CAP = "power cap"
"""Normal under full load: clocks give way to the power limit."""
THERMAL = "thermal slow-down"
HARDWARE = "hardware slow-down"
POWER_BRAKE = "power brake"
SET_LOWER = "clocks set lower"
"""Normal too: somebody has chosen them, or the driver's own choice is reached."""
DISTURBED = (THERMAL, HARDWARE, POWER_BRAKE)
"""These mean that something is wrong."""


class Accelerators(Protocol):
    """The accelerators of one vendor in this machine. Close it when it is needed no more."""

    @property
    def vendor(self) -> str:
        """Return `nvidia`, `amd` or `aws`."""

    @property
    def visible_variable(self) -> str:
        """Return the environment variable that says which of them a process may use, e.g. `CUDA_VISIBLE_DEVICES`."""

    @property
    def versions(self) -> dict[str, str]:
        """Return versions of what drives them, e.g. `{"driver": "580.159.04", "cuda": "13.0"}`."""

    @property
    def lost(self) -> dict[int, str]:
        """Return why some do not answer, by index, as `devices` has found it."""

    def devices(self) -> tuple[Gpu, ...]:
        """Return all that answer in the order of their indices, whatever a process may use; raises AcceleratorError."""

    def read(self, gpus: Sequence[Gpu], *, processes: bool) -> list[Reading]:
        """Return what each of these does now; who uses their memory only where `processes` asks for it, which takes longer.

        Raises AcceleratorError, as `totals` does.
        """

    def totals(self, gpus: Sequence[Gpu]) -> list[Totals]:
        """Return the cumulative counters of each of these."""

    def close(self) -> None:
        """Release the library."""
