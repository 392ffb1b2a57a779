"""The workflow of `examples/ci`: what can be known of it without GitHub, and its shell steps run for real."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pytest_llmperf.plugin.options import OPTIONS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "examples" / "ci" / "github-actions-gpu.yml").read_text()
README = (ROOT / "examples" / "ci" / "README.md").read_text()
WORKFLOW: dict[Any, Any] = yaml.safe_load(TEXT)
STEPS: list[dict[str, Any]] = [step for job in WORKFLOW["jobs"].values() for step in job["steps"]]
SCRIPTS = {step["name"]: step["run"] for step in STEPS if "run" in step}
ACTIONS = [step["uses"] for step in STEPS if "uses" in step]


def run(script: str, folder: Path, **env: object) -> subprocess.CompletedProcess[str]:
    """Run a step as GitHub runs it under `shell: bash`."""
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    environment = {**os.environ, **{name: str(value) for name, value in env.items()}}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_it_is_started_by_pull_requests_every_night_and_by_hand() -> None:
    triggers = WORKFLOW[True]  # YAML 1.1 reads the key `on` so
    assert set(triggers) == {"pull_request", "schedule", "workflow_dispatch"}
    assert triggers["workflow_dispatch"]["inputs"]["record"]["default"] is False


def test_two_jobs_never_share_the_gpus() -> None:
    on_gpus = {name: job for name, job in WORKFLOW["jobs"].items() if "self-hosted" in job["runs-on"]}
    assert list(on_gpus) == ["measure"]
    assert on_gpus["measure"]["concurrency"] == {"group": "llmperf-gpus", "queue": "max", "cancel-in-progress": False}


def test_nothing_on_the_gpu_runner_may_write_to_the_repository() -> None:
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert {name: job.get("permissions") for name, job in WORKFLOW["jobs"].items()} == {
        "measure": None,
        "baselines": {"contents": "write"},
        "audit": {},
    }


def test_no_token_is_left_where_tests_run() -> None:
    checkouts = {
        name: step.get("with", {}).get("persist-credentials")
        for name, job in WORKFLOW["jobs"].items()
        for step in job["steps"]
        if step.get("uses", "").startswith("actions/checkout@")
    }
    assert checkouts == {"measure": False, "baselines": None}  # the latter pushes


def test_a_stranger_gets_neither_the_runner_nor_a_secret() -> None:
    assert "pull_request_target" not in WORKFLOW[True]
    assert "head.repo.full_name == github.repository" in WORKFLOW["jobs"]["measure"]["if"]
    # None is needed; one that a run line holds would stand in the process list, and in the log of a shell that traces.
    assert not re.search(r"secrets\s*[.\[]|github\.token", TEXT)


def test_every_job_ends() -> None:
    assert all(0 < job["timeout-minutes"] <= 360 for job in WORKFLOW["jobs"].values())


@pytest.mark.parametrize("text", [TEXT, README], ids=["workflow", "readme"])
def test_every_option_is_one_that_the_plugin_has(text: str) -> None:
    found = set(re.findall(r"--(?:llmperf|update)-[a-z-]*[a-z]", text))
    assert found
    assert found <= {flag for flag, _, _ in OPTIONS}


@pytest.mark.parametrize("text", [TEXT, README], ids=["workflow", "readme"])
def test_every_path_in_the_repository_exists(text: str) -> None:
    found = re.findall(r"\b(?:examples|docs|src|tests|baselines)(?:/[\w.-]+)+", text)
    assert found
    assert [path for path in found if not (ROOT / path).exists()] == []
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert [link for link in links if not (ROOT / "examples" / "ci" / link).exists()] == []


def test_what_is_kept_is_where_the_steps_put_it() -> None:
    kept = "\n".join(str(step["with"]["path"]) for step in STEPS if "path" in step.get("with", {}))
    assert re.findall(r"runner\.temp }}/(\w+)", kept) == ["compiled", "results", "results"]
    assert all(f"$RUNNER_TEMP/{folder}" in SCRIPTS["GPUs and folders"] for folder in ("compiled", "results"))


def test_each_run_begins_with_the_newest_compiled_kernels_of_its_kind() -> None:
    cache = next(step["with"] for step in STEPS if step.get("uses", "").startswith("actions/cache@"))
    # No kind of GPU has a _ in its name, hence NVIDIA-H200 does not begin with what NVIDIA-H200-NVL has stored.
    assert cache["restore-keys"] == "llmperf-${{ env.ENGINE }}-${{ steps.host.outputs.gpu }}_"
    # An entry never changes: with a key that is always the same the first one would be restored for ever.
    assert cache["key"] == cache["restore-keys"] + "${{ github.run_id }}"


def test_a_red_test_does_not_discard_what_the_others_recorded() -> None:
    measure, push = WORKFLOW["jobs"]["measure"], WORKFLOW["jobs"]["baselines"]
    names = [step.get("name") for step in measure["steps"]]
    after = measure["steps"][names.index("Measure") + 1 :]
    # An `if` without always() or the like has an implicit `success() &&`.
    assert {step["name"]: step["if"] for step in after} == {
        "Summary": "always() && steps.measure.outcome != 'skipped'",
        "Keep figures, logs of the engines, and JUnit's report": "always() && steps.measure.outcome != 'skipped'",
        "Keep the baselines": "always() && inputs.record && steps.measure.outcome != 'skipped'",
    }
    assert (push["needs"], push["if"]) == ("measure", "always() && inputs.record && needs.measure.outputs.kept == 'success'")
    assert measure["outputs"] == {"kept": "${{ steps.kept.outcome }}"}
    assert [step["name"] for step in measure["steps"] if step.get("id") == "kept"] == ["Keep the baselines"]


@pytest.mark.parametrize("action", ACTIONS)
def test_every_action_is_pinned_to_a_commit_with_its_version_beside_it(action: str) -> None:
    assert re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", action)
    assert re.search(rf"uses: {action} # v\d+\.\d+\.\d+$", TEXT, re.M)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_shell_step_parses_and_takes_its_values_from_the_environment(name: str, tmp_path: Path) -> None:
    done = subprocess.run(["bash", "-n"], input=SCRIPTS[name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "${{" not in SCRIPTS[name]  # a branch's name in there would be run as code


def test_the_first_step_finds_the_kinds_of_gpus_and_makes_the_folders(tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3'\necho 'NVIDIA H100 80GB HBM3'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    files = {name: tmp_path / name for name in ("GITHUB_OUTPUT", "GITHUB_ENV")}
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = run(SCRIPTS["GPUs and folders"], tmp_path, PATH=path, RUNNER_TEMP=tmp_path / "temp", **files)
    assert done.returncode == 0, done.stderr
    assert files["GITHUB_OUTPUT"].read_text() == "gpu=NVIDIA-H100-80GB-HBM3\n"
    names = [line.partition("=")[0] for line in files["GITHUB_ENV"].read_text().splitlines()]
    assert names == ["VENV", "RESULTS", "VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"]
    assert (tmp_path / "temp" / "results").is_dir()


def test_a_runner_without_a_driver_is_red(tmp_path: Path) -> None:
    bare = tmp_path / "bin"
    bare.mkdir()
    (bare / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (bare / "nvidia-smi").chmod(0o755)
    files = {name: tmp_path / name for name in ("GITHUB_OUTPUT", "GITHUB_ENV")}
    path = f"{bare}:{os.environ['PATH']}"
    assert run(SCRIPTS["GPUs and folders"], tmp_path, PATH=path, RUNNER_TEMP=tmp_path, **files).returncode == 9


@pytest.fixture
def runner(tmp_path: Path) -> dict[str, object]:
    """Return the environment of the measuring step: a small test on simulated GPUs, by the interpreter of this run."""
    venv = tmp_path / "venv" / "bin"
    venv.mkdir(parents=True)
    (venv / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (venv / "python").chmod(0o755)
    (tmp_path / "results").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_it.py").write_text(
        "def test_it(llmperf, baseline):\n    assert llmperf(prompt_tokens=8, output_tokens=4, requests=8) == baseline\n"
    )
    return {
        "VENV": venv.parent,
        "RESULTS": tmp_path / "results",
        "GITHUB_STEP_SUMMARY": tmp_path / "summary",
        "TESTS": "test_it.py",
        "MODE": "",
        **{name: WORKFLOW["env"][name] for name in ("MODEL", "DEGREES")},
        "PYTEST_ADDOPTS": "-p no:cacheprovider --llmperf-engine=simulated --llmperf-launches=1 --llmperf-rounds=2",
    }


def test_recording_is_green_and_its_table_is_in_the_summary(tmp_path: Path, runner: dict[str, object]) -> None:
    done = run(SCRIPTS["Measure"], tmp_path, **runner | {"MODE": "--update-baselines"})
    assert done.returncode == 0, done.stdout
    assert len(list((tmp_path / "baselines").rglob("*.json"))) == 3  # TP 1, 2 and 4
    assert {path.name for path in (tmp_path / "results").iterdir()} == {"llmperf.json", "junit.xml", "logs", "output.txt"}
    assert list((tmp_path / "results" / "logs").glob("llmperf0/engine-*.log"))
    assert run(SCRIPTS["Summary"], tmp_path, **runner).returncode == 0
    summary = (tmp_path / "summary").read_text().splitlines()
    assert (summary[0], summary[-1]) == ("```", "```")
    assert re.fullmatch("=+ llmperf =+", summary[1])
    assert "0 compared, 3 not compared (3 RECORDED)" in summary


def test_a_failing_test_keeps_the_baselines_of_the_others(tmp_path: Path, runner: dict[str, object]) -> None:
    with (tmp_path / "test_it.py").open("a") as file:
        file.write("\n\ndef test_fails(llmperf, baseline):\n    test_it(llmperf, baseline)\n    assert False\n")
    done = run(SCRIPTS["Measure"], tmp_path, **runner | {"MODE": "--update-baselines", "DEGREES": "1"})
    assert done.returncode == 1, done.stdout
    assert [path.stem for path in (tmp_path / "baselines").rglob("*.json")] == ["test_it-qwen2.5_7b_shape-tp1-c8"]


def test_a_failure_is_red_though_its_output_is_copied(tmp_path: Path, runner: dict[str, object]) -> None:
    done = run(SCRIPTS["Measure"], tmp_path, **runner)
    assert done.returncode == 1, done.stdout
    assert run(SCRIPTS["Summary"], tmp_path, **runner).returncode == 0
    summary = (tmp_path / "summary").read_text()
    assert re.match("```\n=+ FAILURES =+\n", summary)
    assert "0 compared, 3 not compared (3 NO-BASELINE)" in summary


def test_too_few_gpus_are_red(tmp_path: Path, runner: dict[str, object]) -> None:
    done = run(SCRIPTS["Measure"], tmp_path, **runner | {"LLMPERF_SIMULATED_GPUS": 2, "MODE": "--update-baselines"})
    assert done.returncode == 1, done.stdout
    assert "needs 4 GPUs" in done.stdout


def test_of_a_run_that_never_began_the_summary_has_the_end(tmp_path: Path, runner: dict[str, object]) -> None:
    done = run(SCRIPTS["Measure"], tmp_path, **runner | {"DEGREES": "0"})
    assert done.returncode == 4, done.stdout
    assert run(SCRIPTS["Summary"], tmp_path, **runner).returncode == 0
    assert "--llmperf-tp=0: the smallest value is 1" in (tmp_path / "summary").read_text()


@pytest.fixture
def audit(tmp_path: Path) -> dict[str, object]:
    """Return the environment of the audit: its tools note how they are called, and AUDIT_FAILS is how pip-audit ends."""
    (tmp_path / "results").mkdir()
    binaries = tmp_path / "bin"
    binaries.mkdir()
    (binaries / "python3").write_text('#!/bin/sh\nmkdir -p "$3/bin"\ncp "$(dirname "$0")/noting" "$3/bin/python"\n')
    (binaries / "noting").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\ntest "$2" = pip || exit "$AUDIT_FAILS"\n')
    for file in binaries.iterdir():
        file.chmod(0o755)
    return {"PATH": f"{binaries}:{os.environ['PATH']}", "RUNNER_TEMP": tmp_path / "temp", "AUDIT_FAILS": 0}


AUDIT = "Known vulnerabilities of what was installed"


def test_the_audit_looks_up_releases_without_their_local_versions(tmp_path: Path, audit: dict[str, object]) -> None:
    listed = (
        "torch==2.9.0+cu128\nnumpy==2.3.2\nmine @ file:///work\n-e git+https://x/y@1#egg=y\nvllm==0.32.0 ; python_version > '3'\n"
    )
    for attempt, text in (("llmperf-2", "numpy==1.0\n"), ("llmperf-10", listed)):  # the last one counts
        (tmp_path / "results" / attempt).mkdir()
        (tmp_path / "results" / attempt / "packages.txt").write_text(text)
    done = run(SCRIPTS[AUDIT], tmp_path, **audit)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pinned.txt").read_text().split() == ["torch==2.9.0", "numpy==2.3.2", "vllm==0.32.0"]
    assert "-m pip_audit --strict" in (tmp_path / "called").read_text()


def test_an_audit_that_finds_something_is_red(tmp_path: Path, audit: dict[str, object]) -> None:
    (tmp_path / "results" / "packages.txt").write_text("numpy==2.3.2\n")
    assert run(SCRIPTS[AUDIT], tmp_path, **audit | {"AUDIT_FAILS": 1}).returncode == 1


def test_an_audit_of_nothing_is_red(tmp_path: Path, audit: dict[str, object]) -> None:
    done = run(SCRIPTS[AUDIT], tmp_path, **audit)
    assert (done.returncode, "no list of installed packages" in done.stderr) == (1, True)


@pytest.fixture
def checkout(tmp_path: Path) -> dict[str, object]:
    """Return the environment of the pushing step, whose folder is `work`: a clone of `origin`."""
    git = "git -c user.name=x -c user.email=x@example.com"
    made = run(
        "git init --quiet --bare origin && git clone --quiet origin work && cd work && mkdir baselines"
        " && echo here > baselines/README.md && git add baselines"
        f" && {git} commit --quiet -m one && git push --quiet origin HEAD",
        tmp_path,
    )
    assert made.returncode == 0, made.stderr
    return {
        "GITHUB_RUN_ID": 17,
        "GITHUB_RUN_ATTEMPT": 1,
        "GITHUB_SHA": "5824662",
        "GITHUB_SERVER_URL": "https://github.example",
        "GITHUB_REPOSITORY": "us/ours",
        "GITHUB_REF_NAME": "main",
        "GITHUB_STEP_SUMMARY": tmp_path / "summary",
    }


def test_recorded_baselines_come_to_a_branch_of_their_own(tmp_path: Path, checkout: dict[str, object]) -> None:
    (tmp_path / "work" / "baselines" / "case.json").write_text("{}")
    done = run(SCRIPTS["Push them to a branch of their own"], tmp_path / "work", **checkout)
    assert done.returncode == 0, done.stderr
    shown = run("git show --stat --format='%an: %s' baselines-17-1", tmp_path / "origin").stdout
    assert shown.startswith("github-actions[bot]: Baselines recorded at 5824662")
    assert "baselines/case.json" in shown
    assert "https://github.example/us/ours/compare/main...baselines-17-1?expand=1" in (tmp_path / "summary").read_text()


def test_a_run_that_recorded_nothing_pushes_nothing_and_says_so(tmp_path: Path, checkout: dict[str, object]) -> None:
    done = run(SCRIPTS["Push them to a branch of their own"], tmp_path / "work", **checkout)
    assert done.returncode == 0, done.stderr
    assert len(run("git branch --list", tmp_path / "origin").stdout.splitlines()) == 1
    assert (tmp_path / "summary").read_text() == "No baseline was recorded: see why in the job that measures\n"
