"""The fault table as a value: rows of many tests and runs come to one table, which is written and read as Markdown.

    python tests/fault_table.py run [--table FILE] [ARGUMENT OF PYTEST ...]
    python tests/fault_table.py page TABLE ...
    python tests/fault_table.py track TABLE ...

`run` tries every fault on the simulated engine, and on a real one where there is an environment that has one; `page` writes what
came of it into docs/reliability.md, and `track` adds past faults to the track record there.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"
PROMISES = (
    "no engine outlives the run",
    "no hang",
    "no false green",
    "no lost baseline",
    "no stranger",
    "bad input is told",
    "load and size",
)
"""What docs/reliability.md promises, in its order."""
BEGIN, END = "<!-- faults -->", "<!-- end of faults -->"
BEGIN_RECORD, END_RECORD = "<!-- track record -->", "<!-- end of track record -->"
_HEAD = "| promise | fault | tried | survived | worst time | pytest |\n|---|---|---:|---:|---:|---|\n"
_HEAD_OF_RECORD = "| promise | fault | what it did | mended in | pytest |\n|---|---|---|---|---|\n"
_MOST_PARAMETERS = 3
"""A fault of more parameters of one test is named by the test alone."""


@dataclass(frozen=True)
class Row:
    """What came of one test, or of all tests of one fault."""

    promise: str
    fault: str
    tried: int
    survived: int
    worst_s: float
    tests: tuple[str, ...]
    """Node ids; what stands behind `pytest` to try it again."""


@dataclass(frozen=True)
class PastFault:
    """A fault that was in the plugin."""

    promise: str
    fault: str
    effect: str
    mended: str
    """The first version without it; `unreleased` until there is one."""
    tests: tuple[str, ...]


def of_faults(rows: Iterable[Row]) -> list[Row]:
    """Return the rows with those of one fault added up, in the order of the promises, then of the faults' names."""
    faults: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (row.promise, row.fault)
        before = faults.get(key, replace(row, tried=0, survived=0, worst_s=0.0, tests=()))
        faults[key] = replace(
            row,
            tried=before.tried + row.tried,
            survived=before.survived + row.survived,
            worst_s=max(before.worst_s, row.worst_s),
            tests=tuple(dict.fromkeys((*before.tests, *row.tests))),
        )
    return sorted(faults.values(), key=lambda row: (PROMISES.index(row.promise), row.fault))


def table(rows: Iterable[Row]) -> str:
    """Return the rows as Markdown, a line for each fault and one for all of them."""
    faults = of_faults(rows)
    faults_of: dict[str, set[str]] = {}
    for row in faults:
        for test in row.tests:
            faults_of.setdefault(function_of(test), set()).add(row.fault)
    lines = [_line(row, " ".join(f"`{test}`" for test in _named(row.tests, faults_of))) for row in faults]
    tried, survived = sum(row.tried for row in faults), sum(row.survived for row in faults)
    worst_s = max((row.worst_s for row in faults), default=0.0)
    lines.append(_line(Row("all", f"{len(faults)} fault{'s' * (len(faults) != 1)}", tried, survived, worst_s, ()), ""))
    return _HEAD + "\n".join(lines) + "\n"


def function_of(test: str) -> str:
    """Return a node id without its parameters."""
    return test.partition("[")[0]


def _named(tests: Sequence[str], faults_of: dict[str, set[str]]) -> list[str]:
    """Return the shortest node ids that try these tests: parameters only where others of the test are of another fault."""
    names: dict[str, None] = {}
    for test in tests:
        function = function_of(test)
        siblings = [other for other in tests if function_of(other) == function]
        is_plain = len(faults_of[function]) == 1 or len(siblings) > _MOST_PARAMETERS or re.search(r"[|`\s]", test)
        names[function if is_plain else test] = None
    return list(names)


def _line(row: Row, tests: str) -> str:
    seconds = "-" if not row.tried else f"{row.worst_s:.1f} s" if row.worst_s >= 0.1 else "< 0.1 s"
    return f"| {row.promise} | {row.fault} | {row.tried:,} | {row.survived:,} | {seconds} | {tests} |"


def read(text: str) -> list[Row]:
    """Return the rows of a fault table in a text, without the line for all of them."""
    rows = []
    for promise, fault, tried, survived, seconds, tests in _cells(text, 6):
        worst_s = 0.0 if seconds[0] in "<-" else float(seconds.removesuffix(" s"))
        counts = (int(count.replace(",", "")) for count in (tried, survived))
        rows.append(Row(promise, fault, *counts, worst_s, _tests_in(tests)))
    return rows


def read_record(text: str) -> list[PastFault]:
    """Return the rows of a track record in a text."""
    return [PastFault(*cells, _tests_in(tests)) for *cells, tests in _cells(text, 5)]


def _cells(text: str, count: int) -> Iterable[list[str]]:
    rows = ([cell.strip() for cell in line.strip().strip("|").split("|")] for line in text.splitlines())
    return (cells for cells in rows if len(cells) == count and cells[0] in PROMISES)


def _tests_in(cell: str) -> tuple[str, ...]:
    return tuple(re.findall(r"`([^`]+)`", cell))


