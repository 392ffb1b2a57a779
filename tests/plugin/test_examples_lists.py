"""`examples/lists/`: all their entries are collected, and the smallest of each list records a baseline and meets it."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_llmperf.testing import Result

    Run = Callable[..., Result]

ROOT = Path(__file__).parents[2]
LISTS = {path.name: path.read_text() for path in sorted((ROOT / "examples" / "lists").glob("test_*.py"))}
POINTS = {"test_vllm_omni_text.py": 12, "test_vllm_serving.py": 49, "test_tensorrt_llm_perf_sanity.py": 174}
"""What `docs/lists.md` and the files' own heads say that there are."""


def nodes(result: Result) -> list[str]:
    return [line for line in result.stdout.splitlines() if re.match(r"test_\w+\.py::", line)]


def test_every_entry_of_the_lists_is_collected(run: Run) -> None:
    result = run(LISTS, "--co", "-q")
    assert Counter(node.partition("::")[0] for node in nodes(result)) == POINTS, result.stdout + result.stderr
    assert len(set(nodes(result))) == sum(POINTS.values())


def test_the_documentation_has_the_same_numbers() -> None:
    page = (ROOT / "docs" / "lists.md").read_text()
    rows = re.findall(r"^\| \[[^\]]*\]\(\.\./examples/lists/(\w+\.py)\).*?(\d+) points \|", page, re.MULTILINE)
    assert {name: int(number) for name, number in rows} == POINTS


def test_lists_are_selected_from_as_any_other_tests(run: Run) -> None:
    one = run(LISTS, "--co", "-q", "--llmperf-concurrency=1", "--llmperf-tp=4", "-k", "gpt_oss_120b and b200")
    assert [node.partition("[")[2].rpartition("-")[2] for node in nodes(one)] == ["openai_gpt_oss_120b_8192_1024_conc1_gpu4]"]


def one_of(name: str, *selection: str) -> Callable[[Run], tuple[Result, Result]]:
    def record_and_compare(run: Run) -> tuple[Result, Result]:
        files, quick = {name: LISTS[name]}, (*selection, "--llmperf-launches=2", "--llmperf-rounds=1")
        return run(files, "--update-baselines", *quick), run(files, *quick)

    return record_and_compare


SMALLEST = {
    "vllm serving": one_of("test_vllm_serving.py", "--llmperf-concurrency=12", "-k", "llama8B_tp1_random_128_128"),
    "TensorRT-LLM": one_of("test_tensorrt_llm_perf_sanity.py", "-k", "deepseek_r1_fp4_v2_blackwell-r1_fp4_v2_tp4_mtp3_1k1k"),
    "vLLM-Omni, a baseline": one_of("test_vllm_omni_text.py", "-k", "minicpm"),
}


@pytest.mark.parametrize("name", SMALLEST)
def test_the_smallest_entry_records_a_baseline_and_meets_it(run: Run, name: str) -> None:
    recorded, compared = SMALLEST[name](run)
    assert list(recorded.statuses.values()) == ["RECORDED"], recorded.stdout + recorded.stderr
    assert list(compared.statuses.values()) == ["PASS"], compared.stdout


def test_the_smallest_entry_with_limits_is_judged_by_them(run: Run) -> None:
    files = {"test_vllm_omni_text.py": LISTS["test_vllm_omni_text.py"]}
    selection = ("--llmperf-concurrency=1", "--llmperf-rounds=1")
    kept = run(files, *selection, "-k", "vllm_text")
    assert kept.outcomes["passed"] == 1, kept.stdout
    slow = run(files, *selection, "-k", "vllm_text", "--llmperf-engine-args=--sim-slow-down 90")
    assert slow.outcomes["failed"] == 1
    assert "above the limit of 6 s" in slow.stdout
    # The limits of this one are H100's, and these GPUs are none.
    elsewhere = run(files, *selection, "-k", "chunk_cuda and not weekly", "--llmperf-engine-args=--sim-slow-down 90")
    assert elsewhere.outcomes["passed"] == 1
    assert "points[0]: limits: none for Simulated; given for H100" in elsewhere.stdout


def test_the_entry_of_recorded_conversations_takes_their_answers_lengths(run: Run) -> None:
    said = [("human", "Name three rivers of Europe, and their length."), ("gpt", "The Volga, the Danube and the Ural. " * 3)]
    corpus = [{"id": str(n), "conversations": [{"from": who, "value": text} for who, text in said]} for n in range(6)]
    files = {
        "test_vllm_serving.py": LISTS["test_vllm_serving.py"],
        "ShareGPT_V3_unfiltered_cleaned_split.json": json.dumps(corpus),
    }
    result = run(files, "--update-baselines", "--llmperf-launches=2", "--llmperf-concurrency=12", "-k", "sharegpt")
    assert list(result.statuses.values()) == ["RECORDED"], result.stdout + result.stderr
    assert result.cases[0]["workload"]["output_tokens"] == "dataset"


def test_no_entry_asks_for_more_than_eight_gpus_can_hold(run: Run) -> None:
    result = run(LISTS, "--setup-plan", "-rs")
    missing = POINTS["test_vllm_serving.py"] // 7  # the recorded conversations are to be downloaded
    assert result.outcomes == {"skipped": missing}, result.stdout
