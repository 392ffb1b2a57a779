"""What reports bring is collected in the one process that sees all of them: the same with and without xdist."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_llmperf.plugin.guard import guarded, hear
from pytest_llmperf.plugin.state import SESSION
from pytest_llmperf.plugin.workers import faults_of, hear_worker


class Collector:
    """Collects what reports bring, in the one process that sees all of them: the same with and without xdist."""

    def __init__(self, config: pytest.Config) -> None:
        """Note whose reports these are."""
        self.config = config
        self._state = config.stash[SESSION]

    @guarded()
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the outcomes that ride on a report, and write them; show what a worker of xdist is doing."""
        brought = getattr(report, "llmperf", [])
        self._state.outcomes += brought
        self._state.selftests += getattr(report, "llmperf_selftest", [])
        if brought:
            from pytest_llmperf.plugin.session import write_results

            write_results(self.config)
        if text := getattr(report, "llmperf_progress", None):
            from pytest_llmperf.plugin.progress import show

            show(self.config, text)

    @pytest.hookimpl(trylast=True)  # the terminal's comes first
    @guarded()
    def pytest_keyboard_interrupt(self) -> None:
        """Let what is said of an interruption hold no secret."""
        if self._state.used:
            from pytest_llmperf.plugin.outlet import clean_interrupt

            clean_interrupt(self.config)

    @pytest.hookimpl(optionalhook=True)
    @guarded()
    def pytest_testnodedown(self, node: Any) -> None:
        """Hear what a worker of xdist has to tell."""
        hear(self.config, faults_of(node))
        self._state.used |= hear_worker(node)
