"""Datasets of what is asked: ShareGPT, messages, prompts and batch files of OpenAI's API.

The format of an entry is seen from its keys, not from the file's name. What would change the request and is not understood is
refused by name; what only describes an entry is in `_DESCRIBES`, and left out.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_llmperf.plan.checks import PlanError
from pytest_llmperf.plan.dialogue import Messages, answer_to, question, speeches, text_of
from pytest_llmperf.plan.files import csv_rows, json_rows, read_text, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_llmperf.plan.files import File, Row

BYTES_PER_TOKEN = 4
"""A token is taken for so many bytes of UTF-8 where no tokenizer counts: the same on every machine, and within a factor of two
for the languages and tokenizers that are common."""
TAKEN = frozenset({
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "stream", "stream_options", "n", "best_of",
    "return_token_ids",
})  # fmt: skip
"""Fields of a request's body that decide what is measured: the plugin sets them."""
_SET_ELSEWHERE = TAKEN - {"model", "prompt", "messages", "max_tokens", "max_completion_tokens"}
_SAMPLING = frozenset({
    "temperature", "top_p", "top_k", "min_p", "stop", "stop_token_ids", "seed", "user", "logit_bias", "logprobs", "top_logprobs",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "tools", "tool_choice", "parallel_tool_calls", "functions",
    "function_call", "response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
    "chat_template_kwargs", "reasoning_effort", "ignore_eos", "min_tokens", "add_generation_prompt", "skip_special_tokens",
    "echo", "suffix", "service_tier", "store", "verbosity", "priority",
})  # fmt: skip
"""Fields of a request's body that an entry may have beside its messages or prompt."""
_DESCRIBES = frozenset({
    "id", "uuid", "custom_id", "prompt_id", "conversation_id", "question_id", "model", "source", "metadata", "meta", "dataset",
    "category", "categories", "task", "task_id", "type", "tag", "tags", "topic", "domain", "lang", "language", "split", "score",
    "difficulty", "index", "idx", "name", "title", "timestamp", "created", "created_at", "date", "license", "url", "origin",
    "turn", "turns", "num_turns", "num_tokens", "prompt_len", "input_length", "prompt_tokens", "reference", "references", "usage",
    "hash",
})  # fmt: skip
"""Keys of an entry that describe it, and are not sent."""
_ANSWERS = ("completion", "response", "answer", "output")
_LENGTHS = ("max_tokens", "max_completion_tokens", "output_tokens", "output_len", "output_length", "expected_output_len")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_URLS = {"/v1/chat/completions": "chat", "/v1/completions": "completions"}
KNOWN = (
    "known are ShareGPT (conversations), OpenAI messages (messages), batch files (url and body), and prompts (prompt: a text or"
    " token ids), as a JSON list, JSON lines, or prompts as CSV"
)


@dataclass(frozen=True)
class Conversation:
    """One entry of a dataset: what is sent, up to the last message that somebody other than the assistant wrote."""

    messages: Messages = ()
    """(role, text), oldest first; a chat API gets them as they are, a completions API the last one's text."""
    output_tokens: int | None = None
    """The `max_tokens` that stand in the entry, None without."""
    answer_tokens: int | None = None
    """Estimated length of the entry's own answer, None without one."""
    prompt: str = ""
    """What a completions API gets, where there are no messages."""
    token_ids: tuple[int, ...] = ()
    body: str = "{}"
    """Sampling parameters, tools and the like of the entry, as JSON."""
    api: str | None = None
    """The API that it is for; None for either."""

    @property
    def prompt_tokens(self) -> int:
        """Return how many tokens are asked: estimated of texts, exact of token ids."""
        if self.token_ids:
            return len(self.token_ids)
        return estimated_tokens(self.prompt) or sum(estimated_tokens(text) for _, text in self.messages)


