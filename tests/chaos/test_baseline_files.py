"""Baseline files under attack: writers at once, kills, full disks, odd ids, and whatever else may lie where a file should."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_llmperf.files import unwritable_folder
from pytest_llmperf.judge import baseline as store
from pytest_llmperf.judge.baseline import Baseline
from pytest_llmperf.judge.places import place
from pytest_llmperf.judge.provenance import Provenance
from pytest_llmperf.judge.verdict import Status
from pytest_llmperf.run.cases import RunError
from pytest_llmperf.run.recording import settle
from pytest_llmperf.testing import Example
from tests.baseline_writers import Updaters, launches, recorded, rules_for, trying, writing
from tests.conftest import ENVIRONMENT, QUICK, SERVING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.faults import Attempts

LOST = "no lost baseline"
BAD = "bad input is told"
CASE = "test_it.py::test_serving[tiny-tp1-c8]"
FILE = "baselines/simulated/test_it/test_serving-tiny-tp1-c8.json"
RECORD = ("--update-baselines", "--llmperf-launches=2")


def baseline(case_id: str = CASE, count: int = 2) -> Baseline:
    return Baseline(case_id, "simulated", {"prompt_tokens": 8}, "f", Provenance({"kind": "simulated"}), launches("job", count))


ONE, OTHER = baseline(count=2), baseline(count=30)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if not path.is_dir())


def jobs(path: Path) -> list[str]:
    stored = store.load(path)
    assert stored is not None
    return [launch.job for launch in stored.launches]


# ------------------------------------------------------------------------------------------------ two writers


@pytest.fixture
def updaters(tmp_path: Path) -> Iterator[Updaters]:
    both = Updaters(tmp_path)
    yield both
    both.close()


@pytest.mark.fault(LOST, "two runs update a baseline at the same moment")
def test_two_updaters_lose_no_launch_and_say_the_truth(tmp_path: Path, updaters: Updaters, attempts: Attempts) -> None:
    rules = rules_for(tmp_path, "first")
    for number, chance in enumerate(attempts(quick=5, full=200)):
        case_id, before = f"test_it.py::test_x[{number}]", chance.choice((0, 3))
        if before:
            settle([recorded(rules, case_id, before)], passed=True)
        said = updaters.record(case_id, chance.uniform(0, 0.002), chance.uniform(0, 0.002))
        assert sorted(jobs(rules.path(case_id))) == sorted(["first"] * before + ["one"] * 2 + ["other"] * 2)
        ends = {int(end[1]) for text in said if (end := re.search(r"extended by 2 launches .* to (\d+), from", text))}
        assert ends == ({5, 7} if before else {4}), said
        assert sum("new, 2 launches" in text for text in said) == (not before)
        assert names(tmp_path) == sorted(f"test_x-{done}.json" for done in range(number + 1))


@pytest.mark.fault(LOST, "two runs update at once a baseline that is nearly full")
def test_two_updaters_keep_the_newest_forty(tmp_path: Path, updaters: Updaters, attempts: Attempts) -> None:
    rules = rules_for(tmp_path, "first")
    for number, _ in enumerate(attempts(quick=1, full=20)):
        case_id = f"test_it.py::test_x[{number}]"
        settle([recorded(rules, case_id, store.MOST_LAUNCHES - 1)], passed=True)
        updaters.record(case_id, 0, 0)
        stored = jobs(rules.path(case_id))
        assert len(stored) == store.MOST_LAUNCHES
        assert sorted(stored[-4:]) == ["one", "one", "other", "other"]


@pytest.mark.fault(LOST, "another version is recorded while a run measures")
def test_what_was_stored_meanwhile_is_checked_too(tmp_path: Path, attempts: Attempts) -> None:
    for _ in attempts():
        for update, expected in (("all", "2 launches in place of 2, which were of another version"), ("new", "another run")):
            rules, case_id = rules_for(tmp_path, "late", update=update), f"test_it.py::test_x[{update}]"
            late = recorded(rules, case_id)
            settle([recorded(rules_for(tmp_path, "early"), case_id, tpot_p50_s=0.1)], passed=True)
            if update == "all":
                settle([late], passed=True)
                assert jobs(rules.path(case_id)) == ["late"] * 2
                assert late.verdict is not None
                assert late.verdict.status is Status.RECORDED
            else:
                with pytest.raises(RunError, match="another run has recorded it meanwhile, of another version"):
                    settle([late], passed=True)
                assert jobs(rules.path(case_id)) == ["early"] * 2
                assert late.verdict is not None
                assert late.verdict.status is Status.MEASURED
            assert expected in late.notes[0]


@pytest.mark.parametrize(
    ("how", "stored"),
    [
        ({"update": "new"}, ["early", "early", "late", "late"]),
        ({"update": "no", "missing": "record"}, ["early", "early", "late", "late"]),
        ({"update": "all"}, ["late", "late"]),
    ],
)
def test_what_was_recorded_meanwhile_is_replaced_by_an_update_of_all_alone(tmp_path: Path, how: Any, stored: list[str]) -> None:
    rules, case_id = rules_for(tmp_path, "late", extend=False, **how), "test_it.py::test_x"
    late = recorded(rules, case_id)
    settle([recorded(rules_for(tmp_path, "early"), case_id)], passed=True)
    settle([late], passed=True)
    assert jobs(rules.path(case_id)) == stored


@pytest.mark.fault(LOST, "a run that starts tries the folder that another writes into")
def test_a_folder_that_another_run_tries_can_be_written(tmp_path: Path, attempts: Attempts) -> None:
    folder = tmp_path / "baselines" / "host" / "test_it"
    with trying(folder):
        for _ in attempts(quick=20, full=400):
            assert unwritable_folder(folder) is None
            store.save(folder / "case.json", ONE)
            assert store.load(folder / "case.json") == ONE
            (folder / "case.json").unlink()
            shutil.rmtree(tmp_path / "baselines", ignore_errors=True)  # the other one may have just made a folder
    assert names(tmp_path) == []


MEETING = """
import os, pathlib, time

