"""No false green: what a server withholds, sends twice or claims without having sent it makes a request a failed one.

Beside each lie stands what sound servers do that looks like it, and passes.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_llmperf.measure.client.endpoint import Endpoint
from pytest_llmperf.measure.client.processes import LoadClient
from pytest_llmperf.measure.client.prompts import prompts
from pytest_llmperf.measure.engines import api
from pytest_llmperf.measure.plausibility import counted_by_usage
from pytest_llmperf.plan.workload import Workload
from pytest_llmperf.testing import Example
from tests.hostile_servers import (
    DONE,
    SOUND,
    STREAM,
    chunks,
    closing,
    document,
    event,
    hostile_server,
    loaded,
    not_found,
    streaming,
    tokens,
    usage_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from pytest_llmperf.measure.client.messages import RoundLog
    from pytest_llmperf.testing import Result
    from tests.faults import Attempts
    from tests.hostile_servers import Answer, Asked

COUNT = 32
"""Tokens of each answer."""
NO_ANSWER, RESET = "the server closed the connection without an answer", "Connection reset by peer without an answer"


@pytest.fixture(scope="module")
def client() -> Iterator[LoadClient]:
    with LoadClient() as started:
        yield started


def play(client: LoadClient, answer: Answer, **other: Any) -> RoundLog:
    workload = replace(Workload(prompt_tokens=3, output_tokens=COUNT, requests=4, concurrency=2), **other)
    drawn = prompts(workload, 0, vocabulary=None, nonce="case")
    how = {"concurrency": workload.concurrency, "request_timeout_s": 60.0, "stall_timeout_s": 60.0}
    with hostile_server({f"/v1/{name}": answer for name in ("completions", "chat/completions")}) as server:
        return client.play(Endpoint(server.url, "m", gives_ids=False).plan(drawn, **how, stream=workload.stream))


def faults(what: str, names: Iterable[str]) -> list[Any]:
    """Return parameters of which each is a row of the table."""
    return [pytest.param(name, marks=pytest.mark.fault("no false green", what.format(name)), id=name) for name in names]


# ------------------------------------------------------------------------------------------------ closed without an answer


@pytest.mark.parametrize("every", faults("1 request in {} closed without a byte", ["50", "100"]))
def test_a_request_that_is_closed_without_a_byte_has_failed(client: LoadClient, attempts: Attempts, every: str) -> None:
    for chance in attempts(quick=2, full=20):
        victim = chance.randrange(int(every))

        def answer(asked: Asked, victim: int = victim) -> bool:
            return (closing if asked.number % int(every) == victim else SOUND["/v1/completions"])(asked)

        log = play(client, answer, requests=200, concurrency=8, output_tokens=2)
        errors = [record.error for record in log.records if record.error]
        assert len(errors) == 200 // int(every)
        assert {error.partition("] ")[2] or error for error in errors} <= {
            NO_ANSWER,
            "Connection reset by peer without an answer",
        }


RESTING = """
def test_serving(llmperf, baseline):
    measured = llmperf(prompt_tokens=3, output_tokens=2, requests=20{more})
    assert measured == baseline
"""
OPTIONS = (
    "--update-baselines",
    "--llmperf-rounds=1",
    "--llmperf-launches=1",
    "-p",
    "no:benchmark",
    "-p",
    "no:hypothesispytest",
    "-p",
    "no:anyio",
)


def run_on(folder: Path, answer: Answer, source: str) -> Result:
    """Record a baseline on a server that answers the load so, in this process."""
    with hostile_server({"/v1/completions": loaded(answer)}) as server:
        return Example({"test_it.py": source}, OPTIONS).run(folder, f"--llmperf-url={server.url}", in_process=True)


def closing_after(number: int) -> Answer:
    """Close without a byte from the load's second wave on, once in so many requests."""
    return lambda asked: (closing if asked.number > 10 and asked.number % number == 0 else SOUND["/v1/completions"])(asked)


@pytest.mark.fault("no false green", "a run in which 1 request in 20 is closed without a byte")
def test_a_run_with_a_request_that_got_no_answer_is_invalid(tmp_path: Path, attempts: Attempts) -> None:
    for _ in attempts():
        result = run_on(tmp_path, closing_after(20), RESTING.format(more=""))
        assert result.returncode == 1
        assert "of 20 requests failed: 1x" in result.stdout
        assert "without an answer" in result.stdout


