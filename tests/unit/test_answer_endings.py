"""How an answer ends, and why it does not: what makes a request a failed one, and in whose words."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.measure.client.reasons import ending_error, http_error, reason_in, reason_of_body
from pytest_llmperf.measure.client.response import RequestRecord, parse_response
from pytest_llmperf.measure.client.sse import blocks

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"


def data(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def token(reason: Any = None, **more: Any) -> bytes:
    return data({"choices": [{"index": 0, "text": "w", "finish_reason": reason}], **more})


def usage(tokens: int) -> bytes:
    return data({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": tokens}})


DONE = b"data: [DONE]\n\n"


def parse(*events: bytes, wanted: int = 2, exact: bool = False, error: str | None = None, head: bytes = HEAD) -> RequestRecord:
    wire = head + b"".join(events)
    return parse_response([(1_500_000_000, wire)], sent_ns=1_000_000_000, wanted=wanted, exact=exact, error=error)


# ------------------------------------------------------------------------------------------------ reasons

BAD = ["error", "abort", "aborted", "content_filter", "cancelled", "timeout", "SAFETY", "insufficient_system_resource", "refusal"]
GOOD = ["stop", "eos_token", "stop_sequence", "tool_calls", "function_call", "STOP", "end_turn"]


@pytest.mark.parametrize("reason", BAD)
@pytest.mark.parametrize("count", [1, 2])
def test_a_reason_of_failure_fails_the_request_however_many_tokens_came(reason: str, count: int) -> None:
    record = parse(*[token()] * (count - 1), token(reason), usage(count), DONE)
    assert record.error == f"it ended with finish_reason {reason!r} after {count} of 2 tokens"
    assert record.finish_reason == reason


@pytest.mark.parametrize("reason", GOOD)
def test_a_natural_end_before_the_limit_is_none(reason: str) -> None:
    assert parse(token(reason), usage(1), DONE).error is None
    assert parse(token(reason), usage(1), DONE, exact=True).error == "1 of 2 tokens"


@pytest.mark.parametrize("reason", ["length", "max_tokens", "model_length"])
def test_a_limit_of_the_servers_own_is_a_cut(reason: str) -> None:
    assert parse(token(), token(reason), usage(2), DONE).error is None
    assert parse(token(reason), usage(1), DONE).error == f"the server cut it: finish_reason {reason!r} after 1 of 2 tokens"


def test_an_unknown_reason_needs_all_tokens() -> None:
    assert parse(token(), token("novel"), usage(2), DONE).error is None
    assert "'novel', which is not known" in (parse(token("novel"), usage(1), DONE).error or "")


@pytest.mark.parametrize("reason", [None, "", {}])
def test_a_stream_without_a_reason_has_failed(reason: object) -> None:
    record = parse(token(), token(reason), usage(2), DONE)
    assert record.error == "the answer ended without a finish_reason"


def test_a_reason_may_be_an_object_with_a_type() -> None:
    assert parse(token(), token({"type": "length", "length": 2}), usage(2), DONE).finish_reason == "length"
    assert "'abort'" in (parse(token({"type": "abort"}), usage(1), DONE).error or "")


def test_done_may_be_missing_where_reason_and_usage_came() -> None:
    assert parse(token(), token("length"), usage(2)).error is None
    assert parse(token(), token("length", usage={"prompt_tokens": 3, "completion_tokens": 2})).error is None


def test_done_is_needed_where_nothing_told_the_count() -> None:
    ids = data({"choices": [{"token_ids": [1, 2], "finish_reason": "length"}]})
    assert parse(ids, DONE).error is None
    assert parse(ids).error == "the stream ended without [DONE] and without usage"


@pytest.mark.parametrize("events", [[token()], [token(), usage(1)], [token(), DONE], [token(), usage(1), DONE]])
def test_a_clean_end_that_comes_early_is_a_failure(events: list[bytes]) -> None:
    assert parse(*events).error == "the answer ended without a finish_reason"


@pytest.mark.parametrize("reason", ["error", "abort"])
def test_a_document_tells_how_it_ended_too(reason: str) -> None:
    body = json.dumps({"choices": [{"text": "w", "finish_reason": reason}], "usage": {"completion_tokens": 2}}).encode()
    record = parse_response([(1, HEAD + body)], sent_ns=1, wanted=2, stream=False)
    assert record.error == f"it ended with finish_reason {reason!r} after 2 of 2 tokens"


# ------------------------------------------------------------------------------------------------ errors in a stream

WORDS = "KV cache of the peer is gone"
SHAPES = [
    data({"error": {"message": WORDS, "type": "x", "code": 500}}),
    data({"error": WORDS, "error_type": "generation"}),
    data({"object": "error", "message": WORDS, "type": "InternalServerError", "code": 500}),
    data({"message": WORDS, "code": 400}),
    data({"detail": WORDS}),
    data({"detail": [{"loc": ["body", "n"], "msg": WORDS}]}),
    data({"errors": [WORDS]}),
    data({"error": {"error": {"message": WORDS}}}),
    data({"choices": [{"index": 0, "text": "", "finish_reason": None, "error": {"message": WORDS}}]}),
    b"event: error\n" + data({"message": WORDS}),
    b"event: error\ndata: " + WORDS.encode() + b"\n\n",
    json.dumps({"error": {"message": WORDS, "code": 400}}).encode(),
    json.dumps({"error": {"message": WORDS}}, indent=1).encode() + b"\n",
    WORDS.encode() + b"\n",
    b"<html><head><title>" + WORDS.encode() + b"</title></head><body>long</body></html>",
    b"data: " + WORDS.encode() + b"\n\n",
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape[:40].decode())
@pytest.mark.parametrize("error", [None, "the server closed the connection in the middle of the response"])
def test_the_servers_own_words_are_shown_in_every_shape(shape: bytes, error: str | None) -> None:
    if error and not shape.endswith(b"\n\n"):
        shape += b"\n\n"
    record = parse(token(), shape, error=error)
    if shape.startswith(b"data: KV") and error:
        assert record.error == error  # broken bytes, which the broken connection explains
        return
    assert WORDS in (record.error or "")


@pytest.mark.parametrize("nothing", [None, False, "", {}, [], 0, {"message": "", "code": None}, [None]])
def test_an_error_field_that_says_nothing_is_no_error(nothing: object) -> None:
    events = [token(error=nothing), token("length", error=nothing), usage(2), DONE]
    assert parse(*events).error is None


def test_fields_that_nobody_needs_are_not_decoded() -> None:
    odd = {"role": 5, "logprobs": "no", "stop_reason": [1], "matched_stop": {}, "index": "first"}
    first = data({"id": 7, "created": "now", "object": {}, "choices": [{**odd, "delta": {"role": [], "content": "w"}}]})
    last = data({"choices": [{**odd, "delta": {"content": ["w"], "audio": 4}, "finish_reason": "length"}]})
    whole = data({"choices": None, "usage": {"prompt_tokens": 3.0, "completion_tokens": 2.0, "cost": "free"}, "model": None})
    record = parse(first, last, whole, DONE)
    assert (record.error, record.prompt_tokens, record.output_tokens) == (None, 3, 2)


def test_a_document_in_place_of_a_stream_is_named() -> None:
    body = json.dumps({"choices": [{"text": "w", "finish_reason": "length"}], "usage": {"completion_tokens": 2}}).encode()
    assert parse(body).error == "the server answered with one document and not with a stream; add stream=False"


# ------------------------------------------------------------------------------------------------ statuses


def test_headers_that_tell_more_are_shown() -> None:
    assert http_error("307", {"location": "/new/v1"}, b"") == "HTTP 307: redirects to /new/v1"
    assert http_error("429", {"retry-after": "7"}, b'{"error":"busy"}') == "HTTP 429: retry after 7 s; busy"
    assert http_error("401", {"www-authenticate": "Bearer"}, b"") == "HTTP 401: wants Bearer"


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("Unrecognized request argument supplied: ignore_eos", "ignore_eos"),
        ("body.return_token_ids: Extra inputs are not permitted", "return_token_ids"),
        ("Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'", "max_tokens"),
        ("prompt is too long: max_tokens is 5", None),
        ("Extra inputs are not permitted: colour", None),
    ],
)
def test_a_refused_field_of_ours_is_named_with_the_remedy(words: str, name: str | None) -> None:
    told = http_error("400", {}, json.dumps({"error": {"message": words}}).encode())
    assert told.endswith(f"; leave it out with extra_body={{'{name}': None}}") == (name is not None)


@pytest.mark.parametrize("status", [b"201 Created", b"206 Partial Content"])
def test_another_status_of_success_is_no_error(status: bytes) -> None:
    assert parse(token(), token("length"), usage(2), DONE, head=HEAD.replace(b"200 OK", status)).error is None


def test_a_page_of_html_is_shown_by_its_title() -> None:
    page = b"<!DOCTYPE html><html><head><title>502 Bad Gateway</title></head><body>...</body></html>"
    assert reason_of_body(page) == "502 Bad Gateway"


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(
    st.sampled_from(["error", "message", "detail", "loc", "type", "x"]), inner), max_leaves=8))  # fmt: skip
def test_any_value_has_words(value: Any) -> None:
    assert len(reason_in(value)) <= 303
    assert len(reason_of_body(json.dumps(value).encode())) <= 303


@given(st.text(), st.integers(0, 9) | st.none(), st.booleans())
def test_any_reason_is_judged(reason: str, tokens: int | None, exact: bool) -> None:
    told = ending_error(reason, tokens, 5, exact=exact)
    assert told is None or isinstance(told, str)


# ------------------------------------------------------------------------------------------------ server-sent events

ENDS = [b"\n", b"\r\n", b"\r"]
fields = st.sampled_from(
    [b"data: a", b"data:b", b"data:  c", b"data", b": note", b"id: 4", b"retry: 9", b"event: x", b"data: \xc3\xa9"]
)


@given(st.lists(st.lists(fields, min_size=1, max_size=4), max_size=5), st.sampled_from(ENDS), st.booleans(), st.booleans())
def test_blocks_are_those_of_the_standard(groups: list[list[bytes]], end: bytes, mark: bool, blank: bool) -> None:
    body = (b"\xef\xbb\xbf" if mark else b"") + b"".join(end.join(group) + end + end for group in groups)
    body = body if blank else body.removesuffix(end)
    expected = []
    for group in groups:
        lines = [line[5:].removeprefix(b" ") for line in group if line.startswith(b"data")]
        expected.append(b"\n".join(lines) if lines else None)
    assert [block.data for block in blocks(body)] == expected
    assert all(not block.stray for block in blocks(body))


@given(st.binary(max_size=60), st.booleans())
def test_blocks_end_in_order_and_inside_the_body(body: bytes, flush: bool) -> None:
    ends = [block.end for block in blocks(body, flush=flush)]
    assert ends == sorted(ends)
    assert all(0 < end <= len(body) for end in ends)


@pytest.mark.parametrize("end", ENDS)
def test_an_answer_is_the_same_with_every_end_of_line(end: bytes) -> None:
    events = b"".join([b": hi\n\n", b"event: message\n", token(), token("length"), usage(2), DONE]).replace(b"\n", end)
    for body in (events, events.removesuffix(end), b"\xef\xbb\xbf" + events):
        record = parse(body)
        assert (record.error, record.output_tokens) == (None, 2)


def test_several_data_lines_are_one_event() -> None:
    text = json.dumps({"choices": [{"text": "w", "finish_reason": "length"}]})
    cut = text.index(",") + 1
    event = f"data: {text[:cut]}\ndata: {text[cut:]}\n\n".encode()
    assert parse(event, usage(1), DONE, wanted=1).error is None


def test_a_data_field_without_text_is_no_event() -> None:
    assert parse(b"data:\n\n", b"data\n\n", token(), token("length"), usage(2), DONE).error is None
