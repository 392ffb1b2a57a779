"""Traces as their makers publish them: what proves their units, what is refused, and that a refusal says what was found."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_llmperf.plan.arguments import workload_from
from pytest_llmperf.plan.axes import Axes
from pytest_llmperf.plan.checks import PlanError
from pytest_llmperf.plan.files import parse_file
from pytest_llmperf.plan.traces import Arrival, read_trace

if TYPE_CHECKING:
    from pathlib import Path

BURSTGPT = """\
Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,230,1317,API log
118,GPT-4,417,0,417,Conversation log
"""
AZURE_2023 = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""
AZURE_2024 = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.500000+00:00,2162,5
2024-05-10 00:00:01+00:00,2399,6
"""


def row(at: float, size: int, block: int, *, answer: int = 7, first: int = 0, **more: Any) -> dict[str, Any]:
    ids = [first + number for number in range(math.ceil(size / block))]
    return {"timestamp": at, "input_length": size, "output_length": answer, "hash_ids": ids, **more}


def lines(*rows: dict[str, Any]) -> str:
    return "\n".join(map(json.dumps, rows)) + "\n"


def of_bailian(number: int, at: float, size: int) -> dict[str, Any]:
    return row(at, size, 16, chat_id=number, parent_chat_id=-1, type="text", turn=1)


MOONCAKE = lines(row(27000, 6955, 512), row(30000, 6472, 512))


def read(folder: Path, text: str | bytes, name: str = "t.jsonl", **stated: Any) -> tuple[Arrival, ...]:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_trace(parse_file("trace", name, folder), **stated)


def refusal(folder: Path, text: str | bytes, **stated: Any) -> str:
    with pytest.raises(PlanError) as caught:
        read(folder, text, **stated)
    assert "Error:" not in str(caught.value), "a Python exception is no message"
    return str(caught.value)


def test_mooncakes_blocks_prove_milliseconds(tmp_path: Path) -> None:
    first, second = read(tmp_path, MOONCAKE)
    assert (first.at_s, first.prompt_tokens, first.output_tokens, first.block_tokens) == (0.0, 6955, 7, 512)
    assert (second.at_s, second.blocks) == (3.0, first.blocks[:13])


def test_bailians_columns_prove_seconds_and_small_blocks(tmp_path: Path) -> None:
    first, second = read(tmp_path, lines(of_bailian(1, 10.0, 520), of_bailian(2, 12.5, 30)))
    assert (first.block_tokens, len(first.blocks), second.at_s) == (16, 33, 2.5)


def test_what_is_proven_is_part_of_what_is_sent(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text(lines(of_bailian(1, 0, 520)))
    (tmp_path / "m.jsonl").write_text(MOONCAKE)
    bailian = workload_from(Axes(), {"trace": "b.jsonl"}, folder=tmp_path)
    assert (bailian.block_tokens, bailian.trace_unit) == (16, "s")
    mooncake = workload_from(Axes(), {"trace": "m.jsonl"}, folder=tmp_path)
    assert (mooncake.block_tokens, mooncake.trace_unit) == (None, None), "as its older baselines have it"


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([row(0, 100, 512)], "nothing proves its blocks"),
        ([row(0, 520, 16), row(1, 900, 16)], "its blocks are of 16 tokens"),
        ([{"timestamp": 0, "input_length": 9, "output_length": 3}], "the columns are input_length, output_length, timestamp"),
        ([row(0, 640, 64), row(1, 900, 64, turn=1)], "its blocks are of 64 tokens"),
    ],
)
def test_a_trace_that_could_be_of_either_unit_is_refused(rows: list[dict[str, Any]], found: str, tmp_path: Path) -> None:
    text = refusal(tmp_path, lines(*rows))
    assert found in text
    assert "state trace_unit='ms' or trace_unit='s'" in text


@pytest.mark.parametrize(("unit", "gap_s"), [("s", 4.0), ("ms", 0.004), ("us", 4e-6)])
def test_a_stated_unit_is_believed(unit: str, gap_s: float, tmp_path: Path) -> None:
    first, second = read(tmp_path, lines(row(0, 100, 512), row(4, 100, 512)), unit=unit)
    assert second.at_s - first.at_s == pytest.approx(gap_s)


def test_the_size_of_blocks_is_what_all_rows_have(tmp_path: Path) -> None:
    assert read(tmp_path, lines(row(0, 640, 64), row(1, 900, 64)), unit="s")[0].block_tokens == 64
    assert "no other size fits all" in refusal(tmp_path, lines(row(0, 640, 64), row(1, 900, 16)), unit="s")
    assert read(tmp_path, lines(row(0, 640, 48)), "odd.jsonl", block_tokens=48, unit="s")[0].block_tokens == 48


def test_a_stated_block_that_is_too_large_is_refused_by_row(tmp_path: Path) -> None:
    text = refusal(tmp_path, lines(row(0, 520, 16)), block_tokens=512, unit="s")
    assert "line 1: 33 blocks of 512 tokens are more than input_length=520" in text


