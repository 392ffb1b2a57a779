"""The outcome of a case, and the file that holds all of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from pytest_llmperf.files import storable
from pytest_llmperf.judge.verdict import Status, Verdict
from pytest_llmperf.measure.measurement import Launch

if TYPE_CHECKING:
    from collections.abc import Iterable

NEVER_DECIDED = "the run ended before it was decided"
"""The reason of a case that is INCONCLUSIVE because its launches broke off: nothing has come of its comparison."""
JSON_VERSION = 1
"""Version of the `--llmperf-json` file. History: 1, the first."""


@dataclass(frozen=True)
class Outcome:
    """What came of one case, final. It travels on the test report, hence as plain data (`to_data`, `from_data`)."""

    id: str
    nodeid: str
    status: Status
    verdict: Verdict
    launches: tuple[Launch, ...]
    engine: dict[str, Any]
    workload: dict[str, Any]
    notes: tuple[str, ...] = ()
    """What else the reader should know: the file that was written, what has changed, which setting to move."""

    @property
    def compared(self) -> bool:
        """Return whether numbers were held against a baseline, to the end."""
        return self.status.compared and NEVER_DECIDED not in self.verdict.reasons


def to_data(outcome: Outcome) -> dict[str, Any]:
    """Return the outcome as dicts, lists, strings and numbers."""
    data = msgspec.to_builtins(outcome)
    assert isinstance(data, dict)
    return data


def from_data(data: dict[str, Any]) -> Outcome:
    """Return the outcome that `to_data` took apart."""
    return msgspec.convert(data, Outcome)


def json_document(outcomes: Iterable[Outcome]) -> str:
    """Return the text of `--llmperf-json`: every case with every raw sample."""
    return json_text([to_data(outcome) for outcome in outcomes])


def json_text(cases: list[dict[str, Any]]) -> str:
    """Return that text of outcomes that are plain data already."""
    document = {"version": JSON_VERSION, "cases": cases}
    try:
        data = msgspec.json.encode(document)
    except UnicodeEncodeError:
        data = msgspec.json.encode(storable(document))
    return msgspec.json.format(data, indent=1).decode() + "\n"
