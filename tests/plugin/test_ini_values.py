"""Values of the ini file: a bad one is a usage error as on the command line, and `~` is what it is in a shell."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pytest_llmperf.plan.kinds import KINDS
from pytest_llmperf.testing import Example
from tests.conftest import SERVING

BAD = "llmperf_rounds = many\n"


def plain(folder, ini, *args, source=SERVING):
    """Return what became of a run that has no option of ours on its command line."""
    head = "[pytest]\naddopts = -p no:benchmark -p no:hypothesispytest\n"
    Example({"test_it.py": source, "pytest.ini": head + ini}).write(folder)
    command = [sys.executable, "-m", "pytest", *args]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("args", [(), ("--collect-only",), ("-p", "no:terminal")], ids=["run", "collected", "no terminal"])
def test_a_bad_value_is_a_usage_error_and_no_collection_error(tmp_path, args):
    done = plain(tmp_path, BAD, *args)
    assert done.returncode == 4
    assert done.stderr == "ERROR: --llmperf-rounds='many': must be a whole number such as 1, 2 or 4\n\n"
    assert "error" not in done.stdout.lower()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("llmperf_engine = docker", "--llmperf-engine=docker: must be one of server, offline"),
        ("llmperf_require_gpus = perhaps", "llmperf_require_gpus: "),
        ("llmperf_gate = nonsense=5%", "nonsense"),
        ("llmperf_tp = 1,,2", "--llmperf-tp=1,,2: an empty value between commas"),
        ("llmperf_python = ~nobody-of-this-name/python", "no such interpreter"),
    ],
)
def test_every_kind_of_bad_value_names_its_option(run, line, message):
    result = run({"test_it.py": SERVING, "pytest.ini": f"[pytest]\n{line}\n"}, quick=False)
    assert result.returncode == 4, result.stdout
    assert message in result.stderr


def test_a_project_that_measures_nothing_is_not_checked(tmp_path):
    assert plain(tmp_path, BAD, source="def test_x():\n    pass\n").returncode == 0


@pytest.mark.skipif(pytest.version_tuple < (9,), reason="pytest reads TOML values since 9.0")
@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("llmperf_tp = [1, 2]", 'write the value in quotes, e.g. llmperf_tp = "1,2"'),
        ('llmperf_concurrency = ["1", "2"]', 'write the value in quotes, e.g. llmperf_concurrency = "1,2"'),
        ("llmperf_launches = 3", 'write the value in quotes, e.g. llmperf_launches = "1,2"'),
        ('llmperf_require_gpus = "perhaps"', "write true or false"),
    ],
)
def test_a_toml_value_of_another_type_gets_a_hint(run, line, hint):
    result = run({"test_it.py": SERVING, "pytest.toml": f"[pytest]\n{line}\n"}, "-c", "pytest.toml")
    assert result.returncode == 4
    assert hint in result.stderr


def test_a_tilde_is_the_home_folder(run, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    ini = "[pytest]\nllmperf_baselines = ~/base\nllmperf_model = ~/models/small\n"
    files = {"test_it.py": SERVING, "pytest.ini": ini}
    result = run(files, "--llmperf-json=~/out.json", "--update-baselines", "--llmperf-launches=1", HOME=str(home))
    assert result.outcomes == {"passed": 1}, result.stdout
    assert (home / "base/simulated/test_it/test_serving-small-tp1-c8.json").is_file()
    assert f'"model": "{home}/models/small"' in (home / "out.json").read_text()
    assert not (tmp_path / "~").exists()


def test_the_help_names_the_choices_of_options_that_have_some(run):
    text = " ".join(run("", "--help").stdout.split())
    for choices in ("fail, skip, record", "extend, replace", "warn, fail", "on, off", ", ".join(KINDS)):
        assert f"choices: {choices}" in text
