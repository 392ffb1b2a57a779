"""The fault table: which promise, which fault, how often it was tried, how often survived, and the longest time that took.

A test that breaks something on purpose is marked `@pytest.mark.fault("promise", "fault")` and stands in tests/chaos or
tests/real. It tries its fault once, or with the fixture `attempts` as often as the run asks for: a few times by default, many
times with --faults=full.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

PROMISES = (
    "no engine outlives the run",
    "no hang",
    "no false green",
    "no lost baseline",
    "no stranger",
    "bad input is told",
    "load and size",
)
_PROPERTY = "fault"


class Attempts:
    """How often a test tries its fault, and what came of it."""

    def __init__(self, *, full: bool) -> None:
        self._full = full
        self.tried = 0
        self.survived = 0
        self._longest_s = 0.0
        self._told_s: list[float] = []

    def __call__(self, *, quick: int = 1, full: int | None = None) -> Iterator[random.Random]:
        """Yield a source of chance for each attempt, seeded with its number; the loop's body is the attempt."""
        for number in range(self.tried, self.tried + (full or quick if self._full else quick)):
            self.tried += 1
            begin_s = time.monotonic()
            yield random.Random(number)
            # Reached only where the body raised nothing: a failing attempt ends the loop, and the test.
            self.survived += 1
            self._longest_s = max(self._longest_s, time.monotonic() - begin_s)

    def took(self, seconds: float) -> None:
        """Note how long the plugin took to get over the fault, where that is less than the whole attempt."""
        self._told_s.append(seconds)

    @property
    def is_full(self) -> bool:
        """Return whether the run asks for all attempts."""
        return self._full

    @property
    def worst_s(self) -> float:
        """Return the longest time to get over the fault."""
        return max(self._told_s, default=self._longest_s)


@dataclass(frozen=True)
class Row:
    """What came of one test."""

    promise: str
    fault: str
    tried: int
    survived: int
    worst_s: float
    test: str


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults", "the fault table")
    group.addoption(
        "--faults", choices=("quick", "full"), default="quick", help="quick: a half, few attempts; full: all (30 min)"
    )
    group.addoption("--fault-table", metavar="FILE", help="write the fault table to FILE as Markdown")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "fault(promise, fault, full=False): what the test breaks; full=True leaves it to runs with --faults=full"
    )
    config.pluginmanager.register(_Table(config))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--faults") == "full":
        return
    later = [item for item in items if (mark := item.get_closest_marker("fault")) and mark.kwargs.get("full")]
    if later:
        config.hook.pytest_deselected(items=later)
        items[:] = [item for item in items if item not in later]


@pytest.fixture
def attempts(request: pytest.FixtureRequest) -> Attempts:
    """Return what counts the attempts of a test: `for chance in attempts(quick=2, full=20): ...`."""
    counted = Attempts(full=request.config.getoption("--faults") == "full")
    request.node.stash[_ATTEMPTS] = counted
    return counted


_ATTEMPTS = pytest.StashKey[Attempts]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    mark = item.get_closest_marker("fault")
    if mark and (call.when == "call" or (call.when == "setup" and report.failed)):
        promise, fault = mark.args
        assert promise in PROMISES, f"{item.nodeid}: unknown promise {promise!r}"
        counted = item.stash.get(_ATTEMPTS, None)
        if counted and counted.tried:
            values = (counted.tried, counted.survived, counted.worst_s)
        else:
            values = (1, int(report.passed), call.duration)
        if not report.skipped:
            report.user_properties.append((_PROPERTY, [promise, fault, *values]))
    return report


class _Table:
    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._rows: list[Row] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "teardown":
            self._rows += [Row(*value, report.nodeid) for name, value in report.user_properties if name == _PROPERTY]

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if not self._rows or hasattr(self._config, "workerinput"):
            return
        text = table(self._rows)
        if path := self._config.getoption("--fault-table"):
            Path(path).write_text(text)
        terminalreporter.section("faults")
        terminalreporter.write_line(text)


def table(rows: list[Row]) -> str:
    """Return the rows as Markdown, those of one fault added up, in the order of the promises."""
    faults: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (PROMISES.index(row.promise), row.fault)):
        faults.setdefault((row.promise, row.fault), []).append(row)
    lines = ["| promise | fault | tried | survived | worst time |", "|---|---|---|---|---|"]
    for (promise, fault), group in faults.items():
        tried, survived = sum(row.tried for row in group), sum(row.survived for row in group)
        lines.append(f"| {promise} | {fault} | {tried} | {survived} | {max(row.worst_s for row in group):.1f} s |")
    tried, survived = sum(row.tried for row in rows), sum(row.survived for row in rows)
    lines.append(f"| all | {len(faults)} faults | {tried} | {survived} | {max(row.worst_s for row in rows):.1f} s |")
    return "\n".join(lines) + "\n"
