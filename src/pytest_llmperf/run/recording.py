"""Recording: the launches of a case become its baseline, or join it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from pytest_llmperf.files import is_file, is_there
from pytest_llmperf.judge import baseline as store
from pytest_llmperf.judge.calibration import calibrated, noise_of
from pytest_llmperf.judge.gates import gates_of
from pytest_llmperf.judge.lacking import lacking, lost, sentence, without
from pytest_llmperf.judge.provenance import changes
from pytest_llmperf.judge.verdict import Status, Verdict, not_comparable, observed
from pytest_llmperf.plan.kinds import exchangeable
from pytest_llmperf.report.text import metric_line
from pytest_llmperf.run.cases import Answer, Recording, RunError
from pytest_llmperf.units import counted

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from pytest_llmperf.judge.gates import Tolerance
    from pytest_llmperf.judge.maths.stats import Design
    from pytest_llmperf.plan.case import Case
    from pytest_llmperf.plan.marker import Marker
    from pytest_llmperf.plan.workload import Workload
    from pytest_llmperf.run.cases import CaseState
    from pytest_llmperf.run.rules import Rules


def is_recorded(rules: Rules, *, stored: bool) -> bool:
    """Return whether a case's baseline is recorded, and not compared with."""
    settings = rules.settings
    new_too = settings.update == "new" or settings.missing == "record"
    return settings.update == "all" or settings.calibrate or (new_too and not stored)


def to_be_recorded(rules: Rules) -> list[Path]:
    """Return the files that this run will write, as far as is known before anything is measured: of each test the first."""
    plans = rules.compared.values()
    files = ((rules.path(plan.case_id, plan.file_kind), rules.files.get(plan.case_id)) for plan in plans)
    return [path for path, stored_at in files if is_recorded(rules, stored=bool(stored_at and is_file(stored_at)))]


def record(rules: Rules, state: CaseState, stored: store.Baseline | None, marker: Marker) -> Answer:
    """Return the baseline that a case's launches come to, to be written when its test has passed."""
    case, settings = state.case, rules.settings
    served = list(dict.fromkeys(launch.model for launch in state.launches))
    if len(served) > 1:
        why = f"the endpoint has changed its model meanwhile: {' -> '.join(served)}"
        return Answer(Verdict(Status.NOT_COMPARABLE, observed(state.launches, None), (why,)), failure=f"not recorded: {why}")
    gated, design = rules.gates(marker, case.workload.description), rules.design(marker)
    complete = len(state.launches) >= settings.launches
    if fault := _without_a_gate(state, gated, lacking(state.launches, gated, design, case.workload, complete=complete)):
        rows = observed(state.launches, stored.launches if stored else None)
        return Answer(Verdict(Status.NOT_COMPARABLE, rows, (fault,), len(state.launches)), failure=f"{case.id}: {fault}")
    if not complete:
        return Answer(None)
    new = store.Baseline(
        case_id=case.id,
        host=rules.host.key,
        workload=case.workload.description,
        workload_fingerprint=case.workload.fingerprint,
        provenance=rules.provenance(state),
        launches=tuple(launch.keeping(gated) for launch in state.launches),
    )
    return _joined(rules, state, new, marker, stored, extend=settings.extend)


