"""What fuzz targets share: a folder for the files that they read, and what must hold of an error."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
_scratch: list[Path] = []


def use_folder(path: Path) -> None:
    """Have files that are read put into this folder."""
    _scratch[:] = [path]


def folder() -> Path:
    """Return that folder."""
    return _scratch[0]


def file_with(data: bytes, name: str) -> Path:
    """Return a file there that holds these bytes."""
    path = folder() / name
    path.write_bytes(data)
    return path


def names(error: Exception, culprit: str) -> None:
    """Demand that an error has words, and that they name the culprit."""
    assert str(error), "an error without a word"
    assert culprit in str(error), error


def is_short(words: str, most: int) -> None:
    """Demand that a text can be read by people."""
    assert len(words) <= most
