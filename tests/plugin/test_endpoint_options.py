"""Endpoints behind gateways: headers, queries, and secrets that must stand nowhere."""

from __future__ import annotations

from odd_servers import VLLM, odd_server

ASKING = """
def test_x(llmperf, baseline):
    assert llmperf(requests=8, prompt_tokens=6, output_tokens=4) == baseline
"""
RECORDING = ("--update-baselines", "--llmperf-launches=2", "--llmperf-rounds=1")
SECRET = "s3cr3t-0815"


def _everything(folder) -> str:
    """Return all names and texts of a folder."""
    return "\n".join(f"{path}\n{path.read_text(errors='replace') if path.is_file() else ''}" for path in folder.rglob("*"))


def test_headers_and_queries_reach_the_endpoint_and_stand_nowhere(run, tmp_path):
    habits = {"headers": {"x-token": SECRET, "x-team": "blue"}, "query": f"sig={SECRET}"}
    with odd_server(VLLM, **habits) as server:
        url = f"--llmperf-url={server.url.replace('?', '/v1?')}"
        options = (url, "--llmperf-header=X-Token=GATEWAY", "--llmperf-header=X-Team: blue", "-l")
        result = run(ASKING, *options, *RECORDING, quick=False, GATEWAY=SECRET)
    assert result.outcomes == {"passed": 1}, result.stdout
    assert list(tmp_path.rglob("baselines/**/*.json"))
    assert SECRET not in result.stdout + result.stderr + _everything(tmp_path)


def test_a_failing_run_with_locals_shows_no_header_either(run, tmp_path):
    with odd_server(VLLM, headers={"x-token": SECRET}, finish_reason="error") as server:
        options = (f"--llmperf-url=e={server.url}", "--llmperf-header=X-Token: $GATEWAY", "-l", "--tb=long")
        result = run(
            "def test_x(llm_engine, llmperf):\n    assert llmperf(requests=8) is llm_engine\n",
            *options,
            quick=False,
            GATEWAY=SECRET,
        )
    assert "finish_reason 'error'" in result.stdout
    assert SECRET not in result.stdout + result.stderr + _everything(tmp_path)


def test_the_ini_file_has_a_header_a_line(run):
    ini = "[pytest]\nllmperf_header =\n    X-Token=GATEWAY\n    X-Team: blue\n"
    with odd_server(VLLM, headers={"x-token": SECRET, "x-team": "blue"}) as server:
        files = {"test_it.py": "def test_x(llmperf):\n    llmperf(requests=8)\n", "pytest.ini": ini}
        result = run(files, f"--llmperf-url={server.url}", quick=False, GATEWAY=SECRET)
    assert result.outcomes == {"passed": 1}, result.stdout


def test_a_header_without_its_variable_is_a_usage_error(run):
    result = run(ASKING, "--llmperf-url=http://127.0.0.1:9", "--llmperf-header=X-Token=NOWHERE_SET", quick=False)
    assert result.returncode == 4
    assert "--llmperf-header: X-Token=NOWHERE_SET: the environment has no variable NOWHERE_SET" in result.stderr


def test_a_password_in_a_url_is_refused_and_not_shown(run, tmp_path):
    for option in ("--llmperf-url=http://me:{}@127.0.0.1:9", "--llmperf-url=e=https://{}@127.0.0.1:9/v1"):
        result = run(ASKING, option.format(SECRET), quick=False)
        assert result.returncode == 4
        assert "--llmperf-header" in result.stderr
        assert SECRET not in result.stdout + result.stderr + _everything(tmp_path)
