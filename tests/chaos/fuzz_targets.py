"""What is fuzzed: for each source of foreign bytes a function that reads them as the plugin does, and real inputs to begin with.

A target returns for all bytes that are read or refused in the plugin's own way. It raises AssertionError where a promise does not
hold, and lets every exception through that is not the plugin's own word for bad input.
"""

from __future__ import annotations

import ast
import contextlib
import itertools
import json
import math
import random
import traceback
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast
from unittest import mock

import pytest

from pytest_llmperf.judge import baseline as store
from pytest_llmperf.judge.baseline import Baseline, BaselineError
from pytest_llmperf.judge.comparison import prospects
from pytest_llmperf.judge.gates import gates
from pytest_llmperf.judge.maths.stats import Design
from pytest_llmperf.judge.noise import beliefs
from pytest_llmperf.judge.provenance import changes
from pytest_llmperf.judge.selftest import self_test
from pytest_llmperf.judge.verdict import judge
from pytest_llmperf.measure.audit import problems, without_source
from pytest_llmperf.measure.client import framing, response
from pytest_llmperf.measure.client.exchange import Exchange
from pytest_llmperf.measure.client.messages import RoundLog
from pytest_llmperf.measure.client.response import RequestRecord, parse_response
from pytest_llmperf.measure.client.sse import Block, blocks
from pytest_llmperf.measure.dialects import COUNTERS, software_in, value_of
from pytest_llmperf.measure.exposition import Series, read_scrape, read_series
from pytest_llmperf.measure.formulas import RoundSample
from pytest_llmperf.measure.kv_cache import read_capacity
from pytest_llmperf.measure.measurement import Measurement, Round
from pytest_llmperf.measure.metrics import round_metrics
from pytest_llmperf.measure.plausibility import Caused
from pytest_llmperf.measure.telemetry import Recorder
from pytest_llmperf.plan import datasets, files, lengths, traces
from pytest_llmperf.plan.arguments import workload_from
from pytest_llmperf.plan.axes import Axes, axis_value
from pytest_llmperf.plan.case import Case
from pytest_llmperf.plan.checks import PlanError
from pytest_llmperf.plan.command import check_command
from pytest_llmperf.plan.engine import EngineSpec, check_url, parse_engine_args
from pytest_llmperf.plan.gates import parse_gate
from pytest_llmperf.plan.headers import parse_headers
from pytest_llmperf.plan.limits import parse_limits
from pytest_llmperf.plan.marker import parse_marker
from pytest_llmperf.plan.points import parse_points
from pytest_llmperf.plan.workload import Workload
from pytest_llmperf.plugin.options import OPTIONS, ini_name
from pytest_llmperf.plugin.settings import read_settings
from pytest_llmperf.units import parse_duration, parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROOT = Path(__file__).parents[2]
_DATA = ROOT / "tests" / "unit" / "data"


@dataclass(frozen=True)
class Target:
    """One source of foreign bytes."""

    name: str
    fault: str
    """Its row in the fault table."""
    check: Callable[[bytes], None]
    seeds: Callable[[], Sequence[bytes]]
    """Real inputs, which are mutated."""


def _names(error: Exception, culprit: str) -> None:
    assert str(error), "an error without a word"
    assert culprit in str(error), error


def _is_short(words: str, most: int) -> None:
    assert len(words) <= most


_scratch: list[Path] = []


def use_folder(folder: Path) -> None:
    """Have files that are read put into this folder."""
    _scratch[:] = [folder]
    _sound.cache_clear()


def _folder() -> Path:
    return _scratch[0]


def _file(data: bytes, name: str) -> Path:
    path = _folder() / name
    path.write_bytes(data)
    return path


# ------------------------------------------------------------------------------------------------ server-sent events


def sse(data: bytes) -> None:
    """Blocks lie one behind the other, whatever ends their lines, and a cut body has those of the whole one but the last."""
    read = list(blocks(data))
    ends = [block.end for block in read]
    assert ends == sorted(set(ends))
    assert not ends or ends[-1] <= len(data)
    cut = list(blocks(data, flush=False))
    assert cut == read[: len(cut)]
    assert len(read) - len(cut) <= 1
    plain = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    assert list(map(_content, blocks(plain))) == list(map(_content, read))


def _content(block: Block) -> tuple[bytes | None, bytes, bytes]:
    return block.data, block.kind, block.stray


