"""The kinds of engines, one row each: whatever the rest of the program asks of a kind is a column here.

A new kind is a file in `measure/engines/` and a row. The file is named by a text, because rows are read long before anything is
measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from pytest_llmperf.plan.checks import PlanError


@dataclass(frozen=True)
class Kind:
    """One kind of engine."""

    opens: str
    """`module:callable`, looked up when an engine of the kind is opened; called with spec, host, settings, progress and watch."""
    starts: bool = True
    """A run starts and stops it on this host, where it takes GPUs or cores. Others are endpoints that outlive the run."""
    serves: bool = True
    """It has an HTTP server, hence a chat API and LoRA adapters."""
    vllm: bool = False
    """It is started by an interpreter that has vLLM. Kinds that are can take each other's place in a test."""
    commanded: bool = False
    """The user's command line starts it. What its arguments mean, and what its log says, is its own affair."""
    simulated: bool = False
    """Its GPUs are simulated too, and their locks are nobody else's."""


STARTED, ENDPOINT, COMMAND = "server", "url", "command"
"""The kinds that a run has where it names none: usually, with an endpoint, and with a command."""
_ENGINES = "pytest_llmperf.measure.engines"
KINDS: dict[str, Kind] = {
    STARTED: Kind(f"{_ENGINES}.vllm:open_server", vllm=True),
    "offline": Kind(f"{_ENGINES}.offline:open_offline", serves=False, vllm=True),
    ENDPOINT: Kind(f"{_ENGINES}.url:UrlEngine", starts=False),
    COMMAND: Kind(f"{_ENGINES}.command:open_command", commanded=True),
    "simulated": Kind(f"{_ENGINES}.simulated:open_simulated", simulated=True),
}


def kind_of(name: str) -> Kind:
    """Return the row of a kind; raises PlanError for a name that no row has."""
    if name not in KINDS:
        raise PlanError(f"engine={name!r}: must be one of {', '.join(KINDS)}")
    return KINDS[name]


def kind_in_file(kind: str, own: str) -> str:
    """Return a kind as a part of the name of a baseline's file, so that two kinds share none; empty for a test's `own` kind.

    A simulated engine stands for every kind, and its host is no other's.
    """
    return "" if kind == own or kind_of(kind).simulated else kind


def kinds_in_files() -> tuple[str, ...]:
    """Return what `kind_in_file` can be, the test's own first."""
    return ("", *(name for name, kind in KINDS.items() if not kind.simulated))


def exchangeable() -> tuple[str, ...]:
    """Return the kinds that can take each other's place: a test may name one of them, whatever the run's is."""
    return tuple(name for name, kind in KINDS.items() if kind.vllm)
