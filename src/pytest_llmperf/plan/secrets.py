"""Secrets: by which names they are known, and what stands in their place wherever something is stored or shown.

A secret is one by its name (`--api-key`, `HF_TOKEN`, `?sig=`): nobody has to say so. What only looks like one is hidden too;
that costs a reader a word, and the other way round costs a key.
"""

from __future__ import annotations

import bisect
import functools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from pytest_llmperf.plan.checks import cut, representation

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

HIDDEN = "***"
"""What stands in the place of a secret."""
_LEAST_CHARACTERS = 6
"""Shorter texts are not looked for in foreign words: they would be hit everywhere."""
_LEAST_AT_AN_END = 12
"""Of a cut secret that no dots follow: many a line ends with a shorter word that some secret begins with."""
_ALWAYS = frozenset({
    "secret", "secrets", "password", "passwords", "passwd", "passphrase", "credential", "credentials", "apikey", "apikeys",
    "accesskey", "authorization", "creds",
})  # fmt: skip
"""Words that make a name one of a secret, wherever in it they stand."""
_AT_THE_END = frozenset({"key", "token", "pass", "pwd", "auth", "cookie", "sig", "signature", "bearer", "jwt", "pat"})
"""Words that do so at its end: `--ssl-keyfile` is a path, and `--max-num-batched-tokens` a number."""
_NO_SECRETS = frozenset({"PWD", "OLDPWD"})
"""Variables of every shell that only look like passwords."""
_IN_TWO_WORDS = re.compile(r"(?:(?:api|access|auth|private|secret)_(?:keys?|tokens?)|connection_string)(?:_|$)")
_JOINED = ("token", "password", "secret", "apikey", "authkey", "secretkey", "privatekey", "accesskey")
"""Ends of names whose words are not told apart."""


class Secret(str):
    """A secret as it is sent. No `repr` shows it: a traceback with locals has one of everything."""

    __slots__ = ()

    def __repr__(self) -> str:
        """Return what stands in its place."""
        return repr(HIDDEN)


class Guarded(str):
    """A text that may hold secrets, such as a URL or a command line; its `repr` shows all else."""

    __slots__ = ()

    def __repr__(self) -> str:
        """Return the text with each secret hidden."""
        return repr(shown(self))


