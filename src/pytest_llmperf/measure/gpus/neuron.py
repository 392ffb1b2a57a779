"""NeuronCores of AWS Trainium and Inferentia, through `neuron-ls -j` and `neuron-monitor`; one `Gpu` for each core.

Written after the documented format (the Neuron Tools pages of aws-neuron-sdk, 2.9 to 2.33) and documents that others recorded;
not run on hardware yet. `neuron-monitor` goes on printing one document for each period: it is started at the first reading and
ended by `close`. It tells neither power nor clocks nor temperatures: these are None.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_llmperf.measure.engines import remains
from pytest_llmperf.measure.gpus.device import AcceleratorError, Gpu, Reading, Totals

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

_TIMEOUT_S, _GRACE_S = 30.0, 5.0
STALE_S = 10.0
_TOOLS = "/opt/aws/neuron/bin"
_CONFIG = {
    "period": "1s",
    "neuron_runtimes": [{"tag_filter": ".*", "metrics": [{"type": "neuroncore_counters"}, {"type": "memory_used"}]}],
    "system_metrics": [{"type": "neuron_hw_counters"}],
}
_MEMORY = {"constants", "model_code", "runtime_memory", "tensors"}
"""Parts of a core's memory that every version tells; newer ones tell of more parts."""
_ERRORS = ("neuron_device_index", "mem_ecc_uncorrected", "sram_ecc_uncorrected")


class NeuronToolsError(AcceleratorError):
    """A Neuron tool could not be run, or printed something else than what is documented."""


def run_command(command: list[str]) -> str:
    """Return what a command prints; raises `NeuronToolsError` with its last words where it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True).stdout
    except subprocess.CalledProcessError as error:
        raise NeuronToolsError(f"`{' '.join(command)}` failed: {(error.stderr or error.stdout).strip()[-300:]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NeuronToolsError(f"`{' '.join(command)}` could not be run: {error}") from error


def find(which: Callable[..., str | None] = shutil.which, run: Callable[[list[str]], str] = run_command) -> Neuron | None:
    """Return the NeuronCores of this machine, None where there is no `neuron-ls` or where it lists none."""
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), _TOOLS))
    lister, monitor = which("neuron-ls", path=path), which("neuron-monitor", path=path)
    if lister is None or monitor is None:
        return None
    try:
        listed = run([lister, "-j"])
    except NeuronToolsError:  # AWS's image on a host without Neuron devices, which is a normal place to run
        return None
    return Neuron(lister, [monitor], run) if parse_devices(listed) else None


class Neuron:
    """The NeuronCores of this machine, logical ones where they are grouped."""

    vendor = "aws"
    visible_variable = "NEURON_RT_VISIBLE_CORES"

    lost: ClassVar[dict[int, str]] = {}
    """None: the tool lists only those that answer."""

    def __init__(
        self,
        lister: str = "neuron-ls",
        monitor: Sequence[str] = ("neuron-monitor",),
        run: Callable[[list[str]], str] = run_command,
        driver: Path = Path("/sys/module/neuron/version"),
    ) -> None:
        """Take the commands, what runs the first of them and returns its output, and where the driver's version stands."""
        self._lister, self._run, self._driver = lister, run, driver
        self._monitor = Monitor(monitor)
        self._devices: dict[Gpu, int] = {}

    @property
    def versions(self) -> dict[str, str]:
        """Return the version of the driver."""
        return {"driver": self._driver.read_text().strip()} if self._driver.exists() else {}

    def devices(self) -> tuple[Gpu, ...]:
        """Return every NeuronCore; raises `NeuronToolsError` for one whose device doesn't tell its memory."""
        self._devices = parse_devices(self._run([self._lister, "-j"]))
        return tuple(self._devices)

    def read(self, gpus: Sequence[Gpu], *, processes: bool) -> list[Reading]:
        """Return what each of these did in the last period."""
        text = self._monitor.last()
        return [parse_reading(text, gpu.index, processes=processes) for gpu in gpus]

    def totals(self, gpus: Sequence[Gpu]) -> list[Totals]:
        """Return the counters since the monitor's start: errors of the device that a core is on; no energy, no events."""
        self._monitor.last()
        if any(gpu not in self._devices for gpu in gpus):
            self.devices()
        return [Totals(uncorrected_errors=self._monitor.errors.get(self._devices.get(gpu, -1))) for gpu in gpus]

    def close(self) -> None:
        """End the monitor."""
        self._monitor.close()