_TOKEN = b'{"id":"cmpl-1","object":"text_completion","choices":[{"index":0,"text":" w%d","token_ids":[%d],"finish_reason":%b}]}'
_USAGE = b'{"id":"cmpl-1","choices":[],"usage":{"prompt_tokens":4,"total_tokens":7,"completion_tokens":3}}'
_CHAT = b'{"choices":[{"index":0,"delta":{%b"content":"%b"},"finish_reason":%b}]}'
_ERROR = b'{"error":{"message":"EngineCore encountered an issue.","type":"InternalServerError","code":500}}'


def _event(data: bytes, end: bytes = b"\n\n") -> bytes:
    return b"data: " + data + end


def _stream(end: bytes = b"\n\n") -> list[bytes]:
    endings = (b"null", b"null", b'"length"')
    tokens = [_event(_TOKEN % (number, 7 + number, ending), end) for number, ending in enumerate(endings)]
    return [*tokens, _event(_USAGE, end), _event(b"[DONE]", end)]


def _chat() -> list[bytes]:
    words = [(b'"role":"assistant",', b"", b"null"), (b"", b"a", b"null"), (b"", b" b", b"null"), (b"", b" c", b'"stop"')]
    return [*(_event(_CHAT % word) for word in words), _event(_USAGE), _event(b"[DONE]")]


def _sse_seeds() -> list[bytes]:
    odd = b"\xef\xbb\xbf: ping\r\revent: error\r\ndata: a\ndata:b\n\nretry: 5\n\nid: 1\ndata\n\n{}\n\ndata: last"
    return [b"".join(_stream()), b"".join(_stream(b"\r\n\r\n")), b"".join(_chat()), _event(_ERROR), odd]


# ------------------------------------------------------------------------------------------------ HTTP

_CONTROL = 4
"""Bytes in front of a response: the tokens that were asked for, how, and the chance that cuts it into reads."""
_MOST_ERROR = 4_000
_SENT_NS = 1_000_000_000
_MOST = (1 << 20,) if "most" in Exchange.__slots__ else ()
_FloodError: type[Exception] = getattr(framing, "FloodError", OSError)


def http(data: bytes) -> None:
    """A record is the same in whatever pieces its bytes come; of a sound one the counts are what was asked for."""
    control, wire = data[:_CONTROL].ljust(_CONTROL, b"\0"), data[_CONTROL:]
    wanted, exact, stream = control[0], not control[1] & 1, not control[1] & 2
    error = "the server closed the connection in the middle of the response" if control[1] & 4 else None

    def record(reads: list[tuple[int, bytes]]) -> RequestRecord:
        read = parse_response(reads, sent_ns=_SENT_NS, wanted=wanted, exact=exact, stream=stream, error=error)
        _check_record(read, reads, wanted, exact=exact)
        return read

    chance = random.Random(control)
    cuts = sorted(chance.choices(range(len(wire) + 1), k=chance.randrange(12)))
    pieces = [_reads(wire, places) for places in ((), cuts, range(min(len(wire), 200)))]
    for reads in pieces:
        record(reads)
        if (taken := _followed(reads)) != reads:
            record(taken)
    # Of a stream that looks sound the events are counted and not decoded, and what else is in them is not looked at.
    with mock.patch.object(response, "counted", lambda *_: None):
        first, *others = (_said(record(reads)) for reads in pieces)
    assert all(other == first for other in others), (first, others)


def _reads(wire: bytes, cuts: Sequence[int]) -> list[tuple[int, bytes]]:
    edges = sorted({0, *cuts, len(wire)})
    return [(_SENT_NS + (n + 1) * 1_000_000, wire[start:end]) for n, (start, end) in enumerate(itertools.pairwise(edges))]


def _said(record: RequestRecord) -> tuple[object, ...]:
    return record.error, record.prompt_tokens, record.output_tokens, record.finish_reason, len(record.token_times_s)


def _check_record(record: RequestRecord, reads: list[tuple[int, bytes]], wanted: int, *, exact: bool) -> None:
    times = record.token_times_s
    assert list(times) == sorted(times)
    assert not times or reads[0][0] / 1e9 <= times[0] <= times[-1] <= reads[-1][0] / 1e9
    assert all(count is None or (count >= 0 and type(count) is int) for count in (record.prompt_tokens, record.output_tokens))
    if record.error is None:
        assert record.output_tokens is not None
        assert record.output_tokens == wanted or (not exact and 0 < record.output_tokens < wanted)
    else:
        assert record.error
        _is_short(record.error, _MOST_ERROR)


