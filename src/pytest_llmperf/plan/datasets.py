"""Files that users have of what is sent: traces of arrivals, datasets of conversations, lists of lengths.

Read once and checked line by line, so that a bad line is named before an engine is started. What counts is a file's digest,
never its path.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_llmperf.plan.checks import PlanError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MOONCAKE_BLOCK = 512
"""Tokens that one hash id of a Mooncake trace stands for."""
_ROLES = {"gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant", "system": "system"}
"""ShareGPT's names of those who speak; all others are users."""


@dataclass(frozen=True)
class File:
    """A file that a workload is read from."""

    path: str
    sha256: str

    def __str__(self) -> str:
        """Return the file's name with the beginning of its digest."""
        return f"{Path(self.path).name} ({self.sha256[:12]})"


@dataclass(frozen=True)
class Arrival:
    """One line of a trace."""

    at_s: float
    """Seconds since the trace's first arrival."""
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    """Ids of the prompt's blocks of MOONCAKE_BLOCK tokens; prompts with the same ids in front share that text. Empty: none."""


@dataclass(frozen=True)
class Conversation:
    """One entry of a dataset: what is sent, up to the last message that somebody other than the assistant wrote."""

    messages: tuple[tuple[str, str], ...]
    """(role, text), oldest first; a chat API gets them as they are, a completions API the last one's text."""
    output_tokens: int | None = None
    """The `max_tokens` that stand in the entry, None without."""


def parse_file(name: str, value: object, folder: Path) -> File:
    """Return a file that exists, a relative path being relative to `folder`; raises PlanError naming `name`."""
    path = folder / Path(str(value)).expanduser()
    try:
        return File(str(path), hashlib.sha256(path.read_bytes()).hexdigest())
    except OSError as error:
        raise PlanError(f"{name}={str(value)!r}: cannot be read ({error}); give a path relative to the test file") from None


@functools.cache
def read_lengths(file: File) -> tuple[int, ...]:
    """Return the lengths in a file, one per line; raises PlanError."""
    words = _text(file).split()
    if not words or not all(re.fullmatch(r"[1-9]\d*", word) for word in words):
        raise PlanError(f"{file.path}: must hold whole numbers of tokens, 1 or more, one per line")
    return tuple(map(int, words))


@functools.cache
def read_trace(file: File) -> tuple[Arrival, ...]:
    """Return the arrivals of a trace in order of time; raises PlanError naming the line.

    Mooncake's JSONL has `timestamp` (ms), `input_length`, `output_length` and `hash_ids`; BurstGPT's CSV `Timestamp` (s),
    `Request tokens` and `Response tokens`, whose failed requests (no response tokens) are left out.
    """
    read = _burstgpt if Path(file.path).suffix.lower() == ".csv" else _mooncake
    arrivals = sorted(read(file), key=lambda arrival: arrival.at_s)
    if not arrivals:
        raise PlanError(f"{file.path}: no arrivals; a trace is Mooncake's JSONL or BurstGPT's CSV")
    first_s = arrivals[0].at_s
    return tuple(
        Arrival(arrival.at_s - first_s, arrival.prompt_tokens, arrival.output_tokens, arrival.blocks) for arrival in arrivals
    )


@functools.cache
def read_dataset(file: File) -> tuple[Conversation, ...]:
    """Return the conversations of a dataset that ask for something; raises PlanError naming the entry.

    ShareGPT's JSON is a list of `{"conversations": [{"from": "human", "value": ...}, ...]}`, JSONL has OpenAI's
    `{"messages": [{"role": ..., "content": ...}], "max_tokens": ...}` in each line.
    """
    read = _messages if Path(file.path).suffix.lower() == ".jsonl" else _sharegpt
    conversations = tuple(conversation for conversation in read(file) if conversation.messages)
    if not conversations:
        raise PlanError(f"{file.path}: no conversation with a user's message; a dataset is ShareGPT's JSON or JSONL of messages")
    return conversations


def _text(file: File) -> str:
    try:
        return Path(file.path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{file.path}: cannot be read as text ({error})") from None


def _lines(file: File, parse: Callable[[Any], Any]) -> Iterator[Any]:
    for number, line in enumerate(_text(file).split("\n"), 1):  # JSON strings may hold what else splits lines
        if line.strip():
            try:
                yield parse(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise PlanError(f"{file.path}, line {number}: {type(error).__name__}: {error}") from None


def _mooncake(file: File) -> Iterator[Arrival]:
    def parse(row: dict[str, Any]) -> Arrival:
        blocks = tuple(int(block) for block in row.get("hash_ids") or ())
        return Arrival(_finite(row["timestamp"]) / 1000, _count(row["input_length"]), _count(row["output_length"]), blocks)

    return _lines(file, parse)


def _burstgpt(file: File) -> Iterator[Arrival]:
    for number, row in enumerate(csv.DictReader(_text(file).splitlines()), 2):
        try:
            if float(row["Response tokens"]) > 0:
                yield Arrival(_finite(row["Timestamp"]), _count(row["Request tokens"]), _count(row["Response tokens"]))
        except (ValueError, KeyError, TypeError) as error:
            raise PlanError(f"{file.path}, line {number}: {type(error).__name__}: {error}") from None


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is no instant")
    return number


def _count(value: Any) -> int:
    number = int(float(value))
    if number < 1:
        raise ValueError(f"{value!r} is no number of tokens")
    return number


def _messages(file: File) -> Iterator[Conversation]:
    def parse(row: dict[str, Any]) -> Conversation:
        tokens = row.get("max_completion_tokens") or row.get("max_tokens")
        said = tuple((str(message["role"]), message["content"]) for message in row["messages"])
        if not all(isinstance(text, str) for _, text in said):
            raise TypeError("only messages of text are sent")
        return Conversation(_up_to_question(said), None if tokens is None else _count(tokens))

    return _lines(file, parse)


def _sharegpt(file: File) -> Iterator[Conversation]:
    number = 0
    try:
        for number, row in enumerate(json.loads(_text(file)), 1):  # noqa: B007  the error below names it
            said = tuple((_ROLES.get(message["from"], "user"), str(message["value"])) for message in row.get("conversations", ()))
            # What follows the first question is answered anew: a benchmark sends that question, as peers do.
            first = next((index for index, (role, _) in enumerate(said) if role == "user"), None)
            yield Conversation(said[: first + 1] if first is not None else ())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        where = f"{file.path}, entry {number}: {type(error).__name__}: {error}"
        raise PlanError(f"{where}; ShareGPT's JSON is a list of conversations") from None


def _up_to_question(said: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    asked = [index for index, (role, _) in enumerate(said) if role != "assistant"]
    return said[: asked[-1] + 1] if asked else ()
