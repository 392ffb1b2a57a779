"""What each engine and release tells of itself: `/metrics` texts and logs under `data/engines`, made after the public names.

Each cell of the matrix in `docs/engines.md` is what these texts come to; the page is checked against it, and can be written
anew: `python -c "from tests.unit.test_engine_dialects import page; page(write=True)"`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

from pytest_llmperf.measure import telemetry
from pytest_llmperf.measure.audit import problems, without_source
from pytest_llmperf.measure.client.messages import RoundLog
from pytest_llmperf.measure.client.response import RequestRecord
from pytest_llmperf.measure.dialects import TABLE, canonical, is_engine_metric, value_of
from pytest_llmperf.measure.exposition import read_scrape
from pytest_llmperf.measure.kv_cache import read_capacity
from pytest_llmperf.measure.plausibility import caused_by
from pytest_llmperf.measure.telemetry import Recorder, Telemetry, software_of
from pytest_llmperf.plan.workload import Workload

if TYPE_CHECKING:
    from pytest_llmperf.measure.engines.engine import Engine

DATA = Path(__file__).parent / "data" / "engines"
PAGE = Path(__file__).parents[2] / "docs" / "engines.md"


@dataclass(frozen=True)
class Told:
    """What a dialect tells in the texts of `data/engines`; None where it doesn't."""

    dialect: str
    file: str
    software: str
    preemptions: float | None = 3
    prompt_tokens: float | None = 1280
    output_tokens: float | None = 640
    prefix_hit_tokens: float | None = 320
    external_hit_tokens: float | None = None
    acceptance_length: float | None = None
    kv_use: float | None = 0.41
    running: float | None = 6
    kv_cache_tokens: float | None = 432_000
    max_concurrency: float | None = None


DIALECTS = (
    Told("vLLM 0.8, V0 engine", "vllm-0.8-v0", "vllm", prefix_hit_tokens=None, max_concurrency=52.73),
    Told("vLLM 0.8", "vllm-0.8-v1", "vllm", max_concurrency=52.73),
    Told("vLLM 0.9, TP 2", "vllm-0.9-tp2", "vllm", kv_cache_tokens=400_000, max_concurrency=48.82),
    Told("vLLM 0.11, DP 2, speculative", "vllm-0.11-dp2", "vllm", acceptance_length=2.5, max_concurrency=52.73),
    Told("vLLM 0.32, LMCache", "vllm-0.32-lmcache", "vllm", external_hit_tokens=256, max_concurrency=52.73),
    Told("vLLM 0.32, NIXL", "vllm-0.32-nixl", "vllm", external_hit_tokens=1024, max_concurrency=52.73),
    # Ray does not export what is 0.
    Told("vLLM through Ray", "vllm-ray", "vllm", preemptions=0),
    Told("SGLang 0.4", "sglang-0.4", "sglang", preemptions=None, prefix_hit_tokens=None, kv_cache_tokens=46_608),
    Told("SGLang 0.5, TP 2", "sglang-0.5", "sglang"),
    Told("TGI 3", "tgi-3", "tgi", preemptions=None, prefix_hit_tokens=None, kv_use=None),
    Told("llama.cpp 2025", "llamacpp-2025", "llama.cpp", preemptions=None, prefix_hit_tokens=None, kv_cache_tokens=65_536),
    Told("llama.cpp 2026", "llamacpp-2026", "llama.cpp", preemptions=None, acceptance_length=2.5, kv_use=None,
         kv_cache_tokens=65_536),
    Told("TensorRT-LLM 1.1", "trtllm-1.1", "tensorrt-llm", preemptions=None, prompt_tokens=None, output_tokens=None,
         running=None),
    Told("TensorRT-LLM 1.3", "trtllm-1.3", "tensorrt-llm", preemptions=None),
    Told("TensorRT-LLM behind Triton", "triton-trtllm", "tensorrt-llm", preemptions=None, prompt_tokens=None, output_tokens=None,
         prefix_hit_tokens=None),
)  # fmt: skip
COLUMNS = {
    "preemptions": "preemptions", "prompt_tokens": "prompt tokens", "output_tokens": "output tokens",
    "prefix_hit_tokens": "prefix hits", "external_hit_tokens": "external hits", "acceptance_length": "acceptance length",
}  # fmt: skip
"""What a round's counters come to, and the headers of the matrix."""
EACH = pytest.mark.parametrize("told", DIALECTS, ids=lambda told: told.file)
RECORDS = (RequestRecord(1.0, (1.1, 1.2), 1.2, prompt_tokens=40, output_tokens=20),) * 32
"""What a client has seen in a round in which the engine counted what the texts say."""


