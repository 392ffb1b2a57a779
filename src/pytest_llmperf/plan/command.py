"""The command line that starts an engine of the kind `command`: a template with the names of what the plugin decides."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING

from pytest_llmperf.plan.checks import PlanError
from pytest_llmperf.plan.secrets import Guarded, shown

if TYPE_CHECKING:
    from collections.abc import Mapping

PLACEHOLDERS = {
    "model": "the model, a bundled one as its folder",
    "port": "where it must listen",
    "host": "the address there, 127.0.0.1",
    "tp": "the tensor-parallel degree",
    "pp": "the pipeline-parallel degree",
    "dp": "the data-parallel degree",
    "python": "the interpreter of --llmperf-python",
    "gpus": "the indices of its GPUs by comma, empty without",
}
"""What stands in braces in a command, and what it becomes."""
_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_EXAMPLE = "e.g. 'llama-server -m {model} --port {port}'"


def check_command(text: str, *, origin: str) -> Guarded:
    """Return the template of a command, checked; `origin` names the option in the PlanError where it cannot start an engine."""
    if not isinstance(text, str) or not text.strip():
        raise PlanError(f"{origin}={text!r}: must be a command line, {_EXAMPLE}")
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise PlanError(f"{origin}={shown(text)!r}: {error}; quote it as on a shell command line") from None
    names = {match[1] for word in words for match in _BRACES.finditer(word) if match[0] not in ("{{", "}}")}
    if unknown := sorted(repr("{" + name + "}") if name is not None else "a brace alone" for name in names - set(PLACEHOLDERS)):
        known = ", ".join("{" + name + "}" for name in PLACEHOLDERS)
        raise PlanError(
            f"{origin}={shown(text)!r}: {unknown[0]} is no placeholder; known are {known}; write {{{{ and }}}} for braces"
        )
    if "port" not in names:
        raise PlanError(
            f"{origin}={shown(text)!r}: {{port}} is missing: the plugin chooses the port that it must listen on, {_EXAMPLE}"
        )
    return Guarded(text)


def command_words(text: str, values: Mapping[str, str]) -> list[str]:
    """Return the words of a checked command. What a value holds, blanks and braces too, stays within its word."""

    def filled(match: re.Match[str]) -> str:
        return {"{{": "{", "}}": "}"}.get(match[0]) or values[match[1]]

    return [_BRACES.sub(filled, word) for word in shlex.split(text)]
