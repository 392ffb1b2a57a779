"""The options, each declared once, with its ini twin; and the settings that they resolve to.

Command line wins over ini file wins over default. Nothing outside this module asks pytest for an option.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

# flag, default (None: none; False: a switch), help
OPTIONS: tuple[tuple[str, str | bool | None, str], ...] = (
    (
        "--llmperf-model",
        None,
        "model(s): a bundled one, a folder, or a name the engine resolves; default: tiny, bundled",
    ),
    (
        "--llmperf-tp",
        None,
        "tensor-parallel degree(s), by comma; selects the cases that run (default: 1 where unmarked)",
    ),
    ("--llmperf-pp", None, "pipeline-parallel degree(s), by comma (default: 1 where unmarked)"),
    ("--llmperf-dp", None, "data-parallel degree(s), by comma (default: 1 where unmarked)"),
    ("--llmperf-concurrency", None, "requests in flight, by comma (default: 8 where unmarked)"),
    ("--llmperf-engine", None, "server (vLLM's OpenAI server as a child), url, or simulated (no model at all)"),
    (
        "--llmperf-url",
        None,
        "existing OpenAI-compatible endpoint(s): URL or name=URL, by comma; key in LLMPERF_API_KEY",
    ),
    ("--llmperf-python", None, "interpreter that has vLLM (default: the one that runs pytest)"),
    ("--llmperf-engine-args", None, "engine arguments as on vLLM's command line, e.g. '--max-num-seqs 64'"),
    ("--llmperf-startup-timeout", "600", "seconds for an engine to give its first token"),
    ("--llmperf-stall-timeout", "120", "seconds without any token after which a round counts as hung"),
    ("--llmperf-baselines", "baselines", "folder of the baselines, relative to the rootdir"),
    ("--llmperf-missing-baseline", "fail", "fail, skip, or record where no baseline is stored"),
    ("--update-baselines", False, "record the baselines of all selected cases anew"),
    ("--update-baselines-new-only", False, "record baselines only where none is stored; compare the others"),
    ("--llmperf-launches", "5", "engine starts that a recorded baseline consists of"),
    ("--llmperf-rounds", "5", "measured rounds per launch"),
    ("--llmperf-max-launches", "8", "engine starts that an undecided case may use"),
    ("--llmperf-tolerance", "5 %", "slow-down that must not pass"),
    ("--llmperf-inconclusive", "warn", "warn or fail when the launches are used up without a decision"),
    (
        "--llmperf-require-gpus",
        False,
        "fail, not skip, where there are too few GPUs: a run that skips all is not green",
    ),
    ("--llmperf-json", None, "write every raw sample to this file"),
)


@dataclass(frozen=True)
class Settings:
    """The options, parsed and checked."""

    selected: dict[str, tuple[Any, ...]]
    """The values that options name, per axis."""
    kind: str
    urls: dict[str, str]
    """Endpoint name to URL; empty unless `kind` is url."""
    served_model: str | None
    python: str
    engine_args: tuple[tuple[str, tuple[str, ...]], ...]
    startup_timeout_s: float
    stall_timeout_s: float
    baselines: Path
    missing: str
    update: str
    """"no", "all" or "new"."""
    launches: int
    rounds: int
    max_launches: int
    tolerance: float
    fail_inconclusive: bool
    require_gpus: bool
    json_path: Path | None


SETTINGS: pytest.StashKey[Settings] = pytest.StashKey()
OUTCOMES = pytest.StashKey[list[dict[str, Any]]]()
"""The outcomes that reports brought, as plain data, in the order in which they became final."""


def add_options(parser: pytest.Parser) -> None:
    """Declare every option and its ini twin."""
    group = parser.getgroup("llmperf", "LLM inference performance")
    for flag, default, text in OPTIONS:
        shown = f" (default: {default})" if isinstance(default, str) else ""
        action: dict[str, Any] = {"action": "store_true"} if default is False else {"metavar": _metavar(flag)}
        group.addoption(flag, dest=_ini(flag), default=None, help=(text + shown).replace("%", "%%"), **action)
        parser.addini(_ini(flag), text, type="bool" if default is False else "string", default=default)


def _ini(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _metavar(flag: str) -> str:
    return flag.rpartition("-")[2].upper()


def read_settings(config: pytest.Config) -> Settings:
    """Return the settings, or raise UsageError that names the option, its value and the remedy."""
    from pytest_llmperf.plan import AXES, PlanError

    raw = {flag: _resolve(config, flag, default) for flag, default, _ in OPTIONS}
    try:
        selected = {axis: _axis(axis, raw[f"--llmperf-{axis}"]) for axis in AXES if raw[f"--llmperf-{axis}"]}
        return _settings(config, raw, selected)
    except PlanError as error:
        raise pytest.UsageError(str(error)) from None


def _resolve(config: pytest.Config, flag: str, default: object) -> Any:
    given = config.getoption(_ini(flag), None)
    if given is not None:
        return given
    try:
        value = config.getini(_ini(flag))
    except TypeError as error:
        raise pytest.UsageError(f'{_ini(flag)}: {error}; write the value in quotes, e.g. {_ini(flag)} = "1,2"') from None
    return default if value in (None, "") else value


def _settings(config: pytest.Config, raw: dict[str, Any], selected: dict[str, tuple[Any, ...]]) -> Settings:
    from pytest_llmperf.plan import ENGINE_KINDS, degree, parse_engine_args, parse_fraction

    urls = _urls(raw["--llmperf-url"])
    kind = _choice(raw, "--llmperf-engine", ENGINE_KINDS) if raw["--llmperf-engine"] else "url" if urls else "server"
    if (kind == "url") != bool(urls):
        raise pytest.UsageError(
            f"--llmperf-engine={kind}: contradicts --llmperf-url; leave --llmperf-engine out"
            if urls
            else "--llmperf-engine=url: needs an endpoint; add --llmperf-url=http://HOST:PORT"
        )
    if raw["--update-baselines"] and raw["--update-baselines-new-only"]:
        raise pytest.UsageError("--update-baselines and --update-baselines-new-only: give only one of them")
    models = selected.pop("model", None) if kind == "url" else None
    return Settings(
        selected=selected,
        kind=kind,
        urls=urls,
        served_model=models[0] if models else None,
        python=_interpreter(raw["--llmperf-python"]),
        engine_args=parse_engine_args(raw["--llmperf-engine-args"] or "", origin="--llmperf-engine-args"),
        startup_timeout_s=_seconds(raw, "--llmperf-startup-timeout"),
        stall_timeout_s=_seconds(raw, "--llmperf-stall-timeout"),
        baselines=config.rootpath / raw["--llmperf-baselines"],
        missing=_choice(raw, "--llmperf-missing-baseline", ("fail", "skip", "record")),
        update="all" if raw["--update-baselines"] else "new" if raw["--update-baselines-new-only"] else "no",
        launches=degree("--llmperf-launches", raw["--llmperf-launches"]),
        rounds=degree("--llmperf-rounds", raw["--llmperf-rounds"]),
        max_launches=degree("--llmperf-max-launches", raw["--llmperf-max-launches"]),
        tolerance=parse_fraction("--llmperf-tolerance", raw["--llmperf-tolerance"]),
        fail_inconclusive=_choice(raw, "--llmperf-inconclusive", ("warn", "fail")) == "fail",
        require_gpus=bool(raw["--llmperf-require-gpus"]),
        json_path=_writable(config, raw["--llmperf-json"]),
    )


def _axis(axis: str, text: str) -> tuple[Any, ...]:
    from pytest_llmperf.plan import degree

    flag = f"--llmperf-{axis}"
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise pytest.UsageError(f"{flag}={text}: an empty value between commas; write e.g. {flag}=1,2")
    parse: Callable[[str], Any] = str if axis == "model" else lambda word: degree(flag, word)
    return tuple(dict.fromkeys(parse(word) for word in words))


def _choice(raw: dict[str, Any], flag: str, choices: tuple[str, ...]) -> str:
    value = str(raw[flag])
    if value not in choices:
        raise pytest.UsageError(f"{flag}={value}: must be one of {', '.join(choices)}")
    return value


def _seconds(raw: dict[str, Any], flag: str) -> float:
    try:
        seconds = float(raw[flag])
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise pytest.UsageError(f"{flag}={raw[flag]}: must be a number of seconds above 0")
    return seconds


def _urls(text: str | None) -> dict[str, str]:
    """Return endpoint names and URLs; an endpoint without a name is called by its host and port."""
    from pytest_llmperf.plan import check_url

    found: dict[str, str] = {}
    for word in (part.strip() for part in (text or "").split(",") if part.strip()):
        name, equals, url = word.partition("=")
        if not equals or "/" in name:
            name, url = "", word
        url = check_url(url, origin="--llmperf-url")
        name = name or url.partition("//")[2].replace(":", "_").replace("/", "_")
        if name in found:
            raise pytest.UsageError(f"--llmperf-url={text}: two endpoints are named {name!r}; write name=URL for each")
        found[name] = url
    return found


def _interpreter(path: str | None) -> str:
    import shutil

    if path is None:
        return sys.executable
    # The path is kept as given: a virtual environment's python is a link, and following it would leave the environment.
    found = shutil.which(str(Path(path).expanduser()))
    if not found:
        raise pytest.UsageError(
            f"--llmperf-python={path}: no such interpreter; name the python of an environment that has vLLM,"
            " e.g. /opt/vllm/bin/python"
        )
    return str(Path(found).absolute())


def _writable(config: pytest.Config, path: str | None) -> Path | None:
    """Return the target, created now: a path that cannot be written must fail before hours of measuring, not after."""
    if path is None:
        return None
    target = config.invocation_params.dir / path
    if hasattr(config, "workerinput"):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    except OSError as error:
        raise pytest.UsageError(f"--llmperf-json={path}: cannot be written ({error}); name another file") from None
    return target
