"""docs/reliability.md tells of every fault that a test tries, and of none that no test tries."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.fault_table import (
    BEGIN,
    BEGIN_RECORD,
    END,
    END_RECORD,
    PAGE,
    PROMISES,
    ROOT,
    Row,
    exists,
    function_of,
    read,
    read_record,
    section,
    table,
    updated,
    with_record,
)

if TYPE_CHECKING:
    from pathlib import Path

TEXT = PAGE.read_text()
ROWS = read(section(TEXT, BEGIN, END))
PAST = read_record(section(TEXT, BEGIN_RECORD, END_RECORD))
ANEW = "try all anew: tox run -e chaos; then: python tests/fault_table.py page .tox/chaos/faults.md"


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Return a row for each fault that there is a test of, simulated and real; none is tried."""
    path: Path = tmp_path_factory.mktemp("collected") / "faults.md"
    folders = ("tests/unit", "tests/plugin", "tests/chaos", "tests/real")
    plain = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist")
    command = [
        sys.executable,
        "-m",
        "pytest",
        *folders,
        *plain,
        "-m",
        "fault",
        "--collect-only",
        "--faults=full",
        f"--fault-table={path}",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return read(path.read_text())


def test_every_fault_that_a_test_tries_has_a_row(collected: list[Row]) -> None:
    told = {(row.promise, row.fault) for row in ROWS}
    assert sorted({(row.promise, row.fault) for row in collected} - told) == [], ANEW


def test_every_row_has_a_test_that_tries_it(collected: list[Row]) -> None:
    tests = {(row.promise, row.fault): set(map(function_of, row.tests)) for row in collected}
    for row in ROWS:
        scripts = {test for test in row.tests if "::" not in test}
        assert row.tests, row
        assert all(map(exists, row.tests)), row
        assert {*map(function_of, row.tests)} - scripts <= tests.get((row.promise, row.fault), set()), (row, ANEW)


def test_every_fault_was_tried_and_survived() -> None:
    assert [row for row in ROWS if not row.tried or row.survived != row.tried] == [], ANEW


def test_every_promise_has_a_section_and_faults_that_were_tried() -> None:
    headings = [line.removeprefix("### ").lower() for line in TEXT.splitlines() if line.startswith("### ")]
    assert headings == list(PROMISES)
    assert TEXT.count(BEGIN) == TEXT.count(END) == TEXT.count(BEGIN_RECORD) == TEXT.count(END_RECORD) == 1


@pytest.mark.parametrize("page", [PAGE, ROOT / "SECURITY.md"], ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text())
    assert links
    for path, heading in links:
        target = page.parent / path if path else page
        assert target.is_file(), path
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
        assert not heading or heading in [title.lower().replace(" ", "-") for title in headings], heading


def test_the_tables_are_as_the_script_writes_them() -> None:
    assert updated(TEXT, []) == TEXT
    assert with_record(TEXT, []) == TEXT
    assert read(table(ROWS)) == ROWS


def test_every_past_fault_has_a_test_that_tries_it_again() -> None:
    assert PAST
    for past in PAST:
        assert past.promise in PROMISES
        assert past.effect
        assert past.mended
        assert past.tests, past
        assert [test for test in past.tests if not exists(test)] == [], past