class Answers:
    """An engine that answers twice with one text, and then with another one."""

    def __init__(self, before: str, after: str) -> None:
        self.texts = [before, before, after]

    def metrics_text(self) -> str:
        return self.texts.pop(0) if len(self.texts) > 1 else self.texts[0]


def at_first(text: str) -> str:
    """Return what an engine of this dialect says before its first request: the same, but all counters are 0."""
    scrape = read_scrape(text)
    lines = text.splitlines()
    counters = tuple({each.name for each in scrape.series if scrape.is_cumulative(each.name)})
    return "\n".join(re.sub(r" \S+$", " 0", line) if line.startswith(counters) else line for line in lines) + "\n"


def texts_of(told: Told) -> tuple[str, str]:
    return tuple((DATA / f"{told.file}.{kind}.txt").read_text() for kind in ("metrics", "log"))  # type: ignore[return-value]


def recorded(told: Told) -> Telemetry:
    metrics, _ = texts_of(told)
    recorder = Recorder(cast("Engine", Answers(at_first(metrics), metrics)))
    with recorder:
        pass
    return recorder.result(caused_by(20 * len(RECORDS), RECORDS))


def audited(told: Told) -> bool:
    """Return whether prompts that the engine found in a cache would make the launch INVALID."""
    return any("prompt tokens came from" in problem for problem in problems(RoundLog(RECORDS), recorded(told), Workload()))


# ------------------------------------------------------------------------------------------------ each cell


@EACH
def test_each_engine_is_known_by_its_metrics(told: Told) -> None:
    assert software_of(texts_of(told)[0]) == told.software


@EACH
def test_the_counters_of_each_dialect_are_read(told: Told) -> None:
    measured = recorded(told)
    assert measured.doubt is None
    assert {name: getattr(measured, name) for name in COLUMNS} == {name: getattr(told, name) for name in COLUMNS}


@EACH
def test_the_gauges_of_each_dialect_are_read(told: Told) -> None:
    scrape = read_scrape(texts_of(told)[0])
    assert (value_of(scrape, "kv_usage"), value_of(scrape, "running")) == (told.kv_use, told.running)


@EACH
def test_the_capacity_of_each_dialect_is_read(told: Told) -> None:
    capacity = read_capacity(*texts_of(told))
    assert capacity.kv_cache_tokens == told.kv_cache_tokens
    assert capacity.max_concurrency == (None if told.max_concurrency is None else pytest.approx(told.max_concurrency))


@EACH
def test_hits_are_a_problem_or_their_audit_is_said_off(told: Told) -> None:
    off = "prefix-cache audit off: this engine tells no hits" in (without_source(recorded(told), Workload()) or "")
    assert audited(told) == (not off) == (told.prefix_hit_tokens is not None)


@EACH
def test_what_no_dialect_tells_is_said_in_one_line(told: Told) -> None:
    line = without_source(recorded(told), Workload()) or ""
    assert ("output-token audit off" in line) == (told.output_tokens is None)
    assert ("preemptions are not known" in line) == (told.preemptions is None)
    assert "\n" not in line


# ------------------------------------------------------------------------------------------------ the table


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.software}-{row.name}-{row.feature}")
def test_every_row_is_found_by_every_way_of_writing_its_name(row: object) -> None:
    name = row.name  # type: ignore[attr-defined]
    assert canonical(name) == name
    assert is_engine_metric(name)


@pytest.mark.parametrize(
    ("exported", "name"),
    [
        ("ray_vllm_num_preemptions_total", "vllm:num_preemptions_total"),
        ("ray_vllm:num_preemptions", "vllm:num_preemptions"),
        ("vllm_num_preemptions", "vllm:num_preemptions"),
        ("ray_sglang_token_usage", "sglang:token_usage"),
        ("trtllm:kv_cache_utilization", "trtllm_kv_cache_utilization"),
        ("my_vllm_proxy_requests", "my_vllm_proxy_requests"),
        ("vllm_", "vllm_"),
    ],
)
def test_names_through_ray_are_those_of_the_engine(exported: str, name: str) -> None:
    assert canonical(exported) == name


@pytest.mark.parametrize("label", ["engine", "ReplicaId", "dp_rank", "model_name", "cache_source"])
def test_engine_cores_replicas_and_models_are_summed(label: str) -> None:
    scrape = read_scrape("".join(f'sglang:cached_tokens_total{{{label}="{number}"}} 5\n' for number in range(3)))
    assert value_of(scrape, "prefix_hits") == 15


