"""What the terminal shows while a run goes on: one changing line, or plain lines where it is no terminal."""

from __future__ import annotations

import contextlib
import shutil
from typing import TYPE_CHECKING, Any

from pytest_llmperf.plugin.outlet import clean
from pytest_llmperf.plugin.private import terminal
from pytest_llmperf.plugin.state import SESSION
from pytest_llmperf.plugin.workers import is_worker, send_progress

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import pytest


def show(config: pytest.Config, text: str) -> None:
    """Show what is going on; nothing with -q or -p no:terminal. What a worker of xdist does, its controller shows."""
    text = clean(config, text)
    if is_worker(config):
        if item := config.stash[SESSION].current:
            send_progress(config, item, text)
        return
    reporter = terminal(config)
    if reporter is None or config.get_verbosity() < 0:
        return
    with _uncaptured(config):
        reporter.ensure_newline()
        # Of several workers each has a line of its own: a changing one would show only who spoke last.
        if reporter.isatty and not config.pluginmanager.hasplugin("dsession"):
            width = shutil.get_terminal_size().columns - 1  # a longer line would wrap, and could not be rewritten
            reporter.rewrite(f"llmperf: {text}"[:width], erase=True)
        else:
            reporter.write_line(f"llmperf: {text}")
        reporter.flush()


def _uncaptured(config: pytest.Config) -> AbstractContextManager[None]:
    capture: Any = config.pluginmanager.getplugin("capturemanager")
    disabled: AbstractContextManager[None] = capture.global_and_fixture_disabled() if capture else contextlib.nullcontext()
    return disabled


def clear(config: pytest.Config) -> None:
    """Take the changing line off a terminal, before pytest writes a result there."""
    reporter = terminal(config)
    if reporter is not None and reporter.isatty and config.get_verbosity() >= 0:
        reporter.ensure_newline()
        reporter.rewrite("", erase=True)
        reporter.write("\r")