def estimated_tokens(text: str) -> int:
    """Return about how many tokens a text has: its bytes of UTF-8 / BYTES_PER_TOKEN, rounded up."""
    return -(-len(text.encode(errors="surrogatepass")) // BYTES_PER_TOKEN)


@functools.cache
def read_dataset(file: File) -> tuple[Conversation, ...]:
    """Return the entries of a dataset that ask for something; raises PlanError naming the line or the entry."""
    is_json = read_text(file).lstrip()[:1] in ("{", "[")
    conversations: list[Conversation] = []
    first: str | None = None
    for row in json_rows(file) if is_json else _table(file):
        form = next((name for name, keys, _ in _FORMS if all(key in row.values for key in keys)), None)
        if form is None:
            columns = ", ".join(map(str, row.values)) or "none"
            raise row.error(f"neither conversations, messages, prompt nor body among the keys {columns}; {KNOWN}")
        first = first or form
        if form != first:
            raise row.error(f"is of the form {form!r}, and those before it are of the form {first!r}; give one of them a file")
        conversations.append(next(parse for name, _, parse in _FORMS if name == form)(row))
    asked = tuple(each for each in conversations if each.messages or each.prompt or each.token_ids)
    if not asked:
        raise PlanError(f"{file.path}: no conversation with a user's message, and no prompt, in {len(conversations)} entries")
    if len(apis := {each.api for each in asked}) > 1:
        raise PlanError(
            f"{file.path}: asks {' and '.join(sorted(map(str, apis)))}; give requests of each API a file of their own"
        )
    return asked


def _table(file: File) -> Iterator[Row]:
    """Yield the rows of a CSV file of prompts; raises PlanError for any other that is no JSON."""
    columns, rows = csv_rows(file)
    if "prompt" not in columns:
        listing = ", ".join(map(shown, columns))
        raise PlanError(f"{file.path}: is neither JSON nor a table with a column prompt; the columns are {listing}; {KNOWN}")
    if fields := sorted(_SAMPLING & set(columns)):
        raise PlanError(
            f"{file.path}: the column {fields[0]!r} is a field of a request, which a table has no types for; write JSON"
        )
    for row in rows:
        yield row._replace(values={name: cell for name, cell in row.values.items() if cell or name == "prompt"})


def api_of(file: File) -> str | None:
    """Return the API that a dataset is for, None where either will do; raises PlanError."""
    return read_dataset(file)[0].api


@functools.cache
def fitting(file: File, most: int | None, *, answered: bool) -> tuple[Conversation, ...]:
    """Return the entries of at most so many prompt tokens, with `answered` only those that say how long their answer is.

    Raises PlanError where none is left.
    """
    asked = read_dataset(file)
    short = tuple(each for each in asked if most is None or each.prompt_tokens <= most)
    if not short:
        least = min(each.prompt_tokens for each in asked)
        raise PlanError(
            f"max_prompt_tokens={most}: leaves out all {len(asked)} entries of {file.path}, the shortest of which is about"
            f" {least} tokens long; give {least} or more"
        )
    kept = tuple(each for each in short if not answered or each.answer_tokens or each.output_tokens)
    if not kept:
        raise PlanError(
            f"output_tokens='dataset': none of the {len(short)} entries of {file.path} that are sent has an answer; give a number"
        )
    return kept


def _sharegpt(row: Row) -> Conversation:
    if media := [name for name in _MEDIA if row.values.get(name)]:
        raise row.error(f"has {media[0]!r}, which is not sent; leave such entries out")
    said = row.values["conversations"]
    front = row.values.get("system")
    spoken = speeches(row, said, "conversations")
    if front:
        spoken = [("system", text_of(row, front, "system")), *spoken]
    # What follows the first question is answered anew: a benchmark sends that question, as peers do.
    messages = question(row, spoken, last=False)
    body = {name: row.values[name] for name in ("tools", "functions") if row.values.get(name)}
    if any(not isinstance(value, list) for value in body.values()):
        raise row.error(f"{next(iter(body))!r} is no list, as a request has it; leave such entries out")
    return Conversation(messages, answer_tokens=_answer(answer_to(spoken, last=False)), body=_json(row, body))


def _messages(row: Row) -> Conversation:
    return _of_chat(row, row.values, _sampling(row, row.values, {"messages"}))


def _of_chat(row: Row, values: dict[str, Any], body: dict[str, Any]) -> Conversation:
    spoken = speeches(row, values["messages"], "messages")
    return Conversation(
        question(row, spoken, last=True),
        _length(row, values),
        _answer(answer_to(spoken, last=True)),
        body=_json(row, body),
        api="chat",
    )


def _prompt(row: Row) -> Conversation:
    answers = {name for name in _ANSWERS if isinstance(row.values.get(name), str)}
    body = _sampling(row, row.values, {"prompt", *answers})
    answer = next((row.values[name] for name in _ANSWERS if name in answers), "")
    return _of_prompt(row, row.values, body, answer)


def _of_prompt(row: Row, values: dict[str, Any], body: dict[str, Any], answer: str = "") -> Conversation:
    asked, length, answered = values["prompt"], _length(row, values), _answer(answer)
    if isinstance(asked, list) and len(asked) == 1 and isinstance(asked[0], (str, list)):
        asked = asked[0]  # a request may hold several prompts, of which this one has one
    rest: dict[str, Any] = {"body": _json(row, body), "api": "completions"}
    if isinstance(asked, str):
        return Conversation((), length, answered, asked if asked.strip() else "", **rest)
    if isinstance(asked, list) and all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in asked):
        return Conversation((), length, answered, token_ids=tuple(asked), **rest)
    several = isinstance(asked, list) and all(isinstance(item, (str, list)) for item in asked)
    what = "holds several prompts; write a line for each" if several else "must be a text or a list of token ids"
    raise row.error(f"prompt={shown(asked)}: {what}")


