"""Files that a workload is read from: what identifies them, their text, and their rows as JSON or as columns.

Whatever a file holds, what is wrong with it is said as a PlanError that names the file, the line and the remedy.
What counts is a file's digest, never its name.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_llmperf.plan.checks import PlanError, brief, cut

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_PACKED = {
    b"\x1f\x8b": "is compressed with gzip",
    b"PK\x03\x04": "is a zip archive",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd",
    b"BZh": "is compressed with bzip2",
    b"\xfd7zXZ": "is compressed with xz",
    b"PAR1": "is a Parquet file",
}
"""How files begin that hold no text as they are."""
_DIVIDERS = {";": "';'", "\t": "tabs", "|": "'|'"}
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
MOST_TOKENS = 10_000_000
"""No request of a trace has more: a larger number stands in the wrong column."""


@dataclass(frozen=True)
class File:
    """A file that a workload is read from."""

    path: str
    sha256: str

    def __str__(self) -> str:
        """Return the file's name with the beginning of its digest."""
        return f"{Path(self.path).name} ({self.sha256[:12]})"


class Row(NamedTuple):
    """One object of a file. There may be millions: its place is written out only where an error names it."""

    file: File
    form: str
    """`line` or `entry`."""
    place: int
    values: dict[str, Any]

    def error(self, what: str) -> PlanError:
        """Return the error that says what is wrong with this row."""
        return PlanError(f"{self.file.path}, {self.form} {self.place}: {what}")

    def number(self, name: str) -> float:
        """Return a finite number of a column; raises PlanError."""
        number = _finite(self.values[name])
        if number is None:
            raise self.error(f"{name} is {shown(self.values[name])}; it must be a number")
        return number

    def tokens(self, name: str, *, least: int = 1) -> int:
        """Return a whole number of tokens of a column; raises PlanError."""
        value = self.values[name]
        if isinstance(value, str) and value.isascii() and value.isdigit() and least <= (count := int(value[:20])) <= MOST_TOKENS:
            return count
        number = _finite(value)
        if number is None or number != int(number) or not least <= number <= MOST_TOKENS:
            raise self.error(f"{name} is {shown(value)}; it must be a whole number of tokens, {least} or more")
        return int(number)


def _finite(value: object) -> float | None:
    """Return a finite number, None for what is none: neither truth values nor underscores are."""
    if isinstance(value, str):
        value = value.strip()  # of more than `float` takes for blanks
        if not _NUMBER.fullmatch(value):
            return None
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def parse_file(name: str, value: object, folder: Path) -> File:
    """Return a file that exists, a relative path being relative to `folder`; raises PlanError naming `name`."""
    if not isinstance(value, (str, Path)) or not str(value):
        raise PlanError(f"{name}={brief(value)}: must be the path of a file, relative to the test file")
    try:
        path = folder / Path(value).expanduser()
        return File(str(path), hashlib.sha256(_data(path)).hexdigest())
    except (OSError, ValueError, RuntimeError) as error:
        why = cut(str(error))
        raise PlanError(f"{name}={brief(str(value))}: cannot be read ({why}); give a path relative to the test file") from None


