"""Leases of GPUs: file locks between processes, which are real ones here, and between engines of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_llmperf.measure.gpus import leases
from pytest_llmperf.measure.gpus.device import Gpu
from pytest_llmperf.measure.gpus.leases import LeaseError, Locks, choices, host_turn, lease, lock_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

DEADLINE_S = 20.0

HOLDER = """
import json, sys
from pathlib import Path
from pytest_llmperf.measure.gpus.device import Gpu
from pytest_llmperf.measure.gpus.leases import Locks, host_turn, lease

what, folder, gpus, count = json.loads(sys.argv[1])
locks = Locks(Path(folder), lambda text: print(text, flush=True))
devices = [Gpu(index, f"GPU-{index}", "H200", 1) for index in range(gpus)]
if what == "lease":
    held = lease(devices, count, locks, unfit=lambda gpus: {})
else:
    held = host_turn(locks, alone=what == "alone")
with held as got:
    print("has", *(one.index for one in got or ()), flush=True)
    sys.stdin.readline()
"""


class Holder:
    """A process that asks for GPUs, or for the host, and holds what it gets until it is told to let go."""

    def __init__(self, folder: Path, what: str = "lease", *, gpus: int = 4, count: int = 1) -> None:
        command = [sys.executable, "-c", HOLDER, json.dumps([what, str(folder), gpus, count])]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._watchdog = threading.Timer(DEADLINE_S, self.process.kill)
        self._watchdog.start()

    def says(self) -> str:
        """The next line of the process; empty if it was silent for too long."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def let_go(self) -> None:
        self.process.communicate("\n", DEADLINE_S)

    def end(self) -> None:
        self._watchdog.cancel()
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Callable[..., Holder]]:
    """Start processes that hold something of one machine."""
    holders: list[Holder] = []

    def start(*what: str, gpus: int = 4, count: int = 1) -> Holder:
        holders.append(Holder(tmp_path, *what, gpus=gpus, count=count))
        return holders[-1]

    yield start
    for holder in holders:
        holder.end()


@pytest.fixture
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Locks:
    """The locks of the machine of `hold`; a wait fails the test: nothing in this process would end it."""

    def no_wait(text: str) -> None:
        pytest.fail(f"waits: {text}")

    monkeypatch.setattr(leases, "POLL_S", 0.0)
    return Locks(tmp_path, no_wait)


def machine(*islands: int) -> list[Gpu]:
    """GPUs in islands of these sizes, linked all to all within each."""
    gpus: list[Gpu] = []
    for size in islands:
        indices = range(len(gpus), len(gpus) + size)
        gpus += [Gpu(i, f"GPU-{i}", "H200", 1, peers=tuple(j for j in indices if j != i)) for i in indices]
    return gpus


def sound(gpus: Sequence[Gpu]) -> dict[str, str]:
    return {}


@contextmanager
def leased(locks: Locks, gpus: Sequence[Gpu], count: int = 1) -> Iterator[list[int]]:
    with lease(gpus, count, locks, unfit=sound) as got:
        yield [gpu.index for gpu in got]


# ------------------------------------------------------------------------------------------------- between processes


def test_two_processes_get_different_gpus(hold):
    assert hold(count=2).says() == "has 0 1"
    assert hold(count=2).says() == "has 2 3"


def test_gpus_are_taken_all_at_once_when_enough_of_them_are_free(hold):
    first = hold(gpus=3)
    assert first.says() == "has 0"
    assert hold(gpus=3).says() == "has 1"
    third = hold(gpus=3, count=2)
    assert third.says() == "waiting for GPUs that other engines have"
    first.let_go()
    assert third.says() == "has 0 2"


def test_a_lock_file_removed_while_waited_for_locks_nothing(hold, locks):
    first = hold("alone")
    assert first.says() == "has"
    second = hold("alone")
    assert second.says() == f"waiting for another run's engine to end (process {first.process.pid} has it)"
    (locks.folder / "host.lock").unlink()
    first.let_go()
    assert second.says() == "has"
    assert hold("alone").says() == f"waiting for another run's engine to end (process {second.process.pid} has it)"


def test_a_lock_file_that_is_taken_is_young_again(locks):
    for _ in range(2):
        with leased(locks, machine(1), 1):
            (file,) = locks.folder.glob("GPU-*.lock")
            assert time.time() - file.stat().st_mtime < 60
        os.utime(file, (0, 0))