def test_such_requests_may_pass_where_that_is_said(tmp_path: Path) -> None:
    result = run_on(tmp_path, closing_after(20), RESTING.format(more=", tolerated_failures=0.2"))
    assert result.returncode == 0, result.stdout
    [case] = result.cases
    assert "(tolerated)" in json.dumps(case)


# ------------------------------------------------------------------------------------------------ what a server claims


def finish(text: str = "") -> bytes:
    return event(text, ending="length")


def ended(*events: bytes, claimed: int = COUNT) -> list[bytes]:
    return [*events, finish(), event(usage=usage_of(claimed)), DONE]


def words(count: int, per_event: int = 1) -> list[bytes]:
    return [event("".join(f" w{number + n}" for n in range(per_event))) for number in range(0, count, per_event)]


LIES: dict[str, list[bytes]] = {
    "no token at all": ended(),
    "no token, and nothing of a choice but an end": [finish(), event(usage=usage_of(COUNT)), DONE],
    "ten times the tokens": ended(*words(COUNT // 10)),
    "five times the tokens of one letter each": ended(*[event("a")] * (COUNT // 5)),
    "each event twice": ended(*[each for each in words(COUNT) for _ in range(2)]),
    "each event three times": ended(*[each for each in words(COUNT) for _ in range(3)]),
    "half of the tokens in usage": ended(*words(COUNT), claimed=COUNT // 2),
    "none of the tokens in usage": ended(*words(COUNT), claimed=0),
    "one token too few": ended(*words(COUNT), claimed=COUNT - 1),
    "fewer tokens than asked for": ended(*words(COUNT - 1), claimed=COUNT - 1),
    "less than nothing": ended(*words(COUNT), claimed=-COUNT),
    "no usage": [*words(COUNT), finish(), DONE],
    "a usage of null": [*words(COUNT), finish(), event(usage={"prompt_tokens": None, "completion_tokens": None}), DONE],
    "no end": [*words(COUNT), event(usage=usage_of(COUNT)), DONE],
    "an error behind its tokens": [*words(COUNT), finish(), b'data: {"error": {"message": "gone"}}\n\n', DONE],
    "ids of other than the usage": [*[event(" w", token_ids=[1])] * (COUNT - 1), finish(), event(usage=usage_of(COUNT)), DONE],
    "bad JSON": [*words(COUNT)[:-1], b'data: {"choices": [\n\n', finish(), event(usage=usage_of(COUNT)), DONE],
}


def said(**delta: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}).encode() + b"\n\n"


CHAT_END = b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}\n\n'


def chat(*events: bytes, usage: dict[str, Any] | None = None) -> list[bytes]:
    return [said(role="assistant", content=""), *events, CHAT_END, event(usage=usage or usage_of(COUNT)), DONE]


SOUND_WAYS: dict[str, list[bytes]] = {
    "an event for each token": ended(*words(COUNT)),
    "the end in the event of the last token": tokens(COUNT),
    "usage in every event": [
        *(event(f" w{n}", usage=usage_of(n + 1)) for n in range(COUNT)), finish(), event(usage=usage_of(COUNT)), DONE,
    ],
    "usage with the last choice": [*words(COUNT - 1), event(" w", ending="length", usage=usage_of(COUNT)), DONE],
    "four tokens in an event, as speculative decoding": ended(*words(COUNT, 4)),
    "twenty tokens in an event, as an interval": ended(*words(COUNT, 16)),
    "all tokens in one event": ended(*words(COUNT, COUNT)),
    "the same token again and again": ended(*[event("tok ")] * COUNT),
    "a quarter of the tokens without text": ended(*[event(" w" if n % 4 else "") for n in range(COUNT)]),
    "all tokens without text, an event each": ended(*[event("")] * COUNT),
    "a quarter of the tokens without an event": ended(*words(COUNT * 3 // 4)),
    "characters of three tokens each": ended(*[event("語") for _ in range(COUNT // 3)]),
    "letters": ended(*[event("a")] * COUNT),
    "a piece of text that was held back": ended(*words(COUNT), event(" last")),
    "pings between events": ended(*[part for each in words(COUNT) for part in (b": ping\n\n", each)]),
    "usage as floats": [*words(COUNT), finish(), event(usage={"prompt_tokens": 3.0, "completion_tokens": float(COUNT)}), DONE],
    "usage of null in every event": [
        *(each.replace(b'}]}', b'}], "usage": null}') for each in words(COUNT)), finish(), event(usage=usage_of(COUNT)), DONE,
    ],
    "ids": [
        *[event("", token_ids=[1])] * (COUNT - 1), event("", ending="length", token_ids=[1]), event(usage=usage_of(COUNT)), DONE,
    ],
    "ids, several in an event": [*[event("", token_ids=[1, 2])] * (COUNT // 2), finish(), event(usage=usage_of(COUNT)), DONE],
    "a chat": chat(*[said(content=f" w{n}") for n in range(COUNT)]),
    "reasoning": chat(*[said(reasoning_content=" hm") for _ in range(COUNT // 2)], *[said(content=" w")] * (COUNT // 2)),
    "reasoning under both names": chat(*[said(reasoning=" hm", reasoning_content=" hm") for _ in range(COUNT)]),
    "reasoning and answer cut within a token": chat(
        *[said(reasoning=" hm")] * (COUNT // 2), said(content=" an"), *[said(content=f" w{n}") for n in range(COUNT // 2)]
    ),
    "reasoning that is not shown": chat(
        *[said(content=" w")] * 4, usage=usage_of(COUNT) | {"completion_tokens_details": {"reasoning_tokens": COUNT - 4}}
    ),
    "a call": chat(*[said(tool_calls=[{"index": 0, "function": {"arguments": '"x'}}]) for _ in range(COUNT - 4)]),
}  # fmt: skip


@pytest.mark.parametrize("lie", faults("{} told by a server without token ids", LIES))
def test_a_lie_is_a_failed_request(client: LoadClient, attempts: Attempts, lie: str) -> None:
    for _ in attempts():
        log = play(client, streaming(lambda _: LIES[lie]))
        assert all(record.error for record in log.records), log.records[0]


@pytest.mark.parametrize("way", SOUND_WAYS)
def test_what_sound_servers_do_is_no_lie(client: LoadClient, way: str) -> None:
    log = play(client, streaming(lambda _: SOUND_WAYS[way]))
    assert Counter(record.error for record in log.records) == {None: 4}
    assert {record.output_tokens for record in log.records} == {COUNT}


def test_what_is_known_from_usage_alone_is_told(client: LoadClient) -> None:
    assert counted_by_usage(play(client, streaming(lambda _: SOUND_WAYS["an event for each token"])).records) is None
    assert counted_by_usage(play(client, streaming(lambda _: SOUND_WAYS["ids, several in an event"])).records) is None
    half = play(client, streaming(lambda _: ended(*words(COUNT // 2)))).records
    assert counted_by_usage(half) == (
        "output tokens are known from usage alone: it counts 128, which came in 64 pieces of text; this engine gives neither"
        " token ids nor counters that would prove them"
    )


@pytest.mark.fault("no false green", "half of the tokens sent, usage and no counters: told with the launch")
def test_half_of_the_tokens_are_told(tmp_path: Path, attempts: Attempts) -> None:
    for _ in attempts():
        result = run_on(
            tmp_path,
            streaming(lambda count: ended(*words(count // 2), claimed=count)),
            RESTING.format(more="").replace("=2", "=16"),
        )
        assert "output tokens are known from usage alone" in json.dumps(result.cases)


@pytest.mark.fault("no false green", "a document without any of the text that its usage claims")
def test_a_document_without_text_is_a_failed_request(client: LoadClient, attempts: Attempts) -> None:
    choice = {"index": 0, "text": "", "finish_reason": "length"}
    for _ in attempts():
        log = play(client, document({"choices": [choice], "usage": usage_of(COUNT)}), stream=False)
        assert {str(record.error).partition(";")[0] for record in log.records} == {
            f"usage says {COUNT} tokens, what came has 0 bytes of text: no token has less than one"
        }


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_a_document_with_enough_text_is_none(client: LoadClient, api: str) -> None:
    text = " w" * COUNT
    choice = {"message": {"role": "assistant", "content": text}} if api == "chat" else {"text": text}
    body = {"choices": [{**choice, "finish_reason": "length"}], "usage": usage_of(COUNT)}
    log = play(client, document(body), stream=False, api=api)
    assert Counter(record.error for record in log.records) == {None: 4}


# ------------------------------------------------------------------------------------------------ whole answers that are none


def status(code: str) -> Answer:
    def answer(asked: Asked) -> bool:
        asked.connection.sendall(b"HTTP/1.1 %b\r\ncontent-length: 5\r\n\r\nsorry" % code.encode())
        return True

    return answer


def truncated(asked: Asked) -> bool:
    wire = STREAM + chunks(tokens(COUNT))
    asked.connection.sendall(wire[: len(wire) * 2 // 3])
    return False


def without_last_chunk(asked: Asked) -> bool:
    asked.connection.sendall(STREAM + chunks(tokens(COUNT)))
    return False


BROKEN: dict[str, Answer] = {
    "HTTP 500": status("500 Internal Server Error"),
    "HTTP 503": status("503 Service Unavailable"),
    "HTTP 429": status("429 Too Many Requests"),
    "HTTP 404": not_found,
    "HTTP 204 without a body": lambda asked: not asked.connection.sendall(b"HTTP/1.1 204 No Content\r\n\r\n") and False,
    "a truncated stream": truncated,
    "a stream without its last chunk": without_last_chunk,
    "a length that is cut": lambda asked: bool(
        asked.connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 9999\r\n\r\ndata: ")
    ),
    "another protocol": lambda asked: bool(asked.connection.sendall(b"SSH-2.0-OpenSSH_9\r\n\r\n")),
}


@pytest.mark.parametrize("what", faults("{} in place of an answer", BROKEN))
def test_a_broken_answer_is_a_failed_request(client: LoadClient, attempts: Attempts, what: str) -> None:
    for _ in attempts():
        log = play(client, BROKEN[what])
        assert all(record.error for record in log.records), log.records[0]


@pytest.mark.parametrize(
    "lie", faults("a run whose server tells {}", ["no token at all", "ten times the tokens", "each event twice"])
)
def test_a_run_on_a_lie_is_invalid(tmp_path: Path, attempts: Attempts, lie: str) -> None:
    for _ in attempts():
        source = RESTING.format(more="").replace("output_tokens=2", f"output_tokens={COUNT}")
        result = run_on(tmp_path, streaming(lambda _: LIES[lie]), source)
        assert result.returncode == 1
        assert "usage says" in result.stdout
        assert not list(tmp_path.rglob("baselines/*.json"))


# ------------------------------------------------------------------------------------------------ a key and a redirect

KEY = "sk-secret-of-the-test"


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
@pytest.mark.fault("no stranger", "a redirect to another host, which would get the key")
def test_a_key_does_not_follow_a_redirect(client: LoadClient, attempts: Attempts, code: int) -> None:
    for _ in attempts():
        with hostile_server({}) as stranger:

            def redirect(asked: Asked, url: str = stranger.url) -> bool:
                head = f"HTTP/1.1 {code} Elsewhere\r\nlocation: {url}{asked.path}\r\ncontent-length: 0\r\n\r\n"
                asked.connection.sendall(head.encode())
                return True

            paths = ("/v1/models", "/metrics", "/v1/completions")
            with hostile_server(dict.fromkeys(paths, redirect)) as server:
                endpoint = Endpoint(server.url, "m", KEY, headers=(("X-Secret", KEY),))
                for path in paths[:2]:
                    assert api.ask(endpoint, path).status == code
                assert api.ask(endpoint, paths[2], {"prompt": "x"}).status == code
                workload = Workload(prompt_tokens=3, output_tokens=2, requests=2, concurrency=1)
                drawn = prompts(workload, 0, vocabulary=None, nonce="case")
                log = client.play(endpoint.plan(drawn, concurrency=1, request_timeout_s=60.0, stall_timeout_s=60.0))
                assert all(f"HTTP {code}: redirects to" in (record.error or "") for record in log.records)
                assert all(head["authorization"] == f"Bearer {KEY}" for head in server.heads)
            assert (stranger.paths, stranger.heads) == ([], [])
