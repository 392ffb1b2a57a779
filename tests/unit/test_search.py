"""The search for the largest load that holds, on truths that are known: sharp and noisy ones, without an engine."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from pytest_llmperf.judge.maths.search import Edge, Probe, Search, bounds, conclude, decide, next_load, provable, requests_for

if TYPE_CHECKING:
    from collections.abc import Callable

RATES = Search(low=1, high=64)
USERS = Search(low=1, high=256, whole=True)


def searched(search: Search, play: Callable[[float], Probe], start: float | None = None) -> tuple[Edge, list[Probe]]:
    probes: list[Probe] = []
    while (load := next_load(search, probes, start)) is not None:
        assert search.low <= load <= search.high
        assert len(probes) < 60, "it does not end"
        probes.append(play(load))
    return conclude(search, probes), probes


def sharp(knee: float, total: int = 299) -> Callable[[float], Probe]:
    """Return an engine that answers everything in time up to its knee, and nothing beyond it."""
    return lambda load: Probe(load, total if load <= knee else 0, total)


def noisy(knee: float, rng: random.Random, total: int = 299, steepness: float = 40.0) -> Callable[[float], Probe]:
    """Return an engine of which 99 % of answers are good at its knee, and ever fewer beyond it."""
    at_knee = math.log(0.99 / 0.01)

    def play(load: float) -> Probe:
        share = 1 / (1 + math.exp(-at_knee + steepness * math.log(load / knee)))
        return Probe(load, sum(rng.random() < share for _ in range(total)), total)

    return play


@given(knee=st.floats(1.0, 63.9), seed=st.text(max_size=3), start=st.none() | st.floats(1, 64))
def test_a_sharp_knee_lies_within_the_interval_at_the_resolution(knee: float, seed: str, start: float | None) -> None:
    result, probes = searched(replace(RATES, seed=seed), sharp(knee), start)
    assert result.low is not None
    assert result.low <= knee
    if result.high is None:
        assert result.value == 64
        assert knee >= 64 / 1.06
    else:
        assert knee < result.high <= result.low * 1.05 * (1 + 1e-9)
        assert result.low < result.value < result.high
    assert len(probes) <= 15


@given(knee=st.integers(1, 255), seed=st.text(max_size=3), start=st.none() | st.integers(1, 256))
def test_a_knee_of_whole_numbers_is_met_or_resolved(knee: int, seed: str, start: int | None) -> None:
    result, _ = searched(replace(USERS, seed=seed), sharp(knee), start)
    assert result.low is not None
    assert result.high is not None
    assert result.low <= knee < result.high
    assert result.high - result.low == 1 or result.high <= result.low * 1.05
    if knee < 20:
        assert result.value == knee


def test_a_search_takes_few_rounds_and_fewer_near_a_known_answer() -> None:
    from_scratch = [len(searched(replace(RATES, seed=str(n)), sharp(9.7))[1]) for n in range(50)]
    near = [len(searched(replace(RATES, seed=str(n)), sharp(9.7), start=10.0)[1]) for n in range(50)]
    assert max(from_scratch) <= 9
    assert sum(near) / 50 <= 5
    assert max(near) < min(from_scratch) + 2


def test_a_wrong_start_finds_the_same_answer() -> None:
    for start in (1.0, 64.0, 33.0):
        result, probes = searched(RATES, sharp(2.5), start)
        assert result.low <= 2.5 < result.high
        assert len(probes) <= 14


def test_where_a_search_starts_moves_its_mean_answer_nowhere() -> None:
    def mean(start: float | None) -> float:
        values = [searched(replace(RATES, seed=f"{n}"), sharp(10.0), start)[0].value for n in range(200)]
        return sum(values) / len(values)

    assert [mean(start) for start in (None, 7.0, 10.0, 14.0)] == pytest.approx([10.0] * 4, rel=0.01)


def test_seeds_move_the_loads_so_that_launches_share_no_grid() -> None:
    loads = {next_load(replace(RATES, seed=str(n)), []) for n in range(20)}
    assert len(loads) == 20
    values = {searched(replace(RATES, seed=str(n)), sharp(10.0))[0].value for n in range(20)}
    assert len(values) == 20


def test_a_load_at_which_all_holds_is_a_lower_limit() -> None:
    result, probes = searched(RATES, sharp(1000))
    assert result == Edge(64, 64, None)
    assert probes[-1].load == 64


def test_a_load_at_which_nothing_holds_is_an_upper_limit() -> None:
    result, probes = searched(RATES, sharp(0.5))
    assert result == Edge(1, None, 1)
    assert probes[-1].load == 1


def test_a_growing_queue_fails_though_every_answer_was_in_time() -> None:
    result, _ = searched(RATES, lambda load: Probe(load, 299, 299, grows=load > 20))
    assert result.low <= 20 < result.high


@pytest.mark.parametrize(("knee", "total", "steepness"), [(9.0, 299, 40.0), (30.0, 299, 15.0), (3.0, 150, 40.0)])
def test_the_interval_holds_a_noisy_knee_as_often_as_it_says(knee: float, total: int, steepness: float) -> None:
    covered = rounds = 0
    values = []
    for seed in range(200):
        play = noisy(knee, random.Random(f"{knee}/{seed}"), total, steepness)
        result, probes = searched(replace(RATES, seed=str(seed)), play)
        covered += (result.low or 1) <= knee <= (result.high or 64)
        rounds += len(probes)
        values.append(result.value)
    assert covered >= 180, covered
    assert rounds <= 200 * 14, rounds
    assert sum(values) / 200 == pytest.approx(knee, rel=0.05)


# ------------------------------------------------------------------------------------------------ one load


@given(total=st.integers(1, 400), data=st.data())
def test_the_bounds_are_those_of_clopper_and_pearson(total: int, data: st.DataObject) -> None:
    good = data.draw(st.integers(0, total))
    low = binomtest(good, total, alternative="greater").proportion_ci(0.95, method="exact").low
    high = binomtest(good, total, alternative="less").proportion_ci(0.95, method="exact").high
    assert bounds(good, total) == pytest.approx((low, high), abs=1e-9)


@pytest.mark.parametrize(("share", "needed"), [(0.99, 299), (0.95, 59), (0.9, 29), (0.999, 2995)])
def test_how_many_requests_prove_a_share(share: float, needed: int) -> None:
    assert requests_for(share) == needed
    assert provable(needed) >= share > provable(needed - 1)


@pytest.mark.parametrize(
    ("goods", "expected"),
    [
        ([299], (True, True)),
        ([280], (False, True)),
        ([297], None),
        ([297, 297], None),
        ([297, 297, 297], (True, False)),
        ([295, 295, 295], (False, False)),
        ([295, 290], (False, True)),
    ],
)
def test_a_load_near_the_edge_is_tried_again_and_decided_together(goods: list[int], expected: tuple[bool, bool] | None) -> None:
    decided = decide(RATES, [Probe(5.0, good, 299) for good in goods])
    assert (None if decided is None else (decided.holds, decided.certain)) == expected


def test_loads_decided_by_a_hair_are_no_ends_of_the_interval() -> None:
    def play(load: float) -> Probe:
        return Probe(load, 299 if load < 8 else 296 if load < 12 else 200, 299)

    result, _ = searched(RATES, play)
    assert result.low < 8
    assert result.high > 11
