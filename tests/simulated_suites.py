"""The plugin's error rates end to end: many suites, each a real pytest run, in virtual time.

    python -m tests.simulated_suites --suites 200 --slow-down 1.0     # clean: how many suites are red?
    python -m tests.simulated_suites --suites 200 --slow-down 1.05    # how many of the slower ones are?

Each suite records its own baselines and is then run once against them. Options, collection, engine pool, protocol, launches,
metrics, baseline files, verdicts and reports are the plugin's own. Two things are replaced, in the same process: what opens an
engine, and the load process. Both play the simulated engine's clock model without waiting for it.

Suite `n` of a seed has the same noise at every slow-down, so that two runs differ by the slow-down only. As in the simulated
engine, noise is a factor on everything that takes time: all latencies of a case move together. Rounds arrive a little quieter
than was asked for, because a launch drops its first rounds until two agree.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import math
import multiprocessing
import os
import secrets
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import msgspec
import pytest
from scipy.special import betaincinv

from pytest_llmperf.judge import baseline as store
from pytest_llmperf.measure.client.endpoint import Endpoint
from pytest_llmperf.measure.client.messages import RoundLog
from pytest_llmperf.measure.client.response import RequestRecord
from pytest_llmperf.measure.engines.engine import Completion, EngineError
from pytest_llmperf.measure.engines.phases import Phases
from pytest_llmperf.testing import wire
from pytest_llmperf.testing.clock import Clock
from pytest_llmperf.testing.scheduler import Request, Scheduler, token_times_s

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pytest_llmperf.measure.client.messages import RoundPlan
    from pytest_llmperf.measure.client.processes import LoadClient
    from pytest_llmperf.measure.client.prompts import Prompt
    from pytest_llmperf.plan.engine import EngineSpec

_SUITES_PER_SEED = 1_000_000
_SHOWN = 3
"""Broken suites that are shown; they are most often broken alike."""
_TAIL = 1500
"""Characters that are shown of a broken suite's output and of each failure in it."""
_PYTEST = (
    "-q", "-s", "--disable-warnings", "--import-mode=importlib", "--disable-plugin-autoload", "-p", "pytest_llmperf.plugin",
    "-p", "no:cacheprovider", "-p", "no:faulthandler", "-p", "no:logging", "-p", "no:unraisableexception",
)  # fmt: skip
"""Only what a suite of the plugin needs: the environment's other plugins would take longer than the tests."""
_GOOD = ("PASS", "IMPROVED", "REGRESSED", "INCONCLUSIVE")


@dataclass(frozen=True)
class Design:
    """What a suite is, and how its engines vary."""

    tests: int = 12
    engines: int = 3
    launches: int = 10
    """Engine starts that the baselines are recorded from."""
    max_launches: int = 8
    launch_cv: float = 0.01
    """Noise between engine starts, shared by all tests on a start."""
    round_cv: float = 0.01
    slow_down: float = 1.0
    """Factor on every duration of the comparison; 1 is a clean suite."""
    seed: int = 0


@dataclass(frozen=True)
class SuiteResult:
    """What came of one suite."""

    number: int
    red: bool = False
    """The comparison ended with exit code 1."""
    statuses: tuple[str, ...] = ()
    """One per case."""
    launches: tuple[int, ...] = ()
    """One per case: the launches that its verdict took."""
    starts: tuple[int, ...] = ()
    """One per engine: how often the comparison started it."""
    promised: tuple[int, ...] = ()
    """One per engine: the launches of its most undecided case, which is how often it should have been started."""
    noise: tuple[float, float] = (math.nan, math.nan)
    """Variance of the logarithm of throughput in the baselines, between launches and between rounds."""
    wall_s: float = 0.0
    broken: str = ""
    """Why the suite proves nothing; empty for a sound one."""


# --- what is replaced ----------------------------------------------------------------------------------------------


class _Body(msgspec.Struct):
    prompt: list[int]


_BODY = msgspec.json.Decoder(_Body)


@functools.lru_cache(maxsize=1024)
def _quiet_times_s(
    clock: Clock, prompts: tuple[int, ...], output_tokens: tuple[int, ...], concurrency: int
) -> tuple[tuple[float, ...], ...]:
    """Return per request its send time and its token times, on an engine without noise.

    A round's noise is a factor on all of its steps, so every round of a workload is this one, scaled.
    """
    longest = max(prompts) + max(output_tokens)
    if concurrency * math.ceil(longest / clock.block_size) >= clock.num_gpu_blocks:
        raise ValueError("the KV cache is too small: what is preempted is not counted here")
    requests = [Request(n, (0,) * prompt, tokens) for n, (prompt, tokens) in enumerate(zip(prompts, output_tokens, strict=True))]
    times = token_times_s(clock, requests, concurrency)
    return tuple(times[request.request_id] for request in requests)


