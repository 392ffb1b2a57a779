"""Modules that happen to lie in the current folder run in no process of ours."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_llmperf.measure.client.processes import python_path
from pytest_llmperf.measure.engines.engine import EngineError
from pytest_llmperf.measure.engines.vllm import find_vllm
from pytest_llmperf.testing import Example

STRANGER = """
import os, pathlib, sys
with open({note!r}, "a") as note:
    note.write(f"{{__name__}} in {{sys.orig_argv}}\\n")
raise ImportError("a module of the current folder")
"""
NAMES = ("asyncio", "http", "json", "msgspec", "psutil", "pytest_llmperf", "select", "socket", "ssl", "vllm")
SHORT = "def test_it(llmperf):\n    llmperf(prompt_tokens=8, output_tokens=4, requests=8)\n"


def strangers(folder: Path) -> Path:
    """Put modules of well-known names into a folder; return the file that they note themselves in when they are run."""
    note = folder / "note"
    for name in NAMES:
        (folder / f"{name}.py").write_text(STRANGER.format(note=str(note)))
    note.touch()
    return note


@pytest.mark.fault("no stranger", "modules of the current folder have the names of those that the plugin's processes import")
def test_modules_of_the_current_folder_are_not_imported(tmp_path: Path) -> None:
    note = strangers(tmp_path)
    project = Example(
        {"tests/test_it.py": SHORT}, ("--llmperf-engine=simulated", "--llmperf-rounds=1", "--import-mode=importlib")
    )
    project.write(tmp_path)
    # As the script `pytest`, which does not look there either; `python -m pytest` would, for itself.
    command = [sys.executable, "-P", *project.command(tmp_path)[1:]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert note.read_text() == ""


@pytest.mark.fault("no stranger", "a folder vllm and a module json where pytest looks for vLLM")
def test_vllm_is_not_looked_for_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = strangers(tmp_path)
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(EngineError):  # whatever this interpreter has
        assert find_vllm(sys.executable)["torch"]
    assert note.read_text() == ""


def test_an_empty_entry_of_pythonpath_is_not_handed_on() -> None:
    given = python_path({"PYTHONPATH": os.pathsep.join(["", "/a", "", "/b", ""])})
    assert given.split(os.pathsep)[1:] == ["/a", "/b"]
    assert (Path(given.split(os.pathsep)[0]) / "pytest_llmperf").is_dir()
    assert python_path({}).count(os.pathsep) == 0
