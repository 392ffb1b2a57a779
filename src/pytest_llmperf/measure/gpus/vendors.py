"""Which accelerators this machine has, whoever made them.

NVIDIA's are read through NVML (`nvidia.py`), AMD's through `amd-smi` (`amd.py`), AWS's through the Neuron tools (`neuron.py`).
A library or a tool that is absent means that there are none of its kind, which is a normal place to run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_llmperf.measure.gpus import amd, neuron, nvidia

if TYPE_CHECKING:
    from pytest_llmperf.measure.gpus.device import Accelerators


def open_accelerators(*, simulated: bool = False) -> Accelerators | None:
    """Return the accelerators of this machine, or the simulated ones; None where there are none.

    The caller closes them.
    """
    if simulated:
        return nvidia.find("pytest_llmperf.testing.nvml")
    return nvidia.find() or amd.find() or neuron.find()
