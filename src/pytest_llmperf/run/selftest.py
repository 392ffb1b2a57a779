"""The self-test: every gate of a test's stored baselines is held against known changes; nothing is measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Literal

from pytest_llmperf.judge import baseline as store
from pytest_llmperf.judge.noise import beliefs
from pytest_llmperf.judge.places import place
from pytest_llmperf.judge.selftest import self_test
from pytest_llmperf.plan.kinds import kinds_in_files
from pytest_llmperf.run.rules import possible_cases
from pytest_llmperf.units import counted

if TYPE_CHECKING:
    from pytest_llmperf.judge.gates import Tolerance
    from pytest_llmperf.judge.selftest import Check
    from pytest_llmperf.run.cases import Planned
    from pytest_llmperf.run.rules import Rules


@dataclass(frozen=True)
class SelfTest:
    """What the self-test of one test came to."""

    outcome: Literal["passed", "failed", "skipped"]
    why: str = ""
    checks: tuple[Check, ...] = ()


def self_tested(rules: Rules, plan: Planned) -> SelfTest:
    """Return whether every gate of a test fires as it must. Baselines of all hosts count: this needs no GPU."""
    if plan.error:
        return SelfTest("failed", plan.error)
    if not plan.compares:
        return SelfTest("skipped", "the test compares with no baseline")
    try:
        checks = _checks(rules, plan)
    except store.BaselineError as error:
        return SelfTest("failed", str(error))
    if not checks:
        return SelfTest("skipped", "no baseline is stored for any host; record one with --update-baselines")
    faults = [f"  {host}: {check.metric}, {check.change}: {check.fault}" for host, check in checks if check.fault]
    were = "was" if len(faults) == 1 else "were"
    text = "\n".join([f"{len(faults)} of {counted(len(checks), 'injected change')} {were} not judged as they must be:", *faults])
    return SelfTest("failed" if faults else "passed", text, tuple(check for _, check in checks))


def _checks(rules: Rules, tested: Planned) -> list[tuple[str, Check]]:
    """Return the checks of a test's baselines with the hosts that have them; raises BaselineError for an unusable file."""
    checks: list[tuple[str, Check]] = []
    folder, design = rules.settings.baselines, rules.design(tested.marker)
    hosts = sorted(path.name for path in folder.glob("*/"))
    for host, kind in product(hosts, kinds_in_files()):  # a run has one of each
        stored: dict[str, list[store.Baseline]] = {}
        gated: dict[str, dict[str, Tolerance]] = {}
        for plan in rules.compared.values():
            stored[plan.case_id] = _loaded(rules, plan, host, kind, strict=plan is tested)
            gated |= {baseline.case_id: rules.gates(plan.marker, baseline.workload) for baseline in stored[plan.case_id]}
        believed = beliefs([baseline for of_plan in stored.values() for baseline in of_plan], gated)
        for baseline in stored[tested.case_id]:
            own = {metric: belief for (of, metric), belief in believed.items() if of == baseline.case_id}
            where = f"{host}, {kind}" if kind else host
            checks += [(where, check) for check in self_test(baseline, gated[baseline.case_id], design, own)]
    return checks


def _loaded(rules: Rules, plan: Planned, host: str, kind: str, *, strict: bool) -> list[store.Baseline]:
    """Return a test's baselines by the ids that their paths are of; raises BaselineError for an unusable one where `strict`."""
    loaded = []
    for case_id in possible_cases(rules, plan):
        try:
            stored = store.load(place(rules.settings.baselines, host, case_id, kind), host)
        except store.BaselineError:
            if strict:
                raise
            continue  # its own test fails with this error
        loaded += [replace(stored, case_id=case_id)] if stored else []
    return loaded
