"""Points: loads that a marker names one by one, what each brings, and what is said of one that is unusable."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_llmperf.plan.arguments import workload_from
from pytest_llmperf.plan.axes import Axes, Load, grid, is_selected
from pytest_llmperf.plan.checks import PlanError
from pytest_llmperf.plan.marker import parse_marker
from pytest_llmperf.plan.points import parse_points

LADDER = [{"concurrency": 1, "requests": 10}, {"concurrency": 4, "requests": 40}, {"rate": 2.5, "requests": 100}]


def ids(source: object) -> list[str]:
    return [axes.id for axes in grid({}, {}, [point.load for point in parse_points(source)])]


def test_points_have_the_ids_that_the_axes_would_give() -> None:
    assert ids(LADDER) == ["tiny-tp1-c1", "tiny-tp1-c4", "tiny-tp1-r2.5"]


def test_two_points_of_one_load_are_told_apart_by_an_id() -> None:
    assert ids([{"concurrency": 8}, {"concurrency": 8, "id": "long", "prompt_tokens": 900}]) == [
        "tiny-tp1-c8",
        "tiny-tp1-c8-long",
    ]


def test_two_points_that_nothing_tells_apart_are_refused() -> None:
    for twice in (
        [{"rate": 2}, {"concurrency": 2}, {"rate": 2.0, "requests": 9}],
        [{"rate": 2, "id": "a"}, {}, {"rate": 2, "id": "a"}],
    ):
        twice[1] = {"concurrency": 2}
        with pytest.raises(PlanError, match=r"points\[0\] and points\[2\] are both r2.* tell them apart by an id"):
            parse_points(twice)


def test_points_stand_for_the_load_of_every_engine_of_the_grid() -> None:
    loads = [point.load for point in parse_points(LADDER)]
    points = grid({"tp": (1, 2), "model": ("a", "b")}, {"concurrency": (99,)}, loads)
    assert len(points) == 12
    assert {(point.concurrency, point.rate) for point in points} == {(1, None), (4, None), (8, 2.5)}


@pytest.mark.parametrize(
    ("selected", "left"),
    [({"concurrency": (4, 7)}, ["c4"]), ({"rate": (2.5,)}, ["r2.5"]), ({"concurrency": (1,), "rate": (2.5,)}, ["c1", "r2.5"]),
     ({"rate": (9.0,)}, []), ({}, ["c1", "c4", "r2.5"]), ({"tp": (2,)}, [])],
)  # fmt: skip
def test_points_are_selected_as_values_of_axes_are(selected: dict, left: list[str]) -> None:
    points = grid({"tp": (1,)}, selected, [point.load for point in parse_points(LADDER)])
    assert [point.load.id for point in points if is_selected(point, selected)] == left


def test_a_points_arguments_lie_between_those_of_fixture_and_call() -> None:
    [point] = parse_points([{"concurrency": 2, "requests": 10, "prompt_tokens": 7}])
    axes = Axes(concurrency=2)
    defaults = {"concurrency": 5, "requests": 50, "output_tokens": 9}
    workload = workload_from(axes, defaults, point.arguments, {"prompt_tokens": 3})
    assert (workload.concurrency, workload.requests, workload.output_tokens, workload.prompt_tokens) == (2, 10, 9, 3)


def test_a_point_at_a_rate_wins_over_the_fixtures_load() -> None:
    [point] = parse_points([{"rate": 3, "requests": 20}])
    assert workload_from(Axes(rate=3.0), {"rate": 50}, point.arguments, {}).rate == (3.0,)


def test_a_rate_may_be_infinite_and_have_a_cap() -> None:
    [point] = parse_points([{"rate": "inf", "requests": 20, "max_concurrency": 4}])
    assert point.load.id == "rinf"
    workload = workload_from(Axes(rate=point.load.rate), {}, point.arguments, {})
    assert (workload.is_open, workload.max_concurrency) == (True, 4)


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ({"requests": 4}, "{'requests': 4}: a point is so many requests at a time or a rate; give either concurrency or rate"),
        ({"concurrency": 2, "rate": 3}, "concurrency=2, rate=3: a point is so many requests"),
        ({"concurrency": 2, "trace": "t.jsonl"}, "concurrency=2, trace='t.jsonl': a point is"),
        ({"concurrency": 0}, "concurrency=0: the smallest value is 1"),
        ({"concurrency": [1, 2]}, "concurrency=[1, 2]: must be a whole number"),
        ({"rate": "fast"}, "rate=fast: must be requests per second above 0"),
        ({"rate": -1}, "rate=-1: must be"),
        ({"concurrency": 2, "request": 4}, "request=4: unknown argument of a point; known are prompt_tokens"),
        ({"concurrency": 2, "tp": 4}, "tp=4: unknown argument of a point"),
        ({"concurrency": 2, "requests": "many"}, "requests='many': must be a whole number"),
        ({"concurrency": 2, "requests": None}, "requests=None: must be a whole number"),
        ({"concurrency": 20, "requests": 4}, "requests=4: fewer than concurrency=20, which could never be reached; send more"),
        ({"concurrency": 2, "prompt_tokens": "normal(x)"}, "prompt_tokens='normal(x)': must be a number of tokens"),
        ({"concurrency": 2, "slo": {"ttft": 1}}, "slo={'ttft': 1}: must be a dict of limits in seconds"),
        ({"concurrency": 2, "classes": {"a": {"size": 1}}}, "classes: a: unknown argument 'size'"),
        ({"concurrency": 2, "stream": "no"}, "stream='no': must be True or False"),
        ({"concurrency": 2, "api": "gopher"}, "api='gopher': must be one of completions, chat"),
        ({"concurrency": 2, "warm_up": {"rounds": 1}}, "warm_up={'rounds': 1}: must be a dict of what warms up"),
        ({"concurrency": 2, "pairs": []}, "pairs=[]: "),
        ({"rate": 2, "max_concurrency": 0}, "max_concurrency=0: the smallest value is 1"),
        ({"rate": 2, "duration_s": -1}, "duration_s=-1: must be"),
        ({"rate": 2, "arrivals": "often"}, "arrivals='often': must be"),
        ({"concurrency": 2, "limits": {"ttft_p50_s": "fast"}}, "limits: ttft_p50_s='fast': must be a number from 0"),
        ({"concurrency": 2, "limits": [1]}, "limits=[1]: must be a dict of metrics and limits"),
        ({"concurrency": 2, "id": "a/b"}, "id='a/b': must be letters"),
        ({"concurrency": 2, "id": ""}, "id='': must be letters"),
        ({"concurrency": 2, 5: 1}, "5=1: unknown argument of a point"),
    ],
)
def test_an_unusable_point_is_named_with_field_value_and_remedy(point: dict, message: str) -> None:
    with pytest.raises(PlanError) as refused:
        parse_points([{"concurrency": 77}, point])
    assert str(refused.value).startswith(f"llmperf(points=...): points[1]: {message}")


@pytest.mark.parametrize("source", [[], (), {}, {"concurrency": 1}, "c8", 8, [8], [{"concurrency": 1}, None]])
def test_what_is_no_list_of_dicts_is_refused_with_an_example(source: object) -> None:
    with pytest.raises(PlanError, match=r"must be a list of dicts, e\.g\. \[\{'concurrency': 1"):
        parse_points(source)


@pytest.mark.parametrize("name", ["concurrency", "rate"])
def test_points_and_an_axis_of_load_contradict_each_other(name: str) -> None:
    with pytest.raises(PlanError, match=rf"{name}=4\): points say the load themselves; leave {name} out"):
        parse_marker({"points": LADDER, name: 4})


KEYS = st.sampled_from(["concurrency", "rate", "requests", "prompt_tokens", "limits", "id", "slo", "classes", "turns", "x"])
VALUES = st.none() | st.booleans() | st.integers(-2, 40) | st.floats() | st.text(max_size=4) | st.just({"ttft_p50_s": 1})


@settings(deadline=None)
@given(st.lists(st.dictionaries(KEYS, VALUES, max_size=4), max_size=3))
def test_anything_is_points_of_different_loads_or_a_named_error(source: list[dict]) -> None:
    told, ids_of_loads = "llmperf(points=", ["some"]
    try:
        ids_of_loads = [point.load.id for point in parse_points(source)]
    except PlanError as error:
        told = str(error)
    assert told.startswith("llmperf(points=")
    assert len(set(ids_of_loads)) == len(ids_of_loads) > 0


def test_a_load_has_the_same_id_with_and_without_points() -> None:
    assert Axes(concurrency=3).load == Load(3) == parse_points([{"concurrency": 3}])[0].load
