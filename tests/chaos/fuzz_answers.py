"""Fuzz targets for what servers answer: event streams, HTTP responses, `/metrics`."""

from __future__ import annotations

import itertools
import json
import math
import random
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast
from unittest import mock

from pytest_llmperf.measure.audit import problems, without_source
from pytest_llmperf.measure.client import response
from pytest_llmperf.measure.client.exchange import Exchange
from pytest_llmperf.measure.client.framing import FloodError
from pytest_llmperf.measure.client.messages import RoundLog
from pytest_llmperf.measure.client.response import RequestRecord, parse_response
from pytest_llmperf.measure.client.sse import Block, blocks
from pytest_llmperf.measure.dialects import COUNTERS, software_in, value_of
from pytest_llmperf.measure.exposition import Series, read_scrape, read_series
from pytest_llmperf.measure.formulas import RoundSample
from pytest_llmperf.measure.kv_cache import read_capacity
from pytest_llmperf.measure.measurement import Round
from pytest_llmperf.measure.metrics import round_metrics
from pytest_llmperf.measure.plausibility import Caused
from pytest_llmperf.measure.telemetry import Recorder
from pytest_llmperf.plan.workload import Workload
from tests.chaos.scratch import ROOT, is_short, names

if TYPE_CHECKING:
    from collections.abc import Sequence

_DATA = ROOT / "tests" / "unit" / "data"


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


def sse_seeds() -> list[bytes]:
    odd = b"\xef\xbb\xbf: ping\r\revent: error\r\ndata: a\ndata:b\n\nretry: 5\n\nid: 1\ndata\n\n{}\n\ndata: last"
    return [b"".join(_stream()), b"".join(_stream(b"\r\n\r\n")), b"".join(_chat()), _event(_ERROR), odd]


# ------------------------------------------------------------------------------------------------ HTTP

_CONTROL = 4
"""Bytes in front of a response: the tokens that were asked for, how, and the chance that cuts it into reads."""
_MOST_ERROR = 4_000
_SENT_NS = 1_000_000_000
_MOST_BYTES = 1 << 20


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
    with mock.patch.object(response, "counted", new=_never):
        first, *others = (_said(record(reads)) for reads in pieces)
    assert all(other == first for other in others), (first, others)


def _never(*_: object) -> None:
    """Stand in the place of what counts without decoding; a mock would note 60,000 calls."""


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
        is_short(record.error, _MOST_ERROR)


def _followed(reads: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """Return the reads that a load process takes for the whole response."""
    exchange = Exchange(0, b"", 0, _MOST_BYTES)
    for stamp, piece in reads:
        exchange.reads.append((stamp, piece))
        exchange.received += len(piece)
        try:
            if exchange.is_complete(piece):
                break
            exchange.brought_token()
        except FloodError as error:
            names(error, "bytes")
            break
    return exchange.reads


_HEAD = b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\n%b\r\n"


def _chunked(pieces: list[bytes], *, extension: bytes = b"", trailer: bytes = b"") -> bytes:
    chunks = b"".join(b"%x%b\r\n%b\r\n" % (len(piece), extension, piece) for piece in pieces)
    return _HEAD % b"transfer-encoding: chunked\r\n" + chunks + b"0\r\n" + trailer + b"\r\n"


def _sized(body: bytes, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %b\r\ncontent-length: %d\r\nretry-after: 7\r\n\r\n%b" % (status, len(body), body)


def http_seeds() -> list[bytes]:
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


def metrics_seeds() -> list[bytes]:
    pages = [path.read_text() for path in sorted((_DATA / "engines").glob("*.metrics.txt"))]
    odd = 'vllm:x_total{a="b"} 5 # {trace_id="1"} 0.5 1763942400.25\n# EOF\nnan_total NaN\ninf_total +Inf\nbig_total 1e308\n'
    # Each seed is short: half of a page is as good, and mutations meet what matters more often.
    return [f"{page}{_BETWEEN}{page}".encode() for page in map(_shortened, [*pages, odd])]


def _shortened(page: str) -> str:
    return "".join(line for line in page.splitlines(keepends=True) if "_bucket" not in line)[:3_000]


def http_past() -> list[bytes]:
    """Return responses that have broken a promise."""
    last = b'{"choices":[{"finish_reason":"\xff"}],"usage":{"completion_tokens":3}}'  # it ended the load process
    return [
        b"\x03\0\0\0" + _chunked([*_stream()[:3], _event(last), _stream()[-1]]),
        b"\x03\0\0\0HTTP/1.1 " + b"9" * 5_000 + b" X\r\n\r\n",
        b"\x03\0\0\0HTTP/1.1 307 X\r\nlocation: " + b"x" * 60_000 + b"\r\n\r\n",
    ]


def metrics_past() -> list[bytes]:
    """Return pages that have broken a promise: a KV cache of infinite size could be measured, but not recorded."""
    page = "trtllm_kv_cache_max_blocks 13500\ntrtllm_kv_cache_tokens_per_block {0}\nsglang:max_total_num_tokens {0}\n"
    return [page.format(value).encode() for value in ("+Inf", "NaN", "-1", "9" * 400)]
