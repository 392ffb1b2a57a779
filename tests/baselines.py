"""Baselines that tests make by changing a recorded one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pytest_llmperf.judge import baseline as store

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a file as if it had been recorded so: with the checksum of what it then holds."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data | {"checksum": store.checksum(json.dumps(data))}))


def as_version_2(path: Path, change: Callable[[dict[str, Any]], object] = lambda _: None) -> None:
    """Make a file what version 2 of the format was, which had neither checksum nor what is lacking, and change it."""
    data = json.loads(path.read_text()) | {"version": 2}
    del data["checksum"], data["lacking"]
    change(data)
    path.write_text(json.dumps(data))