def _batch(row: Row) -> Conversation:
    url, body = row.values["url"], row.values["body"]
    api = next((api for end, api in _URLS.items() if isinstance(url, str) and url.endswith(end)), None)
    if api is None:
        raise row.error(f"url={shown(url)}: only {' and '.join(_URLS)} are measured")
    if str(row.values.get("method", "POST")).upper() != "POST":
        raise row.error(f"method={shown(row.values['method'])}: requests are sent by POST")
    if not isinstance(body, dict):
        raise row.error(f"body={shown(body)}: must be an object")
    asked = "messages" if api == "chat" else "prompt"
    if asked not in body:
        raise row.error(f"{asked} missing in the body, whose keys are {', '.join(map(str, body))}; {url} needs it")
    _refuse_set(row, body)
    sampling = {name: value for name, value in body.items() if name not in TAKEN and value is not None}
    return _of_chat(row, body, sampling) if api == "chat" else _of_prompt(row, body, sampling)


_FORMS: tuple[tuple[str, tuple[str, ...], Callable[[Row], Conversation]], ...] = (
    ("conversations", ("conversations",), _sharegpt),
    ("body", ("url", "body"), _batch),
    ("messages", ("messages",), _messages),
    ("prompt", ("prompt",), _prompt),
)
"""The forms of entries: name, the keys that tell them, the first that fits, and what reads them."""


def _sampling(row: Row, values: dict[str, Any], asked: set[str]) -> dict[str, Any]:
    """Return the fields of an entry that go into its request's body; raises PlanError for those that nobody knows."""
    _refuse_set(row, values)
    given = {name: value for name, value in values.items() if value is not None and name not in {*asked, *_LENGTHS}}
    if "messages" in asked:  # some corpora repeat the first question
        given = {name: value for name, value in given.items() if name != "prompt" or not isinstance(value, str)}
    if unknown := sorted(name for name in given if name not in _SAMPLING and name not in _DESCRIBES):
        raise row.error(
            f"{', '.join(map(repr, unknown))}: neither a field of a request that is known nor one that only describes an entry;"
            " rename it to metadata, or remove it"
        )
    return {name: value for name, value in given.items() if name in _SAMPLING}


def _refuse_set(row: Row, values: dict[str, Any]) -> None:
    for name in sorted(_SET_ELSEWHERE & set(values)):
        if values[name] is None or (name in ("n", "best_of") and values[name] == 1):
            continue
        raise row.error(f"{name!r} is set by the plugin; remove it, and use the arguments of llmperf(...) instead")


def _length(row: Row, values: dict[str, Any]) -> int | None:
    given = [name for name in _LENGTHS if values.get(name) is not None]
    lengths = {row._replace(values=values).tokens(name) for name in given}
    if len(lengths) > 1:
        raise row.error(f"{' and '.join(given)} contradict each other: {' and '.join(map(str, sorted(lengths)))}")
    return lengths.pop() if lengths else None


def _answer(text: str) -> int | None:
    return estimated_tokens(text) or None


def _json(row: Row, body: dict[str, Any]) -> str:
    if not body:
        return "{}"
    try:
        return json.dumps(body, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise row.error(f"cannot be written as JSON ({error})") from None
