"""The GPUs of the simulated engine: who uses them, and what is wrong with them, kept as files in one folder.

The folder is that of `LLMPERF_SIMULATED_STATE`; without it a process that writes something there gets one of its own, which the
engines that it starts inherit. `nvml.py` reads from there what NVML would say.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

STATE = "LLMPERF_SIMULATED_STATE"
NUMBER = "LLMPERF_SIMULATED_GPUS"
CONDITIONS = "conditions.json"
EVERY = "*"

GIB = 1 << 30


def count() -> int:
    """Return how many simulated GPUs there are."""
    return int(os.environ.get(NUMBER, "8"))


def folder(prefix: str = "llmperf-simulated-") -> Path:
    """Return the folder of the state; where none is set a temporary one is made, whose name begins so, for this process."""
    if STATE not in os.environ:
        os.environ[STATE] = tempfile.mkdtemp(prefix=prefix)
        atexit.register(_remove, os.environ[STATE], os.getpid())
    path = Path(os.environ[STATE])
    path.mkdir(parents=True, exist_ok=True)
    return path


def _remove(path: str, maker: int) -> None:
    if os.getpid() == maker:  # a forked process that ends by itself has no say in it
        shutil.rmtree(path, ignore_errors=True)


def occupy(used: dict[int, int]) -> Path:
    """Note that this process uses so many bytes of these GPUs, until it ends; return the file that says so."""
    file = folder() / f"{os.getpid()}.json"
    complete = file.with_suffix(".new")
    complete.write_text(json.dumps(used))
    complete.replace(file)  # a reader never sees half of it
    atexit.register(file.unlink, missing_ok=True)
    return file


def processes(index: int) -> dict[int, int]:
    """Return the bytes that living processes use of a GPU, by process id."""
    users: dict[int, int] = {}
    if STATE not in os.environ:
        return users
    for file in folder().glob("[0-9]*.json"):
        pid = int(file.stem)
        if not Path(f"/proc/{pid}").exists():
            continue  # killed; the driver would have taken the memory back
        try:
            used = json.loads(file.read_text()).get(str(index))
        except FileNotFoundError:
            continue
        if used:
            users[pid] = int(used)
    return users


def set_conditions(conditions: dict[str, dict[str, Any]]) -> None:
    """Set what is wrong, by the GPU's index or `*` for all; the names are those of `condition`."""
    file = folder() / CONDITIONS
    file.with_suffix(".new").write_text(json.dumps(conditions))
    file.with_suffix(".new").replace(file)


def condition(index: int, name: str, default: Any) -> Any:
    """Return a condition of a GPU: `used_bytes` (beyond the processes'), `reasons`, `sm_clock_mhz`, `ecc`, `xid`, ..."""
    file = folder() / CONDITIONS if STATE in os.environ else None
    conditions = json.loads(file.read_text()) if file and file.is_file() else {}
    return {**conditions.get(EVERY, {}), **conditions.get(str(index), {})}.get(name, default)