def test_the_gpus_of_a_process_that_is_killed_are_free_at_once(hold, locks):
    holder = hold(count=4)
    assert holder.says() == "has 0 1 2 3"
    holder.process.kill()
    holder.process.wait(DEADLINE_S)
    with leased(locks, machine(4), 4) as got:
        assert got == [0, 1, 2, 3]


def test_an_engine_of_four_gpus_is_not_overtaken_by_engines_of_one(hold):
    single = hold()
    assert single.says() == "has 0"
    four = hold(count=4)
    assert four.says() == "waiting for GPUs that other engines have"
    late = hold()
    assert late.says() == f"waiting behind another engine for GPUs (process {four.process.pid} has it)"
    single.let_go()
    assert four.says() == "has 0 1 2 3"
    assert late.says() == "waiting for GPUs that other engines have"
    four.let_go()
    assert late.says() == "has 0"


def test_the_host_is_kept_to_one_that_wants_it_alone(hold):
    alone = hold("alone")
    assert alone.says() == "has"
    neighbour = hold("shared")
    assert neighbour.says() == f"waiting for another run's engine to end (process {alone.process.pid} has it)"
    alone.let_go()
    assert neighbour.says() == "has"


def test_those_that_do_not_mind_neighbours_share_the_host(hold):
    assert hold("shared").says() == "has"
    assert hold("shared").says() == "has"


def test_one_that_wants_the_host_alone_is_not_overtaken_by_sharers(hold):
    first = hold("shared")
    assert first.says() == "has"
    alone = hold("alone")
    assert alone.says() == f"waiting for another run's engine to end (process {first.process.pid} has it)"
    late = hold("shared")
    assert late.says() == f"waiting behind another run for this host (process {alone.process.pid} has it)"
    first.let_go()
    assert alone.says() == "has"
    assert late.says() == f"waiting for another run's engine to end (process {alone.process.pid} has it)"
    alone.let_go()
    assert late.says() == "has"


def test_the_host_is_free_when_the_one_that_had_it_is_killed(hold, locks):
    alone = hold("alone")
    assert alone.says() == "has"
    alone.process.kill()
    alone.process.wait(DEADLINE_S)
    with host_turn(locks, alone=True):
        pass


# --------------------------------------------------------------------------------------------------------- which GPUs


def test_the_gpus_are_free_again_when_the_block_ends(locks):
    for _ in range(2):
        with leased(locks, machine(1)) as got:
            assert got == [0]


def test_an_error_in_the_block_frees_the_gpus_too(locks):
    with pytest.raises(ValueError, match="of the engine"), leased(locks, machine(1)):
        raise ValueError("of the engine")
    with leased(locks, machine(1)) as got:
        assert got == [0]


def test_the_order_is_that_of_the_run_and_not_of_the_indices(locks):
    with leased(locks, list(reversed(machine(4))), 2) as got:
        assert got == [3, 2]


def test_the_smallest_island_that_suffices_is_taken_first(locks):
    with leased(locks, machine(4, 2), 2) as got:
        assert got == [4, 5]


def test_an_island_that_is_in_use_is_left_for_another_one(locks):
    with leased(locks, machine(4, 2)) as first, leased(locks, machine(4, 2), 2) as second:
        assert (first, second) == ([4], [0, 1])


def test_a_set_across_islands_is_not_taken_where_one_island_suffices(locks, tmp_path):
    gpus, texts = machine(2, 2), []
    with ExitStack() as others:
        for uuid in ("GPU-0", "GPU-2"):
            others.enter_context(lease([gpu for gpu in gpus if gpu.uuid == uuid], 1, locks, unfit=sound))

        def waiting(text: str) -> None:
            texts.append(text)
            others.close()

        with leased(Locks(tmp_path, waiting), gpus, 2) as got:  # 1 and 3 would be free
            assert got == [0, 1]
    assert texts == ["waiting for GPUs that other engines have"]


def test_gpus_across_islands_are_taken_where_no_island_suffices(locks):
    with leased(locks, machine(2, 2), 3) as got:
        assert got == [0, 1, 2]


