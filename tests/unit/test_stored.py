"""Which baselines a run has, and what it reads of them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_llmperf.judge import baseline as store
from pytest_llmperf.judge.provenance import Provenance
from pytest_llmperf.measure.measurement import Launch, Round
from pytest_llmperf.run import stored
from pytest_llmperf.run.stored import MOST_WITNESSES, Reader, case_files, witnesses, workloads

BASELINE = store.Baseline(
    "a", "host", {"requests": 8}, "f", Provenance({"kind": "server"}), (Launch("1", "", (Round({"ttft_p50_s": 0.1}),), {}),)
)


def files_of(folder: Path, *names: str) -> dict[str, dict[str, Path]]:
    """Return the files of a test of up to three measurements, where these files are there; count what is asked for."""
    for name in names:
        (folder / name).touch()
    plans: Any = [SimpleNamespace(case_id="a")]
    return case_files(plans, lambda _: [["a"], ["a2"], ["a3"]], lambda _, case_id: folder / f"{case_id}.json")


@pytest.mark.parametrize(
    ("names", "cases"),
    [([], ["a"]), (["a.json"], ["a"]), (["a3.json"], ["a", "a3"]), (["a.json", "a2.json"], ["a", "a2"]), (["b.json"], ["a"])],
)
def test_further_cases_are_those_with_files(tmp_path: Path, names: list[str], cases: list[str]) -> None:
    assert files_of(tmp_path, *names) == {"a": {case_id: tmp_path / f"{case_id}.json" for case_id in cases}}


@pytest.mark.parametrize("count", [0, 1, 299, 300, 301, 599, 5000])
def test_witnesses_are_as_many_as_tell_and_spread_evenly(count: int) -> None:
    files = {str(n): Path(str(n)) for n in range(count)}
    chosen = [int(case_id) for case_id in witnesses(files)]
    assert len(set(chosen)) == min(count, MOST_WITNESSES)
    gaps = {after - before for before, after in pairwise(chosen)}
    assert max(gaps, default=0) - min(gaps, default=0) <= 1


def test_a_file_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, calls = tmp_path / "a.json", []
    load = store.load
    monkeypatch.setattr(store, "load", lambda *given: calls.append(given) or load(*given))  # type: ignore[func-returns-value]
    reader = Reader("host")
    assert reader.read(path) is None
    store.save(path, BASELINE)
    assert reader.read(path) == reader.read(path) == BASELINE
    assert len(calls) == 2
    store.save(path, store.renamed(BASELINE, "b"))
    assert reader.read(path) == store.renamed(BASELINE, "b")


def test_workloads_come_from_heads_and_those_of_searches_from_whole_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "MOST_WITNESSES", 1)
    search = {"requests": 8, "capacity": {"varied": "rate"}}
    paths = {name: tmp_path / f"{name}.json" for name in ("plain", "search", "damaged", "formatted")}
    for path in paths.values():
        store.save(path, store.Baseline(path.stem, "host", BASELINE.workload, "f", BASELINE.provenance, BASELINE.launches))
    store.save(paths["search"], store.Baseline("search", "host", search, "f", BASELINE.provenance, BASELINE.launches))
    paths["damaged"].write_text("{")
    paths["formatted"].write_text(paths["formatted"].read_text().replace("\n", ""))
    known = workloads(Reader("host"), paths)
    assert known == {"plain": BASELINE.workload, "search": search, "formatted": BASELINE.workload}
