"""Durations and dates as people write them."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker_free.errors import InvalidInput
from zmail import times


@pytest.mark.parametrize(
    ("text", "ms"),
    [("30s", 30_000), ("15m", 900_000), ("2h", 7_200_000), ("3d", 259_200_000), ("1W", 604_800_000)],
)
def test_a_duration_is_read_in_every_unit(text: str, ms: int) -> None:
    assert times.parse_duration(text) == ms
    assert times.parse_duration(times.format_duration(ms)) == ms


@pytest.mark.parametrize("text", ["", "5", "h", "-1h", "1.5h", "1h30m", "9999999999s", "١h"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        times.parse_duration(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-03-24T10:15:00Z", "2026-03-24T10:15:00Z"),
        ("2026-03-24T12:15:00+02:00", "2026-03-24T10:15:00Z"),
        ("2026-03-24 10:15", "2026-03-24T10:15:00Z"),
        ("2026-03-24", "2026-03-24T00:00:00Z"),
        ("2026-03-24T10:15:00.250Z", "2026-03-24T10:15:00.250Z"),
    ],
)
def test_a_date_is_read_with_and_without_time_and_zone(text: str, expected: str) -> None:
    assert times.format_time(times.parse_time(text)) == expected


@pytest.mark.parametrize(
    "text", ["", "tomorrow", "2026-02-30", "2026-13-01", "20260301", "0001-01-01T00:00:00+23:59"]
)
def test_what_is_no_date_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        times.parse_time(text)


@given(st.integers(min_value=-62_135_596_800_000, max_value=253_402_300_799_999))
def test_every_time_reads_back_to_the_millisecond(time_ms: int) -> None:
    assert times.parse_time(times.format_time(time_ms)) == time_ms
    assert times.parse_time(times.format_day(time_ms)) == time_ms


@settings(deadline=None)
@given(st.text() | st.from_regex(times._TIME, fullmatch=True))
def test_any_text_is_a_time_or_invalid_input(text: str) -> None:
    for parse in (times.parse_time, times.parse_duration):
        with suppress(InvalidInput):
            assert isinstance(parse(text), int)


@pytest.mark.parametrize(
    ("gone_ms", "words"),
    [
        (-5, "just now"),
        (9_999, "just now"),
        (40_000, "40 s ago"),
        (3_600_000, "1 h ago"),
        (9 * 86_400_000, "9 d ago"),
    ],
)
def test_an_age_is_told_in_its_largest_unit(gone_ms: int, words: str) -> None:
    assert times.age(since_ms=1_000_000_000, now_ms=1_000_000_000 + gone_ms) == words
