"""Who may use which GPUs: one GPU has one engine, and an engine that is measured may ask for the whole host.

A lease is an advisory lock on a file (flock), one for each GPU, named by its UUID: whatever CUDA_VISIBLE_DEVICES calls it, and
whoever's process it is, it is the same GPU. The kernel releases a lock when its process ends, however it ends. Who waits for
GPUs holds a lock on the queue meanwhile, so that an engine of four ranks is not overtaken for ever by engines of one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pytest_llmperf.units import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from pytest_llmperf.measure.gpus.device import Gpu

POLL_S = 0.1


_OPENED: set[int] = set()
"""Descriptors of lock files that this process has open."""


def _close_inherited() -> None:
    """Close, in a process that was forked, the locks of the one that it comes from: it would keep them as long as it lives."""
    for descriptor in _OPENED:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _OPENED.clear()


os.register_at_fork(after_in_child=_close_inherited)


def _unlock(descriptor: int) -> None:
    if descriptor in _OPENED:  # else a fork has closed it, and its number may be another file's
        _OPENED.discard(descriptor)
        os.close(descriptor)


class LeaseError(RuntimeError):
    """The GPUs that are asked for can't be had. The message names them, who has them, and the remedy."""


class Locks(NamedTuple):
    """Where the lock files are, and whom to tell that a lock is waited for."""

    folder: Path
    waiting: Callable[[str], None]


def lock_folder() -> Path:
    """Return the folder of this machine's locks, which all its users share."""
    # Not $TMPDIR: job schedulers and users have one of their own each, and would not see each other's locks.
    shared = Path("/tmp")
    return (shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())) / "llmperf-locks"


def _path(folder: Path, name: str) -> Path:
    return folder / f"{re.sub(r'[^0-9A-Za-z.-]', '-', name)}.lock"


def _open(folder: Path, name: str) -> int:
    """Return a descriptor of a lock file that any user of the machine can lock; raises LeaseError where there can be none.

    It is closed by `_unlock`.
    """
    descriptor = _made(folder, _path(folder, name))
    _OPENED.add(descriptor)
    return descriptor


def _made(folder: Path, path: Path) -> int:
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            folder.chmod(0o1777)
        _check_folder(folder)
        while True:
            # Without O_CREAT: in a folder that all may write to, Linux forbids it for a file that another user has made.
            with contextlib.suppress(FileNotFoundError):
                return _plain_file(path)
            with contextlib.suppress(FileExistsError):  # another process was quicker
                descriptor = os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, 0o666)
                os.fchmod(descriptor, 0o666)  # whatever the umask says
                return descriptor
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _no_plain_file(path) from None
        raise LeaseError(
            f"{path}, the lock that keeps two engines apart, cannot be opened ({error.strerror}). All users of this machine need"
            f" access: give {folder} mode 1777."
        ) from error


# A link would have files elsewhere locked and made, and a pipe would be waited for. Nothing is ever written into a lock file.
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def _plain_file(path: Path) -> int:
    """Return a descriptor of a lock file that is there; raises LeaseError where something else has its name."""
    descriptor = os.open(path, _FLAGS)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _no_plain_file(path)
    return descriptor


def _no_plain_file(path: Path) -> LeaseError:
    return LeaseError(f"{path}, the lock that keeps two engines apart, is no plain file: somebody has put it there. Remove it.")


def _check_folder(folder: Path) -> None:
    """Raise LeaseError where the folder is a link, or that of a user who lets others replace the files in it.

    One that is open to all without the sticky bit, as Kubernetes mounts them, gets it where that is allowed.
    """
    try:
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENOTDIR):
            raise
        what = "a link" if folder.is_symlink() else "no folder"
        raise LeaseError(f"{folder}, the folder of the locks that keep engines apart, is {what}. Remove it.") from None
    try:
        status = os.fstat(opened)
        if not status.st_mode & stat.S_IWOTH or status.st_mode & stat.S_ISVTX:
            return
        with contextlib.suppress(OSError):
            os.fchmod(opened, 0o1777)
        if status.st_uid not in (0, os.geteuid()):
            raise LeaseError(
                f"{folder}, the folder of the locks that keep engines apart, lets users replace each other's files."
                " Give it mode 1777."
            )
    finally:
        os.close(opened)


