"""The engine: everything that decides how it is started, and engine arguments as users write them."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pytest_llmperf.plan.axes import DEFAULT_MODEL, short_model
from pytest_llmperf.plan.checks import PlanError, brief, cut, degree
from pytest_llmperf.plan.command import check_command
from pytest_llmperf.plan.kinds import kind_of
from pytest_llmperf.plan.secrets import HIDDEN, Guarded, discreet, hushed, is_secret, secrets_in, shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pytest_llmperf.plan.axes import Axes

EngineArgs = tuple[tuple[str, tuple[str, ...]], ...]
"""Engine arguments as (name without dashes, values), sorted by name. A flag has no values."""
_Spelling = Callable[[str], str]
_RESERVED = {
    "model": "--llmperf-model",
    "tensor-parallel-size": "--llmperf-tp",
    "tp": "--llmperf-tp",
    "pipeline-parallel-size": "--llmperf-pp",
    "pp": "--llmperf-pp",
    "data-parallel-size": "--llmperf-dp",
    "dp": "--llmperf-dp",
    "host": "--llmperf-url",
    "port": "--llmperf-url",
    "served-model-name": "--llmperf-model",
}
_LONGEST_WORD = 131_072
"""Linux takes no longer word on a command line (MAX_ARG_STRLEN)."""
_PLACES = ("host", "port")
"""What is the plugin's to say even where the command line is the user's."""


def parse_engine_args(source: str | dict[str, Any] | Sequence[str], *, origin: str, verbatim: bool = False) -> EngineArgs:
    """Return engine arguments from a command-line string, a list of its words, or a mapping.

    In a mapping True is a flag, False its `--no-` form, None leaves the argument out, a list repeats values, and a dict is
    passed as JSON. `origin` names the option or fixture in the PlanError for anything that is not an argument, or that the
    plugin sets itself. `verbatim` keeps the spelling of names: vLLM takes `_` for `-`, others don't.
    """
    if not isinstance(source, (str, dict, list, tuple)):
        raise PlanError(f"{origin}={discreet(source)}: must be a text, a list of words or a dict")
    if isinstance(source, str):
        try:
            source = shlex.split(source)
        except ValueError as error:
            raise PlanError(f"{origin}={discreet(source)}: {error}; quote it as on a shell command line") from None
    spelled = _verbatim if verbatim else _spelled
    pairs = _from_mapping(source, origin, spelled) if isinstance(source, dict) else _from_words(list(source), origin, spelled)
    arguments: dict[str, tuple[str, ...]] = {}
    for name, values in pairs:
        if name in (_PLACES if verbatim else _RESERVED):
            instead = f"{{{name}}} in --llmperf-command" if verbatim else _RESERVED[name]
            raise PlanError(f"{origin}: --{name} is set by the plugin; use {instead} instead")
        arguments.pop(name[3:] if name.startswith("no-") else f"no-{name}", None)
        arguments[name] = tuple(hushed(name, value) for value in values)
    return tuple(sorted(arguments.items()))


def _from_mapping(source: dict[str, Any], origin: str, spelled: _Spelling) -> Iterable[tuple[str, tuple[str, ...]]]:
    for key, value in source.items():
        if not isinstance(key, str):
            raise PlanError(f"{origin}: {brief(key)} is not the name of an engine argument")
        name = spelled(key)
        if value is None:
            continue
        if isinstance(value, bool):
            yield (name if value else f"no-{name}"), ()
        elif isinstance(value, dict):
            yield name, (_json(name, value, origin),)
        elif isinstance(value, (list, tuple)):
            yield name, tuple(_word(name, item, origin) for item in value)
        else:
            yield name, (_word(name, value, origin),)


def _json(name: str, value: object, origin: str) -> str:
    try:
        return json.dumps(value, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise PlanError(f"{origin}: {_pair(name, value)}: cannot be written as JSON ({cut(str(error))})") from None


def _word(name: str, value: object, origin: str) -> str:
    """Return a value as a word of a command line; raises PlanError."""
    try:
        text = str(value)
    except Exception as error:  # of an object of the test's own, or an integer of 5,000 digits
        why = f"cannot be written ({type(error).__name__})"
    else:
        if len(text) <= _LONGEST_WORD and "\0" not in text:
            return text
        why = "is no word of a command line"
    raise PlanError(f"{origin}: {_pair(name, value)}: {why}; give a text or a number") from None


def _pair(name: str, value: object) -> str:
    """Return an argument as an error shows it."""
    return f"{cut(name)}={HIDDEN if is_secret(name) else discreet(value)}"


def _spelled(name: str) -> str:
    """Return a name as vLLM knows it: only what stands before the first dot has its underscores replaced."""
    if re.fullmatch(r"-[A-Za-z]\w+", name) and name.lstrip("-") not in _RESERVED:
        return name  # a short option of several letters keeps its one dash
    head, dot, field_name = name.lstrip("-").partition(".")
    return head.replace("_", "-") + dot + field_name


def _verbatim(name: str) -> str:
    """Return a name as it was written, without the dashes that `command_line` puts back."""
    return name if re.fullmatch(r"-[A-Za-z]\w.*", name) else name.lstrip("-")


def _from_words(words: Sequence[str], origin: str, spelled: _Spelling) -> Iterable[tuple[str, tuple[str, ...]]]:
    name, values = "", list[str]()
    for word in words:
        if not isinstance(word, str):
            raise PlanError(f"{origin}: {discreet(word)} is not an engine argument; write it as text")
        if re.match(r"--?[A-Za-z]", word):
            if name:
                yield name, tuple(values)
            name, equals, first = word.partition("=")
            name = spelled(name)
            values = [first] if equals else []
        elif not name:
            raise PlanError(
                f"{origin}: {discreet(word)} is not an engine argument; arguments begin with --, e.g. --max-num-seqs 64"
            )
        else:
            values.append(word)
    if name:
        yield name, tuple(values)


def merge_engine_args(*layers: EngineArgs) -> EngineArgs:
    """Return the layers as one; a later layer wins, and `--no-x` replaces `--x`."""
    merged: dict[str, tuple[str, ...]] = {}
    for name, values in itertools.chain.from_iterable(layers):
        merged.pop(name[3:] if name.startswith("no-") else f"no-{name}", None)
        merged[name] = values
    return tuple(sorted(merged.items()))


def command_line(args: EngineArgs) -> list[str]:
    """Return engine arguments as the words of a command line."""
    return [
        word
        for name, values in args
        for word in (name if name.startswith("-") else f"{'-' if len(name) == 1 else '--'}{name}", *values)
    ]


def shown_args(args: EngineArgs) -> str:
    """Return engine arguments as one text that may be stored and shown: of a secret only that it is set."""
    # Of several keys one is told: how many they are is nobody's business either.
    safe = ((name, (HIDDEN,) if values and is_secret(name) else tuple(map(shown, values))) for name, values in args)
    return shlex.join(command_line(tuple(safe)))


@dataclass(frozen=True)
class EngineSpec:
    """Everything that decides how an engine is started; equal specs can share one running engine."""

    model: str = DEFAULT_MODEL
    """A bundled model's name, a folder, or a name that the engine resolves itself."""
    tp: int = 1
    pp: int = 1
    dp: int = 1
    kind: str = "server"
    """One of `kinds.KINDS`."""
    args: EngineArgs = ()
    env: tuple[tuple[str, str], ...] = ()
    python: str = ""
    """The interpreter that has vLLM; empty for engines that need none."""
    url: str = ""
    """The endpoint of an engine that is not started, else empty."""
    command: str = ""
    """The command line of an engine that is started by one, with placeholders (`command.PLACEHOLDERS`), else empty."""

    def __post_init__(self) -> None:
        """Raise PlanError where a field is unusable; keep secrets out of `repr`."""
        for name in ("tp", "pp", "dp"):
            object.__setattr__(self, name, degree(name, getattr(self, name)))
        if not kind_of(self.kind).starts:
            check_url(self.url, origin="url")
        if kind_of(self.kind).commanded:
            check_command(self.command, origin="command")
        quiet = {
            "args": tuple((name, tuple(hushed(name, value) for value in values)) for name, values in self.args),
            "env": tuple((name, hushed(name, value)) for name, value in self.env),
            "url": Guarded(self.url),
            "command": Guarded(self.command),
        }
        for name, value in quiet.items():
            object.__setattr__(self, name, value)

    @property
    def ranks(self) -> int:
        """Return the number of devices that the engine occupies: TP x PP x DP."""
        return self.tp * self.pp * self.dp

    @property
    def secrets(self) -> tuple[str, ...]:
        """Return everything in it that must stand nowhere: values of arguments and variables, parts of URL and command."""
        named = [(name, value) for name, values in self.args for value in values] + list(self.env)
        of_values = (value for name, value in named if is_secret(name))
        return (*of_values, *(each for _, value in named for each in secrets_in(value)), *secrets_in(self.url),
                *secrets_in(self.command))  # fmt: skip

    @property
    def short_model(self) -> str:
        """Return the model's last path part, as used in test ids."""
        return short_model(self.model)


