"""Processes that write baselines: two that record at the same moment, and those that are killed in the middle."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_llmperf.files import unwritable_folder
from pytest_llmperf.judge import baseline as store
from pytest_llmperf.measure.host.machine import describe_host
from pytest_llmperf.plan.case import Case
from pytest_llmperf.run.cases import CaseState
from pytest_llmperf.run.judging import compare
from pytest_llmperf.run.recording import settle
from pytest_llmperf.run.rules import Rules
from tests.whole_run import WORKLOAD, launch, plan, settings_from

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection
    from multiprocessing.context import ForkServerProcess
    from multiprocessing.synchronize import Barrier
    from pathlib import Path

    from pytest_llmperf.measure.measurement import Launch

PROCESSES = multiprocessing.get_context("forkserver")
"""Each is forked off a server that has imported everything, and has no threads."""
PROCESSES.set_forkserver_preload(["tests.baseline_writers"])

FIGURES = {
    "output_tokens_per_s": 3000.0, "ttft_p50_s": 0.01, "tpot_p50_s": 0.002, "e2e_p50_s": 0.02, "failed_requests": 0.0,
    "preemptions": 0.0,
}  # fmt: skip


def rules_for(folder: Path, job: str, **given: object) -> Rules:
    """Return the rules of a run that updates, and compares no test that is known before."""
    settings = settings_from(folder, **{"update": "all", "launches": 2, "tolerance": 0.6, **given})
    return Rules(settings, describe_host(simulated=True), folder, {}, (), job)


def launches(job: str, count: int, **figures: float) -> tuple[Launch, ...]:
    """Return launches of a run that all measured the same."""
    return tuple(replace(launch(FIGURES | figures), id=f"{job}-{number}", job=job) for number in range(count))


def recorded(rules: Rules, case_id: str, count: int = 2, **figures: float) -> CaseState:
    """Return a case that was measured and judged, and whose baseline is to be written."""
    test = plan(rules.settings, case_id)
    state = CaseState(Case(case_id, test.spec, WORKLOAD), launches(rules.job, count, **figures))
    compare(rules, state, test.marker)
    return state


def _update(folder: Path, job: str, barrier: Barrier, connection: Connection) -> None:
    """Record each case that is named, at the same moment as the other process; send what is told of it."""
    rules = rules_for(folder, job)
    with contextlib.suppress(EOFError):
        while True:
            case_id, pause_s = connection.recv()
            state = recorded(rules, case_id)
            barrier.wait(60)
            time.sleep(pause_s)
            settle([state], passed=True)
            connection.send(state.notes[0])


class Updaters:
    """Two runs that update the same baselines."""

    def __init__(self, folder: Path) -> None:
        """Start them."""
        self._barrier = PROCESSES.Barrier(2)  # gone when nobody has it any more
        self._ends: list[Connection] = []
        self._processes: list[ForkServerProcess] = []
        for job in ("one", "other"):
            here, there = PROCESSES.Pipe()
            self._processes.append(PROCESSES.Process(target=_update, args=(folder, job, self._barrier, there), daemon=True))
            self._processes[-1].start()
            there.close()
            self._ends.append(here)

    def record(self, case_id: str, *pauses_s: float) -> list[str]:
        """Have both record a case; return what each tells of it."""
        for end, pause_s in zip(self._ends, pauses_s, strict=True):
            end.send((case_id, pause_s))
        return [end.recv() for end in self._ends]

    def close(self) -> None:
        """End them."""
        for end, process in zip(self._ends, self._processes, strict=True):
            end.close()
            process.join(30)


def _write_for_ever(path: Path, one: store.Baseline, other: store.Baseline, begun: Connection) -> None:
    begun.send(True)
    while True:
        for baseline in (one, other):
            store.amend(lambda: path, lambda _, new=baseline: new)


@contextlib.contextmanager
def writing(path: Path, one: store.Baseline, other: store.Baseline) -> Iterator[ForkServerProcess]:
    """Yield a process that writes two baselines by turns, the one in the place of the other; it is killed in the end."""
    here, there = PROCESSES.Pipe()
    process = PROCESSES.Process(target=_write_for_ever, args=(path, one, other, there), daemon=True)
    process.start()
    try:
        here.recv()
        yield process
    finally:
        process.kill()
        process.join(30)


def _try_for_ever(folder: Path, begun: Connection) -> None:
    begun.send(True)
    while True:
        unwritable_folder(folder)


@contextlib.contextmanager
def trying(folder: Path) -> Iterator[None]:
    """Have another process try whether a folder can be made, again and again."""
    here, there = PROCESSES.Pipe()
    process = PROCESSES.Process(target=_try_for_ever, args=(folder, there), daemon=True)
    process.start()
    try:
        here.recv()
        yield
    finally:
        process.kill()
        process.join(30)