@functools.cache
def is_secret(name: str) -> bool:
    """Return whether an argument, a variable, a header or a parameter of this name holds a secret."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)
    plain = [word.lower() for word in words] or [""]
    if name in _NO_SECRETS:
        return False
    ends = plain[-1] in _AT_THE_END or plain[-1].endswith(_JOINED)
    return bool(ends or _ALWAYS.intersection(plain) or _IN_TWO_WORDS.search("_".join(plain)))


_Test = Callable[[str], bool]
_WORD = r"""(?:"(?:[^"\\]|\\.)*"|'[^']*'|[^\s'"]+)+"""
_VALUE = rf"(?:{_WORD}|['\"].*$)"
"""Of an option: a word as shells have them, be its quote closed or not."""
_OPTION = r"(?<![\w-])--?(?P<name>[A-Za-z][\w.-]{0,80})"
_QUOTED = r"(?:(?!(?P=open))(?:\\.|[^\\]))+"
"""What stands up to the quote that has opened it; one behind a backslash does not close it."""
_SCHEME = r"(?:(?:bearer|basic|digest|token)[ \t]+)?"
_HEADER = r"(?P<name>[A-Za-z][\w-]*)"
_JSON_NAME = r"""(?P<quote>["'])(?P<name>[\w.-]+)(?P=quote)\s*:\s*(?P<open>["'])"""
_TO_THE_END = r"""(?:(?<=[ \t])[^'"\n]+|[^\s'"]+)"""
"""Of a header that nobody has quoted: a word, or the whole line where a blank stands behind the colon."""
_PATTERNS = (
    # Names have a longest length, else a text without any takes a time that grows with its square.
    (re.compile(r"(?P<keep>[a-z][a-z0-9+.-]{0,30}://)(?P<secret>[^/\s?#@'\"]+)(?=@)", re.I), None),
    (re.compile(r"(?P<keep>[?&](?P<name>[^?=&#\s'\"]+)=)(?P<secret>[^&#\s'\"]+)"), None),
    (re.compile(rf"(?P<keep>{_OPTION}=)(?P<secret>{_VALUE})"), is_secret),
    (re.compile(rf"(?P<keep>{_OPTION}\s+)(?P<secret>(?!-){_VALUE}(?:\s+(?!-){_WORD})*)"), is_secret),
    (re.compile(rf"(?P<keep>(?<![\w$?&-])(?P<name>[A-Za-z_]\w*)=)(?P<secret>{_WORD})"), is_secret),
    (re.compile(rf"(?P<keep>{_JSON_NAME})(?P<secret>{_QUOTED})", re.S), is_secret),
    (re.compile(r"(?P<keep>\b(?:bearer|basic)\s+)(?P<secret>[\w.~+/=-]{6,})", re.I), None),
    (re.compile(rf"(?P<keep>(?P<open>[\"']){_HEADER}:\s*{_SCHEME})(?P<secret>{_QUOTED})", re.I | re.S), is_secret),
    (re.compile(rf"(?P<keep>(?<![\w/@.$\"'-]){_HEADER}:(?!:)[ \t]*{_SCHEME})(?P<secret>{_TO_THE_END})", re.I), is_secret),
    (re.compile(r"(?P<keep>(?<![\w-])(?:-u|--user)[\s=]+['\"]?[^\s:/'\"]+:)(?P<secret>(?!\d+\b)[^\s'\"]+)"), None),
)
"""Where secrets stand in a text: user info and query of a URL, options, assignments, JSON, headers, curl's user. The name tells
whether it is one; without a test every one is."""


def shown(text: str) -> str:
    """Return a text that people have written, such as a URL or a command line, with each secret in it hidden."""
    return _replaced(text, lambda _: HIDDEN)


def discreet(value: object) -> str:
    """Return a value as an error shows it: short, and with each secret in it hidden."""
    return cut(shown(representation(value)))


def secrets_in(text: str) -> list[str]:
    """Return the secrets in a text that people have written."""
    secrets: list[str] = []

    def note(secret: str) -> str:
        pieces = (word for word in re.findall(r"[^\s'\":]+", secret) if len(word) >= _LEAST_CHARACTERS)
        words = (secret, secret.strip("'\""), re.sub(r"\\(.)", r"\1", secret), *pieces)
        secrets.extend(word for word in words if HIDDEN not in word)
        return HIDDEN

    _replaced(text, note)
    return secrets


_DEEPEST = 20
"""Commands in the values of options in commands: what is deeper is hidden as a whole."""


def _replaced(text: str, hide: Callable[[str], str]) -> str:
    for pattern, names in _PATTERNS:
        text = _substituted(str(text), pattern, names, hide, _DEEPEST)
    return text


def _substituted(text: str, pattern: re.Pattern[str], names: _Test | None, hide: Callable[[str], str], levels: int) -> str:
    def replaced(match: re.Match[str]) -> str:
        secret = match["secret"]
        if levels and names and not names(match["name"]):
            secret = _substituted(secret, pattern, names, hide, levels - 1)  # `sh -c '...'` has a command in its value
        elif secret != HIDDEN:
            secret = hide(secret)
        return match["keep"] + secret

    return pattern.sub(replaced, text)


def shown_value(name: str, value: str) -> str:
    """Return the value of an argument or a variable as it is stored and shown."""
    return HIDDEN if value and is_secret(name) else shown(value)


def guarded(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment whose `repr` shows no secret."""
    return {name: hushed(name, value) for name, value in environment.items()}


def hushed(name: str, value: str) -> str:
    """Return the value of an argument or a variable whose `repr` shows no secret."""
    return Secret(value) if is_secret(name) else Guarded(value)


def secrets_of(environment: Mapping[str, str]) -> list[str]:
    """Return the secrets in an environment."""
    return [*(value for name, value in environment.items() if is_secret(name))]


def without(text: str, secrets: Iterable[str]) -> str:
    """Return foreign text with each of these secrets hidden, in whatever form it was echoed, and the beginning of a cut one."""
    forms, begins = _looked_for(frozenset(secrets))
    if not forms or not begins.search(text):
        return text
    for secret in forms:
        text = _without_beginnings(text.replace(secret, HIDDEN), secret)
    return text


def _without_beginnings(text: str, secret: str) -> str:
    """Return a text with the beginnings of a secret hidden that were cut: dots follow, or the line ends behind a long one."""
    begin, kept, done = secret[:_LEAST_CHARACTERS], [], 0
    place = text.find(begin)
    while place >= 0:
        common = bisect.bisect_left(range(len(secret)), True, key=lambda n: not text.startswith(secret[: n + 1], place))
        length = next(
            (n for n in range(common, max(common - 3, _LEAST_CHARACTERS - 1) - 1, -1) if _is_cut(text, place + n, n)), 0
        )
        if length:
            kept += [text[done:place], HIDDEN]
            done = place + length
        place = text.find(begin, place + max(length, 1))
    return "".join(kept) + text[done:]


def _is_cut(text: str, end: int, length: int) -> bool:
    """Return whether a word of this length that ends there looks like one that was cut."""
    ends_line = length >= _LEAST_AT_AN_END and text[end : end + 1] in ("", "\n")
    return ends_line or text.startswith(("...", "…"), end)


@functools.lru_cache(maxsize=8)
def _looked_for(secrets: frozenset[str]) -> tuple[list[str], re.Pattern[str]]:
    """Return what is looked for in foreign text, the longest first, and what each of it begins with."""
    forms = sorted({form for secret in secrets for form in _forms(secret)}, key=len, reverse=True)
    return forms, re.compile("|".join(sorted({re.escape(form[:_LEAST_CHARACTERS]) for form in forms})))


def _forms(secret: str) -> set[str]:
    """Return a secret as it may stand in a text: as it is, without the scheme before it, quoted for a URL or as a literal."""
    words = {secret.strip(), secret.strip().rpartition(" ")[2]}
    forms = words | {form(word) for word in words for form in (quote, _quoted_fully, unquote)}
    forms |= {repr(word)[1:-1] for word in words} | {word.replace("\\", "\\\\").replace('"', '\\"') for word in words}
    return {form for form in forms if len(form) >= _LEAST_CHARACTERS}


def _quoted_fully(word: str) -> str:
    return quote(word, safe="")
