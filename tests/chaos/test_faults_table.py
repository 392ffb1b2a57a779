"""The fault table counts what it says."""

from __future__ import annotations

from tests.faults import Attempts, Row, table


def test_a_failing_attempt_is_tried_and_not_survived():
    attempts = Attempts(full=False)
    try:
        for number, _ in enumerate(attempts(quick=3, full=9)):
            assert number < 1
    except AssertionError:
        pass
    assert (attempts.tried, attempts.survived) == (2, 1)


def test_a_full_run_has_more_attempts():
    attempts = Attempts(full=True)
    assert sum(1 for _ in attempts(quick=3, full=9)) == 9
    attempts.took(2.5)
    assert (attempts.tried, attempts.survived, attempts.worst_s) == (9, 9, 2.5)


def test_rows_of_one_fault_are_added_up():
    rows = [Row("no hang", "silence", 2, 2, 0.5, "a"), Row("no hang", "silence", 3, 2, 1.5, "b")]
    assert "| no hang | silence | 5 | 4 | 1.5 s |" in table(rows)
