"""What was said in an entry of a dataset: who spoke, which text, and what of it is sent.

A template of a chat may demand that system stands first, and that user and assistant alternate and begin with the user.
Corpora keep none of it: fragments begin with an answer, texts are empty, a speaker has two messages. What is sent keeps it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_llmperf.plan.files import shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_llmperf.plan.files import Row

Messages = tuple[tuple[str, str], ...]
_ROLES = {
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "developer": "system",
}
"""The names that corpora have for those who speak."""
_UNSENT = frozenset({"tool_calls", "function_call", "audio", "refusal", "tool_call_id"})
"""Fields of a message that change what an engine does, and that are not sent."""
_PARTS = ("text", "input_text", "output_text")


def speeches(row: Row, said: object, name: str) -> list[tuple[str, str]]:
    """Return (role, text) of every message that has a text, a role that is not known as it is written; raises PlanError."""
    if not isinstance(said, list):
        raise row.error(f"{name}={shown(said)}: must be a list of messages")
    spoken = []
    for number, message in enumerate(said, 1):
        if not isinstance(message, dict):
            raise row.error(f"message {number} of {name}: {shown(message)} is no object")
        role, text = (_field(row, message, names, number, name) for names in (("role", "from"), ("content", "value")))
        if not isinstance(role, str):
            raise row.error(f"message {number} of {name}: the role {shown(role)} is no text")
        role = _ROLES.get(role) or _ROLES.get(role.strip().lower(), role)
        if not _UNSENT.isdisjoint(message) and (unsent := sorted(key for key in _UNSENT if message.get(key))):
            role = f"{role} with {unsent[0]}"
        spoken.append((role, text if isinstance(text, str) else text_of(row, text, f"message {number} of {name}")))
    return spoken


def _field(row: Row, message: dict[str, Any], names: Sequence[str], number: int, name: str) -> Any:
    for key in names:
        if key in message:
            return message[key]
    columns = ", ".join(map(str, message)) or "none"
    raise row.error(f"message {number} of {name}: {' or '.join(names)} missing, found are {columns}")


def text_of(row: Row, content: object, place: str) -> str:
    """Return a content as one text: the texts of its parts, an empty one where there is none; raises PlanError."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise row.error(f"{place}: {shown(content)} is no text; only messages of text are sent")
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else part
        if (kind is not None and kind not in _PARTS) or not isinstance(text, str):
            raise row.error(f"{place}: a part of type {shown(kind)}; only messages of text are sent, no images and no audio")
        texts.append(text)
    return "\n".join(texts)


def question(row: Row, dialogue: Sequence[tuple[str, str]], *, last: bool) -> Messages:
    """Return what is sent: up to the first question, or the last; empty where nobody asks. Raises PlanError.

    What the assistant said before the first question is left out, as are messages without text; system stands first, and what
    one speaker said in a row is one message.
    """
    spoken = [(role, text) for role, text in dialogue if text.strip() or role not in _KNOWN]
    end = _end(spoken, last=last)
    system: list[str] = []
    sent: list[tuple[str, str]] = []
    for role, text in spoken[:end]:
        if role not in _KNOWN:
            raise row.error(f"the role {role!r} is not sent; known are {', '.join(sorted(_ROLES))}")
        if role == "system":
            system.append(text)
        elif sent and sent[-1][0] == role:
            sent[-1] = role, f"{sent[-1][1]}\n{text}"
        elif sent or role == "user":
            sent.append((role, text))
    return (*((("system", "\n".join(system)),) if system and sent else ()), *sent)


def answer_to(dialogue: Sequence[tuple[str, str]], *, last: bool) -> str:
    """Return what the assistant said to the question that is sent, empty where it said nothing."""
    spoken = [(role, text) for role, text in dialogue if text.strip()]
    end = _end(spoken, last=last)
    return spoken[end][1] if 0 < end < len(spoken) and spoken[end][0] == "assistant" else ""


_KNOWN = frozenset(_ROLES.values())


def _end(spoken: Sequence[tuple[str, str]], *, last: bool) -> int:
    """Return the place behind the question: the last one, or the first with what the user said on top of it."""
    asks = [place for place, (role, _) in enumerate(spoken) if role != "system" and not role.startswith("assistant")]
    if not asks:
        return 0
    end = asks[-1] if last else asks[0]
    while end + 1 < len(spoken) and spoken[end + 1][0] == "user":
        end += 1
    return end + 1
