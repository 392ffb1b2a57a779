"""What a marker may demand of the host, and what it says of a demand that it cannot read."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_llmperf.plan.checks import PlanError
from pytest_llmperf.plan.marker import Marker, parse_marker
from pytest_llmperf.plan.needs import NEEDS, NO_NEEDS, Needs, parse_needs
from pytest_llmperf.units import parse_size

GIB = 1 << 30
UNITS = {"": GIB, "GiB": GIB, "MiB": 1 << 20, "TiB": 1 << 40, "GB": 10**9, "MB": 10**6, "TB": 10**12}

numbers = st.one_of(st.integers(1, 10**6), st.floats(0.01, 10**4).map(lambda number: round(number, 2)))


def spelled(word: str) -> st.SearchStrategy[str]:
    return st.sampled_from([word, word.lower(), word.upper()])


def test_all_demands_of_a_marker_are_read() -> None:
    found = parse_needs({"tp": [1, 2], "min_gpus": 4, "min_gpu_memory": "80 GiB", "gpu": " H200 ", "nvlink": True})
    assert found == Needs(min_gpus=4, min_gpu_memory=80 * GIB, gpu="H200", nvlink=True)


@pytest.mark.parametrize("arguments", [{}, dict.fromkeys(NEEDS), {"nvlink": False}, {"tp": 2}])
def test_a_marker_that_demands_nothing_has_no_needs(arguments: dict[str, object]) -> None:
    assert parse_needs(arguments) == NO_NEEDS


@settings(deadline=None)
@given(
    numbers,
    st.sampled_from(sorted(UNITS)).flatmap(lambda unit: st.tuples(st.just(unit), spelled(unit))),
    st.text(" ", max_size=2),
)
def test_a_size_is_its_number_times_its_unit_however_it_is_written(number: float, unit: tuple[str, str], space: str) -> None:
    assert parse_size(f"{number}{space}{unit[1]}") == round(float(number) * UNITS[unit[0]])


@settings(deadline=None)
@given(numbers)
def test_a_bare_number_is_in_gib(number: float) -> None:
    assert parse_size(number) == parse_size(str(number)) == parse_size(f"{number} GiB") == round(number * GIB)


@settings(deadline=None)
@given(st.one_of(st.text(max_size=12), st.floats(), st.integers(), st.booleans(), st.none(), st.lists(st.integers(), max_size=2)))
def test_whatever_is_written_is_a_size_above_zero_or_none(value: object) -> None:
    size = parse_size(value)
    assert size is None or (isinstance(size, int) and size > 0)


@pytest.mark.parametrize(
    "value", [0, -1, "0 GiB", "-80", "80 Gi", "80 G B", "lots", "", True, 1e30, float("inf"), [80], "8e1", "80,5", "٨٠"]
)
def test_what_is_no_size_is_refused_by_argument_and_value(value: object) -> None:
    with pytest.raises(ValueError, match="above 0") as refused:
        parse_needs({"min_gpu_memory": value})
    expected = f"llmperf(min_gpu_memory={value!r}): must be a size above 0, e.g. 80 (GiB), '80 GiB' or '80 GB'"
    assert str(refused.value) == expected


@pytest.mark.parametrize("value", [1, 8, "4", " +2 "])
def test_a_number_of_gpus_is_a_whole_number_from_one(value: object) -> None:
    assert parse_needs({"min_gpus": value}).min_gpus == int(str(value))


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        *(("min_gpus", value, "a whole number from 1, e.g. 4") for value in (0, -1, "two", 1.5, True, [1], "")),
        *(("gpu", value, "a part of the GPU's name, e.g. 'H200'") for value in ("", " ", 200, ["H200"], True)),
        *(("nvlink", value, "True or False") for value in ("yes", 1, 0, "")),
    ],
)
def test_a_bad_demand_is_a_plan_error_with_argument_value_and_remedy(name: str, value: object, remedy: str) -> None:
    with pytest.raises(PlanError) as refused:
        parse_marker({name: value})
    assert str(refused.value) == f"llmperf({name}={value!r}): must be {remedy}"


def test_the_demands_are_a_part_of_the_marker() -> None:
    assert Marker().needs == NO_NEEDS
    assert parse_marker({"tp": 2, "gpu": "h200"}).needs == Needs(gpu="h200")


def test_an_unknown_argument_is_answered_with_the_demands_too() -> None:
    with pytest.raises(PlanError, match=r"known are .*, gate, points, limits, min_gpus, min_gpu_memory, gpu, nvlink$"):
        parse_marker({"min_gpu": 4})