def test_a_row_whose_blocks_fit_no_size_is_named(tmp_path: Path) -> None:
    odd = {"timestamp": 0, "input_length": 6955, "output_length": 3, "hash_ids": [1, 2, 3, 4, 5, 6, 7]}
    assert "line 3: 7 hash_ids for 6955 tokens are no blocks of 512 tokens" in refusal(tmp_path, MOONCAKE + lines(odd))


def test_burstgpt_is_in_seconds_without_failed_requests(tmp_path: Path) -> None:
    assert read(tmp_path, BURSTGPT, "t.csv") == (Arrival(0.0, 472, 18), Arrival(40.0, 1087, 230))


def test_a_table_may_have_a_byte_order_mark_and_sessions(tmp_path: Path) -> None:
    text = "\ufeffTimestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens\r\n5,a,1,m,40,9\r\n7,b,1,m,41,8\r\n"
    assert read(tmp_path, text, "t.csv") == (Arrival(0.0, 40, 9), Arrival(2.0, 41, 8))


@pytest.mark.parametrize(("text", "gap_s"), [(AZURE_2023, 4.314579), (AZURE_2024, 0.5)])
def test_azures_dates_are_instants(text: str, gap_s: float, tmp_path: Path) -> None:
    first, second = read(tmp_path, text, "azure.txt")
    assert (first.at_s, second.at_s) == (0.0, pytest.approx(gap_s, abs=1e-9))


