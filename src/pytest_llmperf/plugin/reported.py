"""What is no test, and is reported as one: the run's exit code, the terminal and JUnit files then have it too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

COMPARISONS_ID = "llmperf::comparisons"
"""The node id that the number of comparisons is reported under."""
FAULTS_ID = "llmperf::faults"
"""That of the plugin's own faults."""


def report_as_test(config: pytest.Config, name: str, failure: str) -> None:
    """Report something that is no test as one: failed with this text, or passed, which takes it off the list of `--lf`."""
    from pytest_llmperf.plugin.outlet import clean

    failure = clean(config, failure)
    location = (name.partition("::")[0], None, name)
    phases: tuple[Literal["setup", "call", "teardown"], ...] = ("setup", "call", "teardown")
    config.hook.pytest_runtest_logstart(nodeid=name, location=location)
    for when in phases[bool(failure) :]:
        is_red = when == "call" and bool(failure)
        made: Any = {"outcome": "failed" if is_red else "passed", "longrepr": failure if is_red else None}
        report = pytest.TestReport(nodeid=name, location=location, keywords={}, when=when, **made)
        config.hook.pytest_runtest_logreport(report=report)
    config.hook.pytest_runtest_logfinish(nodeid=name, location=location)


def was_red(config: pytest.Config, name: str) -> bool:
    """Return whether the last run has this among its failures, so that one that passes must be taken off their list."""
    cache = getattr(config, "cache", None)  # absent with -p no:cacheprovider
    failed: Sequence[str] = cache.get("cache/lastfailed", {}) if cache is not None else {}
    return name in failed
