"""One launch: warm up, then rounds. This is the only file that knows the order.

The engine is running already; which engine and when it starts is the caller's business, because one start serves all the
cases of its spec.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from typing import TYPE_CHECKING

from pytest_llmperf.measure import arrivals, audit, formulas, idle, metrics, samples, telemetry
from pytest_llmperf.measure.client.prompts import WARM_UP, prompts
from pytest_llmperf.measure.gpus.memory import rank_memory
from pytest_llmperf.measure.gpus.sampling import RoundWatch
from pytest_llmperf.measure.host.model import model_config
from pytest_llmperf.measure.host.preflight import link_warning, power_warning
from pytest_llmperf.measure.kv_cache import read_capacity
from pytest_llmperf.measure.measurement import Launch, Round
from pytest_llmperf.measure.plausibility import caused_by, counted_by_usage
from pytest_llmperf.plan.kinds import kind_of
from pytest_llmperf.units import duration, quantity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from pytest_llmperf.measure.client.messages import RoundLog
    from pytest_llmperf.measure.client.processes import LoadClient
    from pytest_llmperf.measure.client.prompts import Prompt
    from pytest_llmperf.measure.client.response import RequestRecord
    from pytest_llmperf.measure.engines.engine import Engine
    from pytest_llmperf.measure.exposition import Scrape
    from pytest_llmperf.measure.gpus.summary import GpuRound
    from pytest_llmperf.plan.workload import Workload

_STEADY = 0.02
"""Two rounds agree, and the warm-up is over, when their throughput differs by no more than this share."""
_MOST_DROPPED = 3
MOST_DISTURBED = 3
"""Rounds of a launch that are measured again because something was wrong with a GPU."""
CALM_S = 60.0
"""How long a GPU may take to cool down, and other processes to leave it, before a round is measured again."""


@dataclass(frozen=True)
class RoundSettings:
    """How rounds are played."""

    nonce: str
    """Keeps the prompts of different cases apart; see `client.prompts`."""
    rounds: int = 5
    job: str = ""
    request_timeout_s: float = 600.0
    stall_timeout_s: float = 120.0
    idle_s: float | None = None
    """How long the engine idles before its rounds are played again; None: not at all."""


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
    player = Player(engine, client, workload, settings)
    rounds = _play_rounds(player, progress)
    idled = _play_after_idling(player, rounds, progress) if settings.idle_s and not rounds.invalid else {}
    warnings = (*_warnings(player, rounds), *idle.warnings(idled, settings.idle_s or 0.0))
    return player.launch(rounds.kept, idled, dropped=rounds.dropped, invalid=rounds.invalid, warnings=warnings)


@dataclass
class _Rounds:
    """The rounds of a launch."""

    kept: list[Played] = field(default_factory=list)
    dropped: int = 0
    """Rounds before the engine was steady."""
    disturbed: list[str] = field(default_factory=list)
    """Why rounds were measured again."""
    invalid: list[str] = field(default_factory=list)


def _play_rounds(player: Player, progress: Callable[[str], None]) -> _Rounds:
    """Warm up and play the rounds, up to the first that makes the launch invalid."""
    wanted = player.settings.rounds
    rounds = _Rounds(invalid=player.warm_up())
    while not rounds.invalid and len(rounds.kept) < wanted:
        played = player.round()
        if played.trouble and len(rounds.disturbed) < MOST_DISTURBED and not played.problems:
            progress(f"round dropped: {played.trouble[0]}")
            if player.wait_until_undisturbed():
                rounds.disturbed.append(played.trouble[0])
                continue
        rounds.kept.append(played)
        rounds.invalid = [*played.problems, *played.trouble]
        progress(f"round {len(rounds.kept)}/{wanted}: {quantity(played.round.metrics['output_tokens_per_s'], 'tok/s')}")
        if len(rounds.kept) == 2 and rounds.dropped < _MOST_DROPPED and not _agree(*(played.round for played in rounds.kept)):
            del rounds.kept[0]
            rounds.dropped += 1
    return rounds


def _play_after_idling(player: Player, rounds: _Rounds, progress: Callable[[str], None]) -> dict[str, float | None]:
    """Let the engine idle, and return what as many rounds come to after it; a round that proves nothing makes all invalid."""
    workload, idle_s = player.workload, player.settings.idle_s or 0.0
    progress(f"idling for {duration(idle_s)}")
    player.engine.idle(idle_s)
    player.workload = idle.single(workload)
    first = player.round()
    player.workload = workload
    rounds.invalid = audit.failures(first.records)
    after: list[Played] = []
    while not rounds.invalid and len(after) < len(rounds.kept):
        after.append(player.round())
        rounds.invalid = [*after[-1].problems, *after[-1].trouble]
        shown = quantity(after[-1].round.metrics["output_tokens_per_s"], "tok/s")
        progress(f"round {len(after)}/{len(rounds.kept)} after idling: {shown}")
    before = [played.round for played in rounds.kept]
    return {} if rounds.invalid else idle.ratios(before, [played.round for played in after], first.records[0])


def _start_warnings(engine: Engine) -> Iterator[str]:
    """Yield what a reader should know of how an engine was started."""
    if engine.phases.cold:
        yield "a cold start: graphs were compiled, and did not come from the cache; its times are compared with cold starts only"


def _warnings(player: Player, rounds: _Rounds) -> Iterator[str]:
    """Yield what a reader should know of how the rounds were measured."""
    yield from audit.warnings(player.workload, [played.round.metrics for played in rounds.kept])
    yield from arrivals.warnings([record for played in rounds.kept for record in played.complete])
    yield from filter(None, (player.late, player.early))
    if player.unstamped:
        yield audit.UNSTAMPED
    if not player.engine.endpoint.takes_ids and player.workload.api == "completions":
        yield "prompts were words, whose tokens only the server can count: this endpoint takes no token ids"
    yield from dict.fromkeys(text for played in rounds.kept for text in played.notes)
    if player.engine.watch:
        gpus = player.engine.watch.gpus
        yield from filter(None, (link_warning(player.engine.spec, gpus), power_warning(gpus)))
    yield from dict.fromkeys(text for played in rounds.kept if played.gpus for text in played.gpus.warnings)
    yield from (f"a round was measured again: {reason}" for reason in rounds.disturbed)


def _agree(earlier: Round, later: Round) -> bool:
    old, new = earlier.metrics["output_tokens_per_s"], later.metrics["output_tokens_per_s"]
    return bool(old and new and abs(new / old - 1) <= _STEADY)


@dataclass(frozen=True)
class Played:
    """A round as it came out."""

    round: Round
    records: tuple[RequestRecord, ...]
    """All its requests, failed ones too."""
    complete: tuple[RequestRecord, ...]
    classes: tuple[str, ...]
    """The class of each complete request; empty where there are none."""
    problems: list[str]
    notes: tuple[str, ...] = ()
    """What a reader should know though it counts: failures that were tolerated, audits without a source."""
    gpus: GpuRound | None = None

    @property
    def trouble(self) -> tuple[str, ...]:
        """Return what was wrong with the GPUs: unlike a problem it may pass."""
        return self.gpus.trouble if self.gpus else ()


class Player:
    """Plays rounds one after the other, each with prompts of its own."""

    def __init__(self, engine: Engine, client: LoadClient, workload: Workload, settings: RoundSettings) -> None:
        """Note what to play on which engine; nothing is sent yet."""
        self.engine = engine
        self.client = client
        self.workload = workload
        """What the next round sends; a search for the largest load changes it."""
        self.settings = settings
        # What an endpoint serves is known by the name it answers to; its spec only has the name that the user gave it.
        model = engine.spec.model if kind_of(engine.spec.kind).starts else engine.endpoint.model
        self._vocabulary = model_config(model).get("vocab_size")
        self._number = 0
        self.late: str | None = None
        """That requests were sent late in some round, and how much."""
        self.unstamped = False
        """The kernel gave no receive stamps in some round."""
        self.early: str | None = None
        """That the requests of some round were used up before its time was over."""
        self.played_s = 0.0
        self._last: Scrape | None = None
        """What the engine told after the last round, or the warm-up."""
        self._started = datetime.now(UTC).isoformat(timespec="seconds")

    def launch(
        self,
        kept: Sequence[Played],
        further: dict[str, float | None],
        *,
        invalid: Sequence[str],
        warnings: Iterable[str],
        dropped: int = 0,
    ) -> Launch:
        """Return the launch that these rounds come to, with further metrics; raises EngineError where the engine is dead."""
        engine = self.engine
        if invalid:
            engine.check()
        capacity = read_capacity(engine.metrics_text(), engine.log_text(), cores=engine.spec.dp)
        complete = tuple(chain.from_iterable(played.complete for played in kept))
        classes = tuple(chain.from_iterable(played.classes for played in kept))
        memory = rank_memory(engine.watch, [played.gpus for played in kept if played.gpus]) if engine.watch else ()
        sample = formulas.LaunchSample(engine.startup_s, capacity, complete, classes, memory, engine.phases)
        return Launch(
            id=uuid.uuid4().hex[:12],
            started=self._started,
            rounds=tuple(played.round for played in kept),
            metrics=metrics.launch_metrics(sample) | further,
            dropped_rounds=dropped,
            invalid=tuple(invalid),
            warnings=(*_start_warnings(engine), *warnings),
            versions=dict(engine.versions),
            model="" if kind_of(engine.spec.kind).starts else engine.endpoint.model,
            job=self.settings.job,
            memory=memory,
            played_s=self.played_s,
            samples=samples.kept_samples(sample),
        )

    def warm_up(self) -> list[str]:
        """Send one full wave of other prompts of the real lengths; return why nothing can be measured.

        Where the load process was busy, one more is started now: not between two rounds, which would then not be alike.
        """
        recorder, drawn = telemetry.Recorder(self.engine), self._prompts(WARM_UP)
        with recorder:
            log = self._send(drawn)
        # Counted late, these requests would be the first round's, and an engine that is restarted now would be two.
        recorder.result(caused_by(sum(prompt.output_tokens for prompt in drawn), log.records))
        self._last = recorder.last
        while audit.is_busy(log) and self.client.processes < audit.MOST_PROCESSES:
            self.client.grow()
            log = self._send(self._prompts(WARM_UP - self.client.processes))
        return audit.failures(log.records, self.workload.tolerated_failures)

    def round(self) -> Played:
        """Play the next round."""
        workload, drawn = self.workload, self._prompts(self._number)
        recorder, watch = telemetry.Recorder(self.engine), self.engine.watch
        gpu_watch = RoundWatch(watch) if watch else None
        with recorder, gpu_watch or contextlib.nullcontext():
            log, sent = self._send(drawn, stop_s=workload.stops_s).sent()
        gpus = gpu_watch.result() if gpu_watch else None
        between = f"round {self._number} and {self._number + 1}" if self._number else "the warm-up and round 1"
        self._number += 1
        classes = tuple(drawn[index].request_class for index in sent) if workload.classes else ()
        sample = formulas.RoundSample(
            log.records,
            recorder.result(caused_by(sum(prompt.output_tokens for prompt in drawn), log.records)),
            classes=classes,
            concurrency=None if workload.is_open else workload.concurrency,
            slo=workload.slo,
            cpu_share=log.cpu_share,
            gpus=gpus,
        )
        # Not strict: there may be no classes.
        of_complete = tuple(name for name, record in zip(classes, log.records, strict=False) if record.error is None)
        problems = audit.problems(log, sample.telemetry, workload, ranks=self.engine.spec.ranks)
        problems += filter(None, [telemetry.restarted(self._last, recorder.first, between)])
        self._last = recorder.last
        self.late = self.late or audit.lateness(log)
        self.unstamped |= audit.is_unstamped(log)
        self.early = self.early or audit.used_up(log, workload)
        played = Round(metrics.round_metrics(sample), dict(sample.telemetry.counters))
        failed = audit.failed_text(log.records)
        tolerated = f"{failed} (tolerated)" if failed and not problems else ""
        unproven = counted_by_usage(log.records) if workload.stream and sample.telemetry.output_tokens is None else None
        notes = tuple(filter(None, (tolerated, audit.without_source(sample.telemetry, workload), unproven)))
        return Played(played, log.records, tuple(sample.complete), of_complete, problems, notes, gpus)

    def wait_until_undisturbed(self) -> bool:
        """Let the GPUs cool down and others leave them; return whether a minute did it."""
        return self.engine.watch is None or self.engine.watch.wait_until_undisturbed(CALM_S)

    def _prompts(self, number: int) -> list[Prompt]:
        return prompts(self.workload, number, vocabulary=self._vocabulary, nonce=self.settings.nonce)

    def _send(self, drawn: list[Prompt], stop_s: float | None = None) -> RoundLog:
        """Send the requests of one round, or of a warm-up, which no time bounds."""
        settings, workload = self.settings, self.workload
        began_s = time.perf_counter()
        log = self.engine.play(
            drawn,
            self.client,
            concurrency=workload.concurrency,
            request_timeout_s=settings.request_timeout_s,
            stall_timeout_s=settings.stall_timeout_s,
            stream=workload.stream,
            max_concurrency=workload.max_concurrency,
            stop_s=stop_s,
        )
        self.played_s += time.perf_counter() - began_s
        if log.stalled:
            raise self.engine.failure(
                f"HANG: no token came on any connection for {settings.stall_timeout_s:g} s"
                " (--llmperf-stall-timeout), though the engine had not ended."
            )
        return log
