"""What leaves a run, on its way to the terminal, to JUnit and JSON files: without secrets, and without orders to a terminal.

Everything that the plugin shows comes through here. Text of others (a server's error, an engine's log, a stored baseline) is
cleaned where it leaves, not where it enters: there are many ways in.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from pytest_llmperf.plan.secrets import secrets_of, without
from pytest_llmperf.plugin.private import rewrite, rewrite_interrupt
from pytest_llmperf.plugin.state import SESSION, SessionState
from pytest_llmperf.units import printable

if TYPE_CHECKING:
    import pytest

_LEAST_CHARACTERS = 8
"""Of a variable that nobody has named to us: a shorter value is more likely a word, such as `none`."""
_WORDS = frozenset({
    "baseline", "baselines", "command", "compared", "engine", "engines", "failed", "invalid", "latency", "launch", "launches",
    "llmperf", "measured", "metric", "metrics", "offline", "passed", "pytest", "recorded", "regressed", "requests", "rounds",
    "server", "simulated", "skipped", "throughput", "tolerance", "verdict", "workload",
})  # fmt: skip
"""What every run says: to hide it would tell that it is a secret, and spoil each line."""
_FIELD = re.compile(r"[a-z][a-z0-9_]*")
"""What the names of our own data look like."""
_ENUMERATIONS = frozenset({"status", "metric", "better", "kind"})
"""Fields whose values are names of ours, if they look like one."""
_NAME = re.compile(r"[A-Za-z][\w:-]*")


def clean(config: pytest.Config, text: str) -> str:
    """Return a text as it may leave."""
    return printable(without(text, _secrets(config)))


def clean_data(config: pytest.Config, value: Any) -> Any:
    """Return plain data (dicts, lists, strings and numbers) with each text as it may leave.

    Names of fields and of what we enumerate stay: a secret may begin like one, and without it nobody can read the data.
    """
    secrets = _secrets(config)

    def cleaned(value: Any) -> Any:
        if isinstance(value, str):
            return printable(without(value, secrets))
        if isinstance(value, dict):
            return {
                name if _is(_FIELD, name) else cleaned(name): item
                if name in _ENUMERATIONS and _is(_NAME, item)
                else cleaned(item)
                for name, item in value.items()
            }
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
    return frozenset(secret for secret in known if secret.strip().lower() not in _WORDS)


def _is(names: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and names.fullmatch(value) is not None
