"""What a run knows of its cases: the launches measured so far, the stored baselines, and the verdicts."""

from __future__ import annotations

import subprocess
import uuid
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING

import pytest

import pytest_llmperf
from pytest_llmperf.judge import baseline as store
from pytest_llmperf.judge import diagnosis
from pytest_llmperf.judge.calibration import calibrated, noise_of
from pytest_llmperf.judge.comparison import prospects
from pytest_llmperf.judge.gates import comparisons, gates
from pytest_llmperf.judge.maths.stats import Design
from pytest_llmperf.judge.noise import beliefs
from pytest_llmperf.judge.verdict import Status, Verdict, judge, not_comparable, observed
from pytest_llmperf.measure.measurement import Measurement
from pytest_llmperf.plan.case import Case
from pytest_llmperf.plan.workload import Workload
from pytest_llmperf.plugin.collection import PLANNED, named_degrees
from pytest_llmperf.plugin.sweep import degrees_of, suffix
from pytest_llmperf.report.outcome import Outcome
from pytest_llmperf.report.text import metric_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from pytest_llmperf.judge.comparison import Comparison
    from pytest_llmperf.judge.gates import Tolerance
    from pytest_llmperf.judge.noise import Belief
    from pytest_llmperf.judge.selftest import Check
    from pytest_llmperf.measure.host.machine import Host
    from pytest_llmperf.measure.measurement import Launch
    from pytest_llmperf.plan.marker import Marker
    from pytest_llmperf.plugin.collection import Planned
    from pytest_llmperf.plugin.settings import Settings


_MOST_MEASUREMENTS = 9
"""How many measurements of one test are looked for among the stored baselines when the comparisons are counted."""
_MOST_DEGREES = tuple(2**power for power in range(7))
"""TP degrees that are looked for among the baselines of any host, where a sweep names none."""


