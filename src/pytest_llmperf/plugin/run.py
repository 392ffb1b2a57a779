"""What a run knows of its cases: the launches measured so far, the stored baselines, and the verdicts."""

from __future__ import annotations

import subprocess
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

import pytest

import pytest_llmperf
from pytest_llmperf.judge import baseline as store
from pytest_llmperf.judge import diagnosis
from pytest_llmperf.judge.stats import Design
from pytest_llmperf.judge.verdict import Status, Verdict, fit_priors, judge, observed
from pytest_llmperf.measure import Measurement
from pytest_llmperf.measure.metrics import GATING
from pytest_llmperf.plan import Case, Workload
from pytest_llmperf.plugin.collection import PLANNED
from pytest_llmperf.report import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from pytest_llmperf.judge.stats import Prior
    from pytest_llmperf.measure import Launch
    from pytest_llmperf.measure.host import Host
    from pytest_llmperf.plugin.collection import Planned
    from pytest_llmperf.plugin.settings import Settings


_MOST_MEASUREMENTS = 9
"""How many measurements of one test are looked for among the stored baselines when the comparisons are counted."""


class Undecided(BaseException):
    """A test cannot be told yet: it will run again on another engine start. Not an Exception, so that no test swallows it."""


@dataclass
class CaseState:
    """One case on its way to a verdict."""

    case: Case
    launches: tuple[Launch, ...] = ()
    starts: frozenset[int] = frozenset()
    """The engine starts that it was measured on."""
    verdict: Verdict | None = None
    decided: bool = False
    """No further launch is needed."""
    notes: list[str] = field(default_factory=list)
    pending: tuple[Path, store.Baseline] | None = None
    """The baseline to be written if the test passes."""

    @property
    def measurement(self) -> Measurement:
        """Return the launches so far, as the test sees them."""
        return Measurement(self.case, self.launches)


