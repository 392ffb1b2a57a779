"""The script that starts vLLM's server: who is told the API key, and which arguments stand on no command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from pytest_llmperf.measure.engines import vllm

if TYPE_CHECKING:
    from pathlib import Path

SERVER = """
import json, os, sys
import vllm.envs as envs

read, write = os.pipe()
if os.fork() == 0:
    os.write(write, json.dumps(envs.VLLM_API_KEY).encode())
    os._exit(0)
forked = json.loads(os.read(read, 1000))
line = open("/proc/self/cmdline").read().split(chr(0))
print(json.dumps({"key": envs.VLLM_API_KEY, "forked": forked, "environment": os.environ.get("VLLM_API_KEY"),
                  "hidden": os.environ.get("LLMPERF_ARGUMENTS"), "words": sys.argv[1:], "line": line, "name": __name__}))
"""
AS_IN_0_26 = """
import os
environment_variables = {"VLLM_API_KEY": lambda: os.environ.get("VLLM_API_KEY", None)}

def __getattr__(name):
    if name in environment_variables:
        return environment_variables[name]()
    raise AttributeError(name)
"""
WITHOUT_A_TABLE = """
import os

def __getattr__(name):
    return os.environ.get(name)
"""


def launch(folder: Path, envs: str, **environment: str) -> dict[str, Any]:
    """Return what a server of these variables is told."""
    server = folder / "vllm" / "entrypoints" / "openai" / "api_server.py"
    server.parent.mkdir(parents=True)
    for package in (folder / "vllm", folder / "vllm" / "entrypoints", server.parent):
        (package / "__init__.py").touch()
    (folder / "vllm" / "envs.py").write_text(envs)
    server.write_text(SERVER)
    done = subprocess.run(
        [sys.executable, str(vllm._LAUNCHER), "spawn", "--port", "1"],
        env={**os.environ, "PYTHONPATH": str(folder), **environment}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    told: dict[str, Any] = json.loads(done.stdout)
    assert told["name"] == "__main__"
    return told


def test_the_server_alone_is_told_the_key(tmp_path: Path) -> None:
    hidden = json.dumps(["--extra", "secret"])
    told = launch(tmp_path, AS_IN_0_26, VLLM_API_KEY="sk-0815", LLMPERF_ARGUMENTS=hidden)
    assert (told["key"], told["forked"], told["environment"]) == ("sk-0815", None, None)
    assert told["words"] == ["--port", "1", "--extra", "secret"]
    assert told["hidden"] is None
    assert not {"sk-0815", "secret"}.intersection(told["line"])


def test_where_only_the_environment_tells_the_key_stays_there(tmp_path: Path) -> None:
    told = launch(tmp_path, WITHOUT_A_TABLE, VLLM_API_KEY="sk-0815")
    assert told["key"] == told["environment"] == "sk-0815"


@pytest.mark.parametrize("envs", [AS_IN_0_26, WITHOUT_A_TABLE])
def test_an_empty_key_is_none(tmp_path: Path, envs: str) -> None:
    told = launch(tmp_path, envs, VLLM_API_KEY="")
    assert not told["key"]
    assert told["environment"] is None
