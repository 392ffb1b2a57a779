"""A `/metrics` answer, read: Prometheus's text format and OpenMetrics, a line at a time, so that one bad line costs one series.

The library's parser reads each line (escapes, numbers, timestamps). What it doesn't know is done before it: exemplars, which only
OpenMetrics has, and the types, which it forgets between lines.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

_MALFORMED = (ValueError, IndexError, KeyError, TypeError, AttributeError)
"""What the parser raises for a malformed line: IndexError for `{a="b", ="c"}`, the others for texts that look half like its newer
syntax."""
_NAME = re.compile(r"[a-zA-Z_:][\w:]*", re.ASCII)
_EXEMPLAR = re.compile(r"""^((?:[^"#]|"(?:[^"\\]|\\.)*")*?)\s#\s*\{.*$""")
"""What follows a sample's value in OpenMetrics: ` # {trace_id="a"} 0.5`; a `#` inside of a label's quotes is no exemplar."""
_SUFFIXES = ("_total", "_sum", "_count", "_bucket", "_created", "_info")
CUMULATIVE = ("counter", "histogram", "summary")
"""Types whose samples only grow while a process lives."""
LARGEST = 1e18
"""Nothing that an engine tells is larger: tokens, bytes, nanoseconds of 30 years. Infinity and 400 digits are."""
LONGEST_LINE = 65_536
"""The longest of a vLLM, with its whole configuration in labels, has 3,000 characters. The parser takes time in squares."""
_NEVER_ASKED = ("_bucket", "_created")
"""Samples that are no counters of their own: `_bucket` says how a histogram is spread, `_created` when a counter began."""


@dataclass(frozen=True)
class Series:
    """One sample: a name, its labels, and the value."""

    name: str
    labels: frozenset[tuple[str, str]]
    value: float

    def label(self, name: str) -> str:
        """Return a label's value, empty where there is none."""
        return dict(self.labels).get(name, "")


@dataclass(frozen=True)
class Scrape:
    """Everything in one answer but the buckets of histograms."""

    series: tuple[Series, ...] = ()
    types: Mapping[str, str] = field(default_factory=dict)
    """Per family, as `# TYPE` says it."""
    helps: Mapping[str, str] = field(default_factory=dict)
    unusable: Mapping[str, str] = field(default_factory=dict)
    """Why samples are left out, by name: their value is no number that could be reckoned with."""
    is_partial: bool = False
    """Only some names were read: that one is missing says nothing."""

    def type_of(self, name: str) -> str:
        """Return the type of a sample's family, empty where the answer doesn't say."""
        return self._said(self.types, name)

    def help_of(self, name: str) -> str:
        """Return what the answer says of a sample's family."""
        return self._said(self.helps, name)

    def is_cumulative(self, name: str) -> bool:
        """Return whether a sample only grows: by its type, else by its name."""
        kind = self.type_of(name)
        plain = not name.endswith(_NEVER_ASKED)
        if kind in ("", "untyped", "unknown"):
            return name.endswith(("_total", "_sum", "_count")) and plain
        return kind in CUMULATIVE and plain and (kind == "counter" or name.endswith(("_sum", "_count")))

    @staticmethod
    def _said(of_families: Mapping[str, str], name: str) -> str:
        if name in of_families:
            return of_families[name]
        families = (name.removesuffix(suffix) for suffix in _SUFFIXES if name.endswith(suffix))
        return next((of_families[family] for family in families if family in of_families), "")


def read_scrape(text: str | None) -> Scrape:
    """Return what is in an answer; a line that cannot be read is passed over. None and HTML pages are empty.

    Left out is what has no finite value, or two of them, and a counter below 0: nothing could be reckoned with them.
    """
    types: dict[str, str] = {}
    helps: dict[str, str] = {}
    series: list[Series] = []
    for line in _lines(text):
        if line.startswith("#"):
            words = line.split(None, 3)
            if len(words) == 4 and words[1] in ("TYPE", "HELP"):
                (types if words[1] == "TYPE" else helps)[words[2]] = words[3].strip()
        elif (name := _NAME.match(line)) and not name[0].endswith("_bucket"):
            series += _samples(line)
    usable, unusable = _usable(series)
    return Scrape(usable, types, helps, unusable)


def parse_metrics(text: str, *names: str) -> list[tuple[str, dict[str, str], float]]:
    """Return (name, labels, value) of every series whose name begins like one of these; malformed lines are passed over."""
    # Only these lines are parsed: all 466 series of a vLLM take 9 ms, twice a second beside the load; two of them 0.1 ms.
    lines = (line for line in _lines(text) if line.startswith(names))
    return [(each.name, dict(each.labels), each.value) for line in lines for each in _samples(line)]


def read_series(text: str | None, names: tuple[str, ...]) -> Scrape:
    """Return only the series whose names begin like one of these, without types."""
    lines = (line for line in _lines(text) if line.startswith(names))
    usable, unusable = _usable([each for line in lines for each in _samples(line)])
    return Scrape(usable, unusable=unusable, is_partial=True)


def _lines(text: str | None) -> Iterator[str]:
    """Yield the lines of an answer but monstrous ones: what else splits lines may stand in a label's value."""
    return (line.rstrip("\r") for line in (text or "").split("\n") if len(line) <= LONGEST_LINE)


def _usable(series: Iterable[Series]) -> tuple[tuple[Series, ...], dict[str, str]]:
    """Return the samples that can be reckoned with, and why the others can't, by name."""
    usable: dict[tuple[str, frozenset[tuple[str, str]]], Series] = {}
    unusable: dict[str, str] = {}
    for each in series:
        key = each.name, each.labels
        if not -LARGEST <= each.value <= LARGEST:  # not a number, neither
            unusable[each.name] = f"{each.value:g}" if abs(each.value) < math.inf else "no finite number"
        elif each.value < 0 and each.name.endswith(("_total", "_count")):
            unusable[each.name] = f"{each.value:g}, and a counter begins at 0"
        elif (other := usable.setdefault(key, each)).value != each.value:
            unusable[each.name] = f"{other.value:g} and {each.value:g} for the same labels"
    # Of several series of one name none is believed where one cannot be: their sum would be too small.
    return tuple(each for each in usable.values() if each.name not in unusable), unusable


def _samples(line: str) -> Iterable[Series]:
    exemplar = _EXEMPLAR.match(line) if " # " in line else None
    try:
        [family] = text_string_to_metric_families(exemplar[1] if exemplar else line)
        return [Series(sample.name, frozenset(sample.labels.items()), float(sample.value)) for sample in family.samples]
    except OverflowError:  # a whole number beyond all floats
        name = _NAME.match(line)
        return [Series(name[0], frozenset(), math.inf)] if name else []
    except _MALFORMED:
        return []
