"""The size of the KV cache: from metrics, from logs, and what several lines of a log are of."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_llmperf.measure.kv_cache import Capacity, read_capacity

REAL = (Path(__file__).parent / "data" / "vllm_metrics.txt").read_text()
LOG_032 = """\
(EngineCore pid=3423) INFO 11-21 07:48:37 [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config: model='tiny'
(Worker pid=3435) INFO 11-21 07:49:54 [cpu_worker.py:260] Explicitly set (1.0/8.34) GiB for KV cache on node 0.
(EngineCore pid=3423) INFO 11-21 07:49:54 [kv_cache_utils.py:2327] CPU KV cache size: 262,144 tokens, \
Maximum concurrency for 2,048 tokens per request: 128.00x
(EngineCore pid=3423) INFO 11-21 07:49:57 [core.py:402] init engine (profile, create kv cache, warmup model) took 3.03 s
"""
LOG_TWO_LINES = """\
INFO 03-01 10:00:00 [kv_cache_utils.py:634] GPU KV cache size: 1,234,560 tokens
INFO 03-01 10:00:00 [kv_cache_utils.py:637] Maximum concurrency for 32,768 tokens per request: 37.68x
"""


def lines(
    *cores: tuple[str, int], text: str = "INFO 06-12 10:00:31 [kv_cache_utils.py:716] GPU KV cache size: {:,} tokens"
) -> str:
    """Return a log with such a line for each (prefix, size)."""
    return "".join(f"{prefix}{text.format(size)}\n" for prefix, size in cores)


def size_of(log: str, cores: int = 1) -> float | None:
    return read_capacity(None, log, cores=cores).kv_cache_tokens


# ------------------------------------------------------------------------------------------------ which source


def test_the_capacity_of_a_real_engine_stands_in_its_metrics() -> None:
    assert read_capacity(REAL, "") == Capacity(kv_cache_tokens=262_144, max_concurrency=128)


def test_the_metrics_win_over_the_log() -> None:
    assert read_capacity(REAL, LOG_TWO_LINES) == Capacity(262_144, 128)


def test_the_capacity_stands_in_the_one_line_of_vllm_0_32() -> None:
    assert read_capacity(None, LOG_032) == Capacity(kv_cache_tokens=262_144, max_concurrency=128)


def test_the_capacity_stands_in_the_two_lines_of_older_releases() -> None:
    assert read_capacity("", LOG_TWO_LINES) == Capacity(kv_cache_tokens=1_234_560, max_concurrency=37.68)


def test_metrics_that_do_not_tell_the_size_leave_it_to_the_log() -> None:
    metrics = 'vllm:cache_config_info{block_size="128",kv_cache_size_tokens="None",num_gpu_blocks="2048"} 1.0'
    assert read_capacity(metrics, LOG_TWO_LINES) == Capacity(1_234_560, 37.68)


def test_without_a_log_the_blocks_of_the_metrics_tell_the_size() -> None:
    metrics = 'vllm:cache_config_info{block_size="128",kv_cache_size_tokens="None",num_gpu_blocks="2048"} 1.0'
    assert read_capacity(metrics, "") == Capacity(262_144, None)


def test_metrics_that_tell_the_size_only_leave_the_concurrency_unknown() -> None:
    metrics = 'vllm:cache_config_info{kv_cache_size_tokens="4096"} 1.0'
    assert read_capacity(metrics, "") == Capacity(4096, None)


@pytest.mark.parametrize("metrics", [None, "", "python_info 1\n", 'vllm:cache_config_info{num_gpu_blocks="None"} 1.0'])
def test_an_engine_that_tells_nothing_has_an_unknown_capacity(metrics: str | None) -> None:
    assert read_capacity(metrics, "nothing of interest\n") == Capacity(None, None)


@pytest.mark.parametrize("text", ["GPU KV cache size: 0 tokens", "max_total_num_tokens=0", "# GPU blocks: 0, # CPU blocks: 5"])
def test_a_cache_of_nothing_is_none(text: str) -> None:
    assert size_of(text) is None


def test_the_caches_of_two_engine_cores_are_added_in_metrics() -> None:
    metrics = REAL + REAL.replace('engine="0"', 'engine="1"')
    assert read_capacity(metrics, "") == Capacity(2 * 262_144, 2 * 128)


def test_a_core_that_does_not_tell_its_cache_leaves_the_sum_unknown() -> None:
    metrics = 'vllm:cache_config_info{engine="0",kv_cache_size_tokens="10"} 1\nvllm:cache_config_info{engine="1"} 1\n'
    assert read_capacity(metrics, "") == Capacity(None, None)


# ------------------------------------------------------------------------------------------------ whose line


@pytest.mark.parametrize(
    ("log", "size"),
    [
        # Ranks of one core: each has a part of every token, and the smallest ends first.
        (lines(("", 400_000), ("", 400_000)), 400_000),
        (lines(("", 400_016), ("", 400_000), ("", 400_016), ("", 400_032)), 400_000),
        (lines(("(VllmWorker rank=0 pid=87) ", 400_000), ("(VllmWorker rank=1 pid=88) ", 399_984)), 399_984),
        (lines(("(Worker_TP0 pid=87) ", 400_000), ("(Worker_TP1 pid=88) ", 399_984)), 399_984),
        (lines(("(RayWorkerWrapper pid=263, ip=10.0.16.95) ", 400_000), ("", 399_984)), 399_984),
        (lines(("(pid=776, ip=7.242.96.68) ", 400_000), ("\x1b[36m(pid=777)\x1b[0m ", 399_984)), 399_984),
        (lines(("(EngineCore pid=9) ", 400_000), ("(EngineCore pid=9) ", 400_000)), 400_000),
        (lines(("(EngineCore_0 pid=9) ", 400_000), ("(EngineCore_0 pid=9) (VllmWorker rank=1 pid=11) ", 300_000)), 300_000),
        # Engine cores: each has a cache of its own.
        (lines(("(EngineCore_DP0 pid=164) ", 400_000), ("(EngineCore_DP1 pid=165) ", 300_000)), 700_000),
        (lines(("(EngineCore_0 pid=164) ", 400_000), ("(EngineCore_1 pid=165) ", 300_000)), 700_000),
        (lines(("(EngineCore pid=164) ", 400_000), ("(EngineCore pid=165) ", 300_000)), 700_000),
        (lines(("(DPEngineCoreActor pid=164) ", 400_000), ("\x1b[36m(DPEngineCoreActor pid=165)\x1b[0m ", 300_000)), 700_000),
        (lines(("(ServeReplica:app:LLM:m pid=1) ", 400_000), ("(ServeReplica:app:LLM:m pid=2) ", 300_000)), 700_000),
        # Both.
        (lines(*((f"(Worker_DP{dp}_TP{tp}_EP0 pid={90 + dp + 2 * tp}) ", 100 + dp + tp) for dp in (0, 1) for tp in (0, 1))), 201),
        (lines(*(("(EngineCore_DP0 pid=5) ", size) for size in (10, 9)), ("(EngineCore_DP1 pid=6) ", 8)), 17),
    ],
)
def test_ranks_count_once_and_engine_cores_are_added(log: str, size: float) -> None:
    assert size_of(log) == size


@pytest.mark.parametrize(("cores", "size"), [(1, 300), (2, 600), (4, 1200), (9, 1200)])
def test_lines_without_a_name_are_of_as_many_cores_as_there_are(cores: int, size: float) -> None:
    assert size_of(lines(("", 300), ("", 310), ("", 300), ("", 310)), cores) == size


def test_a_line_with_colours_is_read() -> None:
    assert size_of("\x1b[32mINFO\x1b[0m GPU KV cache size: \x1b[1m400,000\x1b[0m tokens\n") == 400_000


SGLANG = "] max_total_num_tokens={}, chunked_prefill_size=8192, max_prefill_tokens=16384, context_len=32768"


@pytest.mark.parametrize(
    ("log", "size"),
    [
        (lines(("[2025-03-08 12:29:21", 46_611), text=SGLANG), 46_611),
        (lines(("[2025-03-08 12:29:21 TP0", 46_611), ("[2025-03-08 12:29:21 TP1", 46_608), text=SGLANG), 46_608),
        (lines(("[2025-03-08 12:29:21 DP0 TP0", 46_611), ("[2025-03-08 12:29:21 DP1 TP0", 46_608), text=SGLANG), 93_219),
        (lines(("[2025-03-08 12:29:21 DP0 TP0", 9), ("[2025-03-08 12:29:21 DP0 TP1", 8), text=SGLANG), 8),
        ("server_args=ServerArgs(max_total_tokens=None, chunked_prefill_size=8192)\n", None),
    ],
)
def test_sglangs_ranks_and_data_parallel_cores_are_told_apart(log: str, size: float | None) -> None:
    assert size_of(log) == size


@pytest.mark.parametrize(
    ("log", "size"),
    [
        ("INFO 02-13 kv_cache_utils.py:407] # GPU blocks: 27000\n", 432_000),
        ("INFO 08-22 llm_engine.py:196] # GPU blocks: 865, # CPU blocks: 327\n", 13_840),
        ("# cuda blocks: 27000, # CPU blocks: 2048\n# cuda blocks: 26000, # CPU blocks: 2048\n", 416_000),
        ("args: Namespace(block_size=32)\n# GPU blocks: 27000\n", 864_000),
        ("non-default args: {'block_size': 32}\n# GPU blocks: 27000\n", 864_000),
        ("vllm serve m --block-size 32\n# GPU blocks: 27000\n", 864_000),
        ("block_size=16 ... block_size=32\n# GPU blocks: 27000\n", None),
        ("# GPU blocks: 27000\nGPU KV cache size: 400,000 tokens\n", 400_000),
    ],
)
def test_blocks_of_older_releases_are_multiplied_by_their_size(log: str, size: float | None) -> None:
    assert size_of(log) == size


@pytest.mark.parametrize(
    ("log", "size"),
    [
        ("llama_context: n_ctx         = 8192\nllama_context: n_ctx_per_seq = 1024\n", 8192),
        ("llama_context: n_ctx         = 8192\nllama_context: n_ctx         = 8192\n", 8192),
        ("llama_context: n_ctx         = 8192\nllama_context: n_ctx         = 4096\n", None),  # a draft model's, or what else?
        ("Allocated 1 GiB for max tokens in paged KV cache (8224).\nAllocated 9 GiB for max tokens in paged KV cache (4000).\n",
         4000),
        ('{"level":"INFO","message":"Setting max batch total tokens to 133696"}\n', 133_696),
    ],
)  # fmt: skip
def test_the_lines_of_other_engines_are_read_where_they_are_sure(log: str, size: float | None) -> None:
    assert size_of(log) == size


PREFIXES = st.sampled_from(["", "(EngineCore_DP1 pid=2) ", "(pid=3) ", "(Worker_TP1 pid=3) ", "[x TP0] ", "(", "\x1b[36m"])
SIZES = st.integers(1, 10**9)


@settings(deadline=None)
@given(st.lists(st.tuples(PREFIXES, SIZES), min_size=1, max_size=6), st.integers(1, 4))
def test_the_capacity_is_between_the_smallest_line_and_their_sum(log: list[tuple[str, int]], cores: int) -> None:
    size = size_of(lines(*log), cores)
    assert size is not None
    assert min(number for _, number in log) <= size <= sum(number for _, number in log)


@settings(deadline=None)
@given(st.lists(st.tuples(PREFIXES, SIZES), min_size=1, max_size=6), st.randoms())
def test_the_order_of_lines_changes_nothing(log: list[tuple[str, int]], random: object) -> None:
    assert size_of(lines(*log)) == size_of(lines(*sorted(log, key=lambda _: random.random())))  # type: ignore[attr-defined]
