"""The settings that the options resolve to: command line over ini file over default. Nothing else asks pytest for an option."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

import pytest

from pytest_llmperf.files import as_shell, unwritable_file
from pytest_llmperf.plan.axes import AXES, axis_value
from pytest_llmperf.plan.checks import LARGEST, SMALLEST, PlanError, brief, cut, degree, parse_fraction, parse_whole
from pytest_llmperf.plan.command import check_command
from pytest_llmperf.plan.engine import check_url, parse_engine_args, url_name
from pytest_llmperf.plan.gates import parse_gate
from pytest_llmperf.plan.headers import parse_headers
from pytest_llmperf.plan.kinds import COMMAND, ENDPOINT, KINDS, STARTED
from pytest_llmperf.plugin.options import CHOICES, MAY_HOLD_SECRETS, OPTIONS, ini_name
from pytest_llmperf.plugin.workers import refuse
from pytest_llmperf.run.settings import Settings
from pytest_llmperf.units import parse_duration, printable

if TYPE_CHECKING:
    from pytest_llmperf.plan.gates import Gate


def read_settings(config: pytest.Config) -> Settings:
    """Return the settings, or raise UsageError that names the option, its value and the remedy."""
    raw = {flag: _resolve(config, flag, default) for flag, default, _ in OPTIONS}
    try:
        selected = {axis: _axis(axis, raw[f"--llmperf-{axis}"]) for axis in AXES if raw[f"--llmperf-{axis}"]}
        return _settings(config, raw, selected)
    except PlanError as error:
        text = printable(str(error))  # of a value of 5,000 characters the beginning, and behind it the remedy
        raise pytest.UsageError(text if len(text) <= 1_000 else f"{text[:500]} ... {text[-400:]}") from None


def _resolve(config: pytest.Config, flag: str, default: object) -> Any:
    given = config.getoption(ini_name(flag), None)
    if given is not None:
        return given
    hint = "write true or false" if default is False else f'write the value in quotes, e.g. {ini_name(flag)} = "1,2"'
    try:
        value = config.getini(ini_name(flag))
    except (TypeError, ValueError, pytest.UsageError) as error:  # the last since pytest 9.2
        why = "not a value of this option" if flag in MAY_HOLD_SECRETS else error
        raise pytest.UsageError(f"{ini_name(flag)}: {why}; {hint}") from None
    fits = isinstance(value, (bool, NoneType) if default is False else (str, NoneType))
    if not fits:
        shown = "" if flag in MAY_HOLD_SECRETS else f"={brief(value)}"
        raise pytest.UsageError(f"{ini_name(flag)}{shown}: not a value of this option; {hint}")
    return default if value is None or value == "" else value


def _settings(config: pytest.Config, raw: dict[str, Any], selected: dict[str, tuple[Any, ...]]) -> Settings:
    urls = _urls(raw["--llmperf-url"])
    kind = _kind(raw, urls)
    commanded = KINDS[kind].commanded
    if degree("--llmperf-max-launches", raw["--llmperf-max-launches"]) < 2:
        raise pytest.UsageError(
            f"--llmperf-max-launches={raw['--llmperf-max-launches']}: one launch can never fail a test; give 2 or more"
        )
    _only_one(raw, "--update-baselines", "--update-baselines-new-only", "--llmperf-calibrate", "--llmperf-selftest")
    launches = "--llmperf-calibrate" if raw["--llmperf-calibrate"] else "--llmperf-launches"
    if launches == "--llmperf-calibrate" and degree(launches, raw[launches]) < 2:
        raise pytest.UsageError(f"{launches}={raw[launches]}: one launch says nothing about noise; give 2 or more, better 10")
    gate = _gate(raw["--llmperf-gate"])
    models = selected.pop("model", None) if not KINDS[kind].starts else None
    return Settings(
        selected=selected,
        kind=kind,
        urls=urls,
        served_model=models[0] if models else None,
        python=_interpreter(raw["--llmperf-python"]),
        headers=parse_headers(_lines(raw["--llmperf-header"]), os.environ, origin="--llmperf-header"),
        command=check_command(raw["--llmperf-command"], origin="--llmperf-command") if commanded else "",
        engine_args=parse_engine_args(raw["--llmperf-engine-args"] or "", origin="--llmperf-engine-args", verbatim=commanded),
        startup_timeout_s=_seconds(raw, "--llmperf-startup-timeout"),
        stop_grace_s=_seconds(raw, "--llmperf-stop-grace"),
        stall_timeout_s=_seconds(raw, "--llmperf-stall-timeout"),
        idle_s=_duration("--llmperf-idle", raw["--llmperf-idle"]),
        baselines=config.rootpath / _path("--llmperf-baselines", raw["--llmperf-baselines"]),
        missing=_choice(raw, "--llmperf-missing-baseline"),
        update="all" if raw["--update-baselines"] else "new" if raw["--update-baselines-new-only"] else "no",
        extend=_choice(raw, "--llmperf-update") == "extend",
        calibrate=bool(raw["--llmperf-calibrate"]),
        selftest=bool(raw["--llmperf-selftest"]),
        gate=gate,
        launches=degree(launches, raw[launches]),
        rounds=degree("--llmperf-rounds", raw["--llmperf-rounds"]),
        max_launches=degree("--llmperf-max-launches", raw["--llmperf-max-launches"]),
        tolerance=parse_fraction("--llmperf-tolerance", raw["--llmperf-tolerance"]),
        fail_inconclusive=_choice(raw, "--llmperf-inconclusive") == "fail",
        require_gpus=bool(raw["--llmperf-require-gpus"]),
        require_comparisons=_comparisons(raw),
        exclusive=_choice(raw, "--llmperf-exclusive") == "on",
        json_path=_json_path(config, raw["--llmperf-json"]),
    )


def _lines(value: str | list[str] | None) -> list[str]:
    """Return the values of an option that may be repeated: the command line's as they are, the ini file's one a line."""
    return value.splitlines() if isinstance(value, str) else value or []


def _kind(raw: dict[str, Any], urls: dict[str, str]) -> str:
    """Return the kind of engine, which must be one for an endpoint or a command where there is one, and only there."""
    command = bool(raw["--llmperf-command"])
    by_default = ENDPOINT if urls else COMMAND if command else STARTED
    kind = _choice(raw, "--llmperf-engine") if raw["--llmperf-engine"] else by_default
    if KINDS[kind].starts == bool(urls):
        raise pytest.UsageError(
            f"--llmperf-engine={kind}: contradicts --llmperf-url; leave --llmperf-engine out"
            if urls
            else f"--llmperf-engine={kind}: needs an endpoint; add --llmperf-url=http://HOST:PORT"
        )
    if KINDS[kind].commanded != command:
        raise pytest.UsageError(
            f"--llmperf-command: contradicts --llmperf-{'url' if urls else f'engine={kind}'}; leave one of them out"
            if command
            else f"--llmperf-engine={kind}: needs a command; add --llmperf-command='llama-server -m {{model}} --port {{port}}'"
        )
    return kind


def _gate(text: str | None) -> tuple[Gate, ...]:
    gate = parse_gate(text or "", origin="--llmperf-gate")
    if gate:
        from pytest_llmperf.judge.gates import gates  # with numpy, which a run without llmperf tests does not need

        gates(gate, tolerance=0.05)  # an unknown metric must fail now, and not in each test
    return gate


def _only_one(raw: dict[str, Any], *flags: str) -> None:
    given = [flag for flag in flags if raw[flag]]
    if len(given) > 1:
        raise pytest.UsageError(f"{' and '.join(given)}: give only one of them")


def _comparisons(raw: dict[str, Any]) -> int:
    """Return how many comparisons the run must come to; raises UsageError where it is one that compares nothing."""
    flag = "--llmperf-require-comparisons"
    number = 0 if raw[flag] is None else parse_whole(flag, raw[flag])
    without = next((other for other in ("--update-baselines", "--llmperf-calibrate", "--llmperf-selftest") if raw[other]), None)
    if number and without:
        raise pytest.UsageError(f"{without} and {flag}={number}: the first compares nothing; leave one of them out ({flag}=0)")
    return number


def _axis(axis: str, text: str) -> tuple[Any, ...]:
    flag = f"--llmperf-{axis}"
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise pytest.UsageError(f"{flag}={cut(text)}: an empty value between commas; write e.g. {flag}=1,2")
    return tuple(dict.fromkeys(axis_value(axis, word, origin=flag) for word in words))


def _choice(raw: dict[str, Any], flag: str) -> str:
    value, choices = str(raw[flag]), CHOICES[flag]
    if value not in choices:
        raise pytest.UsageError(f"{flag}={cut(value)}: must be one of {', '.join(choices)}")
    return value


def _seconds(raw: dict[str, Any], flag: str) -> float:
    try:
        seconds = float(raw[flag])
    except ValueError:
        seconds = 0.0
    if not SMALLEST <= seconds <= LARGEST:
        raise pytest.UsageError(f"{flag}={cut(str(raw[flag]))}: must be a number of seconds above 0")
    return seconds


def _duration(flag: str, text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return parse_duration(text)
    except ValueError:
        raise pytest.UsageError(f"{flag}={cut(text)}: must be a time above 0, e.g. 90 (seconds), 30m or 1.5h") from None


def _urls(text: str | None) -> dict[str, str]:
    """Return endpoint names and URLs; an endpoint without a name is called by its host and port."""
    urls: dict[str, str] = {}
    for word in (part.strip() for part in (text or "").split(",") if part.strip()):
        name, equals, url = word.partition("=")
        if not equals or "/" in name:
            name, url = "", word
        url = check_url(url, origin="--llmperf-url")
        name = name or url_name(url)
        if name in urls:
            raise pytest.UsageError(f"--llmperf-url: two endpoints are named {brief(name)}; write name=URL for each")
        urls[name] = url
    return urls


def _path(flag: str, text: str) -> str:
    """Return a path as a shell would write it; raises UsageError for a text that is none on any file system."""
    try:
        path = as_shell(text)
        os.fsencode(path)
    except ValueError as error:
        raise pytest.UsageError(f"{flag}={brief(text)}: is no path ({cut(str(error))}); name another one") from None
    if "\0" in path or not path.strip():
        raise pytest.UsageError(f"{flag}={brief(text)}: is no path; name another one")
    return path


def _json_path(config: pytest.Config, text: str | None) -> Path | None:
    return None if text is None else config.invocation_params.dir / _path("--llmperf-json", text)


def _interpreter(path: str | None) -> str:
    if path is None:
        return sys.executable
    # The path is kept as given: a virtual environment's python is a link, and following it would leave the environment.
    python = shutil.which(_path("--llmperf-python", path))
    if not python:
        raise pytest.UsageError(
            f"--llmperf-python={cut(path)}: no such interpreter; name the python of an environment that has vLLM,"
            " e.g. /opt/vllm/bin/python"
        )
    return str(Path(python).absolute())


def check_json(config: pytest.Config, settings: Settings) -> None:
    """Raise UsageError where the JSON file of a run that measures can't be written."""
    path = settings.json_path
    if path is not None and not config.option.collectonly and (problem := unwritable_file(path)):
        refuse(config, f"--llmperf-json={path}: cannot be written ({problem}); name another file")
