"""Fuzz targets for files: baselines, traces and datasets."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from pytest_llmperf.judge import baseline as store
from pytest_llmperf.judge.baseline import Baseline, BaselineError
from pytest_llmperf.judge.comparison import prospects
from pytest_llmperf.judge.gates import gates
from pytest_llmperf.judge.maths.stats import Design
from pytest_llmperf.judge.noise import beliefs
from pytest_llmperf.judge.provenance import changes
from pytest_llmperf.judge.selftest import self_test
from pytest_llmperf.judge.verdict import judge
from pytest_llmperf.measure.measurement import Measurement
from pytest_llmperf.plan import datasets, files, lengths, traces
from pytest_llmperf.plan.case import Case
from pytest_llmperf.plan.checks import PlanError
from pytest_llmperf.plan.engine import EngineSpec
from pytest_llmperf.plan.workload import Workload
from tests.chaos.scratch import ROOT, file_with, folder, is_short, names

if TYPE_CHECKING:
    from collections.abc import Callable

_MOST_ERROR = 4_000


# ------------------------------------------------------------------------------------------------ baselines


def baselines(data: bytes) -> None:
    """A file is refused by name, or is read: then it can be judged, compared with and written, and is the same again."""
    path = file_with(data, "case.json")
    try:
        stored = store.load(path)
    except BaselineError as error:
        names(error, str(path))
        return
    assert stored is not None
    text = store.dump(stored)
    assert store.load(file_with(text.encode(), "again.json")) == stored
    _judged(stored, text)


def _judged(stored: Baseline, text: str) -> None:
    sound = _sound()
    design = Design(tolerance=0.05, comparisons=10, launches=8)
    gated = gates(tolerance=0.05)
    believed = {metric: belief for (_, metric), belief in beliefs([stored, sound]).items()}
    prospects(stored, gated, design, believed)
    case = Case(sound.case_id, EngineSpec(model="m"), Workload())
    fits = replace(stored, workload_fingerprint=case.workload.fingerprint, formulas=sound.formulas)
    for asked in (stored, fits):
        verdict = judge(Measurement(case, sound.launches), asked, design=design, gated=gated, beliefs=believed)
        assert verdict.status
    if not len(text) % 4:
        with contextlib.suppress(BaselineError):
            self_test(stored, dict(list(gated.items())[:2]), design, believed)
    changes(stored.provenance, sound.provenance)
    changes(sound.provenance, stored.provenance)


@cache
def _sound() -> Baseline:
    stored = store.load(file_with(baseline_seeds()[0], "sound.json"))
    assert stored is not None
    return stored


@cache
def baseline_seeds() -> tuple[bytes, ...]:
    paths = sorted((ROOT / "baselines").rglob("*.json"))
    stored = [json.loads(path.read_text()) for path in paths[:2]]
    for data in stored:
        data["launches"] = data["launches"][:2]
        for launch in data["launches"]:
            launch["rounds"] = [{"metrics": dict(list(each["metrics"].items())[:6])} for each in launch["rounds"][:2]]
    old = {**stored[0], "version": 1, "launches": [{**each, "job": ""} for each in stored[0]["launches"]]}
    lengths = {"name": "short", "share": 0.8, "prompt_tokens": 64, "output_tokens": "uniform(1, 9)"}
    classes = {**stored[1], "workload": {**stored[1]["workload"], "classes": [lengths]}}
    return tuple(json.dumps(data, indent=1).encode() for data in (*stored, old, classes))


# ------------------------------------------------------------------------------------------------ traces and datasets


def workload_files(data: bytes) -> None:
    """A file is refused by name and line, or its rows are sound: in order of time, of 1 to 10,000,000 tokens."""
    file = files.parse_file("trace", file_with(data, "t.jsonl"), folder())
    readers: tuple[Callable[[], object], ...] = (
        lambda: _check_trace(file, None, None),
        lambda: _check_trace(file, 16, "s"),
        lambda: _check_dataset(file),
        lambda: lengths.read_lengths(file),
        lambda: lengths.read_pairs(file),
    )
    try:
        for read in readers:
            try:
                read()
            except PlanError as error:
                names(error, file.path)
                is_short(str(error), _MOST_ERROR + len(data))
    finally:
        for reader in (*vars(traces).values(), *vars(datasets).values(), *vars(lengths).values()):
            if hasattr(reader, "cache_clear"):
                reader.cache_clear()


def workload_past() -> list[bytes]:
    """Return files that have broken a promise: a number with what Python strips, and `float` does not."""
    return [b"TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00+00:00,216\x1e,5\n2024-05-10 00:00:01+00:00,2399,6\n"]


def _check_trace(file: files.File, block_tokens: int | None, unit: str | None) -> None:
    arrivals = traces.read_trace(file, block_tokens, unit)
    assert arrivals[0].at_s == 0
    assert all(math.isfinite(each.at_s) for each in arrivals)
    assert [each.at_s for each in arrivals] == sorted(each.at_s for each in arrivals)
    for each in arrivals:
        assert 1 <= each.prompt_tokens <= files.MOST_TOKENS
        assert 1 <= each.output_tokens <= files.MOST_TOKENS
    assert traces.failed_rows(file, block_tokens, unit) >= 0
    traces.units_of(file, block_tokens, unit)


def _check_dataset(file: files.File) -> None:
    for entry in datasets.read_dataset(file):
        assert entry.prompt_tokens >= 1
        assert entry.output_tokens is None or 1 <= entry.output_tokens <= files.MOST_TOKENS
        assert isinstance(json.loads(entry.body), dict)
    datasets.fitting(file, None, answered=False)


def workload_seeds() -> list[bytes]:
    def lines(*rows: dict[str, Any]) -> bytes:
        return "\n".join(map(json.dumps, rows)).encode() + b"\n"

    mooncake = {"timestamp": 27000, "input_length": 1500, "output_length": 7, "hash_ids": [1, 2, 3]}
    bailian = {**mooncake, "timestamp": 0.5, "input_length": 40, "chat_id": 1, "parent_chat_id": -1, "type": "text", "turn": 1}
    said = [{"from": "system", "value": "s"}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    asked = [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "b"}]
    batch = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": asked, "top_p": 0.5}}
    return [
        lines(mooncake, {**mooncake, "timestamp": 30000}),
        lines(bailian, {**bailian, "timestamp": 2}),
        b"Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,C\n45,GPT-4,417,0,417,C\n",
        b"TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.500000+00:00,2162,5\n2024-05-10 00:00:01+00:00,2399,6\n",
        lines({"id": "1", "conversations": said}, {"id": "2", "conversations": said[1:]}),
        json.dumps([{"messages": asked, "max_tokens": 8, "temperature": 0.5}], indent=1).encode(),
        lines(batch),
        lines({"prompt": "a b", "completion": "c", "output_tokens": 5}, {"prompt": [1, 2, 3]}),
        b'prompt,output_len,id\n"a, b",5,1\nc,,2\n',
        b"prompt output\n512 128\n64,256\n",
        b"\xef\xbb\xbf12\n7\n",
    ]


def baseline_past() -> list[bytes]:
    """Return baselines that were read, and could not be compared with."""
    stored = json.loads(baseline_seeds()[0])

    def other(**engine: Any) -> bytes:
        return json.dumps({**stored, "provenance": {**stored["provenance"], "engine": engine}}).encode()

    return [other(args="server"), other(args=1e308), other(env=[[]]), other(env=-1)]