def exists(test: str) -> bool:
    """Return whether there is such a test: a file, and in it a function of that name; or a script, which has no node id."""
    path, _, name = function_of(test).partition("::")
    file = ROOT / path
    function = name.rpartition("::")[2]
    return file.is_file() and (not function or re.search(rf"^\s*(?:async )?def {function}\(", file.read_text(), re.M) is not None)


def updated(page: str, rows: Iterable[Row]) -> str:
    """Return the page with these rows in its table, over those of the same fault; rows whose tests are gone go too.

    What a run has not tried, because what it needs was not there, keeps what an earlier run said.
    """
    stored = {(row.promise, row.fault): row for row in read(section(page, BEGIN, END)) if all(map(exists, row.tests))}
    for row in of_faults(rows):
        if row.tried or (row.promise, row.fault) not in stored:
            stored[row.promise, row.fault] = row
    return _with_section(page, BEGIN, END, table(stored.values()))


def with_record(page: str, faults: Iterable[PastFault]) -> str:
    """Return the page with these faults in its track record, over those of the same name, in the order of the promises."""
    known = {fault.fault: fault for fault in read_record(section(page, BEGIN_RECORD, END_RECORD))}
    known |= {fault.fault: fault for fault in faults}
    lines = [
        f"| {fault.promise} | {fault.fault} | {fault.effect} | {fault.mended} | {' '.join(f'`{test}`' for test in fault.tests)} |"
        for fault in sorted(known.values(), key=lambda fault: PROMISES.index(fault.promise))
    ]
    return _with_section(page, BEGIN_RECORD, END_RECORD, _HEAD_OF_RECORD + "\n".join(lines) + "\n")


def section(page: str, begin: str, end: str) -> str:
    """Return what stands between two marks of the page."""
    _, found, rest = page.partition(begin)
    inside, closed, _ = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{PAGE}: the marks {begin} and {end} are missing")
    return inside


def _with_section(page: str, begin: str, end: str, text: str) -> str:
    return page.replace(begin + section(page, begin, end) + end, f"{begin}\n{text}{end}")


def real_python() -> str | None:
    """Return the interpreter that has a real engine: LLMPERF_REAL_PYTHON, or that of `tox run -e real`; None without."""
    named = os.environ.get("LLMPERF_REAL_PYTHON")
    made = [ROOT / ".tox" / "real" / "engine" / "bin" / "python"]
    if folder := os.environ.get("LLMPERF_REAL_ENV"):
        made.insert(0, Path(folder) / "bin" / "python")
    return named or next((str(python) for python in made if python.exists()), None)


def run(path: Path, arguments: Sequence[str]) -> int:
    """Try every fault, simulated and real; write one table, and return pytest's exit status, that of a failure if any."""
    begin_s = time.monotonic()
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    parts, statuses = [], []
    python = real_python()
    wanted = [("simulated", ["tests/chaos", "tests/plugin", "tests/unit", "-m", "fault", "-n", "2"])]
    wanted += [("real", ["tests/real", "-m", "fault"])] if python else []
    environment = {**os.environ, **({"LLMPERF_REAL_PYTHON": python} if python else {})}
    for name, selected in wanted:
        part = path.with_name(f"{path.stem}-{name}.md")
        part.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", *selected, "--faults=full", f"--fault-table={part}", *arguments]
        print("+", " ".join(command), flush=True)
        statuses.append(subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode)
        parts += read(part.read_text()) if part.exists() else []
    path.write_text(table(parts))
    print(f"\n{path.read_text()}\n{path}: written, in {time.monotonic() - begin_s:.0f} s on {os.cpu_count()} cores")
    if python is None:
        print(
            "real engines: not tried; set LLMPERF_REAL_PYTHON to the python of an environment with vLLM, or run: tox run -e real"
        )
    return next((status for status in statuses if status not in (0, 5)), 0)  # 5: no test was selected


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="try every fault and write the table")
    running.add_argument("--table", type=Path, default=ROOT / ".tox" / "chaos" / "faults.md", metavar="FILE")
    writing = commands.add_parser("page", help="write tables into docs/reliability.md")
    writing.add_argument("tables", type=Path, nargs="+", metavar="TABLE")
    recording = commands.add_parser("track", help="add past faults to the track record of docs/reliability.md")
    recording.add_argument("tables", type=Path, nargs="+", metavar="TABLE")
    given, rest = parser.parse_known_args(arguments)
    if given.command == "run":
        return run(given.table, rest)
    if rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    text = "\n".join(path.read_text() for path in given.tables)
    if given.command == "page":
        PAGE.write_text(updated(PAGE.read_text(), read(text)))
        return 0
    faults = read_record(text)
    ready = [fault for fault in faults if fault.tests and all(map(exists, fault.tests))]
    PAGE.write_text(with_record(PAGE.read_text(), ready))
    for fault in faults:
        if fault not in ready:
            print(f"left out, no such test: {fault.fault}: {' '.join(fault.tests)}", file=sys.stderr)
    return int(len(ready) != len(faults))


if __name__ == "__main__":
    sys.exit(main())