def test_rows_that_failed_are_left_out_and_told(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(BURSTGPT)
    workload = workload_from(Axes(), {"trace": "t.csv"}, folder=tmp_path)
    assert workload.requests == 2
    assert workload.left_out == ("trace: 1 of 3 rows have no prompt or no answer: not sent",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (b"\xff\xfet\x00", "it is UTF-16; save it as UTF-8"),
        (b"\x1f\x8b\x08\x00", "is compressed with gzip; unpack"),
        (b"PAR1xx", "is a Parquet file"),
        (b"\x80abc", "cannot be read as text"),
        ("Timestamp;Request tokens;Response tokens\n1;2;3\n", "its columns are divided by ';'; divide them by ','"),
        ("Timestamp\tRequest tokens\tResponse tokens\n1\t2\t3\n", "its columns are divided by tabs"),
        ("Timestamp,Request tokens,Request tokens,Response tokens\n1,2,2,3\n", "has the column 'Request tokens' twice"),
        ("Timestamp,Request tokens,Response tokens\n", "no arrivals: it has a header only"),
        ("Timestamp,Request tokens,Response tokens\n1,2,0\n", "no arrivals: every request in it has failed"),
        ("Timestamp,Request tokens,Response tokens\n1,2\n", "line 2: has 2 fields, the header 3"),
        ("Timestamp,Request tokens,Response tokens\n1,2,3,4\n", "line 2: has 4 fields, the header 3"),
        ("Timestamp,Request tokens,Response tokens\nnan,2,3\n", "line 2: Timestamp is 'nan'; it must be a number"),
        ("Timestamp,Request tokens,Response tokens\n1,-2,3\n", "line 2: Request tokens is '-2'; it must be a whole number"),
        ("Timestamp,Request tokens,Response tokens\n1,2.5,3\n", "Request tokens is '2.5'"),
        ("Timestamp,Request tokens,Response tokens\n1,2_0,3\n", "Request tokens is '2_0'"),
        ("Timestamp,Request tokens,Response tokens\n1,1e99,3\n", "Request tokens is '1e99'"),
        ("a,b\n1,2\n", "the columns are a, b: for BurstGPT's timestamp, request tokens, response tokens missing"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n12.5,3,4\n", "TIMESTAMP is '12.5'; it must be a date such as"),
        (AZURE_2023 + "2023-11-16 18:16:00+00:00,3,4\n", "some rows have a time zone and others none"),
        ("TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00,2,3,4\n", "no images are sent"),
        (MOONCAKE + "{}", "line 3: timestamp and input_length and output_length missing, found are none"),
        (MOONCAKE + "{", "line 3: is no JSON"),
        ("[1]", "entry 1: 1 is no JSON object"),
        ("[]", "is an empty list"),
        (lines(row(0, 9, 512) | {"timestamp": "x"}), "timestamp is 'x'; it must be a number"),
        (lines(row(0, 9, 512) | {"timestamp": True}), "timestamp is True"),
        (lines(row(0, 9, 512) | {"timestamp": math.inf}), "timestamp is inf"),
        (lines(row(0, 9, 512) | {"input_length": None}), "input_length is None"),
        (lines(row(0, 9, 512) | {"hash_ids": "abc"}), "hash_ids must be a list of whole numbers"),
        (lines(row(0, 9, 512) | {"hash_ids": [1.5]}), "hash_ids must be a list of whole numbers"),
        ('{"timestamp": ' + "9" * 400 + ', "input_length": 1, "output_length": 1}', "it must be a number"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_what_is_no_trace_is_refused_in_words(text: str | bytes, message: str, tmp_path: Path) -> None:
    assert message in refusal(tmp_path, text)


def test_a_list_of_rows_is_read_as_lines_are(tmp_path: Path) -> None:
    rows = [row(27000, 6955, 512), row(30000, 6472, 512)]
    assert read(tmp_path, json.dumps(rows), "t.json") == read(tmp_path, MOONCAKE)


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (BURSTGPT, {"block_tokens": 16}, "has no blocks (hash_ids); leave block_tokens out"),
        (AZURE_2023, {"trace_unit": "s"}, "has dates as Azure's traces do; leave trace_unit out"),
        (MOONCAKE, {"trace_unit": "min"}, "trace_unit='min': must be one of s, ms, us"),
        (MOONCAKE, {"block_tokens": 0}, "block_tokens=0: the smallest value is 1"),
        (MOONCAKE, {"duration_s": 4}, "duration_s and trace: a trace lasts as long as its arrivals"),
        (MOONCAKE, {"pairs": [(1, 2)]}, "trace and pairs: prompts come from the one or the other"),
        (MOONCAKE, {"requests": 3}, "requests=3: the trace has only 2 arrivals"),
    ],
)
def test_what_a_trace_cannot_be_asked_is_refused(text: str, arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "t").write_text(text)
    with pytest.raises(PlanError) as caught:
        workload_from(Axes(), {"trace": "t", **arguments}, folder=tmp_path)
    assert message in str(caught.value)


def test_a_renamed_file_is_the_same_load(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.jsonl", "sub/b (copy).jsonl"):
        (tmp_path / name).write_text(MOONCAKE)
    (tmp_path / "c.jsonl").write_text(MOONCAKE + "\n")
    first, moved, other = (
        workload_from(Axes(), {"trace": name}, folder=tmp_path) for name in ("a.jsonl", "sub/b (copy).jsonl", "c.jsonl")
    )
    assert first.fingerprint == moved.fingerprint != other.fingerprint
    assert first.description["trace"].startswith("a.jsonl (")


# ------------------------------------------------------------------------------------------------ whatever stands in it

cells = st.one_of(st.integers(-5, 3000), st.floats(), st.text(max_size=6), st.booleans(), st.none(), st.lists(st.integers(0, 9)))
columns = st.sampled_from(
    ["timestamp", "input_length", "output_length", "hash_ids", "chat_id", "parent_chat_id", "Timestamp", "Request tokens",
     "Response tokens", "TIMESTAMP", "ContextTokens", "GeneratedTokens", "x"]
)  # fmt: skip
ANYTHING = settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])


def accepted_or_refused(folder: Path, text: str | bytes, **stated: Any) -> tuple[Arrival, ...]:
    """Return what a trace comes to, nothing where it is refused: any other exception is the reader's fault."""
    try:
        arrivals = read(folder, text, **stated)
    except PlanError:
        return ()
    assert all(each.at_s >= 0 and each.prompt_tokens > 0 and each.output_tokens > 0 for each in arrivals)
    return arrivals


@ANYTHING
@given(st.lists(st.dictionaries(columns, cells, max_size=6), max_size=4), st.sampled_from([None, "s", "ms"]))
def test_any_objects_are_read_or_refused(tmp_path: Path, rows: list[dict[str, Any]], unit: str | None) -> None:
    accepted_or_refused(tmp_path, lines(*rows), unit=unit)


@ANYTHING
@given(st.lists(columns, max_size=5), st.lists(st.lists(st.text(max_size=8), max_size=5), max_size=4))
def test_any_table_is_read_or_refused(tmp_path: Path, header: list[str], rows: list[list[str]]) -> None:
    accepted_or_refused(tmp_path, "\n".join(",".join(cells) for cells in [header, *rows]))


@ANYTHING
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path: Path, data: bytes) -> None:
    accepted_or_refused(tmp_path, data)


@ANYTHING
@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(513, 20_000), st.integers(1, 500)), min_size=1, max_size=5),
    st.sampled_from([(512, "ms", 1e-3), (16, "s", 1.0)]),
)
def test_what_is_written_as_published_is_read_as_written(
    tmp_path: Path, asked: list[tuple[int, int, int]], maker: tuple[int, str, float]
) -> None:
    block, _, scale = maker
    own = {"chat_id": 1, "parent_chat_id": -1} if block == 16 else {}
    rows = [row(at, size, block, answer=answer, **own) for at, size, answer in asked]
    # Lengths of this many tokens leave but one size of a block.
    rows.append(row(0, 32_000, block, **own))
    arrivals = read(tmp_path, lines(*rows))
    expected = sorted((at * scale, size, answer) for at, size, answer in [*asked, (0, 32_000, 7)])
    found = sorted((each.at_s, each.prompt_tokens, each.output_tokens) for each in arrivals)
    assert [each[1:] for each in found] == [each[1:] for each in expected]
    assert [each[0] for each in found] == pytest.approx([each[0] for each in expected])
    assert {each.block_tokens for each in arrivals} == {block}