def test_ranks_of_one_engine_count_once_in_each_of_its_replicas() -> None:
    ranks = [(dp, tp, pp) for dp in range(2) for tp in range(4) for pp in range(2)]
    text = "".join(
        f'sglang:num_retracted_requests_total{{dp_rank="{dp}",tp_rank="{tp}",pp_rank="{pp}"}} {5 + dp}\n' for dp, tp, pp in ranks
    )
    assert value_of(read_scrape(text), "preemptions") == 5 + 6


@pytest.mark.parametrize(
    ("text", "hits"),
    [
        ("# HELP vllm:prefix_cache_hits_total hits, in terms of number of cached blocks.\nvllm:prefix_cache_hits_total 3\n", 48),
        ("# HELP vllm:prefix_cache_hits hits, in number of blocks.\nvllm:prefix_cache_hits_total 3\n", 48),
        ('# HELP vllm:gpu_prefix_cache_hits_total cached blocks.\nvllm:gpu_prefix_cache_hits_total 3\n'
         'vllm:cache_config_info{block_size="32"} 1\n', 96),
        ("vllm:gpu_prefix_cache_hits_total 3\n", 3),
        ("# HELP vllm:prefix_cache_hits_total cached tokens.\nvllm:prefix_cache_hits_total 3\n", 3),
        ("trtllm_kv_cache_reused_blocks_total 3\ntrtllm_kv_cache_tokens_per_block 64\n", 192),
        ("trtllm_kv_cache_reused_blocks_total 3\n", 96),
        ("vllm:gpu_prefix_cache_hit_rate 0.9\n", None),
        ("sglang:cache_hit_rate 0.9\n", None),
        ("trtllm_kv_cache_hit_rate 0.9\n", None),
    ],
)  # fmt: skip
def test_hits_are_counted_in_tokens_and_a_rate_is_no_count(text: str, hits: float | None) -> None:
    assert value_of(read_scrape(text), "prefix_hits") == hits


@pytest.mark.parametrize(("before", "hits"), [("", 0), ('sglang:cached_tokens_total{cache_source="device"} 7\n', 7)])
def test_a_counter_that_begins_with_its_first_event_is_known_before(before: str, hits: float) -> None:
    assert value_of(read_scrape("sglang:max_total_num_tokens 100\n" + before), "prefix_hits") == hits


def test_of_two_names_of_one_counter_only_the_newer_counts() -> None:
    scrape = read_scrape("vllm:gpu_prefix_cache_hits_total 8\nvllm:prefix_cache_hits_total 8\n")
    assert value_of(scrape, "prefix_hits") == 8


@pytest.mark.parametrize("text", [None, "", "<html>vllm:</html>", "python_info 1\n", '[{"kvCacheStats": {"maxNumBlocks": 4}}]'])
def test_what_is_no_engines_metrics_is_of_no_engine(text: str | None) -> None:
    assert software_of(text) is None


# ------------------------------------------------------------------------------------------------ the page


def matrix() -> list[str]:
    """Return the lines of the matrix "engine dialect x feature", from what the texts come to."""
    headers = ["dialect", "known as", *COLUMNS.values(), "KV use", "running", "capacity", "max concurrency", "prefix audit"]
    lines = ["| " + " | ".join(headers) + " |", "|---" * len(headers) + "|"]
    for told in DIALECTS:
        measured, capacity, scrape = recorded(told), read_capacity(*texts_of(told)), read_scrape(texts_of(told)[0])
        cells = [getattr(measured, name) for name in COLUMNS]
        cells += [value_of(scrape, "kv_usage"), value_of(scrape, "running")]
        cells += [capacity.kv_cache_tokens, capacity.max_concurrency, audited(told) or None]
        words = [told.dialect, f"`{software_of(texts_of(told)[0])}`", *("-" if cell is None else "yes" for cell in cells)]
        lines.append("| " + " | ".join(words) + " |")
    return lines


def page(*, write: bool = False) -> str:
    """Return `docs/engines.md` with the matrix as it is now."""
    begin, end = "<!-- dialects: generated by tests/unit/test_engine_dialects.py -->\n", "\n<!-- end of dialects -->"
    text = PAGE.read_text()
    first, last = text.index(begin) + len(begin), text.index(end)
    made = text[:first] + "\n".join(matrix()) + text[last:]
    if write:
        PAGE.write_text(made)
    return made


def test_the_matrix_in_docs_is_what_the_texts_come_to() -> None:
    if not PAGE.is_file():
        pytest.skip("docs/ is not part of this installation")
    assert PAGE.read_text() == page(), page.__doc__


def test_every_dialect_has_its_files_and_every_file_its_dialect() -> None:
    assert {path.name.split(".metrics")[0].split(".log")[0] for path in DATA.iterdir()} == {told.file for told in DIALECTS}
    assert {field.name for field in fields(telemetry.Telemetry)} >= set(COLUMNS)
