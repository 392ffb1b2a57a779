"""Prompts from a seed: the same where launches are compared, and never the same where a prefix cache could help."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_llmperf.measure.workload import WARM_UP, Prompt, prompts
from pytest_llmperf.plan import Workload

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
        "from pytest_llmperf.measure.workload import prompts; from pytest_llmperf.plan import Workload\n"
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
def test_no_prompt_of_a_round_begins_like_one_of_another_round_or_of_the_warm_up(
    workload: Workload, vocabulary: int | None
) -> None:
    seen = [blocks(draw(workload, number, vocabulary)) for number in (WARM_UP, 0, 1, 2, 10, 11)]
    assert not any(one & other for one, other in combinations(seen, 2))


@settings(deadline=None, max_examples=20)
@given(workloads, st.text(max_size=10), st.text(max_size=10))
def test_different_cases_have_different_prompts(workload: Workload, one: str, other: str) -> None:
    if one != other:
        assert not blocks(draw(workload, nonce=one)) & blocks(draw(workload, nonce=other))


def test_a_different_seed_gives_different_prompts() -> None:
    assert not blocks(draw(Workload(seed=1))) & blocks(draw(Workload(seed=2)))


@settings(deadline=None, max_examples=30)
@given(workloads, st.integers(0, 20), vocabularies)
def test_every_request_has_the_lengths_of_the_workload(workload: Workload, number: int, vocabulary: int | None) -> None:
    drawn = draw(workload, number, vocabulary)
    assert len(drawn) == workload.requests
    assert {(len(one.token_ids), one.output_tokens) for one in drawn} == {(workload.prompt_tokens, workload.output_tokens)}


def test_the_warm_up_is_one_wave_of_the_real_lengths() -> None:
    drawn = draw(Workload(prompt_tokens=7, output_tokens=3, requests=32, concurrency=5), WARM_UP)
    assert [(len(one.token_ids), one.output_tokens) for one in drawn] == [(7, 3)] * 5


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 200_000), numbers)
def test_ids_are_within_the_vocabulary_whatever_its_size(vocabulary: int, number: int) -> None:
    ids = {token for one in draw(Workload(prompt_tokens=50), number, vocabulary) for token in one.token_ids}
    assert min(ids) >= 0
    assert max(ids) < vocabulary


@pytest.mark.parametrize("vocabulary", [1024, 32_000, None])
def test_the_first_ids_are_left_out_because_they_are_special_tokens(vocabulary: int | None) -> None:
    ids = {token for one in draw(Workload(prompt_tokens=500), vocabulary=vocabulary) for token in one.token_ids}
    assert min(ids) >= 256


def test_an_unknown_vocabulary_uses_ids_that_common_models_have() -> None:
    ids = {token for one in draw(Workload(prompt_tokens=500), vocabulary=None) for token in one.token_ids}
    assert max(ids) < 32_000
