"""What a test demands of the host beyond the GPUs that its degrees take: how many, how large, which, and how linked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_llmperf.plan.checks import brief, written
from pytest_llmperf.units import parse_size

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Needs:
    """What a test demands of the host; the default demands nothing."""

    min_gpus: int | None = None
    """So many GPUs, though the engine may take fewer."""
    min_gpu_memory: int | None = None
    """Bytes that each of the GPUs must have."""
    gpu: str | None = None
    """A part of the GPUs' name, in either case, e.g. `H200`."""
    nvlink: bool = False
    """The GPUs of a tensor parallel group must reach each other over direct links; at TP 1 there is nothing to reach."""


NO_NEEDS = Needs()
NEEDS = ("min_gpus", "min_gpu_memory", "gpu", "nvlink")
"""The names of the demands, as marker arguments."""


def parse_needs(arguments: Mapping[str, object]) -> Needs:
    """Return the demands among a marker's arguments; None is none.

    Raises ValueError that names argument, value and remedy.
    """
    asked = {name: arguments[name] for name in NEEDS if arguments.get(name) is not None}
    number, memory, name, linked = (asked.get(field) for field in NEEDS)
    count = re.fullmatch(r"\+?0*[1-9][0-9]{0,5}", written(number))
    if number is not None and not count:
        raise ValueError(f"llmperf(min_gpus={brief(number)}): must be a whole number from 1, e.g. 4")
    size = parse_size(written(memory))
    if memory is not None and size is None:
        raise ValueError(f"llmperf(min_gpu_memory={brief(memory)}): must be a size above 0, e.g. 80 (GiB), '80 GiB' or '80 GB'")
    if name is not None and not (isinstance(name, str) and name.strip()):
        raise ValueError(f"llmperf(gpu={brief(name)}): must be a part of the GPU's name, e.g. 'H200'")
    if linked is not None and not isinstance(linked, bool):
        raise ValueError(f"llmperf(nvlink={brief(linked)}): must be True or False")
    return Needs(int(count[0]) if count else None, size, str(name).strip() if name else None, bool(linked))