def test_gpus_without_links_are_all_alike(locks):
    with leased(locks, machine(1, 1, 1, 1), 2) as got:
        assert got == [0, 1]


def test_more_gpus_than_the_run_may_use_are_refused_at_once(locks):
    with pytest.raises(LeaseError, match=r"^4 GPUs are needed, and this run may use 2\.$"), leased(locks, machine(2), 4):
        pass


# --------------------------------------------------------------------------------------------------------- unfit GPUs


def test_a_gpu_that_something_is_wrong_with_is_avoided(locks):
    with lease(machine(2), 1, locks, unfit=lambda gpus: {"GPU-0": "GPU 0 is used by pid 1 (init)"}) as got:
        assert [gpu.index for gpu in got] == [1]


def test_only_gpus_that_nobody_has_leased_are_looked_at(locks):
    asked: list[list[int]] = []

    def unfit(gpus: Sequence[Gpu]) -> dict[str, str]:
        asked.append([gpu.index for gpu in gpus])
        return {}

    with leased(locks, machine(3)), lease(machine(3), 1, locks, unfit=unfit):
        assert asked == [[1, 2]]


def test_what_is_wrong_is_waited_for_and_told_once(locks, tmp_path):
    answers: list[dict[str, str]] = [{"GPU-0": "GPU 0 is hot"}, {"GPU-0": "GPU 0 is hot"}, {}]
    texts: list[str] = []
    with lease(machine(1), 1, Locks(tmp_path, texts.append), unfit=lambda gpus: answers.pop(0)) as got:
        assert [gpu.index for gpu in got] == [0]
    assert texts == ["waiting: GPU 0 is hot"]


def test_what_stays_wrong_is_named_with_the_remedy_when_patience_ends(locks, tmp_path):
    wrong = {"GPU-0": "GPU 0 is used by pid 1 (init)", "GPU-1": "quarantine: GPU 1 still has 4.0 GiB"}
    patient = Locks(tmp_path, lambda text: None)
    asked = lease(machine(3), 2, patient, unfit=lambda gpus: wrong, patience_s=0.01, remedy="End it.")
    with pytest.raises(LeaseError) as error, asked:
        pass
    assert str(error.value) == ("GPU 0 is used by pid 1 (init); quarantine: GPU 1 still has 4.0 GiB. Waited 0.01 s. End it.")
    with leased(locks, machine(3), 3) as got:  # nothing is kept
        assert got == [0, 1, 2]


def test_leases_that_suffice_when_they_end_are_waited_for_without_limit(locks, tmp_path):
    gpus, asked = machine(2), []
    with ExitStack() as other:
        other.enter_context(lease([gpus[1]], 1, locks, unfit=sound))

        def unfit(free: Sequence[Gpu]) -> dict[str, str]:
            asked.append([gpu.index for gpu in free])
            if len(asked) == 3:
                other.close()
            return {"GPU-0": "GPU 0 is used by pid 1 (init)"}

        with lease(gpus, 1, Locks(tmp_path, lambda text: None), unfit=unfit, patience_s=0.0) as got:
            assert [gpu.index for gpu in got] == [1]
    assert asked == [[0], [0], [0], [0, 1]]


def test_many_cores_are_not_tried_in_every_combination(tmp_path):
    cores = machine(64)
    wrong = {gpu.uuid: "in use" for gpu in cores[:33]}
    asked = lease(cores, 32, Locks(tmp_path, lambda text: None), unfit=lambda gpus: wrong, patience_s=0.0)
    with pytest.raises(LeaseError, match=r"Waited 0 s"), asked:
        pass


# ---------------------------------------------------------------------------------------------------------- lock files


def test_lock_files_are_named_by_uuid_and_every_user_can_lock_them(locks, tmp_path):
    folder, before = tmp_path / "locks", os.umask(0o077)
    try:
        with leased(locks._replace(folder=folder), [Gpu(0, "MIG-1/2 3", "H200", 1)]):
            modes = {path.name: oct(path.stat().st_mode & 0o7777) for path in (folder, *folder.iterdir())}
    finally:
        os.umask(before)
    assert modes == {"locks": "0o1777", "queue.lock": "0o666", "MIG-1-2-3.lock": "0o666"}


