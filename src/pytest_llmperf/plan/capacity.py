"""The capacity under limits: a workload whose load is searched for, between two bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from pytest_llmperf.judge.maths.search import requests_for
from pytest_llmperf.plan.arguments import workload_from
from pytest_llmperf.plan.checks import PlanError, degree, parse_fraction
from pytest_llmperf.plan.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pytest_llmperf.plan.axes import Axes

CAPACITIES: dict[str, str] = {"rate": "capacity_requests_per_s", "concurrency": "capacity_concurrency"}
"""The metric that a search comes to, by the load that is varied."""
CAPACITY = "capacity"
"""The field of a workload's description that a search is known by."""
_LONGEST_S = 60.0
