"""The baselines that a run meets: which there are is known when tests are collected, what they hold is read when it is needed.

A project may have thousands. Whether a file exists costs nothing next to what it takes to read it, and only a case that is
measured needs its own; the noise of the others is told as well by some of them.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from pytest_llmperf.files import is_there
from pytest_llmperf.judge import baseline as store
from pytest_llmperf.plan.capacity import CAPACITY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from pytest_llmperf.judge.baseline import Baseline
    from pytest_llmperf.judge.gates import Tolerance
    from pytest_llmperf.judge.noise import Belief
    from pytest_llmperf.run.cases import Planned

MOST_WITNESSES = 300
"""So many baselines tell the noise of a suite: each is a comparison for every gate, and what a prior can be worth is bounded."""


@dataclass(frozen=True)
class StoredSuite:
    """What the compared tests have stored for one host and kind of engine, which a run has one of each of."""

    where: str
    """Host and kind."""
    tests: Mapping[str, Sequence[Baseline] | store.BaselineError]
    """By the id of a test's first case: its baselines under the ids that their paths are of, or why they cannot be used."""
    gated: Mapping[str, Mapping[str, Tolerance]]
    """What gates each case."""
    believed: Mapping[str, Mapping[str, Belief]]
    """Per case and metric, the noise that the suite leads to expect."""

    def of(self, test: str) -> Sequence[Baseline]:
        """Return a test's baselines; raises BaselineError where one is unusable."""
        stored = self.tests[test]
        if isinstance(stored, store.BaselineError):
            raise stored
        return stored


def case_files(
    plans: Iterable[Planned], ids: Callable[[Planned], list[list[str]]], file: Callable[[Planned, str], Path]
) -> dict[str, dict[str, Path]]:
    """Return the baseline files of each test by the ids of its cases: its first measurement, and further ones that have a file.

    `ids` returns those that each measurement of a test could have, `file` where a case's baseline is or would be. Files of
    further ones are only looked for where a folder has files that are no first one's.
    """
    numbered = {plan.case_id: (plan, ids(plan)) for plan in plans}
    files = {test: {case_id: file(plan, case_id) for case_id in of_plan[0]} for test, (plan, of_plan) in numbered.items()}
    firsts = {(path.parent, path.name) for of_plan in files.values() for path in of_plan.values()}
    others = {folder: _others(folder, firsts) for folder in {folder for folder, _ in firsts}}
    for test, (plan, of_plan) in numbered.items():
        if any(others[path.parent] for path in files[test].values()):
            further = ((case_id, file(plan, case_id)) for case_id in chain.from_iterable(of_plan[1:]))
            files[test] |= {case_id: path for case_id, path in further if is_there(path)}
    return files


def _others(folder: Path, firsts: set[tuple[Path, str]]) -> bool:
    """Return whether a folder has baselines that are none of these; it has where it cannot be listed."""
    try:
        names = [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True
    return any(name.endswith(".json") and (folder, name) not in firsts for name in names)


class Reader:
    """Reads baselines, each once as long as its file is the same; it remembers as many as tell the noise of a suite."""

    def __init__(self, host: str, shown: Callable[[Path], str] = str) -> None:
        """Note the host that they must have been recorded on, and how messages name a file."""
        self._host = host
        self._shown = shown
        self._read: OrderedDict[Path, tuple[tuple[int, ...], Baseline | None]] = OrderedDict()

    def read(self, path: Path) -> Baseline | None:
        """Return a baseline, its doubts with its path, None where there is no file; raises BaselineError for an unusable one."""
        mark = _mark(path)
        if mark and path in self._read and self._read[path][0] == mark:
            self._read.move_to_end(path)
            return self._read[path][1]
        stored = store.load(path, self._host)
        if stored and stored.doubts:
            stored = replace(stored, doubts=tuple(f"{self._shown(path)}: {doubt}" for doubt in stored.doubts))
        if mark:
            self._read[path] = (mark, stored)
            while len(self._read) > MOST_WITNESSES:
                self._read.popitem(last=False)
        return stored

    def sound(self, files: Mapping[str, Path]) -> Iterator[Baseline]:
        """Yield those of these files that can be judged by, under the ids that they are given for.

        One that is unusable fails its case itself. One that was moved with its renamed test has the old id.
        """
        for case_id, path in files.items():
            try:
                stored = self.read(path)
            except store.BaselineError:
                continue
            if stored is not None and not stored.doubts:
                yield store.renamed(stored, case_id)


def _mark(path: Path) -> tuple[int, ...]:
    """Return what tells a file from the one that takes its place; empty where it is not known."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return ()
    return status.st_ino, status.st_dev, status.st_size, status.st_mtime_ns


def witnesses(files: Mapping[str, Path]) -> dict[str, Path]:
    """Return as many of these files as tell the noise of a suite, from its beginning to its end."""
    ids, step = list(files), max(len(files) / MOST_WITNESSES, 1.0)
    return {case_id: files[case_id] for case_id in (ids[int(n * step)] for n in range(min(len(ids), MOST_WITNESSES)))}


def workloads(reader: Reader, files: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Return the workloads of stored cases; of more than are read anyway from the heads of their files, as far as these tell.

    That of a search, which decides on the gates, must be sound: its file is read as a whole.
    """
    heads = {case_id: store.head(path).get("workload") for case_id, path in files.items() if len(files) > MOST_WITNESSES}
    known = {case_id: workload for case_id, workload in heads.items() if isinstance(workload, dict) and CAPACITY not in workload}
    rest = {case_id: path for case_id, path in files.items() if case_id not in known}
    return known | {stored.case_id: stored.workload for stored in reader.sound(rest)}
