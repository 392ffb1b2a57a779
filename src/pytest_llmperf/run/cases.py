"""The cases of a run: what is planned of a test, a case on its way to a verdict, and what a comparison answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_llmperf.judge.verdict import Status
from pytest_llmperf.measure.measurement import Measurement
from pytest_llmperf.plan.kinds import ENDPOINT, STARTED, kind_in_file
from pytest_llmperf.plan.limits import NO_LIMITS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any

    from pytest_llmperf.judge.baseline import Baseline
    from pytest_llmperf.judge.verdict import Verdict
    from pytest_llmperf.measure.measurement import Launch
    from pytest_llmperf.plan.axes import Axes
    from pytest_llmperf.plan.case import Case
    from pytest_llmperf.plan.engine import EngineSpec
    from pytest_llmperf.plan.limits import Limits, LocalLimits
    from pytest_llmperf.plan.marker import Marker
    from pytest_llmperf.plan.points import Point


class RunError(Exception):
    """A test cannot go on. The message is for its author; the line that asked for it may matter too."""

    def __init__(self, message: str, *, line_matters: bool = False) -> None:
        """Say what is wrong, and whether the test's own line must be shown with it."""
        super().__init__(message)
        self.line_matters = line_matters


@dataclass(frozen=True)
class Planned:
    """What is known of a test when it is collected."""

    case_id: str
    """The node id as collected; xdist may later add a group to the item's own."""
    axes: Axes
    marker: Marker
    spec: EngineSpec
    """The engine as far as marker and options tell; a fixture may add arguments later."""
    compares: bool
    """The test asks for the baseline."""
    error: str | None = None
    """Why the marker is unusable."""

    @property
    def _point(self) -> Point | None:
        return next((point for point in self.marker.points if point.load == self.axes.load), None)

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the workload arguments of the test's point, its load among them; empty where axes make the grid."""
        return self._point.arguments if self._point else {}

    @property
    def limits(self) -> tuple[Limits, ...]:
        """Return the limits of the test, its point's behind those of its marker."""
        return (self.marker.limits, self._point.limits) if self._point else (self.marker.limits,)

    @property
    def own_kind(self) -> str:
        """Return the kind of engine that the test has where no option names one."""
        return ENDPOINT if self.axes.endpoint else self.marker.kind or STARTED

    @property
    def file_kind(self) -> str:
        """Return the planned engine's kind as a part of the names of baseline files."""
        return kind_in_file(self.spec.kind, self.own_kind)


@dataclass(frozen=True)
class Recording:
    """A baseline to be written when its test has passed."""

    path: Path
    baseline: Baseline
    before: Baseline | None
    """What was stored when it was made, and has become a part of it."""
    path_now: Callable[[], Path]
    stored_now: Callable[[], Baseline | None]
    """Raises BaselineError."""
    anew: Callable[[Baseline | None], Answer]
    """Makes it of what is stored by now."""
    kept: tuple[Path, Baseline] | None = None
    """A baseline of another kind of engine that has stood in its place, and where it will be."""


@dataclass(frozen=True)
class Answer:
    """What a comparison with the baseline, or the recording of one, comes to."""

    verdict: Verdict | None
    """None while launches of a recording are missing."""
    notes: tuple[str, ...] = ()
    accepted: bool = False
    """The case is as good as its baseline, or becomes it."""
    record: Recording | None = None
    """The baseline to be written if the test passes."""
    skip: str | None = None
    """Why the test is to be skipped."""
    failure: str | None = None
    """Why the test must fail, whatever it does with the answer."""

    @property
    def undecided(self) -> bool:
        """Return whether another launch must tell."""
        return self.verdict is None or self.verdict.status is Status.UNDECIDED


@dataclass
class CaseState:
    """One case on its way to a verdict."""

    case: Case
    launches: tuple[Launch, ...] = ()
    starts: frozenset[int] = frozenset()
    """The engine starts that it was measured on."""
    verdict: Verdict | None = None
    decided: bool = False
    """No further launch is needed."""
    notes: tuple[str, ...] = ()
    record: Recording | None = None
    """The baseline to be written if the test passes."""
    limits: LocalLimits = NO_LIMITS
    """What its metrics must not pass on the accelerators of its engine."""

    @property
    def measurement(self) -> Measurement:
        """Return the launches so far, as the test sees them."""
        return Measurement(self.case, self.launches, self.limits)

    def take(self, answer: Answer) -> None:
        """Note the answer to a comparison of this case."""
        self.verdict = answer.verdict or self.verdict
        self.decided = not answer.undecided
        if not answer.undecided:
            self.notes, self.record = answer.notes, answer.record
