"""Headers as users write them: their values come from the environment, and no message shows one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.plan.checks import PlanError
from pytest_llmperf.plan.headers import parse_headers

ENVIRONMENT = {"TOKEN": "s3cr3t", "PAIR": "eDp5", "BROKEN": "a\r\nHost: b", "EMPTY": ""}


def parse(*words: str) -> tuple[tuple[str, str], ...]:
    return parse_headers(words, ENVIRONMENT, origin="--llmperf-header")


@pytest.mark.parametrize(
    ("word", "header"),
    [
        ("X-Token=TOKEN", ("X-Token", "s3cr3t")),
        ("X-Token = TOKEN", ("X-Token", "s3cr3t")),
        ("Authorization: Basic $PAIR", ("Authorization", "Basic eDp5")),
        ("Authorization: Basic ${PAIR}==", ("Authorization", "Basic eDp5==")),
        ("X-Team: blue, green", ("X-Team", "blue, green")),
        ("X-Ratio: a=b", ("X-Ratio", "a=b")),
    ],
)
def test_a_header_has_its_value_from_the_environment(word: str, header: tuple[str, str]) -> None:
    assert parse(word) == (header,)


def test_a_later_header_of_the_same_name_wins() -> None:
    assert parse("X-A: 1", "x-a: 2", "") == (("x-a", "2"),)


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("X-Token=MISSING", "X-Token=MISSING: the environment has no variable MISSING"),
        ("X-Token: $MISSING", "the environment has no variable MISSING"),
        ("X-Token=s3cr3t value", "must be the name of an environment variable"),
        ("no header", "not a header"),
        (": x", "not a header"),
        ("X Y: z", "not a header"),
        ("Content-Length: 5", "is set by the plugin"),
        ("X-B=BROKEN", "characters that no header may have"),
        ("X-E=EMPTY", "its value is empty"),
    ],
)
def test_a_header_that_cannot_be_sent_is_refused_in_words(word: str, words: str) -> None:
    with pytest.raises(PlanError) as refused:
        parse(word)
    assert str(refused.value).startswith("--llmperf-header")
    assert words in str(refused.value)
    assert "s3cr3t" not in str(refused.value)


@given(st.text())
def test_any_text_is_a_header_or_refused(text: str) -> None:
    try:
        headers = parse(text)
    except PlanError:
        return
    assert all(name and value and "\n" not in value for name, value in headers)
