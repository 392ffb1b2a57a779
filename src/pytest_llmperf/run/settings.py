"""The settings of a run, parsed and checked. Whoever drives it makes them: the plugin from its options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_llmperf.plan.secrets import is_secret, secrets_in

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_llmperf.plan.engine import EngineArgs
    from pytest_llmperf.plan.gates import Gate
    from pytest_llmperf.plan.headers import Headers


@dataclass(frozen=True)
class Settings:
    """How a run selects, measures, judges and records."""

    selected: dict[str, tuple[Any, ...]]
    """The values that options name, per axis."""
    kind: str
    urls: dict[str, str]
    """Endpoint name to URL; empty where engines are started."""
    served_model: str | None
    python: str
    engine_args: EngineArgs
    startup_timeout_s: float
    stop_grace_s: float
    stall_timeout_s: float
    baselines: Path
    missing: str
    """What becomes of a case without a baseline: "fail", "skip" or "record"."""
    update: str
    """What is recorded anew: "no", "all" or "new"."""
    extend: bool
    """New launches join those of a stored baseline of the same version."""
    calibrate: bool
    selftest: bool
    gate: tuple[Gate, ...]
    launches: int
    rounds: int
    max_launches: int
    tolerance: float
    fail_inconclusive: bool
    require_gpus: bool
    exclusive: bool
    """No other run's engine may be on the host meanwhile."""
    json_path: Path | None
    idle_s: float | None = None
    """How long each engine idles before its rounds are played again; None: not at all."""
    command: str = ""
    """The command line that starts engines of the kind `command`; empty for other kinds."""
    require_comparisons: int = 0
    """A run that compares fewer cases is red."""
    headers: Headers = field(default=(), repr=False)
    """Of every request to an endpoint."""

    @property
    def secrets(self) -> tuple[str, ...]:
        """Return everything in the options that must stand nowhere: headers, keys, what URLs and the command hold."""
        texts = (*self.urls.values(), self.command, *(value for _, values in self.engine_args for value in values))
        keys = (value for name, values in self.engine_args if is_secret(name) for value in values)
        return (*(value for _, value in self.headers), *keys, *(each for text in texts for each in secrets_in(text)))
