"""Runs of pytest in the background, to be killed: every process and temporary folder of theirs is known."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psutil

from pytest_llmperf.testing import Example
from tests.processes import marked, wait_until

LONG = """
def test_long(llmperf):
    llmperf(prompt_tokens=8, output_tokens=1900, requests=16)
"""
READY = re.compile(r"engine 1 \(.*\): ready")
PATIENCE_S = 30.0
"""Generous: other work may have the machine."""


def _heed_signals() -> None:
    # A shell has its background jobs ignore Ctrl-C, and nohup a hang-up; and so would all that they start.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Background:
    """A run of pytest in the background."""

    def __init__(self, folder: Path, source: str = LONG, *args: str, kind: str = "simulated", **env: str) -> None:
        """Start it in a folder of its own."""
        self.folder = folder
        folder.mkdir(parents=True)
        self.temporary = Path(tempfile.mkdtemp(prefix="kills-"))  # a short name: engines put sockets there
        project = Example({"test_it.py": source}, (f"--llmperf-engine={kind}", "-p", "no:cacheprovider"))
        project.write(folder)
        own = {"LLMPERF_TEST_MARK": str(folder), "TMPDIR": str(self.temporary), "PYTHONUNBUFFERED": "1"}
        with (folder / "output").open("w") as output:
            self.pytest = subprocess.Popen(
                project.command(folder, "-v", f"--basetemp={folder / 'base'}", *args),
                cwd=folder,
                env={**os.environ, **own, **env},
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=_heed_signals,
            )

    @property
    def output(self) -> str:
        """Return what it has printed so far."""
        return (self.folder / "output").read_text()

    def until(self, words: str, timeout_s: float = 90.0) -> None:
        """Wait until it has printed what matches."""
        assert wait_until(lambda: re.search(words, self.output) or self.pytest.poll() is not None, timeout_s), self.output
        assert re.search(words, self.output), self.output

    def until_in_a_round(self, timeout_s: float = 90.0) -> None:
        """Wait until its engine is ready; the first round begins then, or its warm-up."""
        self.until(READY.pattern, timeout_s)

    def processes(self, *words: str) -> list[psutil.Process]:
        """Return its living processes whose command line has a word that ends so, the oldest first."""
        found = []
        for process in marked(self.folder):
            try:
                if any(each.endswith(words) for each in process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return sorted(found, key=psutil.Process.create_time)

    def supervisors(self) -> list[psutil.Process]:
        """Return its supervisors, the outer one first."""
        assert wait_until(lambda: len(self.processes("supervisor.py")) == 2, PATIENCE_S)
        return sorted(self.processes("supervisor.py"), key=lambda process: process.ppid() != self.pytest.pid)

    def engine(self) -> psutil.Process:
        """Return the simulated engine, not its children."""
        return self.engine_processes()[0]

    def engine_processes(self) -> list[psutil.Process]:
        """Return the simulated engine and its children."""
        supervisors = self.processes("supervisor.py")  # which have the engine's command line too
        return [process for process in self.processes("pytest_llmperf.testing") if process not in supervisors]

    def load(self) -> psutil.Process:
        """Return its load process."""
        return self.processes("pytest_llmperf.measure.client.load")[0]

    def tree(self) -> list[psutil.Process]:
        """Return all processes that it has now, by the process tree: engines may write over their environment."""
        return psutil.Process(self.pytest.pid).children(recursive=True)

    def left(self) -> list[object]:
        """Return what is left of it: processes, and what it has put into the folder for temporary files."""
        folders = [path for path in self.temporary.glob("*llmperf*") if path.name != "llmperf-locks"]
        return [*marked(self.folder), *folders]

    def gone_after_s(self, began_s: float, *spared: int) -> float:
        """Wait until nothing is left of it but these processes; return the seconds since then."""

        def left() -> list[object]:
            return [each for each in self.left() if getattr(each, "pid", None) not in spared]

        assert wait_until(lambda: not left(), PATIENCE_S), f"left: {left()}\n{self.output}"
        return time.monotonic() - began_s

    def close(self) -> None:
        """Kill all of it."""
        for process in marked(self.folder):
            process.kill()
        self.pytest.wait()
        shutil.rmtree(self.temporary, ignore_errors=True)
