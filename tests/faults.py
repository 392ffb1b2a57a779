"""The fault table: which promise, which fault, how often it was tried, how often survived, and the longest time that took.

A test that breaks something on purpose is marked `@pytest.mark.fault("promise", "fault")` and stands in tests/chaos or
tests/real. It tries its fault once, or with the fixture `attempts` as often as the run asks for: a few times by default, many
times with --faults=full.
"""

from __future__ import annotations

import contextlib
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.fault_table import PROMISES, Row, table

if TYPE_CHECKING:
    from collections.abc import Iterator

_ROW, _REASON = "fault", "fault not tried"
"""Names of what a report carries, from xdist's workers too."""


class Attempts:
    """How often a test tries its fault, and what came of it."""

    def __init__(self, *, full: bool, only: int | None = None) -> None:
        """Have tried nothing; `only` is the number of the one attempt that is wanted, None for all."""
        self._full = full
        self._only = only
        self.tried = 0
        self.survived = 0
        self.number: int | None = None
        """That of the attempt which is under way, or was the last."""
        self._longest_s = 0.0
        self._took_s: list[float] = []

    def count(self, *, quick: int = 1, full: int | None = None) -> int:
        """Return how many attempts this run asks for."""
        return full or quick if self._full else quick

    def __call__(self, *, quick: int = 1, full: int | None = None) -> Iterator[random.Random]:
        """Yield a source of chance for each attempt, seeded with its number; the loop's body is the attempt."""
        numbers = range(self.tried, self.tried + self.count(quick=quick, full=full)) if self._only is None else (self._only,)
        for number in numbers:
            self.number = number
            with self.attempt():
                # A body that raises leaves the generator here, and what is behind the yield is never reached.
                yield random.Random(number)

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """Count an attempt; it has survived where the body raises nothing."""
        self.tried += 1
        begin_s = time.monotonic()
        yield
        self.survived += 1
        self._longest_s = max(self._longest_s, time.monotonic() - begin_s)

    def add(self, tried: int, survived: int | None = None) -> None:
        """Count attempts that were made elsewhere, in another process say; by default all of them survived."""
        self.tried += tried
        self.survived += tried if survived is None else survived

    def took(self, seconds: float) -> None:
        """Note how long the plugin took to get over the fault, where that is less than the whole attempt."""
        self._took_s.append(seconds)

    @property
    def is_full(self) -> bool:
        """Return whether the run asks for all attempts."""
        return self._full

    @property
    def worst_s(self) -> float:
        """Return the longest time to get over the fault."""
        return max(self._took_s, default=self._longest_s)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults", "the fault table")
    group.addoption(
        "--faults", choices=("quick", "full"), default="quick", help="quick: a half, few attempts; full: all (30 min)"
    )
    group.addoption("--fault-attempt", type=int, metavar="NUMBER", help="try each fault once, by the chance of this attempt")
    group.addoption(
        "--fault-table", metavar="FILE", help="write the fault table to FILE as Markdown; with --collect-only the faults alone"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "fault(promise, fault, full=False): what the test breaks; full=True leaves it to runs with --faults=full"
    )
    config.pluginmanager.register(_Table(config))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marks = {item: mark for item in items if (mark := item.get_closest_marker("fault"))}
    if problems := [f"{item.nodeid}: {problem}" for item, mark in marks.items() if (problem := problem_of(mark))]:
        raise pytest.UsageError("\n".join(problems))
    if config.getoption("--faults") == "full":
        return
    later = [item for item, mark in marks.items() if mark.kwargs.get("full")]
    if later:
        config.hook.pytest_deselected(items=later)
        items[:] = [item for item in items if item not in later]


def problem_of(mark: pytest.Mark) -> str | None:
    """Return what is wrong with a mark `fault`, None for a sound one."""
    if len(mark.args) != 2 or not all(isinstance(text, str) and text for text in mark.args):
        return f"fault{mark.args!r}: write @pytest.mark.fault(promise, fault), two texts"
    promise, fault = mark.args
    if promise not in PROMISES:
        return f"fault({promise!r}, ...): no such promise; known are {', '.join(map(repr, PROMISES))}"
    if "|" in fault or "\n" in fault:
        return f"fault(..., {fault!r}): becomes a cell of a table; leave out '|' and ends of lines"
    unknown = sorted(set(mark.kwargs) - {"full"})
    return f"fault(..., {unknown[0]}=...): unknown; known is full" if unknown else None


@pytest.fixture
def attempts(request: pytest.FixtureRequest) -> Attempts:
    """Return what counts the attempts of a test: `for chance in attempts(quick=2, full=20): ...`."""
    option = request.config.getoption
    counted = Attempts(full=option("--faults") == "full", only=option("--fault-attempt"))
    request.node.stash[_ATTEMPTS] = counted
    return counted


_ATTEMPTS = pytest.StashKey[Attempts]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    mark = item.get_closest_marker("fault")
    if mark is None:
        return report
    counted = item.stash.get(_ATTEMPTS, None)
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.user_properties += [(_ROW, [*mark.args, 0, 0, 0.0]), (_REASON, reason.removeprefix("Skipped: "))]
    elif report.when == "call" or (report.when == "setup" and report.failed):
        if counted and counted.tried:
            values = (counted.tried, counted.survived, counted.worst_s)
            if report.failed and counted.number is not None:
                again = f"attempt {counted.number} failed; to try it alone: --fault-attempt={counted.number}"
                report.sections.append(("attempts", again))
        else:
            values = (1, int(report.passed), call.duration)
        report.user_properties.append((_ROW, [*mark.args, *values]))
    elif report.when == "teardown" and report.failed:
        # What was survived at first glance has left something behind.
        report.user_properties.append((_ROW, [*mark.args, 0, -1, call.duration]))
    return report


class _Table:
    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._rows: list[Row] = []
        self._reasons: dict[str, str] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if self._config.option.collectonly:
            marks = ((item.nodeid, item.get_closest_marker("fault")) for item in session.items)
            self._rows += [Row(*mark.args, 0, 0, 0.0, (test,)) for test, mark in marks if mark]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._rows += [Row(*value, (report.nodeid,)) for name, value in report.user_properties if name == _ROW]
        if reason := dict(report.user_properties).get(_REASON):
            self._reasons[report.nodeid] = reason

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if not self._rows or hasattr(self._config, "workerinput"):
            return
        text = table(self._rows)
        if path := self._config.getoption("--fault-table"):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(text)
        if self._config.option.collectonly:
            return
        terminalreporter.section("faults")
        terminalreporter.write_line(text)
        for test, reason in self._reasons.items():
            terminalreporter.write_line(f"not tried: {test}: {reason}")
