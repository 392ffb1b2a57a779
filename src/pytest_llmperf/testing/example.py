"""`Example`: a small project on which pytest is run, and what came of it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest import mock

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

    def masked(self, begin: str, end: str) -> str:
        """Return the output from the line that holds `begin` to that which holds `end`, to be compared with a text in a test.

        Numbers become `N`, columns are as wide as their cells, and there are no empty lines: what is compared is the layout.
        """
        lines = self.stdout.splitlines()
        first = next((number for number, line in enumerate(lines) if begin in line), len(lines))
        last = next((number for number, line in enumerate(lines[first:], first) if end in line), len(lines))
        text = "\n".join(line.rstrip() for line in lines[first : last + 1] if line.strip())
        numbers = re.sub(r"(?<![\w.])(?<!\w-)[+-]?\d+(,\d{3})*(\.\d+)?(e-?\d+)?", "N", text)
        return re.sub(r"(-{3,})|(={3,})|( {3,})", lambda run: run[0][:2] if run[3] else run[0][:3], numbers)

    @property
    def engine_starts(self) -> int:
        """Return how many engines were started, as the progress lines tell."""
        numbers = re.findall(r"llmperf: engine (\d+) \(.*\): starting", self.stdout)
        return max(map(int, numbers), default=0)


@dataclass(frozen=True)
class Example:
    """A small project, as file names and contents, on which pytest is run."""

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

    def run(self, folder: Path, *args: str, timeout_s: float = 120.0, in_process: bool = False) -> Result:
        """Run pytest in the folder and return what came of it; raises subprocess.TimeoutExpired when it takes too long.

        `in_process` saves an interpreter's start, and has no time-out. What a project's files do to modules stays done.
        """
        self.write(folder)
        report = folder / "llmperf.json"
        report.unlink(missing_ok=True)
        environment = {**os.environ, **self.env}
        # Neither the outer run's options nor tox's folder, where pytest would keep one cache for all examples.
        for name in ("PYTEST_ADDOPTS", "TOX_ENV_DIR"):
            environment.pop(name, None)
        command = self.command(folder, *args)
        if in_process:
            returncode, stdout, stderr = _inside(command[3:], folder, environment)
        else:
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
            )
            returncode, stdout, stderr = done.returncode, done.stdout, done.stderr
        counts = re.findall(r"(\d+) (passed|failed|skipped|error|deselected)", stdout.strip().rpartition("\n")[2])
        outcomes = {name: int(count) for count, name in counts}
        cases = json.loads(report.read_text())["cases"] if report.is_file() and report.stat().st_size else []
        return Result(returncode, stdout, stderr, outcomes, cases)


def _inside(args: list[str], folder: Path, environment: dict[str, str]) -> tuple[int, str, str]:
    """Run pytest in this process; return its exit code and output. The project's own modules are forgotten afterwards."""
    import pytest

    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ, {"COLUMNS": "80"} | environment, clear=True),
        mock.patch.object(sys, "dont_write_bytecode", True),  # a file that is written anew within a second is compiled anew
        mock.patch.object(sys, "path", list(sys.path)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        contextlib.chdir(folder),
        warnings.catch_warnings(),
    ):
        warnings.resetwarnings()  # the outer run's filters are not the project's
        try:
            code = pytest.main([*args, "-p", "no:faulthandler"])
        finally:
            for name, module in list(sys.modules.items()):
                if (getattr(module, "__file__", None) or "").startswith(f"{folder}{os.sep}"):
                    del sys.modules[name]
    return int(code), out.getvalue(), err.getvalue()