def _data(path: Path) -> bytes:
    """Return what is in a file; raises OSError, also for what is none: a pipe would never begin, and /dev/zero never end."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:  # which raises for a folder
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError("it is no regular file, but a pipe or a device")
        data: bytes | None = file.read()
    if data is None:
        raise OSError("it has nothing to read yet")  # such as /proc/kmsg
    return data


def read_text(file: File) -> str:
    """Return a file's text, without a byte order mark; raises PlanError for what holds no UTF-8, or nothing."""
    try:
        data = _data(Path(file.path))
    except OSError as error:
        raise PlanError(f"{file.path}: cannot be read as text ({error})") from None
    if packed := next((text for magic, text in _PACKED.items() if data.startswith(magic)), None):
        raise PlanError(f"{file.path}: {packed}; unpack or convert it to plain text first")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise PlanError(f"{file.path}: cannot be read as text: it is UTF-16; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PlanError(f"{file.path}: cannot be read as text ({error}); save it as UTF-8") from None
    if not text.strip():
        raise PlanError(f"{file.path}: is empty")
    return text


def json_rows(file: File) -> Iterator[Row]:
    """Yield the objects of a JSON array, or of JSON lines; raises PlanError naming the line or the entry."""
    text = read_text(file)
    if (entries := _entries(file, text)) is not None:
        if not entries:
            raise PlanError(f"{file.path}: is an empty list")
        form = "entry"
        values: Iterable[tuple[int, Any]] = enumerate(entries, 1)
    else:
        form = "line"
        # JSON strings may hold what else splits lines.
        lines = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
        values = ((number, _decoded(file, number, line)) for number, line in lines)
    for number, value in values:
        row = Row(file, form, number, value if isinstance(value, dict) else {})
        if not isinstance(value, dict):
            raise row.error(f"{shown(value)} is no JSON object; write one object a line, or a list of them")
        yield row


def csv_rows(file: File) -> tuple[tuple[str, ...], Iterator[Row]]:
    """Return the columns of a CSV file as they are written, and its rows by column; raises PlanError naming the line."""
    lines = csv.reader(io.StringIO(read_text(file), newline=""))
    try:
        header = next((cells for cells in lines if any(cell.strip() for cell in cells)), [])
    except csv.Error as error:
        raise PlanError(f"{file.path}: is no CSV ({error})") from None
    columns = tuple(cell.strip() for cell in header)
    if len(columns) == 1 and (divider := next((text for sign, text in _DIVIDERS.items() if sign in header[0]), None)):
        raise PlanError(f"{file.path}: its columns are divided by {divider}; divide them by ','")
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        raise PlanError(f"{file.path}: has the column {brief(twice[0])} twice; rename or remove one of them")
    return columns, _csv_values(file, columns, lines)


def _csv_values(file: File, columns: tuple[str, ...], lines: Any) -> Iterator[Row]:
    try:
        for cells in lines:
            row = Row(file, "line", lines.line_num, dict(zip(columns, cells, strict=False)))
            if len(cells) == len(columns):
                yield row
            elif any(cell.strip() for cell in cells):
                raise row.error(f"has {len(cells)} fields, the header {len(columns)}")
    except csv.Error as error:
        raise PlanError(f"{file.path}, line {lines.line_num}: is no CSV ({error})") from None


def read_numbers(file: File, columns: int) -> tuple[tuple[int, ...], ...]:
    """Return rows of so many whole numbers, 1 or more, divided by commas, semicolons or blanks; raises PlanError.

    A first line of words only is taken for a header.
    """
    rows: list[tuple[int, ...]] = []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        words = [word for word in re.split(r"[\s,;]+", line.strip()) if word]
        is_header = not rows and words and not any(re.search(r"^[-+.\d]", word) for word in words)
        if not words or (is_header and columns > 1):
            continue
        if len(words) != columns or not all(re.fullmatch(r"0*[1-9][0-9]{0,7}", word) for word in words):
            each = "one per line" if columns == 1 else f"{columns} in each line"
            raise PlanError(
                f"{file.path}: must hold whole numbers of tokens, 1 or more, {each}; line {number} is {shown(line.strip())}"
            )
        rows.append(tuple(map(int, words)))
    if not rows:
        raise PlanError(f"{file.path}: must hold whole numbers of tokens, 1 or more; it has a header only")
    return tuple(rows)


def shown(value: object) -> str:
    """Return a value as an error shows it: short, and marked as text where it is."""
    return brief(value, 60)


def _entries(file: File, text: str) -> list[Any] | None:
    """Return the entries of a JSON array, or an object of several lines as the only one; None where each line is JSON."""
    first_line = text.strip().partition("\n")[0].strip()
    if not text.lstrip().startswith("[") and first_line != "{":
        return None
    try:
        value = json.loads(text)
    except RecursionError:
        raise PlanError(f"{file.path}: is nested too deep for JSON of requests") from None
    except ValueError as error:
        if "Extra data" in str(error):
            return None
        raise PlanError(f"{file.path}: is no JSON ({error})") from None
    return value if isinstance(value, list) else [value]


def _decoded(file: File, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except RecursionError:
        raise PlanError(f"{file.path}, line {number}: is nested too deep for JSON of a request") from None
    except ValueError as error:
        what = f"is no JSON ({error}); write one object a line, or a list of them"
        raise PlanError(f"{file.path}, line {number}: {what}") from None
