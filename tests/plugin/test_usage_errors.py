"""Bad input ends the run before anything is measured, with the option, the value and the remedy."""

from __future__ import annotations

import pytest

from tests.conftest import SERVING


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--llmperf-tp=0", "--llmperf-tp=0: the smallest value is 1; 1 means no parallelism"),
        ("--llmperf-tp=two", "--llmperf-tp='two': must be a whole number such as 1, 2 or 4"),
        ("--llmperf-tp=1,,2", "--llmperf-tp=1,,2: an empty value between commas; write e.g. --llmperf-tp=1,2"),
        ("--llmperf-concurrency=-3", "--llmperf-concurrency=-3: the smallest value is 1"),
        ("--llmperf-tolerance=5", "--llmperf-tolerance='5': must be a share between 0 and 1, e.g. 0.05 or '5 %'"),
        ("--llmperf-engine=docker", "--llmperf-engine=docker: must be one of server, offline, url, command, simulated"),
        ("--llmperf-missing-baseline=no", "--llmperf-missing-baseline=no: must be one of fail, skip, record"),
        ("--llmperf-startup-timeout=soon", "--llmperf-startup-timeout=soon: must be a number of seconds above 0"),
        ("--llmperf-engine-args=--tensor-parallel-size 2", "--tensor-parallel-size is set by the plugin; use --llmperf-tp"),
        ("--llmperf-engine-args=64", "'64' is not an engine argument; arguments begin with --"),
        ("--llmperf-engine-args=--x 'y", "quote it as on a shell command line"),
        ("--llmperf-json=/proc/no/such", "--llmperf-json=/proc/no/such: cannot be written"),
        ("--llmperf-max-launches=1", "--llmperf-max-launches=1: one launch can never fail a test; give 2 or more"),
        ("--llmperf-rounds=0", "--llmperf-rounds=0: the smallest value is 1"),
    ],
)
def test_a_bad_option_is_a_usage_error(run, option, message):
    result = run(SERVING, option)
    assert result.returncode == 4
    assert message in result.stderr


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "http://host:port", "a=http://h,b=nonsense"])
def test_a_malformed_url_is_a_usage_error(run, url):
    result = run(SERVING, f"--llmperf-url={url}", quick=False)
    assert result.returncode == 4
    assert "--llmperf-url=" in result.stderr
    assert "write http://HOST:PORT" in result.stderr


def test_two_endpoints_of_one_name_are_a_usage_error(run):
    result = run(SERVING, "--llmperf-url=a=http://h:1,a=http://h:2", quick=False)
    assert result.returncode == 4
    assert "two endpoints are named 'a'" in result.stderr


def test_a_url_contradicts_another_engine(run):
    result = run(SERVING, "--llmperf-url=http://h:1")
    assert result.returncode == 4
    assert "contradicts --llmperf-url" in result.stderr


def test_an_interpreter_that_does_not_exist_is_a_usage_error(run):
    result = run(SERVING, "--llmperf-python=/no/such/python", quick=False)
    assert result.returncode == 4
    assert "--llmperf-python=/no/such/python: no such interpreter" in result.stderr


def test_an_interpreter_without_vllm_is_a_usage_error(run, tmp_path):
    import venv

    venv.create(tmp_path / "bare", symlinks=True)
    result = run(SERVING, f"--llmperf-python={tmp_path / 'bare/bin/python'}", quick=False)
    assert result.returncode == 4
    assert (
        f"bare/bin/python has no vLLM. Install vLLM there (python -m pytest_llmperf engine install --into {tmp_path / 'bare'})"
        in result.stderr
    )


def test_a_program_that_is_no_interpreter_is_a_usage_error(run):
    result = run(SERVING, "--llmperf-python=/bin/false", quick=False)
    assert result.returncode == 4
    assert "/bin/false cannot be run as a Python interpreter" in result.stderr


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ("tpp=2", "llmperf(tpp=...): unknown marker argument; known are model, tp"),
        ("tp=0", "tp=0: the smallest value is 1"),
        ("tp=[]", "llmperf(tp=...): an empty list allows nothing"),
        ("2", "arguments are given by name"),
        ("tolerance='lots'", "llmperf(tolerance=...)='lots': must be a share"),
        ("engine_args={'port': 1}", "--port is set by the plugin"),
    ],
)
def test_a_bad_marker_is_a_usage_error_that_names_the_test(run, marker, message):
    result = run(f"import pytest\n\n@pytest.mark.llmperf({marker})\ndef test_x(llmperf):\n    pass\n")
    assert result.returncode == 4
    assert "test_it.py::test_x: " in result.stderr
    assert message in result.stderr


@pytest.mark.skipif(pytest.version_tuple < (9,), reason="pytest reads TOML values since 9.0")
def test_an_ini_value_of_another_type_is_a_usage_error(run):
    files = {"test_it.py": SERVING, "pytest.toml": "[pytest]\nllmperf_tp = [1, 2]\n"}
    result = run(files, "-c", "pytest.toml")
    assert result.returncode == 4
    assert "llmperf_tp" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("prompt=5", "llmperf(prompt=...): unknown workload argument; known are prompt_tokens"),
        ("output_tokens=0", "output_tokens=0: the smallest value is 1"),
        ("requests=4", "requests=4: fewer than concurrency=8"),
    ],
)
def test_a_bad_workload_fails_the_test_without_a_traceback(run, arguments, message):
    result = run(f"def test_x(llmperf):\n    llmperf({arguments})\n")
    assert result.outcomes == {"failed": 1}
    assert message in result.stdout
    assert "Traceback" not in result.stdout
