"""What leaves a run, on its way to the terminal, to JUnit and JSON files: without secrets, and without orders to a terminal.

Everything that the plugin shows comes through here. Text of others (a server's error, an engine's log, a stored baseline) is
cleaned where it leaves, not where it enters: there are many ways in.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from pytest_llmperf.plan.secrets import secrets_of, without
from pytest_llmperf.plugin.private import rewrite, rewrite_interrupt
from pytest_llmperf.plugin.state import SESSION, SessionState
from pytest_llmperf.units import printable

if TYPE_CHECKING:
    import pytest

_LEAST_CHARACTERS = 8
"""Of a variable that nobody has named to us: a shorter value is more likely a word, such as `none`."""


def clean(config: pytest.Config, text: str) -> str:
    """Return a text as it may leave."""
    return printable(without(text, _secrets(config)))


def clean_data(config: pytest.Config, value: Any) -> Any:
    """Return plain data (dicts, lists, strings and numbers) with each text as it may leave."""
    secrets = _secrets(config)

    def cleaned(value: Any) -> Any:
        if isinstance(value, str):
            return printable(without(value, secrets))
        if isinstance(value, dict):
            return {cleaned(name): cleaned(item) for name, item in value.items()}
        return [cleaned(item) for item in value] if isinstance(value, (list, tuple)) else value

    return cleaned(value)


def clean_report(config: pytest.Config, report: pytest.TestReport) -> None:
    """Clean what a report says of a failure or a skip, the values of local variables too."""
    secrets = _secrets(config)
    rewrite(report, lambda text: printable(without(text, secrets)))


def clean_interrupt(config: pytest.Config) -> None:
    """Clean what the terminal will say of an interruption."""
    secrets = _secrets(config)
    rewrite_interrupt(config, lambda text: printable(without(text, secrets)))


def _secrets(config: pytest.Config) -> frozenset[str]:
    """Return every secret that is known now: of the environment, the options, the tests, and of each engine so far."""
    state = config.stash.setdefault(SESSION, SessionState())  # options are read before the plugin is configured
    known = {value for value in secrets_of(os.environ) if len(value) >= _LEAST_CHARACTERS} | state.secrets
    known.add(os.environ.get("LLMPERF_API_KEY", ""))
    known.update(state.settings.secrets if state.settings else ())
    known.update(state.run.pool.secrets if state.run else ())
    return frozenset(known)
