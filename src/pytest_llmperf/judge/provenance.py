"""Where launches came from, and what has changed since. It is compared in messages and decides nothing."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_llmperf.plan.engine import command_line, parse_engine_args

if TYPE_CHECKING:
    from pytest_llmperf.plan.case import Case


@dataclass(frozen=True)
class Provenance:
    """Where launches came from."""

    engine: dict[str, Any]
    """Kind, model, degrees and arguments of the engine."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of what served, and of the plugin."""
    host: dict[str, Any] = field(default_factory=dict)
    commit: str | None = None
    """The commit of the tested project, with `+` where the work tree had changes; None outside a repository."""


def engine_facts(case: Case) -> dict[str, Any]:
    """Return what a baseline records of a case's engine."""
    spec = case.engine
    return {
        "kind": spec.kind,
        "model": spec.model,
        "tp": spec.tp,
        "pp": spec.pp,
        "dp": spec.dp,
        "args": shlex.join(command_line(spec.args)),
        "env": dict(spec.env),
    } | ({"command": spec.command} if spec.command else {})


def changes(before: Provenance, now: Provenance) -> list[str]:
    """Return what differs between the baseline's making and now, one line each."""
    differing = [
        f"engine {name}: {before.engine.get(name)} -> {now.engine.get(name)}"
        for name in ("kind", "model", "tp", "pp", "dp", "command")
        if before.engine.get(name) != now.engine.get(name)
    ]
    old_args, new_args = (
        dict(parse_engine_args(str(provenance.engine.get("args", "")), origin="baseline", verbatim=True))
        for provenance in (before, now)
    )
    differing += _differences("engine argument --", _shown(old_args), _shown(new_args))
    differing += _differences("environment ", before.engine.get("env", {}), now.engine.get("env", {}))
    differing += _differences("version of ", before.versions, now.versions)
    # What an older plugin did not record is not known to have changed.
    return differing + _differences(
        "host ", before.host, {name: value for name, value in now.host.items() if name in before.host}
    )


def _shown(args: dict[str, tuple[str, ...]]) -> dict[str, str]:
    return {name: " ".join(values) or "on" for name, values in args.items()}


def _differences(what: str, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        f"{what}{name}: {before.get(name, 'not set')} -> {now.get(name, 'not set')}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
