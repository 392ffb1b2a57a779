"""The rules of a run: what must not depend on any measurement. Which comparisons there are, their gates and error rates."""

from __future__ import annotations

import subprocess
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain, product
from typing import TYPE_CHECKING, Any

import pytest_llmperf
from pytest_llmperf.files import is_there, storable
from pytest_llmperf.judge import baseline as store
from pytest_llmperf.judge.comparison import prospects
from pytest_llmperf.judge.gates import comparisons, gates, gates_of
from pytest_llmperf.judge.maths.stats import Design
from pytest_llmperf.judge.noise import beliefs, suite_of
from pytest_llmperf.judge.places import place
from pytest_llmperf.judge.provenance import Provenance, engine_facts, model_facts
from pytest_llmperf.judge.verdict import Status, judge
from pytest_llmperf.plan.kinds import kinds_in_files
from pytest_llmperf.run.stored import Reader, StoredSuite, case_files, witnesses, workloads
from pytest_llmperf.run.sweep import MOST_DEGREES, degrees_of, named_degrees, numbered

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from pytest_llmperf.judge.comparison import Comparison
    from pytest_llmperf.judge.gates import Tolerance
    from pytest_llmperf.judge.noise import Belief, Suite
    from pytest_llmperf.judge.verdict import Verdict
    from pytest_llmperf.measure.host.machine import Host
    from pytest_llmperf.plan.case import Case
    from pytest_llmperf.plan.marker import Marker
    from pytest_llmperf.run.cases import CaseState, Planned
    from pytest_llmperf.run.settings import Settings


