"""Files that are written: as a whole or not at all, and whether they can be, before hours are spent on what goes into them."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path

_MODE = 0o644
"""Of a new file: mkstemp's 0600 would follow it into version control's eyes."""


def as_shell(path: str) -> str:
    """Return a path with `~` and `~user` replaced as a shell would: an ini file has no shell to do it."""
    return os.path.expanduser(path)  # noqa: PTH111 - Path's own raises RuntimeError for an unknown user; a shell leaves that alone


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole or not at all; raises OSError. A link's target is written, a device or a pipe written into."""
    path = path.resolve()
    if not _is_regular(path):
        path.write_text(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else _MODE
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        Path(temporary).chmod(mode)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def is_stream(path: Path) -> bool:
    """Return whether a path is a device or a pipe: what is written there cannot be written anew."""
    return not _is_regular(path) and not path.is_dir()


def _is_regular(path: Path) -> bool:
    return path.is_file() or not path.exists()


def unwritable_file(path: Path) -> str | None:
    """Return why a file cannot be written, None where it can; nothing is left behind, and nothing of the file changed."""
    if path.is_dir():
        return "it is a folder"
    if is_stream(path):
        return None if os.access(path, os.W_OK) else "permission denied"
    return unwritable_folder(path.resolve().parent)


def unwritable_folder(folder: Path) -> str | None:
    """Return why no file can be written into a folder that is made where it is missing; nothing is left behind.

    It is tried, because permissions alone don't tell: a file system may be read-only, and /proc takes no files from anybody.
    """
    made: list[Path] = []
    try:
        for part in reversed((folder, *folder.parents)):
            if not part.is_dir():
                part.mkdir()
                made.append(part)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".llmperf-"):
            return None
    except OSError as error:
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    finally:
        for part in reversed(made):
            with contextlib.suppress(OSError):  # somebody else has written into it meanwhile
                part.rmdir()
