"""`doubt_of`: which numbers of tokens an answer without token ids can have had."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.measure.client.events import Seen, doubt_of

sizes = st.lists(st.integers(0, 12), max_size=200)


@given(sizes, st.integers(1, 20))
def test_tokens_with_text_are_never_doubted_whatever_is_joined(token_bytes: list[int], step: int) -> None:
    """Each token has text, or an event of its own without; `step` of them share an event, as an interval has it."""
    seen = Seen()
    for start in range(0, len(token_bytes), step):
        group = token_bytes[start : start + step]
        seen.text_bytes += sum(group)
        seen.pieces += any(group)
        seen.silent += 0 if any(group) else len(group)
    hidden = sum(not size for size in token_bytes)
    if hidden <= 2 or step == 1:
        assert doubt_of(len(token_bytes), seen) is None


@given(st.integers(4, 5000))
def test_twice_as_many_pieces_as_tokens_are_doubted(tokens: int) -> None:
    assert doubt_of(tokens, Seen(pieces=2 * tokens, text_bytes=9 * tokens)) == (
        f"usage says {tokens:,} tokens, the stream held {2 * tokens:,} pieces of text"
    )


@given(st.integers(4, 5000))
def test_tokens_without_any_text_are_doubted(tokens: int) -> None:
    assert doubt_of(tokens, Seen(silent=1)) is not None


@given(st.integers(32, 5000))
def test_ten_times_the_tokens_of_english_are_doubted(tokens: int) -> None:
    assert doubt_of(tokens, Seen(pieces=tokens // 10, text_bytes=tokens // 10 * 5)) is not None


def test_an_answer_that_may_not_end_has_many_marks_of_its_end() -> None:
    seen = Seen(pieces=12, text_bytes=60)
    assert doubt_of(128, seen, exact=True) is None
    assert doubt_of(128, seen) is not None
    assert doubt_of(1_000, seen, exact=True) is not None


def test_a_document_without_any_text_is_doubted_and_no_other() -> None:
    assert doubt_of(128, Seen(), stream=False, exact=True) is not None
    assert doubt_of(128, Seen(pieces=1, text_bytes=1), stream=False) is None


def test_what_is_hidden_by_its_own_count_is_believed() -> None:
    seen = Seen(pieces=3, text_bytes=12, reasoning=500)
    assert doubt_of(500, seen) is None
    assert doubt_of(600, seen) is not None
