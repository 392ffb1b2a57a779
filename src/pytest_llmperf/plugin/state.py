"""What the plugin keeps: one value for the session and one for each test that measures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pytest_llmperf.judge.maths.stats import Decision
    from pytest_llmperf.report.outcome import Outcome
    from pytest_llmperf.run.cases import CaseState, Planned
    from pytest_llmperf.run.launches import Run
    from pytest_llmperf.run.settings import Settings
    from pytest_llmperf.run.turns import Turns


@dataclass(frozen=True)
class Fault:
    """Something that the core has raised, or a hook that it called, and no code of it expects."""

    hook: str
    about: str
    """The test that it was about; empty where it was about all."""
    error: str
    place: str
    """The innermost line of code that it went through."""
    trace: str
    foreign: bool = False
    """A hook of somebody else has raised it, which the core had called."""

    @property
    def text(self) -> str:
        """Return what has failed, in one line."""
        about = f", {self.about}" if self.about else ""
        if self.foreign:
            return f"{self.error}, raised by {self.place} in a hook that pytest-llmperf called ({self.hook}{about})"
        return f"pytest-llmperf itself failed ({self.hook}{about}): {self.error}, at {self.place}"


@dataclass
class SessionState:
    """What is kept of a session; set up step by step, as pytest goes on."""

    outcomes: list[dict[str, Any]] = field(default_factory=list)
    """The outcomes that reports brought, as plain data, in the order in which they became final."""
    selftests: list[dict[str, Any]] = field(default_factory=list)
    """What the self-test of each gate came to, as plain data."""
    settings: Settings | None = None
    """The options, once they were asked for."""
    refusal: str | None = None
    """Why the settings are unusable, where that was seen in the middle of collection."""
    used: bool = False
    """A test measures, be it in a worker of xdist."""
    current: pytest.Item | None = None
    """The test that runs now."""
    secrets: set[str] = field(default_factory=set, repr=False)
    """What the markers of tests have given engines, and must stand nowhere."""
    deselected: int = 0
    """How many tests the options excluded; other plugins deselect for reasons of their own."""
    collected: tuple[str, ...] = ()
    """The ids of all cases that were collected, deselected ones too."""
    run: Run | None = None
    """The run, where there are llmperf tests that can be measured in this process."""
    turns: Turns[pytest.Item] | None = None
    streamed: bool = False
    """The JSON text is written into a device or a pipe, which cannot be written anew."""
    session: pytest.Session | None = None
    """pytest's own."""
    faults: list[Fault] = field(default_factory=list)
    """What the core has raised unforeseen."""
    traces: list[list[str]] = field(default_factory=list)
    """The lines of their tracebacks, as far as pytest's cache has them."""
    faults_reported: int = 0
    """How many of them stand in a report."""
    unplanned: set[str] = field(default_factory=set)
    """The tests, without parameters, whose grid could not be made because of such a fault."""
    suite: Decision | None = None
    """The verdict on all comparisons together."""


@dataclass
class ItemState:
    """What is kept of a test that measures."""

    planned: Planned
    states: list[CaseState] = field(default_factory=list)
    """The cases that it has measured, in the order of its calls."""
    left_out: list[Outcome] = field(default_factory=list)
    """The degrees that a sweep left out, because this host cannot run them."""
    unmeasured: list[Outcome] = field(default_factory=list)
    """What came of its cases, where that is known before an engine is started."""
    properties: list[tuple[str, Any]] = field(default_factory=list)
    """The JUnit properties that it had before it ran for the first time."""
    published: bool = False
    """Its set-up and call are reported."""


AXES_FIXTURE = "llmperf_axes"
"""Every test that measures asks for it, if only by way of others."""
SESSION = pytest.StashKey[SessionState]()
ITEM = pytest.StashKey[ItemState]()


def settings_of(config: pytest.Config) -> Settings:
    """Return the options, parsed and checked once; raises UsageError that names option, value and remedy."""
    state = config.stash[SESSION]
    if state.settings is None:
        from pytest_llmperf.plugin.settings import read_settings  # only where an option is used or a test measures

        state.settings = read_settings(config)
    return state.settings


def run_of(config: pytest.Config) -> Run:
    """Return the run, where one was prepared: without it no test is run."""
    run = config.stash[SESSION].run
    assert run is not None
    return run