def _numbered(case_id: str, degrees: Sequence[int] | None) -> Iterator[list[str]]:
    """Yield the ids that the first, second, ... measurement of a test would have; a sweep's has one for each of its degrees."""
    for number in range(1, _MOST_MEASUREMENTS + 1):
        plain = case_id if number == 1 else f"{case_id}#{number}"
        yield [plain] if degrees is None else [case_id + suffix(degree, number) for degree in degrees]


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

    def __init__(
        self,
        items: list[pytest.Item],
        settings: Settings,
        host: Host,
        rootpath: Path,
        collected: list[str],
        job: str | None = None,
    ) -> None:
        """Freeze what must not depend on any measurement: which comparisons there are, and the error rates.

        `job` is the same for all processes of one run.
        """
        self.settings = settings
        self.host = host
        self.job = job or uuid.uuid4().hex[:12]
        self.states: dict[str, CaseState] = {}
        self._rootpath = rootpath
        self._collected = collected
        plans = [item.stash[PLANNED] for item in items if PLANNED in item.stash]
        self._compared = {plan.case_id: plan for plan in plans if plan.compares}
        self._markers = {case_id: plan.marker for plan in self._compared.values() for case_id in self._measured_by(plan)}
        self._gated = {case_id: self._gates(marker) for case_id, marker in self._markers.items()}
        self._comparisons = max(1, sum(map(comparisons, self._gated.values())))
        self._beliefs: dict[tuple[str, str], Belief] | None = None
        self._commit: str | None = None

    def _gates(self, marker: Marker) -> dict[str, Tolerance]:
        """Return what gates a test: its marker over the run's settings."""
        return gates((*self.settings.gate, *marker.gate), tolerance=marker.tolerance or self.settings.tolerance)

    def _measured_by(self, plan: Planned) -> list[str]:
        """Return the cases of a test: its first measurement, and the further ones that have a baseline."""
        degrees = degrees_of(plan, plan.spec, self.settings.selected, self.host).able if plan.axes.sweep else None
        first, *further = _numbered(plan.case_id, degrees)
        return first + [one for one in chain.from_iterable(further) if self.path(one).is_file()]

    def path(self, case_id: str) -> Path:
        """Return the baseline file of a case."""
        return store.path_for(self.settings.baselines, self.host.key, case_id)

    def unused_baselines(self) -> list[str]:
        """Return the baselines that no test uses any more, relative to the rootdir."""
        gone = store.unused(self.settings.baselines, self.host.key, self._rootpath, self._collected)
        return [self._shown(path) for path in gone]

    def stored_and_new(self) -> tuple[int, int]:
        """Return how many of the run's cases have a baseline, and how many have none."""
        found = sum(self.path(case_id).is_file() for case_id in self._gated)
        return found, len(self._gated) - found

    def compare(self, state: CaseState, marker: Marker) -> bool:
        """Return whether the case is as good as its baseline; records the baseline instead where that was asked for.

        Raises Undecided for another launch, and BaselineError for an unusable file.
        """
        path = self.path(state.case.id)
        stored = store.load(path)
        new_too = self.settings.update == "new" or self.settings.missing == "record"
        if self.settings.update == "all" or self.settings.calibrate or (stored is None and new_too):
            self._record(state, path, stored, marker)
            return True
        verdict = state.verdict = self._judge(state, stored, marker, self._design(marker))
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

    def compare_all(self, states: Sequence[CaseState], marker: Marker) -> bool:
        """Return whether every one of these cases is as good as its baseline, when all of them are decided.

        Raises Undecided once, after all have been judged, though one may be worse already: each is a case of its own, and which
        of them are worse is what a reader wants to know. A case that skips its test for want of a baseline does so at the end,
        where none is worse. Raises what `compare` raises besides.
        """
        good, undecided, skipped = [], False, None
        for state in states:
            try:
                good.append(self.compare(state, marker))
            except Undecided:
                undecided = True
            except pytest.skip.Exception as error:
                skipped = error
        if undecided:
            raise Undecided
        if all(good) and skipped is not None:
            raise skipped
        return all(good)

    def _design(self, marker: Marker) -> Design:
        return Design(
            tolerance=marker.tolerance or self.settings.tolerance,
            comparisons=self._comparisons,
            launches=self.settings.max_launches,
        )

    def _judge(self, state: CaseState, stored: store.Baseline | None, marker: Marker, design: Design) -> Verdict:
        beliefs = self._believed(stored.case_id) if stored else {}
        return judge(state.measurement, stored, design=design, gated=self._gates(marker), beliefs=beliefs)

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

    def _record(self, state: CaseState, path: Path, stored: store.Baseline | None, marker: Marker) -> None:
        if len(state.launches) < self.settings.launches:
            raise Undecided
        state.decided = True
        case, design, gated = state.case, self._design(marker), self._gates(marker)
        new = store.Baseline(
            case_id=case.id,
            host=self.host.key,
            workload=case.workload.description,
            workload_fingerprint=case.workload.fingerprint,
            provenance=self._provenance(state),
            launches=state.launches,
        )
        merged, how = self._merged(stored, new, state, marker)
        rows = observed(state.launches, stored.launches if stored else None)
        if self.settings.calibrate:
            rows = calibrated(rows, merged, gated, design)
            merged = replace(merged, noise=noise_of(rows))
        state.pending = (path, merged)
        state.verdict = Verdict(Status.RECORDED, rows, launches=len(state.launches), baseline_launches=len(merged.launches))
        state.notes = [f"recorded {self._shown(path)}: {how}"]

    def _merged(
        self, stored: store.Baseline | None, new: store.Baseline, state: CaseState, marker: Marker
    ) -> tuple[store.Baseline, str]:
        """Return what is to be stored, and how it came about; fails a calibration of something else than what is stored."""
        count = f"{len(new.launches)} launches"
        if stored is None:
            return new, f"new, {count}"
        if not self.settings.extend:
            return new, f"{count} in place of {len(stored.launches)}, as --llmperf-update=replace says"
        other = self._other_version(stored, new, state, marker)
        if not other:
            merged = store.extended(stored, new)
            return merged, f"extended by {count} of the same version to {len(merged.launches)}, from {merged.jobs} runs"
        if self.settings.calibrate:
            state.verdict = Verdict(Status.NOT_COMPARABLE, observed(state.launches, stored.launches), tuple(other))
            pytest.fail(
                "--llmperf-calibrate: this is not what the stored baseline was recorded of:\n  "
                + "\n  ".join(other)
                + "\nAccept it first with --update-baselines, or add --llmperf-update=replace.",
                pytrace=False,
            )
        return new, f"{count} in place of {len(stored.launches)}, which were of another version: {'; '.join(other)}"

    def _other_version(self, stored: store.Baseline, new: store.Baseline, state: CaseState, marker: Marker) -> list[str]:
        """Return why the launches must not join the stored ones; empty when they are of the same version, and agree."""
        reasons = [*not_comparable(state.measurement, stored), *diagnosis.changes(stored.provenance, new.provenance)]
        rounds = {len(launch.rounds) for launch in stored.launches} | {len(launch.rounds) for launch in new.launches}
        if len(rounds) > 1:
            reasons.append(f"launches of {min(rounds)} and of {max(rounds)} rounds are not alike")
        if not reasons:
            # Versions say nothing of an engine that is built from a work tree: the numbers do.
            verdict = self._judge(state, stored, marker, replace(self._design(marker), launches=len(state.launches)))
            shifted = (Status.REGRESSED, Status.IMPROVED, Status.NOT_COMPARABLE)
            reasons = [metric_line(row) for row in verdict.metrics if row.status in shifted]
        return reasons

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
        # UUIDs, and what each GPU is like, would only make the file longer: the name says it.
        host = asdict(replace(self.host, devices=()))
        del host["devices"]
        host["gpus"] = list(self.host.gpus)
        # Somebody may have set them: what is slower then has a cause to be named.
        for name in ("power_limit_w", "sm_clock_mhz"):
            known = {value for one in self.host.devices if (value := getattr(one, name)) is not None}
            host |= {name: sorted(known)} if known else {}
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

    def _believed(self, case_id: str) -> dict[str, Belief]:
        """Return per metric of a case the noise that the suite's baselines lead to expect; nothing measured now enters it."""
        if self._beliefs is None:
            self._beliefs = beliefs(self._load(self._gated), self._gated)
        return {metric: belief for (of, metric), belief in self._beliefs.items() if of == case_id}

    def prospects(self) -> Iterator[tuple[str, list[Comparison]]]:
        """Return for each case that has a baseline what could be found, before anything is measured."""
        for stored in self._load(self._gated):
            design = self._design(self._markers[stored.case_id])
            yield stored.case_id, prospects(stored, self._gated[stored.case_id], design, self._believed(stored.case_id))

    def self_test(self, case_id: str) -> list[tuple[str, Check]]:
        """Return what the gates of a test say of known changes to its stored samples, with the host that has them.

        Baselines of all hosts count: this needs no GPU. Raises BaselineError for an unusable file.
        """
        from pytest_llmperf.judge.selftest import self_test

        found: list[tuple[str, Check]] = []
        design = self._design(self._compared[case_id].marker)
        for host in sorted(path.name for path in self.settings.baselines.glob("*/")):
            stored, mine = list[store.Baseline](), list[store.Baseline]()
            gated: dict[str, dict[str, Tolerance]] = {}
            for plan in self._compared.values():
                paths = (store.path_for(self.settings.baselines, host, one) for one in self._stored_by(plan))
                of_plan = [one for path in paths if path.is_file() and (one := store.load(path))]
                gated |= {one.case_id: self._gates(plan.marker) for one in of_plan}
                stored += of_plan
                mine += of_plan if plan.case_id == case_id else []
            believed = beliefs(stored, gated)
            for one in mine:
                own = {metric: belief for (of, metric), belief in believed.items() if of == one.case_id}
                found += [(host, check) for check in self_test(one, gated[one.case_id], design, own)]
        return found

    def _stored_by(self, plan: Planned) -> Iterator[str]:
        """Return the ids that baselines of a test could have, on whatever host."""
        named = named_degrees(plan.marker, self.settings.selected) or _MOST_DEGREES
        return chain.from_iterable(_numbered(plan.case_id, named if plan.axes.sweep else None))

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
        warnings = dict.fromkeys(chain.from_iterable(launch.warnings for launch in state.launches))
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
            workload=state.case.workload.description,
            notes=(*state.notes, *warnings),
        )


RUN = pytest.StashKey[Run]()
