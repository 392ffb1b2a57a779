"""What the terminal shows while a run goes on: one changing line, or plain lines where it is no terminal."""

from __future__ import annotations

import contextlib
import shutil
from typing import TYPE_CHECKING, Any

from pytest_llmperf.plugin.private import terminal

if TYPE_CHECKING:
    import pytest


def show(config: pytest.Config, text: str) -> None:
    """Show what is going on; nothing with -q or -p no:terminal."""
    reporter = terminal(config)
    if reporter is None or config.get_verbosity() < 0:
        return
    capture: Any = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
        reporter.ensure_newline()
        if reporter.isatty:
            width = shutil.get_terminal_size().columns - 1  # a longer line would wrap, and could not be rewritten
            reporter.rewrite(f"llmperf: {text}"[:width], erase=True)
        else:
            reporter.write_line(f"llmperf: {text}")
        reporter.flush()


def clear(config: pytest.Config) -> None:
    """Take the changing line off a terminal, before pytest writes a result there."""
    reporter = terminal(config)
    if reporter is not None and reporter.isatty and config.get_verbosity() >= 0:
        reporter.ensure_newline()
        reporter.rewrite("", erase=True)
        reporter.write("\r")
