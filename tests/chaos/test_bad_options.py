"""Every option, ini value, marker argument and workload argument with whatever somebody may write there.

It is accepted, or refused in one message of our own that names it: never another exception, never a hang.
"""

from __future__ import annotations

import os
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_llmperf.plan.arguments import workload_from
from pytest_llmperf.plan.axes import Axes
from pytest_llmperf.plan.capacity import capacity_from
from pytest_llmperf.plan.checks import PlanError
from pytest_llmperf.plan.marker import parse_marker
from pytest_llmperf.plan.workload import Workload
from pytest_llmperf.plugin.options import OPTIONS, REPEATED, ini_name
from pytest_llmperf.plugin.settings import read_settings
from pytest_llmperf.run.cases import Planned
from pytest_llmperf.run.selection import planned

MOST_MESSAGE = 2_000
"""Characters of a message: a value of a million characters is shown short."""
SLOW_S = 20.0
FLAGS = [flag for flag, default, _ in OPTIONS if default is not False]
SWITCHES = [flag for flag, default, _ in OPTIONS if default is False]

NASTY = (
    "",
    " ",
    "0",
    "-0",
    "-1",
    "1",
    " 5 ",
    "1_000",
    "١٢",
    "²",
    "inf",
    "-inf",
    "nan",
    "1e400",
    "1e-400",
    "0x10",
    "1,2",
    "1,,2",
    ",",
    "true",
    "9" * 5_000,
    "-" + "9" * 5_000,
    "0." + "3" * 5_000,
    "9" * 5_000 + "%",
    "\x00",
    "a\x00b",
    "\ud800",
    "~nobody/x",
    "~/x",
    "~nosuchuser/x",
    "/",
    ".",
    "..",
    "/dev/null",
    "/proc/self/mem",
    "x" * 5_000,
    "/" + "x" * 5_000,
    "/".join("x" * 3_000),
    "http://",
    "http://h:1",
    "http://[",
    "http://h:99999999",
    "a=http://h",
    "{",
    "{model}",
    "{0}",
    "{model.__class__}",
    "%s",
    "'",
    '"',
    "\\",
    "--x",
    "--x=1 --x",
    "-",
    "a=b",
    "ttft_p50_s=5%",
    "ttft_p50_s=" + "9" * 5_000,
    "*=on",
    "/ttft_p50_s=5%",
    "/*=on",
    "//=on",
    "a/b/ttft_p50_s=5%",
    "[=on",
    "\n",
    "a: b",
    "a:",
    "A=$B",
    "$",
    "🙂",
    "\u202e",
    "\x1b[31m",
)
TEXT = st.one_of(st.sampled_from(NASTY), st.text(max_size=20), st.builds("".join, st.lists(st.sampled_from(NASTY), max_size=3)))