@contextlib.contextmanager
def _locked(locks: Locks, name: str, mode: int, what: str) -> Iterator[None]:
    descriptor = _open(locks.folder, name)
    try:
        while True:
            try:
                fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
            except BlockingIOError:
                locks.waiting(what + _holder(descriptor))
                fcntl.flock(descriptor, mode)
            if _is_current(descriptor, locks.folder, name):
                break
            _unlock(descriptor)
            descriptor = _open(locks.folder, name)
        yield
    finally:
        _unlock(descriptor)


def _is_current(descriptor: int, folder: Path, name: str) -> bool:
    """Return whether a lock file is still the one that others find; then it is made young again.

    What cleans up /tmp removes files that are old, and whoever had locked one would have locked nothing.
    """
    with contextlib.suppress(PermissionError):
        os.utime(descriptor)
    try:
        return os.path.samestat(os.fstat(descriptor), _path(folder, name).stat())
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    """Return who holds a lock, in words, as far as the kernel tells."""
    inode = os.fstat(descriptor).st_ino
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if "->" not in words and words[5].rpartition(":")[2] == str(inode) and words[4] != "-1":
                return f" (process {words[4]} has it)"
    return ""


@contextlib.contextmanager
def host_turn(locks: Locks, *, alone: bool) -> Iterator[None]:
    """Keep the host to this engine, or `alone=False` to those that don't mind neighbours.

    Neighbours disturb: two engines on one CPU, or one that allocates memory while another profiles its own.
    """
    mode = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
    with contextlib.ExitStack() as stack:
        # One at a time waits for the host: the kernel would let in all who share it before one who wants it alone.
        with _locked(locks, "turn", fcntl.LOCK_EX, "waiting behind another run for this host"):
            stack.enter_context(_locked(locks, "host", mode, "waiting for another run's engine to end"))
        yield


@contextlib.contextmanager
def lease(
    gpus: Sequence[Gpu],
    count: int,
    locks: Locks,
    *,
    unfit: Callable[[Sequence[Gpu]], dict[str, str]],
    together: int = 1,
    patience_s: float = 60.0,
    remedy: str = "End what uses it.",
) -> Iterator[tuple[Gpu, ...]]:
    """Take `count` of these GPUs, all at once, and wait until they are free; they are linked directly where any are.

    They come in the order of the engine's ranks: each `together` of them, a TP group, are linked where the links don't suffice
    for all.

    `unfit` says, of GPUs that nobody has leased, which can't be used all the same and why, by UUID (a foreign process, memory
    that did not come back). Leased GPUs are waited for without limit; where they would not suffice either, unfit ones for
    `patience_s`; then LeaseError.
    """
    if len(gpus) < count:
        raise LeaseError(f"{counted(count, 'GPU')} {'is' if count == 1 else 'are'} needed, and this run may use {len(gpus)}.")
    with contextlib.ExitStack() as stack:
        with _locked(locks, "queue", fcntl.LOCK_EX, "waiting behind another engine for GPUs"):
            taken = _wait(gpus, (count, together), locks, unfit, patience_s, remedy)
            for descriptor in taken.values():
                stack.callback(_unlock, descriptor)
        by_name = {gpu.uuid: gpu for gpu in gpus}
        yield tuple(by_name[uuid] for uuid in taken)


