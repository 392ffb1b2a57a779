"""Files that are read and written: read where they are files of a sane size, written as a whole or not at all, by one at a time.

Whoever writes a file holds the new one, which lies beside it under a fixed name, until that takes the old one's place. So the
new file is the lock too: nothing else is left behind, another host's writer on a shared file system sees it, and what a
process that was killed has left is taken over by the next one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import select
import stat
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LARGEST_BYTES = 64 << 20
"""No file of ours comes near; what is larger is something else, and would only fill the memory."""
_NEW = ".llmperf-new"
_LEFT = re.compile(rf"\..*{re.escape(_NEW)}|\.(?:.*\.json\.|llmperf-)[a-z0-9_]{{8}}")
"""Names of files that are being written, or were when a process was killed; the others are those of version 0.1, and trials."""
_PATIENCE_S = 30.0
"""To write a file takes milliseconds: whoever takes longer is stopped, or was killed on a file system without locks."""
_ATTEMPTS = 100
"""How often a folder or a file may be taken away by others between two calls: each time it was there a moment before."""
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF)
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device"}


def as_shell(path: str) -> str:
    """Return a path with `~` and `~user` replaced as a shell would: an ini file has no shell to do it."""
    try:
        return os.path.expanduser(path)  # noqa: PTH111 - Path's own raises RuntimeError for an unknown user; a shell leaves that alone
    except ValueError:  # a NUL in the name of a user: whoever opens the path refuses it
        return path


def storable(value: Any) -> Any:
    """Return plain data in which bytes of a path that are no text, which no UTF-8 can hold, are written as escapes."""
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {storable(key): storable(item) for key, item in value.items()}
    return [storable(item) for item in value] if isinstance(value, (list, tuple)) else value


def is_there(path: Path) -> bool:
    """Return whether there is anything by a path's name, be it a folder or a link in a circle: reading it says what."""
    try:
        is_link = stat.S_ISLNK(path.lstat().st_mode)
    except (OSError, ValueError):
        return False
    try:
        path.stat()
    except FileNotFoundError:
        return False
    except OSError:
        return is_link
    return True


def is_file(path: Path) -> bool:
    """Return whether a path is that of a file; false where it cannot be one, such as a name that is too long."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def read_file(path: Path, size: int = LARGEST_BYTES) -> bytes:
    """Return what a file holds, or the first `size` bytes of it.

    Raises OSError, for a pipe, a device or more than `LARGEST_BYTES` too, without opening them.
    """
    try:
        _refuse_others(path, path.stat())
        # Somebody may have put a pipe there since: opening it must not wait for a writer.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            _refuse_others(path, os.fstat(file.fileno()))
            return file.read(size)
    except ValueError as error:  # a null byte in the path
        raise OSError(errno.EINVAL, str(error), str(path)) from error


def _refuse_others(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, f"it is {_KINDS.get(stat.S_IFMT(found.st_mode), 'a device')}, and no file", str(path))
    if found.st_size > LARGEST_BYTES:
        raise OSError(errno.EFBIG, f"it has {found.st_size >> 20} MiB, more than {LARGEST_BYTES >> 20}", str(path))


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole or not at all; raises OSError. A link's target is written, a device or a pipe written into."""
    if is_stream(path):
        _write_into(path, text.encode(errors="backslashreplace"))
    else:
        rewrite(path, lambda: text)


def rewrite(path: Path, make: Callable[[], str], *, durable: bool = False) -> None:
    """Write a file as a whole or not at all, with the text that `make` returns while no other process writes it.

    A link's target is written. `durable`: it is on the disk before it takes the old one's place, so that a power
    failure leaves the one or the other. Raises OSError, or what `make` does.
    """
    path = _resolved(path)
    with contextlib.suppress(FileNotFoundError):
        _refuse_others(path, path.stat())
    new = path.with_name(_new_name(path.name))
    with _alone(new) as handle:
        try:
            os.ftruncate(handle, 0)
            rest = memoryview(make().encode(errors="backslashreplace"))
            while rest:
                rest = rest[os.write(handle, rest) :]
            with contextlib.suppress(FileNotFoundError):  # a new one has what the umask leaves
                os.fchmod(handle, stat.S_IMODE(path.stat().st_mode))
            if durable:
                os.fsync(handle)
            new.replace(path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise


def _new_name(name: str) -> str:
    longest = 255 - len(f".{_NEW}")
    return f".{name if len(os.fsencode(name)) <= longest else hashlib.sha256(os.fsencode(name)).hexdigest()}{_NEW}"


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except RuntimeError:  # before Python 3.13
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from None


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[int]:
    """Yield a file to write into that no other process writes; raises OSError. It is ours until it is closed.

    What a process that was killed has left may stand in it. Whoever had it before has given it another name, or removed it,
    before letting go: what waited has then locked a file that is not there any more, and begins anew.
    """
    deadline = time.monotonic() + 2 * _PATIENCE_S
    while True:
        handle, created = _opened(path)
        try:
            if _is_ours(handle, path, created=created):
                yield handle
                return
        finally:
            os.close(handle)
        if time.monotonic() > deadline:
            raise OSError(errno.ETIMEDOUT, f"another process has not finished it for {2 * _PATIENCE_S:.0f} s", str(path))
        time.sleep(0.005)


def _opened(path: Path) -> tuple[int, bool]:
    """Return a file opened for writing, and whether it is new; a link or a pipe by its name is not followed, nor waited for.

    Its folder is made where it is missing, and again where another run that only tried it has taken it away.
    """
    flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    for attempt in range(_ATTEMPTS):
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, flags), False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666), True
        except (FileExistsError, FileNotFoundError):
            if attempt == _ATTEMPTS - 1:
                raise
    raise AssertionError("not reached")