def _joined(
    rules: Rules, state: CaseState, new: store.Baseline, marker: Marker, stored: store.Baseline | None, *, extend: bool
) -> Answer:
    """Return the baseline that new launches and the stored ones come to, and what is told of it."""
    case, settings = state.case, rules.settings
    gated, design = rules.gates(marker, new.workload), rules.design(marker)
    other = _other_version(rules, state, stored, new, marker) if stored and extend else []
    if other and stored and settings.calibrate:
        verdict = Verdict(Status.NOT_COMPARABLE, observed(state.launches, stored.launches), tuple(other))
        return Answer(verdict, failure=_REFUSED.format("\n  ".join(other)))
    merged, how = _merged(stored, new, other, extend=extend)
    rows = observed(state.launches, stored.launches if stored else None, gated)
    if settings.calibrate:
        rows = calibrated(rows, merged, gated, design)
        merged = replace(merged, noise=noise_of(rows))
    path = rules.path(case.id, case.file_kind)
    verdict = Verdict(Status.RECORDED, rows, launches=len(state.launches), baseline_launches=len(merged.launches))
    notes = [f"recorded {rules.shown(path)}: {how}", *moved(case, stored)]
    merged, said = _without_what_lacks(merged, stored, gated, design, case.workload)
    notes += said
    recording = Recording(
        path,
        merged,
        before=stored,
        path_now=partial(rules.path, case.id, case.file_kind),
        stored_now=partial(rules.stored, case),
        anew=partial(_joined_late, rules, state, new, marker),
        kept=_kept(rules, case, stored),
    )
    return Answer(verdict, tuple(notes), accepted=True, record=recording)


def _joined_late(rules: Rules, state: CaseState, new: store.Baseline, marker: Marker, stored: store.Baseline | None) -> Answer:
    """Return what new launches come to with a baseline that was stored while they were measured.

    Those that are recorded because nothing was stored never replace it, --llmperf-update=replace or not.
    """
    settings = rules.settings
    new_only = settings.update != "all" and not settings.calibrate
    if stored and new_only and (other := _other_version(rules, state, stored, new, marker)):
        why = f"another run has recorded it meanwhile, of another version: {'; '.join(other)}"
        return Answer(Verdict(Status.NOT_COMPARABLE, observed(state.launches, stored.launches), tuple(other)), failure=why)
    return _joined(rules, state, new, marker, stored, extend=settings.extend or new_only)


def moved(case: Case, stored: store.Baseline | None) -> list[str]:
    """Return that a baseline was recorded under another id; empty where it was not."""
    if stored is None or stored.case_id == case.id:
        return []
    return [f"the baseline was recorded as {stored.case_id}"]


def _without_what_lacks(
    new: store.Baseline, stored: store.Baseline | None, gated: Mapping[str, Tolerance], design: Design, workload: Workload
) -> tuple[store.Baseline, list[str]]:
    """Return a baseline that names what it can never be compared by, and what is to be said of it.

    What the table has gate by default is named too where the project has switched it off: it may be switched on again.
    """
    lacks = lacking(new.launches, gates_of((), new.workload, tolerance=design.tolerance) | dict(gated), design, workload)
    notes = [sentence(of_gates)] if (of_gates := {name: why for name, why in lacks.items() if name in gated}) else []
    if stored and (gone := lost(stored.launches, of_gates, gated, design, workload)):
        notes.append(f"the stored baseline was compared by {', '.join(gone)}; this one is no more")
    return replace(new, launches=without(new.launches, lacks), lacking=lacks), notes


def _without_a_gate(state: CaseState, gated: Mapping[str, Tolerance], lacks: Mapping[str, str]) -> str | None:
    """Return why no baseline may be recorded: a metric that the project has named as a gate could never fire."""
    asked = [f"  {name}: {why}" for name, why in lacks.items() if gated[name].asked]
    if not asked:
        return None
    warnings = dict.fromkeys(f"  {text}" for launch in state.launches for text in launch.warnings)
    return "\n".join([
        "no baseline is recorded, because what is to gate could never be compared:", *asked, *warnings,
        "Take it off the gates (gate= of the marker, --llmperf-gate), or measure what it needs.",
    ])  # fmt: skip


def _kept(rules: Rules, case: Case, stored: store.Baseline | None) -> tuple[Path, store.Baseline] | None:
    """Return a baseline of another kind of engine that the new one would replace, and its own file.

    Before kinds had files of their own, they shared the test's; only two that can take each other's place did. One with doubts
    is not kept: written anew it would have none.
    """
    if stored and stored.doubts:
        return None
    kind = stored.provenance.engine.get("kind") if stored else None
    if stored is None or case.file_kind or kind == case.engine.kind or not {kind, case.engine.kind}.issubset(exchangeable()):
        return None
    path = rules.path(case.id, str(kind))
    return None if is_there(path) else (path, stored)


