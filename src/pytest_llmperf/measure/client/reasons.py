"""Why a server did not answer a request, or not in full, in its own words.

Servers say it in many shapes: OpenAI's nested `error`, a flat object, FastAPI's `detail`, a bare text, a status with a header,
the `finish_reason` of an answer. Each becomes a sentence; what has no known shape is shown as it came.
"""

from __future__ import annotations

import json
import re
from typing import Any

_MOST_CHARACTERS = 300
_MOST_BYTES = 64 << 10
"""What of an error's body is looked at."""
_MOST_DEPTH = 8
"""How deep reasons may be wrapped; three is the most that was seen."""
_WORDS = ("message", "msg", "detail", "error_message", "error", "reason", "description", "title", "errors", "error_type", "type")
"""Where a reason may stand in an object, the most telling first."""
_TELLING_HEADERS = {"location": "redirects to {}", "retry-after": "retry after {} s", "www-authenticate": "wants {}"}

_COMPLETE = frozenset({
    "stop", "length", "tool_calls", "function_call",  # OpenAI
    "eos", "eos_token", "stop_sequence", "stop_word", "limit",  # TGI, llama.cpp's own names
    "end_turn", "max_tokens", "tool_use", "model_length", "complete", "completed", "repetition",
})  # fmt: skip
"""Reasons of an answer that is whole. vLLM's are `FinishReason` in vllm/v1/engine/__init__.py."""
_CUT = frozenset({"length", "limit", "max_tokens", "model_length"})
"""Reasons of an answer that reached a limit: the one that was asked for, or a smaller one of the server."""
_FAILED = frozenset({
    "error", "abort", "aborted", "cancel", "cancelled", "canceled", "content_filter", "safety", "refusal", "recitation",
    "blocklist", "prohibited_content", "timeout", "timed_out", "insufficient_system_resource", "overloaded",
    "disconnected", "fail", "failed",
})  # fmt: skip


def ending_error(ending: object, tokens: int | None, wanted: int, *, exact: bool) -> str | None:
    """Return why an answer that ended with this `finish_reason` is not whole; None for one that is.

    `tokens` came of at most `wanted`, or with `exact` of just as many. A reason that nobody knows is one that all tokens prove
    harmless.
    """
    name = ending_name(ending)
    if name is None:
        return "the answer ended without a finish_reason"
    plain, count = name.lower(), "" if tokens is None else f" after {tokens} of {wanted} tokens"
    if plain in _FAILED:
        return f"it ended with finish_reason {name!r}{count}"
    if tokens == wanted:
        return None
    if plain not in _COMPLETE:
        return f"it ended with finish_reason {name!r}, which is not known to be an answer's natural end,{count}"
    if plain in _CUT and not exact and tokens is not None and tokens < wanted:
        return f"the server cut it: finish_reason {name!r}{count}"
    return None


def ending_name(ending: object) -> str | None:
    """Return a `finish_reason` as text; None where none was told. SGLang's own API has an object with a `type`."""
    if isinstance(ending, dict):
        ending = ending.get("type")
    return str(ending) if ending else None


def reason_in(value: Any) -> str:
    """Return the words of an error, whatever its shape; JSON where there are none, and at most 300 characters."""
    return _shortened(_words(value) or json.dumps(value, ensure_ascii=False, default=str))


def _words(value: Any, depth: int = 0) -> str:
    if isinstance(value, str):
        return value.strip()
    if depth > _MOST_DEPTH:
        return ""
    if isinstance(value, (list, tuple)):
        return "; ".join(filter(None, (_words(each, depth + 1) for each in value[:3])))
    if not isinstance(value, dict):
        return ""
    words = next((text for name in _WORDS if value.get(name) and (text := _words(value[name], depth + 1))), "")
    where = value.get("loc")  # FastAPI names the field that it refuses
    if words and isinstance(where, (list, tuple)):
        return f"{'.'.join(map(str, where))}: {words}"
    return words


def reason_of_body(body: bytes) -> str:
    """Return the words of an error's body: of JSON its message, of HTML its title, else the text."""
    text = body[:_MOST_BYTES].decode(errors="replace").strip()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, (dict, list)):
        return _shortened(_words(value) or text)
    if text[:14].lower().startswith(("<!doctype html", "<html")):
        return _shortened(_title(text) or text)
    return _shortened(text)


def _title(page: str) -> str:
    """Return the title of a page of HTML; empty where it has none. Not by a pattern, which a page could keep busy for hours."""
    low = page.lower()
    for name in ("title", "h1"):
        begin = low.find(">", low.find(f"<{name}")) + 1 if f"<{name}" in low else 0
        end = low.find(f"</{name}", begin)
        if begin and end >= 0:
            return page[begin:end].strip()
    return ""


_OURS = ("return_token_ids", "ignore_eos", "stream_options", "temperature", "max_tokens")
"""Fields that every request has, and that a server may not know or not want."""
_REFUSAL = re.compile(
    r"extra|unknown|unrecogni[sz]ed|not permitted|not allowed|unsupported|not supported|unexpected|forbidden", re.I
)


def _remedy(status: str, words: str) -> str:
    """Return how to leave out the field that an answer refuses; empty where it refuses none of ours."""
    if status not in ("400", "422") or not _REFUSAL.search(words):
        return ""
    name = next((name for name in _OURS if name in words), None)
    return f"; leave it out with extra_body={{'{name}': None}}" if name else ""


def http_error(status: str, headers: dict[str, str], body: bytes) -> str:
    """Return what an answer with an error status says: its number, headers that tell more, and its body's words.

    Names of `headers` are in lower case.
    """
    details = [form.format(_shortened(headers[name])) for name, form in _TELLING_HEADERS.items() if headers.get(name)]
    words = reason_of_body(body)
    return f"HTTP {_shortened(status)}: " + "; ".join(filter(None, (*details, words))) + _remedy(status, words)


def _shortened(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + "..."
