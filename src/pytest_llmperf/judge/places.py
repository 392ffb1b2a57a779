"""Where baselines lie: a readable path for each case, of its own on every file system, and which case a path is of."""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_llmperf.files import is_file, is_there

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_LONGEST_NAME = 150


def path_for(folder: Path, host: str, case_id: str, kind: str = "") -> Path:
    """Return the file of a case: `<folder>/<host>/<test file without .py>/<test name and parameters>.json`.

    A kind of engine that is not the test's own, `kind`, stands behind the parameters. Characters that file systems or shells
    dislike become `-`; where that could make two ids alike, a short hash of the id keeps them apart.
    """
    return _paths(folder, host, case_id, kind)[0]


def place(folder: Path, host: str, case_id: str, kind: str = "") -> Path:
    """Return where the baseline of a case is, or would be.

    That is its own path, but where a file system folds upper and lower case, and the file of another case lies there: then a
    short hash keeps them apart. A file with that hash is read on any file system, for somebody may have recorded it on such.
    """
    path, apart = _paths(folder, host, case_id, kind)
    if path == apart:
        return path
    if is_there(path):
        return apart if _is_spelled_otherwise(path, folder) else path
    return apart if is_there(apart) or _is_spelled_otherwise(path.parent, folder) else path


def _paths(folder: Path, host: str, case_id: str, kind: str) -> tuple[Path, Path]:
    """Return the path of a case, and the one with a hash; they are the same where its name alone is not enough."""
    case_id += f"#{kind}" if kind else ""
    parts, name = _named(case_id)
    below = folder.joinpath(host, *parts)
    apart = below / f"{name}-{hashlib.sha256(case_id.encode(errors='surrogatepass')).hexdigest()[:8]}.json"
    return (below / f"{name}.json" if _is_plain(case_id) else apart), apart


def _named(case_id: str) -> tuple[list[str], str]:
    """Return the folders of a case below its host's, and the readable part of its file's name."""
    file, name = _split(case_id)
    stem = Path(file).with_suffix("") if Path(file).name else Path()
    return [_safe(part) for part in stem.parts if part not in ("/", "..")], _safe(name)[:_LONGEST_NAME]


def _split(case_id: str) -> tuple[str, str]:
    """Return the file of a case, and its test and parameters as a name."""
    file, _, rest = case_id.partition("::")
    return file, rest.replace("::", ".").replace("[", "-", 1).removesuffix("]") or "case"


def _safe(name: str) -> str:
    return re.sub(r"[^\w.+=-]", "-", name, flags=re.ASCII)


def _is_plain(case_id: str) -> bool:
    """Return whether no other id can have the same readable path."""
    file, name = _split(case_id)
    pattern = r"(?:[\w.+=-]+/)*[\w+=-]+\.py::(?:\w+::)?\w+(?:\[[\w.+=-]+\])?"
    return bool(re.fullmatch(pattern, case_id, re.ASCII)) and len(name) <= _LONGEST_NAME and ".." not in file.split("/")


def _is_spelled_otherwise(path: Path, folder: Path) -> bool:
    """Return whether what lies at a path, or a folder on the way from `folder` to it, has a name of other upper or lower case."""
    parent, below = os.path.split(os.path.relpath(path, folder))
    swapped = (os.path.join(parent, below.swapcase()), os.path.join(parent.swapcase(), below))  # noqa: PTH118 - asked very often
    if not any(os.path.lexists(os.path.join(folder, name)) for name in swapped):  # noqa: PTH118
        return False  # no file system that folds
    ways = (part for part in (path, *path.parents) if part.is_relative_to(folder) and part != folder)
    return any(part not in part.parent.iterdir() for part in ways if is_there(part))


def is_place_of(path: Path, test: str) -> bool:
    """Return whether a path below the host's folder is that of a test with some parameters."""
    parts, name = _named(test)
    return path.parts[:-1] == tuple(parts) and (path.stem == name or path.stem.startswith(f"{name}-"))


def named_tests(tests: Iterable[str]) -> dict[tuple[str, ...], set[str]]:
    """Return the names that files of these tests begin with, by their folders below the host's."""
    named: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for parts, name in map(_named, tests):
        named[tuple(parts)].add(name)
    return dict(named)


def may_be_used(path: Path, rootpath: Path, named: Mapping[tuple[str, ...], set[str]]) -> bool:
    """Return whether a path is that of a test that was collected, or names a test file of which none was.

    `named` are the tests that were collected, as `named_tests` returns them.
    """
    names = named.get(path.parts[:-1])
    if names is not None:
        beginnings = (path.stem[: dash.start()] for dash in re.finditer("-", path.stem))
        return path.stem in names or any(name in names for name in beginnings)
    return is_file((rootpath / path.parent).with_name(f"{path.parent.name}.py"))