class VirtualEngine:
    """An engine on which rounds take no time: the simulated engine's clock, counters and noise, without its server."""

    gpus: tuple[int, ...] = ()
    watch = None
    log_path = None

    def __init__(self, spec: EngineSpec, clock: Clock) -> None:
        """Start it, which draws the noise of this launch."""
        self.spec = spec
        self.url = "http://virtual"
        self.endpoint = Endpoint(self.url, spec.model)
        self.startup_s, self.phases = clock.noise(), Phases()
        self.versions = {"simulated": "virtual"}
        self._launch_noise = clock.noise()
        self._scheduler = Scheduler(clock)  # holds the counters; its steps are never played
        self._quiet = replace(clock, launch_cv=0.0, round_cv=0.0, seed=0, launch=0, prefix_cache=False)
        self._now_s = 0.0
        self._seen: set[tuple[int, ...]] = set()

    def play(self, prompts: Sequence[Prompt], client: LoadClient, **how: Any) -> RoundLog:
        """Send the prompts as a real engine does."""
        return client.play(self.endpoint.plan(prompts, **how))

    def answer(self, plan: RoundPlan) -> RoundLog:
        """Return what a client sees of one round."""
        counters = self._scheduler.counters
        prompts = [tuple(_BODY.decode(request.partition(b"\r\n\r\n")[2]).prompt) for request in plan.requests]
        sizes = tuple(map(len, prompts))
        quiet = _quiet_times_s(self._quiet, sizes, plan.output_tokens, plan.concurrency)
        factor = self._launch_noise * self._scheduler.clock.noise(counters.rounds)
        counters.rounds += 1
        counters.prompt_tokens += sum(sizes)
        counters.generation_tokens += sum(plan.output_tokens)
        counters.requests_finished += len(prompts)
        counters.prefix_queries += sum(sizes)
        counters.prefix_hits += sum(map(len, self._seen.intersection(prompts)))  # a case measured twice on one start
        self._seen.update(prompts)
        start_s = self._now_s
        records = []
        for size, wanted, times in zip(sizes, plan.output_tokens, quiet, strict=True):
            sent_s, *tokens = (start_s + instant * factor for instant in times)
            records.append(RequestRecord(sent_s, tuple(tokens), tokens[-1], prompt_tokens=size, output_tokens=wanted))
            self._now_s = max(self._now_s, tokens[-1])
        return RoundLog(tuple(records))

    def metrics_text(self) -> str:
        """Return the counters as the simulated engine's `/metrics` shows them."""
        return wire.metrics_text(self._scheduler, self.spec.model)

    def log_text(self) -> str:
        """Return an empty log."""
        return ""

    def check(self) -> None:
        """Do nothing: it cannot die."""

    def failure(self, what: str) -> EngineError:
        """Return an error that says what happened."""
        return EngineError(what)

    def generate(self, prompt: str | list[int], *, max_tokens: int = 16) -> Completion:
        """Return a completion without text."""
        return Completion("", len(prompt), max_tokens)


class Machine:
    """Where a pytest run starts its engines: one at a time, each start with noise of its own."""

    processes = 1

    def __init__(self, clock: Clock) -> None:
        """Note the noise, and with the clock's `launch` the number of the first start."""
        self.starts: Counter[EngineSpec] = Counter()
        self._clock = clock
        self._running: VirtualEngine | None = None

    @contextlib.contextmanager
    def open_engine(self, spec: EngineSpec, *_: object) -> Iterator[VirtualEngine]:
        """Yield a new engine, in the place of the plugin's function of this name."""
        if self._running is not None:
            raise RuntimeError("an engine was started while another one ran")
        given: dict[str, Any] = {name.replace("-", "_"): int(values[0]) for name, values in spec.args}
        clock = replace(self._clock, tp=spec.tp, launch=self._clock.launch + self.starts.total(), **given)
        self.starts[spec] += 1
        self._running = VirtualEngine(spec, clock)
        try:
            yield self._running
        finally:
            self._running = None

    def play(self, plan: RoundPlan) -> RoundLog:
        """Play a round on the running engine, in the place of the load process."""
        if self._running is None:
            raise RuntimeError("a round was sent while no engine ran")
        return self._running.answer(plan)

    def close(self) -> None:
        """Do nothing: there is no process to end."""


# --- one suite -----------------------------------------------------------------------------------------------------


def write_project(folder: Path, design: Design) -> Path:
    """Write the suite's tests, unlike each other and spread over the engines, and return their file."""
    lines = ["import pytest", ""]
    for number in range(design.tests):
        engine = f'engine_args="--max-num-seqs {64 + number % design.engines}"'
        workload = f"prompt_tokens={16 + number}, output_tokens={8 + number % 5}, requests=16"
        lines += [
            "",
            f"@pytest.mark.llmperf({engine}, concurrency={4 + 4 * (number // design.engines % 2)})",
            f"def test_{number}(llmperf, baseline):",
            f"    assert llmperf({workload}) == baseline",
            "",
        ]
    (folder / "pytest.ini").write_text("[pytest]\n")
    # A name that no other project in this process has: pytest takes a module of the same name for the same module.
    file = folder / f"test_suite_{secrets.token_hex(4)}.py"
    file.write_text("\n".join(lines))
    return file


