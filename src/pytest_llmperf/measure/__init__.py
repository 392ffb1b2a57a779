"""One launch: warm up, then rounds. This is the only file that knows the order.

The engine is running already; which engine and when it starts is the caller's business, because one start serves all the
cases of its spec.
"""

from __future__ import annotations

import statistics
import uuid
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import chain
from typing import TYPE_CHECKING

from pytest_llmperf.measure import metrics, telemetry
from pytest_llmperf.measure.workload import WARM_UP, prompts
from pytest_llmperf.plan import Case, Workload, model_config

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_llmperf.measure.client import LoadClient, RequestRecord, RoundLog
    from pytest_llmperf.measure.engines import Engine

_STEADY = 0.02
"""Two rounds agree, and the warm-up is over, when their throughput differs by no more than this share."""
_MOST_DROPPED = 3


@dataclass(frozen=True)
class RoundSettings:
    """How rounds are played."""

    nonce: str
    """Keeps the prompts of different cases apart; see `workload.prompts`."""
    rounds: int = 5
    job: str = ""
    request_timeout_s: float = 600.0
    stall_timeout_s: float = 120.0


@dataclass(frozen=True)
class Round:
    """One pass of the workload."""

    metrics: dict[str, float | None]


@dataclass(frozen=True)
class Launch:
    """One engine start with its rounds: the unit of evidence."""

    id: str
    started: str
    """Wall-clock time in UTC, for people; nothing is computed from it."""
    rounds: tuple[Round, ...]
    metrics: dict[str, float | None]
    """Metrics of the launch as a whole (KV cache, start-up)."""
    dropped_rounds: int = 0
    """Rounds played before the engine was steady."""
    invalid: tuple[str, ...] = ()
    """Why the launch must not be judged nor become a baseline; empty for a sound launch."""
    versions: dict[str, str] = field(default_factory=dict)
    job: str = ""
    """The pytest run that measured it: launches of one run share the state that the host was in."""

    def values(self, metric: str) -> list[float | None]:
        """Return a metric's value in every round, or its one value of the launch."""
        if metric in self.metrics:
            return [self.metrics[metric]]
        return [one.metrics.get(metric) for one in self.rounds]


@dataclass(frozen=True, eq=False)  # `==` is left to the baseline fixture, which judges
class Measurement:
    """The launches of one case in this run. `measured["ttft_p50_s"]` and `measured.preemptions` are medians over all rounds."""

    case: Case
    launches: tuple[Launch, ...]

    def __getitem__(self, metric: str) -> float:
        """Return a metric's median over all rounds of all launches.

        Raises KeyError for an unknown metric, and for one that could not be measured: a missing number is never 0.
        """
        if metric not in metrics.BY_NAME:
            raise KeyError(f"{metric!r} is not a metric; known are {', '.join(metrics.BY_NAME)}")
        values = [value for launch in self.launches for value in launch.values(metric) if value is not None]
        if not values:
            raise KeyError(f"{metric!r} was not measured by this engine")
        return statistics.median(values)

    def __getattr__(self, name: str) -> float:
        """Return a metric like `measured[name]`."""
        if name not in metrics.BY_NAME:
            raise AttributeError(f"a measurement has no {name!r}; its metrics are {', '.join(metrics.BY_NAME)}")
        return self[name]

    @property
    def invalid(self) -> tuple[str, ...]:
        """Return why the measurement must not be judged; empty when every launch is sound."""
        return tuple(dict.fromkeys(reason for launch in self.launches for reason in launch.invalid))

    def with_launch(self, launch: Launch) -> Measurement:
        """Return the measurement with one more launch."""
        return replace(self, launches=(*self.launches, launch))