class Unkind:
    """An object of which everything raises."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no equality")

    def __hash__(self) -> int:
        raise RuntimeError("no hash")

    def __bool__(self) -> bool:
        raise RuntimeError("no truth")


class Long:
    """An object with a long name."""

    def __repr__(self) -> str:
        return "x" * 1_000_000


LOOP: list[Any] = []
LOOP.append(LOOP)
LOOP_OF_DICTS: dict[str, Any] = {}
LOOP_OF_DICTS["a"] = LOOP_OF_DICTS
DEEP: list[Any] = []
for _ in range(3_000):
    DEEP = [DEEP]
ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    10**400,
    -(10**400),
    0.0,
    -0.0,
    0.5,
    1.0,
    1e308,
    1e-320,
    float("nan"),
    float("inf"),
    Decimal("1"),
    Decimal("NaN"),
    Decimal("sNaN"),
    Decimal("1e999999"),
    Fraction(1, 3),
    np.int64(3),
    np.float32(0.5),
    np.bool_(True),
    np.array([1, 2]),
    np.array(3),
    b"",
    b"1",
    bytearray(b"x"),
    (),
    (1,),
    [],
    [None],
    [1, 2],
    {},
    {"A": None},
    {None: 1},
    {"a": {"b": [1]}},
    set(),
    object(),
    int,
    len,
    Path("x"),
    Path("\x00"),
    LOOP,
    LOOP_OF_DICTS,
    DEEP,
    Unkind(),
    Long(),
    [Unkind()],
    {"a": Unkind()},
    {"ttft_s": Unkind()},
    {"short": {"share": 10**400}},
    range(3),
    1j,
    "file(/dev/zero)",
    "lognormal(1e400, 1)",
    "uniform(1, 9)",
    "normal(" + "9" * 5_000 + ", 1)",
    [(1, 10**400)],
    [(1, 2, 3)],
    {"prompt_tokens": 10**400},
    {"requests": LOOP},
    {"temperature": float("nan")},
    {"x": 10**5000},
    lambda: None,
    "file(\x00)",
    {"/ttft_p50_s": "5%"},
    {"H200": {"ttft_p50_s": 10**400}},
    {"ttft_p50_s": "9" * 5_000},
    [{"concurrency": 10**400}],
    [{"rate": "1e400"}],
    [{"concurrency": 1, "requests": Unkind()}],
    [{"concurrency": 8, "requests": "x"}],
    [{"concurrency": 8, "requests": 10**5000}],
)
ANYTHING = st.one_of(
    st.sampled_from(range(len(ODD))).map(lambda place: ODD[place]),
    TEXT,
    st.integers(),
    st.floats(),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5)),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    ),
)
QUICKLY = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def config_of(given_options: dict[str, Any], ini: dict[str, Any] | None = None, folder: Path = Path("/tmp")) -> Any:
    """Return what of pytest's configuration is asked for options."""
    defaults = {ini_name(flag): default for flag, default, _ in OPTIONS}
    return SimpleNamespace(
        getoption=lambda name, default=None: given_options.get(name, default),
        getini=lambda name: {**defaults, **(ini or {})}[name],
        rootpath=folder,
        invocation_params=SimpleNamespace(dir=folder),
        option=SimpleNamespace(collectonly=False),
    )


def accepted_or_refused(make: Any, error: type[Exception], *names: str) -> None:
    """Fail where neither a value comes of it nor our own error that names it, soon."""
    begin_s = time.monotonic()
    try:
        make()
    except error as refused:
        message = str(refused)
        assert any(name in message for name in names), message[:MOST_MESSAGE]
        assert len(message) <= MOST_MESSAGE, f"{len(message)} characters: {message[:300]}"
    assert time.monotonic() - begin_s < SLOW_S


@pytest.mark.fault("bad input is told", "any text as the value of an option")
@pytest.mark.parametrize("flag", FLAGS)
def test_an_option_is_accepted_or_refused_by_name(flag: str) -> None:
    def read(text: str) -> None:
        value = [text] if flag in REPEATED else text
        accepted_or_refused(lambda: read_settings(config_of({ini_name(flag): value})), pytest.UsageError, flag)

    for text in NASTY:
        read(text)
    QUICKLY(given(TEXT)(read))()


@pytest.mark.fault("bad input is told", "any text or value in the ini file")
@pytest.mark.parametrize("flag", [*FLAGS, *SWITCHES])
def test_an_ini_value_is_accepted_or_refused_by_name(flag: str) -> None:
    def read(value: Any) -> None:
        config = config_of({}, {ini_name(flag): value})
        accepted_or_refused(lambda: read_settings(config), pytest.UsageError, flag, ini_name(flag))

    for value in (*NASTY, *ODD):
        read(value)


WORKLOAD = tuple(Workload.__dataclass_fields__)


@pytest.mark.fault("bad input is told", "any value as an argument of a workload")
@pytest.mark.parametrize("name", WORKLOAD)
def test_a_workload_argument_is_accepted_or_refused_by_name(name: str, tmp_path: Path) -> None:
    def read(value: Any) -> None:
        def make() -> None:
            workload = workload_from(Axes(), {name: value}, folder=tmp_path)
            assert len(workload.fingerprint) == 16

        accepted_or_refused(make, PlanError, name)

    for value in (*ODD, *NASTY):
        read(value)
    QUICKLY(given(ANYTHING)(read))()