def _followed(reads: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """Return the reads that a load process takes for the whole response."""
    exchange = Exchange(0, b"", 0, *_MOST)
    for stamp, piece in reads:
        exchange.reads.append((stamp, piece))
        exchange.received += len(piece)
        try:
            if exchange.is_complete(piece):
                break
        except _FloodError as error:
            _names(error, "bytes")
            break
    return exchange.reads


_HEAD = b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\n%b\r\n"


def _chunked(pieces: list[bytes], *, extension: bytes = b"", trailer: bytes = b"") -> bytes:
    chunks = b"".join(b"%x%b\r\n%b\r\n" % (len(piece), extension, piece) for piece in pieces)
    return _HEAD % b"transfer-encoding: chunked\r\n" + chunks + b"0\r\n" + trailer + b"\r\n"


def _sized(body: bytes, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %b\r\ncontent-length: %d\r\nretry-after: 7\r\n\r\n%b" % (status, len(body), body)


def _http_seeds() -> list[bytes]:
    text = json.dumps({
        "choices": [{"text": "a b c", "finish_reason": "length"}],
        "usage": {"prompt_tokens": 4, "completion_tokens": 3},
    }).encode()  # fmt: skip
    page = b"<html><head><title>502 Bad Gateway</title></head></html>"
    three, plain = b"\x03\0\0\0", b"\x03\x02\0\0"
    return [
        three + _chunked(_stream()),
        three + _chunked(_chat()),
        three + _chunked([b"".join(_stream(b"\r\n\r\n"))], extension=b";name=value", trailer=b"x-sum: 1\r\n"),
        three + b"HTTP/1.1 100 Continue\r\n\r\n" + _sized(b"".join(_stream())),
        three + b"HTTP/1.0 200 OK\r\n\r\n" + b"".join(_stream()),
        b"\x05\x01\0\0" + _chunked(_chat()),
        three + _chunked([*_stream()[:2], _event(_ERROR)]),
        plain + _sized(text),
        three + _sized(_ERROR, b"429 Too Many Requests"),
        three + _sized(page, b"502 Bad Gateway"),
        three + b"HTTP/1.1 307 Temporary Redirect\r\nlocation: http://elsewhere/\r\ncontent-length: 0\r\n\r\n",
    ]


# ------------------------------------------------------------------------------------------------ /metrics

_BETWEEN = "\n# ---- the answer after the round\n"
_ASKED = Caused(requests=8, asked_tokens=1 << 40, counted_tokens=0, prompt_tokens=1 << 40)

_LOAD = Workload(prompt_tokens=8, output_tokens=8, requests=8, concurrency=8)


def metrics(data: bytes) -> None:
    """Whatever an engine tells, all that becomes of it are finite numbers, none below 0 where it counts; or None and why."""
    before, separator, after = data.decode(errors="replace").partition(_BETWEEN)
    after = after if separator else before
    _check_scrape(after)
    answers = [before, before, after]
    engine = cast("Any", SimpleNamespace(metrics_text=lambda: answers.pop(0) if len(answers) > 1 else answers[0]))
    with Recorder(engine) as recorder:
        pass
    told = recorder.result(_ASKED if len(data) % 2 else None)
    numbers = [value for value in vars(told).values() if type(value) in (int, float)]
    assert all(map(math.isfinite, (*numbers, *told.counters.values()))), told
    played = Round(round_metrics(RoundSample((), told)), dict(told.counters))
    json.dumps([played.metrics, played.counters], allow_nan=False)
    problems(RoundLog(()), told, _LOAD)
    without_source(told, _LOAD)
    _check_capacity(after)


def _check_capacity(text: str) -> None:
    for number in vars(read_capacity(text, text)).values():
        assert number is None or (math.isfinite(number) and number > 0)


def _check_scrape(text: str) -> None:
    scrape = read_scrape(text)
    assert software_in(scrape) in (None, "vllm", "sglang", "tgi", "llama.cpp", "tensorrt-llm", "lmcache")
    for feature in COUNTERS:
        value_of(scrape, feature)
    for each in scrape.series:
        assert each.name
        scrape.is_cumulative(each.name)
    names = tuple({each.name for each in scrape.series})
    if names:
        asked = set(map(_plain, read_series(text, names).series))
        assert set(map(_plain, scrape.series)) <= asked


def _plain(series: Series) -> tuple[object, ...]:
    return series.name, series.labels, repr(series.value)  # a NaN is not equal to itself


def _metrics_seeds() -> list[bytes]:
    pages = [path.read_text() for path in sorted((_DATA / "engines").glob("*.metrics.txt"))]
    odd = 'vllm:x_total{a="b"} 5 # {trace_id="1"} 0.5 1763942400.25\n# EOF\nnan_total NaN\ninf_total +Inf\nbig_total 1e308\n'
    # Each seed is short: half of a page is as good, and mutations meet what matters more often.
    return [f"{page}{_BETWEEN}{page}".encode() for page in map(_shortened, [*pages, odd])]


def _shortened(page: str) -> str:
    return "".join(line for line in page.splitlines(keepends=True) if "_bucket" not in line)[:3_000]


# ------------------------------------------------------------------------------------------------ baselines


def baselines(data: bytes) -> None:
    """A file is refused by name, or is read: then it can be judged, compared with and written, and is the same again."""
    path = _file(data, "case.json")
    try:
        stored = store.load(path)
    except BaselineError as error:
        _names(error, str(path))
        return
    assert stored is not None
    text = store.dump(stored)
    assert store.load(_file(text.encode(), "again.json")) == stored
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
    stored = store.load(_file(_baseline_seeds()[0], "sound.json"))
    assert stored is not None
    return stored


@cache
def _baseline_seeds() -> tuple[bytes, ...]:
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


# ------------------------------------------------------------------------------------------------ options and arguments


def options(data: bytes) -> None:
    """A value of an option, ini line, marker or call is taken, or refused by a sentence that names it."""
    number, text = data[:1] or b"\0", data[1:].decode(errors="surrogateescape")
    name, read = _READERS[number[0] % len(_READERS)]
    try:
        read(_value(text))
    except (PlanError, pytest.UsageError) as error:
        _names(error, "")
    except ValueError as error:
        if name not in _PLAIN or type(error) is not ValueError:
            raise


_PLAIN = ("parse_duration",)
"""What raises a plain ValueError, of which the caller makes a sentence."""


def _value(text: str) -> Any:
    """Return what a test file may hold: a literal behind `=`, else the text as an option has it."""
    if text.startswith("="):
        try:
            return ast.literal_eval(text[1:])
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            pass
    return text


_DEFAULTS = {ini_name(flag): default for flag, default, _ in OPTIONS}


def _setting(name: str) -> Callable[[Any], object]:
    def read(value: Any) -> object:
        # An ini file holds texts, and truth values of switches: pytest itself refuses the rest.
        given = _DEFAULTS | {name: bool(value) if _DEFAULTS[name] is False else str(value)}
        config = SimpleNamespace(
            getoption=lambda *_: None,
            getini=given.get,
            rootpath=_folder(),
            invocation_params=SimpleNamespace(dir=_folder()),
            option=SimpleNamespace(collectonly=True),
        )
        return read_settings(cast("pytest.Config", config))

    return read


def _argument(name: str) -> Callable[[Any], object]:
    return lambda value: workload_from(Axes(), {name: value}, folder=_folder()).fingerprint


_READERS: tuple[tuple[str, Callable[[Any], object]], ...] = (
    ("parse_gate", lambda value: gates(parse_gate(value, origin="gate"), tolerance=0.05)),
    ("parse_limits", lambda value: parse_limits(value, origin="limits")),
    ("parse_points", parse_points),
    ("parse_marker", lambda value: parse_marker(value if isinstance(value, dict) else {"tp": value})),
    ("parse_engine_args", lambda value: parse_engine_args(value, origin="engine_args")),
    ("parse_headers", lambda value: parse_headers(str(value).splitlines(), {"TOKEN": "secret"}, origin="header")),
    ("check_url", lambda value: check_url(str(value), origin="url")),
    ("check_command", lambda value: check_command(value, origin="command")),
    ("parse_seconds", lambda value: lengths.parse_seconds("think_s", value)),
    ("parse_pairs", lambda value: lengths.parse_pairs(value, _folder())),
    ("axis_value", lambda value: axis_value("rate", value, origin="rate")),
    ("parse_size", parse_size),
    ("parse_duration", lambda value: parse_duration(str(value))),
    *((field, _argument(field)) for field in Workload.__dataclass_fields__),
    *((name, _setting(name)) for name in _DEFAULTS),
)
_VALUES = (
    "ttft_p90_s=8%,preemptions=off", "={'ttft_p50_s': 'higher 10 %', 'vllm:x_total': True}", "={'H200': {'ttft_p50_s': 0.2}}",
    "=[{'concurrency': 1, 'requests': 10, 'limits': {'ttft_p50_s': '<= 5'}, 'id': 'long'}, {'rate': 4.5}]",
    "={'tp': [1, 2], 'env': {'A': 1}, 'gpu': 'H200', 'min_gpu_memory': '80 GiB', 'tolerance': '5 %', 'engine': 'offline'}",
    "--max-num-seqs 64 --no-enable-x -O3 --config '{\"a\": [1]}'", "={'max_num_seqs': 64, 'compilation_config': {'level': 3}}",
    "X-Token=TOKEN\nAuthorization: Basic ${TOKEN}", "https://gateway:8443/v1/chat/completions?key=1#x", "a=http://[::1]:8000,http://b",
        "llama-server -m {model} --port {port} {{}}", "lognormal(512, 0.6, 4096)", "uniform(1, 9)", "normal(1.5,0.5)",
    "file(t.jsonl)",
    "=[(512, 128), (64, 256)]", "1..10", "inf", "2.5", "80 GB", "1.5h", "5 %", "0.05", "1,2,4", "dataset", "gamma(0.5)",
    "={'short': {'share': 0.8, 'prompt_tokens': 64, 'extra_body': {'top_k': 1}}, 'long': {'prompt_tokens': 'uniform(1, 2)'}}",
    "={'requests': 4, 'prompt_tokens': 8, 'dataset': None}", "={'ttft_s': 0.5}", "={'temperature': 0.7, 'ignore_eos': False}",
    "=10**400", "=" + "9" * 400, "9" * 5_000, "=True", "=None", "=-1", "=[]", "={}", "=1e400", "nan", "~nobody/x", "\0",
    "=('a', 'b')",
)  # fmt: skip


def _option_seeds() -> list[bytes]:
    numbers = range(len(_READERS))
    return [bytes([number]) + value.encode(errors="surrogateescape") for number in numbers for value in _VALUES]


# ------------------------------------------------------------------------------------------------ traces and datasets


def workload_files(data: bytes) -> None:
    """A file is refused by name and line, or its rows are sound: in order of time, of 1 to 10,000,000 tokens."""
    file = files.parse_file("trace", _file(data, "t.jsonl"), _folder())
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
                _names(error, file.path)
                _is_short(str(error), _MOST_ERROR + len(data))
    finally:
        for reader in (*vars(traces).values(), *vars(datasets).values(), *vars(lengths).values()):
            if hasattr(reader, "cache_clear"):
                reader.cache_clear()


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


def _file_seeds() -> list[bytes]:
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


TARGETS = {
    target.name: target
    for target in (
        Target("sse", "mutated event streams", sse, _sse_seeds),
        Target("http", "mutated HTTP responses, in any pieces", http, _http_seeds),
        Target("metrics", "mutated /metrics pages of every engine", metrics, _metrics_seeds),
        Target("baselines", "mutated baseline files", baselines, _baseline_seeds),
        Target("options", "mutated options, ini lines, marker and call arguments", options, _option_seeds),
        Target("files", "mutated traces and datasets", workload_files, _file_seeds),
    )
}


def _past() -> dict[str, list[bytes]]:
    last = b'{"choices":[{"finish_reason":"\xff"}],"usage":{"completion_tokens":3}}'
    cells = "trtllm_kv_cache_max_blocks 13500\ntrtllm_kv_cache_tokens_per_block {}\nsglang:max_total_num_tokens {}\n"
    stored = json.loads(_baseline_seeds()[0])

    def other(**engine: Any) -> bytes:
        return json.dumps({**stored, "provenance": {**stored["provenance"], "engine": engine}}).encode()

    return {
        "http": [
            b"\x03\0\0\0" + _chunked([*_stream()[:3], _event(last), _stream()[-1]]),
            b"\x03\0\0\0HTTP/1.1 " + b"9" * 5_000 + b" X\r\n\r\n",
            b"\x03\0\0\0HTTP/1.1 307 X\r\nlocation: " + b"x" * 60_000 + b"\r\n\r\n",
        ],
        "metrics": [cells.format(value, value).encode() for value in ("+Inf", "NaN", "-1", "9" * 400)],
        "baselines": [other(args="server"), other(args=1e308), other(env=[[]]), other(env=-1)],
    }


PAST = _past()
"""Inputs that have broken a promise."""
KNOWN = {
    "http": ("in counted", "in _is_short"),
    "metrics": ("in _check_capacity",),
    "baselines": ("in changes", "in self_test"),
    "options": ("in degree", "in parse_whole", "in parse_positive", "in parse_seconds"),
}
"""What is being mended, by functions of the traceback; empty as soon as it is."""


def check(target: Target, data: bytes) -> None:
    """Have a target check its data; faults that are known pass."""
    try:
        target.check(data)
    except Exception:
        if not any(words in traceback.format_exc() for words in KNOWN.get(target.name, ())):
            raise
