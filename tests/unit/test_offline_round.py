"""How a round is played on `vllm.LLM`, with an engine of a few lines in its place; the real one is in tests/real."""

from __future__ import annotations

import itertools
import sys
import time
import types
from dataclasses import dataclass, field
from typing import Any

import pytest

from pytest_llmperf.measure.engines.host_llm import Round


@dataclass
class FakeEngine:
    """Gives each request in flight a token at every step."""

    open: dict[str, list[int]] = field(default_factory=dict)
    most: int = 0
    added: list[str] = field(default_factory=list)
    early: int = 0
    """Tokens that each request gets less than it asked for."""
    step_s: float = 0.0
    ending: str | None = "length"
    """The finish reason of each answer."""

    def add_request(self, key: str, prompt: dict[str, Any], params: Any) -> str:
        self.open[key] = [len(prompt.get("prompt_token_ids", prompt.get("prompt", "").split())), params.max_tokens - self.early]
        self.added.append(key)
        self.most = max(self.most, len(self.open))
        return key

    def step(self) -> list[Any]:
        time.sleep(self.step_s)
        outputs = []
        for key, state in list(self.open.items()):
            state[1] -= 1
            if state[1] <= 0:
                del self.open[key]
            output = types.SimpleNamespace(token_ids=[7], finish_reason=self.ending if state[1] <= 0 else None)
            outputs.append(types.SimpleNamespace(
                request_id=key, outputs=[output], finished=state[1] <= 0, prompt_token_ids=[0] * state[0],
            ))  # fmt: skip
        return outputs

    def abort_request(self, keys: list[str]) -> None:
        for key in keys:
            del self.open[key]


