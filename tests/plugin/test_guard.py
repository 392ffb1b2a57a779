"""Whatever the core raises in a hook ends no run: it is told in a few lines, the other tests go on, and the run is red."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path

import _pytest
import pluggy
import pytest

import pytest_llmperf.plugin
from pytest_llmperf.plugin import guard
from pytest_llmperf.plugin.collector import Collector
from pytest_llmperf.testing import Example
from tests.conftest import ENVIRONMENT, QUICK, SERVING

PROJECT = {
    "test_it.py": SERVING
    + "\n\ndef test_second(llmperf, baseline):\n    assert llmperf(requests=8, output_tokens=4) == baseline\n",
    "test_plain.py": "def test_plain():\n    pass\n",
}
SELFTEST, TWICE = "--llmperf-selftest", "--llmperf-gate=tpot_p50_s=60%"
SLOWER = "--llmperf-engine-args=--sim-slow-down 4"

# hook, what raises in it, options of the run
RAISING = [
    ("pytest_load_initial_conftests", "pytest_llmperf.plugin:fill_in_values", ()),
    ("pytest_configure", "pytest_llmperf.plugin.settings:check_json", ()),
    ("pytest_generate_tests", "pytest_llmperf.plugin.collection:parametrize", ()),
    ("pytest_generate_tests", "pytest_llmperf.plugin.collection:restrict", ()),
    ("pytest_collection_modifyitems", "pytest_llmperf.plugin.collection:plan_items", ()),
    ("pytest_collection_modifyitems", "pytest_llmperf.plugin.collection:planned", ()),
    ("pytest_collection_finish", "pytest_llmperf.plugin.session:prepare", ()),
    ("pytest_report_collectionfinish", "pytest_llmperf.plugin.summary:header", ()),
    ("pytest_runtestloop", "pytest_llmperf.plugin.session:judge_suite", ()),
    ("pytest_runtestloop", "pytest_llmperf.plugin.comparisons:check_comparisons", ()),
    ("pytest_runtest_protocol", "pytest_llmperf.plugin.protocol:run_item", ()),
    ("pytest_runtest_protocol", "pytest_llmperf.plugin.protocol:_publish", ()),
    ("pytest_runtest_protocol", "pytest_llmperf.plugin.protocol:outcome_of", ()),
    ("pytest_runtest_protocol", "pytest_llmperf.run.turns:Turns.next", ()),
    ("pytest_runtest_protocol", "pytest_llmperf.plugin.selftest:report", (SELFTEST,)),
    ("pytest_runtest_setup", "pytest_llmperf.plugin.session:set_up", ()),
    ("pytest_assertrepr_compare", "pytest_llmperf.plugin.measuring:explain", (SLOWER,)),
    ("pytest_runtest_logreport", "pytest_llmperf.plugin.session:write_results", ()),
    ("pytest_terminal_summary", "pytest_llmperf.plugin.summary:summarize", ()),
    ("pytest_sessionfinish", "pytest_llmperf.plugin.session:end", ()),
    ("pytest_sessionfinish", "pytest_llmperf.plugin.session:stop", ()),
]
XDIST = [
    *RAISING,
    ("pytest_testnodedown", "pytest_llmperf.plugin.collector:hear_worker", ()),
]  # fmt: skip
NAMES = [f"{hook}-{place.rpartition(':')[2]}" for hook, place, _ in XDIST]
OTHERS = {"pytest_addoption", "pytest_sessionstart", "pytest_keyboard_interrupt"}
"""Without options there is no plugin, and pytest says so itself; the second keeps a reference; the third has a test below."""

INJECT = """
import importlib, operator

def boom(*_, **__):
    raise RuntimeError("no such luck")

place, _, name = {place!r}.partition(":")
owner, _, name = name.rpartition(".")
module = importlib.import_module(place)
whose = operator.attrgetter(owner)(module) if owner else module
stopping = getattr(whose, name)
setattr(whose, name, boom if name != "stop" else lambda config: (stopping(config), boom()))
"""


def test_every_hook_is_tried() -> None:
    hooks = {name for name in vars(pytest_llmperf.plugin) if name.startswith("pytest_")}
    hooks |= {name for name, _ in inspect.getmembers(Collector) if name.startswith("pytest_")}
    assert hooks - OTHERS == {hook for hook, _, _ in XDIST}


def check(result, hook):
    output = result.stdout + result.stderr
    assert result.returncode == 1, output
    assert "INTERNALERROR" not in output
    assert "RuntimeError: no such luck" in output
    assert "fault of pytest-llmperf" in output
    assert "Traceback" not in output
    assert hook in output
    assert result.outcomes.get("passed", 0) >= 1, output


def test_an_interruption_whose_text_cannot_be_cleaned_stays_one(run, monkeypatch) -> None:
    def boom(_):
        raise RuntimeError("no such luck")

    monkeypatch.setattr("pytest_llmperf.plugin.outlet.clean_interrupt", boom)
    result = run("def test_x(llmperf):\n    llmperf(requests=8, output_tokens=2)\n    raise KeyboardInterrupt\n", quick=True)
    assert result.returncode == 2, result.stdout
    assert "RuntimeError: no such luck" in result.stdout + result.stderr
    assert "INTERNALERROR" not in result.stdout + result.stderr


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Return a folder of baselines, recorded once."""
    folder = tmp_path_factory.mktemp("recorded")
    project = Example(PROJECT, QUICK, ENVIRONMENT)
    assert project.run(folder, "--update-baselines", "--llmperf-launches=2", TWICE, in_process=True).returncode == 0
    return folder / "baselines"