_REFUSED = """--llmperf-calibrate: this is not what the stored baseline was recorded of:
  {}
Accept it first with --update-baselines, or add --llmperf-update=replace."""


def _merged(stored: store.Baseline | None, new: store.Baseline, other: list[str], *, extend: bool) -> tuple[store.Baseline, str]:
    """Return what is to be stored, and how it came about; `other` says why the stored launches are of another version."""
    count = counted(len(new.launches), "launch")
    if stored is None:
        return new, f"new, {count}"
    if not extend:
        return new, f"{count} in place of {len(stored.launches)}, as --llmperf-update=replace says"
    if other:
        return new, f"{count} in place of {len(stored.launches)}, which were of another version: {'; '.join(other)}"
    merged = store.extended(stored, new)
    return merged, f"extended by {count} of the same version to {len(merged.launches)}, from {counted(merged.jobs, 'run')}"


def _other_version(rules: Rules, state: CaseState, stored: store.Baseline, new: store.Baseline, marker: Marker) -> list[str]:
    """Return why the launches must not join the stored ones; empty when they are of the same version, and agree."""
    reasons = [*dict.fromkeys((*not_comparable(state.measurement, stored), *changes(stored.provenance, new.provenance)))]
    rounds = {len(launch.rounds) for launch in (*stored.launches, *new.launches)}
    if len(rounds) > 1:
        reasons.append(f"launches of {min(rounds)} and of {counted(max(rounds), 'round')} are not alike")
    if not reasons:
        # Versions say nothing of an engine that is built from a work tree: the numbers do.
        verdict = rules.verdict(state, stored, marker, launches=len(state.launches))
        shifted = (Status.REGRESSED, Status.IMPROVED, Status.NOT_COMPARABLE)
        reasons = [metric_line(row) for row in verdict.metrics if row.status in shifted]
        gated, design = rules.gates(marker, new.workload), rules.design(marker)
        before, now = (lacking(side, gated, design, state.case.workload) for side in (stored.launches, state.launches))
        reasons += [f"{name} could not be compared before" for name in before if name not in now]
    return reasons


def settle(states: Iterable[CaseState], *, passed: bool) -> None:
    """Write the baselines that a test has recorded; a test that failed moves none. Raises RunError where one can't be written."""
    failure = ""
    for state in states:
        if not state.record:
            continue
        why = failure if passed else "because the test failed or was skipped"
        if not why:
            why = failure = _written(state, state.record)
        if why and state.verdict and state.verdict.status is Status.RECORDED:
            state.verdict = Verdict(Status.MEASURED, observed(state.launches, None), launches=len(state.launches))
            state.notes = (f"not recorded, {why}",)
        state.record = None
    if failure:
        raise RunError(f"The baseline is not recorded, {failure}.")


class _RefusedError(Exception):
    """What is stored by now is not to be replaced."""


def _written(state: CaseState, recording: Recording) -> str:
    """Write what a case has recorded; return why that failed, empty where it did not.

    What another run has stored since the case was judged is kept: the launches join that too, or replace it knowingly.
    """

    def latest(path: Path) -> store.Baseline:
        now, made = recording.stored_now(), recording
        if now != recording.before or path != recording.path:
            answer = recording.anew(now)
            if answer.record is None:
                raise _RefusedError(answer.failure)
            state.take(answer)
            made = answer.record
        if made.kept and not is_there(made.kept[0]):
            store.save(*made.kept)
        return made.baseline

    try:
        store.amend(recording.path_now, latest)
    except OSError as error:
        return f"because {recording.path} cannot be written ({error.strerror or error}); see --llmperf-baselines"
    except (_RefusedError, store.BaselineError) as error:
        return f"because {error}"
    return ""