@pytest.fixture(autouse=True)
def _vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for the two names of vLLM that a round needs."""
    package, sampling = types.ModuleType("vllm"), types.ModuleType("vllm.sampling_params")
    package.SamplingParams = lambda **given: types.SimpleNamespace(**given)  # type: ignore[attr-defined]
    sampling.RequestOutputKind = types.SimpleNamespace(DELTA="delta")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", sampling)


def prompt(tokens: int = 3, **more: Any) -> dict[str, Any]:
    usual = {
        "token_ids": [1, 2, 3],
        "text": "",
        "output_tokens": tokens,
        "due_s": None,
        "follows": False,
        "exact": True,
        "body": {},
    }
    return usual | more


def play(
    engine: FakeEngine, prompts: list[dict[str, Any]], *, concurrency: int = 2, timeout_s: float = 60, **limits: Any
) -> list[dict[str, Any]]:
    plan = {"prompts": prompts, "concurrency": concurrency, "request_timeout_s": timeout_s, "over": "over", **limits}
    return Round(types.SimpleNamespace(llm_engine=engine), plan).play()


def test_no_more_requests_are_in_flight_than_asked_for() -> None:
    engine = FakeEngine()
    records = play(engine, [prompt(n) for n in (1, 5, 3, 2, 4)])
    assert engine.most == 2
    assert [record["output_tokens"] for record in records] == [1, 5, 3, 2, 4]
    for record in records:
        times = [record["sent_s"], *record["token_times_s"], record["end_s"]]
        assert times == sorted(times)
        assert record["prompt_tokens"] == 3
        assert record["error"] is None


def test_a_turn_waits_for_the_one_before_it() -> None:
    records = play(FakeEngine(), [prompt(), prompt(follows=True), prompt()])
    assert records[1]["sent_s"] >= records[0]["end_s"]
    assert records[2]["sent_s"] <= records[0]["end_s"]


def test_at_a_rate_requests_are_added_however_many_are_open() -> None:
    engine = FakeEngine(step_s=0.02)
    records = play(engine, [prompt(5, due_s=0.01 * n) for n in range(6)], concurrency=1)
    assert engine.most > 2
    assert all(record["delay_s"] >= 0 for record in records)
    gaps = [later["due_s"] - earlier["due_s"] for earlier, later in itertools.pairwise(records)]
    assert gaps == pytest.approx([0.01] * 5)


def test_a_text_is_sent_as_a_text() -> None:
    [record] = play(FakeEngine(), [prompt(token_ids=[], text="four words are here")])
    assert record["prompt_tokens"] == 4


def test_fewer_tokens_than_asked_for_are_an_error_unless_allowed() -> None:
    records = play(FakeEngine(ending="stop", early=1), [prompt(3), prompt(3, exact=False)])
    assert [record.get("error") for record in records] == ["2 of 3 tokens", None]


def test_what_takes_too_long_is_aborted() -> None:
    engine = FakeEngine(step_s=0.02)
    records = play(engine, [prompt(1000), prompt(1)], timeout_s=0.1)
    assert [record.get("error") for record in records] == ["not complete after 0.1 s", None]
    assert engine.open == {}


def test_sampling_parameters_are_passed_on() -> None:
    seen = []
    engine = FakeEngine()
    add = engine.add_request
    engine.add_request = lambda key, asked, params: seen.append(params) or add(key, asked, params)  # type: ignore[method-assign, func-returns-value]
    play(engine, [prompt(body={"temperature": 0.7, "top_p": 0.9})])
    assert (seen[0].temperature, seen[0].top_p, seen[0].ignore_eos, seen[0].max_tokens) == (0.7, 0.9, True, 3)


@pytest.mark.parametrize(
    ("ending", "early", "exact", "error"),
    [
        ("length", 0, True, None),
        ("stop", 1, False, None),
        ("stop", 1, True, "2 of 3 tokens"),
        ("length", 1, False, "the engine cut it: finish_reason 'length' after 2 of 3 tokens"),
        ("abort", 0, True, "it ended with finish_reason 'abort' after 3 of 3 tokens"),
        ("error", 1, False, "it ended with finish_reason 'error' after 2 of 3 tokens"),
        (None, 0, True, "it ended with finish_reason None after 3 of 3 tokens"),
    ],
)
def test_how_an_answer_ends_is_judged(ending: str | None, early: int, exact: bool, error: str | None) -> None:
    [record] = play(FakeEngine(ending=ending, early=early), [prompt(exact=exact)])
    assert (record["error"], record["finish_reason"]) == (error, ending)


def test_a_field_that_is_none_is_left_out() -> None:
    engine = FakeEngine()
    asked: list[Any] = []
    add_request = engine.add_request

    def add(key: str, given: dict[str, Any], params: Any) -> str:
        asked.append(params)
        return add_request(key, given, params)

    engine.add_request = add  # type: ignore[method-assign]  # the engine is a double already
    play(engine, [prompt(body={"ignore_eos": None, "top_k": 4}, exact=False)])
    assert not hasattr(asked[0], "ignore_eos")
    assert asked[0].top_k == 4


def test_at_a_rate_no_more_are_open_than_the_cap() -> None:
    engine = FakeEngine(step_s=0.005)
    records = play(engine, [prompt(4, due_s=0.0) for _ in range(9)], max_concurrency=3)
    assert engine.most == 3
    assert len({record["due_s"] for record in records}) == 1
    for record in records[3:]:
        assert record["delay_s"] < record["sent_s"] - record["due_s"], "waiting for room is no lateness"


@pytest.mark.parametrize("at", [None, 0.0])
def test_a_user_thinks_and_keeps_the_place(at: float | None) -> None:
    talk = [prompt(due_s=at), prompt(follows=True, think_s=0.05, due_s=at)]
    first, second, other = play(FakeEngine(step_s=0.001), [*talk, prompt(due_s=at)], concurrency=1)
    assert second["sent_s"] >= first["end_s"] + 0.05
    assert ("due_s" in second) == (at is not None)
    assert (other["sent_s"] >= second["end_s"]) == (at is None)


def test_when_the_time_is_over_nothing_more_is_added() -> None:
    talk = [prompt(), prompt(follows=True, think_s=60.0), prompt(follows=True)]
    records = play(FakeEngine(step_s=0.01), [*talk, *(prompt(5) for _ in range(100))], stop_s=0.1)
    assert [record["error"] for record in records[:3]] == [None, "over", "over"]
    assert {record["error"] for record in records} == {None, "over"}
    assert all(record["sent_s"] is None for record in records if record["error"])