@pytest.fixture
def stored(recorded, tmp_path):
    """Have baselines to compare with."""
    shutil.copytree(recorded, tmp_path / "baselines")


@pytest.mark.fault("bad input is told", "the core raises in one of pytest's hooks")
@pytest.mark.parametrize(("hook", "place", "options"), RAISING, ids=NAMES[: len(RAISING)])
def test_what_the_core_raises_in_a_hook_ends_no_run(run, stored, monkeypatch, hook, place, options):
    name = place.replace(":", ".")
    stopping = pytest_llmperf.plugin.session.stop if place.endswith(":stop") else None

    def boom(*args, **_):
        if stopping:
            stopping(*args)
        raise RuntimeError("no such luck")

    monkeypatch.setattr(name, boom)
    result = run(PROJECT, TWICE, *options)
    check(result, hook)


def test_a_fault_in_the_last_test_drops_none_that_wait(run, stored, monkeypatch):
    real = pytest_llmperf.plugin.protocol._report

    def report(item, call):
        if "second" in item.nodeid:
            raise RuntimeError("no such luck")
        return real(item, call)

    monkeypatch.setattr("pytest_llmperf.plugin.protocol._report", report)
    result = run(PROJECT["test_it.py"], "--llmperf-gate=tpot_p50_s=60%", "--llmperf-tolerance=0.01%", "-v")
    assert result.outcomes == {"passed": 1, "failed": 1}, result.stdout
    assert "test_serving[tiny-tp1-c8] PASSED" in result.stdout
    assert "the run ended before it was decided" not in result.stdout


THEIRS = """
def pytest_runtest_makereport(item, call):
    if call.when == "call":
        raise RuntimeError("no such luck")
"""


def test_a_hook_of_others_that_raises_is_told_as_theirs(run, stored, tmp_path):
    result = run({"test_it.py": PROJECT["test_it.py"], "conftest.py": THEIRS}, TWICE)
    assert result.outcomes == {"failed": 2}, result.stdout
    place = tmp_path / "conftest.py"
    assert (
        f"RuntimeError: no such luck, raised by {place}:4 in a hook that pytest-llmperf called (pytest_runtest_pro"
        in result.stdout
    )
    assert "This is a fault of that hook, neither of your tests nor of pytest-llmperf: see the traceback" in result.stdout
    assert "please report it" not in result.stdout


def test_what_the_core_itself_raises_is_no_fault_of_others():
    here, package = __file__, Path(pytest_llmperf.plugin.__file__).parent
    ours, called, pytests = f"{package}/protocol.py", f"{Path(pluggy.__file__).parent}/_callers.py", str(_pytest.__file__)
    assert guard._is_foreign([ours, called, here])
    assert guard._is_foreign([ours, called, here, json.__file__])  # the hook has called it
    assert not guard._is_foreign([ours, called, here, ours])
    assert not guard._is_foreign([ours, called, pytests])
    assert not guard._is_foreign([ours, json.__file__])
    assert not guard._is_foreign([ours, called])
    assert not guard._is_foreign([])


def test_the_cache_has_the_tracebacks_of_all_faults(run, stored, tmp_path, monkeypatch):
    def boom(item, *_):
        raise RuntimeError(f"no luck for {item.name}")

    monkeypatch.setattr("pytest_llmperf.plugin.protocol._publish", boom)
    run(PROJECT, TWICE)
    kept = json.loads((tmp_path / ".pytest_cache/v/llmperf/faults").read_text())
    assert [lines[-1].partition("[")[0] for lines in kept] == [
        f"RuntimeError: no luck for test_{n}" for n in ("serving", "second")
    ]


def test_collecting_takes_no_fault_off_the_list(run, stored, tmp_path, monkeypatch):
    def boom(*_):
        raise RuntimeError("no such luck")

    with monkeypatch.context() as patched:
        patched.setattr("pytest_llmperf.plugin.session.judge_suite", boom)
        assert run(PROJECT, TWICE).returncode == 1
    failed = tmp_path / ".pytest_cache/v/cache/lastfailed"
    assert "llmperf::faults" in failed.read_text()
    collected = run(PROJECT, TWICE, "--co")
    assert collected.outcomes == {}, collected.stdout
    assert "llmperf::faults" in failed.read_text()
    assert run(PROJECT, TWICE).outcomes["passed"] == 4
    assert "llmperf::faults" not in failed.read_text()


@pytest.mark.fault("bad input is told", "the core raises in one of pytest's hooks, in a worker of xdist", full=True)
@pytest.mark.parametrize(("hook", "place", "options"), XDIST, ids=NAMES)
def test_what_the_core_raises_in_a_worker_ends_no_run(run, stored, hook, place, options):
    result = run({**PROJECT, "conftest.py": INJECT.format(place=place)}, TWICE, "-n", "1", *options)
    if hook in ("pytest_load_initial_conftests", "pytest_configure"):  # they are over when a conftest.py is read
        return
    check(result, hook)


@pytest.mark.fault("bad input is told", "the core raises in one of pytest's hooks, without a terminal")
@pytest.mark.parametrize("place", ["summary:header", "session:prepare", "protocol:_publish", "session:end"])
def test_without_a_terminal_the_run_is_red_all_the_same(run, stored, monkeypatch, place):
    def boom(*_, **__):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(f"pytest_llmperf.plugin.{place.replace(':', '.')}", boom)
    result = run(PROJECT, TWICE, "-p", "no:terminal")
    if place == "summary:header":  # the terminal alone asks for it
        assert result.returncode == 0
    else:
        assert result.returncode == 1