def choices(gpus: Sequence[Gpu], count: int) -> list[tuple[Gpu, ...]]:
    """Return the groups of GPUs, each of `count` or more, of which an engine may have any `count`; the best group first.

    Kinds of GPUs are not mixed unless none has enough. Where some of one kind are linked directly, all to all, only such groups
    are in the list: across islands an engine would have other figures. Of islands the smallest that suffices comes first, so
    that large ones stay whole.
    """
    # Groups, and not every set of `count`: of a machine with 64 cores those of 32 could not be counted through.
    fitting = sorted((island for island in _all_linked(gpus) if len(island) >= count), key=len)
    alike = [tuple(gpu for gpu in gpus if gpu.name == name) for name in dict.fromkeys(gpu.name for gpu in gpus)]
    return fitting or [group for group in alike if len(group) >= count] or [tuple(gpus)] * (len(gpus) >= count)


def _choose(groups: Sequence[tuple[Gpu, ...]], number: tuple[int, int], usable: Collection[str]) -> tuple[Gpu, ...] | None:
    """Return `count` GPUs of one group whose UUIDs are usable, None where no group has so many; linked ones follow each other."""
    count, together = number
    for group in groups:
        usable_gpus = [gpu for gpu in group if gpu.uuid in usable]
        if len(usable_gpus) >= count:
            linked = [gpu for group in _all_linked(usable_gpus) for gpu in group[: len(group) // together * together]]
            return tuple([*linked, *(gpu for gpu in usable_gpus if gpu not in linked)][:count])
    return None


def _all_linked(gpus: Sequence[Gpu]) -> list[tuple[Gpu, ...]]:
    """Return the GPUs in groups of one kind that are linked all to all; one without links is a group of its own."""
    islands: list[list[Gpu]] = []
    for gpu in gpus:
        alike = (island for island in islands if island[0].name == gpu.name)
        home = next((island for island in alike if all(other.index in gpu.peers for other in island)), None)
        if home is None:
            islands.append([gpu])
        else:
            home.append(gpu)
    return [tuple(island) for island in islands]


def _wait(
    gpus: Sequence[Gpu],
    number: tuple[int, int],
    locks: Locks,
    unfit: Callable[[Sequence[Gpu]], dict[str, str]],
    patience_s: float,
    remedy: str,
) -> dict[str, int]:
    """Return a locked descriptor for each of so many GPUs, in the order of the ranks."""
    groups, everything = choices(gpus, number[0]), {gpu.uuid for gpu in gpus}
    said, since_s = "", time.monotonic()
    while True:
        free = _free(gpus, locks.folder)
        try:
            wrong = unfit([gpu for gpu in gpus if gpu.uuid in free])
            chosen = _choose(groups, number, free.keys() - wrong.keys())
            if chosen is not None:
                return {gpu.uuid: free.pop(gpu.uuid) for gpu in chosen}
        finally:
            for descriptor in free.values():
                _unlock(descriptor)
        reasons = "; ".join(wrong.values())
        # Will leases that end suffice? Then what is wrong with the others need not pass.
        leased = _choose(groups, number, everything - wrong.keys()) is not None
        if leased:
            since_s = time.monotonic()
        elif time.monotonic() - since_s > patience_s:
            raise LeaseError(f"{reasons}. Waited {patience_s:g} s. {remedy}")
        said = _tell_once(locks, said, "waiting for GPUs that other engines have" if leased else f"waiting: {reasons}")
        time.sleep(POLL_S)  # a poll: the kernel tells nobody that one of several locks is free


def _tell_once(locks: Locks, said: str, now: str) -> str:
    if now != said:
        locks.waiting(now)
    return now


def _free(gpus: Collection[Gpu], folder: Path) -> dict[str, int]:
    """Return locked descriptors of all GPUs that nobody has, by UUID."""
    free = {}
    with contextlib.ExitStack() as stack:  # where the next file cannot be had, these must not stay locked
        for gpu in gpus:
            with contextlib.ExitStack() as its_own:
                descriptor = _open(folder, gpu.uuid)
                its_own.callback(_unlock, descriptor)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                if _is_current(descriptor, folder, gpu.uuid):  # else the next look finds the new file
                    free[gpu.uuid] = descriptor
                    stack.push(its_own.pop_all())
        stack.pop_all()
    return free
