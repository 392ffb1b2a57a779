"""Quantities, shares and sizes as people write them."""

from __future__ import annotations

import pytest

from pytest_llmperf import units
from pytest_llmperf.units import GIB


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (None, "s", "-"),
        (0.0123, "s", "12.3 ms"), (-0.5, "s", "-500 ms"), (1.0, "s", "1 s"), (2.345, "s", "2.35 s"), (1234.0, "s", "1.23e+03 s"),
        (0.98765, "index", "0.988"), (1.5 * GIB, "bytes", "1.50 GiB"), (0.4242, "share", "42.4%"),
        (8242.4, "tokens/s", "8,242 tokens/s"), (99.96, "W", "100 W"), (1.534, "W", "1.53 W"), (7.0, "requests", "7 requests"),
        (float("inf"), "W", "inf W"), (float("nan"), "W", "nan W"),
    ],
)  # fmt: skip
def test_a_quantity_has_three_digits_or_whole_thousands(value: float | None, unit: str, text: str) -> None:
    assert units.quantity(value, unit) == text


@pytest.mark.parametrize(("value", "text", "up"), [(0.05, "5 %", "5 %"), (0.0741, "7.4 %", "8 %"), (0.126, "13 %", "13 %")])
def test_a_percentage_has_two_digits_or_is_rounded_up(value: float, text: str, up: str) -> None:
    assert (units.percent(value), units.percent(value, up=True)) == (text, up)


def test_a_change_in_percent_has_its_sign() -> None:
    assert [units.signed_percent(share) for share in (0.0411, -0.1, 0.0)] == ["+4.1%", "-10.0%", "+0.0%"]


def test_bytes_are_written_in_gib() -> None:
    assert [units.gib(79.6 * GIB), units.gib(1.5 * GIB, 2)] == ["79.6 GiB", "1.50 GiB"]


@pytest.mark.parametrize(("text", "share"), [("0.05", 0.05), ("5 %", 0.05), ("5%", 0.05)])
def test_a_share_is_read_as_a_fraction(text: str, share: float) -> None:
    assert units.parse_share(text) == pytest.approx(share)
    with pytest.raises(ValueError, match="could not convert"):
        units.parse_share("five")
