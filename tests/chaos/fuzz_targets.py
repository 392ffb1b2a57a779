"""What is fuzzed: for each source of foreign bytes a function that reads them as the plugin does, and real inputs to begin with.

A target returns for all bytes that are read or refused in the plugin's own way. It raises AssertionError where a promise does not
hold, and lets every exception through that is not the plugin's own word for bad input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.chaos import fuzz_answers, fuzz_files, fuzz_options

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass(frozen=True)
class Target:
    """One source of foreign bytes."""

    name: str
    fault: str
    """Its row in the fault table."""
    check: Callable[[bytes], None]
    seeds: Callable[[], Sequence[bytes]]
    """Real inputs, which are mutated."""
    past: Callable[[], Sequence[bytes]] = list
    """Inputs that have broken a promise; they are tried in every run."""


TARGETS = {
    target.name: target
    for target in (
        Target("sse", "mutated event streams", fuzz_answers.sse, fuzz_answers.sse_seeds),
        Target(
            "http",
            "mutated HTTP responses, in any pieces",
            fuzz_answers.http,
            fuzz_answers.http_seeds,
            fuzz_answers.http_past,
        ),
        Target(
            "metrics",
            "mutated /metrics pages of every engine",
            fuzz_answers.metrics,
            fuzz_answers.metrics_seeds,
            fuzz_answers.metrics_past,
        ),
        Target("baselines", "mutated baseline files", fuzz_files.baselines, fuzz_files.baseline_seeds, fuzz_files.baseline_past),
        Target(
            "options",
            "mutated options, ini lines, marker and call arguments",
            fuzz_options.options,
            fuzz_options.option_seeds,
            fuzz_options.option_past,
        ),
        Target(
            "files", "mutated traces and datasets", fuzz_files.workload_files, fuzz_files.workload_seeds, fuzz_files.workload_past
        ),
    )
}
