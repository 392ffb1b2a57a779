"""What a run is to write: tried before the first engine, written case by case, and called recorded only afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import SERVING

RECORD = ("--update-baselines", "--llmperf-launches=1")
PAIR = SERVING.replace("test_serving", "test_a") + SERVING.replace("test_serving", "test_b")
FULL = """
import os
import pytest

@pytest.fixture(autouse=True)
def full_disk(monkeypatch):
    def refuse(handle):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", refuse)
"""


@pytest.mark.parametrize("folder", ["/proc/none", "/proc/self/none/deeper", "a_file", "a_file/deeper", "/dev/null"])
@pytest.mark.parametrize("how", [RECORD, ("--llmperf-missing-baseline=record",)], ids=["update", "missing"])
def test_a_baselines_folder_that_takes_no_file_is_refused_at_once(run, tmp_path, folder, how):
    (tmp_path / "a_file").touch()
    result = run(SERVING, f"--llmperf-baselines={folder}", *how)
    assert result.returncode == 4
    assert "--llmperf-baselines=" in result.stderr
    assert "cannot be written" in result.stderr
    assert result.engine_starts == 0


@pytest.mark.parametrize("path", ["/proc/none", "a_folder", "a_file/out.json"])
def test_a_json_file_that_cannot_be_written_is_refused_at_once(run, tmp_path, path):
    (tmp_path / "a_file").touch()
    (tmp_path / "a_folder").mkdir()
    result = run(SERVING, f"--llmperf-json={path}", *RECORD)
    assert result.returncode == 4
    assert "--llmperf-json=" in result.stderr
    assert result.engine_starts == 0


def test_trying_a_target_leaves_nothing_behind(run, tmp_path):
    wrong = "import pytest\n\n@pytest.mark.llmperf(tpp=1)" + SERVING
    run(wrong, "--llmperf-json=new/deep/out.json", "--llmperf-baselines=base/deep", *RECORD)
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "base").exists()


def test_a_run_that_only_compares_needs_no_writable_folder(run, tmp_path):
    run(SERVING, *RECORD)
    held = Path("/proc/self/fd")  # takes no file, from nobody
    assert held.is_dir()
    for how in ((), ("--llmperf-missing-baseline=record",), ("--update-baselines-new-only",)):
        (tmp_path / "baselines").chmod(0o555)
        assert run(SERVING, *how).outcomes == {"passed": 1}
    assert run(SERVING, f"--llmperf-baselines={held}", "--llmperf-missing-baseline=skip").outcomes == {"skipped": 1}


def test_what_could_not_be_written_is_not_called_recorded(run):
    result = run({"conftest.py": FULL, "test_it.py": SERVING}, *RECORD)
    assert result.outcomes == {"failed": 1}
    assert set(result.statuses.values()) == {"MEASURED"}
    assert "The baseline is not recorded, because" in result.stdout
    assert "No space left on device" in result.stdout
    assert "RECORDED" not in result.stdout


def test_the_json_file_holds_each_case_as_soon_as_it_is_over(run, tmp_path):
    source = (
        PAIR
        + """
def test_crash(request):
    import json, pathlib
    cases = json.loads(pathlib.Path("llmperf.json").read_text())["cases"]
    print("SO FAR", [case["status"] for case in cases])
"""
    )
    conftest = "def pytest_collection_modifyitems(items):\n    items.sort(key=lambda item: item.name == 'test_crash')\n"
    result = run({"test_it.py": source, "conftest.py": conftest}, "-s", *RECORD)
    assert "SO FAR ['RECORDED', 'RECORDED']" in result.stdout


def test_a_json_file_that_cannot_be_written_any_more_fails_the_run(run, tmp_path):
    source = (
        SERVING
        + """
def test_meanwhile():
    import os, pathlib
    os.remove("llmperf.json"); os.mkdir("llmperf.json"); pathlib.Path("llmperf.json/x").touch()
"""
    )
    conftest = "def pytest_collection_modifyitems(items):\n    items.sort(key=lambda item: item.name == 'test_meanwhile')\n"
    result = run({"test_it.py": source, "conftest.py": conftest}, *RECORD)
    assert result.returncode == 1
    assert "llmperf::json" in result.stdout
    assert "could not be written" in result.stdout


def test_a_device_is_written_into_once(run):
    result = run(SERVING, "--llmperf-json=/dev/stdout", "-s", *RECORD)
    assert result.returncode == 0
    assert Path("/dev/stdout").exists()


def test_a_link_is_followed(run, tmp_path):
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real.json")
    run(SERVING, "--llmperf-json=link.json", *RECORD)
    assert (tmp_path / "link.json").is_symlink()
    assert len(json.loads((tmp_path / "real.json").read_text())["cases"]) == 1
