"""xdist: what a worker tells its controller, which decides the exit code, has the terminal, and has collected nothing itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pytest_llmperf.units import printable

if TYPE_CHECKING:
    from typing import NoReturn

_REFUSAL, _USED, _FAULTS = "llmperf_refusal", "llmperf_used", "llmperf_faults"
"""Keys of xdist's `workeroutput`, which a worker sends when it ends."""


def is_worker(config: pytest.Config) -> bool:
    """Return whether this process is a worker of xdist."""
    return hasattr(config, "workerinput")


def is_first(config: pytest.Config) -> bool:
    """Return whether this process is the one that checks what is the same for all: pytest's, or the first worker of xdist."""
    return bool(getattr(config, "workerinput", {}).get("workerid", "gw0") == "gw0")


def refuse(config: pytest.Config, message: str) -> NoReturn:
    """Raise UsageError; where this is a worker, its controller raises it too."""
    message = printable(message)
    if is_worker(config):
        _output(config)[_REFUSAL] = message
    raise pytest.UsageError(message)


def tell_controller(config: pytest.Config, *, used: bool) -> None:
    """Tell the controller, where this is a worker, whether any of its tests measures."""
    if is_worker(config):
        _output(config)[_USED] = used


def send_fault(config: pytest.Config, fault: dict[str, Any]) -> None:
    """Tell the controller what has failed in this worker, when it ends."""
    _output(config).setdefault(_FAULTS, []).append(fault)


def faults_of(node: Any) -> list[dict[str, Any]]:
    """Return what has failed in a worker that has ended."""
    faults: list[dict[str, Any]] = getattr(node, "workeroutput", {}).get(_FAULTS, [])
    return faults


def hear_worker(node: Any) -> bool:
    """Return whether any test of a worker that has ended measures; raises UsageError where it has refused to run."""
    output = getattr(node, "workeroutput", {})  # a worker that was killed has sent none
    if _REFUSAL in output:
        raise pytest.UsageError(output[_REFUSAL])
    return bool(output.get(_USED))


def _output(config: pytest.Config) -> dict[str, Any]:
    output: dict[str, Any] = getattr(config, "workeroutput", {})
    return output


def send_progress(config: pytest.Config, item: pytest.Item, text: str) -> None:
    """Send a line on a report of the running test: of what workers send, xdist passes on nothing else at once.

    It is that of a set-up that passed, which terminals and exporters leave out.
    """
    report = pytest.TestReport(item.nodeid, item.location, {}, "passed", None, "setup")
    worker = config.workerinput["workerid"]  # type: ignore[attr-defined]  # xdist's
    report.llmperf_progress = f"[{worker}] {text}"  # type: ignore[attr-defined]  # travels with xdist
    config.hook.pytest_runtest_logreport(report=report)