def test_serving(llmperf, baseline):
    measured = llmperf(prompt_tokens=16, output_tokens=6, requests=8)
    assert measured == baseline
    pathlib.Path(f"judged-{os.getpid()}").touch()
    deadline = time.monotonic() + 60
    while len(list(pathlib.Path().glob("judged-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
"""


@pytest.mark.fault(LOST, "two runs of pytest have judged before either writes")
def test_two_runs_of_pytest_lose_no_launch(tmp_path: Path, attempts: Attempts) -> None:
    args = (*QUICK, "--llmperf-exclusive=off", *RECORD, "-p", "no:cacheprovider")
    for number, _ in enumerate(attempts(quick=1, full=3)):
        folder = tmp_path / str(number)
        project = Example({"test_it.py": MEETING}, args)
        folder.mkdir()
        project.write(folder)
        runs = [
            subprocess.Popen(
                [*project.command(folder), f"--llmperf-json={name}.json"], cwd=folder, text=True, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, env={**os.environ, **ENVIRONMENT},
            )
            for name in ("one", "other")
        ]  # fmt: skip
        texts = [run.communicate(timeout=150)[0] for run in runs]
        assert [run.returncode for run in runs] == [0, 0], texts
        assert len(set(jobs(folder / FILE))) == 2, texts
        assert len(jobs(folder / FILE)) == 4
        assert sum("new, 2 launches" in text for text in texts) == 1
        assert sum("extended by 2 launches of the same version to 4, from 2 runs" in text for text in texts) == 1


# ------------------------------------------------------------------------------------------------ kills and full disks


@pytest.mark.fault(LOST, "SIGKILL while a baseline is written")
def test_a_kill_leaves_the_old_file_or_the_new(tmp_path: Path, attempts: Attempts) -> None:
    path = tmp_path / "case.json"
    store.save(path, ONE)
    for chance in attempts(quick=5, full=200):
        with writing(path, ONE, OTHER) as process:
            process.join(chance.uniform(0, 0.03))
        assert store.load(path) in (ONE, OTHER)
        store.save(path, ONE)
        assert store.load(path) == ONE
        assert names(tmp_path) == ["case.json"]


@pytest.mark.fault(LOST, "what a killed run left lies in the folder of an update")
def test_an_update_sweeps_what_killed_runs_have_left(run: Callable[..., Any], tmp_path: Path, attempts: Attempts) -> None:
    for _ in attempts():
        folder = (tmp_path / FILE).parent
        folder.mkdir(parents=True)
        old = folder / ".gone.json.abcd1234"  # version 0.1 named them so
        for left in (old, folder / ".gone.json.llmperf-new", folder / ".test_serving-tiny-tp1-c8.json.llmperf-new"):
            left.write_text("{")
        os.utime(old, (0, 0))
        (folder / ".mine.txt").touch()
        assert run(SERVING, *RECORD).outcomes == {"passed": 1}
        assert names(folder) == [".mine.txt", Path(FILE).name]


def failing_after(monkeypatch: pytest.MonkeyPatch, calls: int, code: int) -> list[str]:
    """Have every call that changes the disk fail once so many have worked; a write takes half of its bytes before."""
    made: list[str] = []

    def wrap(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **named: Any) -> Any:
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args, **named)
            made.append(name)
            if len(made) <= calls:
                return real(*args, **named)
            if name == "write" and len(made) == calls + 1:
                return real(args[0], args[1][: len(args[1]) // 2])
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(owner, name, call)

    for name in ("open", "ftruncate", "write", "fchmod", "fsync"):
        wrap(os, name)
    wrap(Path, "replace")
    return made


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT], ids=lambda code: errno.errorcode[code])
@pytest.mark.fault(LOST, "the disk is full or broken at any call that writes")
def test_a_full_disk_keeps_the_old_file(tmp_path: Path, attempts: Attempts, code: int) -> None:
    rules = rules_for(tmp_path, "old")
    settle([recorded(rules, CASE)], passed=True)
    path, text = rules.path(CASE), rules.path(CASE).read_bytes()
    with pytest.MonkeyPatch.context() as monkeypatch:
        every = failing_after(monkeypatch, 1000, code)
        store.save(path, ONE)
    path.write_bytes(text)
    for number, _ in enumerate(attempts(quick=len(every), full=len(every) * 3)):
        state = recorded(rules_for(tmp_path, "new"), CASE)
        with pytest.MonkeyPatch.context() as monkeypatch:
            failing_after(monkeypatch, number % len(every), code)
            with pytest.raises(RunError, match="cannot be written"):
                settle([state], passed=True)
        assert (path.read_bytes(), names(tmp_path)) == (text, [path.name])
        assert state.verdict is not None
        assert (state.verdict.status, state.record) == (Status.MEASURED, None)
        assert state.notes[0].startswith("not recorded, because")


@pytest.mark.fault(LOST, "a file system without locks")
def test_without_locks_one_writer_waits_for_the_other(
    tmp_path: Path, attempts: Attempts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    monkeypatch.setattr("pytest_llmperf.files._PATIENCE_S", 0.2)
    path, left = tmp_path / "case.json", tmp_path / ".case.json.llmperf-new"
    for _ in attempts(quick=2, full=10):
        left.write_text("{")  # of a writer that was killed
        store.save(path, ONE)
        assert (store.load(path), names(tmp_path)) == (ONE, ["case.json"])


@pytest.mark.fault(LOST, "a writer that is stopped in the middle")
def test_a_writer_that_never_ends_is_not_waited_for(tmp_path: Path, attempts: Attempts, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    monkeypatch.setattr("pytest_llmperf.files._PATIENCE_S", 0.1)
    for _ in attempts():
        with (tmp_path / ".case.json.llmperf-new").open("w") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            with pytest.raises(OSError, match="another process has not finished it"):
                store.save(tmp_path / "case.json", ONE)


# ------------------------------------------------------------------------------------------------ odd ids, folded case

ODD = [
    "test_a.py::test_x", "test_a.py::test_x[a/b]", "test_a.py::test_x[../../etc/passwd]", "../test_a.py::test_x",
    "/etc/test_a.py::test_x", "a b/test_a.py::test_x", "a.b/test.a.py::test_x", "test_a.py::test_x[]",
    "test_a.py::test_x[ ]", "test_a.py::test_x[.]", "test_a.py::test_x[..]", "test_a.py::test_x[...]",
    "test_a.py::test_x[" + "y" * 300 + "]", "test_a.py::test_" + "z" * 300, "test_a.py::test_x[\u4e2d\u6587]",
    "test_\u00e9.py::test_\u00e9", "test_e\u0301.py::test_e\u0301", "test_a.py::test_x[\U0001f600]",
    "test_a.py::test_x[\x00]", "test_a.py::test_x[\x1b[31m]", "test_a.py::test_x[\n\r\t]",
    "test_a.py::test_x[\x7f\x80\u202e]", "d\udcff/test_a.py::test_x", "test_a.py::test_x[\udcff]",
    "test_a.py::test_x[CON]", "test_a.py::test_x[a:b|c?*<>\"']", "test_a.py::test_x[#2]", "test_a.py::test_x#2",
    "test_a.py::TestA::TestB::test_x[-]", "test_a.py::test_x[--]", "::", "", "x", "test_a.py::test_x[$(reboot)`~]",
]  # fmt: skip


@pytest.mark.fault(LOST, f"{len(ODD)} odd test ids")
def test_odd_ids_have_files_of_their_own(tmp_path: Path, attempts: Attempts) -> None:
    folder = tmp_path / "baselines"
    paths: dict[Path, str] = {}
    for number, _ in enumerate(attempts(quick=len(ODD))):
        case_id = ODD[number]
        path = place(folder, "host", case_id)
        assert paths.setdefault(path, case_id) == case_id
        assert path.resolve().is_relative_to(folder / "host")
        stored = baseline(case_id.encode(errors="backslashreplace").decode(), count=number + 1)
        store.save(path, stored)
        assert place(folder, "host", case_id) == path
        assert store.load(path) == stored
    assert all(len(store.load(path).launches) == ODD.index(case_id) + 1 for path, case_id in paths.items())
    store.unused(folder, "host", tmp_path, ODD)


class FoldingDisk:
    """A file system that folds case: a name is that of what lies there already by another spelling."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
        self._root = str(root)
        for name in ("stat", "lstat", "open", "mkdir", "unlink", "listdir", "scandir", "replace"):
            monkeypatch.setattr(os, name, self._folding(getattr(os, name)))

    def _folding(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            paths = [self.fold(arg) if isinstance(arg, (str, Path)) else arg for arg in args]
            return real(*paths, **named)

        call.__name__ = real.__name__
        self._listdir = real if real.__name__ == "listdir" else getattr(self, "_listdir", os.listdir)
        return call

    def fold(self, path: str | Path) -> str:
        text = os.fspath(path)
        if not text.startswith(self._root + "/"):
            return text
        at = self._root
        for part in text[len(self._root) + 1 :].split("/"):
            try:
                there = self._listdir(at)
            except OSError:
                there = []
            same = next((name for name in there if name.lower() == part.lower()), part)
            at = f"{at}/{part if part in there else same}"
        return at


@pytest.mark.fault(LOST, "ids that differ by case only, on a disk that folds it")
def test_ids_that_differ_by_case_have_files_of_their_own(tmp_path: Path, attempts: Attempts) -> None:
    ids = ["test_it.py::test_x[a]", "test_it.py::test_x[A]", "test_it.py::TestX::test_x", "test_it.py::Testx::test_x",
           "d/test_it.py::test_x", "D/test_it.py::test_x", "D/test_it.py::test_y"]  # fmt: skip
    for chance in attempts(quick=3, full=40):
        order, root = chance.sample(ids, len(ids)), tmp_path / str(chance.random())
        root.mkdir()
        with pytest.MonkeyPatch.context() as monkeypatch:
            FoldingDisk(monkeypatch, root)
            rules = rules_for(root, "job")
            states = [recorded(rules, case_id, count) for count, case_id in enumerate(order, 2)]
            settle(states, passed=True)  # all were judged when none was there
            for case_id in chance.sample(ids, len(ids)):
                settle([recorded(rules, case_id, 2)], passed=True)
            assert [len(jobs(rules.path(case_id))) for case_id in order] == [*range(4, len(ids) + 4)]
        assert len(names(root)) == len(ids)
        # Taken to a disk that does not fold, they are found all the same, but where two folders' names have become one.
        assert [len(jobs(rules.path(case_id))) for case_id in order if case_id[1] != "/"] == [
            count for count, case_id in enumerate(order, 4) if case_id[1] != "/"
        ]


# ------------------------------------------------------------------------------------------------ what lies there instead


def a_loop(path: Path) -> None:
    path.symlink_to(path.name)


def a_socket(path: Path) -> None:
    here = Path.cwd()  # the name of a socket must be short
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def a_link_to_a_folder(path: Path) -> None:
    path.symlink_to(path.parent)


def a_huge_file(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(65 << 20)


IN_PLACE = {
    "a folder": (Path.mkdir, "it is a folder"),
    "a link to a folder": (a_link_to_a_folder, "it is a folder"),
    "a link in a circle": (a_loop, "Too many levels of symbolic links"),
    "a pipe": (os.mkfifo, "it is a pipe"),
    "a link to a device": (lambda path: path.symlink_to("/dev/zero"), "it is a device"),
    "a socket": (a_socket, "it is a socket"),
    "a file of 65 MiB": (a_huge_file, "more than 64"),
    "an empty file": (Path.touch, "not a baseline"),
}
BOTH = SERVING + "\ndef test_other(llmperf):\n    llmperf(prompt_tokens=8, output_tokens=2, requests=8)\n"


@pytest.mark.parametrize("what", IN_PLACE)
@pytest.mark.fault(BAD, "a baseline's path is something else than its file")
def test_what_is_no_file_fails_its_test_and_no_other(
    run: Callable[..., Any], tmp_path: Path, attempts: Attempts, what: str
) -> None:
    make, message = IN_PLACE[what]
    path = tmp_path / FILE
    for number, _ in enumerate(attempts(quick=1, full=3)):
        how = ((), RECORD, ("--llmperf-selftest",))[number]
        if not number:
            path.parent.mkdir(parents=True)
            make(path)
        result = run(BOTH, *how)
        assert result.returncode == 1
        assert result.outcomes == ({"failed": 1, "skipped": 1} if "--llmperf-selftest" in how else {"failed": 1, "passed": 1})
        assert result.engine_starts <= 2
        assert f"{path.name}: " in result.stdout
        assert message in result.stdout
        assert "INTERNALERROR" not in result.stdout
        assert not any(".py:" in line and "src/pytest_llmperf" in line for line in result.stdout.splitlines())
        if "--llmperf-selftest" not in how:
            assert result.statuses[CASE] == "INVALID"
            assert "0 compared, 2 not compared (1 INVALID, 1 MEASURED)" in result.stdout


@pytest.mark.parametrize(
    ("folder", "message"),
    [("a_file", "a file stands in the place of a folder"), ("circle", "Too many levels"), ("x" * 300, "File name too long")],
    ids=["below a file", "a link in a circle", "a name too long"],
)
@pytest.mark.fault(BAD, "--llmperf-baselines leads nowhere")
def test_a_folder_that_leads_nowhere_is_told(
    run: Callable[..., Any], tmp_path: Path, attempts: Attempts, folder: str, message: str
) -> None:
    (tmp_path / "a_file").touch()
    (tmp_path / "circle").symlink_to("circle")
    for _ in attempts():
        result = run(BOTH, f"--llmperf-baselines={folder}")
        assert result.outcomes == {"failed": 1, "passed": 1}, result.stdout
        assert message in result.stdout
        assert "INTERNALERROR" not in result.stdout
        refused = run(BOTH, f"--llmperf-baselines={folder}", *RECORD)
        assert refused.returncode == 4
        assert f"--llmperf-baselines={tmp_path / folder}: cannot be written" in refused.stderr


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE], ids=lambda code: errno.errorcode[code])
@pytest.mark.fault(BAD, "a baseline cannot be read")
def test_a_file_that_cannot_be_read_is_told(run: Callable[..., Any], tmp_path: Path, attempts: Attempts, code: int) -> None:
    run(SERVING, *RECORD)
    conftest = f"""
import os, pathlib
real = os.open
def refuse(path, *args, **named):
    if str(path).endswith("{Path(FILE).name}"):
        raise OSError({code}, os.strerror({code}), path)
    return real(path, *args, **named)
def pytest_configure(config):
    os.open = refuse
def pytest_unconfigure(config):
    os.open = real
"""
    for _ in attempts():
        result = run({"test_it.py": BOTH, "conftest.py": conftest})
        assert result.outcomes == {"failed": 1, "passed": 1}, result.stdout
        assert f"cannot be read ({os.strerror(code)})" in result.stdout


@pytest.mark.fault(BAD, "a baseline is damaged while its test runs")
def test_a_file_that_is_damaged_meanwhile_is_told_in_a_line(run: Callable[..., Any], tmp_path: Path, attempts: Attempts) -> None:
    for how in attempts(quick=2) and ((), RECORD):
        for _ in attempts():
            (tmp_path / FILE).unlink(missing_ok=True)
            run(SERVING, *RECORD)
            damage = SERVING.replace("    assert", f"    open({str(tmp_path / FILE)!r}, 'w').write('no')\n    assert")
            result = run(damage, *how)
            assert result.outcomes == {"failed": 1}
            assert result.statuses == {CASE: "INVALID"}
            assert "not a baseline" in result.stdout
            # The message, and the table of the case: nothing of our own code.
            assert "pytest_llmperf/" not in result.stdout.replace(str(Path(sys.executable).parents[1]), "")


@pytest.mark.fault(BAD, "the disk of --llmperf-json is full")
def test_a_full_disk_for_the_json_file_keeps_the_summary(run: Callable[..., Any], tmp_path: Path, attempts: Attempts) -> None:
    conftest = """
import os
real = os.write
def full(handle, data):
    if os.readlink(f"/proc/self/fd/{handle}").endswith("out.json.llmperf-new"):
        raise OSError(28, os.strerror(28))
    return real(handle, data)
def pytest_configure(config):
    os.write = full
def pytest_unconfigure(config):
    os.write = real
"""
    for path, files in (("/dev/full", {}), ("out.json", {"conftest.py": conftest})):
        for _ in attempts():
            result = run({"test_it.py": SERVING, **files}, f"--llmperf-json={path}", *RECORD)
            assert result.returncode == 1
            assert "could not be written (No space left on device)" in result.stdout
            assert "1 failed, 1 passed" in result.stdout
            assert "0 compared, 1 not compared (1 RECORDED)" in result.stdout


@pytest.mark.fault("no hang", "--llmperf-json is a pipe that nobody reads")
def test_a_pipe_that_nobody_reads_is_not_waited_for(run: Callable[..., Any], tmp_path: Path, attempts: Attempts) -> None:
    os.mkfifo(tmp_path / "pipe")
    for _ in attempts():
        result = run(SERVING, f"--llmperf-json={tmp_path / 'pipe'}", *RECORD)
        assert result.returncode == 1
        assert "could not be written" in result.stdout
