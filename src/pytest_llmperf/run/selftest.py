"""The self-test: every gate of a test's stored baselines is held against known changes; nothing is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pytest_llmperf.judge import baseline as store
from pytest_llmperf.judge.selftest import self_test
from pytest_llmperf.units import counted

if TYPE_CHECKING:
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
    design = rules.design(tested.marker)
    for suite in rules.stored_anywhere:
        for stored in suite.of(tested.case_id):
            made = self_test(stored, suite.gated[stored.case_id], design, suite.believed.get(stored.case_id, {}))
            checks += [(suite.where, check) for check in made]
    return checks
