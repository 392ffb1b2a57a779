"""The fault table counts what it says, in the order of the promises, and is read back as it was written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import fault_table
from tests.fault_table import PROMISES, Row, of_faults, read, table, updated
from tests.faults import Attempts

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]
HANG = "no hang"


def test_a_failing_attempt_is_tried_and_not_survived():
    attempts = Attempts(full=False)
    try:
        for number, _ in enumerate(attempts(quick=3, full=9)):
            assert number < 1
    except AssertionError:
        pass
    assert (attempts.tried, attempts.survived, attempts.number) == (2, 1, 1)


def test_a_full_run_has_more_attempts():
    attempts = Attempts(full=True)
    assert sum(1 for _ in attempts(quick=3, full=9)) == 9
    attempts.took(2.5)
    assert (attempts.tried, attempts.survived, attempts.worst_s) == (9, 9, 2.5)


def test_one_attempt_can_be_tried_alone_by_the_same_chance():
    every = [chance.random() for chance in Attempts(full=True)(quick=3, full=9)]
    assert [chance.random() for chance in Attempts(full=True, only=7)(quick=3, full=9)] == every[7:8]


def test_attempts_of_another_process_are_counted_too():
    attempts = Attempts(full=False)
    attempts.add(10_000)
    attempts.add(5, survived=4)
    assert (attempts.tried, attempts.survived) == (10_005, 10_004)


def test_rows_of_one_fault_are_added_up():
    rows = [Row(HANG, "silence", 2, 2, 0.5, ("a.py::test_a",)), Row(HANG, "silence", 3, 2, 1.5, ("b.py::test_b",))]
    assert "| no hang | silence | 5 | 4 | 1.5 s | `a.py::test_a` `b.py::test_b` |" in table(rows)


def test_rows_stand_in_the_order_of_the_promises():
    rows = [Row(promise, "x", 1, 1, 0.0, ("a.py::test_a",)) for promise in reversed(PROMISES)]
    assert [row.promise for row in of_faults(rows)] == list(PROMISES)
    assert table(rows).splitlines()[-1] == "| all | 7 faults | 7 | 7 | < 0.1 s |  |"


def test_parameters_are_named_only_where_a_test_tries_several_faults():
    one = table([Row(HANG, "silence", 1, 1, 0.0, (f"a.py::test_a[{n}]",)) for n in range(2)])
    assert "`a.py::test_a` |" in one
    two = table([Row(HANG, name, 1, 1, 0.0, (f"a.py::test_a[{name}]",)) for name in ("silence", "pings")])
    assert "| no hang | pings | 1 | 1 | < 0.1 s | `a.py::test_a[pings]` |" in two


def test_a_table_is_read_back_as_it_was_written():
    rows = [
        Row(HANG, "silence", 20_000, 19_999, 12.5, ("a.py::test_a", "b.py::test_b[x-1]")),
        Row(HANG, "pings", 1, 1, 2.0, ("b.py::test_b[y]",)),
        Row("load and size", "never tried", 0, 0, 0.0, ("c.py::test_c",)),
    ]
    assert read(table(rows)) == of_faults(rows)
    assert table(read(table(rows))) == table(rows)


def test_the_page_keeps_what_a_run_could_not_try(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fault_table, "exists", lambda test: test != "gone.py::test_gone")
    old = [
        Row(HANG, "silence", 3, 3, 1.0, ("a.py::test_a",)),
        Row(HANG, "a real engine", 2, 2, 9.0, ("real.py::test_real",)),
        Row(HANG, "gone", 1, 1, 1.0, ("gone.py::test_gone",)),
    ]
    page = f"# Title\n{fault_table.BEGIN}\n{table(old)}{fault_table.END}\nrest\n"
    new = [Row(HANG, "silence", 40, 40, 2.0, ("a.py::test_a",)), Row(HANG, "a real engine", 0, 0, 0.0, ("real.py::test_real",))]
    text = updated(page, new)
    assert [(row.fault, row.tried) for row in read(text)] == [("a real engine", 2), ("silence", 40)]
    assert (text.startswith("# Title\n"), text.endswith("\nrest\n")) == (True, True)


def test_a_test_exists_by_its_file_and_function():
    assert fault_table.exists("tests/chaos/test_faults_table.py::test_a_full_run_has_more_attempts[x]")
    assert fault_table.exists("tests/real/false_alarms.py")
    assert not fault_table.exists("tests/chaos/test_faults_table.py::test_nothing")
    assert not fault_table.exists("tests/chaos/test_nothing.py::test_a")


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Return the commands that a run starts; in the place of each one a table is written, and real engines fail."""
    started: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        started.append(command)
        [path] = [word.partition("=")[2] for word in command if word.startswith("--fault-table=")]
        name = "real" if "tests/real" in command else "simulated"
        Path(path).write_text(table([Row(HANG, "silence", 3, 3, 1.0, (f"tests/{name}.py::test_it",))]))
        return subprocess.CompletedProcess(command, int(name == "real"))

    monkeypatch.setattr(fault_table.subprocess, "run", run)
    for name in ("LLMPERF_REAL_PYTHON", "LLMPERF_REAL_ENV"):
        monkeypatch.delenv(name, raising=False)
    return started


