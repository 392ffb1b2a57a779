"""Where launches came from, and what has changed since.

Model and kind of engine must be alike for two to be compared; all else is compared in messages and decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_llmperf.measure.host.model import config_hash
from pytest_llmperf.plan.axes import short_model
from pytest_llmperf.plan.checks import PlanError
from pytest_llmperf.plan.engine import parse_engine_args, shown_args
from pytest_llmperf.plan.kinds import kind_of
from pytest_llmperf.plan.secrets import is_secret, shown, shown_value

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_llmperf.measure.measurement import Launch
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
    """Return what a baseline records of a case's engine: of its secrets only that they are set."""
    spec = case.engine
    return {
        "kind": spec.kind,
        "model": spec.model,
        "tp": spec.tp,
        "pp": spec.pp,
        "dp": spec.dp,
        "args": shown_args(spec.args),
        "env": {name: shown_value(name, value) for name, value in spec.env},
    } | ({"command": shown(spec.command)} if spec.command else {})


def model_facts(case: Case, launches: Sequence[Launch] = ()) -> dict[str, Any]:
    """Return what a baseline records of a case's model beside its name: its config.json as a hash, or what an endpoint serves."""
    if not kind_of(case.engine.kind).starts:
        served = list(dict.fromkeys(launch.model for launch in launches if launch.model))
        return {"served_model": ", ".join(served)} if served else {}
    config = config_hash(case.engine.model)
    return {"model_config": config} if config else {}


def unlike(before: dict[str, Any], now: dict[str, Any]) -> tuple[str, ...]:
    """Return why two engines cannot be held against each other: another kind, or another model.

    What a file does not say, because an older plugin wrote it, is not known to be different.
    """
    if "kind" in before and before["kind"] != now["kind"]:
        return (f"engine kind: {before['kind']} -> {now['kind']}",)
    if not kind_of(now["kind"]).starts:
        old, new = before.get("served_model"), now.get("served_model")
        return (f"model: {old} -> {new}",) if old and new and old != new else ()
    old, new = before.get("model"), now["model"]
    if old is None or _same_model(before, now):
        return ()
    return (f"model: {old} -> {new}" + (" (its config.json is another one)" if old == new else ""),)


def _same_model(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Return whether two engines have the same model: by content where it is known of both, else by name."""
    stored, config = before.get("model_config"), now.get("model_config")
    if stored and config:
        return bool(stored == config)
    old, new = str(before.get("model")).rstrip("/"), str(now["model"]).rstrip("/")
    # An older plugin has not recorded the content of a folder, whose path may be another one now, as that of a checkout.
    return short_model(old) == short_model(new) if config else old == new


def changes(before: Provenance, now: Provenance) -> list[str]:
    """Return what differs between the baseline's making and now, one line each."""
    named = ["kind", "model", "served_model", "tp", "pp", "dp"]
    if before.engine.get("model_config") and before.engine.get("model_config") == now.engine.get("model_config"):
        named.remove("model")  # the same one by another path
    if not before.engine.get("served_model"):
        named.remove("served_model")
    differing = [
        f"engine {name}: {before.engine.get(name)} -> {now.engine.get(name)}"
        for name in named
        if before.engine.get(name) != now.engine.get(name)
    ]
    # A file of an older plugin may hold secrets in plain text: they are compared no more, and never shown.
    differing += _differences("engine ", _command(before), _command(now))
    differing += _differences("engine argument --", _arguments(before), _arguments(now))
    differing += _differences("environment ", _environment(before), _environment(now))
    differing += _software(before.versions, now.versions)
    # What an older plugin did not record is not known to have changed.
    return differing + _differences(
        "host ", before.host, {name: value for name, value in now.host.items() if name in before.host}
    )


_SHARED = frozenset({"torch", "cuda", "pytest-llmperf"})
"""What versions are told of besides the software that serves."""


def _software(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Return the versions that differ; where other software serves, that it does."""
    old, new = ({name: version for name, version in versions.items() if name not in _SHARED} for versions in (before, now))
    if not old or not new or old.keys() & new.keys():
        return _differences("version of ", before, now)
    names = (", ".join(f"{name} {version}" for name, version in sorted(versions.items())) for versions in (old, new))
    others = ({name: version for name, version in versions.items() if name in _SHARED} for versions in (before, now))
    return [f"software: {' -> '.join(names)}", *_differences("version of ", *others)]


def _command(provenance: Provenance) -> dict[str, str]:
    command = provenance.engine.get("command")
    return {"command": shown(str(command))} if command else {}


def _arguments(provenance: Provenance) -> dict[str, str]:
    """Return the engine arguments as they are shown, without those that are secrets: another key makes no other engine.

    What somebody has made of a stored command line by hand may be none: it is one argument then.
    """
    text = str(provenance.engine.get("args", ""))
    try:
        args = parse_engine_args(text, origin="baseline", verbatim=True)
    except PlanError:
        return {shown(text): "on"}
    return {name: " ".join(map(shown, values)) or "on" for name, values in args if not is_secret(name)}


def _environment(provenance: Provenance) -> dict[str, str]:
    env = provenance.engine.get("env", {})
    return {name: shown(str(value)) for name, value in env.items() if not is_secret(name)}


def _differences(what: str, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        f"{what}{name}: {before.get(name, 'not set')} -> {now.get(name, 'not set')}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
