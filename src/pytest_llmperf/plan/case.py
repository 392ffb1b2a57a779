"""The case: an engine with a workload."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_llmperf.plan.engine import EngineSpec
    from pytest_llmperf.plan.workload import Workload


@dataclass(frozen=True)
class Case:
    """An engine with a workload. The id (node id, and `#n` from a test's second measurement on) names baseline files."""

    id: str
    engine: EngineSpec
    workload: Workload
