"""Is a GPU free again whatever was killed, and when? Runs on a real engine are killed at moments all over their start and rounds.

    python -m tests.real.gpu_kills --python /path/to/python [--model tiny] [--engine-args "--max-model-len 2048"] [--moments 20]

In turn pytest, a supervisor of the engine (or both) and the engine core get SIGKILL. A line for each moment says how long it took
until no process of the run was left, and until the memory of the GPUs was back, by NVML. The moments are spread over the first
`--within` seconds of a run, wherever its start ends; 20 moments within 45 s make some 9 minutes. `--no-gpu` looks at processes
only, on a machine without one.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

import psutil

from tests.processes import marked

SUITE = """
import pytest

@pytest.mark.llmperf(model={model!r}, tp={tp}, concurrency=8, engine_args={engine_args!r})
def test_long(llmperf):
    llmperf(prompt_tokens=64, output_tokens=1000, requests=64)
"""
VICTIMS = ("pytest", "supervisor", "engine core")
MIB = 1 << 20
BACK_BYTES = 64 * MIB
"""Memory is back when no more than this is in use beyond what was before."""
MEMORY_S = 15.0
GONE_S = {"pytest": 15.0, "supervisor": 30.0, "engine core": 60.0}
"""Until no process is left: where pytest lives it tells first what has happened, and of a dead core it hears from vLLM."""


class Memory:
    """The memory in use of all GPUs, and who uses it, as NVML tells."""

    def __init__(self, *, none: bool) -> None:
        """Open NVML, unless there is `none`."""
        self._handles = []
        self.none = none
        if not none:
            import pynvml

            self._nvml = pynvml
            pynvml.nvmlInit()
            self._handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]

    def used(self) -> int:
        """Return the bytes in use."""
        return sum(int(self._nvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in self._handles)

    def users(self) -> set[int]:
        """Return the ids of the processes that have memory, as far as NVML shows them here."""
        return {user.pid for handle in self._handles for user in self._nvml.nvmlDeviceGetComputeRunningProcesses(handle)}


@dataclass(frozen=True)
class Kill:
    """What came of one moment."""

    moment_s: float
    victim: str
    phase: str
    gone_s: float | None
    """Until no process was left; None where some were at the end of the wait."""
    back_s: float | None
    """Until the memory was back."""
    left_bytes: int
    ok: bool


def _command(args: argparse.Namespace) -> list[str]:
    installed = any(entry.value == "pytest_llmperf.plugin" for entry in entry_points(group="pytest11"))
    plugin = [] if installed else ["-p", "pytest_llmperf.plugin"]
    options = ["-v", "-p", "no:cacheprovider", "--basetemp=base", f"--llmperf-python={args.python}"]
    return [sys.executable, "-m", "pytest", *plugin, *options]


def _start(folder: Path, args: argparse.Namespace) -> subprocess.Popen[bytes]:
    folder.mkdir()
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_it.py").write_text(SUITE.format(model=args.model, tp=args.tp, engine_args=args.engine_args))
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2] / "src"), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "LLMPERF_TEST_MARK": str(folder), "PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
    with (folder / "output").open("w") as output:
        return subprocess.Popen(_command(args), cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)


def _phase(output: str) -> str:
    """Return what the run told last, in a few words."""
    told = re.findall(r"llmperf: (?:engine \d+[^:]*: |\S+ launch \d+, )(.*)", output)
    return told[-1][:34] if told else "before the engine"


def _victims(kind: str, tree: list[psutil.Process], pytest: int, chance: random.Random) -> tuple[str, list[int]]:
    """Return what is killed, in words, and the ids of the processes; what has not been started yet is pytest."""
    lines = {process.pid: " ".join(_words(process)) for process in tree}
    supervisors = [pid for pid, line in lines.items() if "/engines/supervisor.py" in line]
    cores = [pid for pid, line in lines.items() if "EngineCore" in line]
    if kind == "supervisor" and len(supervisors) == 2:
        which = chance.choice(("outer", "inner", "both"))
        return f"supervisor ({which})", {"outer": supervisors[:1], "inner": supervisors[1:], "both": supervisors}[which]
    if kind == "engine core" and cores:
        return kind, cores[:1]
    return "pytest", [pytest]


def _words(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def kill_at(moment_s: float, kind: str, folder: Path, memory: Memory, args: argparse.Namespace, chance: random.Random) -> Kill:
    """Start a run, kill a process of it at that moment, and wait until nothing is left of it."""
    before, users = memory.used(), memory.users()
    pytest = _start(folder, args)
    time.sleep(moment_s)
    tree = psutil.Process(pytest.pid).children(recursive=True) if pytest.poll() is None else []
    victim, pids = _victims(kind, tree, pytest.pid, chance)
    phase = _phase((folder / "output").read_text())
    began_s = time.monotonic()
    for pid in pids:
        psutil.Process(pid).kill()
    limit_s = GONE_S[victim.partition(" (")[0]]
    gone_s = back_s = None
    left_bytes = 0
    while (since_s := time.monotonic() - began_s) < max(limit_s, MEMORY_S) and None in (gone_s, back_s):
        left = [*filter(_lives, tree), *marked(folder)]
        if gone_s is None and pytest.poll() is not None and not left:
            gone_s = since_s
        left_bytes = memory.used() - before
        if back_s is None and left_bytes <= BACK_BYTES and not memory.users() - users:
            back_s = since_s
        time.sleep(0.05)
    ok = gone_s is not None and gone_s <= limit_s and back_s is not None and back_s <= MEMORY_S
    if not ok:
        print(f"  left: {[*filter(_lives, tree), *marked(folder)]}\n{(folder / 'output').read_text()[-2000:]}", flush=True)
    for process in (*filter(_lives, tree), *marked(folder)):
        process.kill()
    pytest.kill()
    pytest.wait()
    return Kill(moment_s, victim, phase, gone_s, back_s, max(0, left_bytes), ok)


def _row(kill: Kill, memory: Memory) -> str:
    def seconds(value: float | None) -> str:
        return "never" if value is None else f"{value:.1f} s"

    back = ("no GPU", "no GPU") if memory.none else (seconds(kill.back_s), f"{kill.left_bytes // MIB} MiB")
    times = f"{seconds(kill.gone_s):>10}  {back[0]:>11}  {back[1]:>9}  {'ok' if kill.ok else 'FAILED'}"
    return f"{kill.moment_s:6.1f} s  {kill.victim:18}  {kill.phase:34}  {times}"


def main() -> int:
    """Kill at every moment, and print what came of it; return 0 where every run left nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="the interpreter that has vLLM")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--engine-args", default="")
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--within", type=float, default=45.0, metavar="S", help="the moments are this early at the latest")
    parser.add_argument("--earliest", type=float, default=2.0, metavar="S")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-gpu", action="store_true", help="look at processes only")
    args = parser.parse_args()
    chance, memory = random.Random(args.seed), Memory(none=args.no_gpu)
    step_s = (args.within - args.earliest) / args.moments
    moments = [args.earliest + step_s * (number + chance.random()) for number in range(args.moments)]
    chance.shuffle(moments)
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    print("  moment  killed              told last                           no process  memory back  left over", flush=True)
    kills = []
    for number, moment_s in enumerate(moments):
        kind = VICTIMS[number % len(VICTIMS)]
        kills.append(kill_at(moment_s, kind, folder / str(number), memory, args, chance))
        print(_row(kills[-1], memory), flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    survived = sum(kill.ok for kill in kills)
    print(f"{survived} of {len(kills)}{' (no GPU: processes only)' if args.no_gpu else ''}")
    return int(survived < len(kills))


if __name__ == "__main__":
    sys.exit(main())
