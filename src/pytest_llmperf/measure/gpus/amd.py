"""AMD GPUs through the JSON of `amd-smi`, since ROCm 6.2.

Written after the documented format (the command's source and change log in ROCm/rocm-systems, up to ROCm 7.14); not run on
hardware yet. Versions differ: a number is bare or `{"value": 5, "unit": "W"}`, the GPUs are a list or stand under `gpu_data`.
What a GPU does not tell is "N/A" or absent, and None here. Each call starts a Python program: ask seldom while measuring.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_llmperf.measure.gpus.device import HARDWARE, POWER_CAP, THERMAL, AcceleratorError, Gpu, Reading, Totals

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_TIMEOUT_S = 30.0
# What amd-smi calls MB is 2**20 bytes: it divides bytes by 1024 twice.
_UNITS = {"W": 1.0, "J": 1.0, "MHz": 1.0, "C": 1.0, "%": 0.01, "B": 1.0, "KB": 2.0**10, "MB": 2.0**20, "GB": 2.0**30}
# Neither `power.throttle_status` nor `total_gfx_clk_below_host_limit`: both were seen active while GPUs were idle.
_LIMITS = {
    POWER_CAP: ("ppt", "gfx_clk_below_host_limit_power"),
    THERMAL: ("socket_thermal", "vr_thermal", "hbm_thermal", "gfx_clk_below_host_limit_thermal"),
    HARDWARE: ("prochot",),
}
_STATUS = "throttle.{}_violation_status"


class AmdSmiError(AcceleratorError):
    """`amd-smi` printed something else than what is documented."""


class CommandFailedError(AmdSmiError):
    """`amd-smi` lacks this command here, or it failed: no driver, no permission, a guest system."""


def run_command(command: list[str]) -> str:
    """Return what a command prints; raises `CommandFailedError` with its last words where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CommandFailedError(f"`{' '.join(command)}` could not be run: {error}") from error
    if done.returncode:
        words = (done.stderr or done.stdout).strip()[-300:]
        raise CommandFailedError(f"`{' '.join(command)}` ended with code {done.returncode}: {words or 'no message'}")
    return done.stdout


def find(which: Callable[..., str | None] = shutil.which, run: Callable[[list[str]], str] = run_command) -> Amd | None:
    """Return the AMD GPUs of this machine, None where there is no `amd-smi` or where it lists none."""
    tool = which("amd-smi", path=os.pathsep.join((os.environ.get("PATH", os.defpath), "/opt/rocm/bin")))
    if tool is None:
        return None
    try:
        return Amd(tool, run) if _rows(run([tool, "list", "--json"])) else None
    except CommandFailedError:  # ROCm's image on a host without AMD's driver, which is a normal place to run
        return None


class Amd:
    """The AMD GPUs of this machine, or their partitions where they are cut into some."""

    vendor = "amd"
    visible_variable = "HIP_VISIBLE_DEVICES"

    lost: ClassVar[dict[int, str]] = {}
    """None: the tool lists only those that answer."""

    def __init__(self, tool: str = "amd-smi", run: Callable[[list[str]], str] = run_command) -> None:
        """Take the command, and what runs it and returns its output."""
        self._tool, self._run = tool, run
        self._numbers: dict[str, int] = {}

    @property
    def versions(self) -> dict[str, str]:
        """Return the versions of the driver, of ROCm and of `amd-smi`."""
        return parse_versions(self._ask("version"))

    def devices(self) -> tuple[Gpu, ...]:
        """Return every GPU; raises `AmdSmiError` for one that doesn't tell its memory."""
        # `-e` adds HIP's numbers, which are others than amd-smi's on some hosts (ROCm/amdsmi issue 175); there since ROCm 6.4.
        listed = self._ask_if_there("list", "-e") or self._ask("list")
        devices = parse_devices(listed, self._ask("static"), self._ask("metric"), self._ask_if_there("topology"))
        self._numbers = {gpu.uuid: number for gpu, number in devices.items()}
        return tuple(devices)

    def read(self, gpus: Sequence[Gpu], *, processes: bool) -> list[Reading]:
        """Return what each of these does now."""
        metric = self._metric(gpus)
        users = parse_processes(self._ask_if_there("process") or "[]") if processes else {}
        return [replace(reading, processes=users.get(number)) for number, (reading, _) in metric]

    def totals(self, gpus: Sequence[Gpu]) -> list[Totals]:
        """Return the cumulative counters of each of these; events are not told."""
        return [totals for _, (_, totals) in self._metric(gpus)]

    def close(self) -> None:
        """Do nothing: every command has ended."""

    def _metric(self, gpus: Sequence[Gpu]) -> list[tuple[int, tuple[Reading, Totals]]]:
        """Return what each tells, with its number in `amd-smi`."""
        if any(gpu.uuid not in self._numbers for gpu in gpus):
            self.devices()
        metric = parse_metric(self._ask("metric"))
        for gpu in gpus:
            if self._numbers.get(gpu.uuid) not in metric:
                raise AmdSmiError(f"`amd-smi` tells nothing of GPU {gpu.index} ({gpu.uuid}), which it listed before.")
        return [(self._numbers[gpu.uuid], metric[self._numbers[gpu.uuid]]) for gpu in gpus]

    def _ask(self, *command: str) -> str:
        return self._run([self._tool, *command, "--json"])

    def _ask_if_there(self, *command: str) -> str | None:
        try:
            return self._ask(*command)
        except CommandFailedError:
            return None


