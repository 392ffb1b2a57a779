"""`Example`: a small project on which pytest is run in a process of its own, and what came of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True)
class Result:
    """What a pytest run came to."""

    returncode: int
    stdout: str
    stderr: str
    outcomes: dict[str, int]
    """The counts of pytest's last line, e.g. `{"passed": 2, "skipped": 1}`."""
    cases: list[dict[str, Any]]
    """The cases of `--llmperf-json`, empty where the run wrote none."""

    @property
    def statuses(self) -> dict[str, str]:
        """Return each case's id and status."""
        return {case["id"]: case["status"] for case in self.cases}

    @property
    def engine_starts(self) -> int:
        """Return how many engines were started, as the progress lines tell."""
        numbers = re.findall(r"llmperf: engine (\d+) \(.*\): starting", self.stdout)
        return max(map(int, numbers), default=0)


@dataclass(frozen=True)
class Example:
    """A small project, as file names and contents, on which pytest is run in a process of its own."""

    files: Mapping[str, str]
    args: tuple[str, ...] = ("--llmperf-engine=simulated",)
    """Arguments of every run."""
    env: Mapping[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write the project's files, and an ini file that makes the folder the rootdir."""
        for name, text in {"pytest.ini": "[pytest]\n", **self.files}.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def command(self, folder: Path, *args: str) -> list[str]:
        """Return the command line of a run, for tests that start it themselves."""
        return [sys.executable, "-m", "pytest", f"--llmperf-json={folder / 'llmperf.json'}", *self.args, *args]

    def run(self, folder: Path, *args: str, timeout_s: float = 120.0) -> Result:
        """Run pytest in the folder and return what came of it; raises subprocess.TimeoutExpired when it takes too long."""
        self.write(folder)
        (folder / "llmperf.json").unlink(missing_ok=True)
        environment = {**os.environ, **self.env}
        # Neither the outer run's options nor tox's folder, where pytest would keep one cache for all examples.
        for name in ("PYTEST_ADDOPTS", "TOX_ENV_DIR"):
            environment.pop(name, None)
        command = self.command(folder, *args)
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        last = done.stdout.strip().rpartition("\n")[2]
        counts = re.findall(r"(\d+) (passed|failed|skipped|error|deselected)", last)
        outcomes = {name: int(count) for count, name in counts}
        written = (folder / "llmperf.json").read_text() if (folder / "llmperf.json").is_file() else ""
        cases = json.loads(written)["cases"] if written else []
        return Result(done.returncode, done.stdout, done.stderr, outcomes, cases)