def test_gpus_stay_free_where_the_lock_of_another_cannot_be_had(locks, tmp_path):
    folder = tmp_path / "locks"
    first, second = Gpu(0, "GPU-a", "H200", 1), Gpu(1, "GPU-b", "H200", 1)
    folder.mkdir()
    (folder / "GPU-b.lock").mkdir()
    for _ in range(2):  # the second time the first GPU would be waited for, were it still locked
        with (
            pytest.raises(LeaseError, match=r"GPU-b\.lock, .* is no plain file"),
            leased(locks._replace(folder=folder), [first, second]),
        ):
            pass
    with leased(locks._replace(folder=folder), [first]) as taken:
        assert taken == [0]


def test_a_lock_file_of_another_user_can_be_locked(locks, tmp_path, monkeypatch):
    folder, flags, really = tmp_path / "locks", list[int](), os.open

    def opened(path: str | os.PathLike[str], how: int, *rest: int, **more: int) -> int:
        if Path(path).is_relative_to(folder):
            flags.append(how)
        return really(path, how, *rest, **more)

    with leased(locks._replace(folder=folder), machine(1)):
        pass
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)
    monkeypatch.setattr(os, "open", opened)
    with leased(locks._replace(folder=folder), machine(1)) as got:
        assert got == [0]
    # The modes restrict nothing where root runs this: what would need more than they give is seen by the flags.
    assert flags
    assert all(how & (os.O_ACCMODE | os.O_CREAT | os.O_TRUNC) == os.O_RDONLY for how in flags)


def test_a_folder_that_cannot_be_used_is_named_with_the_remedy(locks, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(LeaseError) as error, leased(locks._replace(folder=tmp_path / "file"), machine(1)):
        pass
    assert str(error.value) == f"{tmp_path}/file, the folder of the locks that keep engines apart, is no folder. Remove it."


def test_all_users_and_jobs_have_the_same_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert lock_folder() == Path("/tmp/llmperf-locks")


# ------------------------------------------------------------------------------------------------------------ properties


sizes = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@given(sizes, st.integers(1, 8), st.randoms())
def test_groups_suffice_and_are_islands_where_one_is_large_enough(islands, count, random):
    gpus = machine(*islands)
    random.shuffle(gpus)
    groups = choices(gpus, count)
    large = [size for size in islands if size >= count]
    assert all(len(group) >= count for group in groups)
    if large:
        assert [len(group) for group in groups] == sorted(large)
        assert all(other.index in gpu.peers for group in groups for gpu in group for other in group if gpu != other)
    else:
        assert groups == ([tuple(gpus)] if len(gpus) >= count else [])


@settings(max_examples=30, deadline=None)
@given(sizes, st.data())
def test_a_lease_has_the_count_asked_of_the_smallest_sufficient_island(islands, data):
    gpus = machine(*islands)
    count = data.draw(st.integers(1, len(gpus)))
    with tempfile.TemporaryDirectory() as folder, lease(gpus, count, Locks(Path(folder), print), unfit=sound) as got:
        assert len({gpu.uuid for gpu in got}) == count
        large = [size for size in islands if size >= count]
        if large:
            assert len({frozenset({*gpu.peers, gpu.index}) for gpu in got}) == 1
            assert len(got[0].peers) + 1 == min(large)


def test_tp_groups_are_linked_where_the_links_do_not_suffice_for_all(locks):
    # Four pairs, and of the first pair one is taken: TP 2 x PP 2 must not go over the odd one.
    pairs = [Gpu(index, f"GPU-{index}", "H200", 1, peers=(index ^ 1,), links=4) for index in range(8)]
    with lease(pairs[1:2], 1, locks, unfit=sound), lease(pairs, 4, locks, unfit=sound, together=2) as got:
        assert [gpu.index for gpu in got] == [2, 3, 4, 5]
    with lease(pairs, 4, locks, unfit=sound, together=2) as got:
        assert [gpu.index for gpu in got] == [0, 1, 2, 3]


def test_kinds_of_gpus_are_not_mixed_unless_none_has_enough(locks):
    mixed = [Gpu(index, f"GPU-{index}", "L4" if index % 2 else "H200", 1) for index in range(4)]
    with lease(mixed, 2, locks, unfit=sound) as got:
        assert [gpu.index for gpu in got] == [0, 2]
    with lease(mixed, 3, locks, unfit=sound) as got:
        assert len(got) == 3