def parse_versions(text: str) -> dict[str, str]:
    """Return the versions in `amd-smi version`; those that it doesn't tell are left out."""
    document = _document(text)
    row = document[0] if isinstance(document, list) and document else document
    if not isinstance(row, dict):
        raise AmdSmiError(f"`amd-smi version` should print a list of one object; found {_shown(row)}.")
    driver = _text(row.get("amdgpu_version")) or _text(row.get("driver_version"))  # the second since ROCm 7.13
    versions = {"driver": driver, "rocm": _text(row.get("rocm_version")), "amd-smi": _text(row.get("version"))}
    return {name: version for name, version in versions.items() if version is not None}


def parse_devices(listed: str, static: str, metric: str, topology: str | None) -> dict[Gpu, int]:
    """Return every GPU with its number in `amd-smi`, ordered by index: HIP's, if all of them are told, else `amd-smi`'s."""
    rows, about, now = _rows(listed), _rows(static), _rows(metric)
    links = _rows(topology) if topology else {}
    hip = {number: row["hip_id"] for number, row in rows.items() if _is_count(row.get("hip_id"))}
    indices = hip if len(set(hip.values())) == len(rows) else {number: number for number in rows}
    uuids = [_text(row.get("uuid")) for row in rows.values()]
    devices = {}
    for number, row in rows.items():
        fixed, current = about.get(number, {}), now.get(number, {})
        uuid = _text(row.get("uuid"))
        if uuid is None or uuids.count(uuid) > 1:  # N/A without permission, and partitions of one GPU may share theirs
            uuid = _text(row.get("bdf")) or _text(_at(fixed, "bus.bdf"))
        size = _bytes(fixed, "vram.size") or _bytes(current, "mem_usage.total_vram")
        if uuid is None or not size:
            raise AmdSmiError(f"`amd-smi` doesn't tell the {'identity' if uuid is None else 'memory size'} of GPU {number}.")
        peers = tuple(sorted(indices[peer] for peer in _peers(links.get(number, {})) if peer in indices))
        gpu = Gpu(
            index=indices[number],
            uuid=uuid,
            name=_text(_at(fixed, "asic.market_name")) or _text(_at(fixed, "board.product_name")) or "AMD GPU",
            memory_bytes=size,
            peers=peers,
            links=len(peers),
            # 0 MHz is what some GPUs say that don't tell it (seen with Radeons).
            sm_clock_mhz=max(_clocks(current, "gfx", "max_clk"), default=0.0) or None,
            power_limit_w=_quantity(fixed, "limit.ppt0.socket_power_limit", "limit.socket_power", unit="W"),
        )
        devices[gpu] = number
    return dict(sorted(devices.items(), key=lambda item: item[0].index))


def parse_metric(text: str) -> dict[int, tuple[Reading, Totals]]:
    """Return what `amd-smi metric` tells by `amd-smi`'s numbers: readings (without processes) and cumulative counters."""
    metrics = {}
    for number, row in _rows(text).items():
        gfx, errors = _clocks(row, "gfx", "clk"), _at(row, "ecc.total_uncorrectable_count")
        reading = Reading(
            used_bytes=_bytes(row, "mem_usage.used_vram"),
            sm_clock_mhz=statistics.fmean(gfx) if gfx else None,  # one clock for each die
            utilization=_quantity(row, "usage.gfx_activity", unit="%"),
            temperature_c=_quantity(row, "temperature.hotspot", "temperature.edge", unit="C"),
            limits=tuple(
                limit for limit, names in _LIMITS.items() if any(_is_active(_at(row, _STATUS.format(n))) for n in names)
            ),
        )
        # An energy counter at 0.0 J is one that the GPU doesn't have (seen with Radeons under load).
        energy_j = _quantity(row, "energy.total_energy_consumption", unit="J") or None
        metrics[number] = reading, Totals(energy_j, errors if _is_count(errors) else None)
    return metrics