class Monitor:
    """A `neuron-monitor` that is started when its last document is first asked for, and ended by `close`."""

    def __init__(self, command: Sequence[str]) -> None:
        """Take the command, without its configuration."""
        self._command = list(command)
        self._open = contextlib.ExitStack()
        self._changed = threading.Condition()
        self._started = self._ended = False
        self._last: tuple[float, str] | None = None
        self._log: Path | None = None
        self.errors: dict[int, int] = {}
        """Uncorrected memory errors of each device in all documents since the start."""

    def last(self) -> str:
        """Return the last document; the first call waits for one."""
        with self._changed:
            if not self._started:
                self._start()
            self._changed.wait_for(lambda: self._last or self._ended, _TIMEOUT_S)
            last, ended = self._last, self._ended
        if ended or last is None or time.perf_counter() - last[0] > STALE_S:
            words = self._log.read_text().strip()[-300:] if self._log and self._log.exists() else ""
            state = "has ended" if ended else "tells nothing (any more)"
            raise NeuronToolsError(f"`{self._command[0]}` {state}; its last words: {words or 'none'}")
        return last[1]

    def close(self) -> None:
        """End the monitor and what it started."""
        self._open.close()

    def _start(self) -> None:
        self._started = True
        folder = Path(self._open.enter_context(tempfile.TemporaryDirectory(prefix=remains.folder_prefix("neuron"))))
        config, self._log = folder / "config.json", folder / "log"
        config.write_text(json.dumps(_CONFIG))
        command, own = [*self._command, "-c", str(config)], {**os.environ, remains.ENGINE: remains.new_mark()}  # to end it by
        try:
            with self._log.open("w") as log:
                child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=own, start_new_session=True)
        except OSError as error:
            raise NeuronToolsError(f"`{self._command[0]}` could not be run: {error}") from error
        reader = threading.Thread(target=self._follow, args=(child.stdout,), name="llmperf-neuron-monitor", daemon=True)
        self._open.callback(_end, child, reader)
        reader.start()

    def _follow(self, lines: Iterable[str]) -> None:
        for line in filter(str.strip, lines):
            try:
                errors = parse_errors(line)
            except NeuronToolsError:
                errors = {}  # whoever reads this document is told what is wrong with it
            with self._changed:
                self._last = time.perf_counter(), line
                for device, count in errors.items():
                    self.errors[device] = self.errors.get(device, 0) + count
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()


def _end(child: subprocess.Popen[str], reader: threading.Thread) -> None:
    for kind in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_GRACE_S)
    reader.join()
    if child.stdout is not None:
        child.stdout.close()


def parse_devices(text: str) -> dict[Gpu, int]:
    """Return every core in `neuron-ls -j` with the number of its device, in the order of indices."""
    rows = _document(text, "neuron-ls -j")
    if not isinstance(rows, list | None) or not all(isinstance(row, dict) for row in rows or []):
        raise NeuronToolsError(f"`neuron-ls -j` should print a list of devices; found {_shown(rows)}.")
    cores = {}
    for row in rows or []:
        numbers: list[Any] = [row.get(name) for name in ("neuron_device", "nc_count", "memory_size")]
        if not all(map(_is_count, numbers)) or 0 in numbers[1:] or not isinstance(row.get("bdf"), str):
            raise NeuronToolsError(f"`neuron-ls -j` should tell neuron_device, nc_count, memory_size, bdf; found {_shown(row)}.")
        device, count, _ = numbers
        ids = row.get("neuroncore_ids")
        is_told = isinstance(ids, list) and len(ids) == count and all(map(_is_count, ids))
        cores[device] = ids if is_told else [device * count + i for i in range(count)]
    devices = {}
    for row in rows or []:
        device, near = row["neuron_device"], row.get("connected_to")
        others = [other for other in (near if isinstance(near, list) else []) if _is_count(other) and other != device]
        kind = row.get("instance_type")
        for place, index in enumerate(cores[device]):
            gpu = Gpu(
                index=index,
                uuid=f"neuron-{row['bdf']}-{place}",  # cores have no id of their own
                name=f"NeuronCore ({kind})" if isinstance(kind, str) and kind not in ("", "N/A") else "NeuronCore",
                memory_bytes=row["memory_size"] // row["nc_count"],
                # Cores of one device share its memory: they are nearer to each other than any link.
                peers=tuple(sorted(i for other in {device, *others} for i in cores.get(other, []) if i != index)),
                links=len(others),
            )
            devices[gpu] = device
    return dict(sorted(devices.items(), key=lambda item: item[0].index))