CAPACITY = ("rate", "concurrency", "share", "resolution", "repeats", "slo", "requests")


@pytest.mark.fault("bad input is told", "any value as an argument of a search for the capacity")
@pytest.mark.parametrize("name", CAPACITY)
def test_a_search_argument_is_accepted_or_refused_by_name(name: str, tmp_path: Path) -> None:
    sound = {"rate": (1, 8), "slo": {"ttft_s": 1.0}}
    if name == "concurrency":
        del sound["rate"]
    for value in (*ODD, *NASTY):
        accepted_or_refused(
            lambda value=value: capacity_from(Axes(), {}, {**sound, name: value}, folder=tmp_path), PlanError, name
        )


MARKER = (
    "model",
    "tp",
    "pp",
    "dp",
    "concurrency",
    "rate",
    "engine",
    "engine_args",
    "env",
    "tolerance",
    "gate",
    "points",
    "limits",
    "min_gpus",
    "min_gpu_memory",
    "gpu",
    "nvlink",
)
SETTINGS = read_settings(config_of({"llmperf_engine": "simulated"}))


@pytest.mark.fault("bad input is told", "any value as an argument of the marker")
@pytest.mark.parametrize("name", MARKER)
def test_a_marker_argument_is_accepted_or_refused_by_name(name: str) -> None:
    def read(value: Any) -> None:
        mark = SimpleNamespace(args=(), kwargs={name: value})
        accepted_or_refused(lambda: parse_marker({name: value}), PlanError, name)
        plan = planned("test_it.py::test_x", [mark], Axes(), SETTINGS, compares=True)
        assert isinstance(plan, Planned)
        assert plan.error is None or len(plan.error) <= MOST_MESSAGE

    for value in (*ODD, *NASTY):
        read(value)
    QUICKLY(given(ANYTHING)(read))()


def test_arguments_without_names_are_refused() -> None:
    for value in ODD:
        plan = planned("test_it.py::test_x", [SimpleNamespace(args=(value,), kwargs={})], Axes(), SETTINGS, compares=True)
        assert plan.error is not None
        assert len(plan.error) <= MOST_MESSAGE


def odd_paths(folder: Path) -> list[str]:
    """Return paths that are no plain readable file."""
    os.mkfifo(folder / "fifo")
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "empty").touch()
    (folder / "below").write_text("x")
    return [
        "fifo", "folder", "loop", "empty", "below/x", "no/such", "/dev/zero", "/dev/full", "/dev/stdin", "/dev/tty",
        "/proc/kmsg", "/proc/self/mem", "\x00", "\ud800", "x" * 5_000, "/", "~nobody/x",
    ]  # fmt: skip


@pytest.mark.fault("no hang", "a FIFO, /dev/zero or a folder where a workload names a file")
@pytest.mark.parametrize("name", ["dataset", "trace", "pairs", "prompt_tokens", "output_tokens"])
def test_a_file_of_a_workload_that_is_none_is_refused(name: str, tmp_path: Path) -> None:
    for path in odd_paths(tmp_path):
        value = f"file({path})" if name.endswith("_tokens") else path
        with pytest.raises(PlanError) as refused:
            workload_from(Axes(), {name: value}, folder=tmp_path)
        message = str(refused.value)
        assert name in message or path[:20] in message, message
        assert len(message) <= MOST_MESSAGE


@pytest.mark.fault("no hang", "a FIFO, /dev/zero or a folder as the path of an option")
@pytest.mark.parametrize("flag", ["--llmperf-baselines", "--llmperf-json", "--llmperf-python", "--llmperf-model"])
def test_an_option_with_an_odd_path_is_accepted_or_refused(flag: str, tmp_path: Path) -> None:
    for path in odd_paths(tmp_path):
        config = config_of({ini_name(flag): path}, folder=tmp_path)
        accepted_or_refused(lambda config=config: read_settings(config), pytest.UsageError, flag)