def parse_processes(text: str) -> dict[int, dict[int, int | None]]:
    """Return bytes of VRAM by process id in `amd-smi process`, by `amd-smi`'s numbers; GPUs that aren't told are left out."""
    users: dict[int, dict[int, int | None]] = {}
    for number, row in _rows(text).items():
        if not isinstance(row.get("process_list"), list):
            continue
        users[number] = {}
        for entry in row["process_list"]:
            info = _at(entry, "process_info")
            if info in ("N/A", "No running processes detected"):
                continue
            pid = _at(info, "pid")
            if not _is_count(pid):
                raise AmdSmiError(f"`amd-smi process` should name a process of GPU {number} by its id; found {_shown(entry)}.")
            # 0 bytes is what it says of a process that it can't look into: another user's, or outside of this container.
            users[number][pid] = _bytes(info, "memory_usage.vram_mem", "mem_usage", unit="B") or None
    return users


def _peers(row: dict[str, Any]) -> list[int]:
    """Return the numbers of GPUs that a row of `amd-smi topology` links by one hop of xGMI."""
    near = {"link_type": "XGMI", "link_status": "ENABLED", "num_hops": 1}
    links = row["links"] if isinstance(row.get("links"), list) else []
    peers = [_at(link, "gpu") for link in links if all(_at(link, name) == value for name, value in near.items())]
    return [peer for peer in peers if _is_count(peer)]


def _clocks(row: dict[str, Any], domain: str, key: str) -> list[float]:
    clocks = _at(row, "clock")
    names = [name for name in clocks if re.fullmatch(rf"{domain}_\d+", name)] if isinstance(clocks, dict) else []
    return [value for name in names if (value := _quantity(clocks[name], key, unit="MHz")) is not None]


def _is_active(status: Any) -> bool:
    """Return whether a violation is active, on any die of any partition where it is told for each."""
    if isinstance(status, dict | list):
        return any(map(_is_active, status.values() if isinstance(status, dict) else status))
    return status is True or status == "ACTIVE"


def _rows(text: str) -> dict[int, dict[str, Any]]:
    document = _document(text)
    rows = document
    if isinstance(document, dict):  # a single GPU may come without a list
        rows = [document] if "gpu" in document else document.get("gpu_data")
    if not isinstance(rows, list):
        raise AmdSmiError(f"`amd-smi` should print a list of GPUs, or one under `gpu_data`; found {_shown(document)}.")
    for row in rows:
        if not isinstance(row, dict) or not _is_count(row.get("gpu")):
            raise AmdSmiError(f"`amd-smi` should print an object with a number `gpu` for each GPU; found {_shown(row)}.")
    return {row["gpu"]: row for row in rows}


def _document(text: str) -> Any:
    # Warnings ("User is missing the following required groups: render") go to the same output, in front.
    start = re.search(r"^\s*[\[{]", text, re.MULTILINE)
    try:
        return json.JSONDecoder().raw_decode(text, start.end() - 1 if start else 0)[0]
    except ValueError as error:
        raise AmdSmiError(f"`amd-smi` should print JSON; found {_shown(text.strip())}.") from error


def _quantity(row: Any, *paths: str, unit: str) -> float | None:
    """Return the first quantity of these that is told, in base units; `unit` is that of a bare number."""
    for path in paths:
        value: Any = _at(row, path)
        its_unit = unit
        if isinstance(value, dict):
            value, its_unit = value.get("value"), str(value.get("unit") or unit)
        # The bounds keep out what JSON may hold but no GPU has: NaN, infinity and integers that no float can be.
        if isinstance(value, int | float) and not isinstance(value, bool) and -1e18 < value < 1e18:
            if its_unit not in _UNITS:
                raise AmdSmiError(f"`amd-smi` tells `{path}` in {_shown(its_unit)}; known units are {', '.join(_UNITS)}.")
            return value * _UNITS[its_unit]
    return None


def _bytes(row: Any, *paths: str, unit: str = "MB") -> int | None:
    value = _quantity(row, *paths, unit=unit)
    return None if value is None or value < 0 else round(value)


def _at(row: Any, path: str) -> Any:
    value: Any = row
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value.strip() not in ("", "N/A") else None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _shown(value: Any) -> str:
    return repr(value)[:120]
