"""Headers that every request to an endpoint must have, as users write them. Their values come from the environment, by name."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pytest_llmperf.plan.checks import PlanError
from pytest_llmperf.plan.secrets import Secret

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Headers = tuple[tuple[str, str], ...]
"""(name, value), in the order in which they were given. Nothing stores or shows a value."""
_NAME = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110, section 5.1: a token
_OURS = frozenset({"content-length", "transfer-encoding", "connection"})
_FORMS = "write NAME=VARIABLE, with the environment variable that holds the value, or 'NAME: text with $VARIABLE'"


def parse_headers(words: Iterable[str], environment: Mapping[str, str], *, origin: str) -> Headers:
    """Return headers from words such as `X-Token=GATEWAY_TOKEN` or `Authorization: Basic $CREDENTIALS`.

    Raises PlanError that names the option `origin`, the header and the remedy, and never a value.
    """
    headers: dict[str, tuple[str, str]] = {}
    for word in filter(None, (word.strip() for word in words)):
        form = re.fullmatch(rf"({_NAME})\s*(=|:)\s*(.*)", word, re.S)
        if not form:
            raise PlanError(f"{origin}={word.partition(':')[0].partition('=')[0]!r}...: not a header; {_FORMS}")
        name, sign, text = form.groups()
        where = f"{origin}: {name}"
        if name.lower() in _OURS:
            raise PlanError(f"{where}: is set by the plugin; leave it out")
        value = _variable(text.strip(), environment, where) if sign == "=" else _expanded(text.strip(), environment, where)
        if not re.fullmatch(r"[\t\x20-\x7e\x80-\xff]+", value):
            raise PlanError(f"{where}: its value is empty, or holds characters that no header may have, such as an end of line")
        headers[name.lower()] = (name, Secret(value))
    return tuple(headers.values())


def _variable(name: str, environment: Mapping[str, str], where: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise PlanError(f"{where}=...: what stands behind = must be the name of an environment variable; {_FORMS}")
    if name not in environment:
        raise PlanError(f"{where}={name}: the environment has no variable {name}; set it to the header's value")
    return environment[name].strip()


def _expanded(text: str, environment: Mapping[str, str], where: str) -> str:
    def value(match: re.Match[str]) -> str:
        return _variable(match[1] or match[2], environment, where)

    return re.sub(r"\$(?:(\w+)|\{(\w+)\})", value, text)
