"""Whose baseline it is: another model's or another kind of engine's is not comparable, and none meets another's file."""

from __future__ import annotations

import json

import pytest

from tests.baselines import as_version_2
from tests.conftest import SERVING

RECORD = ("--update-baselines", "--llmperf-launches=2")
FILE = "baselines/simulated/test_it/test_serving-{}-tp1-c8.json"


def checkpoint(folder, **config):
    """Make a folder with a model's config.json."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "vocab_size": 32000, **config}))


def on(*models):
    return f"import pytest\n\n@pytest.mark.llmperf(model={list(models)!r})" + SERVING


def test_models_of_one_name_keep_their_baselines_in_any_order(run):
    models = ("ckpt/old/model", "ckpt/new/model")
    recorded = run(on(*models), *RECORD)
    assert set(recorded.statuses) == {f"test_it.py::test_serving[{name}-tp1-c8]" for name in ("old_model", "new_model")}
    assert set(run(on(*reversed(models))).statuses.values()) == {"PASS"}


def test_another_model_is_not_comparable_by_name(run):
    run(SERVING, "--llmperf-model=team/base", *RECORD)
    result = run(SERVING, "--llmperf-model=fork/base")
    assert result.outcomes == {"failed": 1}
    assert "NOT-COMPARABLE" in result.stdout
    assert "model: team/base -> fork/base" in result.stdout


def test_a_checkpoint_is_known_by_its_config(run, tmp_path):
    checkpoint(tmp_path / "a/shape", hidden_size=64)
    checkpoint(tmp_path / "b/shape", hidden_size=64, _name_or_path="elsewhere")
    checkpoint(tmp_path / "c/shape", hidden_size=128)
    assert run(SERVING, "--llmperf-model=a/shape", *RECORD).outcomes == {"passed": 1}
    assert set(run(SERVING, "--llmperf-model=b/shape").statuses.values()) == {"PASS"}
    other = run(SERVING, "--llmperf-model=c/shape")
    assert set(other.statuses.values()) == {"NOT-COMPARABLE"}
    assert "model: a/shape -> c/shape" in other.stdout


def test_a_checkpoint_that_has_changed_in_place_is_not_comparable(run, tmp_path):
    checkpoint(tmp_path / "shape", hidden_size=64)
    run(SERVING, "--llmperf-model=shape", *RECORD)
    (tmp_path / "shape/config.json").write_text('{"hidden_size": 32}')
    assert "model: shape -> shape (its config.json is another one)" in run(SERVING, "--llmperf-model=shape").stdout


def test_recording_another_model_replaces_and_says_so(run, tmp_path):
    checkpoint(tmp_path / "a/shape", hidden_size=64)
    checkpoint(tmp_path / "b/shape", hidden_size=64)
    run(SERVING, "--llmperf-model=a/shape", *RECORD)
    assert "extended by 2 launches" in run(SERVING, "--llmperf-model=b/shape", *RECORD).stdout
    replaced = run(SERVING, "--llmperf-model=c/shape", *RECORD)
    assert "2 launches in place of 4, which were of another version: model: b/shape -> c/shape" in replaced.stdout


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        ({"kind": "offline", "model": "tiny"}, "engine kind: offline -> simulated"),
        ({"kind": "simulated", "model": "large"}, "model: large -> tiny"),
        ({"kind": "simulated", "model": "/models/tiny"}, None),
        ({"kind": "simulated"}, None),
        ({}, None),
    ],
    ids=["kind", "model", "the same by another path", "no model", "nothing"],
)
def test_what_an_older_file_says_of_its_engine_counts(run, tmp_path, stored, reason):
    run(SERVING, *RECORD)
    path = tmp_path / FILE.format("tiny")
    as_version_2(path, lambda data: data["provenance"].update(engine={"args": "", "env": {}, **stored}))
    result = run(SERVING)
    assert set(result.statuses.values()) == {"NOT-COMPARABLE" if reason else "PASS"}, result.stdout
    assert reason is None or reason in result.stdout


URL = """
import os
import pytest
from pytest_llmperf.testing import Options, SimulatedEngine

@pytest.fixture(scope="session")
def endpoint():
    with SimulatedEngine(Options(model=os.environ["SERVED"])) as engine:
        yield engine.url

@pytest.fixture(scope="session")
def llm_engine_url(request):
    return request.getfixturevalue("endpoint") if "SERVED" in os.environ else None
"""


def test_an_endpoint_that_serves_another_model_is_not_comparable(run):
    files = {"conftest.py": URL, "test_it.py": SERVING}
    first = run(files, "--update-baselines", "--llmperf-launches=1", SERVED="red-8b")
    assert first.cases[0]["launches"][0]["model"] == "red-8b"
    result = run(files, SERVED="blue-8b")
    assert "model: red-8b -> blue-8b" in result.stdout
    assert set(result.statuses.values()) == {"NOT-COMPARABLE"}


def test_kinds_of_engines_have_files_of_their_own(run, tmp_path):
    files = {"conftest.py": URL, "test_it.py": SERVING}
    run(files, *RECORD, SERVED="red-8b")
    run(files, *RECORD)
    stored = [json.loads(path.read_text()) for path in (tmp_path / "baselines").rglob("*.json")]
    assert sorted(each["provenance"]["engine"]["kind"] for each in stored) == ["simulated", "url"]
    assert set(run(files).statuses.values()) == {"PASS"}
    assert "2 of" not in run(files, "--llmperf-selftest", "-rA").stdout


def test_a_file_that_two_kinds_shared_belongs_to_its_own(run, tmp_path):
    files = {"conftest.py": URL, "test_it.py": SERVING}
    run(files, "--update-baselines", "--llmperf-launches=1", SERVED="red-8b")
    [own] = (tmp_path / "baselines").rglob("*.json")
    own.rename(tmp_path / FILE.format("tiny"))  # as an older plugin has named it
    assert run(files, SERVED="red-8b").cases[0]["status"] != "NO-BASELINE"
    assert run(files).cases[0]["verdict"]["reasons"] == ["engine kind: url -> simulated"]
