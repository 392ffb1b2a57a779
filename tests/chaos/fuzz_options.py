"""The fuzz target for options, ini lines, and arguments of marker and call."""

from __future__ import annotations

import ast
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from pytest_llmperf.judge.gates import gates
from pytest_llmperf.plan import lengths
from pytest_llmperf.plan.arguments import workload_from
from pytest_llmperf.plan.axes import Axes, axis_value
from pytest_llmperf.plan.checks import PlanError
from pytest_llmperf.plan.command import check_command
from pytest_llmperf.plan.engine import check_url, parse_engine_args
from pytest_llmperf.plan.gates import parse_gate
from pytest_llmperf.plan.headers import parse_headers
from pytest_llmperf.plan.limits import parse_limits
from pytest_llmperf.plan.marker import parse_marker
from pytest_llmperf.plan.points import parse_points
from pytest_llmperf.plan.workload import Workload
from pytest_llmperf.plugin.options import OPTIONS, ini_name
from pytest_llmperf.plugin.settings import read_settings
from pytest_llmperf.units import parse_duration, parse_size
from tests.chaos.scratch import folder, names

if TYPE_CHECKING:
    from collections.abc import Callable


# ------------------------------------------------------------------------------------------------ options and arguments


def options(data: bytes) -> None:
    """A value of an option, ini line, marker or call is taken, or refused by a sentence that names it."""
    number, text = data[:1] or b"\0", data[1:].decode(errors="surrogateescape")
    name, read = _READERS[number[0] % len(_READERS)]
    try:
        read(_value(text))
    except (PlanError, pytest.UsageError) as error:
        names(error, "")
    except ValueError as error:
        if name not in _PLAIN or type(error) is not ValueError:
            raise


_PLAIN = ("parse_duration",)
"""What raises a plain ValueError, of which the caller makes a sentence."""


def _value(text: str) -> Any:
    """Return what a test file may hold: a literal behind `=`, else the text as an option has it."""
    if text.startswith("="):
        try:
            return ast.literal_eval(text[1:])
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            pass
    return text


_DEFAULTS = {ini_name(flag): default for flag, default, _ in OPTIONS}


def _setting(name: str) -> Callable[[Any], object]:
    def read(value: Any) -> object:
        # An ini file holds texts, and truth values of switches: pytest itself refuses the rest.
        given = _DEFAULTS | {name: bool(value) if _DEFAULTS[name] is False else str(value)}
        config = SimpleNamespace(
            getoption=lambda *_: None,
            getini=given.get,
            rootpath=folder(),
            invocation_params=SimpleNamespace(dir=folder()),
            option=SimpleNamespace(collectonly=True),
        )
        return read_settings(cast("pytest.Config", config))

    return read


def _argument(name: str) -> Callable[[Any], object]:
    return lambda value: workload_from(Axes(), {name: value}, folder=folder()).fingerprint


def _is_named(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)  # as arguments always are


_READERS: tuple[tuple[str, Callable[[Any], object]], ...] = (
    ("parse_gate", lambda value: gates(parse_gate(value, origin="gate"), tolerance=0.05)),
    ("parse_limits", lambda value: parse_limits(value, origin="limits")),
    ("parse_points", parse_points),
    ("parse_marker", lambda value: parse_marker(value if _is_named(value) else {"tp": value})),
    ("parse_engine_args", lambda value: parse_engine_args(value, origin="engine_args")),
    ("parse_headers", lambda value: parse_headers(str(value).splitlines(), {"TOKEN": "secret"}, origin="header")),
    ("check_url", lambda value: check_url(str(value), origin="url")),
    ("check_command", lambda value: check_command(value, origin="command")),
    ("parse_seconds", lambda value: lengths.parse_seconds("think_s", value)),
    ("parse_pairs", lambda value: lengths.parse_pairs(value, folder())),
    ("axis_value", lambda value: axis_value("rate", value, origin="rate")),
    ("parse_size", parse_size),
    ("parse_duration", lambda value: parse_duration(str(value))),
    *((field, _argument(field)) for field in Workload.__dataclass_fields__),
    *((name, _setting(name)) for name in _DEFAULTS),
)
_VALUES = (
    "ttft_p90_s=8%,preemptions=off", "={'ttft_p50_s': 'higher 10 %', 'vllm:x_total': True}", "={'H200': {'ttft_p50_s': 0.2}}",
    "=[{'concurrency': 1, 'requests': 10, 'limits': {'ttft_p50_s': '<= 5'}, 'id': 'long'}, {'rate': 4.5}]",
    "={'tp': [1, 2], 'env': {'A': 1}, 'gpu': 'H200', 'min_gpu_memory': '80 GiB', 'tolerance': '5 %', 'engine': 'offline'}",
    "--max-num-seqs 64 --no-enable-x -O3 --config '{\"a\": [1]}'", "={'max_num_seqs': 64, 'compilation_config': {'level': 3}}",
    "X-Token=TOKEN\nAuthorization: Basic ${TOKEN}", "https://gateway:8443/v1/chat/completions?key=1#x", "a=http://[::1]:8000,http://b",
        "llama-server -m {model} --port {port} {{}}", "lognormal(512, 0.6, 4096)", "uniform(1, 9)", "normal(1.5,0.5)",
    "file(t.jsonl)",
    "=[(512, 128), (64, 256)]", "1..10", "inf", "2.5", "80 GB", "1.5h", "5 %", "0.05", "1,2,4", "dataset", "gamma(0.5)",
    "={'short': {'share': 0.8, 'prompt_tokens': 64, 'extra_body': {'top_k': 1}}, 'long': {'prompt_tokens': 'uniform(1, 2)'}}",
    "={'requests': 4, 'prompt_tokens': 8, 'dataset': None}", "={'ttft_s': 0.5}", "={'temperature': 0.7, 'ignore_eos': False}",
    "=10**400", "=" + "9" * 400, "9" * 5_000, "=True", "=None", "=-1", "=[]", "={}", "=1e400", "nan", "~nobody/x", "\0",
    "=('a', 'b')",
)  # fmt: skip


def option_seeds() -> list[bytes]:
    numbers = range(len(_READERS))
    return [bytes([number]) + value.encode(errors="surrogateescape") for number in numbers for value in _VALUES]


def option_past() -> list[bytes]:
    """Return values that have broken a promise: a home folder of nobody, whose name no file can have; nested without end."""
    numbers = {name: number for number, (name, _) in enumerate(_READERS)}
    names_of_paths = ("llmperf_model", "llmperf_python", "llmperf_baselines", "llmperf_json")
    nested = bytes([numbers["parse_engine_args"]]) + b"--o=" + b"a=" * 2_000
    paths = [bytes([numbers[name]]) + value for name in names_of_paths for value in (b"~nobody/x", b"~nobody\0/x", b"\0")]
    return [*paths, nested]
