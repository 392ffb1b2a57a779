"""What is stored and compared of a workload: plain data, and a fingerprint of it that knows files by digest, never by name."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import fields, is_dataclass
from typing import Any

from pytest_llmperf.plan.files import File
from pytest_llmperf.plan.lengths import Lengths, Pairs

_OF_FILES = frozenset({"trace", "dataset", "pairs", "prompt_tokens", "output_tokens"})
"""Fields, of a workload, of its classes and of its warm-up, that may name a file."""
_NOT_SENT = frozenset({"tolerated_failures"})
"""Fields of a workload that change nothing of what is sent."""
_NAMED = re.compile(r"(file\()?.* (\([0-9a-f]{12}\))(\)?)", re.DOTALL)
"""A file with its digest, as it is shown: `name (digest)` or `file(name (digest))`."""


def plain(value: Any) -> Any:
    """Return a value of a workload as plain data, which JSON can hold."""
    if isinstance(value, (File, Lengths)):
        return str(value)
    if isinstance(value, Pairs):
        return f"file({value.file})" if value.file else [list(row) for row in value.rows]
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return "inf" if value == math.inf else value


def fingerprint_of(description: dict[str, Any]) -> str:
    """Return 16 hex digits of a description that differ whenever what is sent differs, and not where a file is renamed."""
    return _digest(_without_names({name: value for name, value in description.items() if name not in _NOT_SENT}))


def is_of(fingerprint: str, description: dict[str, Any]) -> bool:
    """Return whether a fingerprint is that of this description, now or as it was when it held the names of files."""
    return fingerprint in (fingerprint_of(description), _digest(description))


def _digest(data: object) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def _without_names(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _without_names(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_names(item) for item in value]
    if name in _OF_FILES and isinstance(value, str) and (match := _NAMED.fullmatch(value)):
        return f"{match[1] or ''}{match[2]}{match[3]}"
    return value
