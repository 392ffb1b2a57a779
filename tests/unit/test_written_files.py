"""Files of ours: their mode, their links, and what is read of others."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from pytest_llmperf import files

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_file_has_what_the_umask_leaves(tmp_path: Path, umask: int) -> None:
    files.write_text(tmp_path / "new", "text")
    assert mode(tmp_path / "new") == 0o666 & ~umask


@pytest.mark.parametrize("kept", [0o600, 0o640, 0o644, 0o664])
def test_a_file_that_exists_keeps_its_mode(tmp_path: Path, umask: int, kept: int) -> None:
    path = tmp_path / "old"
    path.touch()
    path.chmod(kept)
    files.write_text(path, "text")
    assert (mode(path), path.read_text()) == (kept, "text")


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    files.write_text(path, "text")
    assert path.read_text() == "text"


@pytest.mark.parametrize("name", ["loop", "loop/x", "folder", "x" * 256, "file/x"])
def test_what_cannot_be_written_is_an_os_error_and_moves_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("text")
    assert files.unwritable_file(tmp_path / name)
    with pytest.raises(OSError, match="Errno"):
        files.write_text(tmp_path / name, "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "loop"]
    assert (tmp_path / "loop").is_symlink()


def test_a_path_with_a_null_byte_is_told(tmp_path: Path) -> None:
    assert "null byte" in (files.unwritable_file(tmp_path / "a\0b") or "")
    assert not files.is_there(tmp_path / "a\0b")
    with pytest.raises(OSError, match="null byte"):
        files.read_file(tmp_path / "a\0b")


def test_text_that_no_file_can_hold_is_escaped(tmp_path: Path) -> None:
    files.write_text(tmp_path / "file", "a\udcffb")
    assert (tmp_path / "file").read_text() == "a\\udcffb"
    assert files.storable({"a\udcff": ["b\udcff", 1, None, ("c\udcff",)]}) == {"a\\udcff": ["b\\udcff", 1, None, ["c\\udcff"]]}


def test_a_file_that_standard_output_goes_to_is_added_to(tmp_path: Path) -> None:
    code = (
        "import pathlib; from pytest_llmperf.files import write_text\n"
        "print('before', flush=True); write_text(pathlib.Path('/dev/stdout'), 'json\\n'); print('behind')"
    )
    with (tmp_path / "output").open("a") as output:
        subprocess.run([sys.executable, "-c", code], stdout=output, check=True)
    assert (tmp_path / "output").read_text() == "before\njson\nbehind\n"


def test_a_link_by_the_new_files_name_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("text")
    (tmp_path / ".file.llmperf-new").symlink_to(victim)
    with pytest.raises(OSError, match="Errno"):
        files.write_text(tmp_path / "file", "other")
    assert victim.read_text() == "text"


def test_what_is_being_written_is_not_swept(tmp_path: Path) -> None:
    def make() -> str:
        files.sweep(tmp_path)
        assert (tmp_path / ".file.llmperf-new").exists()
        return "text"

    files.rewrite(tmp_path / "file", make)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
