"""The case: an engine with a workload."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_llmperf.plan.engine import EngineSpec
    from pytest_llmperf.plan.workload import Workload


@dataclass(frozen=True)
class Case:
    """An engine with a workload. The id (node id, and `#n` from a test's second measurement on) names baseline files.

    So does the kind of engine, where it is not the test's own.
    """

    id: str
    engine: EngineSpec
    workload: Workload
    file_kind: str = ""
    """The kind of engine as a part of the file's name; empty for the test's own (`kinds.kind_in_file`)."""
