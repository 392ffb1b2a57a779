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


def test_a_start_has_its_phases_and_a_cold_one_asks_for_another(run, tmp_path):
    # The words of vLLM, in the first start of one that compiles, then of one that finds its graphs.
    compiled = "INFO 05-12 10:00:40 [backends.py:148] Compiling a graph for general shape takes 18.16 s"
    script = tmp_path / "server.sh"
    script.write_text(f"""#!/bin/sh
echo 'INFO 05-12 10:00:06 [core.py:58] Initializing a V1 LLM engine (v0.8.5) with config: x'
echo 'INFO 05-12 10:00:13 [gpu_model_runner.py:1329] Model loading took 7.1 GiB and 3.100000 seconds'
[ -e '{tmp_path}/cache' ] || echo '{compiled}'
touch '{tmp_path}/cache'
echo 'INFO 05-12 10:00:45 [monitor.py:33] torch.compile takes 5.10 s in total'
echo 'INFO 05-12 10:01:07 [gpu_model_runner.py:1686] Graph capturing finished in 2 secs, took 0.50 GiB'
echo 'INFO 05-12 10:01:08 [core.py:159] init engine (profile, create kv cache, warmup model) took 9.10 seconds'
exec {COMMAND.replace("{port}", "$1")}
""")
    options = (f"--llmperf-command=sh {script} {{port}}", "--llmperf-model=served", *SHORT)
    gate = "--llmperf-gate=*_s=off,startup_compile_s=50%,startup_kv_s=50%"
    recorded = run(TEST, *options, gate, "--update-baselines", "--llmperf-launches=4", quick=False)
    assert list(recorded.statuses.values()) == ["RECORDED"], recorded.stdout
    first, second, *_ = (launch["metrics"] for launch in recorded.cases[0]["launches"])
    assert (first["startup_weights_s"], first["startup_graphs_s"]) == (3.1, 2.0)
    assert (first["startup_cold_compile_s"], first["startup_compile_s"]) == (5.1, None)
    assert (second["startup_cold_compile_s"], second["startup_compile_s"]) == (None, 5.1)
    assert first["startup_cold_s"] == first["startup_s"]
    assert "a cold start: graphs were compiled" in recorded.stdout
    (tmp_path / "cache").unlink()
    compared = run(TEST, *options, gate, quick=False)
    [case] = compared.cases
    assert case["status"] == "PASS", compared.stdout
    assert [launch["metrics"]["startup_compile_s"] for launch in case["launches"]][:2] == [None, 5.1]


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
