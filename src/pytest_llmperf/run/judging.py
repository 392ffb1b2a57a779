"""Judging: a case against its baseline, and what its test is to be told."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_llmperf.files import is_there
from pytest_llmperf.judge import baseline as store
from pytest_llmperf.judge.diagnosis import advice
from pytest_llmperf.judge.provenance import changes
from pytest_llmperf.judge.verdict import RESTORE, Status, Verdict, observed
from pytest_llmperf.plan.kinds import ENDPOINT
from pytest_llmperf.run.cases import Answer
from pytest_llmperf.run.recording import is_recorded, moved, record
from pytest_llmperf.run.rules import possible_cases, possible_files

if TYPE_CHECKING:
    from pytest_llmperf.plan.marker import Marker
    from pytest_llmperf.run.cases import CaseState, Planned
    from pytest_llmperf.run.rules import Rules


def compare(rules: Rules, state: CaseState, marker: Marker) -> Answer:
    """Return whether the case is as good as its baseline; where that was asked for, the baseline is recorded instead.

    The state takes the answer too. An unusable file makes the case INVALID.
    """
    try:
        stored = rules.stored(state.case)
    except store.BaselineError as error:
        verdict = Verdict(Status.INVALID, observed(state.launches, None), (str(error),), launches=len(state.launches))
        answer = Answer(verdict, failure=str(error))
    else:
        recorded = is_recorded(rules, stored=stored is not None)
        answer = record(rules, state, stored, marker) if recorded else _judged(rules, state, stored, marker)
    state.take(answer)
    return answer


def known_failure(rules: Rules, plan: Planned) -> Answer | None:
    """Return the answer to a test that will meet no usable baseline, before an engine is started for it; None for others.

    A test may compare only some of its cases: it is let run where any file exists that it could ask for. An unusable or doubted
    file of a further measurement is told when that is compared: it may be left of one that the test has no more.
    """
    if not plan.compares:
        return None
    try:
        stored = [rules.reader.read(path) for path in rules.first_files(plan).values()]
    except store.BaselineError as error:
        return Answer(Verdict(Status.INVALID, reasons=(str(error),)), failure=str(error))
    doubts = [doubt for baseline in stored if baseline for doubt in baseline.doubts]
    if doubts and not is_recorded(rules, stored=True):
        return Answer(Verdict(Status.NOT_COMPARABLE, reasons=(*doubts, RESTORE)))
    # The fixture `llm_engine_url` may have an endpoint measured in the place of the planned engine.
    kinds = dict.fromkeys(("", plan.file_kind, ENDPOINT))
    possible = possible_files(rules, plan, rules.host.key, kinds)
    if is_recorded(rules, stored=False) or any(map(is_there, possible)):
        return None
    return _missing(rules, next(possible_cases(rules, plan)), plan.file_kind, Verdict(Status.NO_BASELINE))


def _missing(rules: Rules, case_id: str, file_kind: str, verdict: Verdict) -> Answer:
    notes = (
        f"no baseline is stored for {rules.host.key}: {rules.shown(rules.path(case_id, file_kind))} does not exist",
        f"record it with: pytest --update-baselines '{case_id.partition('#')[0]}'",
    )
    return Answer(verdict, notes, skip=notes[0] if rules.settings.missing == "skip" else None)


def _judged(rules: Rules, state: CaseState, stored: store.Baseline | None, marker: Marker) -> Answer:
    verdict = rules.verdict(state, stored, marker)
    if verdict.status is Status.UNDECIDED:
        return Answer(verdict)
    if stored is None:
        return _missing(rules, state.case.id, state.case.file_kind, verdict)
    accepted = verdict.status.green or (verdict.status is Status.INCONCLUSIVE and not rules.settings.fail_inconclusive)
    return Answer(verdict, _explained(rules, verdict, state, stored), accepted)


def _explained(rules: Rules, verdict: Verdict, state: CaseState, stored: store.Baseline) -> tuple[str, ...]:
    """Return what is to be said of the baseline's file, what has changed since it was recorded, and which setting to move."""
    notes_of_file = [*moved(state.case, stored), *store.without_checksum(stored)]
    if verdict.status is Status.PASS:
        return tuple(notes_of_file)
    changed = changes(stored.provenance, rules.provenance(state))
    notes = [f"changed since the baseline: {line}" for line in changed]
    if not changed:
        notes = ["nothing that is recorded has changed since the baseline (engine arguments, versions, host)"]
    if stored.provenance.commit:
        notes.append(f"the baseline was recorded at commit {stored.provenance.commit}, {stored.launches[0].started}")
    spec = state.case.engine
    return (*notes_of_file, *notes, *advice(verdict, dict(spec.args), {"tp": spec.tp, "pp": spec.pp}))
