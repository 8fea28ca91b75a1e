"""Sizes and durations as they are printed."""

from __future__ import annotations

import pytest

from qserve.quant.quantities import format_bytes, format_seconds


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_951, "1.0 MB"),
        (269_060_552, "269.1 MB"),
        (5_000_000_000, "5.0 GB"),
        (2_000_000_000_000, "2.0 TB"),
        (-1500, "-1.5 kB"),
    ],
)
def test_bytes_are_given_in_powers_of_ten(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (187.4, "3 min 07 s"),
        (3599.6, "1 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_seconds_become_minutes_and_hours(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
