"""Whose turn it is, without pytest: items are texts whose first letter is their engine."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.judge.verdict import Status, Verdict
from pytest_llmperf.plan.case import Case
from pytest_llmperf.plan.engine import EngineSpec
from pytest_llmperf.plan.workload import Workload
from pytest_llmperf.run.cases import CaseState
from pytest_llmperf.run.turns import Action, Result, Turns, runs_again
from tests.whole_run import launch

ITEMS = st.sampled_from([f"{engine}{number}" for engine in "abc" for number in range(3)])


def spec_of(item: str | None) -> EngineSpec | None:
    return EngineSpec(model=item[0]) if item else None


@dataclass
class Played:
    """What a session did: the order of the runs, those that were final, and the engine starts."""

    ran: list[str] = field(default_factory=list)
    final: list[str] = field(default_factory=list)
    starts: int = 0


def play(items: list[str], launches: dict[str, int], *, alone: bool = False, leaves: dict[str, str] | None = None) -> Played:
    """Run items as pytest does, each as often as `launches` says; some leave another engine running behind them."""
    turns: Turns[str] = Turns(spec_of, alone=alone)
    played, running, used = Played(), None, dict[str, set[int]]()
    for item, behind in zip(items, [*items[1:], None], strict=True):
        turns.offer(item, behind)
        while (current := turns.current) is not None:
            if running != spec_of(current) or played.starts in used.get(current, ()):
                running, played.starts = spec_of(current), played.starts + 1
            used.setdefault(current, set()).add(played.starts)
            if leaves and current in leaves:
                running, played.starts = spec_of(leaves[current]), played.starts + 1
            played.ran.append(current)
            again = played.ran.count(current) < launches.get(current, 1)
            action = turns.next(current, again=again, running=running)
            assert action.final is not again
            played.final += [current] if action.final else []
            running = None if action.stops_engine else running
    assert running is None
    return played


def test_decided_tests_run_once_in_their_order() -> None:
    played = play(["a1", "a2", "b1"], {})
    assert played.ran == played.final == ["a1", "a2", "b1"]
    assert played.starts == 2


def test_an_undecided_test_waits_until_its_engine_has_served_all() -> None:
    played = play(["a1", "a2", "a3", "b1"], {"a1": 3, "a3": 2})
    assert played.ran == ["a1", "a2", "a3", "a1", "a3", "a1", "b1"]
    assert played.final == ["a2", "a3", "a1", "b1"]
    assert played.starts == 4


def test_a_worker_runs_an_undecided_test_again_at_once() -> None:
    assert play(["a1", "a2"], {"a1": 2}, alone=True).ran == ["a1", "a1", "a2"]


def test_an_engine_that_the_next_test_wants_goes_first() -> None:
    # A sweep of engine `a` leaves `b` running: `b1` has its turn before the sweep runs again.
    played = play(["a1", "b1", "c1"], {"a1": 2, "b1": 2}, leaves={"a1": "b"})
    assert played.ran[:2] == ["a1", "b1"]
    assert Counter(played.ran) == {"a1": 2, "b1": 2, "c1": 1}


def test_the_engine_stops_behind_the_last_that_needs_it() -> None:
    turns: Turns[str] = Turns(spec_of)
    turns.offer("a1", "b1")
    assert turns.next("a1", again=True, running=spec_of("a1")) == Action(final=False, following="a1", stops_engine=False)
    assert turns.next("a1", again=False, running=spec_of("a1")) == Action(final=True, following="b1", stops_engine=True)
    assert turns.current is None


def test_a_session_that_stops_forgets_those_that_wait() -> None:
    turns: Turns[str] = Turns(spec_of)
    turns.offer("a1", "a2")
    turns.next("a1", again=True, running=spec_of("a1"))
    turns.offer("a2", "a3")
    action = turns.next("a2", again=False, running=spec_of("a2"), stopping=True)
    assert action == Action(final=True, following=None, stops_engine=True)
    assert turns.current is None


def test_a_test_whose_fixtures_are_broken_does_not_run_again() -> None:
    turns: Turns[str] = Turns(spec_of)
    turns.offer("a1", None)
    assert turns.next("a1", again=True, running=spec_of("a1")).following == "a1"
    assert turns.give_up("a1") is None
    assert turns.current is None


def test_those_that_wait_follow_when_the_last_is_given_up() -> None:
    turns: Turns[str] = Turns(spec_of)
    turns.offer("a1", "a2")
    turns.next("a1", again=True, running=spec_of("a1"))
    turns.offer("a2", "b1")
    assert turns.give_up("a2") == turns.current == "a1"
    assert turns.next("a1", again=False, running=spec_of("a1")).following == "b1"


def test_those_that_wait_go_on_when_another_is_given_up() -> None:
    turns: Turns[str] = Turns(spec_of)
    turns.offer("a1", "a2")
    turns.next("a1", again=True, running=spec_of("a1"))
    turns.offer("a2", "a3")
    assert turns.give_up("a2") == "a3"
    assert turns.current is None
    turns.offer("a3", None)
    assert turns.next("a3", again=False, running=spec_of("a3")).following == "a1"


def test_those_that_wait_let_an_engine_go_first_that_is_left_running() -> None:
    turns: Turns[str] = Turns(spec_of)
    turns.offer("a1", "a2")
    turns.next("a1", again=True, running=spec_of("a1"))
    turns.offer("a2", "b1")
    assert turns.next("a2", again=True, running=spec_of("b1")).following == "b1"
    assert turns.give_up("a2", running=spec_of("b1")) == "b1"
    assert turns.current is None


@given(
    items=st.lists(ITEMS, unique=True, min_size=1).map(sorted),
    counts=st.dictionaries(ITEMS, st.integers(1, 4)),
    alone=st.booleans(),
)
def test_tests_run_as_often_as_needed_and_engines_start_no_oftener(items: list[str], counts: dict[str, int], alone: bool) -> None:
    played = play(items, counts, alone=alone)
    assert Counter(played.ran) == {item: counts.get(item, 1) for item in items}
    assert sorted(played.final) == items
    if not alone:
        most = {engine: max(counts.get(item, 1) for item in items if item[0] == engine) for engine in {item[0] for item in items}}
        assert played.starts == sum(most.values())


def state(launches: int, status: Status | None) -> CaseState:
    found = CaseState(Case("case", EngineSpec(), Workload()), tuple(launch({}) for _ in range(launches)))
    found.verdict = Verdict(status) if status else None
    return found


@pytest.mark.parametrize(
    ("result", "states", "again"),
    [
        (Result.PASSED, [state(1, None)], False),
        (Result.UNDECIDED, [state(1, None)], True),
        (Result.UNDECIDED, [], True),
        (Result.FAILED, [state(1, None)], False),
        (Result.MISSED, [state(1, None)], True),
        (Result.MISSED, [state(1, Status.PASS)], True),
        (Result.MISSED, [state(2, Status.PASS)], False),
        (Result.MISSED, [state(1, Status.REGRESSED)], False),
        (Result.MISSED, [state(2, None), state(1, None)], True),
        (Result.MISSED, [], False),
    ],
)
def test_one_launch_never_fails_a_test(result: Result, states: list[CaseState], again: bool) -> None:
    assert runs_again(result, states) is again


def test_a_case_without_a_launch_does_not_run_again() -> None:
    assert not runs_again(Result.MISSED, [state(0, None)])
