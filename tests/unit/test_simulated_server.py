"""The simulated engine over HTTP, in a thread of this process: its answers, its counters, and its failures in number."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import selectors
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from pytest_llmperf.testing.clock import Clock
from pytest_llmperf.testing.realtime import Steps
from pytest_llmperf.testing.scheduler import Request
from pytest_llmperf.testing.server import Options, SimulatedEngine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# A tenth of the default: these tests wait for real.
FAST = Clock(step_s=2e-4, sequence_s=1e-6, prefill_token_s=1e-7)
PROMPT = {"prompt": [5, 6, 7, 8], "max_tokens": 5, "ignore_eos": True}
DEADLINE_S = 10.0


def call(port: int, path: str, body: object = None, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
    try:
        text = None if body is None else body if isinstance(body, str) else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, text, headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def events(data: bytes) -> list[dict[str, Any]]:
    *lines, done, rest = data.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def metric(port: int, name: str) -> float:
    row = re.search(rf"^vllm:{name}[{{].*[}}] (\S+)$", call(port, "/metrics")[1].decode(), re.MULTILINE)
    assert row is not None
    return float(row[1])


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        threading.Event().wait(0.002)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with SimulatedEngine(Options(clock=FAST, model="m")) as engine:
        yield engine.port


# ------------------------------------------------------------------------------------------------ answers


def test_a_stream_has_one_event_per_token_then_usage_then_done(port: int) -> None:
    body = {**PROMPT, "stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
    *tokens, usage = events(call(port, "/v1/completions", body)[1])
    choices = [token["choices"][0] for token in tokens]
    assert [choice["token_ids"] for choice in choices] == [[26], [7945], [15864], [23783], [31702]]
    assert [choice["text"] for choice in choices] == [" w26", " w7945", " w15864", " w23783", " w31702"]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, None, "length"]
    assert choices[0]["prompt_token_ids"] == [5, 6, 7, 8]
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 4, "total_tokens": 9, "completion_tokens": 5}


def test_a_chat_streams_a_role_and_then_the_same_text(port: int) -> None:
    body = {"messages": [{"role": "user", "content": "hi there"}], "max_completion_tokens": 3}
    answer = json.loads(call(port, "/v1/chat/completions", body)[1])
    role, *tokens = events(call(port, "/v1/chat/completions", {**body, "stream": True})[1])
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(token["choices"][0]["delta"]["content"] for token in tokens)
    assert answer["choices"][0]["message"]["content"] == text
    assert answer["usage"] == {"prompt_tokens": 3, "total_tokens": 6, "completion_tokens": 3}


@pytest.mark.parametrize(("prompt", "tokens"), [("one two three", 3), (["one two"], 2), ([1, 2], 2), ([[1, 2, 3]], 3)])
def test_a_prompt_is_text_or_ids_or_a_list_of_one(port: int, prompt: object, tokens: int) -> None:
    status, answer = call(port, "/v1/completions", {"prompt": prompt, "max_tokens": 1})
    assert (status, json.loads(answer)["usage"]["prompt_tokens"]) == (200, tokens)


def test_an_output_that_is_too_long_is_cut_silently_as_vllm_does(port: int) -> None:
    body = {"prompt": [1] * 4000, "max_tokens": 500}
    assert json.loads(call(port, "/v1/completions", body)[1])["usage"]["completion_tokens"] == 96


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"max_tokens": 1}, 400, "prompt"),
        ({**PROMPT, "max_tokens": 0}, 400, "max_tokens must be at least 1, got 0."),
        ({"prompt": [1] * 4097, "max_tokens": 1}, 400, "maximum context length is 4096 tokens. However, your prompt"),
        ({"prompt": [[1], [2]]}, 400, "one prompt per request"),
        ({**PROMPT, "model": "nope"}, 404, "The model `nope` does not exist. Valid aliases: m"),
        ("{", 400, "JSON decode error"),
    ],
)
def test_a_bad_body_is_answered_with_vllms_error_body(port: int, body: object, status: int, words: str) -> None:
    answered, answer = call(port, "/v1/completions", body)
    error = json.loads(answer)["error"]
    assert (answered, error["code"]) == (status, status)
    assert words in error["message"]


def test_a_connection_serves_several_requests(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
    for path in ("/health", "/version", "/v1/models", "/nothing"):
        connection.request("GET", path)
        with connection.getresponse() as response:
            response.read()
            assert response.status == (404 if path == "/nothing" else 200)
            assert not response.will_close
    connection.close()


def test_an_api_key_guards_v1_only() -> None:
    with SimulatedEngine(Options(clock=FAST, api_key="secret")) as engine:
        assert call(engine.port, "/v1/completions", PROMPT)[0] == 401
        assert call(engine.port, "/v1/completions", PROMPT, Authorization="Bearer secret")[0] == 200
        assert call(engine.port, "/health")[0] == 200


def test_each_of_several_api_keys_opens_it() -> None:
    with SimulatedEngine(Options(clock=FAST, api_key="first", further_api_keys=("second",))) as engine:
        answers = [
            call(engine.port, "/v1/completions", PROMPT, Authorization=f"Bearer {key}")[0] for key in ("first", "second", "other")
        ]
        assert answers == [200, 200, 401]


def test_the_metrics_count_what_was_served() -> None:
    clock = Clock(step_s=2e-4, num_gpu_blocks=8, block_size=16, preemptions_per_round=4)
    with SimulatedEngine(Options(clock=clock, model='a"b')) as engine, ThreadPoolExecutor(8) as pool:
        bodies = [{"prompt": [n] * 30, "max_tokens": 20} for n in range(8)]
        statuses = [status for status, _ in pool.map(lambda body: call(engine.port, "/v1/completions", body), bodies)]
        assert statuses == [200] * 8
        assert metric(engine.port, "prompt_tokens_total") == metric(engine.port, "prefix_cache_queries_total") == 240
        assert metric(engine.port, "generation_tokens_total") == 160
        assert metric(engine.port, "num_preemptions_total") > 4  # real ones on top of the injected
        assert metric(engine.port, "kv_cache_usage_perc") == metric(engine.port, "num_requests_running") == 0
        text = call(engine.port, "/metrics")[1].decode()
    assert 'vllm:request_success_total{engine="0",finished_reason="length",model_name="a\\"b"} 8.0\n' in text
    assert 'num_gpu_blocks="8"} 1.0\n' in text


def test_the_prefix_cache_is_reset_over_http(port: int) -> None:
    hits = []
    for path in ("/v1/completions", "/v1/completions", "/reset_prefix_cache", "/v1/completions"):
        before = metric(port, "prefix_cache_hits_total")
        assert call(port, path, {"prompt": [9] * 64, "max_tokens": 1})[0] == 200
        hits.append(metric(port, "prefix_cache_hits_total") - before)
    assert hits == [0, 48, 0, 0]


def test_no_token_leaves_before_its_time() -> None:
    with SimulatedEngine(Options(clock=Clock(step_s=0.003, sequence_s=0, prefill_token_s=0))) as engine:
        start = time.monotonic()
        call(engine.port, "/v1/completions", {**PROMPT, "max_tokens": 100, "stream": True})
        assert time.monotonic() - start >= 0.3


class LateLoop(asyncio.SelectorEventLoop):
    """An event loop in whose time everything that is waited for comes late by as much."""

    LATE_S = 0.0005
    BEGIN_S = 100.0

    def __init__(self) -> None:
        self.now_s = self.BEGIN_S
        loop = self

        class Selector(selectors.SelectSelector):
            def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
                if timeout:
                    loop.now_s += timeout + LateLoop.LATE_S
                return super().select(0)

        super().__init__(Selector())

    def time(self) -> float:
        return self.now_s


def test_a_late_loop_delays_each_token_and_never_those_after_it() -> None:
    times: list[float] = []

    async def play() -> None:
        steps = Steps(Clock(step_s=0.003, sequence_s=0, prefill_token_s=0), round_gap_s=1.0)
        done = asyncio.Event()

        def emitted() -> None:
            times.append(asyncio.get_running_loop().time())
            if len(times) == 100:
                done.set()

        steps.submit(Request(1, (1, 2, 3), 100), emitted)
        await done.wait()

    with asyncio.Runner(loop_factory=LateLoop) as runner:
        runner.run(play())
    # A chain of sleeps would be 50 ms late in the end.
    expected = [LateLoop.BEGIN_S + 0.003 * number + LateLoop.LATE_S for number in range(1, 101)]
    assert times == pytest.approx(expected, abs=2 * LateLoop.LATE_S, rel=0)


def test_a_request_to_a_late_loop_begins_no_other_round() -> None:
    async def play() -> int:
        steps = Steps(Clock(step_s=0.003, sequence_s=0, prefill_token_s=0), round_gap_s=1.0)
        done = asyncio.Event()
        # Due before the step ends and late with all the rest: the loop sees this first, then the end of the step.
        asyncio.get_running_loop().call_later(0.0029, steps.submit, Request(2, (4, 5, 6), 1), done.set)
        steps.submit(Request(1, (1, 2, 3), 1), lambda: None)
        await done.wait()
        return steps.scheduler.counters.rounds

    with asyncio.Runner(loop_factory=LateLoop) as runner:
        assert runner.run(play()) == 1


# ------------------------------------------------------------------------------------------------ injected failures


def test_each_nth_request_fails_or_is_cut() -> None:
    with SimulatedEngine(Options(clock=FAST, fail_every=4, cut_every=3)) as engine:
        outcomes = []
        for _ in range(12):
            try:
                status, answer = call(engine.port, "/v1/completions", {**PROMPT, "stream": True})
                outcomes.append(status if status != 200 else len(events(answer)))
            except http.client.IncompleteRead as cut:
                outcomes.append(-cut.partial.count(b"data: "))
    assert outcomes == [5, 5, -2, 500, 5, -2, 5, 500, -2, 5, 5, 500]


def test_a_client_that_leaves_ends_its_request() -> None:
    with SimulatedEngine(Options(clock=Clock(step_s=0.005))) as engine:
        connection = http.client.HTTPConnection("127.0.0.1", engine.port, timeout=DEADLINE_S)
        connection.request("POST", "/v1/completions", json.dumps({**PROMPT, "max_tokens": 4000, "stream": True}))
        with connection.getresponse() as response:
            response.readline()
            connection.close()
        until(lambda: engine.counters.requests_aborted == 1)
        assert metric(engine.port, "kv_cache_usage_perc") == metric(engine.port, "num_requests_running") == 0


def test_a_hung_engine_is_healthy_and_emits_nothing() -> None:
    with SimulatedEngine(Options(clock=FAST, hang_after=1)) as engine:
        assert call(engine.port, "/v1/completions", PROMPT)[0] == 200
        connection = http.client.HTTPConnection("127.0.0.1", engine.port, timeout=0.1)
        connection.request("POST", "/v1/completions", json.dumps(PROMPT))
        with pytest.raises(TimeoutError):
            connection.getresponse()
        assert call(engine.port, "/health")[0] == 200
        connection.close()


def test_a_crash_in_a_thread_drops_everything() -> None:
    with SimulatedEngine(Options(clock=FAST, crash_after=0)) as engine:
        with pytest.raises((ConnectionError, http.client.RemoteDisconnected)):
            call(engine.port, "/v1/completions", PROMPT)
        with pytest.raises(ConnectionRefusedError):
            call(engine.port, "/health")


def test_two_engines_cannot_have_one_port(port: int) -> None:
    with pytest.raises(OSError, match="already in use"), SimulatedEngine(Options(port=port)):
        pass