@dataclass(frozen=True)
class Rules:
    """Settings, host, and the tests that compare; everything else follows from them."""

    settings: Settings
    host: Host
    rootpath: Path
    compared: Mapping[str, Planned]
    """The tests that ask for the baseline, by the id of their first case."""
    collected: tuple[str, ...]
    """The ids of all cases that were collected, deselected ones too."""
    job: str
    """Names the run, the same for all its processes: launches of one run share the state that the host was in."""

    def __post_init__(self) -> None:
        """See now which baselines there are: one that is recorded later in the run must not change any error rate."""
        _ = self.present

    def read_ahead(self) -> None:
        """Read what a run must know of its baselines before anything is measured: their workloads, and the noise of a suite.

        Where nobody asks for that, it is read when the first case is judged.
        """
        _ = self._comparisons, self._noise

    def gates(self, marker: Marker, workload: Mapping[str, Any] | None = None) -> dict[str, Tolerance]:
        """Return what gates a test: its marker over the run's settings.

        `workload` is the description of what is measured, None while that is not known: a search for the largest load is gated
        by what it comes to.
        """
        entries, tolerance = (*self.settings.gate, *marker.gate), self.tolerance(marker)
        return gates(entries, tolerance=tolerance) if workload is None else gates_of(entries, workload, tolerance=tolerance)

    def tolerance(self, marker: Marker) -> float:
        """Return the slow-down that must not pass, as a fraction."""
        return marker.tolerance or self.settings.tolerance

    def design(self, marker: Marker, launches: int | None = None) -> Design:
        """Return tolerance, error rates and the budget of launches, by default the run's."""
        budget = launches or self.settings.max_launches
        return Design(tolerance=self.tolerance(marker), comparisons=self._comparisons, launches=budget)

    @cached_property
    def _comparisons(self) -> int:
        return max(1, sum(map(comparisons, self.gated.values())))

    @cached_property
    def markers(self) -> dict[str, Marker]:
        """The marker of each case that will be compared, as far as is known before anything is measured."""
        return {case_id: self.compared[first].marker for first, of_plan in self._files.items() for case_id in of_plan}

    @cached_property
    def files(self) -> dict[str, Path]:
        """The baseline file of each of these cases, whether there is one or not."""
        return {case_id: path for of_plan in self._files.values() for case_id, path in of_plan.items()}

    def first_files(self, plan: Planned) -> dict[str, Path]:
        """Return those of them that are of a test's first measurement: of a sweep one for each of its degrees."""
        return {case_id: self._files[plan.case_id][case_id] for case_id in self._ids_of(plan)[0]}

    def further_files(self, plan: Planned) -> dict[str, Path]:
        """Return those of a test's further measurements, which all are there; whether it still asks for them is not known."""
        return {case_id: path for case_id, path in self._files[plan.case_id].items() if case_id not in self.first_files(plan)}

    @cached_property
    def _files(self) -> dict[str, dict[str, Path]]:
        return case_files(self.compared.values(), self._ids_of, self.file)

    def _ids_of(self, plan: Planned) -> list[list[str]]:
        degrees = degrees_of(plan, plan.spec, self.settings.selected, self.host).able if plan.axes.sweep else None
        return list(numbered(plan.case_id, degrees))

    @cached_property
    def present(self) -> dict[str, Path]:
        """Those of these files that are there, before anything is measured."""
        return {case_id: path for case_id, path in self.files.items() if is_there(path)}

    @cached_property
    def gated(self) -> dict[str, dict[str, Tolerance]]:
        """What gates each of these cases."""
        known = workloads(self.reader, self.present)
        return {case_id: self.gates(marker, known.get(case_id)) for case_id, marker in self.markers.items()}

    @cached_property
    def reader(self) -> Reader:
        """What reads the run's baselines."""
        return Reader(self.host.key, self.shown)

    @cached_property
    def _commit(self) -> str | None:
        return _commit_of(self.rootpath)

    @cached_property
    def _noise(self) -> Suite:
        return suite_of(self.reader.sound(witnesses(self.present)), self.gated)

    @cached_property
    def stored_anywhere(self) -> list[StoredSuite]:
        """What is stored of the tests that compare, on whatever host and kind of engine; read once, for all self-tests."""
        hosts = sorted(path.name for path in self.settings.baselines.glob("*/"))
        return [_stored_suite(self, host, kind) for host, kind in product(hosts, kinds_in_files())]

    def path(self, case_id: str, kind: str = "") -> Path:
        """Return the baseline file of a case; `kind` is that of its engine where it is not the test's own."""
        return place(self.settings.baselines, self.host.key, case_id, kind)

    def file(self, plan: Planned, case_id: str) -> Path:
        """Return the baseline file of a test's case, as far as its engine is known before it runs."""
        return self.stored_at(case_id, plan.file_kind, plan.spec.kind)

    def stored_at(self, case_id: str, file_kind: str, kind: str) -> Path:
        """Return where the baseline of a case is, or would be; before kinds had files of their own they shared one."""
        own, shared = self.path(case_id, file_kind), self.path(case_id)
        return shared if own != shared and not is_there(own) and _kind_stored(shared) == kind else own

    def stored(self, case: Case) -> store.Baseline | None:
        """Return the baseline of a case, None where there is none; raises BaselineError for an unusable file."""
        return self.reader.read(self.stored_at(case.id, case.file_kind, case.engine.kind))

    def shown(self, path: Path) -> str:
        """Return a path as messages name it: relative to the rootdir where it is inside."""
        return str(path.relative_to(self.rootpath) if path.is_relative_to(self.rootpath) else path)

    def provenance(self, state: CaseState) -> Provenance:
        """Return where the launches of a case come from: engine, versions, host, and the commit of the tested project."""
        # UUIDs, and what each GPU is like, would only make the file longer: the name says it.
        facts = asdict(replace(self.host, devices=()))
        del facts["devices"]
        facts["gpus"] = list(self.host.gpus)
        # Somebody may have set them: what is slower then has a cause to be named.
        for name in ("power_limit_w", "sm_clock_mhz"):
            known = {value for gpu in self.host.devices if (value := getattr(gpu, name)) is not None}
            facts |= {name: sorted(known)} if known else {}
        versions = {**state.launches[-1].versions, "pytest-llmperf": pytest_llmperf.__version__}
        engine = engine_facts(state.case) | model_facts(state.case, state.launches)
        return Provenance(storable(engine), versions, facts, self._commit)

    def believed(self, case_id: str, stored: store.Baseline | None) -> dict[str, Belief]:
        """Return per metric the noise that the suite's baselines lead to expect; nothing measured now enters it."""
        if stored is None or stored.doubts or case_id not in self.present:
            return {}
        return self._noise.beliefs(stored, self.gated[case_id])

    def verdict(self, state: CaseState, stored: store.Baseline | None, marker: Marker, launches: int | None = None) -> Verdict:
        """Return the verdict on a case against what is stored of it, within a budget of launches."""
        believed = self.believed(state.case.id, stored)
        design = self.design(marker, launches)
        gated = self.gates(marker, state.case.workload.description)
        return judge(state.measurement, stored, design=design, gated=gated, beliefs=believed)


