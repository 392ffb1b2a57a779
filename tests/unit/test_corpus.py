"""Datasets in the forms that people have: what is sent of an entry, what goes into its request, and what is refused by name."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_llmperf.measure.client.prompts import Prompt, prompts
from pytest_llmperf.plan.arguments import workload_from
from pytest_llmperf.plan.axes import Axes
from pytest_llmperf.plan.checks import PlanError
from pytest_llmperf.plan.datasets import Conversation, estimated_tokens, read_dataset
from pytest_llmperf.plan.files import parse_file
from pytest_llmperf.plan.lengths import read_lengths, read_pairs

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_llmperf.plan.workload import Workload

USER = {"role": "user", "content": "Hi"}


def read(folder: Path, *entries: Any, text: str | None = None) -> tuple[Conversation, ...]:
    """Return the conversations of these entries, written as lines, or of a text."""
    (folder / "d").write_text("\n".join(map(json.dumps, entries)) if text is None else text)
    return read_dataset(parse_file("dataset", "d", folder))


def refusal(folder: Path, *entries: Any, text: str | None = None) -> str:
    with pytest.raises(PlanError) as caught:
        read(folder, *entries, text=text)
    assert "Error:" not in str(caught.value), "a Python exception is no message"
    return str(caught.value)


def sharegpt(*said: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"id": "x", "conversations": [{"from": role, "value": text} for role, text in said], **more}


def workload(folder: Path, *entries: Any, **arguments: Any) -> Workload:
    (folder / "d").write_text("\n".join(map(json.dumps, entries)))
    return workload_from(Axes(), {"dataset": "d", **arguments}, folder=folder)


def sent(folder: Path, *entries: Any, **arguments: Any) -> list[Prompt]:
    return prompts(workload(folder, *entries, **arguments), 0, vocabulary=None, nonce="case")


# ------------------------------------------------------------------------------------------------ what was said


@pytest.mark.parametrize(
    ("said", "messages"),
    [
        ([("gpt", "... the rest."), ("human", "Why?"), ("gpt", "So.")], [("user", "Why?")]),
        ([("system", "Be brief."), ("gpt", "Hello"), ("human", "Why?")], [("system", "Be brief."), ("user", "Why?")]),
        ([("human", "Look:"), ("user", "why?"), ("gpt", "So.")], [("user", "Look:\nwhy?")]),
        ([("human", " "), ("gpt", "What?"), ("human", "Why?")], [("user", "Why?")]),
        ([("human", None), ("human", "Why?")], [("user", "Why?")]),
        ([("Human", "Why?"), ("function_call", "f()"), ("observation", "3")], [("user", "Why?")]),
        ([("human", "First"), ("bing", "So."), ("human", "Second")], [("user", "First")]),
        ([("human", "Why?"), ("system", "late"), ("gpt", "So.")], [("user", "Why?")]),
    ],
)
def test_of_sharegpt_the_first_question_is_sent(said: list[Any], messages: list[tuple[str, str]], tmp_path: Path) -> None:
    [conversation] = read(tmp_path, sharegpt(*said))
    assert conversation.messages == tuple(messages)


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        ("uau", "uau"),
        ("suau", "suau"),
        ("auau", "uau"),
        ("uuau", "uau"),
        ("uaaua", "uau"),
        ("ususa", "su"),
        ("uasu", "suau"),
        ("ua", "u"),
    ],
)
def test_messages_alternate_from_the_first_question_to_the_last(roles: str, expected: str, tmp_path: Path) -> None:
    names = {"u": "user", "a": "assistant", "s": "system"}
    [conversation] = read(tmp_path, {"messages": [{"role": names[role], "content": f"{role}!"} for role in roles]})
    assert "".join(role[0] for role, _ in conversation.messages) == expected


def test_sharegpt_is_a_list_or_lines_and_may_have_openais_keys(tmp_path: Path) -> None:
    entry = sharegpt(("human", "Why?"), ("gpt", "So."))
    other = {"conversations": [USER]}
    listed = read(tmp_path, text=json.dumps([entry, other]))
    assert listed == read(tmp_path, entry, other)
    assert listed[:1] == read(tmp_path, text=json.dumps(entry, indent=1))
    assert [each.messages[0][1] for each in listed] == ["Why?", "Hi"]


def test_a_system_text_beside_the_conversation_stands_in_front(tmp_path: Path) -> None:
    [conversation] = read(tmp_path, sharegpt(("human", "Why?"), system="Be brief."))
    assert conversation.messages == (("system", "Be brief."), ("user", "Why?"))


def test_entries_that_ask_nothing_are_left_out(tmp_path: Path) -> None:
    assert len(read(tmp_path, sharegpt(), sharegpt(("gpt", "Hello")), sharegpt(("human", "Why?")))) == 1
    assert "no conversation with a user's message, and no prompt, in 2 entries" in refusal(tmp_path, sharegpt(), sharegpt())


def test_parts_of_text_are_one_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Look:"}, {"type": "text", "text": "why?"}]
    [conversation] = read(tmp_path, {"messages": [{"role": "user", "content": parts}]})
    assert conversation.messages == (("user", "Look:\nwhy?"),)


def test_a_text_may_hold_what_else_ends_a_line(tmp_path: Path) -> None:
    odd = "a\u2028b\u0085c"
    line = json.dumps({"messages": [{"role": "user", "content": odd}]}, ensure_ascii=False)
    [conversation] = read(tmp_path, text=f"{line}\n\n")
    assert conversation.messages == (("user", odd),)


# ------------------------------------------------------------------------------------------------ lengths of answers


def test_a_dataset_can_say_how_long_its_answers_are(tmp_path: Path) -> None:
    entries = [
        sharegpt(("human", "Why?"), ("gpt", "x" * 41)),
        sharegpt(("human", "And?")),
        sharegpt(("human", "So?"), ("gpt", "")),
    ]
    asked = workload(tmp_path, *entries, output_tokens="dataset")
    drawn = prompts(asked, 0, vocabulary=None, nonce="case")
    assert {(prompt.text.partition(": ")[2], prompt.output_tokens) for prompt in drawn} == {("Why?", 11)}
    assert asked.left_out == ("dataset: 2 of 3 entries are too long or unanswered: not sent",)
    assert asked.mean_output_tokens == 11
    assert asked.description["output_tokens"] == "dataset"


def test_an_answer_is_that_to_the_question_that_is_sent(tmp_path: Path) -> None:
    said = [USER, {"role": "assistant", "content": "x" * 8}, USER, {"role": "assistant", "content": "x" * 80}]
    [conversation] = read(tmp_path, {"messages": said})
    assert conversation.answer_tokens == 20
    [first] = read(tmp_path, sharegpt(("gpt", "x"), ("human", "Why?"), ("gpt", "x" * 8), ("human", "And?"), ("gpt", "x" * 80)))
    assert first.answer_tokens == 2


@pytest.mark.parametrize(
    ("text", "tokens"), [("", 0), ("a", 1), ("abcd", 1), ("abcde", 2), ("語", 1), ("語語", 2), ("\ud800", 1)]
)
def test_tokens_are_estimated_from_bytes(text: str, tokens: int) -> None:
    assert estimated_tokens(text) == tokens


def test_where_no_entry_has_an_answer_it_is_said(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"none of the 1 entries of .* that are sent has an answer; give a number"):
        workload(tmp_path, sharegpt(("human", "Why?")), output_tokens="dataset")


def test_long_prompts_are_left_out(tmp_path: Path) -> None:
    entries = [{"prompt": "x" * 40}, {"prompt": "x" * 44}, {"prompt": list(range(30))}]
    drawn = sent(tmp_path, *entries, max_prompt_tokens=10)
    assert {prompt.text.partition(": ")[2] for prompt in drawn} == {"x" * 40}
    with pytest.raises(
        PlanError, match=r"max_prompt_tokens=9: leaves out all 3 entries of .* about 10 tokens long; give 10 or more"
    ):
        workload(tmp_path, *entries, max_prompt_tokens=9)


# ------------------------------------------------------------------------------------------------ the request


def test_fields_of_a_request_go_into_its_body(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "w", "parameters": {}}}]
    entry = {
        "messages": [USER],
        "tools": tools,
        "response_format": {"type": "json_object"},
        "max_tokens": 9,
        "id": 3,
        "source": "x",
    }
    [prompt, *_] = sent(tmp_path, entry, extra_body={"temperature": 0.5})
    assert json.loads(prompt.body) == {"tools": tools, "response_format": {"type": "json_object"}, "temperature": 0.5}
    assert prompt.output_tokens == 9


def test_tools_are_a_prefix_that_a_cache_may_find(tmp_path: Path) -> None:
    assert workload(tmp_path, {"messages": [USER], "tools": [{"type": "function"}]}).shares_prompts
    assert not workload(tmp_path, {"messages": [USER], "top_p": 0.5}).shares_prompts


def batch(url: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": "r", "method": "POST", "url": url, "body": {"model": "m", **body}}


def test_a_batch_file_says_itself_which_api_it_asks(tmp_path: Path) -> None:
    chat = workload(tmp_path, batch("/v1/chat/completions", messages=[USER], max_completion_tokens=9, top_p=0.5, odd_field=1))
    assert chat.api == "chat"
    [prompt, *_] = prompts(chat, 0, vocabulary=None, nonce="case")
    assert (prompt.output_tokens, json.loads(prompt.body)) == (9, {"top_p": 0.5, "odd_field": 1})
    [plain, *_] = sent(tmp_path, batch("/v1/completions", prompt="Why", max_tokens=4))
    assert (plain.text.partition(": ")[2], plain.output_tokens, plain.messages) == ("Why", 4, ())


def test_prompts_may_be_texts_or_token_ids(tmp_path: Path) -> None:
    drawn = sent(tmp_path, {"prompt": "Why", "output_tokens": 3}, {"prompt": [7, 8, 9], "max_tokens": 4}, {"prompt": ["And"]})
    assert {(prompt.text.partition(": ")[2], prompt.token_ids[4:], prompt.output_tokens) for prompt in drawn} == {
        ("Why", (), 3),
        ("", (7, 8, 9), 4),
        ("And", (), 50),
    }
    ids = [prompt.token_ids for prompt in drawn if prompt.token_ids]
    assert len({each[:4] for each in ids}) == len(ids), "no round finds another one's prompts in a prefix cache"


def test_prompts_may_be_a_table(tmp_path: Path) -> None:
    first, second = read(tmp_path, text='prompt,id,max_tokens,completion\n"Why, then?",a,9,\nAnd?,b,,So\n')
    assert (first.prompt, first.output_tokens, first.answer_tokens) == ("Why, then?", 9, None)
    assert (second.prompt, second.output_tokens, second.answer_tokens) == ("And?", None, 1)


def test_a_completion_beside_a_prompt_is_its_answer(tmp_path: Path) -> None:
    [prompt, *_] = sent(tmp_path, {"prompt": "Why", "completion": "x" * 40}, output_tokens="dataset")
    assert (prompt.output_tokens, prompt.body) == (10, "{}")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"question": "Why?"}, "neither conversations, messages, prompt nor body among the keys question; known are ShareGPT"),
        ({"messages": [USER], "tolls": []}, "'tolls': neither a field of a request that is known"),
        ({"messages": [USER], "n": 2}, "'n' is set by the plugin"),
        ({"messages": [USER], "stream": True}, "'stream' is set by the plugin"),
        ({"messages": {"role": "user"}}, "must be a list of messages"),
        ({"messages": ["Why?"]}, "message 1 of messages: 'Why?' is no object"),
        ({"messages": [{"content": "Why?"}]}, "message 1 of messages: role or from missing, found are content"),
        ({"messages": [{"role": "user"}]}, "content or value missing"),
        ({"messages": [{"role": 1, "content": "x"}]}, "the role 1 is no text"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "the role 'narrator' is not sent; known are assistant"),
        ({"messages": [USER, {"role": "tool", "content": "3"}]}, "the role 'tool' is not sent"),
        (
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{}]}, USER]},
            "the role 'assistant with tool_calls' is not sent",
        ),
        ({"messages": [{"role": "user", "content": 5}]}, "5 is no text; only messages of text are sent"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "a part of type 'image_url'; only messages of text are sent, no images and no audio",
        ),
        ({"messages": [USER], "max_tokens": 0}, "max_tokens is 0; it must be a whole number of tokens, 1 or more"),
        ({"messages": [USER], "max_tokens": 3, "max_completion_tokens": 4}, "contradict each other: 3 and 4"),
        ({"prompt": 5}, "prompt=5: must be a text or a list of token ids"),
        ({"prompt": ["a", "b"]}, "holds several prompts; write a line for each"),
        ({"prompt": [1, -2]}, "must be a text or a list of token ids"),
        (sharegpt(("human", "Why?"), images=["a.png"]), "has 'images', which is not sent"),
        (sharegpt(("human", 5)), "5 is no text"),
        (batch("/v1/embeddings", input="x"), "url='/v1/embeddings': only /v1/chat/completions and /v1/completions are measured"),
        (batch("/v1/responses", input="x"), "url='/v1/responses'"),
        (batch("/v1/chat/completions", prompt="x"), "messages missing in the body, whose keys are model, prompt"),
        (batch("/v1/completions", prompt="x", best_of=3), "'best_of' is set by the plugin"),
        (batch("/v1/completions", prompt="x") | {"method": "GET"}, "method='GET': requests are sent by POST"),
        ({"url": "/v1/completions", "body": []}, "body=[]: must be an object"),
        ([1], "entry 1: 1 is no JSON object"),
        (5, "is neither JSON nor a table with a column prompt; the columns are '5'"),
    ],
)
def test_what_cannot_be_sent_is_named_with_its_line(entry: Any, message: str, tmp_path: Path) -> None:
    text = refusal(tmp_path, entry)
    assert message in text
    assert "line 1" in text or "entry 1" in text or entry == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("{", "is no JSON"),
        ('{"prompt": "x"}\n{', "line 2: is no JSON"),
        ('{"messages": []}\n{"prompt": "x"}', "line 2: is of the form 'prompt', and those before it are of the form 'messages'"),
        ("[", "is no JSON"),
        ("[]", "is an empty list"),
        ('{\n "data": []\n}', "entry 1: neither conversations, messages, prompt nor body among the keys data"),
        ("a,b\n1,2", "is neither JSON nor a table with a column prompt; the columns are 'a', 'b'; known are ShareGPT"),
        ("prompt;id\nx;1", "its columns are divided by ';'"),
        ("prompt,temperature\nx,1", "the column 'temperature' is a field of a request"),
        ("prompt,max_tokens\nx,many", "line 2: max_tokens is 'many'; it must be a whole number of tokens"),
        ("prompt,z\nx,1", "line 2: 'z': neither a field of a request"),
    ],
)
def test_a_file_that_is_no_dataset_is_refused(text: str, message: str, tmp_path: Path) -> None:
    assert message in refusal(tmp_path, text=text)


def test_requests_of_two_apis_are_no_dataset(tmp_path: Path) -> None:
    both = batch("/v1/chat/completions", messages=[USER]), batch("/v1/completions", prompt="x")
    assert "asks chat and completions; give requests of each API a file" in refusal(tmp_path, *both)
    with pytest.raises(PlanError, match=r"api='completions': the entries of the dataset are for the API 'chat'; leave api out"):
        workload(tmp_path, {"messages": [USER]}, api="completions")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_prompt_tokens": 5}, "max_prompt_tokens=5: only entries of a dataset are left out; add dataset"),
        ({"output_tokens": "dataset"}, "output_tokens='dataset': these are the lengths of a dataset's answers; add dataset"),
        ({"prompt_tokens": "dataset"}, "prompt_tokens='dataset': must be a number of tokens"),
        ({"classes": {"a": {"output_tokens": "dataset"}}}, "must be a number of tokens"),
        ({"dataset": 5}, "dataset=5: must be the path of a file"),
        ({"dataset": ""}, "dataset='': must be the path of a file"),
        ({"dataset": "a\0b"}, "cannot be read"),
    ],
)
def test_arguments_of_a_dataset_want_one(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        workload_from(Axes(), arguments, folder=tmp_path)
    assert message in str(caught.value)


# ------------------------------------------------------------------------------------------------ lists of lengths


@pytest.mark.parametrize("text", ["", "1\n0", "1.5", "a", "-3", "1,2", "9" * 30])
def test_lengths_are_whole_numbers(text: str, tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text(text)
    with pytest.raises(PlanError, match=r"must hold whole numbers|is empty"):
        read_lengths(parse_file("prompt_tokens", "l.txt", tmp_path))


@pytest.mark.parametrize("text", ["5 6\n7 8\n", "input,output\n5,6\n7,8", "5;6\n\n7;8", "\ufeff5\t6\r\n7\t8\r\n"])
def test_pairs_are_two_columns(text: str, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(text.encode())
    assert read_pairs(parse_file("pairs", "p.txt", tmp_path)) == ((5, 6), (7, 8))


@pytest.mark.parametrize("text", ["5", "5 6 7", "5 0", "in out", "5 6\nin out"])
def test_what_is_no_pair_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text(text)
    with pytest.raises(PlanError, match="must hold whole numbers of tokens, 1 or more"):
        read_pairs(parse_file("pairs", "p.txt", tmp_path))


# ------------------------------------------------------------------------------------------------ whatever stands in it

json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 9), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["role", "from", "content", "value", "type", "text", "prompt", "messages", "tool_calls", "z"]),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=8,
)
keys = st.sampled_from(
    [
        "conversations",
        "messages",
        "prompt",
        "url",
        "body",
        "method",
        "max_tokens",
        "n",
        "tools",
        "system",
        "output",
        "id",
        "stream",
    ]
)
roles = st.sampled_from(["user", "human", "assistant", "gpt", "system", "developer"])
ANYTHING = settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])


@ANYTHING
@given(st.lists(st.dictionaries(keys, json_values, max_size=5), max_size=3))
def test_any_entries_are_read_or_refused(tmp_path: Path, entries: list[dict[str, Any]]) -> None:
    try:
        conversations = read(tmp_path, *entries)
    except PlanError:
        return
    for each in conversations:
        assert each.messages or each.prompt or each.token_ids
        assert isinstance(json.loads(each.body), dict)


@ANYTHING
@given(st.lists(st.tuples(roles, st.text(max_size=4)), max_size=7), st.sampled_from(["messages", "conversations"]))
def test_whatever_was_said_a_strict_template_takes_it(tmp_path: Path, said: list[tuple[str, str]], form: str) -> None:
    try:
        [conversation] = read(tmp_path, {form: [{"role": role, "content": text} for role, text in said]})
    except PlanError:
        assert not any(role in ("user", "human") and text.strip() for role, text in said)
        return
    spoken = [role for role, _ in conversation.messages if role != "system"]
    assert spoken[::2] == ["user"] * len(spoken[::2])
    assert spoken[1::2] == ["assistant"] * len(spoken[1::2])
    assert spoken[-1] == "user"
    assert "system" not in [role for role, _ in conversation.messages[1:]]
    assert all(text.strip() for _, text in conversation.messages)
    asked = [text for role, text in said if role in ("user", "human") and text.strip()]
    assert any(asked[0] in text for role, text in conversation.messages if role == "user")
