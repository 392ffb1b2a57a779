"""`--llmperf-command`: any server is started, measured, recorded and compared; what is wrong with a command is told at once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

SERVER = Path(__file__).parents[1] / "openai_server.py"
COMMAND = f"'{sys.executable}' '{SERVER}' --port {{port}}"
TEST = """
def test_serving(llmperf, baseline):
    assert llmperf(prompt_tokens=16, output_tokens=6, requests=8) == baseline
"""
SHORT = ("--llmperf-rounds=2", "--llmperf-launches=2", "--llmperf-gate=*_s=off")
"""Its times are those of this machine, which no test may depend on."""


def test_a_server_that_a_command_starts_is_recorded_and_compared(run):
    options = (f"--llmperf-command={COMMAND}", "--llmperf-model=served", *SHORT)
    recorded = run(TEST, *options, "--update-baselines", quick=False)
    assert list(recorded.statuses.values()) == ["RECORDED"], recorded.stdout
    compared = run(TEST, *options, quick=False)
    assert compared.outcomes == {"passed": 1}, compared.stdout
    [case] = compared.cases
    assert case["engine"]["kind"] == "command"
    assert case["engine"]["command"] == COMMAND
    assert case["launches"][0]["metrics"]["kv_cache_tokens"] is None  # it tells nothing of itself
    assert case["launches"][0]["rounds"][0]["metrics"]["preemptions"] is None


def test_a_command_stands_in_the_ini_file_and_markers_add_arguments(run):
    files = {
        "pytest.ini": f"[pytest]\nllmperf_command = {COMMAND}\nllmperf_model = served\nllmperf_engine = command\n",
        "test_it.py": """
import pytest

@pytest.mark.llmperf(engine_args={"model": ["first", "second"]})
def test_named(llmperf, llm_engine):
    assert llm_engine.endpoint.model == "first"
    llmperf(prompt_tokens=16, output_tokens=6, requests=8)
""",
    }
    result = run(files, quick=False)
    assert result.outcomes == {"passed": 1}, result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--llmperf-engine=command"], "--llmperf-engine=command: needs a command; add --llmperf-command='llama-server"),
        (["--llmperf-command=serve"], "--llmperf-command='serve': {port} is missing"),
        (["--llmperf-command=serve {port}", "--llmperf-engine=offline"], "contradicts --llmperf-engine=offline"),
        (["--llmperf-command=serve {port}", "--llmperf-url=http://h:1"], "--llmperf-command: contradicts --llmperf-url"),
        (["--llmperf-command=no-such-server {port}"], "there is no program 'no-such-server'"),
        (["--llmperf-command=/tmp {port}"], "there is no program '/tmp'"),
    ],
)
def test_a_command_that_cannot_work_is_a_usage_error(run, options, message):
    result = run(TEST, *options, quick=False)
    assert result.returncode == 4
    assert message in result.stderr


def test_a_test_of_the_engine_without_a_server_is_skipped(run):
    source = "import pytest\n\n@pytest.mark.llmperf(engine='offline')\ndef test_it(llmperf):\n    llmperf()\n"
    result = run(source, f"--llmperf-command={COMMAND}", quick=False)
    assert result.outcomes == {"skipped": 1}, result.stdout
