"""Why: what a dead engine's log says (real lines of vLLM 0.32), what has changed, and which setting to move."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_llmperf.judge.causes import likely_cause
from pytest_llmperf.judge.diagnosis import advice
from pytest_llmperf.judge.provenance import Provenance, changes, engine_facts
from pytest_llmperf.judge.verdict import MetricVerdict, Status, Verdict
from pytest_llmperf.measure.engines.logs import named_errors
from pytest_llmperf.measure.metrics import GATING
from pytest_llmperf.plan.case import Case
from pytest_llmperf.plan.engine import EngineSpec, parse_engine_args
from pytest_llmperf.plan.workload import Workload
from pytest_llmperf.testing.__main__ import OUT_OF_MEMORY

# ------------------------------------------------------------------------------------------------ logs

UNKNOWN_FOLDER = """\
  File "/v/lib/python3.11/site-packages/huggingface_hub/utils/_validators.py", line 133, in validate_repo_id
    raise HFValidationError(
huggingface_hub.errors.HFValidationError: Repo id must be in the form 'repo_name' or 'namespace/repo_name': '/tmp/nope'. \
Use `repo_type` argument if needed.
"""
UNKNOWN_NAME_OFFLINE = """\
  File "/v/lib/python3.11/site-packages/huggingface_hub/_snapshot_download.py", line 382, in snapshot_download
    raise LocalEntryNotFoundError(
huggingface_hub.errors.LocalEntryNotFoundError: Cannot find an appropriate cached snapshot folder for the specified revision \
on the local disk and outgoing traffic has been disabled. To enable repo look-ups and downloads online, pass \
'local_files_only=False' as input.
"""
PORT_IN_USE = """\
  File "/v/lib/python3.11/site-packages/vllm/entrypoints/launchers/launcher.py", line 348, in create_server_socket
    sock.bind(addr)
OSError: [Errno 98] Address already in use
"""
TOO_LITTLE_FREE = (
    "ValueError: Free memory on device cuda:0 (3.20/79.11 GiB) on startup is less than desired GPU memory utilization"
    " (0.92, 72.78 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes."
)
TOO_LITTLE_FREE_CPU = (
    "ValueError: Available memory on node 0 (1.20/8.34 GiB) on startup is less than desired CPU memory utilization (0.92,"
    " 7.67 GiB). On the CPU backend, the `--gpu-memory-utilization` flag controls the fraction of CPU memory reserved"
)
NO_CACHE_BLOCKS = (
    "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing the engine"
)
CONTEXT_TOO_LONG = (
    "ValueError: To serve at least one request with the model's max seq len (131072), (16.0 GiB KV cache is needed, which is"
    " larger than the available KV cache memory (4.2 GiB). Based on the available memory, the estimated maximum ..."
)
HEADS = (
    "pydantic_core._pydantic_core.ValidationError: 1 validation error for VllmConfig\n"
    "  Value error, Total number of attention heads (4) must be divisible by tensor parallel size (3)."
)
WRONG_ARGUMENT = "api_server.py: error: unrecognized arguments: --max-num-sequences 4"
NO_VLLM = "/usr/bin/python3: Error while finding module specification (ModuleNotFoundError: No module named 'vllm')"
NCCL = "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:2024, unhandled system error"
NO_COMPILER = "torch._inductor.exc.InductorError: FileNotFoundError: [Errno 2] No such file or directory: '256,64'"
ROOT_CAUSE_ABOVE = f"""\
(EngineCore pid=772) ERROR 11-21 20:14:56 [core.py:1330] EngineCore failed to start.
(EngineCore pid=772) ERROR 11-21 20:14:56 [core.py:1330] Traceback (most recent call last):
(EngineCore pid=772) ERROR 11-21 20:14:56 [core.py:1330]     raise child_exception_type(errno_num, err_msg, err_filename)
(EngineCore pid=772) ERROR 11-21 20:14:56 [core.py:1330] {NO_COMPILER}
(EngineCore pid=772) Traceback (most recent call last):
(EngineCore pid=772) {NO_COMPILER}
(APIServer pid=697)   File "/site/vllm/v1/engine/utils.py", line 1272, in wait_for_engine_startup
(APIServer pid=697)     raise RuntimeError(
(APIServer pid=697) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {{}}
"""
"""Lines of a log of vLLM 0.26 on an H200, whose environment variable CC was not a compiler."""
GPU_TAKEN = "GPU 0 is used by pid 4711 (python3), 2.0 GiB"
ILLEGAL_ACCESS = "torch.AcceleratorError: CUDA error: an illegal memory access was encountered"
OLD_DRIVER = "RuntimeError: CUDA error: no kernel image is available for execution on the device"

HEALTHY = """\
(EngineCore pid=3423) INFO 11-21 07:49:54 [kv_cache_utils.py:2327] CPU KV cache size: 262,144 tokens, \
Maximum concurrency for 2,048 tokens per request: 128.00x
(EngineCore pid=3423) INFO 11-21 07:49:57 [core.py:402] init engine (profile, create kv cache, warmup model) took 3.03 s
(APIServer pid=8360) INFO 11-21 08:11:22 [loggers.py:335] Engine 000: Avg prompt throughput: 1241.5 tokens/s, Avg generation \
throughput: 2023.1 tokens/s, Running: 15 reqs, Waiting: 17 reqs, CPU KV cache usage: 96.8%
(APIServer pid=8025) WARNING 11-21 08:08:42 [system_utils.py:255] Found ulimit of 20000 and failed to automatically increase \
with error current limit exceeds maximum limit.
INFO:     Application startup complete.
INFO:     127.0.0.1:43278 - "GET /health HTTP/1.1" 200 OK
nanobind: this is likely caused by a reference counting issue in the binding code.
  warnings.warn('resource_tracker: There appear to be %d '
"""
DIED_FOR_UNKNOWN_REASONS = """\
(APIServer pid=8025) ERROR 11-21 08:09:24 [async_llm.py:906]     raise self._format_exception(outputs) from None
(APIServer pid=8025) ERROR 11-21 08:09:24 [async_llm.py:906] vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered \
an issue. See stack trace (above) for the root cause.
"""


@pytest.mark.parametrize(
    ("log", "advised"),
    [
        (OUT_OF_MEMORY, "--gpu-memory-utilization"),
        (TOO_LITTLE_FREE, "end the process that holds the memory"),
        (TOO_LITTLE_FREE_CPU, "--gpu-memory-utilization"),
        (NO_CACHE_BLOCKS, "no room for the KV cache"),
        (CONTEXT_TOO_LONG, "--max-model-len"),
        (HEADS, "--llmperf-tp"),
        (NCCL, "NCCL_DEBUG=INFO"),
        (NO_COMPILER, "--enforce-eager"),
        (GPU_TAKEN, "CUDA_VISIBLE_DEVICES"),
        (ILLEGAL_ACCESS, "CUDA_LAUNCH_BLOCKING"),
        (OLD_DRIVER, "update the driver"),
        (WRONG_ARGUMENT, "--llmperf-engine-args"),
        (UNKNOWN_FOLDER, "--llmperf-model"),
        (UNKNOWN_NAME_OFFLINE, "--llmperf-model"),
        (PORT_IN_USE, "port"),
        (NO_VLLM, "--llmperf-python"),
        ("bash: line 1: 4711 Killed   python -m vllm", "out of memory"),
    ],
    ids=["out of memory", "GPU memory taken", "CPU memory taken", "no cache blocks", "context too long", "heads", "NCCL",
         "no compiler", "GPU taken", "illegal access", "old driver",
         "wrong argument", "unknown folder", "unknown name", "port in use", "no vLLM", "killed"],
)  # fmt: skip
def test_a_log_names_its_likely_cause_and_the_setting_to_change(log: str, advised: str) -> None:
    for tail in (log, HEALTHY + log, log + HEALTHY):
        assert advised in (likely_cause(tail) or "")


@pytest.mark.parametrize("log", ["", HEALTHY, DIED_FOR_UNKNOWN_REASONS], ids=["empty", "healthy", "unknown"])
def test_a_log_that_tells_nothing_has_no_cause_rather_than_a_guess(log: str) -> None:
    assert likely_cause(log) is None


def test_the_root_cause_is_found_behind_the_front_ends_last_word() -> None:
    lines = ROOT_CAUSE_ABOVE.splitlines()
    assert named_errors(lines) == [
        NO_COMPILER,
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
    ]


def test_memory_is_told_before_what_followed_from_it() -> None:
    assert "too little free memory" in (likely_cause(f"{NCCL}\n{OUT_OF_MEMORY}\nKilled") or "")


# ------------------------------------------------------------------------------------------------ changes


def provenance(
    args: str = "", *, env: tuple[tuple[str, str], ...] = (), tp: int = 1, vllm: str = "0.32.0", cores: int = 2
) -> Provenance:
    spec = EngineSpec(tp=tp, args=parse_engine_args(args, origin="x"), env=env)
    facts = engine_facts(Case("x", spec, Workload()))
    return Provenance(facts, {"vllm": vllm}, {"cores": cores, "gpus": ["H200"]}, "abc")


def test_nothing_changed_is_no_line() -> None:
    same = provenance("--seed 1", env=(("A", "1"),))
    assert changes(same, same) == []


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        (provenance(tp=1), provenance(tp=2), "engine tp: 1 -> 2"),
        (provenance("--max-num-seqs 64"), provenance("--max-num-seqs 16"), "engine argument --max-num-seqs: 64 -> 16"),
        (provenance(), provenance("--enforce-eager"), "engine argument --enforce-eager: not set -> on"),
        (provenance("--enforce-eager"), provenance(), "engine argument --enforce-eager: on -> not set"),
        (provenance(env=(("A", "1"),)), provenance(env=(("A", "2"),)), "environment A: 1 -> 2"),
        (provenance(vllm="0.31.0"), provenance(), "version of vllm: 0.31.0 -> 0.32.0"),
        (provenance(cores=2), provenance(cores=4), "host cores: 2 -> 4"),
    ],
)
def test_each_change_is_a_line_with_both_values(before: Provenance, now: Provenance, expected: str) -> None:
    assert changes(before, now) == [expected]


def test_changes_are_told_from_the_engine_outwards() -> None:
    found = changes(provenance(), provenance("--seed 1", tp=2, vllm="0.33.0", cores=8, env=(("A", "1"),)))
    assert [line.partition(":")[0] for line in found] == [
        "engine tp", "engine argument --seed", "environment A", "version of vllm", "host cores",
    ]  # fmt: skip


def test_the_commit_is_no_change_because_it_always_differs() -> None:
    assert changes(Provenance({}, commit="a"), Provenance({}, commit="b")) == []


def test_a_json_argument_is_shown_as_it_was_given() -> None:
    before, now = provenance("--hf-overrides '{\"a b\": 1}'"), provenance('--hf-overrides \'{"a b": "1"}\'')
    assert changes(before, now) == ['engine argument --hf-overrides: {"a b": 1} -> {"a b": "1"}']


words = st.text("abAB01 '\"\\{}:,=\u00e9", max_size=12)


@settings(deadline=None)
@given(words, words)
def test_no_value_of_an_engine_argument_makes_the_comparison_fail(one: str, other: str) -> None:
    before, now = (
        Provenance(engine_facts(Case("x", EngineSpec(args=(("hf-overrides", (word,)),)), Workload()))) for word in (one, other)
    )
    assert len(changes(before, now)) == (one != other)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(["", "--seed 1", "--no-x --y 2"]), st.sampled_from(["", "--seed 1", "--seed 2"]))
def test_a_change_is_seen_from_both_sides(one: str, other: str) -> None:
    before, now = provenance(one), provenance(other)
    swapped = [" -> ".join(reversed(line.partition(": ")[2].split(" -> "))) for line in changes(now, before)]
    assert [line.partition(": ")[2] for line in changes(before, now)] == swapped


def test_a_baseline_that_knows_less_than_this_run_shows_what_is_new() -> None:
    assert "engine tp: None -> 1" in changes(Provenance({}), provenance())


# ------------------------------------------------------------------------------------------------ advice


def red(*names: str) -> Verdict:
    rows = (MetricVerdict(name, Status.REGRESSED if name in names else Status.PASS, 1.0, 1.0) for name in GATING)
    return Verdict(Status.REGRESSED if names else Status.PASS, tuple(rows))


ONE_RANK = {"tp": 1, "pp": 1}


@pytest.mark.parametrize("metric", ["preemptions", "kv_cache_tokens"])
def test_a_full_kv_cache_has_settings_to_move(metric: str) -> None:
    args = dict(parse_engine_args("--max-num-seqs 256 --gpu-memory-utilization 0.5", origin="x"))
    found = advice(red(metric), args, {"tp": 2, "pp": 1})
    assert [line.partition(":")[0].strip() for line in found[1:]] == [
        "--gpu-memory-utilization (now 0.5)",
        "--max-num-seqs (now 256)",
        "--max-num-batched-tokens (now default)",
        "--tensor-parallel-size (now 2)",
        "--pipeline-parallel-size (now 1)",
    ]
    directions = {line.split()[0]: line.partition(": ")[2].partition(" ")[0].rstrip(":") for line in found[1:]}
    assert directions == {
        "--gpu-memory-utilization": "raise", "--max-num-seqs": "lower", "--max-num-batched-tokens": "lower",
        "--tensor-parallel-size": "raise", "--pipeline-parallel-size": "raise",
    }  # fmt: skip


def test_unequal_and_larger_memory_have_causes_to_look_for() -> None:
    unequal, larger = advice(red("gpu_memory_balance_ratio", "gpu_memory_peak_bytes"), {}, {"tp": 2, "pp": 1})
    assert unequal.startswith("gpu_memory_balance_ratio: with tensor parallelism every rank holds as much")
    assert "another process is on that GPU" in unequal
    assert larger.startswith("gpu_memory_peak_bytes: ")
    assert "--gpu-memory-utilization" in larger


def test_a_fixed_number_of_blocks_is_named_first_where_it_was_given() -> None:
    args = dict(parse_engine_args("--num-gpu-blocks-override 24", origin="x"))
    assert advice(red("preemptions"), args, ONE_RANK)[1].startswith("  --num-gpu-blocks-override (now 24): raise it")


@pytest.mark.parametrize("names", [(), ("ttft_p50_s",), ("output_tokens_per_s", "failed_requests")])
def test_other_regressions_bring_no_advice_about_the_kv_cache(names: tuple[str, ...]) -> None:
    assert advice(red(*names), {}, ONE_RANK) == []
