"""Loads in the forms that lists of tests have: their ids, what is stored of them, and that a file's name says nothing."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.baselines import rewrite
from tests.plugin.test_workloads import ids

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_llmperf.testing import Result

    Run = Callable[..., Result]

RATES = """
import pytest

@pytest.mark.llmperf(rate=[4, "inf"])
def test_it(llmperf):
    llmperf(prompt_tokens=8, output_tokens=4, requests=8, max_concurrency=4)
"""
RECORD = ("--update-baselines", "--llmperf-launches=2")


def test_an_infinite_rate_is_a_point_of_the_grid(run: Run) -> None:
    result = run(RATES)
    assert ids(result) == ["test_it[tiny-tp1-r4]", "test_it[tiny-tp1-rinf]"]
    assert result.outcomes == {"passed": 2}, result.stdout
    assert [case["workload"]["rate"] for case in result.cases] == [[4.0], ["inf"]]


def test_the_option_selects_the_infinite_rate(run: Run) -> None:
    result = run(RATES, "--llmperf-rate=1,inf")
    assert ids(result) == ["test_it[tiny-tp1-rinf]"]
    assert result.outcomes == {"passed": 1, "deselected": 1}


@pytest.mark.parametrize("value", ["-inf", "infinite", "inf..2"])
def test_a_rate_that_is_almost_infinite_is_a_usage_error(run: Run, value: str) -> None:
    result = run(RATES, f"--llmperf-rate={value}")
    assert result.returncode == 4
    assert "or inf to send all at once" in result.stdout + result.stderr


LOADS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("rate='inf', max_concurrency=4, requests=16", {"rate": ["inf"], "max_concurrency": 4}),
    ("turns=2, requests=16, think_s='uniform(0.1, 0.2)'", {"think_s": "uniform(0.1, 0.2)"}),
    ("duration_s=2, requests=400", {"duration_s": 2.0, "requests": 400}),
    ("rate=50, duration_s=0.5", {"requests": 25}),
    ("pairs=[(8, 4), (16, 6)]", {"pairs": [[8, 4], [16, 6]]}),
    ("warm_up={'requests': 2, 'output_tokens': 3}", {}),
    ("prompt_tokens='normal(16, 4)'", {"prompt_tokens": "normal(16, 4)"}),
)


@pytest.mark.parametrize(("arguments", "stored"), LOADS, ids=[arguments for arguments, _ in LOADS])
def test_a_load_is_recorded_and_compared_like_any_other(run: Run, arguments: str, stored: dict[str, Any]) -> None:
    source = f"def test_it(llmperf, baseline):\n    assert llmperf({arguments}) == baseline"
    assert set(run(source, *RECORD).statuses.values()) == {"RECORDED"}
    result = run(source)
    assert result.outcomes == {"passed": 1}, result.stdout
    [case] = result.cases
    assert case["workload"].items() >= stored.items()
    assert case["launches"][0]["rounds"][0]["metrics"]["failed_requests"] == 0


def test_requests_that_were_used_up_are_noted(run: Run) -> None:
    [case] = run("def test_it(llmperf):\n    llmperf(prompt_tokens=8, output_tokens=4, duration_s=900, requests=16)").cases
    assert any("duration_s=900: all 16 requests were sent in" in note for note in case["notes"])


TRACED = "def test_it(llmperf, baseline):\n    assert llmperf(trace='{}', trace_unit='ms') == baseline"
ROWS = "\n".join(json.dumps({"timestamp": 50 * at, "input_length": 9, "output_length": 4}) for at in range(8))


def renamed(run: Run, folder: Path, change: Callable[[dict[str, Any]], None] = lambda _: None) -> Result:
    """Record with a trace, change the stored baseline, and compare with the trace under another name."""
    run({"test_it.py": TRACED.format("a.jsonl"), "a.jsonl": ROWS}, *RECORD)
    [path] = (folder / "baselines").rglob("*.json")
    rewrite(path, change)
    (folder / "a.jsonl").unlink()
    return run({"test_it.py": TRACED.format("elsewhere/b.jsonl"), "elsewhere/b.jsonl": ROWS})


def older(data: dict[str, Any]) -> None:
    """Make a baseline's fingerprint what it was when it held the names of files."""
    text = json.dumps(data["workload"], sort_keys=True)
    data["workload_fingerprint"] = hashlib.sha256(text.encode()).hexdigest()[:16]


def test_a_trace_under_another_name_is_the_same_load(run: Run, tmp_path: Path) -> None:
    assert set(renamed(run, tmp_path).statuses.values()) == {"PASS"}


def test_a_baseline_that_knows_the_trace_by_name_stays_comparable(run: Run, tmp_path: Path) -> None:
    assert set(renamed(run, tmp_path, older).statuses.values()) == {"PASS"}


def test_a_baseline_of_another_trace_is_not_comparable(run: Run, tmp_path: Path) -> None:
    def other(data: dict[str, Any]) -> None:
        data["workload"]["trace"] = "b.jsonl (0123456789ab)"
        older(data)

    assert set(renamed(run, tmp_path, other).statuses.values()) == {"NOT-COMPARABLE"}


def test_what_a_file_lacks_is_told_before_anything_is_measured(run: Run) -> None:
    source = "def test_it(llmperf):\n    llmperf(trace='t.csv')"
    result = run({"test_it.py": source, "t.csv": "when,how many\n1,2\n"})
    assert result.outcomes == {"failed": 1}
    assert "the columns are when, how many: for BurstGPT's timestamp, request tokens, response tokens missing" in result.stdout
    assert "KeyError" not in result.stdout


def test_rows_that_are_left_out_are_noted(run: Run) -> None:
    source = "def test_it(llmperf):\n    llmperf(trace='t.csv')"
    table = "Timestamp,Request tokens,Response tokens\n0,9,4\n1,9,0\n"
    [case] = run({"test_it.py": source, "t.csv": table}).cases
    assert "trace: 1 of 2 rows have no prompt or no answer: not sent" in case["notes"]


def test_tools_of_a_dataset_are_sent_and_their_hits_are_no_fault(run: Run) -> None:
    source = "def test_it(llmperf):\n    llmperf(dataset='d.jsonl', output_tokens=4, requests=8)"
    entry = {"messages": [{"role": "user", "content": "weather?"}], "tools": [{"type": "function", "function": {"name": "w"}}]}
    result = run({"test_it.py": source, "d.jsonl": json.dumps(entry)})
    assert result.outcomes == {"passed": 1}, result.stdout