class _Failures:
    """A pytest plugin: which tests failed, and why."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a report that is not as it should be."""
        if report.failed:
            self.found[report.nodeid] = report.longreprtext


def run_pytest(file: Path, machine: Machine, *arguments: str) -> tuple[int, dict[str, str], str]:
    """Run pytest on the machine, in this process; return its exit code, the failed tests with their reasons, and the output."""
    failures, output = _Failures(), io.StringIO()
    fixed = (*_PYTEST, "--llmperf-engine=simulated", "-c", str(file.with_name("pytest.ini")), str(file))
    with (
        mock.patch("pytest_llmperf.run.pool.open_engine", machine.open_engine),
        mock.patch("pytest_llmperf.run.pool.LoadClient", return_value=machine),
        mock.patch.dict(os.environ),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        for name in ("PYTEST_ADDOPTS", "PYTEST_PLUGINS"):
            os.environ.pop(name, None)
        code = pytest.main([*fixed, *arguments], plugins=[failures])
    return int(code), failures.found, output.getvalue()


def run_suite(file: Path, design: Design, number: int) -> SuiteResult:
    """Record the baselines of a suite, run it against them, and return what came of it."""
    started_s = time.perf_counter()
    folder = file.parent / f"suite-{number}"
    folder.mkdir()
    try:
        result = _record_and_compare(file, folder, design, number)
    except Exception:  # one broken suite must not end the others
        result = SuiteResult(number, broken=traceback.format_exc())
    finally:
        shutil.rmtree(folder)
    return replace(result, wall_s=time.perf_counter() - started_s)


def _record_and_compare(file: Path, folder: Path, design: Design, number: int) -> SuiteResult:
    baselines, told = folder / "baselines", folder / "llmperf.json"
    common = (f"--llmperf-baselines={baselines}", f"--basetemp={folder / 'tmp'}")
    seed = design.seed * _SUITES_PER_SEED + number
    clock = Clock(launch_cv=design.launch_cv, round_cv=design.round_cv, seed=seed)
    before = Machine(clock)
    code, failures, output = run_pytest(file, before, *common, "--update-baselines", f"--llmperf-launches={design.launches}")
    if code or set(before.starts.values()) != {design.launches}:
        starts = ", ".join(map(str, before.starts.values()))
        problems = [f"recording: exit code {code}, engine starts {starts}", *_shown(failures)]
        return SuiteResult(number, broken="\n".join([*problems, output[-_TAIL:]]))
    now = Machine(replace(clock, slow_down=design.slow_down, launch=before.starts.total()))
    limits = (f"--llmperf-max-launches={design.max_launches}", f"--llmperf-json={told}")
    code, failures, output = run_pytest(file, now, *common, *limits)
    text = told.read_text() if told.is_file() else ""  # usage errors write none
    cases: list[dict[str, Any]] = json.loads(text)["cases"] if text else []
    result = SuiteResult(
        number,
        red=code == 1,
        statuses=tuple(case["status"] for case in cases),
        launches=tuple(len(case["launches"]) for case in cases),
        starts=tuple(sorted(now.starts.values())),
        promised=_promised(cases),
        noise=_noise(baselines),
    )
    problems = _problems(result, design, code)
    # What fails and is none of our tests is the verdict on the suite as a whole, which is red for a reason too.
    fine = {case["nodeid"] for case in cases if case["status"] == "REGRESSED"}
    problems += _shown({test: why for test, why in failures.items() if test.startswith(file.name) and test not in fine})
    return replace(result, broken="\n".join([*problems, output[-_TAIL:]]) if problems else "")


def _shown(failures: dict[str, str]) -> list[str]:
    return [f"{test} failed, and did not regress: {why[-_TAIL:]}" for test, why in failures.items()]


def _promised(cases: list[dict[str, Any]]) -> tuple[int, ...]:
    most: Counter[str] = Counter()
    for case in cases:
        engine = json.dumps(case["engine"], sort_keys=True)
        most[engine] = max(most[engine], len(case["launches"]))
    return tuple(sorted(most.values()))


def _problems(result: SuiteResult, design: Design, code: int) -> list[str]:
    found = [] if code in (0, 1) else [f"comparison: exit code {code}"]
    if len(result.statuses) != design.tests:
        found.append(f"{len(result.statuses)} cases were reported, not {design.tests}")
    found += [f"a case is {status}" for status in sorted(set(result.statuses).difference(_GOOD))]
    if result.starts != result.promised:
        found.append(f"engines were started {result.starts} times, but the most launches of their cases are {result.promised}")
    return found


def _noise(folder: Path) -> tuple[float, float]:
    """Return the mean variance of log throughput between launches and between rounds (analysis of variance)."""
    between, within = [], []
    for path in folder.rglob("*.json"):
        stored = store.load(path)
        launches = stored.launches if stored else ()
        logs = [[math.log(value) for value in one.values("output_tokens_per_s") if value] for one in launches]
        if len(logs) < 2 or any(len(one) < 2 for one in logs):
            continue
        inside = statistics.mean(map(statistics.variance, logs))
        within.append(inside)
        between.append(statistics.variance(map(statistics.mean, logs)) - inside / len(logs[0]))
    return (statistics.mean(between), statistics.mean(within)) if between else (math.nan, math.nan)


# --- many suites ---------------------------------------------------------------------------------------------------


def run_suites(design: Design, suites: int, *, workers: int = 1) -> Iterator[SuiteResult]:
    """Yield what came of each suite, in order; one worker is this process."""
    with tempfile.TemporaryDirectory(prefix="llmperf-suites-") as folder, contextlib.ExitStack() as stack:
        run = functools.partial(run_suite, write_project(Path(folder), design), design)
        if workers == 1:
            yield from map(run, range(suites))
            return
        spawn = multiprocessing.get_context("spawn")
        pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=spawn))
        yield from pool.map(run, range(suites))