def parse_reading(text: str, core: int, *, processes: bool) -> Reading:
    """Return what one document of `neuron-monitor` tells of a core: sums over the applications that use it."""
    runtimes = _report(text).get("neuron_runtime_data")
    if runtimes is None:
        return Reading()
    if not isinstance(runtimes, list) or not all(isinstance(runtime, dict) for runtime in runtimes):
        raise NeuronToolsError(f"`neuron-monitor` should tell a list of applications; found {_shown(runtimes)}.")
    used, busy, users = list[int | None](), list[float | None](), list[tuple[Any, int | None]]()
    for runtime in runtimes:
        report = runtime.get("report") if not runtime.get("error") else None
        counters = _group(report, "neuroncore_counters", "neuroncores_in_use")
        memory = _group(report, "memory_used", "neuron_runtime_used_bytes", "usage_breakdown", "neuroncore_memory_usage")
        if counters is not None and memory is not None and str(core) not in counters | memory:
            continue  # it uses other cores
        size, share = _memory((memory or {}).get(str(core))), _share((counters or {}).get(str(core)))
        used.append(size)
        busy.append(share)
        if size != 0 or share:  # an application lists all cores of the machine, with zeros where it isn't
            users.append((runtime.get("pid"), size))
    return Reading(
        # No application at all is nothing in use; that none tells of this core is not.
        used_bytes=None if None in used or (runtimes and not used) else sum(filter(None, used)),
        processes=dict(users) if processes and all(_is_count(pid) for pid, _ in users) else None,
        utilization=None if None in busy or (runtimes and not busy) else sum(filter(None, busy), 0.0),
    )


def parse_errors(text: str) -> dict[int, int]:
    """Return the uncorrected memory errors in one document of `neuron-monitor` by device; devices that don't tell are left out.

    They are those of the period: so AWS's own neuron-monitor-prometheus.py adds them up.
    """
    devices = (_group(_report(text), "system_data", "neuron_hw_counters") or {}).get("neuron_devices")
    errors = {}
    for row in devices if isinstance(devices, list) else []:
        numbers: list[Any] = [row.get(name) for name in _ERRORS] if isinstance(row, dict) else [None]
        if all(map(_is_count, numbers)):
            errors[numbers[0]] = numbers[1] + numbers[2]
    return errors


def _report(text: str) -> dict[str, Any]:
    document = _document(text, "neuron-monitor")
    if not isinstance(document, dict) or not {"neuron_runtime_data", "system_data"} & document.keys():
        raise NeuronToolsError(f"`neuron-monitor` should tell neuron_runtime_data and system_data; found {_shown(document)}.")
    return document


def _group(report: Any, *path: str) -> dict[str, Any] | None:
    """Return an object inside of a report, None where it is absent or where what it is part of has an error."""
    for name in path:
        report = report.get(name) if isinstance(report, dict) and not report.get("error") else None
    return report if isinstance(report, dict) and not report.get("error") else None


def _memory(parts: Any) -> int | None:
    is_told = isinstance(parts, dict) and parts.keys() >= _MEMORY and all(map(_is_count, parts.values()))
    return sum(parts.values()) if is_told else None


def _share(counters: Any) -> float | None:
    percent: Any = counters.get("neuroncore_utilization") if isinstance(counters, dict) else None
    is_told = isinstance(percent, int | float) and not isinstance(percent, bool) and 0 <= percent < 1e6
    return percent / 100 if is_told else None


def _document(text: str, command: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise NeuronToolsError(f"`{command}` should print JSON; found {_shown(text.strip())}.") from error


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _shown(value: Any) -> str:
    return repr(value)[:120]