def check_url(url: str, *, origin: str) -> Guarded:
    """Return an OpenAI-compatible endpoint's root: without a trailing `/`, without `/v1` and what may follow it, with its query.

    Raises PlanError for what is no URL, and for one that holds a user or a password: it would stand in reports.
    """
    text = shown(re.sub(r"//[^/?#]*@", "//...@", url))
    wrong = "not a URL of an OpenAI-compatible server"
    try:
        parts = urlsplit(url)
        usable = (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and not re.search(r"\s", url)
            and (parts.port is None or parts.port > 0)
        )
    except ValueError:
        usable = False
    if not usable:
        raise PlanError(f"{origin}={brief(text)}: {wrong}; write http://HOST:PORT")
    if "@" in parts.netloc:
        raise PlanError(
            f"{origin}={brief(text)}: {wrong} that can be stored, because it holds a user or a password; leave them out, and"
            " give them as a header from the environment, e.g. --llmperf-header='Authorization: Basic $CREDENTIALS'"
        )
    path = parts.path.rstrip("/")
    for end in ("/chat/completions", "/completions", "/v1"):
        path = path.removesuffix(end).rstrip("/")
    return Guarded(parts._replace(path=path, fragment="").geturl())


def url_name(url: str) -> str:
    """Return what an endpoint is called that has no name: its host, port and path, fit for test ids and file names."""
    return url.partition("?")[0].partition("//")[2].replace(":", "_").replace("/", "_")


def engine_spec(base: EngineSpec, axes: Axes, *layers: EngineArgs) -> EngineSpec:
    """Return the spec for a point of the grid: `base` with the point's model and degrees, and the argument layers merged."""
    args = merge_engine_args(base.args, *layers)
    return replace(base, model=axes.model, tp=axes.tp, pp=axes.pp, dp=axes.dp, args=args)
