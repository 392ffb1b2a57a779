"""What was measured: rounds, launches of an engine, and the measurement that a test gets."""

from __future__ import annotations

import difflib
import statistics
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pytest_llmperf.measure import audit, metrics
from pytest_llmperf.measure.gpus.memory import GpuMemory, RankMemory
from pytest_llmperf.measure.limits import broken, check_metrics
from pytest_llmperf.measure.samples import of_counters, of_samples
from pytest_llmperf.plan.limits import NO_LIMITS, LocalLimits, parse_limits

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pytest_llmperf.plan.case import Case


_ALIKE = 0.95
"""A server that reaches this share of the engine's own throughput does not limit it."""


@dataclass(frozen=True)
class Round:
    """One pass of the workload."""

    metrics: dict[str, float | None]
    counters: dict[str, float] = field(default_factory=dict)
    """By how much each counter of the engine has grown, by its exported name; a baseline has those that gate, as metrics."""


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
    warnings: tuple[str, ...] = ()
    """What a reader should know of how it was measured, though it counts."""
    versions: dict[str, str] = field(default_factory=dict)
    model: str = ""
    """What an endpoint serves, by the name that it answers to; empty for an engine that is started: it has what was asked for."""
    job: str = ""
    """The pytest run that measured it: launches of one run share the state that the host was in."""
    memory: tuple[RankMemory, ...] = ()
    """The GPU memory of each rank; empty on CPU."""
    played_s: float = 0.0
    """Seconds in which requests were played, warm-up and dropped rounds included."""
    samples: dict[str, bytes] = field(default_factory=dict, repr=False)
    """What any percentile is computed from (`measure.samples`), as long as the test runs; never stored."""

    def values(self, metric: str) -> list[float | None]:
        """Return a metric's value in every round, or its one value of the launch."""
        if metric in self.metrics:
            return [self.metrics[metric]]
        if any(metric in each.metrics for each in self.rounds):
            return [each.metrics.get(metric) for each in self.rounds]
        if (value := of_samples(self.samples, metric)) is not None:
            return [value]
        return [of_counters(each.counters, metric) for each in self.rounds]

    def keeping(self, names: Iterable[str]) -> Launch:
        """Return the launch as it is stored: percentiles and counters of these names are metrics, and all others are gone."""
        of_launch, of_rounds = dict(self.metrics), [dict(each.metrics) for each in self.rounds]
        for name in names:
            if name in self.metrics or any(name in each.metrics for each in self.rounds):
                continue
            if (value := of_samples(self.samples, name)) is not None:
                of_launch[name] = value
            counted = [of_counters(each.counters, name) for each in self.rounds]
            for figures, growth in zip(of_rounds, counted, strict=True):
                figures.update({} if growth is None else {name: growth})
        return replace(self, metrics=of_launch, rounds=tuple(map(Round, of_rounds)), samples={})


@dataclass(frozen=True, eq=False)  # `==` is left to the baseline fixture, which judges
class Measurement:
    """The launches of one case in this run. `measured["ttft_p50_s"]` and `measured.preemptions` are medians over all rounds."""

    case: Case
    launches: tuple[Launch, ...]
    limits: LocalLimits = field(default=NO_LIMITS, repr=False)
    """What marker and point say that metrics must not pass."""

    def __getitem__(self, metric: str) -> float:
        """Return a metric's median over all rounds of all launches.

        Raises KeyError for an unknown metric, and for one that could not be measured: a missing number is never 0.
        """
        values = [value for launch in self.launches for value in launch.values(metric) if value is not None]
        if values:
            return statistics.median(values)
        if metric in metrics.BY_NAME or (metrics.is_metric(metric) and metrics.find(metric).kind != "count"):
            raise KeyError(f"{metric!r} was not measured by this engine")
        counters = sorted({name for launch in self.launches for each in launch.rounds for name in each.counters})
        if metrics.is_metric(metric) and not counters:
            raise KeyError(f"{metric!r} was not measured: this engine tells no counters, or they are not believed")
        if near := difflib.get_close_matches(metric, counters, 3):
            # A gauge is told by the engine under that name, but it has no growth.
            raise KeyError(f"{metric!r} is no counter that this engine tells; those with such names are {', '.join(near)}")
        raise KeyError(f"{metric!r} is not a metric; known are {', '.join(metrics.BY_NAME)}")

    def __getattr__(self, name: str) -> float:
        """Return a metric like `measured[name]`; raises AttributeError also for one that could not be measured."""
        if not name.startswith("_") and metrics.is_metric(name):
            try:
                return self[name]
            except KeyError as error:
                raise AttributeError(error.args[0]) from None
        raise AttributeError(f"a measurement has no {name!r}; its metrics are {', '.join(metrics.BY_NAME)}")

    @property
    def invalid(self) -> tuple[str, ...]:
        """Return why the measurement must not be judged; empty when every launch is sound."""
        return tuple(dict.fromkeys(reason for launch in self.launches for reason in launch.invalid))

    def broken_limits(self, limits: Mapping[str, object] | None = None) -> tuple[str, ...]:
        """Return a sentence for each limit that is not kept, or whose metric was not measured; empty where all are.

        Limits are those of the marker, over them those of the test's point, and over them `limits`: metric and number, or such
        dicts by accelerator. None lifts a limit. Raises ValueError for what is no limit or no metric.
        """
        more = parse_limits(limits, origin="broken_limits(...)")
        check_metrics(more)
        return broken(self.limits.bounds(more), self.__getitem__)

    @property
    def gpu_memory(self) -> GpuMemory:
        """Return the GPU memory of the last launch by rank; asking it raises KeyError where there is none."""
        return GpuMemory(self.launches[-1].memory if self.launches else ())

    def limited_by(self, offline: Measurement) -> str:
        """Return what keeps a server from the throughput of the engine alone: client, front end, or engine, with the figures."""
        return _limit(self, offline)


def _limit(online: Measurement, offline: Measurement) -> str:
    """Return who limits an engine behind a server: `client`, `front end` or `engine`, and the figures that say so."""
    sent, alike = online.case.workload, online.case.workload.fingerprint == offline.case.workload.fingerprint
    if sent.is_open or not alike:
        raise ValueError(
            "limited_by: what limits is seen where requests are sent as fast as they are answered, and of one workload;"
            f" {online.case.id} and {offline.case.id} are {'sent at a rate' if sent.is_open else 'two workloads'}"
        )

    def value(metric: str) -> float | None:
        try:
            return online[metric]
        except KeyError:
            return None  # no load process took part, or no request had to wait for another

    served, alone = online["output_tokens_per_s"], offline["output_tokens_per_s"]
    share, cpu, delay_s = served / alone, value("client_cpu_cores"), value("send_delay_p99_s")
    figures = f"{served:,.0f} tok/s behind the server, {alone:,.0f} without ({share:.0%})"
    figures += "" if cpu is None else f"; the client took {cpu:.0%} of a core"
    if (cpu or 0) > audit.BUSY or (delay_s or 0) > max(audit.LATE_S, audit.LATE_SHARE * online["e2e_p50_s"]):
        late = "" if delay_s is None else f", and 1 % of its requests were {delay_s * 1e3:.1f} ms late or more"
        return f"client: {figures}{late}"
    return f"{'engine' if share >= _ALIKE else 'front end'}: {figures}"
