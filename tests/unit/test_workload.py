"""Prompts from a seed: the same where launches are compared, and never the same where a prefix cache could help."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections import Counter
from itertools import combinations, pairwise
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_llmperf.measure.client.prompts import WARM_UP, Prompt, arrivals, prompts
from pytest_llmperf.plan.arguments import workload_from
from pytest_llmperf.plan.axes import Axes
from pytest_llmperf.plan.workload import Workload

if TYPE_CHECKING:
    from pathlib import Path

workloads = st.builds(
    Workload,
    prompt_tokens=st.integers(16, 200),
    output_tokens=st.integers(1, 100),
    requests=st.integers(8, 24),
    concurrency=st.integers(1, 8),
    seed=st.integers(0, 2**40),
)
numbers = st.integers(WARM_UP, 20)
vocabularies = st.one_of(st.none(), st.integers(256, 200_000))


USUAL = Workload()


def draw(workload: Workload = USUAL, number: int = 0, vocabulary: int | None = 1024, nonce: str = "case") -> list[Prompt]:
    return prompts(workload, number, vocabulary=vocabulary, nonce=nonce)


def blocks(drawn: list[Prompt], size: int = 16) -> set[tuple[int, ...]]:
    """Return what a prefix cache would look up first."""
    return {prompt.token_ids[:size] for prompt in drawn}


@settings(deadline=None, max_examples=30)
@given(workloads, numbers, vocabularies, st.text(max_size=10))
def test_a_round_is_the_same_in_every_launch(workload: Workload, number: int, vocabulary: int | None, nonce: str) -> None:
    assert draw(workload, number, vocabulary, nonce) == draw(workload, number, vocabulary, nonce)


def test_a_round_is_the_same_in_another_process() -> None:
    # Text hashes differ between processes; a seed must not be made of them.
    code = (
        "from pytest_llmperf.measure.client.prompts import prompts; from pytest_llmperf.plan.workload import Workload\n"
        "print(prompts(Workload(), 3, vocabulary=1024, nonce='case')[0].token_ids)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(draw(number=3)[0].token_ids)


@settings(deadline=None, max_examples=30)
@given(workloads, numbers, vocabularies)
def test_no_two_prompts_of_a_round_begin_alike(workload: Workload, number: int, vocabulary: int | None) -> None:
    drawn = draw(workload, number, vocabulary)
    assert len(blocks(drawn)) == len(drawn)


@settings(deadline=None, max_examples=20)
@given(workloads, vocabularies)
def test_no_prompt_of_a_round_begins_like_one_of_another(workload: Workload, vocabulary: int | None) -> None:
    seen = [blocks(draw(workload, number, vocabulary)) for number in (WARM_UP, 0, 1, 2, 10, 11)]
    assert not any(first & second for first, second in combinations(seen, 2))


@settings(deadline=None, max_examples=20)
@given(workloads, st.text(max_size=10), st.text(max_size=10))
def test_different_cases_have_different_prompts(workload: Workload, nonce: str, other: str) -> None:
    if nonce != other:
        assert not blocks(draw(workload, nonce=nonce)) & blocks(draw(workload, nonce=other))


def test_a_different_seed_gives_different_prompts() -> None:
    assert not blocks(draw(Workload(seed=1))) & blocks(draw(Workload(seed=2)))


@settings(deadline=None, max_examples=30)
@given(workloads, st.integers(0, 20), vocabularies)
def test_every_request_has_the_lengths_of_the_workload(workload: Workload, number: int, vocabulary: int | None) -> None:
    drawn = draw(workload, number, vocabulary)
    assert len(drawn) == workload.requests
    lengths = {(len(prompt.token_ids), prompt.output_tokens) for prompt in drawn}
    assert lengths == {(workload.prompt_tokens, workload.output_tokens)}


def test_the_warm_up_is_one_wave_of_the_real_lengths() -> None:
    drawn = draw(Workload(prompt_tokens=7, output_tokens=3, requests=32, concurrency=5), WARM_UP)
    assert [(len(prompt.token_ids), prompt.output_tokens) for prompt in drawn] == [(7, 3)] * 5


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 200_000), numbers)
def test_ids_are_within_the_vocabulary_whatever_its_size(vocabulary: int, number: int) -> None:
    ids = {token for prompt in draw(Workload(prompt_tokens=50), number, vocabulary) for token in prompt.token_ids}
    assert min(ids) >= 0
    assert max(ids) < vocabulary


@pytest.mark.parametrize("vocabulary", [1024, 32_000, None])
def test_the_first_ids_are_left_out_because_they_are_special_tokens(vocabulary: int | None) -> None:
    ids = {token for prompt in draw(Workload(prompt_tokens=500), vocabulary=vocabulary) for token in prompt.token_ids}
    assert min(ids) >= 256


def test_an_unknown_vocabulary_uses_ids_that_common_models_have() -> None:
    ids = {token for prompt in draw(Workload(prompt_tokens=500), vocabulary=None) for token in prompt.token_ids}
    assert max(ids) < 32_000


# ------------------------------------------------------------------------------------------------ shapes of traffic


def made(folder: Path | None = None, **arguments: Any) -> Workload:
    return workload_from(Axes(), arguments, folder=folder)


@pytest.mark.parametrize("lengths", ["uniform(10, 300)", "lognormal(100, 0.8, 500)"])
def test_every_round_asks_for_the_same_lengths_with_other_tokens(lengths: str) -> None:
    workload = made(prompt_tokens=lengths, output_tokens=lengths)
    first, second = draw(workload, 0), draw(workload, 1)
    assert [(len(prompt.token_ids), prompt.output_tokens) for prompt in first] == [
        (len(prompt.token_ids), prompt.output_tokens) for prompt in second
    ]
    assert len({len(prompt.token_ids) for prompt in first}) > 8
    assert not {prompt.token_ids for prompt in first} & {prompt.token_ids for prompt in second}


def test_a_lognormals_mean_is_the_mean() -> None:
    drawn = draw(made(prompt_tokens="lognormal(100, 0.5)", requests=4000))
    assert statistics.fmean(len(prompt.token_ids) for prompt in drawn) == pytest.approx(100, rel=0.03)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=5), st.integers(8, 200))
def test_each_class_has_its_share_to_the_request(shares: list[float], requests: int) -> None:
    workload = made(classes={f"k{n}": {"share": share} for n, share in enumerate(shares)}, requests=requests)
    counts = Counter(prompt.request_class for prompt in draw(workload))
    assert counts.total() == requests
    for name in (f"k{n}" for n in range(len(shares))):
        exact = workload.class_share(name) * requests
        assert counts[name] >= 1
        assert abs(counts[name] - exact) < max(1, len(shares))


def test_shared_prefixes_are_taken_in_turn_and_new_in_every_round() -> None:
    workload = made(prompt_tokens=16, prefix_tokens=32, prefixes=2, requests=8)
    first, second = draw(workload, 0), draw(workload, 1)
    assert [prompt.token_ids[:32] == first[0].token_ids[:32] for prompt in first] == [True, False] * 4
    assert {len(prompt.token_ids) for prompt in first} == {48}
    assert len({prompt.token_ids[32:] for prompt in first}) == 8
    assert first[0].token_ids[:32] != second[0].token_ids[:32]


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_each_turn_of_a_conversation_holds_all_that_was_said_before(api: str) -> None:
    drawn = draw(made(turns=3, prompt_tokens=10, output_tokens=5, requests=24, api=api))
    assert [prompt.follows for prompt in drawn] == [False, True, True] * 8
    for first, second, third in zip(drawn[::3], drawn[1::3], drawn[2::3], strict=True):
        if api == "chat":
            assert [len(prompt.messages) for prompt in (first, second, third)] == [1, 3, 5]
            assert third.messages[:3] == second.messages
        else:
            assert [len(prompt.token_ids) for prompt in (first, second, third)] == [10, 25, 40]
            assert third.token_ids[:25] == second.token_ids


@pytest.mark.parametrize("arrivals_", ["poisson", "constant", "gamma(0.25)", "gamma(4)"])
@pytest.mark.parametrize("rate", [5.0, "2..8"])
def test_arrivals_keep_their_rate_and_their_order(arrivals_: str, rate: Any) -> None:
    times = arrivals(made(rate=rate, arrivals=arrivals_), 20_000)
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] == pytest.approx(4000, rel=0.01)
    if rate != 5.0:
        early = sum(at < 2000 for at in times)
        assert early == pytest.approx(7000, rel=0.05)  # half of the time, at 2 to 5 a second


@pytest.mark.parametrize(
    ("arrivals_", "expected"), [("poisson", 1.0), ("constant", 0.0), ("gamma(0.25)", 4.0), ("gamma(4)", 0.25)]
)
def test_arrivals_are_as_bursty_as_asked_for(arrivals_: str, expected: float) -> None:
    # Variance over mean of the arrivals in windows of ten gaps; for renewal processes it tends to the gaps' squared cv.
    times = arrivals(made(rate=100, arrivals=arrivals_), 50_000)
    counts = Counter(int(at * 10) for at in times)
    windows = [counts[number] for number in range(5000)]
    assert statistics.variance(windows) / statistics.fmean(windows) == pytest.approx(expected, rel=0.25, abs=0.03)


def test_poisson_arrivals_are_no_gaps_that_repeat() -> None:
    times = arrivals(made(rate=100), 5000)
    gaps = [round(later - earlier, 9) for earlier, later in pairwise(times)]
    assert len(set(gaps)) > 4990


def test_a_trace_is_replayed_at_its_times_with_its_shared_blocks(tmp_path: Path) -> None:
    rows = [(0, 1024, [1, 2]), (500, 1100, [1, 2, 3]), (1000, 600, [4, 5])]
    lines = [{"timestamp": at, "input_length": size, "output_length": 3, "hash_ids": ids} for at, size, ids in rows]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    drawn = draw(made(tmp_path, trace="t.jsonl", speed=2.0))
    assert [prompt.due_s for prompt in drawn] == [0, 0.25, 0.5]
    assert [len(prompt.token_ids) for prompt in drawn] == [1024, 1100, 600]
    assert drawn[0].token_ids == drawn[1].token_ids[:1024]
    assert drawn[2].token_ids[:16] != drawn[0].token_ids[:16]


def test_a_dataset_gives_messages_to_a_chat_or_its_question(tmp_path: Path) -> None:
    said = [{"from": "system", "value": "Hello"}, {"from": "human", "value": "Why?"}]
    (tmp_path / "s.json").write_text(json.dumps([{"conversations": said}] * 3))
    chat, plain = (draw(made(tmp_path, dataset="s.json", api=api)) for api in ("chat", "completions"))
    for prompt in chat:
        (role, text), question = prompt.messages
        assert (role, text.partition(": ")[2], question) == ("system", "Hello", ("user", "Why?"))
    assert {prompt.text.partition(": ")[2] for prompt in plain} == {"Why?"}
    # A mark of its own in front of each: no round finds another one's prompts in a prefix cache.
    again = draw(made(tmp_path, dataset="s.json", api="completions"), 1)
    assert len({prompt.text for prompt in (*plain, *again)}) == 64


def test_a_rate_is_one_of_requests_whatever_their_conversations() -> None:
    drawn = draw(made(rate=10, turns=4, requests=400))
    assert max(prompt.due_s or 0 for prompt in drawn) == pytest.approx(40, rel=0.05)


def test_a_class_that_says_no_lengths_has_those_of_the_call() -> None:
    drawn = draw(made(prompt_tokens=10, output_tokens=200, classes={"short": {}, "long": {"prompt_tokens": 90}}))
    assert {(prompt.request_class, len(prompt.token_ids), prompt.output_tokens) for prompt in drawn} == {
        ("short", 10, 200),
        ("long", 90, 200),
    }


def test_bodies_and_adapters_come_from_the_class_over_the_workload() -> None:
    classes = {"a": {"extra_body": {"temperature": 0.5}, "lora": "x"}, "b": {}}
    drawn = draw(made(classes=classes, extra_body={"temperature": 1, "top_p": 0.9}, lora=["y"]))
    by_class = {prompt.request_class: (prompt.model, json.loads(prompt.body)) for prompt in drawn}
    assert by_class == {"a": ("x", {"temperature": 0.5, "top_p": 0.9}), "b": ("y", {"temperature": 1, "top_p": 0.9})}


def test_an_open_loop_warms_up_with_its_first_arrivals() -> None:
    workload = made(rate=10, requests=100)
    warm, first = draw(workload, WARM_UP), draw(workload, 0)
    assert [prompt.due_s for prompt in warm] == [prompt.due_s for prompt in first[:32]]
    assert not {prompt.token_ids for prompt in warm} & {prompt.token_ids for prompt in first}


# ------------------------------------------------------------------------------------------------ lengths, pauses, warm-up


def test_a_normals_lengths_have_its_mean_and_spread() -> None:
    drawn = [len(prompt.token_ids) for prompt in draw(made(prompt_tokens="normal(200, 20, 230)", requests=3000))]
    assert statistics.fmean(drawn) == pytest.approx(200, rel=0.01)
    assert statistics.stdev(drawn) == pytest.approx(20, rel=0.15)
    assert max(drawn) == 230


def test_no_length_of_a_wide_normal_is_below_one() -> None:
    assert min(prompt.output_tokens for prompt in draw(made(output_tokens="normal(2, 50)", requests=200))) == 1


def test_pairs_keep_their_correlation_and_come_equally_often(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("input,output\n10,100\n20,200\n30,300\n")
    for pairs in ([(10, 100), (20, 200), (30, 300)], "file(p.csv)", "p.csv"):
        drawn = draw(made(tmp_path, pairs=pairs, requests=30))
        assert Counter((len(prompt.token_ids), prompt.output_tokens) for prompt in drawn) == {
            (10, 100): 10, (20, 200): 10, (30, 300): 10,
        }  # fmt: skip


def test_pauses_are_drawn_once_for_every_round() -> None:
    workload = made(turns=3, requests=30, concurrency=4, think_s="uniform(0.5, 2)")
    first, second = ([prompt.think_s for prompt in draw(workload, number)] for number in (0, 1))
    assert first == second
    assert first[::3] == [0.0] * 10
    assert all(0.5 <= pause <= 2 for pause in first[1::3] + first[2::3])
    assert len(set(first)) > 15
    assert min(prompt.think_s for prompt in draw(made(turns=2, think_s="normal(0, 1)"))) == 0


def test_at_an_infinite_rate_all_begin_at_once() -> None:
    assert {prompt.due_s for prompt in draw(made(rate="inf", arrivals="constant"))} == {0.0}


def test_a_warm_up_may_have_its_own_requests_lengths_and_dataset(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"prompt": "Why?"}\n')
    assert len(draw(made(warm_up={"requests": 3}), WARM_UP)) == 3
    assert len(draw(made(warm_up={"requests": 40}, requests=32), WARM_UP)) == 40
    lengths = {(len(prompt.token_ids), prompt.output_tokens) for prompt in draw(made(warm_up={"prompt_tokens": 7}), WARM_UP)}
    assert lengths == {(7, 50)}
    [prompt, *_] = draw(made(tmp_path, warm_up={"dataset": "d.jsonl", "output_tokens": 3}), WARM_UP)
    assert (prompt.text.partition(": ")[2], prompt.output_tokens) == ("Why?", 3)
    assert {len(prompt.token_ids) for prompt in draw(made(tmp_path, warm_up={"dataset": "d.jsonl"}))} == {100}


SOURCES: tuple[dict[str, Any], ...] = (
    {},
    {"rate": 5},
    {"rate": "inf", "max_concurrency": 2},
    {"rate": "1..5", "duration_s": 3, "turns": 2},
    {"trace": "t.jsonl"},
    {"trace": "t.jsonl", "max_concurrency": 2, "speed": 3},
    {"dataset": "d.jsonl", "max_prompt_tokens": 9},
    {"dataset": "d.jsonl", "output_tokens": "dataset"},
    {"pairs": [(5, 6), (7, 8)]},
    {"turns": 4, "think_s": 1},
    {"duration_s": 2},
    {"classes": {"a": {}, "b": {"prompt_tokens": 9}}},
    {"prefix_tokens": 8, "prefixes": 2},
)
WARM_UPS: tuple[dict[str, Any], ...] = (
    {"requests": 1},
    {"requests": 50},
    {"prompt_tokens": 7},
    {"output_tokens": 3},
    {"dataset": "d.jsonl"},
    {"requests": 2, "prompt_tokens": 4},
)


@pytest.mark.parametrize("source", SOURCES, ids=str)
@pytest.mark.parametrize("warm_up", WARM_UPS, ids=str)
def test_whatever_is_measured_can_have_any_warm_up(source: dict[str, Any], warm_up: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"prompt": "Why?", "completion": "So."}\n{"prompt": "And?", "completion": "So."}\n')
    rows = [{"timestamp": at, "input_length": 600, "output_length": 4, "hash_ids": [1, at + 2]} for at in range(6)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    workload = made(tmp_path, **source, warm_up=warm_up)
    drawn = draw(workload, WARM_UP)
    assert 1 <= len(drawn) <= 50
    assert not any(prompt.follows for prompt in drawn)
    if "prompt_tokens" in warm_up:
        assert {len(prompt.token_ids) - workload.prefix_tokens for prompt in drawn} == {warm_up["prompt_tokens"]}
