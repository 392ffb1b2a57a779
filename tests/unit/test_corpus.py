"""Files of traces and conversations in the formats that their makers publish, and lines that are none."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from pytest_llmperf.plan.checks import PlanError
from pytest_llmperf.plan.datasets import read_dataset
from pytest_llmperf.plan.files import parse_file
from pytest_llmperf.plan.lengths import read_lengths
from pytest_llmperf.plan.traces import Arrival, read_trace

if TYPE_CHECKING:
    from pathlib import Path

# The first lines of the published traces, Mooncake's with fewer blocks: conversation_trace.jsonl and BurstGPT_1.csv.
MOONCAKE = """\
{"timestamp": 27000, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 48, 49, 50, 2353, 2354]}
{"timestamp": 30000, "input_length": 6472, "output_length": 26, "hash_ids": [46, 47, 48, 49, 50, 2366]}
"""
BURSTGPT = """\
Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,230,1317,Conversation log
118,GPT-4,417,0,417,Conversation log
"""


def test_a_mooncake_trace_has_times_in_milliseconds_and_shared_blocks(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(MOONCAKE)
    first, second = read_trace(parse_file("trace", "t.jsonl", tmp_path))
    assert (first.at_s, first.prompt_tokens, first.output_tokens) == (0.0, 6955, 52)
    assert (second.at_s, second.blocks[:5]) == (3.0, first.blocks[:5])


def test_a_burstgpt_trace_is_in_seconds_without_failed_requests(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(BURSTGPT)
    assert read_trace(parse_file("trace", "t.csv", tmp_path)) == (Arrival(0.0, 472, 18), Arrival(40.0, 1087, 230))


def test_a_sharegpt_dataset_is_asked_its_first_question(tmp_path: Path) -> None:
    said = [{"from": "gpt", "value": "Hello"}, {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]
    (tmp_path / "s.json").write_text(json.dumps([{"id": "a", "conversations": said}, {"id": "b", "conversations": []}]))
    [found] = read_dataset(parse_file("dataset", "s.json", tmp_path))
    assert found.messages == (("assistant", "Hello"), ("user", "Why?"))
    assert found.output_tokens is None


def test_messages_are_sent_up_to_the_last_one_that_wants_an_answer(tmp_path: Path) -> None:
    said = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hi!"},
    ]
    (tmp_path / "m.jsonl").write_text(json.dumps({"messages": said, "max_tokens": 9}) + "\n\n")
    [found] = read_dataset(parse_file("dataset", "m.jsonl", tmp_path))
    assert (found.messages, found.output_tokens) == ((("system", "Be brief."), ("user", "Hi")), 9)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.jsonl", MOONCAKE + "{}", "t.jsonl, line 3: KeyError"),
        ("t.jsonl", '{"timestamp": "x", "input_length": 1, "output_length": 1}', "line 1: ValueError"),
        ("t.jsonl", '{"timestamp": 0, "input_length": 0, "output_length": 1}', "0 is no number of tokens"),
        ("t.jsonl", '{"timestamp": Infinity, "input_length": 1, "output_length": 1}', "inf is no instant"),
        ("t.jsonl", "", "no arrivals"),
        ("t.jsonl", "[1]", "line 1: "),
        ("t.csv", "a,b\n1,2\n", "line 2: KeyError"),
    ],
)
def test_a_line_that_is_none_is_named(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(PlanError, match="t") as caught:
        read_trace(parse_file("trace", name, tmp_path))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("d.json", "{", "ShareGPT's JSON is a list of conversations"),
        ("d.json", '[{"conversations": [{"value": 1}]}]', "entry 1: KeyError"),
        ("d.json", "[]", "no conversation with a user's message"),
        ("d.jsonl", '{"messages": [{"role": "user", "content": [1]}]}', "only messages of text are sent"),
        ("d.jsonl", '{"messages": [{"role": "assistant", "content": "x"}]}', "no conversation with a user's message"),
    ],
)
def test_a_dataset_that_is_none_is_named(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(PlanError) as caught:
        read_dataset(parse_file("dataset", name, tmp_path))
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["", "1\n0", "1.5", "a", "-3"])
def test_lengths_are_whole_numbers(text: str, tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text(text)
    with pytest.raises(PlanError, match="must hold whole numbers"):
        read_lengths(parse_file("prompt_tokens", "l.txt", tmp_path))


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(PlanError, match="cannot be read as text"):
        read_trace(parse_file("trace", "t.jsonl", tmp_path))


def test_a_text_may_hold_what_else_ends_a_line(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"messages": [{"role": "user", "content": "a\u2028b\u0085c"}]}\n')
    [found] = read_dataset(parse_file("dataset", "m.jsonl", tmp_path))
    assert found.messages == (("user", "a\u2028b\u0085c"),)
