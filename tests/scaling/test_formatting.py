import math

import pytest

from modjax.scaling.formatting import budget, clock, count


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (842, "842"),
        (12_345, "12.3k"),
        (999_900, "1M"),
        (4.56e6, "4.56M"),
        (1.2e9, "1.2B"),
        (math.inf, "unbounded"),
    ],
)
def test_counts_are_written_short(value, shown):
    assert count(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(6e18, "6e18"), (2.5e12, "2.5e12"), (1e5, "1e5"), (123456.0, "1.23e5")]
)
def test_budgets_are_written_as_one_says_them(value, shown):
    assert budget(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(41.7, "42s"), (59.6, "1m00s"), (185, "3m05s"), (7800, "2h10m")]
)
def test_times_are_written_as_a_clock_shows_them(seconds, shown):
    assert clock(seconds) == shown