def _kind_stored(path: Path) -> str | None:
    """Return the kind of engine that a file's launches were measured on; None where it is not known, or there is no file."""
    provenance = store.head(path).get("provenance")
    if isinstance(provenance, dict) and isinstance(engine := provenance.get("engine"), dict):
        return engine.get("kind")
    try:
        stored = store.load(path)
    except store.BaselineError:
        return None
    return stored.provenance.engine.get("kind") if stored else None


def _commit_of(folder: Path) -> str | None:
    """Return the commit of a work tree, with `+` where it has changes; None outside a repository."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _stored_suite(rules: Rules, host: str, kind: str) -> StoredSuite:
    """Return what is stored of the tests that compare for a host and kind of engine."""
    reader = rules.reader if host == rules.host.key else Reader(host, rules.shown)
    tests: dict[str, list[store.Baseline] | store.BaselineError] = {}
    usable: list[store.Baseline] = []
    gated: dict[str, dict[str, Tolerance]] = {}
    for plan in rules.compared.values():
        files = ((case_id, place(rules.settings.baselines, host, case_id, kind)) for case_id in possible_cases(rules, plan))
        own, error = _readable(reader, files)
        tests[plan.case_id] = error or own
        usable += (stored for stored in own if not stored.doubts)
        gated |= {stored.case_id: rules.gates(plan.marker, stored.workload) for stored in own}
    believed: dict[str, dict[str, Belief]] = defaultdict(dict)
    for (case_id, metric), belief in beliefs(usable, gated).items():
        believed[case_id][metric] = belief
    return StoredSuite(f"{host}, {kind}" if kind else host, tests, gated, believed)


def _readable(reader: Reader, files: Iterable[tuple[str, Path]]) -> tuple[list[store.Baseline], store.BaselineError | None]:
    """Return the baselines of files that can be read, under the ids given for them, and the first error of the others."""
    readable, first = [], None
    for case_id, path in files:
        try:
            stored = reader.read(path)
        except store.BaselineError as error:
            first = first or error
            continue
        readable += [store.renamed(stored, case_id)] if stored else []
    return readable, first


def stored_and_new(rules: Rules) -> tuple[int, int]:
    """Return how many of the run's cases have a baseline, and how many have none."""
    return len(rules.present), len(rules.files) - len(rules.present)


def unused_baselines(rules: Rules) -> list[str]:
    """Return the baselines that no test uses any more, relative to the rootdir."""
    gone = store.unused(rules.settings.baselines, rules.host.key, rules.rootpath, rules.collected)
    return [rules.shown(path) for path in gone]


def unmet_baselines(rules: Rules, statuses: Mapping[str, Status]) -> list[str]:
    """Return the baselines of further measurements that a test was recorded without, relative to the rootdir.

    `statuses` are those of the run's cases.
    """
    recorded = (plan for plan in rules.compared.values() if _is_recorded(rules.first_files(plan), statuses))
    further = chain.from_iterable(rules.further_files(plan).items() for plan in recorded)
    return [rules.shown(path) for case_id, path in further if case_id not in statuses]


def _is_recorded(cases: Iterable[str], statuses: Mapping[str, Status]) -> bool:
    return all(statuses.get(case_id) is Status.RECORDED for case_id in cases)


def prospects_of(rules: Rules, *, every: bool = True) -> Iterator[tuple[str, list[Comparison]]]:
    """Yield for each case that has a baseline what could be found, before anything is measured.

    If not `every`, of so many of them as are read anyway.
    """
    for stored in rules.reader.sound(rules.present if every else witnesses(rules.present)):
        design = rules.design(rules.markers[stored.case_id])
        believed = rules.believed(stored.case_id, stored)
        yield stored.case_id, prospects(stored, rules.gated[stored.case_id], design, believed)


def possible_cases(rules: Rules, plan: Planned) -> Iterator[str]:
    """Yield the ids that baselines of a test could have, on whatever host."""
    degrees = named_degrees(plan.marker, rules.settings.selected) or MOST_DEGREES
    return chain.from_iterable(numbered(plan.case_id, degrees if plan.axes.sweep else None))


def possible_files(rules: Rules, plan: Planned, host: str, kinds: Iterable[str] = kinds_in_files()) -> Iterator[Path]:
    """Yield the files that baselines of a test could have on a host, of whatever kinds of engines; not all of them exist."""
    folder = rules.settings.baselines
    for case_id, kind in product(possible_cases(rules, plan), kinds):
        yield place(folder, host, case_id, kind)