def _is_ours(handle: int, path: Path, *, created: bool) -> bool:
    """Return whether nobody else writes an open file, and it still lies where it was; it is locked then.

    On a file system without locks it is ours when we have made it; one that nobody has touched for long is removed.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        if not created and time.time() - os.fstat(handle).st_mtime > _PATIENCE_S:
            path.unlink(missing_ok=True)
        return created
    try:
        there = path.lstat()
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(handle))


def sweep(folder: Path) -> None:
    """Remove what writers that were killed have left in a folder and below it; what is being written stays."""
    for parent, _, names in os.walk(folder):
        for path in (Path(parent, name) for name in names if _LEFT.fullmatch(name)):
            with contextlib.suppress(OSError):
                _remove_left(path)


def _remove_left(path: Path) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        # Version 0.1 has held no lock, nor does a trial, and may still run.
        unlocked = path.name.endswith(_NEW) or time.time() - os.fstat(handle).st_mtime > 3600
        if unlocked and _is_ours(handle, path, created=False):
            path.unlink()
    finally:
        os.close(handle)


def _write_into(path: Path, data: bytes) -> None:
    """Write into a device or a pipe; raises OSError, too where nobody reads."""
    # What is open as standard output may be a file, to which the output is added.
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        rest, ready = memoryview(data), select.poll()
        ready.register(handle, select.POLLOUT)
        while rest:
            if not ready.poll(_PATIENCE_S * 1000):
                raise OSError(errno.ETIMEDOUT, f"nobody has read from it for {_PATIENCE_S:.0f} s", str(path))
            with contextlib.suppress(BlockingIOError):
                rest = rest[os.write(handle, rest) :]
    finally:
        os.close(handle)


def is_stream(path: Path) -> bool:
    """Return whether a path is a device, a pipe or an open file: what is written there cannot be written anew."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return False
    is_open = re.match(r"/dev/(std|fd/)|/proc/[^/]+/(task/[^/]+/)?fd/", str(path.absolute())) is not None
    return not stat.S_ISDIR(found.st_mode) and (is_open or not stat.S_ISREG(found.st_mode))


def unwritable_file(path: Path) -> str | None:
    """Return why a file cannot be written, None where it can; nothing is left behind, and nothing of the file changed."""
    if is_stream(path):
        return None if os.access(path, os.W_OK) else "permission denied"
    try:
        path = _resolved(path)
        with contextlib.suppress(FileNotFoundError):
            _refuse_others(path, path.stat())
    except (OSError, ValueError) as error:
        return _why(error)
    return unwritable_folder(path.parent)


def unwritable_folder(folder: Path) -> str | None:
    """Return why no file can be written into a folder that is made where it is missing; nothing is left behind.

    It is tried, because permissions alone don't tell: a file system may be read-only, and /proc takes no files from anybody.
    """
    why = None
    for _ in range(_ATTEMPTS):
        try:
            _try_folder(folder)
        except FileNotFoundError as error:  # another run that tries it too has taken it away
            why = _why(error)
        except (OSError, ValueError) as error:
            return _why(error)
        else:
            return None
    return why


def _try_folder(folder: Path) -> None:
    made: list[Path] = []
    try:
        for part in reversed((folder, *folder.parents)):
            if not part.is_dir():
                with contextlib.suppress(FileExistsError):  # made meanwhile, or no folder, which the next call says
                    part.mkdir()
                    made.append(part)
        with tempfile.TemporaryFile(dir=folder, prefix=".llmperf-"):  # without a name, where the system can do that
            pass
    finally:
        for part in reversed(made):
            with contextlib.suppress(OSError):  # somebody else has written into it meanwhile
                part.rmdir()


def _why(error: OSError | ValueError) -> str:
    if not isinstance(error, OSError):
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)
