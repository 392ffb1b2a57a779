"""A line of an engine's log without what stands in front of it: colours, processes, ranks, times, levels, places in the source.

Prefixes stand in front of prefixes (Ray's, then the worker's, then Python's), so they are taken off one after the other.
Shapes seen: vLLM 0.8 to 0.33 (vllm#17569, #45784), Ray (vllm#5283), torch.distributed, SGLang (sglang#10741), TGI (its launcher's
text and JSON), TensorRT-LLM (TensorRT-LLM#5872), llama.cpp, loguru, uvicorn, glog, systemd, docker compose.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_COLOUR = re.compile(r"(?:\x1b|\^\[)\[[0-9;?]*[ -/]*[@-~]")
_LEVELS = "TRACE|DEBUG|INFO|NOTICE|WARN|WARNING|ERROR|CRITICAL|FATAL|EXCEPTION"
_LETTERS = {"T": "TRACE", "D": "DEBUG", "V": "DEBUG", "I": "INFO", "W": "WARNING", "E": "ERROR", "F": "FATAL", "C": "CRITICAL"}
_HARMLESS = ("TRACE", "DEBUG", "INFO", "NOTICE", "WARN", "WARNING")
_PREFIXES = tuple(
    re.compile(pattern)
    for pattern in (
        r"\((?:[^()]{0,80} )?pid=(?P<pid>\d+(?:, ip=[\w.:]+)?)[^()]*\)\s*",  # vLLM's processes, Ray's actors
        r"\[(?:rank|default)\d+\]:\s*",  # torch.distributed
        r"\[?(?P<level>[EWIF])\d{3,4} \d\d:\d\d:\d\d[.\d]* [^\]]{1,200}\]\s*",  # glog, and torch's C++
        r"\[?\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d[.,\d]*(?:Z|[+-]\d\d:?\d\d)?(?: [A-Z]+\d+)*\]?(?:\s*[|-]\s+|\s+|$)",
        r"\[\d\d/\d\d/\d{4}-\d\d:\d\d:\d\d\]\s*",  # TensorRT-LLM
        r"\[(?:TRT-LLM|TensorRT-LLM|RANK \d+|(?:[A-Z]+\d+ ?)+)\]\s*",
        rf"\[(?P<level>{_LEVELS}|[EWIFDV])\]\s*",
        r"[A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d [\w.-]+ [\w.@-]+(?:\[\d+\])?: ",  # systemd
        rf"(?P<level>{_LEVELS}) \d\d-\d\d \d\d:\d\d:\d\d (?:\[[^\]]*\]|\S+\])\s*",  # vLLM
        rf"(?P<level>{_LEVELS})\s*[:|-]\s*(?:root:)?\s*",  # logging, uvicorn, loguru
        rf"(?P<level>{_LEVELS})\s+(?=[\w-]+(?:::\w+)*: )",  # Rust's tracing
        r"(?:shard-manager|download|webserver|text_generation\w*(?:::\w+)*|TextGenerationInference)(?:\{[^{}]*\})?: ",  # TGI
        r"[\w.<>]+:[\w.<>]+:\d+ - ",  # loguru's place
        r"[\w./-]+\.py:\d+ - ",
        r"time=\S+ level=(?P<level>[A-Z]+) (?:source=\S+ )?msg=",
        r"\d+\.\d\d\.\d{3}\.\d{3} (?P<level>[EWID]) ",  # llama.cpp
        r"(?P<level>E) (?=[a-z])",
        r"[\w.-]+ +\| +",  # docker compose
        r"\|\s+",  # Python's groups of exceptions
    )
)
_MOST_PREFIXES = 24
_NAMED = re.compile(
    r"((?:\w+\.)*\w*(?:Error|Exception|Interrupt): .+|(?:\w+\.)*[A-Z]\w*(?:Error|Exception)|Fatal Python error: .+"
    r"|(?:.*: )?GGML_(?:ASSERT\(.*\) failed|ABORT\(.*))"
)
_THROWN = re.compile(r"terminate called after throwing an instance of '([^']+)'")
_WHAT = re.compile(r"what\(\):\s*(.+)")


@dataclass(frozen=True)
class LogLine:
    """What a line of a log says, by whom."""

    text: str
    """Without prefixes; of several lines where the log's own format joins them."""
    level: str = ""
    """In upper case, empty where the line names none."""
    process: str = ""
    """The process id that the line names, with the address of its host where that is told; empty where it names none."""

    @property
    def is_harmless(self) -> bool:
        """Return whether its level says that nothing went wrong."""
        return self.level in _HARMLESS


def without_colours(text: str) -> str:
    """Return a text without the escape sequences of terminals."""
    return _COLOUR.sub("", text)


def read_line(line: str) -> LogLine:
    """Return a line of a log without its prefixes; the innermost level and process count."""
    text, level, process = without_colours(line).strip(), "", ""
    for _ in range(_MOST_PREFIXES):
        match = next(filter(None, (prefix.match(text) for prefix in _PREFIXES)), None)
        if match is None:
            break
        groups = match.groupdict()
        level, process = groups.get("level") or level, groups.get("pid") or process
        text = text[match.end() :].lstrip()
    if text.startswith("{") and (inner := _from_json(text)):
        return inner if inner.process or not process else LogLine(inner.text, inner.level, process)
    return LogLine(text, _LETTERS.get(level, level), process)


def _from_json(text: str) -> LogLine | None:
    """Return what a line of JSON says; None for JSON that is no log line, and for no JSON."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, dict) or not isinstance(data.get("level"), str):
        return None
    fields = data.get("fields")
    places = (data, fields if isinstance(fields, dict) else {})
    texts = (place[name] for place in places for name in ("message", "msg", "event") if isinstance(place.get(name), str))
    return LogLine(without_colours(next(texts, "")).strip(), data["level"].upper())


def complaints(lines: Iterable[str]) -> Iterator[str]:
    """Yield what these lines say, one line each, without those whose level says that nothing went wrong."""
    for line in lines:
        read = read_line(line)
        if not read.is_harmless:
            yield from filter(None, map(str.strip, read.text.splitlines()))


def named_errors(lines: Iterable[str]) -> list[str]:
    """Return the exceptions that a log names, of Python and C++, each once, in order.

    vLLM's front end ends with a traceback of its own ("See root cause above") that pushes the root cause out of the last lines.
    """
    names, thrown = dict[str, None](), ""
    for text in complaints(lines):
        if match := _THROWN.search(text):
            thrown = match[1]
        elif thrown and (match := _WHAT.match(text)):
            names[f"{thrown}: {match[1]}"] = None
            thrown = ""
        elif match := _NAMED.fullmatch(text):
            names[match[1]] = None
    return list(names)