def test_one_command_tries_simulated_and_real_engines(commands: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LLMPERF_REAL_PYTHON", sys.executable)
    assert fault_table.main(["run", "--table", str(tmp_path / "new" / "faults.md"), "-x"]) == 1
    [row] = read((tmp_path / "new" / "faults.md").read_text())
    assert (row.tried, row.tests) == (6, ("tests/simulated.py::test_it", "tests/real.py::test_it"))
    assert all({"--faults=full", "-x", "fault"} <= set(command) for command in commands)


def test_without_a_real_engine_the_command_says_so(
    commands: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(fault_table, "ROOT", tmp_path)  # which has none of tox's environments
    assert fault_table.main(["run", "--table", str(tmp_path / "faults.md")]) == 0
    assert len(commands) == 1
    assert "real engines: not tried; set LLMPERF_REAL_PYTHON" in capsys.readouterr().out


def test_past_faults_without_a_test_are_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n{fault_table.BEGIN_RECORD}\n{fault_table.END_RECORD}\n")
    monkeypatch.setattr(fault_table, "PAGE", page)
    (tmp_path / "rows.md").write_text(
        "| no hang | silence | for ever | unreleased | `tests/faults.py` |\n"
        "| no hang | pings | for ever | unreleased | `tests/nothing.py::test_it` |\n"
    )
    assert fault_table.main(["track", str(tmp_path / "rows.md")]) == 1
    assert [past.fault for past in fault_table.read_record(page.read_text())] == ["silence"]
    assert "left out, no such test: pings: tests/nothing.py::test_it" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ the plugin in a run of its own

CONFTEST = """
from tests.faults import *
from tests.faults import attempts, pytest_runtest_makereport
"""
SUITE = """
import pytest

hang = lambda fault, **more: pytest.mark.fault("no hang", fault, **more)

@hang("survived")
def test_survived(attempts):
    for chance in attempts(quick=3, full=5):
        pass

@hang("not survived")
def test_not_survived(attempts):
    for number, chance in enumerate(attempts(quick=3)):
        assert number < 1

@hang("skipped")
def test_skipped():
    pytest.skip("no engine here")

@hang("left behind")
def test_left_behind(request):
    request.addfinalizer(lambda: 1 / 0)

@hang("broken at once")
def test_broken(no_such_fixture):
    pass

@hang("long", full=True)
def test_long():
    pass
"""


@pytest.fixture
def suite(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs pytest with the table on a small suite of its own."""
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {ROOT}\n")
    (tmp_path / "conftest.py").write_text(CONFTEST)

    def run(source: str, *args: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "test_it.py").write_text(source)
        plain = ("-p", "no:llmperf", "-p", "no:hypothesispytest", "-p", "no:cacheprovider", "-p", "no:benchmark")
        command = [sys.executable, "-m", "pytest", "-q", *plain, *args]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)

    return run


@pytest.mark.parametrize("args", [(), ("-n", "2")], ids=["alone", "xdist"])
def test_a_run_writes_what_was_tried_and_what_survived(
    suite: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, args: tuple[str, ...]
):
    done = suite(SUITE, "--fault-table=tables/faults.md", *args)
    rows = {row.fault: (row.tried, row.survived) for row in read((tmp_path / "tables" / "faults.md").read_text())}
    assert rows == {
        "survived": (3, 3),
        "not survived": (2, 1),
        "skipped": (0, 0),
        "left behind": (1, 0),
        "broken at once": (1, 0),
    }, done
    assert "not tried: test_it.py::test_skipped: no engine here" in done.stdout
    assert "--fault-attempt=1" in done.stdout


def test_a_full_run_has_the_long_tests_too(suite: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path):
    suite(SUITE, "--fault-table=faults.md", "--faults=full")
    rows = {row.fault: row.tried for row in read((tmp_path / "faults.md").read_text())}
    assert (rows["survived"], rows["long"]) == (5, 1)


def test_a_collection_writes_the_faults_without_trying_them(
    suite: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
):
    suite(SUITE, "--fault-table=faults.md", "--collect-only", "--faults=full")
    rows = read((tmp_path / "faults.md").read_text())
    assert {row.tried for row in rows} == {0}
    assert [row.fault for row in rows] == ["broken at once", "left behind", "long", "not survived", "skipped", "survived"]


@pytest.mark.parametrize(
    ("mark", "wrong"),
    [
        ("'no hangs', 'silence'", "no such promise; known are 'no engine outlives the run'"),
        ("'no hang'", "write @pytest.mark.fault(promise, fault)"),
        ("'no hang', ''", "write @pytest.mark.fault(promise, fault)"),
        ("'no hang', 'a | b'", "leave out '|'"),
        ("'no hang', 'silence', often=True", "often=...): unknown; known is full"),
    ],
)
def test_a_mark_that_is_wrong_is_an_error_that_names_the_test(
    suite: Callable[..., subprocess.CompletedProcess[str]], mark: str, wrong: str
):
    done = suite(f"import pytest\n\n@pytest.mark.fault({mark})\ndef test_it():\n    pass\n")
    assert (done.returncode, wrong in done.stderr, "test_it.py::test_it" in done.stderr) == (4, True, True)
