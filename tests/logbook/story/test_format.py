"""What the chronicle says must read as a person would say it, whatever number or text it is
given."""

import math

import pytest
from opt_logbook.story.format import byte_size, clock, duration, moment, printable, short

NOON = 1795348800.0  # 2026-11-22 12:00:00 UTC


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (1, "1 byte"),
        (2, "2 bytes"),
        (999, "999 bytes"),
        (999_499, "999 kB"),
        (999_600, "1 MB"),
        (44_300_000, "44.3 MB"),
    ],
)
def test_a_size_never_needs_an_exponent(number: int, words: str) -> None:
    assert byte_size(number) == words


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -math.inf, 1e18, 1e300, -1e300])
def test_a_time_that_no_calendar_has_is_said_not_a_crash(seconds: float) -> None:
    assert moment(seconds) == "an unknown time"
    assert clock(seconds, NOON) == "an unknown time"
    assert duration(seconds)


def test_an_endless_number_is_said_not_a_crash() -> None:
    assert duration(math.nan) == duration(math.inf) == "an unknown time"
    assert short(10**400)
    assert byte_size(10**400)


def test_a_time_has_its_date_where_the_reader_cannot_know_it() -> None:
    assert clock(NOON, NOON - 3600) == "12:00:00 UTC"
    assert clock(NOON, NOON - 86400) == "2026-11-22 12:00:00 UTC"
    assert clock(NOON, None) == "2026-11-22 12:00:00 UTC"


@pytest.mark.parametrize("mark", "\u061c\u200e\u200f\u2028\u2029\u202e\u2066")
def test_no_mark_turns_the_reading_direction_or_breaks_the_line(mark: str) -> None:
    assert printable(f"a{mark}b") == "a\ufffdb"