def upper_bound(found: int, of: int, confidence: float = 0.95) -> float:
    """Return the largest rate that a one-sided Clopper-Pearson test does not rule out."""
    return 1.0 if found >= of else float(betaincinv(found + 1, of - found, confidence))


def _rate(found: int, of: int) -> str:
    low, high = 1 - upper_bound(of - found, of), upper_bound(found, of)
    return f"{found} of {of}: {found / of:.2%} (95 % one-sided: at least {low:.2%}, at most {high:.2%})"


def table(design: Design, results: Sequence[SuiteResult], wall_s: float) -> str:
    """Return the results of sound suites as a Markdown table."""
    rows = [("suites", f"{len(results)} of {design.tests} tests on {design.engines} engines, all {design.slow_down:g} x as slow")]
    if results:
        statuses = Counter(status for result in results for status in result.statuses)
        caught, caught_suites = statuses["REGRESSED"], sum("REGRESSED" in result.statuses for result in results)
        launches = [number for result in results for number in result.launches]
        starts = [sum(result.starts) for result in results]
        noise = [math.sqrt(max(statistics.mean(parts), 0.0)) for parts in zip(*(one.noise for one in results), strict=True)]
        asked = f"asked: {design.launch_cv:.2%} and {design.round_cv:.2%}"
        rows += [
            ("red suites", _rate(sum(result.red for result in results), len(results))),
            ("suites with a REGRESSED case", str(caught_suites)),
            ("red only as a whole", str(sum(result.red and "REGRESSED" not in result.statuses for result in results))),
            ("cases caught (REGRESSED)", f"{caught} of {len(launches)}: {caught / len(launches):.2%}"),
            ("cases INCONCLUSIVE", str(statuses["INCONCLUSIVE"])),
            ("cases PASS, IMPROVED", f"{statuses['PASS']}, {statuses['IMPROVED']}"),
            ("launches per case", f"mean {statistics.mean(launches):.2f}, max {max(launches)} of {design.max_launches}"),
            ("engine starts per suite", f"mean {statistics.mean(starts):.2f}, max {max(starts)}; as promised in every suite"),
            ("noise of throughput that arrived", f"launches {noise[0]:.2%}, rounds {noise[1]:.2%} ({asked})"),
            ("wall time", f"{wall_s:.1f} s, {wall_s / len(results):.2f} s per suite"),
        ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suites and print the table; return 1 if a suite broke, however many are red."""
    parser = argparse.ArgumentParser("tests.simulated_suites", description=__doc__.partition("\n")[0])
    parser.add_argument("--suites", type=int, default=200)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: one per core)")
    for one in fields(Design):
        parser.add_argument(f"--{one.name.replace('_', '-')}", type=type(one.default), default=one.default)
    given = vars(parser.parse_args(arguments))
    suites, workers = given.pop("suites"), given.pop("workers")
    design = Design(**given)
    started_s = time.perf_counter()
    sound, broken = [], 0
    for result in run_suites(design, suites, workers=workers):
        if result.broken:
            broken += 1
            if broken <= _SHOWN:
                print(f"suite {result.number} broke: {result.broken}\n", file=sys.stderr, flush=True)
        else:
            sound.append(result)
    print(table(design, sound, time.perf_counter() - started_s))
    if broken:
        print(f"\n{broken} suites broke and are not in the table.")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