class Run:
    """The cases of this run. Judging and recording happen here, once for every comparison that a test makes."""

    def __init__(self, items: list[pytest.Item], settings: Settings, host: Host, rootpath: Path, collected: list[str]) -> None:
        """Freeze what must not depend on any measurement: how many comparisons there are, and the error rates."""
        self.settings = settings
        self.host = host
        self.states: dict[str, CaseState] = {}
        self._rootpath = rootpath
        self._collected = collected
        plans = [item.stash[PLANNED] for item in items if PLANNED in item.stash]
        self._ids = [case_id for plan in plans if plan.compares for case_id in self._measured_by(plan.case_id)]
        self._comparisons = max(1, len(self._ids) * len(GATING))
        self._priors: dict[tuple[str, str], Prior] | None = None
        self._commit: str | None = None

    def _measured_by(self, case_id: str) -> list[str]:
        """Return the cases of a test: its first measurement, and the further ones that have a baseline."""
        further = (f"{case_id}#{number}" for number in range(2, _MOST_MEASUREMENTS + 1))
        return [case_id, *(one for one in further if self.path(one).is_file())]

    def path(self, case_id: str) -> Path:
        """Return the baseline file of a case."""
        return store.path_for(self.settings.baselines, self.host.key, case_id)

    def unused_baselines(self) -> list[str]:
        """Return the baselines that no test uses any more, relative to the rootdir."""
        gone = store.unused(self.settings.baselines, self.host.key, self._rootpath, self._collected)
        return [self._shown(path) for path in gone]

    def stored_and_new(self) -> tuple[int, int]:
        """Return how many of the run's cases have a baseline, and how many have none."""
        found = sum(self.path(case_id).is_file() for case_id in self._ids)
        return found, len(self._ids) - found

    def compare(self, state: CaseState, tolerance: float | None) -> bool:
        """Return whether the case is as good as its baseline; records the baseline instead where that was asked for.

        Raises Undecided for another launch, and BaselineError for an unusable file.
        """
        path = self.path(state.case.id)
        stored = store.load(path)
        new_too = self.settings.update == "new" or self.settings.missing == "record"
        if self.settings.update == "all" or (stored is None and new_too):
            self._record(state, path)
            return True
        design = Design(
            tolerance=tolerance or self.settings.tolerance,
            comparisons=self._comparisons,
            launches=self.settings.max_launches,
        )
        verdict = state.verdict = judge(state.measurement, stored, design=design, priors=self._fitted(stored))
        if verdict.status is Status.UNDECIDED:
            raise Undecided
        state.decided = True
        if stored is None:
            state.notes = [
                f"no baseline is stored for {self.host.key}: {self._shown(path)} does not exist",
                f"record it with: pytest --update-baselines '{state.case.id.partition('#')[0]}'",
            ]
            if self.settings.missing == "skip":
                pytest.skip(state.notes[0])
        else:
            state.notes = self._explain(verdict, state, stored)
        accepted = {Status.PASS, Status.IMPROVED} | (set() if self.settings.fail_inconclusive else {Status.INCONCLUSIVE})
        return verdict.status in accepted

    def _explain(self, verdict: Verdict, state: CaseState, stored: store.Baseline) -> list[str]:
        if verdict.status is Status.PASS:
            return []
        changed = diagnosis.changes(stored.provenance, self._provenance(state))
        notes = [f"changed since the baseline: {line}" for line in changed]
        if not changed:
            notes = ["nothing that is recorded has changed since the baseline (engine arguments, versions, host)"]
        if stored.provenance.commit:
            notes.append(f"the baseline was recorded at commit {stored.provenance.commit}, {stored.launches[0].started}")
        spec = state.case.engine
        return notes + diagnosis.advice(verdict, dict(spec.args), {"tp": spec.tp, "pp": spec.pp})

    def _record(self, state: CaseState, path: Path) -> None:
        if len(state.launches) < self.settings.launches:
            raise Undecided
        case = state.case
        new = store.Baseline(
            case_id=case.id,
            host=self.host.key,
            workload=asdict(case.workload),
            workload_fingerprint=case.workload.fingerprint,
            provenance=self._provenance(state),
            launches=state.launches,
        )
        state.pending = (path, new)
        rows = observed(state.launches, None)
        state.verdict = Verdict(Status.RECORDED, rows, launches=len(state.launches))
        state.notes = [f"recorded {self._shown(path)}"]
        state.decided = True

    def settle(self, states: list[CaseState], *, passed: bool) -> None:
        """Write the baselines that a test has recorded; a test that failed moves none."""
        for state in states:
            if state.pending and passed:
                store.save(*state.pending)
            elif state.pending:
                state.verdict = Verdict(Status.MEASURED, observed(state.launches, None), launches=len(state.launches))
                state.notes = ["not recorded, because the test failed"]
            state.pending = None

    def unmeasured(self, plan: Planned, *, skipped: bool, why: str) -> Outcome:
        """Return the outcome of a test that ended before it measured anything."""
        status = Status.SKIPPED if skipped else Status.INVALID
        verdict = Verdict(status, reasons=(why.partition("\n")[0],))
        engine = store.engine_facts(Case(plan.case_id, plan.spec, Workload()))
        return Outcome(plan.case_id, plan.case_id, status, verdict, (), engine, {})

    def _shown(self, path: Path) -> str:
        return str(path.relative_to(self._rootpath) if path.is_relative_to(self._rootpath) else path)

    def _provenance(self, state: CaseState) -> store.Provenance:
        host = asdict(self.host)
        host["gpus"] = list(self.host.gpus)
        versions = {**state.launches[-1].versions, "pytest-llmperf": pytest_llmperf.__version__}
        return store.Provenance(store.engine_facts(state.case), versions, host, self._head())

    def _head(self) -> str | None:
        if self._commit is None:
            command = [
                "git",
                "-C",
                str(self._rootpath),
                "describe",
                "--always",
                "--dirty=+",
                "--abbrev=12",
                "--exclude=*",
            ]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
            except (OSError, subprocess.SubprocessError):
                return None
            self._commit = done.stdout.strip()
        return self._commit or None

    def _fitted(self, stored: store.Baseline | None) -> dict[str, Prior]:
        """Return per metric of a case the noise that the suite's baselines lead to expect; nothing measured now enters it."""
        if stored is None:
            return {}
        if self._priors is None:
            self._priors = fit_priors(self._load(self._ids))
        return {metric: prior for (case_id, metric), prior in self._priors.items() if case_id == stored.case_id}

    def _load(self, case_ids: Iterable[str]) -> Iterator[store.Baseline]:
        for case_id in case_ids:
            try:
                found = store.load(self.path(case_id))
            except store.BaselineError:
                continue  # the case itself fails with this error, by name
            if found is not None:
                yield found

    def outcome(self, state: CaseState, nodeid: str) -> Outcome:
        """Return what came of a case."""
        verdict = state.verdict
        if verdict is None:
            status = Status.INVALID if state.measurement.invalid else Status.MEASURED
            verdict = Verdict(status, observed(state.launches, None), state.measurement.invalid, launches=len(state.launches))
        elif verdict.status is Status.UNDECIDED:
            verdict = replace(verdict, status=Status.INCONCLUSIVE, reasons=("the run ended before it was decided",))
        return Outcome(
            id=state.case.id,
            nodeid=nodeid,
            status=verdict.status,
            verdict=verdict,
            launches=state.launches,
            engine=store.engine_facts(state.case),
            workload=asdict(state.case.workload),
            notes=tuple(state.notes),
        )


RUN = pytest.StashKey[Run]()
