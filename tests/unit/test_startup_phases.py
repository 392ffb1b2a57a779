"""What a start was spent on: read from logs of vLLM in the words of its releases, and compared of like starts only."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.judge import noise
from pytest_llmperf.judge.baseline import Baseline
from pytest_llmperf.judge.gates import Tolerance
from pytest_llmperf.judge.lacking import lacking
from pytest_llmperf.judge.maths.stats import Design
from pytest_llmperf.judge.provenance import Provenance
from pytest_llmperf.judge.verdict import MetricVerdict, Status, judge
from pytest_llmperf.measure.engines.phases import Phases, read_phases
from pytest_llmperf.measure.formulas import LaunchSample
from pytest_llmperf.measure.kv_cache import Capacity
from pytest_llmperf.measure.measurement import Launch, Measurement, Round
from pytest_llmperf.measure.metrics import BY_NAME, launch_metrics
from pytest_llmperf.plan.case import Case
from pytest_llmperf.plan.engine import EngineSpec
from pytest_llmperf.plan.workload import Workload

V08 = """\
INFO 05-12 10:00:06 [core.py:58] Initializing a V1 LLM engine (v0.8.5) with config: model='m'
(VllmWorker rank=0 pid=71) INFO 05-12 10:00:12 [loader.py:458] Loading weights took 2.35 seconds
(VllmWorker rank=1 pid=72) INFO 05-12 10:00:12 [loader.py:458] Loading weights took 2.95 seconds
(VllmWorker rank=0 pid=71) INFO 05-12 10:00:13 [gpu_model_runner.py:1329] Model loading took 7.1 GB and 3.100000 seconds
(VllmWorker rank=1 pid=72) INFO 05-12 10:00:13 [gpu_model_runner.py:1329] Model loading took 7.1 GiB and 3.600000 seconds
(VllmWorker rank=0 pid=71) INFO 05-12 10:00:20 [backends.py:430] Dynamo bytecode transform time: 6.94 s
(VllmWorker rank=0 pid=71) INFO 05-12 10:00:23 [backends.py:136] Cache the graph of shape None for later use
(VllmWorker rank=0 pid=71) INFO 05-12 10:00:40 [backends.py:148] Compiling a graph for general shape takes 18.16 s
(VllmWorker rank=0 pid=71) INFO 05-12 10:00:45 [monitor.py:33] torch.compile takes 25.10 s in total
(VllmWorker rank=1 pid=72) INFO 05-12 10:00:45 [monitor.py:33] torch.compile takes 25.60 s in total
INFO 05-12 10:00:46 [kv_cache_utils.py:634] GPU KV cache size: 549,216 tokens
(VllmWorker rank=0 pid=71) INFO 05-12 10:01:07 [gpu_model_runner.py:1686] Graph capturing finished in 21 secs, took 0.50 GiB
(VllmWorker rank=1 pid=72) INFO 05-12 10:01:07 [gpu_model_runner.py:1686] Graph capturing finished in 20 secs, took 0.50 GiB
INFO 05-12 10:01:08 [core.py:159] init engine (profile, create kv cache, warmup model) took 50.10 seconds
"""
LATER = """\
(EngineCore_DP0 pid=94) INFO 03-09 12:57:11 [core.py:96] Initializing a V1 LLM engine (v0.16.0) with config: model='m'
(EngineCore_DP0 pid=94) INFO 03-09 12:57:23 [default_loader.py:293] Loading weights took 5.59 seconds
(EngineCore_DP0 pid=94) INFO 03-09 12:57:24 [gpu_model_runner.py:4344] Model loading took 3.85 GiB memory and 6.201251 seconds
(EngineCore_DP0 pid=94) INFO 03-09 12:57:31 [backends.py:283] Directly load the compiled graph(s) for compile range (1, 4096) \
from the cache, took 0.961 s
(EngineCore_DP0 pid=94) INFO 03-09 12:57:31 [monitor.py:35] torch.compile and initial profiling run took 3.37 s in total
(EngineCore_DP0 pid=94) INFO 03-09 12:57:41 [gpu_model_runner.py:5366] Graph capturing finished in 3 secs, took 0.51 GiB
(EngineCore_DP0 pid=94) INFO 03-09 12:57:41 [core.py:282] init engine (profile, create kv cache, warmup model) took 16.99 seconds
"""
DRAFTED = """\
(EngineCore pid=34) INFO 06-21 07:17:00 [core.py:96] Initializing a V1 LLM engine (v0.26.0) with config: model='m'
(Worker_TP0 pid=57) INFO 06-21 07:20:07 [default_loader.py:397] Loading weights took 19.90 seconds
(Worker_TP0 pid=57) INFO 06-21 07:20:09 [gpu_model_runner.py:5132] Model loading took 75.86 GiB memory and 184.202604 seconds
(Worker_TP0 pid=57) INFO 06-21 07:20:13 [decorators.py:311] Directly load AOT compilation from path /c/rank_0_0/model
(Worker_TP0 pid=57) INFO 06-21 07:20:13 [monitor.py:53] torch.compile took 2.89 s in total
(Worker_TP0 pid=57) INFO 06-21 07:20:22 [monitor.py:81] Initial profiling/warmup run took 9.79 s
(Worker_TP0 pid=57) INFO 06-21 07:20:23 [monitor.py:53] torch.compile took 0.50 s in total
(Worker_TP0 pid=57) INFO 06-21 07:20:47 [gpu_model_runner.py:6467] Graph capturing finished in 5 secs, took 0.34 GiB
(EngineCore pid=34) INFO 06-21 07:20:47 [core.py:302] init engine (profile, create kv cache, warmup model) took 37.22 s \
(compilation: 5.14 s)
"""
CPU = """\
(EngineCore pid=34) INFO 11-21 07:49:50 [core.py:96] Initializing a V1 LLM engine (v0.32.0) with config: model='m'
(EngineCore pid=34) INFO 11-21 07:49:52 [default_loader.py:397] Loading weights took 0.40 seconds
(EngineCore pid=34) INFO 11-21 07:49:57 [core.py:402] init engine (profile, create kv cache, warmup model) took 3.03 s
"""


def read(log: str) -> Phases:
    """Return the phases of a log whose lines come a second apart."""
    return read_phases(enumerate(log.splitlines(), 1), 0.25)


@pytest.mark.parametrize(
    ("log", "phases"),
    [
        (V08, Phases(1, 3.6, 25.6, 21, 3.5, 0.25, cold=True)),
        (LATER, Phases(1, 6.201251, 3.37, 3, 10.62, 0.25, cold=False)),
        (DRAFTED, Phases(1, 184.202604, 5.14, 5, 27.08, 0.25, cold=False)),
        (CPU, Phases(1, 0.4, None, None, 3.03, 0.25)),
        ("", Phases(first_token_s=0.25)),
        ("main: server is listening on http://127.0.0.1:8080", Phases(first_token_s=0.25)),
        (V08.replace(" 05-12", " 05-12").replace("in 21 secs", "in 0 secs").replace("in 20 secs", "in 0 secs"),
         Phases(1, 3.6, 25.6, None, 24.5, 0.25, cold=True)),
    ],
    ids=["0.8, two ranks, cold", "warm", "two models", "CPU", "empty", "another engine", "too short to tell"],
)  # fmt: skip
def test_the_slowest_process_of_a_log_counts(log: str, phases: Phases) -> None:
    values = {name: value if isinstance(value, bool | None) else pytest.approx(value) for name, value in vars(phases).items()}
    assert vars(read(log)) == values


def test_a_prefix_of_a_container_or_of_ray_changes_nothing() -> None:
    wrapped = "\n".join(f"vllm-1  | \x1b[36m(RayWorkerWrapper pid=5, ip=10.0.0.2)\x1b[0m {line}" for line in LATER.splitlines())
    assert read(wrapped) == read(LATER)


@pytest.mark.parametrize(
    ("line", "cold"),
    [
        ("Compiling a graph for compile range (1, 8192) takes 34.06 s", True),
        ("saved AOT compiled function to /c/model", True),
        ("Directly load the compiled graph(s) for dynamic shape from the cache, took 4.2 s", False),
        ("Directly load AOT compilation from path /c/model", False),
        ("enforce_eager=True", None),
    ],
)
def test_a_start_is_cold_where_graphs_were_compiled(line: str, cold: bool | None) -> None:
    assert read(line).cold is cold
    assert read(line + "\nCompiling a graph for shape 1 takes 1.0 s").cold is True


@given(st.lists(st.sampled_from([*V08.splitlines(), *DRAFTED.splitlines()]) | st.text(), max_size=9))
def test_no_log_makes_the_reading_fail(lines: list[str]) -> None:
    phases = read("\n".join(lines))
    assert all(value is None or value > 0 for name, value in vars(phases).items() if name != "cold")


# ------------------------------------------------------------------------------------------------ metrics


def figures(phases: Phases, startup_s: float = 60.0) -> dict[str, float | None]:
    found = launch_metrics(LaunchSample(startup_s, Capacity(), phases=phases))
    return {name: value for name, value in found.items() if name.startswith("startup") and value is not None}


def test_a_cold_start_has_metrics_of_its_own() -> None:
    warm, cold = figures(read(LATER)), figures(read(V08))
    assert set(warm) - set(cold) == {"startup_compile_s"}
    assert set(cold) - set(warm) == {"startup_cold_s", "startup_cold_compile_s"}
    assert cold["startup_cold_s"] == cold["startup_s"] == 60.0


def test_an_engine_that_tells_nothing_has_its_start_alone() -> None:
    assert figures(Phases()) == {"startup_s": 60.0}


# ------------------------------------------------------------------------------------------------ verdict

CASE = Case("test_a.py::test_x", EngineSpec(), Workload())
DESIGN = Design(comparisons=1, tolerance=0.05, launches=4)
WARM, COLD = Phases(compile_s=3.0, cold=False), Phases(compile_s=40.0, cold=True)


def launch(phases: Phases, startup_s: float) -> Launch:
    return Launch("l", "", (Round({"ttft_p50_s": 0.1}),), figures(phases, startup_s))


def verdict(metric: str, before: list[Launch], now: list[Launch]) -> MetricVerdict:
    stored = Baseline(CASE.id, "h", {}, CASE.workload.fingerprint, Provenance({}), tuple(before))
    gate = {metric: Tolerance(0.05, asked=True)}
    judged = judge(Measurement(CASE, tuple(now)), stored, design=DESIGN, gated=gate, beliefs={})
    return next(row for row in judged.metrics if row.metric == metric)


WARM_STARTS = [launch(WARM, 30.0 + 0.01 * number) for number in range(5)]
COLD_STARTS = [launch(COLD, 70.0 + 0.01 * number) for number in range(5)]


def test_a_cold_start_is_not_compared_with_warm_ones() -> None:
    row = verdict("startup_s", [COLD_STARTS[0], *WARM_STARTS], [COLD_STARTS[1], *WARM_STARTS[:2]])
    assert row.status is Status.PASS
    assert row.baseline == pytest.approx(30.02)
    assert row.measured == pytest.approx(30.005)
    assert verdict("startup_s", WARM_STARTS, [launch(WARM, 40.0), launch(WARM, 40.1)]).status is Status.REGRESSED


@pytest.mark.parametrize(
    ("metric", "before", "now", "status", "rule"),
    [
        ("startup_s", WARM_STARTS, COLD_STARTS[:1], Status.UNDECIDED, "no start of this run was warm"),
        ("startup_compile_s", WARM_STARTS, COLD_STARTS[:4], Status.NOT_COMPARABLE, "no start of this run was warm"),
        ("startup_s", COLD_STARTS, WARM_STARTS[:1], Status.NOT_COMPARABLE, "no start of the baseline was warm"),
        ("startup_cold_s", COLD_STARTS, WARM_STARTS[:1], Status.NOT_COMPARABLE, "no start of this run was cold"),
        ("startup_cold_s", WARM_STARTS, COLD_STARTS[:1], Status.NOT_COMPARABLE, "no start of the baseline was cold"),
        ("startup_s", WARM_STARTS, [*COLD_STARTS[:3], launch(WARM, 30.9)], Status.INCONCLUSIVE,
         "too few starts of this run were warm"),
    ],
)  # fmt: skip
def test_starts_of_the_other_sort_are_named(
    metric: str, before: list[Launch], now: list[Launch], status: Status, rule: str
) -> None:
    row = verdict(metric, before, now)
    assert row.status is status
    assert row.rule.startswith(rule)


def test_cold_starts_are_compared_among_themselves() -> None:
    slower = [launch(COLD, 90.0), launch(COLD, 90.1), *WARM_STARTS[:1]]
    assert verdict("startup_cold_s", COLD_STARTS, slower).status is Status.REGRESSED
    assert verdict("startup_import_s", COLD_STARTS, WARM_STARTS[:1]).rule == "not measured in this run"


def test_noise_has_the_jobs_of_like_starts_only() -> None:
    launches = [replace(each, job=f"{number}") for number, each in enumerate([COLD_STARTS[0], *WARM_STARTS])]
    parts = noise.parts(BY_NAME["startup_s"], launches)
    assert parts is not None
    assert (parts.launch_count, parts.job_count) == (5, 5)


def test_a_missing_sort_of_start_is_told_when_recorded_and_asked_for() -> None:
    gate = {"startup_cold_s": Tolerance(0.05, asked=True)}
    assert lacking(WARM_STARTS, gate, DESIGN, CASE.workload) == {"startup_cold_s": "no start was cold"}
    with pytest.raises(KeyError, match="'startup_compile_s' was not measured by this engine: it is told of warm starts"):
        _ = Measurement(CASE, tuple(COLD_STARTS[:1]))["startup_compile_s"]