def measure_launch(
    engine: Engine,
    client: LoadClient,
    workload: Workload,
    settings: RoundSettings,
    progress: Callable[[str], None] = lambda _: None,
) -> Launch:
    """Return one launch of a workload on a running engine.

    A round with a failed request, an engine that restarted or an unexpected prefix-cache hit makes the launch invalid, and
    ends it: what follows would cost time and prove nothing. Raises EngineError when the engine is dead, ClientError when the
    load process is.
    """
    started = datetime.now(UTC).isoformat(timespec="seconds")
    # What an endpoint serves is known by the name it answers to; its spec only has the name that the user gave it.
    model = engine.endpoint.model if engine.spec.kind == "url" else engine.spec.model
    vocabulary = model_config(model).get("vocab_size")
    play = _Player(engine, client, workload, settings, vocabulary)
    invalid = _problems(play.warm_up().records, None)
    rounds: list[Round] = []
    complete: list[list[RequestRecord]] = []
    dropped = 0
    while not invalid and len(rounds) < settings.rounds:
        played, records, invalid = play.round()
        rounds.append(played)
        complete.append(records)
        progress(f"round {len(rounds)}/{settings.rounds}: {played.metrics['output_tokens_per_s'] or 0:,.0f} tok/s")
        if len(rounds) == 2 and dropped < _MOST_DROPPED and not _agree(*rounds):
            rounds.pop(0)
            complete.pop(0)
            dropped += 1
    if invalid:
        engine.check()
    capacity = telemetry.read_capacity(engine.metrics_text(), engine.log_text())
    return Launch(
        id=uuid.uuid4().hex[:12],
        started=started,
        rounds=tuple(rounds),
        metrics=metrics.launch_metrics(metrics.LaunchSample(engine.startup_s, capacity, tuple(chain.from_iterable(complete)))),
        dropped_rounds=dropped,
        invalid=tuple(invalid),
        versions=dict(engine.versions),
        job=settings.job,
    )


def _agree(earlier: Round, later: Round) -> bool:
    old, new = earlier.metrics["output_tokens_per_s"], later.metrics["output_tokens_per_s"]
    return bool(old and new and abs(new / old - 1) <= _STEADY)


class _Player:
    """Plays rounds one after the other, each with prompts of its own."""

    def __init__(
        self, engine: Engine, client: LoadClient, workload: Workload, settings: RoundSettings, vocabulary: int | None
    ) -> None:
        self.engine = engine
        self.client = client
        self.workload = workload
        self.settings = settings
        self.vocabulary = vocabulary
        self.number = 0

    def warm_up(self) -> RoundLog:
        """Send one full wave of other prompts of the real lengths."""
        return self.send(WARM_UP)

    def round(self) -> tuple[Round, list[RequestRecord], list[str]]:
        """Play the next round; return it, its complete requests, and why it must not count."""
        recorder = telemetry.Recorder(self.engine)
        with recorder:
            log = self.send(self.number)
        self.number += 1
        sample = metrics.RoundSample(log.records, recorder.result())
        return Round(metrics.round_metrics(sample)), sample.complete, _problems(log.records, sample.telemetry)

    def send(self, number: int) -> RoundLog:
        """Send the requests of one round."""
        drawn = prompts(self.workload, number, vocabulary=self.vocabulary, nonce=self.settings.nonce)
        plan = self.engine.endpoint.plan(
            drawn,
            concurrency=self.workload.concurrency,
            request_timeout_s=self.settings.request_timeout_s,
            stall_timeout_s=self.settings.stall_timeout_s,
        )
        log = self.client.play(plan)
        if log.stalled:
            raise self.engine.failure(
                f"HANG: no token came on any connection for {self.settings.stall_timeout_s:g} s"
                " (--llmperf-stall-timeout), though the engine had not ended."
            )
        return log


def _problems(records: tuple[RequestRecord, ...], told: telemetry.Telemetry | None) -> list[str]:
    """Return why a round must not be judged; `told` is None for the warm-up."""
    found = []
    errors = Counter(record.error for record in records if record.error is not None)
    if errors:
        shown = "; ".join(f"{count}x {error}" for error, count in errors.most_common(3))
        found.append(f"{errors.total()} of {len(records)} requests failed: {shown}")
    if told is None:
        return found
    if told.restarted:
        found.append("the engine's counters went down: it was restarted during the round")
    if told.prefix_hit_tokens:
        found.append(
            f"{told.prefix_hit_tokens:,.0f} prompt tokens came from the prefix cache, though no two prompts are alike:"
            " the endpoint was sent these prompts before; restart it or change the workload's seed"
        )
    counted = sum(record.output_tokens or 0 for record in records)
    if told.output_tokens is not None and not errors and told.output_tokens < counted:
        found.append(f"the client counted {counted:,} output tokens, the engine only {told.output_tokens:,.0f}")
    return found
