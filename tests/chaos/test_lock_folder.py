"""What another user of the machine can put into the folder of locks before us: it is refused at once, and nothing is touched."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import pytest

from pytest_llmperf.measure.gpus.device import Gpu
from pytest_llmperf.measure.gpus.leases import LeaseError, Locks, host_turn, lease

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.faults import Attempts

DEADLINE_S = 20.0


def _refusal(folder: Path) -> str:
    """Return what is said when the host's turn and a GPU are asked for; fails where that takes for ever."""
    said: list[str] = []

    def ask() -> None:
        locks = Locks(folder, lambda _: None)
        try:
            with host_turn(locks, alone=True), lease([Gpu(0, "GPU-0", "H200", 1)], 1, locks, unfit=lambda _: {}):
                said.append("taken")
        except LeaseError as error:
            said.append(str(error))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(DEADLINE_S)
    assert said, "it hangs"
    return said[0]


@pytest.mark.fault("no stranger", "a lock file is a link to somebody's file")
@pytest.mark.parametrize("name", ["turn.lock", "host.lock", "queue.lock", "GPU-0.lock"])
@pytest.mark.parametrize("there", [True, False], ids=["to a file", "to nothing"])
def test_a_link_in_the_place_of_a_lock_is_not_followed(tmp_path: Path, attempts: Attempts, name: str, there: bool) -> None:
    for _ in attempts(quick=1, full=5):
        folder, target = tmp_path / f"locks{attempts.tried}", tmp_path / f"target{attempts.tried}"
        folder.mkdir()
        if there:
            target.write_text("mine")
            os.utime(target, (1, 1))
        (folder / name).symlink_to(target)
        assert _refusal(folder) == (
            f"{folder / name}, the lock that keeps two engines apart, is no plain file: somebody has put it there. Remove it."
        )
        assert target.exists() is there
        assert not there or (target.read_text(), target.stat().st_mtime) == ("mine", 1)


@pytest.mark.fault("no hang", "a lock file is a pipe")
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_a_pipe_in_the_place_of_a_lock_is_not_waited_for(
    tmp_path: Path, attempts: Attempts, make: Callable[[Path], None]
) -> None:
    for _ in attempts(quick=1, full=5):
        folder = tmp_path / f"locks{attempts.tried}"
        folder.mkdir()
        make(folder / "turn.lock")
        assert "turn.lock, the lock that keeps two engines apart, is no plain file" in _refusal(folder)


@pytest.mark.fault("no stranger", "the folder of locks is a link, or one in which anybody can replace the files of others")
def test_a_folder_that_is_a_link_or_open_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert "is a link. Remove it" in _refusal(tmp_path / "link")
    assert list((tmp_path / "real").iterdir()) == []
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)  # our own, or root's: as containers have it mounted
    assert _refusal(tmp_path / "open") == "taken"
    assert (tmp_path / "open").stat().st_mode & 0o7777 == 0o1777
    (tmp_path / "open").chmod(0o775)  # that of a umask of 002, where each user is a group
    assert _refusal(tmp_path / "open") == "taken"


@pytest.mark.fault("no stranger", "the folder of locks is a link, or one in which anybody can replace the files of others")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_an_open_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs").chmod(0o777)
    os.chown(tmp_path / "theirs", 12345, 12345)
    assert "Give it mode 1777" in _refusal(tmp_path / "theirs")
